"""The logit reduction of the `torch` backend, for a chunk of b images: the output product, then the mask in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rada_kernels.numerics import LayerGradients
from rada_kernels.options import Params

CANDIDATES = 8  # for an image's largest |M - 1| in 16 bits


class Mask(NamedTuple):
    change: Tensor  # [b, K, D] M - 1, in the accumulation dtype
    peak: Tensor  # [b] the first place, k·D + d, of each image's largest |M - 1|

    @staticmethod
    def of(rows: Tensor, params: Params, f: Tensor) -> Mask:
        """M - 1 = max(rows Woᵀ + co, -1). rows [b·K, D], f [b, D] in the accumulation dtype."""
        out = torch.addmm(params.out_bias, rows, params.out_weight.t())
        change = out.to(f.dtype).clamp_(min=-1).unflatten(0, (len(f), -1))
        return Mask(change, _peak(change, rows, params))

    def sums(self, f: Tensor, h: Tensor) -> Tensor:
        """Σ_d M[b,k,d] f[b,d] h[k,d]: [b, K]. Not f·h + Σ (M - 1) f h, which cancels where M is small."""
        return (self.change.add(1).mul_(h) @ f.unsqueeze(-1)).squeeze(-1)

    def deviation(self, penalty: str) -> Tensor:
        """Each image's |M - 1|: the largest ("linf"), the mean ("l1") or the mean of squares ("mse"), [b]."""
        flat = self.change.flatten(1)
        if penalty == "linf":
            return flat.gather(-1, self.peak[:, None]).abs().squeeze(-1)
        if penalty == "l1":
            return flat.abs().mean(-1)  # vector_norm keeps one running sum
        return torch.linalg.vecdot(flat, flat) / flat.shape[-1]

    def masked(self, grad_sums: Tensor) -> Tensor:
        """The gradient [b, K, D] of R through the sums Σ_d M R."""
        return grad_sums.unsqueeze(-1) * (1 + self.change)

    def backward(
        self,
        grad_sums: Tensor,  # [b, K]
        grad_deviation: Tensor | None,  # [b]
        f: Tensor,  # [b, D]
        h: Tensor,  # [K, D]
        penalty: str,
    ) -> Tensor:
        """The gradient of the output layer's result, [b, K, D] in the accumulation dtype. relu passes none at M = 0."""
        change = self.change
        grad = (grad_sums.unsqueeze(-1) * f.unsqueeze(1)) * h
        if grad_deviation is not None:
            if penalty == "linf":
                place = self.peak[:, None]
                at_peak = grad_deviation[:, None] * change.flatten(1).gather(-1, place).sign()
                grad.view(len(grad), -1).scatter_add_(-1, place, at_peak)
            else:
                share = (grad_deviation / (change.shape[1] * change.shape[2]))[:, None, None]
                grad += share * change.sign() if penalty == "l1" else 2 * share * change
        return grad.mul_(change > -1)


def joint_deviation(
    deviation: Tensor, fraction: float, penalty: str, rank: int, gather: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Of all class rows, from those of each process: the deviation [B], and its derivative [B] by one's own.

    deviation: [B], of the rows of process `rank`, a `fraction` of all. gather: [B] -> [P, B]. Where several processes
    attain the largest, the first one's counts, as within one.
    """
    if penalty == "linf":
        parts = gather(deviation)
        return parts.amax(0), (parts.argmax(0) == rank).to(deviation.dtype)
    return gather(fraction * deviation).sum(0), torch.full_like(deviation, fraction)


def _peak(change: Tensor, rows: Tensor, params: Params) -> Tensor:
    """The first place, k·D + d, of each image's largest |M - 1|.

    In 16 bits the product's rounding makes ties and near ties, and linf's gradient would go to the wrong element: the
    largest few are multiplied again in the accumulation dtype.
    """
    size = change.flatten(1).abs()
    first = size.argmax(-1, keepdim=True)
    if rows.dtype == change.dtype:
        return first.squeeze(-1)
    places = size.topk(min(CANDIDATES, size.shape[1])).indices
    places = torch.cat([first, places], 1).sort(-1).values  # [b, n] the first of equals comes first
    classes, columns = places // change.shape[2], places % change.shape[2]
    images = torch.arange(len(change), device=change.device)[:, None]
    taken = rows.unflatten(0, change.shape[:2])[images, classes].to(change.dtype)  # [b, n, D]
    out = torch.linalg.vecdot(taken, params.out_weight[columns].to(change.dtype)) + params.out_bias[columns]
    return places.gather(1, out.clamp(min=-1).abs().argmax(-1, keepdim=True)).squeeze(-1)


def output_backward(grad_out: Tensor, rows: Tensor, params: Params, layers: LayerGradients | None) -> Tensor:
    """The gradient of the output layer's input from that of its result, both [b·K, D]. rows: its input."""
    if layers is not None:
        layers.add("out", grad_out, rows)
    return grad_out @ params.out_weight
