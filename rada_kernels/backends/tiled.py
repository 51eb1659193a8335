"""The `torch` backend: the reference's numbers in plain PyTorch, in tiles of bounded bytes, on any device.

Images go through all three steps a chunk at a time. The backward pass takes from the forward pass what
RADA_SAVE_BYTES had room for and computes the rest again, chunk by chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rada_kernels.logit_reduction import tiled as logit_reduction
from rada_kernels.mask_attention import tiled as mask_attention
from rada_kernels.options import Options, Params, Wanted
from rada_kernels.rational_projection import tiled as rational_projection
from rada_kernels.rows import accumulation_dtype, inverse_norms, unit_rows_backward
from rada_kernels.tiling import SAVE_BYTES, Tiling, budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def usable(dtype: torch.dtype, device: torch.device, embed_dim: int, num_heads: int) -> tuple[bool, str]:
    if dtype not in DTYPES:
        return False, f"dtype {dtype}: it takes one of {', '.join(map(str, DTYPES))}"
    return True, "plain PyTorch in tiles, any device"


@dataclass
class Kept:
    """What the three steps leave for the backward pass, for b images and their P = b·H (image, head) pairs.

    Of the whole batch, or a view of one chunk of it. What the byte budget had no room for has a second dimension
    of 0 and is computed again: the weights alone, or everything.
    """

    lse: Tensor  # [n, P] log-sum-exps, n = 0 to 2 matrix query kinds
    peak: Tensor  # [1, b] the first place of the largest |M - 1|
    projections: Tensor  # [N, P, K, E] keys, values, rational queries if in use
    rows: Tensor  # [1, P, K, E] attended rows
    kinds: Tensor  # [n, P, K, E] each kind's attended rows, only where score rows come in several tiles
    change: Tensor  # [1, b, K, D] M - 1, accumulation dtype
    weights: Tensor  # [n, P, K, K] A_n, accumulation dtype

    def tensors(self) -> list[Tensor]:
        return list(vars(self).values())

    def chunk(self, b: slice, num_heads: int) -> Kept:
        """The views that belong to the images of slice b."""
        p = slice(b.start * num_heads, b.stop * num_heads)
        views = {name: t[:, b if name in ("peak", "change") else p] for name, t in vars(self).items()}
        return Kept(**views)

    def store(self, other: Kept) -> None:
        """Copy in from a chunk what is kept here and does not lie here already."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            if mine.numel() and mine.data_ptr() != theirs.data_ptr():
                mine.copy_(theirs)


