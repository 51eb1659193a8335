"""The `torch` backend: the reference's numbers in plain PyTorch, in tiles of bounded bytes, on any device.

Images go through all three steps a chunk at a time. The backward pass takes from the forward pass what
RADA_SAVE_BYTES had room for and computes the rest again, chunk by chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rada_kernels import ops
from rada_kernels.budget import SAVE_BYTES, Tiling, budget
from rada_kernels.logit_reduction.plain import Mask, output_backward
from rada_kernels.mask_attention.plain import Attended, mask_attention, mask_attention_backward
from rada_kernels.numerics import LayerGradients, accumulation_dtype
from rada_kernels.options import Options, Params, Wanted
from rada_kernels.rational_projection.plain import (
    FeatureQueries,
    Features,
    ProjectionGradients,
    join_heads,
    layers_over_x,
    rational_projection,
    split_heads,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def usable(dtype: torch.dtype, device: torch.device, embed_dim: int, num_heads: int) -> tuple[bool, str]:
    if dtype not in DTYPES:
        return False, f"dtype {dtype}: it takes one of {', '.join(map(str, DTYPES))}"
    return True, "plain PyTorch in tiles, any device"


@dataclass
class Saved:
    """What the three steps leave for the backward pass, for b images and their U = b·H units, which are (image, head).

    Of the whole batch, or a view of one chunk of it. What the byte budget had no room for has a second dimension
    of 0 and is computed again: the exponentials alone, or everything.
    """

    projections: Tensor  # [N, U, K, E] keys, values, rational queries if in use
    rows: Tensor  # [1, U, K, E] Attended's tensors, of n = 0 to 2 matrix query kinds
    m: Tensor  # [n, U]
    l: Tensor  # [n, U]
    by_kind: Tensor  # [n, U, K, E]
    exponentials: Tensor  # [n, U, K, K] exp(score - m), accumulation dtype
    change: Tensor  # [1, b, K, D] M - 1, accumulation dtype
    peak: Tensor  # [1, b] the first place of the largest |M - 1|

    def tensors(self) -> list[Tensor]:
        return list(vars(self).values())

    def chunk(self, b: slice, num_heads: int) -> Saved:
        """The views that belong to the images of slice b."""
        u = slice(b.start * num_heads, b.stop * num_heads)
        views = {name: t[:, b if name in ("peak", "change") else u] for name, t in vars(self).items()}
        return Saved(**views)

    @property
    def attended(self) -> Attended:
        return Attended(self.rows[0], self.m, self.l, self.by_kind)

    @property
    def mask(self) -> Mask:
        return Mask(self.change[0], self.peak[0])

    def store(self, other: Saved) -> None:
        """Copy a chunk's tensors in, but for those not saved and those written in place."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            if mine.numel() and mine.data_ptr() != theirs.data_ptr():
                mine.copy_(theirs)


