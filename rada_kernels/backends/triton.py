"""The `triton` backend: the three steps as Triton kernels for CUDA and ROCm, no pair of classes and no mask in memory.

Three launches forward; float32 products follow torch.get_float32_matmul_precision().
Results are deterministic. Under TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly, as numpy.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from rada_kernels import ops
from rada_kernels.budget import SAVE_BYTES, budget
from rada_kernels.logit_reduction.triton.state import Reduced
from rada_kernels.mask_attention.config import direct_classes, forward_config
from rada_kernels.mask_attention.triton.state import Attended
from rada_kernels.numerics import unit_rows_backward
from rada_kernels.options import Options, Params, Wanted
from rada_kernels.rational_projection.triton.state import Projections
from rada_kernels.triton_common.device import Device, gpu
from rada_kernels.triton_common.target import Target, target_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_WIDTHS = (16, 32, 48, 64, 80, 96, 128)
MAX_WIDTH, MAX_HEADS = 1536, 32
OLDEST = (8, 0)  # compute capability: bfloat16 tensor cores and asynchronous copies

STATUS = "compiled for, verified by interpreter, not yet run on hardware"


def usable(dtype: torch.dtype, device: torch.device, embed_dim: int, num_heads: int) -> tuple[bool, str]:
    if not _installed():
        return False, "Triton is not installed"
    if device.type == "cpu":
        if not interpreted():
            return False, "device cpu: it takes a CUDA or ROCm device (or TRITON_INTERPRET=1)"
    elif device.type != "cuda":
        return False, f"device {device.type}: it takes a CUDA or ROCm device"
    elif not torch.cuda.is_available():
        return False, f"device {device}: torch finds no CUDA or ROCm device here"
    elif not torch.version.hip and torch.cuda.get_device_capability(device) < OLDEST:
        major, minor = torch.cuda.get_device_capability(device)
        return False, f"compute capability {major}.{minor}: it takes {OLDEST[0]}.{OLDEST[1]} or newer"
    elif dtype == torch.float32 and torch.version.hip and _gpu(device).family == "rdna":
        return (
            False,
            "dtype torch.float32 on RDNA: its matrix products take 16 bits, and the kernels would spill",
        )
    if dtype not in DTYPES:
        return False, f"dtype {dtype}: it takes one of {', '.join(map(str, DTYPES))}"
    if embed_dim > MAX_WIDTH:
        return False, f"embed_dim {embed_dim}: it takes at most {MAX_WIDTH}"
    if num_heads > MAX_HEADS:
        return False, f"num_heads {num_heads}: it takes at most {MAX_HEADS}"
    if embed_dim % num_heads or embed_dim // num_heads not in HEAD_WIDTHS:
        return False, f"head width {embed_dim / num_heads:g}: it takes one of {', '.join(map(str, HEAD_WIDTHS))}"
    return True, f"Triton kernels, {STATUS}" if device.type == "cuda" else "Triton kernels, interpreted"


def _gpu(device: torch.device) -> Device:
    return gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class Kept(NamedTuple):
    """What the first two steps leave for the backward pass; nothing where the byte budget had no room."""

    projected: Projections | None = None
    attended: Attended | None = None

    def tensors(self) -> list[Tensor]:
        """As an operator returns them: without `largest`, which is given out, and results must not share memory."""
        return [*self.projected[:-1], *self.attended[:-1]] if self.projected and self.attended else []

    @staticmethod
    def of(tensors: list[Tensor], tile: int | None) -> Kept:
        fields = len(Projections._fields) - 1
        return Kept(Projections._make((*tensors[:fields], None)), Attended._make((*tensors[fields:], tile)))


def empty_kept(image: Tensor, text: Tensor, options: Options, save: bool, target: Target | None = None) -> Kept:
    """Uninitialised tensors for what a call keeps, from shapes alone: everything, or nothing beyond RADA_SAVE_BYTES."""
    classes = text.shape[0]  # len would fix a symbolic K
    if not (save and _fits_budget(image, classes, options)):
        return Kept()
    return Kept(
        Projections.empty(image, text, options, save=True),
        Attended.empty(image, classes, options, *_form(image, classes, options, target or target_of(image))),
    )


def _form(image: Tensor, classes: int, options: Options, target: Target) -> tuple[bool, int]:
    """Whether the attention's direct form serves a call, and the row tile."""
    direct, config = forward_config(target, image.dtype, classes, _head_width(image, options))
    return direct, config.BM


