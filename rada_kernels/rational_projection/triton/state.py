"""What the rational projection leaves to the next steps and to the backward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rada_kernels.options import Options


class Projections(NamedTuple):
    """A query kind that is not in use has no rows."""

    query_image: Tensor  # [B, D]
    query_text: Tensor  # [K, D]
    inverse_image: Tensor  # [B] float32: 1 / norm, 0 for a zero row; 1 without normalize
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
