"""What the steps of a pass hand to one another: a NamedTuple for each, which its launcher allocates and returns.

Kernels take them as arguments. A query kind that is not in use has no rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rada_kernels.options import Options


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
    largest: Tensor  # [B] int32, "linf", else [0]: the same

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
            largest=image.new_empty(batch * linf, dtype=torch.int32),
        )


class Attended(NamedTuple):
    """Of the mask attention: each of n matrix query kinds' rows, weighted against the others of their row tile.

    What row tiles weigh against each other is in m and l.
    """

    rows: Tensor  # [n, B, K, D]
    image_row: Tensor  # [B, D] the image query's row, which all classes share
    m: Tensor  # [n, B, H, T] float32: largest score of each row tile
    l: Tensor  # [n, B, H, T] float32: sum of exp2(score - m)
    tile: int  # rows of a row tile

    @property
    def pointers(self) -> Attended:
        """As the argument of a kernel, to which the tile is a constant."""
        return Attended._make((*self[:-1], None))

    @staticmethod
    def empty(image: Tensor, classes: int, options: Options, tile: int) -> Attended:
        """Uninitialised tensors, from shapes alone."""
        (batch, width), heads = image.shape, options.num_heads
        has_image = "image" in options.queries
        kinds = len(options.queries) - has_image
        tiles = -(-(classes * (kinds > 0) + has_image) // tile)  # the image query's row is the last
        return Attended(
            rows=image.new_empty(kinds, batch, classes, width),
            image_row=image.new_empty(batch * has_image, width),
            m=image.new_empty(kinds, batch, heads, tiles, dtype=torch.float32),
            l=image.new_empty(kinds, batch, heads, tiles, dtype=torch.float32),
            tile=tile,
        )


class Reduced(NamedTuple):
    """Of the logit reduction."""

    sums: Tensor  # [B, K] float32: Σ_d M R
    deviation: Tensor  # [B] float32: the largest |M - 1| ("linf"), its mean ("l1"), the mean of squares ("mse")
    rows: Tensor  # [B, K, D] O, the output layer's input, for the backward pass


class ReductionGrads(NamedTuple):
    attended: Tensor  # [B, K, D] of O, the output layer's input
    masked: Tensor  # [B, K, D] of R through the sums; [0, K, D] unless features are wanted
    layers: dict[str, tuple[Tensor, Tensor]]  # the output layer's weight and bias, if wanted


class AttentionGrads(NamedTuple):
    projections: Tensor  # [2 or 3, B, K, D]
    query_text: Tensor  # [B, K, D] each image's part
    query_image: Tensor  # [B, D] float32


class ProjectionGrads(NamedTuple):
    image: Tensor | None  # [B, D] float32, if wanted
    text: Tensor | None  # [K, D] float32, if wanted
    layers: dict[str, tuple[Tensor, Tensor]]  # weight and bias by layer, if wanted; of the query kinds in use
