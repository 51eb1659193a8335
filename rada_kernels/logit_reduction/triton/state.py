"""What the logit reduction returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Reduced(NamedTuple):
    sums: Tensor  # [B, K] float32: Σ_d M R
    deviation: Tensor  # [B] float32: the largest |M - 1| ("linf"), its mean ("l1"), the mean of squares ("mse")


class ReductionGrads(NamedTuple):
    out: Tensor  # [B, K, D] of the output layer's result
    rows: Tensor  # [B, K, D] no gradient: the output layer's input; [0, K, D] unless layers are wanted
    out_bias: Tensor  # [D] float32
    masked: Tensor  # [B, K, D] of R through the sums; [0, K, D] unless features are wanted
