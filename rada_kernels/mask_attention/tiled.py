"""The mask attention in tiles of scores: no [B, H, K, K] tensor, whatever B, H and K are.

A chunk's (image, head) pairs are called pairs: P = b·H of them. Keys and values are [P, K, E]. The matrix query
kinds (text, rational) have a query row per class; the image query has one row, [P, 1, E].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rada_kernels.rows import accumulation_dtype
from rada_kernels.tiling import Tiling


def _scores(query: Tensor, key: Tensor, factor: float, offset: Tensor | None = None) -> Tensor:
    """factor · query keyᵀ + offset in the accumulation dtype: [p, r, E], [p, K, E], [p, 1, 1] -> [p, r, K]."""
    if query.dtype == accumulation_dtype(query.dtype):
        scores = query.new_empty(query.shape[0], query.shape[1], key.shape[1])
        start = scores if offset is None else offset.expand_as(scores)
        return torch.baddbmm(start, query, key.mT, beta=int(offset is not None), alpha=factor, out=scores)
    scores = torch.bmm(query, key.mT).to(accumulation_dtype(query.dtype)).mul_(factor)
    return scores if offset is None else scores.add_(offset)


def _exponentials(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(score - maximum) [p, r, K], written over the scores, the maximum [p], and the sum of the exponentials [p]."""
    top = scores.amax((1, 2))
    scores.sub_(top[:, None, None]).exp_()
    return scores, top, scores.sum((1, 2))


