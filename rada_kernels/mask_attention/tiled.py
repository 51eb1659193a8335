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


def _normalizer(classes: int, lse: Tensor) -> Tensor:
    """log K - lse, [p] -> [p, 1, 1]: with it added to the scores, exp gives A_n at once."""
    return (torch.full_like(lse, classes).log() - lse)[:, None, None]


def _exponentials(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(scores - top), written over the scores, with top [p, 1, 1] the tile's maximum and the sums [p, 1, 1]."""
    top = scores.amax((1, 2), keepdim=True)
    scores.sub_(top).exp_()
    return scores, top, scores.sum((1, 2), keepdim=True)


def mask_attention(
    image_query: Tensor | None,  # [P, 1, E]
    matrix_queries: list[Tensor],  # each [P, K, E]
    key: Tensor,  # [P, K, E]
    value: Tensor,  # [P, K, E]
    weights: Tensor,  # [matrix kinds, P, K, K] to be filled with A_n, or with P = 0
    factor: float,
    tiling: Tiling,
) -> tuple[Tensor, Tensor, Tensor]:
    """Joint-softmax attention, averaged over the query kinds.

    Returns the attended rows [P, K, E]; the log-sum-exps over all pairs of classes [matrix kinds, P]; and each
    kind's own rows [matrix kinds, P, K, E] where scores came in several row tiles, else [matrix kinds, 0, K, E].

    One maximum per tile is enough: a pair of classes that underflows against it has no weight in the joint softmax.
    Where one tile holds all rows of a pair, the weights of both kinds are added before one value product. Where the
    rows come in several tiles, each tile t is softmax attention with a log-sum-exp of its own, and
    O[t] = K · softmax_t(lse)[t] · o[t] joins them.
    """
    pairs, classes, _ = key.shape
    dtype = accumulation_dtype(key.dtype)
    count = len(matrix_queries) + (image_query is not None)
    whole = tiling.rows >= classes
    rows = torch.empty_like(key)
    lse = key.new_empty(len(matrix_queries), pairs, dtype=dtype)
    kinds = key.new_empty(len(matrix_queries), 0 if whole else pairs, *key.shape[1:])
    if whole:
        for p, _ in tiling.tiles(pairs, classes):
            mixed = None
            for n, query in enumerate(matrix_queries):
                exps, top, total = _exponentials(_scores(query[p], key[p], factor))
                lse[n, p] = (top + total.log()).flatten()
                exps.mul_(classes / total)  # A_n
                if weights.numel():
                    weights[n, p] = exps
                mixed = exps if mixed is None else mixed.add_(exps)
            if mixed is not None:
                # 1 / count with the product's result: the mixed weights then average 1 / K per kind.
                rows[p] = torch.bmm(mixed.to(value.dtype), value[p]).div_(count)
    elif matrix_queries:
        for n, query in enumerate(matrix_queries):
            tops = []  # the log-sum-exp of every tile, in the order of the tiles
            for p, r in tiling.tiles(pairs, classes):
                exps, top, total = _exponentials(_scores(query[p, r], key[p], factor))
                tops.append((p, r, top + total.log()))
                kinds[n, p, r] = torch.bmm(exps.to(value.dtype), value[p]) / total.to(value.dtype)
            lse[n] = -torch.inf
            for p, _, tile_lse in tops:
                lse[n, p] = torch.logaddexp(lse[n, p], tile_lse.flatten())
            for p, r, tile_lse in tops:
                share = (tile_lse - lse[n, p, None, None]).exp() * classes
                kinds[n, p, r] = (kinds[n, p, r] * share).to(key.dtype)
        rows = kinds.sum(0).div_(count)
    if image_query is not None:
        row = image_row_weights(image_query, key, factor).to(value.dtype) @ value / count  # [P, 1, E]
        rows = rows + row if matrix_queries else row.expand_as(key)
    return rows, lse, kinds


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
    lse: Tensor,  # [matrix kinds, P]
    kinds: Tensor,  # [matrix kinds, P, K, E], or with P = 0 where one tile holds all rows of a pair
    weights: Tensor,  # [matrix kinds, P, K, K] A_n, or with P = 0 where it was not kept
    factor: float,
    tiling: Tiling,
) -> AttentionGradients:
    """dS_n = A_n ⊙ (dA - δ_n), dA = grad valueᵀ / kinds, with one δ_n = (1/K) Σ A_n dA per (image, head)."""
    pairs, classes, _ = key.shape
    dtype = key.dtype
    count = len(matrix_queries) + (image_query is not None)
    grad_mean = grad_rows / count
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    grad_queries = [torch.empty_like(query) for query in matrix_queries]
    delta = None
    if kinds.numel():
        delta = (kinds * grad_mean).sum((2, 3), dtype=lse.dtype)[..., None, None] / classes  # [n, P, 1, 1]
    for p, r in tiling.tiles(pairs, classes) if matrix_queries else ():
        grad_weights = _scores(grad_mean[p, r], value[p], 1.0)  # dA: [p, r, K]
        mixed = None
        for n, query in enumerate(matrix_queries):
            if not weights.numel():
                offset = _normalizer(classes, lse[n, p])
                a = _scores(query[p, r], key[p], factor, offset).exp_()
            else:
                a = weights[n, p, r]
            if delta is None:
                d = torch.linalg.vecdot(a.flatten(1), grad_weights.flatten(1))[:, None, None] / classes
            else:
                d = delta[n, p]
            grad_scores = (grad_weights - d).mul_(a).to(dtype)
            mixed = a if mixed is None else mixed + a
            grad_key[p].baddbmm_(grad_scores.mT, query[p, r], alpha=factor)
            grad_queries[n][p, r] = torch.bmm(grad_scores, key[p]).mul_(factor)
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
