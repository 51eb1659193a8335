"""The mask attention of the `torch` backend, in tiles of scores: no [B, H, K, K] tensor, whatever B, H and K are.

A chunk has U = b·H units, which are (image, head); keys and values are [U, K, E]. The n matrix query kinds (text,
rational) have a query row per class, the image query has one row.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from rada_kernels.budget import Tiling
from rada_kernels.numerics import accumulation_dtype
from rada_kernels.rational_projection.plain import Queries


class Attended(NamedTuple):
    """Attended rows, and what the backward pass takes of their softmax."""

    rows: Tensor  # [U, K, E]
    m: Tensor  # [n, U] the maximum of a kind's scores
    l: Tensor  # [n, U] the sum of exp(score - m)
    by_kind: Tensor  # [n, U, K, E] each kind's rows where scores come in several row tiles, else [n, 0, K, E]


class AttentionGradients(NamedTuple):
    queries: Queries
    key: Tensor  # [U, K, E]
    value: Tensor  # [U, K, E]


def _scores(query: Tensor, key: Tensor, factor: float, offset: Tensor | None = None) -> Tensor:
    """factor · query keyᵀ + offset in the accumulation dtype: [u, r, E], [u, K, E], [u, 1, 1] -> [u, r, K]."""
    if query.dtype == accumulation_dtype(query.dtype):
        scores = query.new_empty(query.shape[0], query.shape[1], key.shape[1])
        start = scores if offset is None else offset.expand_as(scores)
        return torch.baddbmm(start, query, key.mT, beta=int(offset is not None), alpha=factor, out=scores)
    scores = torch.bmm(query, key.mT).to(accumulation_dtype(query.dtype)).mul_(factor)
    return scores if offset is None else scores.add_(offset)


def _exponentials(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(score - m) [p, r, K], written over the scores, the maximum m [p], and the sum l of the exponentials [p]."""
    m = scores.amax((1, 2))
    scores.sub_(m[:, None, None]).exp_()
    return scores, m, scores.sum((1, 2))


