"""What the mask attention leaves to the next steps and to the backward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rada_kernels.options import Options


class Attended(NamedTuple):
    """The attended rows, n matrix query kinds (text, rational), and the statistics of their joint softmax.

    Direct: one tensor of rows, all kinds together, and one tile (T = 1). Streaming: each kind's rows, weighted against
    the other rows of their row tile, and the image query's row apart.
    """

    rows: Tensor  # [1 or n, B, K, D]
    image_row: Tensor  # [B, D] streaming, else [0, D]
    m: Tensor  # [n, B, H, T] float32: largest score of each row tile
    l: Tensor  # [n, B, H, T] float32: sum of exp2(score - m)
    tile: int  # rows of a row tile

    @property
    def combined(self) -> bool:
        """Whether `rows` is the sum over all query kinds already."""
        return not len(self.image_row)

    @property
    def pointers(self) -> Attended:
        """As the argument of a kernel, to which the tile is a constant."""
        return Attended._make((*self[:-1], None))

    def combine(self, options: Options) -> Tensor:
        """O [B, K, D], as the logit reduction makes it of each tile; for those who want the rows in memory."""
        if self.combined:
            return self.rows[0]
        classes, heads, kinds = self.rows.shape[2], options.num_heads, len(options.queries)
        rows = self.image_row.new_zeros(())
        if "image" in options.queries:
            rows = self.image_row.float().unsqueeze(1).expand(-1, classes, -1) / kinds
        if len(self.rows):
            share = torch.exp2(self.m - self.m.amax(-1, keepdim=True)) * self.l
            share = share / share.sum(-1, keepdim=True) * (classes / kinds)  # [n, B, H, T]
            share = share.repeat_interleave(self.tile, -1)[..., :classes].transpose(2, 3).unsqueeze(-1)
            rows = rows + (share * self.rows.unflatten(-1, (heads, -1))).sum(0).flatten(-2)  # of [n, B, K, H, E]
        return rows

    @staticmethod
    def empty(image: Tensor, classes: int, options: Options, direct: bool, tile: int) -> Attended:
        """Uninitialised tensors, from shapes alone, of the direct or the streaming form."""
        (batch, width), heads = image.shape, options.num_heads
        kinds = len(options.queries) - ("image" in options.queries)
        score_rows = classes * (kinds > 0) + ("image" in options.queries)
        tiles = 1 if direct else -(-score_rows // tile)
        return Attended(
            rows=image.new_empty(1 if direct else kinds, batch, classes, width),
            image_row=image.new_empty(0 if direct else batch, width),
            m=image.new_empty(kinds, batch, heads, tiles, dtype=torch.float32),
            l=image.new_empty(kinds, batch, heads, tiles, dtype=torch.float32),
            tile=tile,
        )


class AttentionGrads(NamedTuple):
    """A query kind that is not in use has B = 0."""

    projections: Tensor  # [2 or 3, B, K, D]
    query_text: Tensor  # [B, K, D] each image's part
    query_image: Tensor  # [B, D] float32
