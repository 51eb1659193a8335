"""What a call must look like. Every error names the argument, what it got and what it takes.

The head's words are used: image_features and text_features for what rada_logits calls image and text, and for a layer
the name in the head's state dict beside the field of Params.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from rada_kernels.numerics import autocast_dtype
from rada_kernels.options import Options, Params

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYERS = {
    "query_image": "q_proj1",
    "query_text": "q_proj2",
    "query_rational": "q_proj3",
    "key": "k_proj",
    "value": "v_proj",
    "out": "out_proj",
}


def check_inputs(image: Tensor, text: Tensor, params: Params, options: Options) -> None:
    """Raise TypeError or ValueError where features, layers, scale or bias do not fit together."""
    _check_features("image_features", "B", image)
    _check_features("text_features", "K", text)
    width = image.shape[1]
    if text.shape[1] != width:
        raise ValueError(f"text_features: got width {text.shape[1]}; it takes [K, {width}], as wide as image_features")
    if text.shape[0] == 0:
        raise ValueError("text_features: got an empty class set [0, D]; it takes at least one class")
    layers = dict(zip(LAYER_NAMES, params.layers, strict=True))
    for name, tensor in layers.items():
        shape = (width, width) if "weight" in name else (width,)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}; it takes a tensor {list(shape)}")
        if tuple(tensor.shape) != shape:
            widths = {size for layer in params.layers for size in layer.shape}
            if len(widths) == 1:  # the layers agree: it is the features that are wrong
                raise ValueError(
                    f"image_features: got width {width}; it takes [B, {widths.pop()}], as wide as the layers"
                )
            raise ValueError(
                f"{name}: got shape {list(tensor.shape)}; it takes {list(shape)} for features of width {width}"
            )
    heads = options.num_heads
    if width % heads:
        raise ValueError(f"num_heads: got {heads}; it takes a divisor of the embedding width {width}")
    _check_together(image, text, layers)
    check_scalar("logit_scale", params.logit_scale)
    if params.logit_bias is not None:
        check_scalar("logit_bias", params.logit_bias)


def check_scalar(name: str, value: Tensor | float) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: got shape {list(value.shape)}; it takes a float or a 0-d tensor")
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name}: got dtype {value.dtype}; it takes a float or a floating 0-d tensor")
    elif isinstance(value, bool) or not isinstance(value, int | float | Real):  # NumPy's numbers are Real
        raise TypeError(f"{name}: got {type(value).__name__}; it takes a float or a 0-d tensor")
    elif name == "logit_scale" and not 0 <= value < math.inf:
        raise ValueError(f"logit_scale: got {value}; it takes the exponentiated scale, a positive finite number")


def _check_features(name: str, rows: str, features: Tensor) -> None:
    if not isinstance(features, Tensor):
        raise TypeError(f"{name}: got {type(features).__name__}; it takes a tensor [{rows}, D]")
    if features.dim() != 2:
        raise ValueError(f"{name}: got shape {list(features.shape)}; it takes [{rows}, D]")
    if features.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {features.dtype}; it takes one of {', '.join(map(str, FLOATS))}")
    if features.shape[1] == 0:
        raise ValueError(f"{name}: got width 0; it takes [{rows}, D] with D at least 1")
    if features.layout != torch.strided:
        raise TypeError(f"{name}: got layout {features.layout}; it takes a dense tensor [{rows}, D]")


def _layer_name(field: str) -> str:
    """key_weight -> k_proj.weight (params.key_weight)"""
    layer, _, kind = field.rpartition("_")
    return f"{LAYERS[layer]}.{kind} (params.{field})"


# The twelve layer tensors as errors call them.
LAYER_NAMES = tuple(map(_layer_name, Params._fields[:12]))


def _check_together(image: Tensor, text: Tensor, layers: dict[str, Tensor]) -> None:
    """One device and one dtype for all. Under autocast, which casts all but float64, any dtype but that."""
    first = next(iter(layers.values()))
    if not any(layer.device == image.device for layer in layers.values()):
        raise ValueError(
            f"image_features: got device {image.device}, but the layers are on {first.device}; "
            f"move the head, head.to({str(image.device)!r}), or the features"
        )
    for name, tensor in {"text_features": text, **layers}.items():
        if tensor.device != image.device:
            raise ValueError(f"{name}: got device {tensor.device}; it takes {image.device}, where image_features are")
    autocast = autocast_dtype(image.device) is not None

    def fits(tensor: Tensor) -> bool:
        if autocast and torch.float64 not in (tensor.dtype, image.dtype):
            return tensor.dtype.is_floating_point
        return tensor.dtype == image.dtype

    if not any(map(fits, layers.values())):
        hint = "" if torch.float64 in (image.dtype, first.dtype) else ", or run under torch.autocast"
        raise TypeError(
            f"image_features: got dtype {image.dtype}, but the layers have {first.dtype}; "
            f"cast the head, head.to({image.dtype}), or the features, features.to({first.dtype}){hint}"
        )
    for name, tensor in {"text_features": text, **layers}.items():
        if not fits(tensor):
            raise TypeError(f"{name}: got dtype {tensor.dtype}; it takes {image.dtype}, as image_features have")