def _head_width(image: Tensor, options: Options) -> int:
    return int(image.shape[-1]) // options.num_heads  # a symbolic width is fixed: the layers have it


def _fits_budget(image: Tensor, classes: int, options: Options) -> bool:
    direct = classes <= direct_classes(image.dtype, _head_width(image, options))
    kinds = len(options.queries) - ("image" in options.queries)
    row_tensors = 2 + ("rational" in options.queries) + (1 if direct else kinds)
    return row_tensors * classes * image.numel() * image.dtype.itemsize <= budget("RADA_SAVE_BYTES", SAVE_BYTES)


def _run(
    image: Tensor, text: Tensor, params: Params, options: Options, save: bool, target: Target
) -> tuple[Reduced, Kept]:
    """The three steps."""
    from rada_kernels.logit_reduction.triton.forward import logit_reduction_fwd
    from rada_kernels.mask_attention.triton.forward import mask_attention_fwd
    from rada_kernels.rational_projection.triton.forward import rational_projection_fwd

    projected = rational_projection_fwd(image, text, params, options, save=save, target=target)
    attended = mask_attention_fwd(projected, options, target=target)
    reduced = logit_reduction_fwd(attended, projected, image, text, params, options, target=target)
    return reduced, Kept(projected, attended)


def forward(
    image: Tensor, text: Tensor, params: Params, options: Options, save: bool, target: Target | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Masked sums [B, K], each image's deviation |M - 1| [B], and what the backward pass starts from.

    target: where to launch; None: the tensors' own device.
    """
    if not len(image):
        sums = image.new_empty(0, len(text), dtype=torch.float32)
        return sums, sums.new_empty(0), empty_kept(image, text, options, save).tensors()
    image, text, params = _contiguous(image, text, params)
    save = save and _fits_budget(image, len(text), options)
    with _on_device(image):
        reduced, kept = _run(image, text, params, options, save, target or target_of(image))
    return *reduced, kept.tensors() if save else []


def attended_rows(
    image: Tensor, text: Tensor, params: Params, options: Options, target: Target | None = None
) -> Tensor:
    """The attended rows O [B, K, D] in the dtype of the features."""
    from rada_kernels.mask_attention.triton.forward import mask_attention_fwd
    from rada_kernels.rational_projection.triton.forward import rational_projection_fwd

    if not len(image):
        return image.new_empty(0, len(text), image.shape[1])
    image, text, params = _contiguous(image, text, params)
    target = target or target_of(image)
    with _on_device(image):
        projected = rational_projection_fwd(image, text, params, options, save=False, target=target)
        return mask_attention_fwd(projected, options, target=target).combine(options).to(image.dtype)


def _contiguous(image: Tensor, text: Tensor, params: Params) -> tuple[Tensor, Tensor, Params]:
    layers = [layer.contiguous() for layer in params.layers]
    return image.contiguous(), text.contiguous(), Params._make((*layers, params.scale.to(torch.float32), None))


def _on_device(tensor: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def backward(
    grad_sums: Tensor,  # [B, K]
    grad_deviation: Tensor | None,  # [B]
    image: Tensor,
    text: Tensor,
    params: Params,
    kept: list[Tensor],
    options: Options,
    wanted: Wanted,
    target: Target | None = None,
) -> list[Tensor]:
    """The gradients that are wanted, in this order: image, text, the twelve layer tensors."""
    if not len(image):
        return [torch.zeros_like(tensor) for tensor in _differentiated(image, text, params, wanted)]
    image, text, params = _contiguous(image, text, params)
    target = target or target_of(image)
    with _on_device(image):
        if kept:
            state = Kept.of(kept, _form(image, len(text), options, target)[1])
        else:
            state = _run(image, text, params, options, True, target)[1]
        grad_sums = grad_sums.contiguous()
        if grad_deviation is not None:
            grad_deviation = grad_deviation.contiguous()
        return _backward(grad_sums, grad_deviation, image, text, params, state, options, wanted, target)


def _differentiated(image: Tensor, text: Tensor, params: Params, wanted: Wanted) -> list[Tensor]:
    return [image] * wanted.image + [text] * wanted.text + params.layers * wanted.layers


def _backward(grad_sums, grad_deviation, image, text, params, kept, options, wanted, target) -> list[Tensor]:
    from rada_kernels.logit_reduction.triton.backward import logit_reduction_bwd
    from rada_kernels.mask_attention.triton.backward import mask_attention_bwd
    from rada_kernels.rational_projection.triton.backward import (
        rational_projection_bwd_features,
        rational_projection_bwd_weights,
    )

    projected, attended = kept
    call = image, text, params, options
    inverse = projected.inverse_image, projected.inverse_text
    reduction = logit_reduction_bwd(grad_sums, grad_deviation, attended, projected, *call, wanted, target=target)
    grad_rows = (reduction.out.flatten(0, 1) @ params.out_weight).view_as(reduction.out)
    attention = mask_attention_bwd(grad_rows, projected, attended, options, target=target)
    # The queries of the feature rows: W (√s x / |x|) + c.
    root = params.logit_scale.sqrt()
    query_grads = {}
    if "image" in options.queries:
        query_grads["image"] = image, attention.query_image, inverse[0]
    if "text" in options.queries:
        query_grads["text"] = text, attention.query_text.sum(0, dtype=torch.float32), inverse[1]
    grads = []
    if wanted.image or wanted.text:
        grad_units = rational_projection_bwd_features(
            attention.projections, reduction.masked, image, text, params, projected, options, target=target
        )
        for on, kind, rows, grad, norm in zip(
            (wanted.image, wanted.text), ("image", "text"), (image, text), grad_units, inverse, strict=True
        ):
            if not on:
                continue
            if kind in query_grads:
                grad += root * (query_grads[kind][1] @ getattr(params, f"query_{kind}_weight").float())
            grads.append(unit_rows_backward(grad, rows * norm[:, None], norm) if options.normalize else grad)
    if wanted.layers:
        weights, biases = rational_projection_bwd_weights(
            attention.projections, image, text, params, projected, options, target=target
        )
        by_layer = dict(zip(("key", "value", "query_rational"), zip(weights, biases, strict=True), strict=False))
        for kind, (rows, grad, norm) in query_grads.items():
            by_layer[f"query_{kind}"] = grad.t() @ (rows * (root * norm)[:, None]), grad.sum(0)
        by_layer["out"] = reduction.out.flatten(0, 1).t() @ reduction.rows.flatten(0, 1), reduction.out_bias
        for name in ("query_image", "query_text", "query_rational", "key", "value", "out"):
            if name in by_layer:
                grads += by_layer[name]
            else:  # a query kind that is not in use has no part in the logits
                grads += [torch.zeros_like(getattr(params, f"{name}_{part}")) for part in ("weight", "bias")]
    # Rounded in one launch, into memory of their own: an operator's results must not overlap.
    rounded = [torch.empty_like(tensor) for tensor in _differentiated(image, text, params, wanted)]
    torch._foreach_copy_(rounded, grads)
    return rounded


masked_similarity, attended_rows = ops.register("triton", forward, backward, empty_kept, attended_rows)