def mask_attention(
    queries: Queries,
    key: Tensor,  # [U, K, E]
    value: Tensor,  # [U, K, E]
    exponentials: Tensor,  # [n, U, K, K] to be filled with exp(score - m), or with U = 0
    factor: float,
    tiling: Tiling,
) -> Attended:
    """Joint-softmax attention, averaged over the query kinds.

    One maximum per tile is enough: a score that underflows against it has no weight in the joint softmax.
    Where one tile holds all rows of a unit, the weights of both kinds are added before one value product. Where the
    rows come in several tiles, each tile is softmax attention of its own, weighted at the end by its share of the sum.
    """
    units, classes, _ = key.shape
    whole = tiling.rows >= classes
    m = key.new_empty(len(queries.matrix), units, dtype=accumulation_dtype(key.dtype))
    l = torch.empty_like(m)
    by_kind = key.new_empty(len(queries.matrix), 0 if whole else units, *key.shape[1:])
    if not queries.matrix:
        rows = torch.zeros_like(key)
    elif whole:
        rows = torch.empty_like(key)
        for p, _ in tiling.tiles(units, classes):
            mixed: Tensor | None = None
            for n, query in enumerate(queries.matrix):
                exps, m[n, p], l[n, p] = _exponentials(_scores(query[p], key[p], factor))
                if exponentials.numel():
                    exponentials[n, p] = exps
                exps.mul_(_share(classes, l[n, p]))  # A_n
                mixed = exps if mixed is None else mixed.add_(exps)
            rows[p] = torch.bmm(cast(Tensor, mixed).to(value.dtype), value[p]).div_(queries.kinds)
    else:
        for n, query in enumerate(queries.matrix):
            # Each row tile's maximum and sum for all units, in the order of the row tiles: [tiles, U].
            tile_m, tile_l = (key.new_empty(-(-classes // tiling.rows), units, dtype=m.dtype) for _ in range(2))
            for p, r in tiling.tiles(units, classes):
                t = r.start // tiling.rows
                exps, tile_m[t, p], tile_l[t, p] = _exponentials(_scores(query[p, r], key[p], factor))
                rows = torch.bmm(exps.to(value.dtype), value[p]) / tile_l[t, p, None, None]
                by_kind[n, p, r] = rows.to(value.dtype)
            m[n] = tile_m.amax(0)
            tile_l *= (tile_m - m[n]).exp()
            l[n] = tile_l.sum(0)
            for p, r in tiling.tiles(units, classes):
                by_kind[n, p, r] *= tile_l[r.start // tiling.rows, p, None, None] * _share(classes, l[n, p])
        rows = by_kind.sum(0).div_(queries.kinds)
    if queries.image is not None:
        row = image_row_weights(queries.image, key, factor).to(value.dtype) @ value  # [U, 1, E]
        rows += row / queries.kinds
    return Attended(rows, m, l, by_kind)


def _share(classes: int, l: Tensor) -> Tensor:
    """K / l, [p] -> [p, 1, 1]: what turns exponentials into A_n."""
    return (classes / l)[:, None, None]


def image_row_weights(image_query: Tensor, key: Tensor, factor: float) -> Tensor:
    """The one row [U, 1, K] of A_image: its scores are the same for every class row, so K · (1/K) cancels."""
    return _scores(image_query, key, factor).softmax(-1)


def mask_attention_backward(
    grad_rows: Tensor,  # [U, K, E]
    queries: Queries,
    key: Tensor,
    value: Tensor,
    attended: Attended,
    exponentials: Tensor,  # [n, U, K, K], or with U = 0 where they were not saved
    factor: float,
    tiling: Tiling,
) -> AttentionGradients:
    """dS_n = A_n ⊙ (dP - delta_n), dP = dO valueᵀ / kinds, with one delta_n = (1/K) Σ A_n dP per (image, head).

    A_n stays in two factors, exp(score - m) and K / l, so that delta_n is the mean of dP under the very weights that
    it is subtracted under: what should cancel in the sum over dS_n then does.
    """
    units, classes, _ = key.shape
    dtype = key.dtype
    _, m, l, by_kind = attended
    dO = grad_rows / queries.kinds
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    grad_queries = [torch.empty_like(query) for query in queries.matrix]
    delta = None
    if by_kind.numel():
        delta = (by_kind * dO).sum((2, 3), dtype=m.dtype) / classes  # [n, U]
    for p, r in tiling.tiles(units, classes) if queries.matrix else ():
        dP = _scores(dO[p, r], value[p], 1.0)  # [p, r, K]
        mixed = torch.zeros_like(dP)
        for n, query in enumerate(queries.matrix):
            if exponentials.numel():
                exps = exponentials[n, p, r]
            else:
                exps = _scores(query[p, r], key[p], factor, -m[n, p, None, None]).exp_()
            if delta is None:
                delta_n = torch.linalg.vecdot(exps.flatten(1), dP.flatten(1)) / l[n, p]
            else:
                delta_n = delta[n, p]
            share = _share(classes, l[n, p])
            mixed.addcmul_(exps, share)
            dS = (dP - delta_n[:, None, None]).mul_(exps).to(dtype)  # without its factor
            share = (factor * share).to(dtype)
            grad_key[p].baddbmm_(dS.mT, query[p, r] * share)
            grad_queries[n][p, r] = torch.bmm(dS, key[p]).mul_(share)
        grad_value[p].baddbmm_(mixed.to(dtype).mT, dO[p, r])
    grad_image = None
    if queries.image is not None:
        row = image_row_weights(queries.image, key, factor)  # [U, 1, K]
        upstream = dO.sum(1, keepdim=True, dtype=row.dtype).to(dtype)  # Σ_i dO[i]: [U, 1, E]
        grad_row = _scores(upstream, value, 1.0)
        dS = (row * (grad_row - (row * grad_row).sum(-1, keepdim=True))).to(dtype)
        grad_value += row.to(dtype).mT @ upstream
        grad_key += factor * (dS.mT @ queries.image)
        grad_image = factor * (dS @ key)
    return AttentionGradients(Queries(grad_image, grad_queries), grad_key, grad_value)
