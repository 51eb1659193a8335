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
from rada_kernels.logit_reduction import plain as logit_reduction
from rada_kernels.mask_attention import plain as mask_attention
from rada_kernels.mask_attention.plain import Attended, Queries
from rada_kernels.numerics import LayerGradients, accumulation_dtype, inverse_norms, unit_rows_backward
from rada_kernels.options import Options, Params, Wanted
from rada_kernels.rational_projection import plain as rational_projection
from rada_kernels.rational_projection.plain import join_heads, split_heads

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def usable(dtype: torch.dtype, device: torch.device, embed_dim: int, num_heads: int) -> tuple[bool, str]:
    if dtype not in DTYPES:
        return False, f"dtype {dtype}: it takes one of {', '.join(map(str, DTYPES))}"
    return True, "plain PyTorch in tiles, any device"


@dataclass
class Kept:
    """What the three steps leave for the backward pass, for b images and their P = b·H (image, head) pairs.

    Of the whole batch, or a view of one chunk of it. What the byte budget had no room for has a second dimension
    of 0 and is computed again: the exponentials alone, or everything.
    """

    projections: Tensor  # [N, P, K, E] keys, values, rational queries if in use
    rows: Tensor  # [1, P, K, E] Attended's tensors, of n = 0 to 2 matrix query kinds
    m: Tensor  # [n, P]
    l: Tensor  # [n, P]
    by_kind: Tensor  # [n, P, K, E]
    exponentials: Tensor  # [n, P, K, K] exp(score - m), accumulation dtype
    change: Tensor  # [1, b, K, D] M - 1, accumulation dtype
    peak: Tensor  # [1, b] the first place of the largest |M - 1|

    def tensors(self) -> list[Tensor]:
        return list(vars(self).values())

    def chunk(self, b: slice, num_heads: int) -> Kept:
        """The views that belong to the images of slice b."""
        p = slice(b.start * num_heads, b.stop * num_heads)
        views = {name: t[:, b if name in ("peak", "change") else p] for name, t in vars(self).items()}
        return Kept(**views)

    @property
    def attended(self) -> Attended:
        return Attended(self.rows[0], self.m, self.l, self.by_kind)

    def store(self, other: Kept) -> None:
        """Copy a chunk's tensors in, but for those not kept and those written in place."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            if mine.numel() and mine.data_ptr() != theirs.data_ptr():
                mine.copy_(theirs)


def empty_kept(image: Tensor, text: Tensor, options: Options, save: bool) -> Kept:
    """Uninitialised tensors for what a call keeps, from shapes alone: first rows of width D, then the exponentials."""
    (batch, width), classes, heads = image.shape, text.shape[0], options.num_heads
    dtype = accumulation_dtype(image.dtype)
    matrix = len(options.queries) - ("image" in options.queries)
    layers = 2 + ("rational" in options.queries)
    keep = keep_by_kind = keep_exponentials = False
    if save:
        whole = Tiling.fit(classes, width, heads, image.dtype, image.device).rows >= classes
        room = budget("RADA_SAVE_BYTES", SAVE_BYTES)
        streamed = 0 if whole else matrix
        row_bytes = batch * classes * width * ((layers + 1 + streamed) * image.dtype.itemsize + dtype.itemsize)
        exponential_bytes = batch * matrix * heads * classes * classes * dtype.itemsize
        keep = row_bytes <= room
        keep_by_kind = keep and not whole
        keep_exponentials = whole and row_bytes + exponential_bytes <= room
    pairs = batch * heads
    head_rows = (classes, width // heads)
    return Kept(
        projections=image.new_empty(layers, pairs * keep, *head_rows),
        rows=image.new_empty(1, pairs * keep, *head_rows),
        m=image.new_empty(matrix, pairs * keep, dtype=dtype),
        l=image.new_empty(matrix, pairs * keep, dtype=dtype),
        by_kind=image.new_empty(matrix, pairs * keep_by_kind, *head_rows),
        exponentials=image.new_empty(matrix, pairs * keep_exponentials, classes, classes, dtype=dtype),
        change=image.new_empty(1, batch * keep, classes, width, dtype=dtype),
        peak=image.new_empty(1, batch * keep, dtype=torch.int64),
    )


class Call:
    """One call's constants: unit rows, the tiling, and the two queries that need no X."""

    def __init__(self, image: Tensor, text: Tensor, params: Params, options: Options):
        dtype = accumulation_dtype(image.dtype)
        self.params, self.options, self.dtype = params, options, image.dtype
        self.batch, self.width = image.shape
        self.classes = len(text)
        self.scale = params.scale.to(dtype)
        self.inverse = (inverse_norms(image), inverse_norms(text)) if options.normalize else None
        self.f, self.h = image.to(dtype).contiguous(), text.to(dtype).contiguous()
        if self.inverse:
            self.f, self.h = self.f * self.inverse[0].unsqueeze(-1), self.h * self.inverse[1].unsqueeze(-1)
        self.factor = options.score_factor(self.width)
        self.tiling = Tiling.fit(self.classes, self.width, options.num_heads, image.dtype, image.device)
        # The layers over X, in the order in which their results are kept.
        self.x_layers = ["key", "value"] + ["query_rational"] * ("rational" in options.queries)
        self.image_query = self.text_query = None
        root, heads = self.scale.sqrt(), options.num_heads
        if "image" in options.queries:
            self.image_query = rational_projection.direct_query(  # [B, H, E]
                root, self.f, *self.layer("query_image"), heads
            )
        if "text" in options.queries:
            self.text_query = rational_projection.direct_query(  # [H, K, E]
                root, self.h, *self.layer("query_text"), heads
            ).transpose(0, 1)

    def layer(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight [D, D] and bias [D]."""
        return getattr(self.params, f"{name}_weight"), getattr(self.params, f"{name}_bias")

    def rational_rows(self, b: slice) -> Tensor:
        return rational_projection.rational_rows(self.f[b], self.h, self.scale, self.dtype)

    def queries(self, b: slice, projections: Tensor) -> Queries:
        image = None if self.image_query is None else self.image_query[b].flatten(0, 1).unsqueeze(1)
        matrix = []
        if self.text_query is not None:
            matrix.append(self.text_query.repeat(b.stop - b.start, 1, 1))
        matrix.extend(projections[2:])
        return Queries(image, matrix)

    def attend(self, b: slice, kept: Kept) -> tuple[Tensor, Attended]:
        """Projections and attended rows of the images of slice b. What is kept of them is written in place."""
        heads = self.options.num_heads
        x = self.rational_rows(b)
        projections = kept.projections
        if not projections.numel():
            projections = projections.new_empty(
                len(self.x_layers), (b.stop - b.start) * heads, self.classes, self.width // heads
            )
        for name, out in zip(self.x_layers, projections, strict=True):
            rational_projection.rational_projection(x, *self.layer(name), heads, out)
        queries = self.queries(b, projections)
        key, value = projections[:2]
        attended = mask_attention.mask_attention(queries, key, value, kept.exponentials, self.factor, self.tiling)
        return projections, attended

    def forward(self, b: slice, kept: Kept) -> Kept:
        """The three steps for the images of slice b."""
        projections, (rows, m, l, by_kind) = self.attend(b, kept)
        heads = self.options.num_heads
        change = logit_reduction.mask_change(join_heads(rows, heads), self.params, self.f[b])
        peak = logit_reduction.peak(change)
        return Kept(projections, rows[None], m, l, by_kind, kept.exponentials, change[None], peak[None])


def forward(
    image: Tensor, text: Tensor, params: Params, options: Options, save: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Masked sums [B, K], each image's statistic of |M - 1| [B], and what the backward pass starts from."""
    call = Call(image, text, params, options)
    kept = empty_kept(image, text, options, save)
    sums = call.f.new_empty(call.batch, call.classes)
    deviation = call.f.new_empty(call.batch)
    for b in call.tiling.chunks(call.batch):
        mine = kept.chunk(b, options.num_heads)
        chunk = call.forward(b, mine)
        sums[b] = logit_reduction.masked_sums(chunk.change[0], call.f[b], call.h)
        deviation[b] = logit_reduction.deviation(chunk.change[0], chunk.peak[0], options.penalty)
        mine.store(chunk)
    return sums, deviation, kept.tensors()


def attended_rows(image: Tensor, text: Tensor, params: Params, options: Options) -> Tensor:
    """The attended rows O [B, K, D] in the dtype of the features."""
    call = Call(image, text, params, options)
    kept = empty_kept(image, text, options, save=False)
    rows = image.new_empty(call.batch, call.classes, call.width)
    for b in call.tiling.chunks(call.batch):
        _, attended = call.attend(b, kept.chunk(b, options.num_heads))
        rows[b] = join_heads(attended.rows, options.num_heads).view_as(rows[b])
    return rows


def mask(image: Tensor, text: Tensor, params: Params, options: Options) -> Tensor:
    """The mask M [B, K, D] in the dtype of the features."""
    call = Call(image, text, params, options)
    kept = empty_kept(image, text, options, save=False)
    masks = image.new_empty(call.batch, call.classes, call.width)
    for b in call.tiling.chunks(call.batch):
        masks[b] = (1 + call.forward(b, kept.chunk(b, options.num_heads)).change[0]).to(image.dtype)
    return masks


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
    call = Call(image, text, params, options)
    kept = Kept(*kept_tensors)
    sums = GradientSums(call, wanted)
    for b in call.tiling.chunks(call.batch):
        mine = kept.chunk(b, options.num_heads)
        chunk = mine if kept.rows.numel() else call.forward(b, mine)
        sums.add_chunk(b, chunk, grad_sums[b], None if grad_deviation is None else grad_deviation[b])
    return sums.finish()


class GradientSums:
    """A call's gradients, summed chunk by chunk in the accumulation dtype."""

    def __init__(self, call: Call, wanted: Wanted):
        self.call, self.wanted = call, wanted
        self.layers = LayerGradients()
        self.f, self.h = torch.zeros_like(call.f), torch.zeros_like(call.h)
        self.image_query = None if call.image_query is None else torch.zeros_like(call.f)  # [B, D]
        self.text_query = None if call.text_query is None else torch.zeros_like(call.h)  # [K, D]

    def add_chunk(self, b: slice, chunk: Kept, grad_sums: Tensor, grad_deviation: Tensor | None) -> None:
        """Run the three steps backward for the images of slice b."""
        call, heads, wanted = self.call, self.call.options.num_heads, self.wanted
        f, change = call.f[b], chunk.change[0]

        grad_out = logit_reduction.logit_reduction_backward(
            grad_sums, grad_deviation, change, f, call.h, chunk.peak[0], call.options.penalty
        )
        grad_out = grad_out.flatten(0, 1).to(call.dtype)  # [b·K, D]
        if wanted.layers:
            self.layers.add("out", grad_out, join_heads(chunk.rows[0], heads))
        grad_rows = split_heads(grad_out @ call.params.out_weight, call.classes, heads)

        queries = call.queries(b, chunk.projections)
        key, value = chunk.projections[:2]
        grads = mask_attention.mask_attention_backward(
            grad_rows, queries, key, value, chunk.attended, chunk.exponentials, call.factor, call.tiling
        )
        grad_x_layers = [grads.key, grads.value]
        if "rational" in call.options.queries:
            grad_x_layers.append(grads.queries.matrix.pop())
        if self.image_query is not None and grads.queries.image is not None:
            self.image_query[b] = grads.queries.image.reshape_as(f)
        if self.text_query is not None:
            by_image = grads.queries.matrix[0].unflatten(0, (-1, heads)).sum(0, dtype=call.f.dtype)  # [H, K, E]
            self.text_query += join_heads(by_image, heads)

        features = wanted.image or wanted.text
        x = call.rational_rows(b) if wanted.layers else None
        grad_x = f.new_zeros(())
        for name, pairs in zip(call.x_layers, grad_x_layers, strict=True):
            grad = join_heads(pairs, heads)  # [b·K, D]
            if x is not None:
                self.layers.add(name, grad, x)
            if features:
                grad_x = grad_x + (grad @ call.layer(name)[0]).to(f.dtype)
        if features:
            grad_r = logit_reduction.rational_backward(grad_sums, change)
            self.f[b], grad_h = rational_projection.rational_rows_backward(grad_x, grad_r, f, call.h, call.scale)
            self.h += grad_h

    def finish(self) -> list[Tensor]:
        """The two queries without X, the rows' normalisation, and one rounding to the dtype of the inputs."""
        call, wanted, root = self.call, self.wanted, self.call.scale.sqrt()
        for name, rows, grad_rows, grad, want_rows in (
            ("query_image", call.f, self.f, self.image_query, wanted.image),
            ("query_text", call.h, self.h, self.text_query, wanted.text),
        ):
            if grad is not None and wanted.layers:
                self.layers.add(name, grad, root * rows)
            if grad is not None and want_rows:
                grad_rows += rational_projection.direct_query_backward(grad, root, call.layer(name)[0])
        grads = []
        for on, grad, unit, index in ((wanted.image, self.f, call.f, 0), (wanted.text, self.h, call.h, 1)):
            if on:
                grads.append(unit_rows_backward(grad, unit, call.inverse[index]) if call.inverse else grad)
        if wanted.layers:
            for layer in ("query_image", "query_text", "query_rational", "key", "value", "out"):
                # A query kind that is not in use has no part in the logits.
                grads += self.layers.sums.get(layer) or [torch.zeros_like(t) for t in call.layer(layer)]
        return [grad.to(call.dtype) for grad in grads]


masked_similarity, attended_rows = ops.register("torch", forward, backward, empty_kept, attended_rows)