def empty_saved(image: Tensor, text: Tensor, options: Options, save: bool) -> list[Tensor]:
    """Uninitialised tensors for what a call saves, from shapes alone: first rows of width D, then the exponentials."""
    (batch, width), classes, heads = image.shape, text.shape[0], options.num_heads
    dtype = accumulation_dtype(image.dtype)
    matrix, layers = len(options.queries) - ("image" in options.queries), len(layers_over_x(options))
    rows = by_kind = exponentials = False
    if save:
        whole = Tiling.fit(classes, width, heads, image.dtype, image.device).rows >= classes
        room = budget("RADA_SAVE_BYTES", SAVE_BYTES)
        streamed = 0 if whole else matrix
        row_bytes = batch * classes * width * ((layers + 1 + streamed) * image.dtype.itemsize + dtype.itemsize)
        exponential_bytes = batch * matrix * heads * classes * classes * dtype.itemsize
        rows = row_bytes <= room
        by_kind = rows and not whole
        exponentials = whole and row_bytes + exponential_bytes <= room
    units, head_rows = batch * heads, (classes, width // heads)
    return Saved(
        projections=image.new_empty(layers, units * rows, *head_rows),
        rows=image.new_empty(1, units * rows, *head_rows),
        m=image.new_empty(matrix, units * rows, dtype=dtype),
        l=image.new_empty(matrix, units * rows, dtype=dtype),
        by_kind=image.new_empty(matrix, units * by_kind, *head_rows),
        exponentials=image.new_empty(matrix, units * exponentials, classes, classes, dtype=dtype),
        change=image.new_empty(1, batch * rows, classes, width, dtype=dtype),
        peak=image.new_empty(1, batch * rows, dtype=torch.int64),
    ).tensors()


class Call:
    """One call's constants, and its passes over a chunk of images."""

    def __init__(self, image: Tensor, text: Tensor, params: Params, options: Options):
        self.params, self.options = params, options
        self.batch, self.width = image.shape
        self.classes = text.shape[0]
        self.features = Features.of(image, text, params.scale, options.normalize)
        self.queries = FeatureQueries.of(self.features, params, options)
        self.factor = options.score_factor(self.width)
        self.tiling = Tiling.fit(self.classes, self.width, options.num_heads, image.dtype, image.device)

    def attend(self, b: slice, saved: Saved) -> tuple[Tensor, Attended]:
        """The first two steps for the images of slice b. Projections and exponentials are written where saved."""
        projections = saved.projections
        if not projections.numel():
            units = (b.stop - b.start) * self.options.num_heads
            head_rows = self.classes, self.width // self.options.num_heads
            projections = projections.new_empty(len(projections), units, *head_rows)
        layers = layers_over_x(self.options)
        rational_projection(self.features.rational_rows(b), self.params, layers, self.options.num_heads, projections)
        key, value, *rational = projections
        queries = self.queries.beside(rational, b)
        return projections, mask_attention(queries, key, value, saved.exponentials, self.factor, self.tiling)

    def forward(self, b: slice, saved: Saved) -> Saved:
        """The three steps for the images of slice b."""
        projections, (rows, m, l, by_kind) = self.attend(b, saved)
        mask = Mask.of(join_heads(rows, self.options.num_heads), self.params, self.features.f[b])
        return Saved(projections, rows[None], m, l, by_kind, saved.exponentials, mask.change[None], mask.peak[None])

    def backward(
        self, b: slice, saved: Saved, grad_sums: Tensor, grad_deviation: Tensor | None, grads: ProjectionGradients
    ) -> None:
        """The three steps backward for the images of slice b, added to grads."""
        (f, h), heads, wanted = self.features[:2], self.options.num_heads, grads.wanted
        grad_out = saved.mask.backward(grad_sums, grad_deviation, f[b], h, self.options.penalty)
        grad_out = grad_out.flatten(0, 1).to(self.features.dtype)  # [b·K, D]
        rows = join_heads(saved.rows[0], heads)
        grad_rows = output_backward(grad_out, rows, self.params, grads.layers if wanted.layers else None)
        key, value, *rational = saved.projections
        queries, grad_key, grad_value = mask_attention_backward(
            split_heads(grad_rows, self.classes, heads), self.queries.beside(rational, b), key, value,
            saved.attended, saved.exponentials, self.factor, self.tiling,
        )  # fmt: skip
        masked = saved.mask.masked(grad_sums) if wanted.image or wanted.text else None
        grads.add(b, {"key": grad_key, "value": grad_value, **queries.by_layer(self.options)}, masked)


def forward(
    image: Tensor, text: Tensor, params: Params, options: Options, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Masked sums [B, K], each image's deviation |M - 1| [B], and what the backward pass starts from."""
    call = Call(image, text, params, options)
    f, h = call.features[:2]
    saved = Saved(*empty_saved(image, text, options, save))
    sums, deviation = f.new_empty(call.batch, call.classes), f.new_empty(call.batch)
    for b in call.tiling.chunks(call.batch):
        mine = saved.chunk(b, options.num_heads)
        chunk = call.forward(b, mine)
        sums[b], deviation[b] = chunk.mask.sums(f[b], h), chunk.mask.deviation(options.penalty)
        mine.store(chunk)
    return sums, deviation, saved.tensors()


def attended_rows(image: Tensor, text: Tensor, params: Params, options: Options) -> Tensor:
    """The attended rows O [B, K, D] in the dtype of the features."""
    call = Call(image, text, params, options)
    saved = Saved(*empty_saved(image, text, options, save=False))
    rows = image.new_empty(call.batch, call.classes, call.width)
    for b in call.tiling.chunks(call.batch):
        _, attended = call.attend(b, saved.chunk(b, options.num_heads))
        rows[b] = join_heads(attended.rows, options.num_heads).view_as(rows[b])
    return rows


def mask(image: Tensor, text: Tensor, params: Params, options: Options) -> Tensor:
    """The mask M [B, K, D] in the dtype of the features."""
    call = Call(image, text, params, options)
    saved = Saved(*empty_saved(image, text, options, save=False))
    masks = image.new_empty(call.batch, call.classes, call.width)
    for b in call.tiling.chunks(call.batch):
        masks[b] = (1 + call.forward(b, saved.chunk(b, options.num_heads)).mask.change).to(image.dtype)
    return masks


def backward(
    grad_sums: Tensor, grad_deviation: Tensor | None, image: Tensor, text: Tensor, params: Params,
    saved_tensors: list[Tensor], options: Options, wanted: Wanted,
) -> list[Tensor]:  # fmt: skip
    """The gradients that are wanted, in this order: image, text, the twelve layer tensors."""
    call, saved, layers = Call(image, text, params, options), Saved(*saved_tensors), LayerGradients()
    sums = ProjectionGradients(call.features, params, options, wanted, layers)
    for b in call.tiling.chunks(call.batch):
        mine = saved.chunk(b, options.num_heads)
        chunk = mine if saved.rows.numel() else call.forward(b, mine)
        call.backward(b, chunk, grad_sums[b], None if grad_deviation is None else grad_deviation[b], sums)
    grads = sums.finish()
    if wanted.layers:
        grads += params.layer_grads(layers.sums)
    return [grad.to(image.dtype) for grad in grads]


masked_similarity, attended_rows = ops.register("torch", forward, backward, empty_saved, attended_rows)
