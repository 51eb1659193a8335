"""What a call must look like. Every error names the argument, what it got and what it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from rada_kernels.options import Options, Params

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(image: Tensor, text: Tensor, params: Params, options: Options) -> None:
    """Raise TypeError or ValueError where features, layers, scale or bias do not fit together."""
    _check_features("image_features", "B", image)
    _check_features("text_features", "K", text)
    width = image.shape[1]
    if text.shape[1] != width:
        raise ValueError(f"text_features: got width {text.shape[1]}; it takes [K, {width}], as wide as image_features")
    if text.shape[0] == 0:
        raise ValueError("text_features: got an empty class set [0, D]; it takes at least one class")
    _check_beside("text_features", text, image)
    heads = options.num_heads
    if width % heads:
        raise ValueError(f"num_heads: got {heads}; it takes a divisor of the embedding width {width}")
    autocast = torch.is_autocast_enabled(image.device.type)
    for name, tensor in zip(Params._fields, params.layers, strict=False):
        shape = (width, width) if name.endswith("weight") else (width,)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}; it takes a tensor {list(shape)}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: got shape {list(tensor.shape)}; it takes {list(shape)} for features of width {width}"
            )
        _check_beside(name, tensor, image, any_dtype=autocast)
    check_scalar("logit_scale", params.logit_scale)
    if params.logit_bias is not None:
        check_scalar("logit_bias", params.logit_bias)


def check_scalar(name: str, value: Tensor | float) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: got shape {list(value.shape)}; it takes a float or a 0-d tensor")
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name}: got dtype {value.dtype}; it takes a float or a floating 0-d tensor")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: got {type(value).__name__}; it takes a float or a 0-d tensor")
    elif name == "logit_scale" and not value >= 0:
        raise ValueError(f"logit_scale: got {value}; it takes the exponentiated scale, a positive number")


def _check_features(name: str, rows: str, features: Tensor) -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: got {type(features).__name__}; it takes a tensor [{rows}, D]")
    if features.dim() != 2:
        raise ValueError(f"{name}: got shape {list(features.shape)}; it takes [{rows}, D]")
    if features.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {features.dtype}; it takes one of {', '.join(map(str, FLOATS))}")
    if features.shape[1] == 0:
        raise ValueError(f"{name}: got width 0; it takes [{rows}, D] with D at least 1")


def _check_beside(name: str, tensor: Tensor, image: Tensor, any_dtype: bool = False) -> None:
    """Same device and dtype as the image features."""
    if tensor.device != image.device:
        raise ValueError(f"{name}: got device {tensor.device}; it takes {image.device}, where image_features are")
    if tensor.dtype != image.dtype and not (any_dtype and tensor.dtype.is_floating_point):
        raise TypeError(
            f"{name}: got dtype {tensor.dtype}; it takes {image.dtype}, as image_features have "
            "(cast one of them, or run under torch.autocast)"
        )
