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
from rada_kernels.budget import MIB, SAVE_BYTES, budget
from rada_kernels.mask_attention.config import forward_config
from rada_kernels.options import Options, Params, Wanted
from rada_kernels.triton_common.call import Call, Shapes
from rada_kernels.triton_common.device import Device, gpu
from rada_kernels.triton_common.state import Attended, Gradients, Projections, Reduced
from rada_kernels.triton_common.target import Target, target_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_WIDTH, MAX_HEADS = 256, 32
RDNA_HEAD_WIDTH = 64
# What is not saved is computed in chunks of images that would save so many bytes; a backward pass takes about thrice
# that. 87 images of 1000 classes of width 512 in 16 bits: 87,000 rows, programs for every multiprocessor.
CHUNK_BYTES = 512 * MIB
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
    elif torch.version.hip and (reason := spills(_gpu(device), dtype, embed_dim / num_heads)):
        return False, reason
    if dtype not in DTYPES:
        return False, f"dtype {dtype}: it takes one of {', '.join(map(str, DTYPES))}"
    if num_heads > MAX_HEADS:
        return False, f"num_heads {num_heads}: it takes at most {MAX_HEADS}"
    if embed_dim % num_heads or embed_dim // num_heads > MAX_HEAD_WIDTH:
        return False, f"head width {embed_dim / num_heads:g}: it takes a whole number up to {MAX_HEAD_WIDTH}"
    return True, f"Triton kernels, {STATUS}" if device.type == "cuda" else "Triton kernels, interpreted"


def spills(device: Device, dtype: torch.dtype, head_width: float) -> str:
    """Why a device's registers do not hold such heads in any blocks; empty where they do."""
    if device.family != "rdna":
        return ""
    if dtype == torch.float32:
        return "dtype torch.float32 on RDNA: its matrix products take 16 bits, and the kernels would spill"
    if head_width > RDNA_HEAD_WIDTH:
        return f"head width {head_width:g} on RDNA: it takes at most {RDNA_HEAD_WIDTH}, beyond which the kernels spill"
    return ""


def _gpu(device: torch.device) -> Device:
    return gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


class Saved(NamedTuple):
    """What the steps leave for the backward pass."""

    projected: Projections
    attended: Attended

    def tensors(self) -> list[Tensor]:
        """As an operator returns them: without `largest`, which is given out, and results must not share memory."""
        return [*self.projected[:-2], *self.attended[:-1]]

    @staticmethod
    def of(tensors: list[Tensor], tile: int) -> Saved:
        fields = len(Projections._fields) - 2
        projected = Projections._make((*tensors[:fields], None, None))
        return Saved(projected, Attended._make((*tensors[fields:], tile)))


def empty_saved(
    image: Tensor, text: Tensor, options: Options, save: bool, target: Target | None = None
) -> list[Tensor]:
    """Uninitialised tensors for what a call saves, from shapes alone: everything, or nothing beyond RADA_SAVE_BYTES."""
    classes = text.shape[0]  # len would fix a symbolic K
    if not (save and _fits_budget(image, classes, options)):
        return []
    tile = _row_tile(image, classes, options, target or target_of(image))
    projected = Projections.empty(image, text, options, save=True)
    return Saved(projected, Attended.empty(image, classes, options, tile, save=True)).tensors()


def _row_tile(image: Tensor, classes: int, options: Options, target: Target) -> int:
    width = int(image.shape[-1])  # a symbolic width is fixed: the layers have it
    shapes = Shapes.of(options, width, image.dtype, target.device, torch.get_float32_matmul_precision())
    return forward_config(target, shapes, classes).BM


def _image_bytes(image: Tensor, classes: int, options: Options) -> int:
    """What the forward pass of one of these images saves."""
    kinds = len(options.queries) - ("image" in options.queries)
    row_tensors = 2 + ("rational" in options.queries) + kinds + 1  # keys, values, queries; each kind's rows; O
    return row_tensors * classes * image.shape[1] * image.dtype.itemsize


def _fits_budget(image: Tensor, classes: int, options: Options) -> bool:
    return image.shape[0] * _image_bytes(image, classes, options) <= budget("RADA_SAVE_BYTES", SAVE_BYTES)


