"""What the steps of a pass hand to one another: a NamedTuple for each, which its launcher allocates and returns.

Kernels take them as arguments. A query kind that is not in use has no rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rada_kernels.options import QUERIES, Options, Params, Wanted


class Features(NamedTuple):
    image: Tensor  # [B, D]
    text: Tensor  # [K, D]
    inverse_image: Tensor  # [B] float32: 1 / norm, 0 for a zero row; 1 without normalize
    inverse_text: Tensor  # [K] float32


class Projections(NamedTuple):
    """Of the rational projection. Queries are those of the method times Call.factors[0]."""

    query_image: Tensor  # [B, D]
    query_text: Tensor  # [K, D]
    inverse_image: Tensor  # [B] float32
    inverse_text: Tensor  # [K] float32
    projections: Tensor  # [2 or 3, B, K, D] keys, values, rational queries if in use
    peak: Tensor  # [B] int64, "linf" before a backward pass, else [0]: cleared for the logit reduction to raise
    arrived: Tensor  # [B] int32, cleared for the logit reduction to count by
    largest: Tensor  # [B] int32, "linf", else [0]: as peak

    @staticmethod
    def empty(image: Tensor, text: Tensor, options: Options, save: bool) -> Projections:
        """Uninitialised tensors, from shapes alone. save: a backward pass follows."""
        (batch, width), classes = image.shape, text.shape[0]
        linf = options.penalty == "linf"
        return Projections(
            query_image=image.new_empty(batch * ("image" in options.queries), width),
            query_text=image.new_empty(classes * ("text" in options.queries), width),
            inverse_image=image.new_empty(batch, dtype=torch.float32),
            inverse_text=image.new_empty(classes, dtype=torch.float32),
            projections=image.new_empty(2 + ("rational" in options.queries), batch, classes, width),
            peak=image.new_empty(batch * (linf and save), dtype=torch.int64),
            arrived=image.new_empty(batch, dtype=torch.int32),
            largest=image.new_empty(batch * linf, dtype=torch.int32),
        )


class Attended(NamedTuple):
    """Of the mask attention: each of n matrix query kinds' rows, weighted against the others of their row tile.

    What row tiles weigh against each other is in m and l. Where one tile has all classes, their sum O is made with
    them, and without a backward pass nothing else is.
    """

    rows: Tensor  # [n, B, K, D], or [0, B, K, D]
    image_row: Tensor  # [B, D] the image query's row, which all classes share
    m: Tensor  # [n, B, H, T] float32: largest score of each row tile
    l: Tensor  # [n, B, H, T] float32: sum of exp2(score - m)
    combined: Tensor  # [B, K, D] O, the output layer's input; left to the logit reduction unless `whole`
    tile: int  # rows of a row tile

    @staticmethod
    def whole(classes: int, options: Options, tile: int) -> bool:
        """Whether one row tile has all classes, and the image query's row."""
        has_image = "image" in options.queries
        return len(options.queries) > has_image and bool(classes + has_image <= tile)

    @property
    def pointers(self) -> Attended:
        """As the argument of a kernel, to which the tile is a constant."""
        return Attended(*self[:-1], None)  # type: ignore[arg-type]

    def pointers_but(self, *unread: str) -> Attended:
        """The same without tensors that this kernel neither reads nor writes."""
        none: dict[str, Any] = dict.fromkeys(unread)
        return self.pointers._replace(**none)

    @staticmethod
    def empty(image: Tensor, classes: int, options: Options, tile: int, save: bool) -> Attended:
        """Uninitialised tensors, from shapes alone. save: a backward pass follows."""
        (batch, width), heads = image.shape, options.num_heads
        has_image = "image" in options.queries
        kinds = len(options.queries) - has_image
        tiles = -(-(classes * (kinds > 0) + has_image) // tile)  # the image query's row is the last
        kept = kinds if save or not Attended.whole(classes, options, tile) else 0
        return Attended(
            rows=image.new_empty(kept, batch, classes, width),
            image_row=image.new_empty(batch * has_image, width),
            m=image.new_empty(kinds, batch, heads, tiles, dtype=torch.float32),
            l=image.new_empty(kinds, batch, heads, tiles, dtype=torch.float32),
            combined=image.new_empty(batch, classes, width),
            tile=tile,
        )


class Reduced(NamedTuple):
    """Of the logit reduction."""

    sums: Tensor  # [B, K] float32: Σ_d M R
    deviation: Tensor  # [B] float32: the largest |M - 1| ("linf"), its mean ("l1"), the mean of squares ("mse")


class Linear(NamedTuple):
    weight: Tensor  # [D, D]
    bias: Tensor  # [D]


class ReductionGrads(NamedTuple):
    attended: Tensor  # [B, K, D] of O, the output layer's input
    masked: Tensor  # [B, K, D] of R through the sums; [0, K, D] unless features are wanted
    layer: Linear | None  # the output layer's, if wanted, in float32: weight [D, D], bias [tiles, D], to be summed


class AttentionGrads(NamedTuple):
    projections: Tensor  # [2 or 3, B, K, D]
    query_text: Tensor  # [B, K, D] each image's part
    query_image: Tensor  # [B, D] float32


class LayerGrads(NamedTuple):
    """In the order of Params."""

    query_image: Linear
    query_text: Linear
    query_rational: Linear
    key: Linear
    value: Linear
    out: Linear

    @staticmethod
    def empty(params: Params, queries: tuple[str, ...], dtype: torch.dtype) -> LayerGrads:
        """Uninitialised, but zeros for a query kind that is not in use."""
        grads = [torch.empty_like(layer, dtype=dtype) for layer in params.layers]
        for place, name in enumerate(QUERIES):
            if name not in queries:
                grads[2 * place].zero_()
                grads[2 * place + 1].zero_()
        return LayerGrads(*map(Linear, grads[::2], grads[1::2]))


class Gradients(NamedTuple):
    """What a backward pass returns; None: not wanted."""

    image: Tensor | None  # [B, D]
    text: Tensor | None  # [K, D]
    layers: LayerGrads | None

    @staticmethod
    def empty(image: Tensor, text: Tensor, params: Params, options: Options, wanted: Wanted, dtype) -> Gradients:
        return Gradients(
            torch.empty_like(image, dtype=dtype) if wanted.image else None,
            torch.empty_like(text, dtype=dtype) if wanted.text else None,
            LayerGrads.empty(params, options.queries, dtype) if wanted.layers else None,
        )

    def tensors(self) -> list[Tensor]:
        """In this order: image, text, the twelve layer tensors."""
        features = [grad for grad in self[:2] if grad is not None]
        return features + [tensor for layer in self.layers or () for tensor in layer]
