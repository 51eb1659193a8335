"""The `triton` backend: the three steps as Triton kernels for CUDA and ROCm, no pair of classes and no mask in memory.

Three launches forward; float32 products follow torch.get_float32_matmul_precision().
Results are deterministic. Under TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly, as numpy.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from rada_kernels import ops
from rada_kernels.budget import SAVE_BYTES, budget
from rada_kernels.launch import on_device
from rada_kernels.numerics import unit_rows_backward
from rada_kernels.options import Options, Params, Wanted

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
    if dtype not in DTYPES:
        return False, f"dtype {dtype}: it takes one of {', '.join(map(str, DTYPES))}"
    if embed_dim > MAX_WIDTH:
        return False, f"embed_dim {embed_dim}: it takes at most {MAX_WIDTH}"
    if num_heads > MAX_HEADS:
        return False, f"num_heads {num_heads}: it takes at most {MAX_HEADS}"
    if embed_dim % num_heads or embed_dim // num_heads not in HEAD_WIDTHS:
        return False, f"head width {embed_dim / num_heads:g}: it takes one of {', '.join(map(str, HEAD_WIDTHS))}"
    return True, f"Triton kernels, {STATUS}" if device.type == "cuda" else "Triton kernels, interpreted"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass
class Kept:
    """What the three steps leave for the backward pass; each [0, ...] where the byte budget had no room."""

    query_image: Tensor  # [B, D]
    query_text: Tensor  # [K, D]
    inverse_image: Tensor  # [B] float32
    inverse_text: Tensor  # [K] float32
    projections: Tensor  # [2 or 3, B, K, D] keys, values, rational queries if in use
    rows: Tensor  # the attended rows: see AttendedRows
    image_row: Tensor
    tops: Tensor
    totals: Tensor
    peak: Tensor  # [B] int64, with penalty "linf": where the largest |M - 1| is, see Statistic

    def tensors(self) -> list[Tensor]:
        return list(vars(self).values())


def _fits_budget(image: Tensor, text: Tensor, options: Options) -> bool:
    """Whether what a call would keep for its backward pass is within RADA_SAVE_BYTES."""
    from rada_kernels.mask_attention.triton import empty_attended_rows

    row_tensors = 2 + ("rational" in options.queries) + len(empty_attended_rows(image[:0], len(text), options).rows)
    row_bytes = row_tensors * len(text) * image.numel() * image.dtype.itemsize
    return row_bytes <= budget("RADA_SAVE_BYTES", SAVE_BYTES)


def empty_kept(image: Tensor, text: Tensor, options: Options, save: bool) -> Kept:
    """Uninitialised tensors for what a call keeps, from shapes alone: everything or nothing."""
    from rada_kernels.logit_reduction.triton import empty_statistic
    from rada_kernels.mask_attention.triton import empty_attended_rows

    (batch, width), classes = image.shape, text.shape[0]
    layers = 2 + ("rational" in options.queries)
    keep = save and _fits_budget(image, text, options)
    b, k = batch * keep, classes * keep
    return Kept(
        query_image=image.new_empty(b * ("image" in options.queries), width),
        query_text=image.new_empty(k * ("text" in options.queries), width),
        inverse_image=image.new_empty(b, dtype=torch.float32),
        inverse_text=image.new_empty(k, dtype=torch.float32),
        projections=image.new_empty(layers, b, classes, width),
        **empty_attended_rows(image[:b], classes, options)._asdict(),
        peak=empty_statistic(image[:b], classes, options, save=True).peak,
    )


def _run(
    image: Tensor, text: Tensor, params: Params, options: Options, save: bool
) -> tuple[Tensor, Tensor, Kept | None]:
    """The three steps: masked sums [B, K], each image's statistic of |M - 1| [B], and what a backward pass needs."""
    from rada_kernels.logit_reduction.triton import empty_statistic, logit_reduction_fwd
    from rada_kernels.mask_attention.triton import empty_attended_rows, mask_attention_fwd
    from rada_kernels.rational_projection.triton import rational_projection_fwd

    statistic = empty_statistic(image, len(text), options, save)
    projected = rational_projection_fwd(image, text, params, options, statistic.largest, statistic.peak)
    attended = empty_attended_rows(image, len(text), options)
    mask_attention_fwd(projected.query_image, projected.query_text, projected.projections, options, attended)
    inverse = projected.inverse_image, projected.inverse_text
    sums = logit_reduction_fwd(attended, params, image, text, *inverse, options, statistic)
    return sums, statistic.deviation(), Kept(*projected, *attended, statistic.peak) if save else None


