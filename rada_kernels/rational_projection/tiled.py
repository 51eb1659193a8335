"""The rational projection for a chunk of images: one product for keys, values and rational queries."""

from __future__ import annotations

import torch
from torch import Tensor

from rada_kernels.options import Params


def stack_layers(params: Params, queries: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Weights [N·D, D] and biases [N·D] of the layers over X: key, value and, if in use, rational query (N = 2 or 3)."""
    weights = [params.key_weight, params.value_weight]
    biases = [params.key_bias, params.value_bias]
    if "rational" in queries:
        weights.append(params.query_rational_weight)
        biases.append(params.query_rational_bias)
    return torch.cat(weights), torch.cat(biases)


def rational_rows(f: Tensor, h: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """X = s f ⊙ h, [b·K, D], rounded once. f [b, D] and h [K, D] in the accumulation dtype."""
    return ((scale * f)[:, None, :] * h).flatten(0, 1).to(dtype)


def rational_projection(x: Tensor, weights: Tensor, biases: Tensor, classes: int, num_heads: int) -> Tensor:
    """X [b·K, D] -> [N, b·H, K, E]: keys, values, rational queries, each head's rows together."""
    width = x.shape[-1]
    layers = len(biases) // width
    rows = torch.addmm(biases, x, weights.t())  # [b·K, N·D]
    heads = rows.view(-1, classes, layers, num_heads, width // num_heads).permute(2, 0, 3, 1, 4)
    return heads.reshape(layers, -1, classes, width // num_heads)


def rational_projection_backward(grad: Tensor, num_heads: int) -> Tensor:
    """[N, b·H, K, E] -> [b·K, N·D], the gradient in the layout of the product; the products are the caller's."""
    layers, pairs, classes, head_width = grad.shape
    heads = grad.view(layers, pairs // num_heads, num_heads, classes, head_width).permute(1, 3, 0, 2, 4)
    return heads.reshape(-1, layers * num_heads * head_width)


def direct_query(root: Tensor, rows: Tensor, weight: Tensor, bias: Tensor, num_heads: int) -> Tensor:
    """The image or text query: W (√s rows) + c for rows [N, D] in the accumulation dtype -> [N, H, E]."""
    return torch.addmm(bias, (root * rows).to(weight.dtype), weight.t()).unflatten(-1, (num_heads, -1))
