"""The logit reduction of the `torch` backend, for a chunk of b images: the output product, then the mask in place."""

from __future__ import annotations

import torch
from torch import Tensor

from rada_kernels.options import Params


def mask_change(rows: Tensor, params: Params, f: Tensor) -> Tensor:
    """M - 1 = max(rows Woᵀ + co, -1): rows [b·K, D], f [b, D] -> [b, K, D] in the dtype of f."""
    out = torch.addmm(params.out_bias, rows, params.out_weight.t())
    return out.to(f.dtype).clamp_(min=-1).unflatten(0, (len(f), -1))


def masked_sums(change: Tensor, f: Tensor, h: Tensor) -> Tensor:
    """Σ_d M[b,k,d] f[b,d] h[k,d]: [b, K, D] -> [b, K]. Not f·h + Σ (M - 1) f h, which cancels where M is small."""
    return (change.add(1).mul_(h) @ f.unsqueeze(-1)).squeeze(-1)


def peak(change: Tensor) -> Tensor:  # [b, K, D] -> [b]
    """The first place, k·D + d, of each image's largest |M - 1|."""
    return change.flatten(1).abs().argmax(-1)


def deviation(change: Tensor, peak: Tensor, penalty: str) -> Tensor:  # [b, K, D], [b] -> [b]
    """Each image's statistic of |M - 1|: largest ("linf"), mean ("l1") or mean of squares ("mse")."""
    flat = change.flatten(1)
    if penalty == "linf":
        return flat.gather(-1, peak[:, None]).abs().squeeze(-1)
    if penalty == "l1":
        return torch.linalg.vector_norm(flat, 1, dim=-1) / flat.shape[-1]
    return torch.linalg.vecdot(flat, flat) / flat.shape[-1]


def rational_backward(grad_sums: Tensor, change: Tensor) -> Tensor:  # [b, K], [b, K, D] -> [b, K, D]
    """The gradient of R through the sums Σ_d M R."""
    return grad_sums.unsqueeze(-1) * (1 + change)


def logit_reduction_backward(
    grad_sums: Tensor,  # [b, K]
    grad_deviation: Tensor | None,  # [b]
    change: Tensor,  # [b, K, D] M - 1
    f: Tensor,  # [b, D]
    h: Tensor,  # [K, D]
    peak: Tensor,  # [b]
    penalty: str,
) -> Tensor:
    """The gradient of the output layer's result, [b, K, D] in the accumulation dtype; relu passes none at M = 0."""
    grad = (grad_sums.unsqueeze(-1) * f.unsqueeze(1)) * h
    if grad_deviation is not None:
        if penalty == "linf":
            place = peak[:, None]
            at_peak = grad_deviation[:, None] * change.flatten(1).gather(-1, place).sign()
            grad.view(len(grad), -1).scatter_add_(-1, place, at_peak)
        else:
            share = (grad_deviation / (change.shape[1] * change.shape[2]))[:, None, None]
            grad += share * change.sign() if penalty == "l1" else 2 * share * change
    return grad.mul_(change > -1)