def mask_attention(
    image_query: Tensor | None,  # [P, 1, E]
    matrix_queries: list[Tensor],  # each [P, K, E]
    key: Tensor,  # [P, K, E]
    value: Tensor,  # [P, K, E]
    exponentials: Tensor,  # [matrix kinds, P, K, K] to be filled with exp(score - maximum), or with P = 0
    factor: float,
    tiling: Tiling,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Joint-softmax attention, averaged over the query kinds.

    Returns the attended rows [P, K, E]; for each matrix kind and pair the scores' maximum over all pairs of classes
    and the sum of exp(score - maximum), each [matrix kinds, P]; and each kind's own rows [matrix kinds, P, K, E]
    where scores came in several row tiles, else [matrix kinds, 0, K, E].

    One maximum per tile is enough: a pair of classes that underflows against it has no weight in the joint softmax.
    Where one tile holds all rows of a pair, the weights of both kinds are added before one value product. Where the
    rows come in several tiles, each tile is softmax attention of its own, weighted at the end by its share of the sum.
    """
    pairs, classes, _ = key.shape
    kinds_in_use = len(matrix_queries) + (image_query is not None)
    whole = tiling.rows >= classes
    top = key.new_empty(len(matrix_queries), pairs, dtype=accumulation_dtype(key.dtype))
    total = torch.empty_like(top)
    kinds = key.new_empty(len(matrix_queries), 0 if whole else pairs, *key.shape[1:])
    if not matrix_queries:
        rows = torch.zeros_like(key)
    elif whole:
        rows = torch.empty_like(key)
        for p, _ in tiling.tiles(pairs, classes):
            mixed = None
            for n, query in enumerate(matrix_queries):
                exps, top[n, p], total[n, p] = _exponentials(_scores(query[p], key[p], factor))
                if exponentials.numel():
                    exponentials[n, p] = exps
                exps.mul_(_share(classes, total[n, p]))  # A_n
                mixed = exps if mixed is None else mixed.add_(exps)
            rows[p] = torch.bmm(mixed.to(value.dtype), value[p]).div_(kinds_in_use)
    else:
        for n, query in enumerate(matrix_queries):
            # Each row tile's maximum and sum for all pairs, in the order of the row tiles: [tiles, P].
            tops, totals = (key.new_empty(-(-classes // tiling.rows), pairs, dtype=top.dtype) for _ in range(2))
            for p, r in tiling.tiles(pairs, classes):
                t = r.start // tiling.rows
                exps, tops[t, p], totals[t, p] = _exponentials(_scores(query[p, r], key[p], factor))
                kinds[n, p, r] = (torch.bmm(exps.to(value.dtype), value[p]) / totals[t, p, None, None]).to(value.dtype)
            top[n] = tops.amax(0)
            totals *= (tops - top[n]).exp()
            total[n] = totals.sum(0)
            for p, r in tiling.tiles(pairs, classes):
                kinds[n, p, r] *= totals[r.start // tiling.rows, p, None, None] * _share(classes, total[n, p])
        rows = kinds.sum(0).div_(kinds_in_use)
    if image_query is not None:
        row = image_row_weights(image_query, key, factor).to(value.dtype) @ value  # [P, 1, E]
        rows += row / kinds_in_use
    return rows, top, total, kinds


def _share(classes: int, total: Tensor) -> Tensor:
    """K / total, [p] -> [p, 1, 1]: what turns exponentials into A_n."""
    return (classes / total)[:, None, None]


def image_row_weights(image_query: Tensor, key: Tensor, factor: float) -> Tensor:
    """The one row [P, 1, K] of A_image: its scores are the same for every class row, so K · (1/K) cancels."""
    return _scores(image_query, key, factor).softmax(-1)


@dataclass
class AttentionGradients:
    image_query: Tensor | None  # [P, 1, E]
    matrix_queries: list[Tensor]  # each [P, K, E]
    key: Tensor  # [P, K, E]
    value: Tensor  # [P, K, E]


def mask_attention_backward(
    grad_rows: Tensor,  # [P, K, E]
    image_query: Tensor | None,
    matrix_queries: list[Tensor],
    key: Tensor,
    value: Tensor,
    top: Tensor,  # [matrix kinds, P] as the forward pass returns them
    total: Tensor,  # [matrix kinds, P]
    kinds: Tensor,  # [matrix kinds, P, K, E], or with P = 0 where one tile holds all rows of a pair
    exponentials: Tensor,  # [matrix kinds, P, K, K], or with P = 0 where they were not kept
    factor: float,
    tiling: Tiling,
) -> AttentionGradients:
    """dS_n = A_n ⊙ (dA - δ_n), dA = grad valueᵀ / kinds, with one δ_n = (1/K) Σ A_n dA per (image, head).

    A_n stays in two factors, exp(score - maximum) and K / total, so that δ_n is the mean of dA under the very weights
    that it is subtracted under: what should cancel in the sum over dS_n then does.
    """
    pairs, classes, _ = key.shape
    dtype = key.dtype
    grad_mean = grad_rows / (len(matrix_queries) + (image_query is not None))
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    grad_queries = [torch.empty_like(query) for query in matrix_queries]
    delta = None
    if kinds.numel():
        delta = (kinds * grad_mean).sum((2, 3), dtype=top.dtype) / classes  # [n, P]
    for p, r in tiling.tiles(pairs, classes) if matrix_queries else ():
        grad_weights = _scores(grad_mean[p, r], value[p], 1.0)  # dA: [p, r, K]
        mixed = torch.zeros_like(grad_weights)
        for n, query in enumerate(matrix_queries):
            if exponentials.numel():
                exps = exponentials[n, p, r]
            else:
                exps = _scores(query[p, r], key[p], factor, -top[n, p, None, None]).exp_()
            if delta is None:
                d = torch.linalg.vecdot(exps.flatten(1), grad_weights.flatten(1)) / total[n, p]
            else:
                d = delta[n, p]
            share = _share(classes, total[n, p])
            mixed.addcmul_(exps, share)
            grad_scores = (grad_weights - d[:, None, None]).mul_(exps).to(dtype)  # without its factor
            share = (factor * share).to(dtype)
            grad_key[p].baddbmm_(grad_scores.mT, query[p, r] * share)
            grad_queries[n][p, r] = torch.bmm(grad_scores, key[p]).mul_(share)
        grad_value[p].baddbmm_(mixed.to(dtype).mT, grad_mean[p, r])
    grad_image = None
    if image_query is not None:
        row = image_row_weights(image_query, key, factor)  # [P, 1, K]
        upstream = grad_mean.sum(1, keepdim=True, dtype=row.dtype).to(dtype)  # Σ_i dO[i]: [P, 1, E]
        grad_row = _scores(upstream, value, 1.0)
        grad_scores = (row * (grad_row - (row * grad_row).sum(-1, keepdim=True))).to(dtype)
        grad_value += row.to(dtype).mT @ upstream
        grad_key += factor * (grad_scores.mT @ image_query)
        grad_image = factor * (grad_scores @ key)
    return AttentionGradients(grad_image, grad_queries, grad_key, grad_value)