def empty_kept(image: Tensor, text: Tensor, options: Options, save: bool) -> Kept:
    """Uninitialised tensors for what a call keeps, from shapes alone: first rows of width D, then the weights."""
    (batch, width), classes, heads = image.shape, text.shape[0], options.num_heads
    dtype = accumulation_dtype(image.dtype)
    matrix = len(options.queries) - ("image" in options.queries)
    layers = 2 + ("rational" in options.queries)
    keep = keep_kinds = keep_weights = False
    if save:
        whole = Tiling.fit(classes, width, heads, image.dtype, image.device).rows >= classes
        room = budget("RADA_SAVE_BYTES", SAVE_BYTES)
        streamed = 0 if whole else matrix
        row_bytes = batch * classes * width * ((layers + 1 + streamed) * image.dtype.itemsize + dtype.itemsize)
        weight_bytes = batch * matrix * heads * classes * classes * dtype.itemsize
        keep = row_bytes <= room
        keep_kinds = keep and not whole
        keep_weights = whole and row_bytes + weight_bytes <= room
    pairs = batch * heads
    head_rows = (classes, width // heads)
    return Kept(
        lse=image.new_empty(matrix, pairs * keep, dtype=dtype),
        peak=image.new_empty(1, batch * keep, dtype=torch.int64),
        projections=image.new_empty(layers, pairs * keep, *head_rows),
        rows=image.new_empty(1, pairs * keep, *head_rows),
        kinds=image.new_empty(matrix, pairs * keep_kinds, *head_rows),
        change=image.new_empty(1, batch * keep, classes, width, dtype=dtype),
        weights=image.new_empty(matrix, pairs * keep_weights, classes, classes, dtype=dtype),
    )


class Call:
    """One call's constants: unit rows, stacked weights, the tiling, and the two queries that need no X."""

    def __init__(self, image: Tensor, text: Tensor, params: Params, options: Options):
        dtype = accumulation_dtype(image.dtype)
        self.params, self.options, self.dtype = params, options, image.dtype
        self.batch, self.width = image.shape
        self.classes = len(text)
        self.scale = params.logit_scale.to(dtype)
        self.inverse = (inverse_norms(image), inverse_norms(text)) if options.normalize else None
        self.f, self.h = image.to(dtype), text.to(dtype)
        if self.inverse:
            self.f, self.h = self.f * self.inverse[0].unsqueeze(-1), self.h * self.inverse[1].unsqueeze(-1)
        self.factor = options.score_factor(self.width)
        self.tiling = Tiling.fit(self.classes, self.width, options.num_heads, image.dtype, image.device)
        self.weights, self.biases = rational_projection.stack_layers(params, options.queries)
        self.image_query = self.text_query = None
        root, heads = self.scale.sqrt(), options.num_heads
        if "image" in options.queries:
            self.image_query = rational_projection.direct_query(  # [B, H, E]
                root, self.f, params.query_image_weight, params.query_image_bias, heads
            )
        if "text" in options.queries:
            self.text_query = rational_projection.direct_query(  # [H, K, E]
                root, self.h, params.query_text_weight, params.query_text_bias, heads
            ).transpose(0, 1)

    def rational_rows(self, b: slice) -> Tensor:
        return rational_projection.rational_rows(self.f[b], self.h, self.scale, self.dtype)

    def queries(self, b: slice, projections: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """The image query [P, 1, E] and the matrix queries [P, K, E] of a chunk."""
        image = None if self.image_query is None else self.image_query[b].flatten(0, 1).unsqueeze(1)
        matrix = []
        if self.text_query is not None:
            matrix.append(self.text_query.repeat(b.stop - b.start, 1, 1))
        matrix.extend(projections[2:])
        return image, matrix

    def forward(self, b: slice, weights: Tensor) -> Kept:
        """The three steps for the images of slice b; `weights` [n, P, K, K] receives A_n, unless it is empty."""
        projections = rational_projection.rational_projection(
            self.rational_rows(b), self.weights, self.biases, self.classes, self.options.num_heads
        )
        image_query, matrix_queries = self.queries(b, projections)
        rows, lse, kinds = mask_attention.mask_attention(
            image_query, matrix_queries, projections[0], projections[1], self.factor, self.tiling, weights
        )
        change = logit_reduction.mask_change(_join_heads(rows, self.options.num_heads), self.params, self.f[b])
        peak = logit_reduction.peak(change)
        return Kept(lse, peak[None], projections, rows[None], kinds, change[None], weights)


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
        chunk = call.forward(b, mine.weights)
        sums[b] = logit_reduction.masked_sums(chunk.change[0], call.f[b], call.h)
        deviation[b] = logit_reduction.deviation(chunk.change[0], chunk.peak[0], options.penalty)
        mine.store(chunk)
    return sums, deviation, kept.tensors()


def mask(image: Tensor, text: Tensor, params: Params, options: Options) -> Tensor:
    """The mask M [B, K, D] in the dtype of the features."""
    call = Call(image, text, params, options)
    kept = empty_kept(image, text, options, save=False)
    masks = image.new_empty(call.batch, call.classes, call.width)
    for b in call.tiling.chunks(call.batch):
        masks[b] = (1 + call.forward(b, kept.weights).change[0]).to(image.dtype)
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
        chunk = mine if kept.rows.numel() else call.forward(b, mine.weights)
        sums.add_chunk(b, chunk, grad_sums[b], None if grad_deviation is None else grad_deviation[b])
    return sums.finish()


class GradientSums:
    """A call's gradients, summed chunk by chunk in the accumulation dtype."""

    def __init__(self, call: Call, wanted: Wanted):
        self.call, self.wanted = call, wanted
        zeros = call.f.new_zeros
        self.f, self.h = zeros(call.f.shape), zeros(call.h.shape)
        self.x_weight, self.x_bias = zeros(call.weights.shape), zeros(call.biases.shape)
        self.out_weight, self.out_bias = zeros(call.params.out_weight.shape), zeros(call.params.out_bias.shape)
        self.image_query = None if call.image_query is None else zeros(call.image_query.shape)  # [B, H, E]
        self.text_query = None if call.text_query is None else zeros(call.text_query.shape)  # [H, K, E]

    def add_chunk(self, b: slice, chunk: Kept, grad_sums: Tensor, grad_deviation: Tensor | None) -> None:
        """Run the three steps backward for the images of slice b."""
        call, heads = self.call, self.call.options.num_heads
        f, change = call.f[b], chunk.change[0]
        features = self.wanted.image or self.wanted.text

        grad_out = logit_reduction.logit_reduction_backward(
            grad_sums, grad_deviation, change, f, call.h, chunk.peak[0], call.options.penalty
        ).flatten(0, 1)  # [b·K, D]
        grad_out = grad_out.to(call.dtype)
        if self.wanted.layers:
            _add_layer(self.out_weight, self.out_bias, grad_out, _join_heads(chunk.rows[0], heads))
        grad_rows = _split_heads(grad_out @ call.params.out_weight, call.classes, heads)

        image_query, matrix_queries = call.queries(b, chunk.projections)
        key, value = chunk.projections[:2]
        grads = mask_attention.mask_attention_backward(
            grad_rows, image_query, matrix_queries, key, value, chunk.lse, chunk.kinds, call.factor, call.tiling,
            chunk.weights,
        )  # fmt: skip
        rational = [grads.matrix_queries.pop()] if len(chunk.projections) == 3 else []
        if image_query is not None:
            self.image_query[b] = grads.image_query.view_as(self.image_query[b])
        if grads.matrix_queries:
            self.text_query += grads.matrix_queries[0].unflatten(0, (-1, heads)).sum(0, dtype=call.f.dtype)

        grad_x_rows = rational_projection.rational_projection_backward(
            torch.stack([grads.key, grads.value, *rational]), heads
        )  # [b·K, N·D]
        if self.wanted.layers:
            _add_layer(self.x_weight, self.x_bias, grad_x_rows, call.rational_rows(b))
        if features:
            grad_x = (grad_x_rows @ call.weights).to(call.f.dtype).unflatten(0, (-1, call.classes))  # [b, K, D]
            # Through X = s R and through the sums M R; M - 1 is what is kept.
            grad_r = call.scale * grad_x + grad_sums.unsqueeze(-1) * (1 + change)
            self.f[b] = (grad_r * call.h).sum(1)
            self.h += (grad_r * f.unsqueeze(1)).sum(0)

    def finish(self) -> list[Tensor]:
        """The two queries without X, the rows' normalisation, and one rounding to the dtype of the inputs."""
        call, wanted, params = self.call, self.wanted, self.call.params
        root = call.scale.sqrt()
        direct = {}
        for kind, rows, grad_rows, grad_query in (
            ("image", call.f, self.f, self.image_query),
            ("text", call.h, self.h, None if self.text_query is None else self.text_query.transpose(0, 1)),
        ):
            if grad_query is None:
                direct[kind] = [torch.zeros_like(self.out_weight), torch.zeros_like(self.out_bias)]
                continue
            grad = grad_query.flatten(1)  # [N, D]
            direct[kind] = [grad.t() @ (root * rows), grad.sum(0)]
            grad_rows += root * (grad @ getattr(params, f"query_{kind}_weight").to(grad.dtype))
        grads = []
        for index, on in enumerate((wanted.image, wanted.text)):
            if on:
                grad, unit = ((self.f, call.f), (self.h, call.h))[index]
                grads.append(unit_rows_backward(grad, unit, call.inverse[index]) if call.inverse else grad)
        if wanted.layers:
            stacked = list(zip(self.x_weight.chunk(3), self.x_bias.chunk(3), strict=True))
            if "rational" not in call.options.queries:
                halves = zip(self.x_weight.chunk(2), self.x_bias.chunk(2), strict=True)
                stacked = [*halves, (torch.zeros_like(self.out_weight), torch.zeros_like(self.out_bias))]
            key, value, rational = stacked
            for pair in (direct["image"], direct["text"], rational, key, value, (self.out_weight, self.out_bias)):
                grads.extend(pair)
        return [grad.to(call.dtype).contiguous() for grad in grads]


def _add_layer(weight: Tensor, bias: Tensor, grad: Tensor, rows: Tensor) -> None:
    """Add a linear layer's gradients: grad [N, out], rows [N, in]."""
    if weight.dtype == grad.dtype:
        weight.addmm_(grad.t(), rows)
    else:
        weight += grad.t() @ rows
    bias += grad.sum(0, dtype=bias.dtype)


def _join_heads(pairs: Tensor, num_heads: int) -> Tensor:
    """[b·H, K, E] -> [b·K, D]"""
    return pairs.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(-2).flatten(0, 1)


def _split_heads(rows: Tensor, classes: int, num_heads: int) -> Tensor:
    """[b·K, D] -> [b·H, K, E]"""
    return rows.view(-1, classes, num_heads, rows.shape[-1] // num_heads).transpose(1, 2).flatten(0, 1)
