"""The rational projection of the `torch` backend, for a chunk of b images, head by head as the attention reads it."""

from __future__ import annotations

import torch
from torch import Tensor


def rational_rows(f: Tensor, h: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """X = s f ⊙ h, [b·K, D], rounded once. f [b, D] and h [K, D] in the accumulation dtype."""
    return ((scale * f)[:, None, :] * h).flatten(0, 1).to(dtype)


def rational_projection(x: Tensor, weight: Tensor, bias: Tensor, num_heads: int, out: Tensor) -> None:
    """One layer over X [b·K, D], written to out [b·H, K, E]."""
    _, classes, head_width = out.shape
    rows = torch.addmm(bias, x, weight.t()).view(-1, classes, num_heads, head_width)
    out.unflatten(0, (-1, num_heads)).copy_(rows.transpose(1, 2))


def direct_query(root: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """The image or text query: W (√s rows) + c for rows [N, D] in the accumulation dtype -> [N, H, E]."""
    return torch.addmm(bias, (root * rows).to(weight.dtype), weight.t()).unflatten(-1, (num_heads, -1))


def direct_query_backward(grad: Tensor, root: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the rows [N, D] from that of their query [N, D], in the accumulation dtype."""
    return root * (grad @ weight.to(grad.dtype))


def rational_rows_backward(
    grad_x: Tensor,  # [b·K, D] of X
    grad_r: Tensor,  # [b, K, D] of R, past X
    f: Tensor,  # [b, D]
    h: Tensor,  # [K, D]
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of f [b, D] and h [K, D], all in the accumulation dtype. X = s R, R = f ⊙ h."""
    grad_r = scale * grad_x.unflatten(0, (-1, len(h))) + grad_r
    return (grad_r * h).sum(1), (grad_r * f.unsqueeze(1)).sum(0)


def split_heads(rows: Tensor, classes: int, num_heads: int) -> Tensor:
    """[b·K, D] -> [b·H, K, E]"""
    return rows.view(-1, classes, num_heads, rows.shape[-1] // num_heads).transpose(1, 2).flatten(0, 1)


def join_heads(pairs: Tensor, num_heads: int) -> Tensor:
    """[b·H, K, E] -> [b·K, D]"""
    return pairs.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(-2).flatten(0, 1)
