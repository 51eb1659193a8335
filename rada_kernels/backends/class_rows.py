"""Some class rows of a call against all of its keys: what each of P processes does that share one call.

Keys and values are projected tile by tile, by every process anew. That is 4KD² an image more than sharing them would
take, beside 8K²D / P, and keeps [B, K, D] out of memory and off the wire: processes tell one another only the maxima,
sums and delta of the joint softmax, a few numbers per image and head, and each image's deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from rada_kernels.budget import SAVE_BYTES, Tiling, budget, slices
from rada_kernels.logit_reduction.plain import Mask, joint_deviation, output_backward
from rada_kernels.mask_attention.plain import Softmax, Streamed, delta_of, joint_totals, tile_backward
from rada_kernels.numerics import LayerGradients, accumulation_dtype
from rada_kernels.options import Options, Params, Wanted
from rada_kernels.rational_projection.plain import (
    FeatureQueries,
    Features,
    ProjectionGradients,
    Queries,
    join_heads,
    rational_projection,
    split_heads,
)


@dataclass(frozen=True)
class Share:
    """What one of the processes has of a call."""

    rows: slice  # its class rows; those of lower ranks come before them
    rank: int
    gather: Callable[[Tensor], Tensor]  # a tensor of the same shape in every process -> all of them, [P, ...]


class Rows(NamedTuple):
    """A chunk's attended rows by kind, and their softmax. The image query's has one row, and no sums to gather."""

    matrix: Tensor  # [n, U, R, E], or with U = 0 where RADA_SAVE_BYTES had no room: computed again
    m: Tensor  # [n, U]
    share: Tensor  # [n, U] K / l
    image: Tensor  # [i, U, 1, E], i = 1 where the image query is in use, else 0
    image_m: Tensor  # [i, U]
    image_share: Tensor  # [i, U] 1 / l


class Call:
    """One call's constants, and its passes over a chunk of images."""

    def __init__(self, image: Tensor, text: Tensor, params: Params, options: Options, share: Share):
        self.image, self.text, self.params, self.options, self.share = image, text, params, options, share
        (self.batch, width), self.classes, heads = image.shape, len(text), options.num_heads
        self.factor = options.score_factor(width)
        self.keys = Tiling.keys(self.classes, image.dtype, image.device)
        images = Tiling.fit(self.classes, width, heads, image.dtype, image.device).images
        self.tiling = replace(Tiling.fit(self.keys, width, heads, image.dtype, image.device), images=images)

    def chunks(self) -> Iterator[slice]:
        return self.tiling.chunks(self.batch)

    def features(self, b: slice, rows: slice) -> Features:
        return Features.of(self.image[b], self.text[rows], self.params.scale, self.options.normalize)

    def queries(self, own: Features) -> Queries:
        """All queries of the own rows."""
        rational = [self.project(own, "query_rational")[0]] if "rational" in self.options.queries else []
        return FeatureQueries.of(own, self.params, self.options).beside(rational, slice(0, len(own.f)))

    def project(self, features: Features, *layers: str) -> Tensor:
        """The layers over X, [N, U, T, E]."""
        (images, width), rows, heads = features.f.shape, len(features.h), self.options.num_heads
        out = self.image.new_empty(len(layers), images * heads, rows, width // heads)
        rational_projection(features.rational_rows(slice(0, images)), self.params, layers, heads, out)
        return out

    def key_tiles(self, b: slice) -> Iterator[tuple[slice, Features, Tensor, Tensor]]:
        """The keys and values [U, T, E] of all classes, tile by tile, with the tile's slice and features."""
        for rows in slices(self.classes, self.keys):
            features = self.features(b, rows)
            key, value = self.project(features, "key", "value")
            yield rows, features, key, value

    def streams(self, b: slice, queries: Queries) -> tuple[Streamed, Streamed]:
        """The matrix kinds' and the image query's sums over all keys."""
        units, (rows, width) = (b.stop - b.start) * self.options.num_heads, self.head_rows()
        dtype, image = accumulation_dtype(self.image.dtype), [] if queries.image is None else [queries.image]

        def stream(kinds: list[Tensor], rows: int) -> Streamed:
            zeros = self.image.new_zeros(len(kinds), units, rows, width, dtype=dtype)
            return Streamed(kinds, zeros, self.factor, self.tiling)

        streams = stream(queries.matrix, rows), stream(image, 1)
        for _, _, key, value in self.key_tiles(b):
            for each in streams:
                each.add(key, value)
        return streams

    def head_rows(self) -> tuple[int, int]:
        """The number of own rows R, and the head width E."""
        return self.share.rows.stop - self.share.rows.start, self.image.shape[1] // self.options.num_heads

    def attend(self, b: slice, queries: Queries) -> Rows:
        matrix, image = self.streams(b, queries)
        m, l = matrix.totals()
        if len(m):
            m, l = joint_totals(*self.share.gather(torch.stack((m, l))).unbind(1))
        share, (image_m, image_l) = self.classes / l, image.totals()
        image_share = 1 / image_l
        return Rows(matrix.finish(m, share), m, share, image.finish(image_m, image_share), image_m, image_share)

    def mask(self, rows: Rows, queries: Queries, own: Features) -> tuple[Tensor, Mask]:
        """The attended rows [b·R, D], mean of the kinds, and their mask."""
        attended = (rows.matrix.sum(0) + rows.image.sum(0)).div_(queries.kinds).to(self.image.dtype)
        attended = join_heads(attended, self.options.num_heads)
        return attended, Mask.of(attended, self.params, own.f)

    def again(self, b: slice, rows: Rows, queries: Queries) -> Rows:
        """The rows with those of the matrix kinds, under the softmax that all processes have agreed upon."""
        if rows.matrix.shape[1] == rows.m.shape[1]:
            return rows
        return rows._replace(matrix=self.streams(b, queries)[0].finish(rows.m, rows.share))

    def backward_to_rows(
        self, rows: Rows, queries: Queries, own: Features, grad_sums: Tensor, grad_deviation: Tensor | None,
        layers: LayerGradients | None, of_features: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The gradient [U, R, E] of every kind's attended rows, and that of R through the sums [b, R, D]."""
        attended, mask = self.mask(rows, queries, own)
        grad_out = mask.backward(grad_sums, grad_deviation, own.f, own.h, self.options.penalty)
        grad_out = grad_out.flatten(0, 1).to(self.image.dtype)
        grad_rows = output_backward(grad_out, attended, self.params, layers)
        dO = split_heads(grad_rows, len(own.h), self.options.num_heads) / queries.kinds
        return dO, mask.masked(grad_sums) if of_features else None

    def backward(
        self, b: slice, rows: Rows, grad_sums: Tensor, grad_deviation: Tensor | None, layers: LayerGradients,
        wanted: Wanted,
    ) -> Iterator[tuple[slice, Features, dict[str, Tensor], Tensor | None]]:  # fmt: skip
        """A chunk's gradients of the layers' results, by layer: of every key tile, at last of the own rows' queries.

        Each with the slice of its classes, its features, and the own rows' gradient [b, R, D] of R through the sums.
        """
        own = self.features(b, self.share.rows)
        queries = self.queries(own)
        rows = self.again(b, rows, queries)
        out_layer, of_features = layers if wanted.layers else None, wanted.image or wanted.text
        dO, masked = self.backward_to_rows(rows, queries, own, grad_sums, grad_deviation, out_layer, of_features)
        delta = delta_of(rows.matrix, dO) / self.classes
        if len(delta):
            delta = self.share.gather(delta).sum(0)
        of_all_rows = dO.sum(1, keepdim=True, dtype=delta.dtype).to(dO.dtype)  # [U, 1, E]
        image = [] if queries.image is None else [queries.image]
        softmax = Softmax(rows.m, rows.share, delta)
        image_softmax = Softmax(rows.image_m, rows.image_share, delta_of(rows.image, of_all_rows))
        del rows
        grad_matrix = [torch.zeros_like(query, dtype=delta.dtype) for query in queries.matrix]
        grad_image = [torch.zeros_like(query, dtype=delta.dtype) for query in image]
        for part, features, key, value in self.key_tiles(b):
            grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
            for upstream, kinds, weights, grads in (
                (dO, queries.matrix, softmax, grad_matrix),
                (of_all_rows, image, image_softmax, grad_image),
            ):
                tile_backward(
                    upstream, kinds, key, value, weights, self.factor, self.tiling, grads, grad_key, grad_value
                )
            yield part, features, {"key": grad_key, "value": grad_value}, None
        grad_queries = Queries(grad_image[0] if grad_image else None, grad_matrix)
        yield self.share.rows, own, grad_queries.by_layer(self.options), masked


class Result(NamedTuple):
    sums: Tensor  # [B, R] Σ_d M R of the own rows, accumulation dtype
    deviation: Tensor  # [B] |M - 1| of all rows
    weight: Tensor  # [B] its derivative by the own rows' deviation
    saved: list[Rows]  # by chunk, what the backward pass starts from


def forward(image: Tensor, text: Tensor, params: Params, options: Options, share: Share, save: bool) -> Result:
    call, saved = Call(image, text, params, options, share), []
    rows, width = call.head_rows()[0], image.shape[1]
    kinds = len(options.queries) - ("image" in options.queries)
    keep = kinds * call.batch * rows * width * image.dtype.itemsize <= budget("RADA_SAVE_BYTES", SAVE_BYTES)
    dtype = accumulation_dtype(image.dtype)
    sums, deviation = image.new_empty(call.batch, rows, dtype=dtype), image.new_empty(call.batch, dtype=dtype)
    for b in call.chunks():
        own = call.features(b, share.rows)
        queries = call.queries(own)
        attended = call.attend(b, queries)
        _, mask = call.mask(attended, queries, own)
        sums[b], deviation[b] = mask.sums(own.f, own.h), mask.deviation(options.penalty)
        if save:
            matrix = attended.matrix
            saved.append(attended._replace(matrix=matrix.to(image.dtype) if keep else matrix.new_empty(len(matrix), 0)))
    weight = torch.ones_like(deviation)
    if call.batch:
        deviation, weight = joint_deviation(deviation, rows / call.classes, options.penalty, share.rank, share.gather)
    return Result(sums, deviation, weight, saved)


def backward(
    grad_sums: Tensor, grad_deviation: Tensor | None, image: Tensor, text: Tensor, params: Params,
    saved: list[Rows], options: Options, share: Share, wanted: Wanted,
) -> list[Tensor]:  # fmt: skip
    """The own rows' part of the gradients that are wanted: image, text (of all classes), the twelve layer tensors.

    grad_sums [B, R]; grad_deviation [B], of the own rows' deviation. In the accumulation dtype, to be summed over the
    processes.
    """
    call, layers = Call(image, text, params, options, share), LayerGradients()
    dtype = accumulation_dtype(image.dtype)
    sums = [of.new_zeros(of.shape, dtype=dtype) for of in [image] * wanted.image + [text] * wanted.text]
    for b, rows in zip(call.chunks(), saved, strict=True):
        deviation = None if grad_deviation is None else grad_deviation[b]
        for part, features, grads, masked in call.backward(b, rows, grad_sums[b], deviation, layers, wanted):
            gradients = ProjectionGradients(features, params, options, wanted, layers)
            gradients.add(slice(0, len(features.f)), grads, masked)
            places = [b] * wanted.image + [part] * wanted.text
            for total, place, gradient in zip(sums, places, gradients.finish(), strict=True):
                total[place] += gradient
    return sums + (params.layer_grads(layers.sums) if wanted.layers else [])