def _chunks(call: Call) -> list[slice]:
    """Images at a time: as many as CHUNK_BYTES have room for."""
    batch, classes, _ = call.sizes
    images = max(1, CHUNK_BYTES // _image_bytes(call.image, classes, call.options))
    return [slice(start, start + images) for start in range(0, batch, images)]


def _call(
    image: Tensor, text: Tensor, params: Params, options: Options, target: Target | None, *purpose, given=()
) -> Call:
    layers = [layer.contiguous() for layer in params[:12]]
    params = Params._make((*layers, params.scale.to(torch.float32), None))
    target = target or target_of(image)
    return Call(image.contiguous(), text.contiguous(), params, options, target, purpose, given)


def _on_device(tensor: Tensor):
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _attend(call: Call, save: bool) -> tuple[Projections, Attended]:
    from rada_kernels.mask_attention.triton.forward import mask_attention_fwd
    from rada_kernels.rational_projection.triton.forward import rational_projection_fwd

    projected = rational_projection_fwd(call, save=save)
    return projected, mask_attention_fwd(call, projected, save=save)


def _forward(call: Call, save: bool) -> tuple[Reduced, Saved]:
    from rada_kernels.logit_reduction.triton.forward import logit_reduction_fwd

    projected, attended = _attend(call, save)
    reduced = logit_reduction_fwd(call, projected, attended)
    return reduced, Saved(projected, attended)


def forward(
    image: Tensor, text: Tensor, params: Params, options: Options, save: bool, target: Target | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Masked sums [B, K], each image's deviation |M - 1| [B], and what the backward pass starts from.

    target: where to launch; None: the tensors' own device.
    """
    if image.shape[0] == 0:
        sums = image.new_empty(0, text.shape[0], dtype=torch.float32)
        return sums, sums.new_empty(0), empty_saved(image, text, options, save)
    save = save and _fits_budget(image, text.shape[0], options)
    call = _call(image, text, params, options, target, "forward", save)
    with _on_device(image):
        if save:
            reduced, saved = _forward(call, save)
            return reduced.sums, reduced.deviation, saved.tensors()
        chunks = [_forward(call.of_images(b), save)[0] for b in _chunks(call)]
    sums, deviation = chunks[0] if len(chunks) == 1 else map(torch.cat, zip(*chunks, strict=True))
    return sums, deviation, []


def attended_rows(
    image: Tensor, text: Tensor, params: Params, options: Options, target: Target | None = None
) -> Tensor:
    """The attended rows O [B, K, D] in the dtype of the features."""
    from rada_kernels.mask_attention.triton.forward import combine_rows

    if image.shape[0] == 0:
        return image.new_empty(0, text.shape[0], image.shape[1])
    call = _call(image, text, params, options, target, "attended rows")
    with _on_device(image):
        chunks = [call.of_images(b) for b in _chunks(call)]
        return torch.cat([combine_rows(chunk, _attend(chunk, save=False)[1]) for chunk in chunks])


def backward(
    grad_sums: Tensor, grad_deviation: Tensor | None, image: Tensor, text: Tensor, params: Params,
    saved: list[Tensor], options: Options, wanted: Wanted, target: Target | None = None,
) -> list[Tensor]:  # fmt: skip
    """The gradients that are wanted, in this order: image, text, the twelve layer tensors."""
    if image.shape[0] == 0:
        of = [image] * wanted.image + [text] * wanted.text + params.layers * wanted.layers
        return [torch.zeros_like(tensor) for tensor in of]
    grad_sums = grad_sums.contiguous()
    if grad_deviation is not None:
        grad_deviation = grad_deviation.contiguous()
    with _on_device(image):
        given = (grad_sums, *saved) if grad_deviation is None else (grad_sums, grad_deviation, *saved)
        call = _call(image, text, params, options, target, "backward", wanted, len(given), given=given)
        if not saved:
            return _backward_in_chunks(call, grad_sums, grad_deviation, wanted)
        state = Saved.of(saved, call.config(forward_config, text.shape[0]).BM)
        return _backward(call, state, grad_sums, grad_deviation, wanted, image.dtype)


def _backward(
    call: Call, saved: Saved, grad_sums: Tensor, grad_deviation: Tensor | None, wanted: Wanted, dtype: torch.dtype
) -> list[Tensor]:
    """In the dtype given."""
    from rada_kernels.logit_reduction.triton.backward import logit_reduction_bwd
    from rada_kernels.mask_attention.triton.backward import mask_attention_bwd
    from rada_kernels.rational_projection.triton.backward import rational_projection_bwd

    reduction = logit_reduction_bwd(call, saved.projected, saved.attended.combined, grad_sums, grad_deviation, wanted)
    attention = mask_attention_bwd(call, saved.projected, saved.attended, reduction.attended)
    out = Gradients.empty(call.image, call.text, call.params, call.options, wanted, dtype)
    rational_projection_bwd(call, saved.projected, attention, reduction, out)
    return out.tensors()


def _backward_in_chunks(call: Call, grad_sums: Tensor, grad_deviation: Tensor | None, wanted: Wanted) -> list[Tensor]:
    """With everything computed again, summed in float32 and rounded once."""
    of_images, total = [], None
    for b in _chunks(call):
        chunk = call.of_images(b)
        deviation = None if grad_deviation is None else grad_deviation[b]
        grads = _backward(chunk, _forward(chunk, save=True)[1], grad_sums[b], deviation, wanted, torch.float32)
        if wanted.image:
            of_images.append(grads.pop(0))
        total = grads if total is None else [sum_ + grad for sum_, grad in zip(total, grads, strict=True)]
    grads = ([torch.cat(of_images)] if wanted.image else []) + (total or [])
    return [grad.to(call.dtype) for grad in grads]


masked_similarity, attended_rows = ops.register("triton", forward, backward, empty_saved, attended_rows)
