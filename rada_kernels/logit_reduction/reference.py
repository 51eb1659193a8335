"""The logit reduction as the method writes it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rada_kernels.numerics import accumulation_dtype
from rada_kernels.options import Params


def mask_from(attended: Tensor, params: Params) -> Tensor:  # [B, K, D] -> [B, K, D]
    """M = relu(1 + attended Woᵀ + co)."""
    return torch.relu(1 + F.linear(attended, params.out_weight, params.out_bias))


def masked_sums(mask: Tensor, f: Tensor, h: Tensor) -> Tensor:
    """Σ_d M[b,k,d] f[b,d] h[k,d]: [B, K] in the accumulation dtype."""
    dtype = accumulation_dtype(mask.dtype)
    return (mask.to(dtype) * f[:, None, :] * h[None, :, :]).sum(-1)


def deviation_from_one(mask: Tensor, penalty: str) -> Tensor:  # [B, K, D] -> [B]
    """Each image's deviation |M - 1|: largest ("linf"), mean ("l1") or mean of squares ("mse").

    The penalty is the mean over the images. The largest passes its gradient to the first element, in the order
    of (k, d), that attains it.
    """
    difference = (mask.to(accumulation_dtype(mask.dtype)) - 1).flatten(1)  # [B, K·D]
    if penalty == "linf":
        first = difference.abs().argmax(-1, keepdim=True)  # [B, 1]
        return difference.gather(-1, first).abs().squeeze(-1)
    if penalty == "l1":
        return difference.abs().mean(-1)
    return difference.square().mean(-1)
