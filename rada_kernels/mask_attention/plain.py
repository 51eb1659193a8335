"""The mask attention of the `torch` backend, in tiles of scores: no [B, H, K, K] tensor, whatever B, H and K are.

A chunk has U = b·H units, which are (image, head); keys and values are [U, K, E]. The n matrix query kinds (text,
rational) have a query row per class, the image query has one row. `Streamed` and `tile_backward` take any R query rows
and T of the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Streamed:
    """Σ exp(score - m) · value of R query rows per kind over keys that come tile by tile, as in FlashAttention.

    One maximum m for each unit and tile of rows is enough: a score that underflows against it has no weight in the
    joint softmax.
    """

    def __init__(self, queries: Sequence[Tensor], rows: Tensor, factor: float, tiling: Tiling):
        """queries: n tensors [U, R, E]. rows: zeros [n, U, R, E] in the dtype to sum in."""
        self.queries, self.rows, self.factor, self.tiling = queries, rows, factor, tiling
        kinds, self.units, self.count, _ = rows.shape
        tiles = -(-self.count // tiling.rows)
        self.m = rows.new_full((kinds, tiles, self.units), -torch.inf, dtype=accumulation_dtype(rows.dtype))
        self.l = torch.zeros_like(self.m)

    def add(self, key: Tensor, value: Tensor) -> None:
        """The keys and values of another tile, [U, T, E]."""
        for n, query in enumerate(self.queries):
            for p, r in self.tiling.tiles(self.units, self.count):
                at, scores = (n, r.start // self.tiling.rows, p), _scores(query[p, r], key[p], self.factor)
                m = torch.maximum(self.m[at], scores.amax((1, 2)))
                exps = scores.sub_(m[:, None, None]).exp_()
                kept = (self.m[at] - m).exp()
                self.m[at], self.l[at] = m, self.l[at] * kept + exps.sum((1, 2))
                self.rows[n, p, r] *= kept[:, None, None]
                self.rows[n, p, r] += torch.bmm(exps.to(value.dtype), value[p])

    def totals(self) -> tuple[Tensor, Tensor]:
        """The maximum m of all rows' scores and the sum l of exp(score - m), [n, U]."""
        return joint_totals(self.m.transpose(0, 1), self.l.transpose(0, 1))

    def finish(self, m: Tensor, share: Tensor) -> Tensor:
        """The rows [n, U, R, E] under the weights share · exp(score - m); both [n, U], of these rows or of more."""
        for t, r in enumerate(self.tiling.row_tiles(self.count)):
            self.rows[:, :, r] *= ((self.m[:, t] - m).exp() * share)[..., None, None]
        return self.rows


def joint_totals(m: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum and the sum of exponentials, [n, U], of several parts', [parts, n, U]."""
    joint = m.amax(0)
    return joint, (l * (m - joint).exp()).sum(0)


def delta_of(rows: Tensor, dO: Tensor) -> Tensor:
    """Σ A_n dP of each kind's attended rows [n, U, R, E] and their gradient [U, R, E]: Σ dO · O_n, [n, U]."""
    delta = rows.new_empty(rows.shape[:2], dtype=accumulation_dtype(dO.dtype))
    for n, kind in enumerate(rows):
        delta[n] = (kind * dO).sum((1, 2), dtype=delta.dtype)
    return delta


def mask_attention(
    queries: Queries,
    key: Tensor,  # [U, K, E]
    value: Tensor,  # [U, K, E]
    exponentials: Tensor,  # [n, U, K, K] to be filled with exp(score - m), or with U = 0
    factor: float,
    tiling: Tiling,
) -> Attended:
    """Joint-softmax attention, averaged over the query kinds.

    Where one tile holds all rows of a unit, the weights of both kinds are added before one value product. Where the
    rows come in several tiles, each kind is `Streamed`.
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
        streamed = Streamed(queries.matrix, torch.zeros_like(by_kind), factor, tiling)
        streamed.add(key, value)
        m, l = streamed.totals()
        by_kind = streamed.finish(m, classes / l)
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


class Softmax(NamedTuple):
    """What makes weights A_n = share · exp(score - m) of scores, and dS_n = A_n ⊙ (dP - delta)."""

    m: Tensor  # [n, U]
    share: Tensor  # [n, U] K / Σ exp(score - m)
    delta: Tensor | None  # [n, U] (1/K) Σ A_n dP; None: Σ over the keys given, of tiles that hold all rows of a unit


def tile_backward(
    dO: Tensor,  # [U, R, E]
    queries: Sequence[Tensor],  # n of [U, R, E]
    key: Tensor,  # [U, T, E]
    value: Tensor,  # [U, T, E]
    softmax: Softmax,
    factor: float,
    tiling: Tiling,
    grad_queries: Sequence[Tensor],  # n of [U, R, E], added to
    grad_key: Tensor,  # [U, T, E], added to
    grad_value: Tensor,  # [U, T, E], added to
    exponentials: Tensor | None = None,  # [n, U, R, T] exp(score - m), where they were saved
) -> None:
    """The gradients of R query rows, and these rows' part of the gradients of T keys and values."""
    dtype = key.dtype
    for p, r in tiling.tiles(dO.shape[0], dO.shape[1]) if len(queries) else ():
        dP = _scores(dO[p, r], value[p], 1.0)  # [p, r, T]
        mixed = torch.zeros_like(dP)
        for n, query in enumerate(queries):
            share = softmax.share[n, p, None, None]
            if exponentials is not None:
                exps = exponentials[n, p, r]
            else:
                exps = _scores(query[p, r], key[p], factor, -softmax.m[n, p, None, None]).exp_()
            if softmax.delta is None:
                delta = torch.linalg.vecdot(exps.flatten(1), dP.flatten(1)) * softmax.share[n, p] / key.shape[1]
            else:
                delta = softmax.delta[n, p]
            mixed.addcmul_(exps, share)
            dS = (dP - delta[:, None, None]).mul_(exps).to(dtype)  # without its factor
            share = (factor * share).to(dtype)
            grad_key[p].baddbmm_(dS.mT, query[p, r] * share)
            grad_queries[n][p, r] += torch.bmm(dS, key[p]).mul_(share)
        grad_value[p].baddbmm_(mixed.to(dtype).mT, dO[p, r])


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
    classes, dtype = key.shape[1], key.dtype
    _, m, l, by_kind = attended
    dO = grad_rows / queries.kinds
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    grad_queries = [torch.zeros_like(query) for query in queries.matrix]
    delta = delta_of(by_kind, dO) / classes if by_kind.numel() else None  # [n, U]
    tile_backward(
        dO, queries.matrix, key, value, Softmax(m, classes / l, delta), factor, tiling,
        grad_queries, grad_key, grad_value, exponentials if exponentials.numel() else None,
    )  # fmt: skip
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