def forward(
    image: Tensor, text: Tensor, params: Params, options: Options, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Masked sums [B, K], each image's statistic of |M - 1| [B], and what the backward pass starts from."""
    if not len(image):
        return (
            image.new_empty(0, len(text), dtype=torch.float32),
            image.new_empty(0, dtype=torch.float32),
            empty_kept(image, text, options, save).tensors(),
        )
    image, text, params = _contiguous(image, text, params)
    with on_device(image):
        save = save and _fits_budget(image, text, options)
        sums, deviation, kept = _run(image, text, params, options, save)
    return sums, deviation, (kept or empty_kept(image, text, options, save=False)).tensors()


def _contiguous(image: Tensor, text: Tensor, params: Params) -> tuple[Tensor, Tensor, Params]:
    layers = [layer.contiguous() for layer in params.layers]
    return image.contiguous(), text.contiguous(), Params._make((*layers, params.scale.to(torch.float32), None))


def backward(
    grad_sums: Tensor,  # [B, K]
    grad_deviation: Tensor | None,  # [B]
    image: Tensor,
    text: Tensor,
    params: Params,
    kept_tensors: list[Tensor],
    options: Options,
    wanted: Wanted,
) -> list[Tensor]:
    """The gradients that are wanted, in this order: image, text, the twelve layer tensors."""
    if not len(image):
        return [torch.zeros_like(tensor) for tensor in _differentiated(image, text, params, wanted)]
    image, text, params = _contiguous(image, text, params)
    with on_device(image):
        kept = Kept(*kept_tensors)
        if not len(kept.inverse_image):
            kept = cast(Kept, _run(image, text, params, options, save=True)[2])
        grad_sums = grad_sums.contiguous()
        if grad_deviation is not None:
            grad_deviation = grad_deviation.contiguous()
        return _backward(grad_sums, grad_deviation, image, text, params, kept, options, wanted)


def _differentiated(image: Tensor, text: Tensor, params: Params, wanted: Wanted) -> list[Tensor]:
    return [image] * wanted.image + [text] * wanted.text + params.layers * wanted.layers


def _backward(grad_sums, grad_deviation, image, text, params, kept, options, wanted) -> list[Tensor]:
    from rada_kernels.logit_reduction.triton import logit_reduction_bwd
    from rada_kernels.mask_attention.triton import AttendedRows, mask_attention_bwd
    from rada_kernels.rational_projection.triton import (
        rational_projection_bwd_features,
        rational_projection_bwd_weights,
    )

    features = wanted.image or wanted.text
    attended = AttendedRows(*(getattr(kept, name) for name in AttendedRows._fields))
    inverse = kept.inverse_image, kept.inverse_text
    grad_out, rows, grad_out_bias, masked = logit_reduction_bwd(
        grad_sums, grad_deviation, attended, kept.peak, params, image, text, *inverse, options,
        layers=wanted.layers, features=features,
    )  # fmt: skip
    grad_rows = (grad_out.flatten(0, 1) @ params.out_weight).view_as(grad_out)
    grad_projections, grad_text_query, grad_image_query = mask_attention_bwd(
        grad_rows, kept.query_image, kept.query_text, kept.projections, options, attended
    )
    # The queries of the feature rows: W (√s x / |x|) + c.
    root = params.logit_scale.sqrt()
    query_grads = {}
    if "image" in options.queries:
        query_grads["image"] = image, grad_image_query, inverse[0]
    if "text" in options.queries:
        query_grads["text"] = text, grad_text_query.sum(0, dtype=torch.float32), inverse[1]
    grads = []
    if features:
        grad_units = rational_projection_bwd_features(image, text, *inverse, params, grad_projections, masked)
        for on, kind, rows_in, grad, norm in zip(
            (wanted.image, wanted.text), ("image", "text"), (image, text), grad_units, inverse, strict=True
        ):
            if not on:
                continue
            if kind in query_grads:
                grad += root * (query_grads[kind][1] @ getattr(params, f"query_{kind}_weight").float())
            grads.append(unit_rows_backward(grad, rows_in * norm[:, None], norm) if options.normalize else grad)
    if wanted.layers:
        weights, biases = rational_projection_bwd_weights(image, text, *inverse, params.logit_scale, grad_projections)
        by_layer = dict(zip(("key", "value", "query_rational"), zip(weights, biases, strict=True), strict=False))
        for kind, (rows_in, grad, norm) in query_grads.items():
            by_layer[f"query_{kind}"] = grad.t() @ (rows_in * (root * norm)[:, None]), grad.sum(0)
        by_layer["out"] = grad_out.flatten(0, 1).t() @ rows.flatten(0, 1), grad_out_bias
        for name in ("query_image", "query_text", "query_rational", "key", "value", "out"):
            if name in by_layer:
                grads += by_layer[name]
            else:  # a query kind that is not in use has no part in the logits
                grads += [torch.zeros_like(getattr(params, f"{name}_{part}")) for part in ("weight", "bias")]
    # Rounded in one launch, into memory of their own: an operator's results must not overlap.
    rounded = [torch.empty_like(tensor) for tensor in _differentiated(image, text, params, wanted)]
    torch._foreach_copy_(rounded, grads)
    return rounded


masked_similarity = ops.register("triton", forward, backward, empty_kept)
