"""The mask attention in Triton: text and rational scores side by side on the same blocks of keys and values.

Two forms. *Direct*, where one program holds all score rows of an (image, head): the joint softmax is finished in
registers and one value product serves all query kinds. *Streaming*, for any K: a program has BM score rows and goes
over the classes with a running softmax per row; the rows of a tile are then weighted against each other, and the
tiles' own weights are left to the next step. The image query is one more score row after the K
class rows. No score leaves the registers in either form.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.blocks import load_rows, store_rows
from rada_kernels.launch import (
    attention_config,
    delta_config,
    device_of,
    direct_bwd_config,
    direct_config,
    is_direct,
    keys_bwd_config,
    next_power,
    product_precision,
    queries_bwd_config,
    tile_block,
)
from rada_kernels.options import QUERIES, Options


@triton.jit
def joint_normaliser(tops, totals, p_tiles, T, BT: tl.constexpr):
    """The maximum over all pairs of classes and K / the sum of exp2(score - maximum), from those of the row tiles."""
    b_most = tl.full([BT], float("-inf"), tl.float32)
    for start in range(0, T, BT):
        o_t = start + tl.arange(0, BT)
        b_most = tl.maximum(b_most, tl.load(tops + p_tiles + o_t, mask=o_t < T, other=float("-inf")))
    b_top = tl.max(b_most, 0)
    b_sum = tl.zeros([BT], tl.float32)
    for start in range(0, T, BT):
        o_t = start + tl.arange(0, BT)
        b_share = tl.exp2(tl.load(tops + p_tiles + o_t, mask=o_t < T, other=float("-inf")) - b_top)
        b_sum += b_share * tl.load(totals + p_tiles + o_t, mask=o_t < T, other=0.0)
    return b_top, tl.sum(b_sum, 0)


@triton.jit
def _joint_weights(b_query, b_key, m_pair, factor, K, PRECISION: tl.constexpr):
    """A_n of one query kind where a block holds all pairs, the scores' maximum, the sum of exp2(score - maximum)."""
    b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
    b_scores = tl.where(m_pair, b_scores, float("-inf"))
    b_top = tl.max(tl.max(b_scores, 1), 0) * factor
    b_exps = tl.exp2(b_scores * factor - b_top)
    b_total = tl.sum(tl.sum(b_exps, 1), 0)
    return b_exps * (K / b_total), b_top, b_total


@triton.jit
def _image_weights(query_image, b_key, m_k, o_e, p_head, factor, E: tl.constexpr):
    """The one row of A_image, [BK], and the image query [BE] in float32."""
    b_query = tl.load(query_image + p_head + o_e, mask=o_e < E, other=0.0).to(tl.float32)
    b_scores = tl.sum(b_key.to(tl.float32) * b_query[None, :], 1) * factor
    b_scores = tl.where(m_k, b_scores, float("-inf"))
    b_exps = tl.exp2(b_scores - tl.max(b_scores, 0))
    return b_exps / tl.sum(b_exps, 0), b_query


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_direct_fwd_kernel(
    query_image,  # [B, D]
    query_text,  # [K, D]
    projections,  # [LAYERS, B, K, D] keys, values, rational queries
    rows,  # [B, K, D] attended rows, all query kinds together
    tops,  # [matrix kinds, B, H] the scores' maximum over all pairs
    totals,  # [matrix kinds, B, H] the sum of exp2(score - maximum)
    B,
    K,
    factor,  # log2(e) / (√E τ)
    H: tl.constexpr,
    E: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,  # at least K
    BE: tl.constexpr,
):
    D: tl.constexpr = H * E
    KINDS: tl.constexpr = IMAGE + TEXT + RATIONAL
    pid = tl.program_id(0)  # (image, head)
    b = pid // H
    h = pid % H
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    m_pair = m_k[:, None] & m_k[None, :]
    o_e = tl.arange(0, BE)
    p_rows = b.to(tl.int64) * K * D + h * E
    layer = B.to(tl.int64) * K * D
    b_key = load_rows(projections + p_rows, o_k, m_k, o_e, D, E, BE)  # [BK, BE]
    b_weights = tl.zeros([BK, BK], tl.float32)
    if TEXT:
        b_query = load_rows(query_text + h * E, o_k, m_k, o_e, D, E, BE)
        b_joint, b_top, b_total = _joint_weights(b_query, b_key, m_pair, factor, K, PRECISION)
        b_weights += b_joint
        tl.store(tops + pid, b_top)
        tl.store(totals + pid, b_total)
    if RATIONAL:
        b_query = load_rows(projections + 2 * layer + p_rows, o_k, m_k, o_e, D, E, BE)
        b_joint, b_top, b_total = _joint_weights(b_query, b_key, m_pair, factor, K, PRECISION)
        b_weights += b_joint
        tl.store(tops + TEXT * B * H + pid, b_top)
        tl.store(totals + TEXT * B * H + pid, b_total)
    if IMAGE:
        b_image, _ = _image_weights(query_image, b_key, m_k, o_e, b.to(tl.int64) * D + h * E, factor, E)
        b_weights += b_image[None, :]
    b_value = load_rows(projections + layer + p_rows, o_k, m_k, o_e, D, E, BE)
    b_rows = tl.dot((b_weights * (1.0 / KINDS)).to(b_value.dtype), b_value, input_precision=PRECISION)
    store_rows(rows + p_rows, b_rows, o_k, m_k, o_e, D, E, BE)


@triton.jit
def _online_softmax(b_scores, b_top, b_total, b_rows, b_value, factor, PRECISION: tl.constexpr):
    """One block of classes more: scores [BM, BN] without factor, state top [BM], total [BM], rows [BM, BE]."""
    b_new = tl.maximum(b_top, tl.max(b_scores, 1) * factor)
    b_exps = tl.exp2(b_scores * factor - b_new[:, None])
    b_decay = tl.exp2(b_top - b_new)
    b_total = b_total * b_decay + tl.sum(b_exps, 1)
    b_rows = tl.dot(b_exps.to(b_value.dtype), b_value, b_rows * b_decay[:, None], input_precision=PRECISION)
    return b_new, b_total, b_rows


@triton.jit
def _load_queries(rows, query_image, p_rows, p_image, o_r, K, o_e, D: tl.constexpr, E: tl.constexpr, BE: tl.constexpr,
                  CLASSES: tl.constexpr, WITH_IMAGE: tl.constexpr):  # fmt: skip
    """Score rows o_r: K class rows if CLASSES, then the image's if WITH_IMAGE; zero after them: [BM, BE]."""
    if CLASSES:
        b_rows = load_rows(rows + p_rows, o_r, o_r < K, o_e, D, E, BE)
        if WITH_IMAGE:
            # A stride of 0: only one row is the image's.
            b_image = load_rows(query_image + p_image, o_r * 0, o_r == K, o_e, D, E, BE)
            b_rows = tl.where((o_r == K)[:, None], b_image.to(b_rows.dtype), b_rows)
    else:
        b_rows = load_rows(query_image + p_image, o_r * 0, o_r == 0, o_e, D, E, BE).to(rows.dtype.element_ty)
    return b_rows


@triton.jit
def _store_tile(
    rows, image_row, tops, totals, image_top, image_total, b_top, b_total, b_rows,
    p_rows, p_image, pair, p_tile, o_r, K, o_e,
    D: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, CLASSES: tl.constexpr, WITH_IMAGE: tl.constexpr,
):  # fmt: skip
    """Finish one query kind's tile: weight its rows against each other and store them; the image's row by itself."""
    last = 0
    if CLASSES:
        last = K
        m_class = o_r < K
        b_tile_top = tl.max(tl.where(m_class, b_top, float("-inf")), 0)
        b_share = tl.where(m_class, tl.exp2(b_top - b_tile_top), 0.0)
        b_tile_total = tl.sum(b_share * b_total, 0)
        tl.store(tops + p_tile, b_tile_top)
        tl.store(totals + p_tile, b_tile_total)
        store_rows(rows + p_rows, b_rows * (b_share / b_tile_total)[:, None], o_r, m_class, o_e, D, E, BE)
    if WITH_IMAGE:
        m_image = o_r == last
        tl.store(image_top + pair + o_r * 0, b_top, mask=m_image)
        tl.store(image_total + pair + o_r * 0, b_total, mask=m_image)
        store_rows(image_row + p_image, b_rows / b_total[:, None], o_r * 0, m_image, o_e, D, E, BE)


@triton.jit
def _scores(b_query, b_key, o_n, K, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """query keyᵀ [BM, BN] without factor; -inf past the last class."""
    b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
    if TAIL:
        b_scores = tl.where((o_n < K)[None, :], b_scores, float("-inf"))
    return b_scores


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_streaming_fwd_kernel(
    query_image,  # [B, D]
    query_text,  # [K, D]
    projections,  # [LAYERS, B, K, D] keys, values, rational queries
    rows,  # [matrix kinds, B, K, D] each kind's rows, weighted within their tile
    image_row,  # [B, D]
    tops,  # [matrix kinds, B, H, T] each row tile's largest score
    totals,  # [matrix kinds, B, H, T] each row tile's sum of exp2(score - top)
    image_top,  # [B, H] the same of the image's row
    image_total,  # [B, H]
    B,
    K,
    factor,  # log2(e) / (√E τ)
    H: tl.constexpr,
    E: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
):
    D: tl.constexpr = H * E
    T = tl.cdiv((K if TEXT or RATIONAL else 0) + IMAGE, BM)
    pid = tl.program_id(0)
    pair = pid // T  # (image, head)
    tile = pid - pair * T  # neighbours read the same keys and values
    b = pair // H
    h = pair % H
    o_r = tile * BM + tl.arange(0, BM)
    o_e = tl.arange(0, BE)
    p_rows = b.to(tl.int64) * K * D + h * E
    p_image = b.to(tl.int64) * D + h * E
    layer = B.to(tl.int64) * K * D
    # The image's row goes with the first kind in use.
    FIRST_TEXT: tl.constexpr = TEXT or not RATIONAL
    if FIRST_TEXT:
        b_text = _load_queries(query_text, query_image, h * E, p_image, o_r, K, o_e, D, E, BE, TEXT, IMAGE)
    if RATIONAL:
        b_rational = _load_queries(
            projections + 2 * layer, query_image, p_rows, p_image, o_r, K, o_e, D, E, BE, True, IMAGE and not TEXT
        )
    b_text_top = tl.full([BM], float("-inf"), tl.float32)
    b_text_total = tl.zeros([BM], tl.float32)
    b_text_rows = tl.zeros([BM, BE], tl.float32)
    b_rational_top = tl.full([BM], float("-inf"), tl.float32)
    b_rational_total = tl.zeros([BM], tl.float32)
    b_rational_rows = tl.zeros([BM, BE], tl.float32)
    whole = K // BN * BN
    for start in range(0, whole, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < whole
        b_key = load_rows(projections + p_rows, o_n, m_n, o_e, D, E, BE)  # [BN, BE]
        b_value = load_rows(projections + layer + p_rows, o_n, m_n, o_e, D, E, BE)
        if FIRST_TEXT:
            b_scores = _scores(b_text, b_key, o_n, K, False, PRECISION)
            b_text_top, b_text_total, b_text_rows = _online_softmax(
                b_scores, b_text_top, b_text_total, b_text_rows, b_value, factor, PRECISION
            )
        if RATIONAL:
            b_scores = _scores(b_rational, b_key, o_n, K, False, PRECISION)
            b_rational_top, b_rational_total, b_rational_rows = _online_softmax(
                b_scores, b_rational_top, b_rational_total, b_rational_rows, b_value, factor, PRECISION
            )
    if whole < K:
        o_n = whole + tl.arange(0, BN)
        m_n = o_n < K
        b_key = load_rows(projections + p_rows, o_n, m_n, o_e, D, E, BE)
        b_value = load_rows(projections + layer + p_rows, o_n, m_n, o_e, D, E, BE)
        if FIRST_TEXT:
            b_scores = _scores(b_text, b_key, o_n, K, True, PRECISION)
            b_text_top, b_text_total, b_text_rows = _online_softmax(
                b_scores, b_text_top, b_text_total, b_text_rows, b_value, factor, PRECISION
            )
        if RATIONAL:
            b_scores = _scores(b_rational, b_key, o_n, K, True, PRECISION)
            b_rational_top, b_rational_total, b_rational_rows = _online_softmax(
                b_scores, b_rational_top, b_rational_total, b_rational_rows, b_value, factor, PRECISION
            )
    if FIRST_TEXT:
        _store_tile(
            rows, image_row, tops, totals, image_top, image_total, b_text_top, b_text_total, b_text_rows,
            p_rows, p_image, pair, pid, o_r, K, o_e, D, E, BE, TEXT, IMAGE,
        )  # fmt: skip
    if RATIONAL:
        _store_tile(
            rows + TEXT * layer, image_row, tops, totals, image_top, image_total,
            b_rational_top, b_rational_total, b_rational_rows,
            p_rows, p_image, pair, pid + TEXT * B * H * T, o_r, K, o_e, D, E, BE, True, IMAGE and not TEXT,
        )  # fmt: skip


@triton.jit
def _joint_backward(b_query, b_key, m_pair, b_grad_weights, tops, totals, p_joint, factor, K, PRECISION: tl.constexpr):
    """A_n and dS_n = A_n (dA - δ_n) of one query kind where a block holds all pairs: [BK, BK] each."""
    b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
    b_exps = tl.exp2(b_scores * factor - tl.load(tops + p_joint))
    b_weights = tl.where(m_pair, b_exps * (K / tl.load(totals + p_joint)), 0.0)
    b_delta = tl.sum(tl.sum(b_weights * b_grad_weights, 1), 0) / K
    return b_weights, (b_weights * (b_grad_weights - b_delta)).to(b_key.dtype)


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_direct_bwd_kernel(
    query_image,  # [B, D]
    query_text,  # [K, D]
    projections,  # [LAYERS, B, K, D]
    tops,  # [matrix kinds, B, H]
    totals,  # [matrix kinds, B, H]
    grad_rows,  # [B, K, D]
    grad_projections,  # [LAYERS, B, K, D]
    grad_text,  # [B, K, D] each image's part
    grad_image,  # [B, D]
    B,
    K,
    factor,  # log2(e) / (√E τ)
    grad_factor,  # 1 / (√E τ)
    H: tl.constexpr,
    E: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
):
    D: tl.constexpr = H * E
    KINDS: tl.constexpr = IMAGE + TEXT + RATIONAL
    pid = tl.program_id(0)  # (image, head)
    b = pid // H
    h = pid % H
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    m_pair = m_k[:, None] & m_k[None, :]
    o_e = tl.arange(0, BE)
    p_rows = b.to(tl.int64) * K * D + h * E
    p_image = b.to(tl.int64) * D + h * E
    layer = B.to(tl.int64) * K * D
    b_key = load_rows(projections + p_rows, o_k, m_k, o_e, D, E, BE)  # [BK, BE]
    b_value = load_rows(projections + layer + p_rows, o_k, m_k, o_e, D, E, BE)
    b_grad_rows = load_rows(grad_rows + p_rows, o_k, m_k, o_e, D, E, BE)
    # dA is the same for every query kind.
    b_grad_weights = tl.dot(b_grad_rows, tl.trans(b_value), input_precision=PRECISION) * (1.0 / KINDS)  # [BK, BK]
    b_weights = tl.zeros([BK, BK], tl.float32)
    b_grad_key = tl.zeros([BK, BE], tl.float32)
    if TEXT:
        b_query = load_rows(query_text + h * E, o_k, m_k, o_e, D, E, BE)
        b_part, b_grad_scores = _joint_backward(
            b_query, b_key, m_pair, b_grad_weights, tops, totals, pid, factor, K, PRECISION
        )
        b_weights += b_part
        b_grad_key = tl.dot(tl.trans(b_grad_scores), b_query, b_grad_key, input_precision=PRECISION)
        b_grad_query = tl.dot(b_grad_scores, b_key, input_precision=PRECISION) * grad_factor
        store_rows(grad_text + p_rows, b_grad_query, o_k, m_k, o_e, D, E, BE)
    if RATIONAL:
        b_query = load_rows(projections + 2 * layer + p_rows, o_k, m_k, o_e, D, E, BE)
        b_part, b_grad_scores = _joint_backward(
            b_query, b_key, m_pair, b_grad_weights, tops, totals, TEXT * B * H + pid, factor, K, PRECISION
        )
        b_weights += b_part
        b_grad_key = tl.dot(tl.trans(b_grad_scores), b_query, b_grad_key, input_precision=PRECISION)
        b_grad_query = tl.dot(b_grad_scores, b_key, input_precision=PRECISION) * grad_factor
        store_rows(grad_projections + 2 * layer + p_rows, b_grad_query, o_k, m_k, o_e, D, E, BE)
    if IMAGE:
        b_row, b_query_row = _image_weights(query_image, b_key, m_k, o_e, p_image, factor, E)
        b_grad_row = tl.sum(b_grad_weights, 0)  # every class row has the image's weights
        b_grad_row = b_row * (b_grad_row - tl.sum(b_row * b_grad_row, 0))  # [BK]
        b_weights += b_row[None, :]
        b_grad_key += b_grad_row[:, None] * b_query_row[None, :]
        b_grad_query_row = tl.sum(b_grad_row[:, None] * b_key.to(tl.float32), 0) * grad_factor
        tl.store(grad_image + p_image + o_e, b_grad_query_row, mask=o_e < E)
    store_rows(grad_projections + p_rows, b_grad_key * grad_factor, o_k, m_k, o_e, D, E, BE)
    b_weights = (b_weights * (1.0 / KINDS)).to(b_grad_rows.dtype)
    b_grad_value = tl.dot(tl.trans(b_weights), b_grad_rows, input_precision=PRECISION)
    store_rows(grad_projections + layer + p_rows, b_grad_value, o_k, m_k, o_e, D, E, BE)


@triton.jit(do_not_specialize=["B", "K", "T"])
def _mask_attention_delta_kernel(
    rows,  # [matrix kinds, B, K, D]
    image_row,  # [B, D]
    tops,  # [matrix kinds, B, H, T]
    totals,  # [matrix kinds, B, H, T]
    image_top,  # [B, H]
    image_total,  # [B, H]
    grad_rows,  # [B, K, D]
    joint_tops,  # [matrix kinds + 1, B, H] A_n = scale exp2(score - top); the image's last
    joint_scales,  # [matrix kinds + 1, B, H]
    deltas,  # [matrix kinds + 1, B, H]
    upstream,  # [B, D] Σ_i grad_rows[i], what the image's row receives
    B,
    K,
    T,
    H: tl.constexpr,
    E: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BE: tl.constexpr,
):
    D: tl.constexpr = H * E
    KINDS: tl.constexpr = IMAGE + TEXT + RATIONAL
    pid = tl.program_id(0)  # (image, head)
    b = pid // H
    h = pid % H
    pairs = B * H
    o_e = tl.arange(0, BE)
    p_rows = b.to(tl.int64) * K * D + h * E
    p_image = b.to(tl.int64) * D + h * E
    layer = B.to(tl.int64) * K * D
    b_upstream = tl.zeros([BE], tl.float32)
    b_first = tl.zeros([BN], tl.float32)
    b_second = tl.zeros([BN], tl.float32)
    if TEXT or RATIONAL:
        b_first_top, b_first_total = joint_normaliser(tops, totals, pid * T, T, BT)
    if TEXT and RATIONAL:
        b_second_top, b_second_total = joint_normaliser(tops, totals, (pairs + pid) * T, T, BT)
    for start in range(0, K, BN):
        o_k = start + tl.arange(0, BN)
        m_k = o_k < K
        b_grad = load_rows(grad_rows + p_rows, o_k, m_k, o_e, D, E, BE).to(tl.float32)  # [BN, BE]
        b_upstream += tl.sum(b_grad, 0)
        p_tiles = pid * T + o_k // BM
        if TEXT or RATIONAL:
            b_rows = load_rows(rows + p_rows, o_k, m_k, o_e, D, E, BE).to(tl.float32)
            b_share = tl.exp2(tl.load(tops + p_tiles, mask=m_k, other=float("-inf")) - b_first_top)
            b_share *= tl.load(totals + p_tiles, mask=m_k, other=0.0)
            b_first += b_share * tl.sum(b_rows * b_grad, 1)
        if TEXT and RATIONAL:
            b_rows = load_rows(rows + layer + p_rows, o_k, m_k, o_e, D, E, BE).to(tl.float32)
            b_share = tl.exp2(tl.load(tops + pairs * T + p_tiles, mask=m_k, other=float("-inf")) - b_second_top)
            b_share *= tl.load(totals + pairs * T + p_tiles, mask=m_k, other=0.0)
            b_second += b_share * tl.sum(b_rows * b_grad, 1)
    if TEXT or RATIONAL:
        tl.store(joint_tops + pid, b_first_top)
        tl.store(joint_scales + pid, K / b_first_total)
        tl.store(deltas + pid, tl.sum(b_first, 0) / (b_first_total * KINDS))
    if TEXT and RATIONAL:
        tl.store(joint_tops + pairs + pid, b_second_top)
        tl.store(joint_scales + pairs + pid, K / b_second_total)
        tl.store(deltas + pairs + pid, tl.sum(b_second, 0) / (b_second_total * KINDS))
    if IMAGE:
        p_joint = (TEXT + RATIONAL) * pairs + pid
        b_image = tl.load(image_row + p_image + o_e, mask=o_e < E, other=0.0).to(tl.float32)
        tl.store(upstream + p_image + o_e, b_upstream, mask=o_e < E)
        tl.store(joint_tops + p_joint, tl.load(image_top + pid))
        tl.store(joint_scales + p_joint, 1.0 / tl.load(image_total + pid))
        tl.store(deltas + p_joint, tl.sum(b_upstream * b_image, 0) / KINDS)


@triton.jit
def _row_values(x, p_class, p_image, o_r, K, CLASSES: tl.constexpr, WITH_IMAGE: tl.constexpr):
    """One value per score row [BM]: the class rows', the image row's, and 0 after them."""
    last = K if CLASSES else 0
    b_values = o_r * 0.0
    if CLASSES:
        b_values = tl.where(o_r < K, tl.load(x + p_class), b_values)
    if WITH_IMAGE:
        b_values = tl.where(o_r == last, tl.load(x + p_image), b_values)
    return b_values


@triton.jit
def _weights_and_gradient(
    b_query, b_key, b_grad_weights, b_top, b_scale, b_delta, o_n, K, factor, PRECISION: tl.constexpr
):
    """A_n and dS_n = A_n (dA - δ_n) of a block: [BM, BN] each; zero past the last class."""
    b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION)
    b_weights = tl.exp2(b_scores * factor - b_top[:, None]) * b_scale[:, None]
    b_weights = tl.where((o_n < K)[None, :], b_weights, 0.0)
    return b_weights, (b_weights * (b_grad_weights - b_delta[:, None])).to(b_key.dtype)


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_bwd_queries_kernel(
    query_image,  # [B, D]
    query_text,  # [K, D]
    projections,  # [LAYERS, B, K, D]
    joint_tops,  # [matrix kinds + 1, B, H]
    joint_scales,  # [matrix kinds + 1, B, H]
    deltas,  # [matrix kinds + 1, B, H]
    upstream,  # [B, D]
    grad_rows,  # [B, K, D]
    grad_projections,  # [LAYERS, B, K, D] the rational queries' part is written
    grad_text,  # [B, K, D] each image's part
    grad_image,  # [B, D]
    B,
    K,
    factor,  # log2(e) / (√E τ)
    grad_factor,  # 1 / (√E τ)
    H: tl.constexpr,
    E: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
):
    D: tl.constexpr = H * E
    KINDS: tl.constexpr = IMAGE + TEXT + RATIONAL
    FIRST_TEXT: tl.constexpr = TEXT or not RATIONAL
    T = tl.cdiv((K if TEXT or RATIONAL else 0) + IMAGE, BM)
    pid = tl.program_id(0)
    pair = pid // T  # (image, head)
    b = pair // H
    h = pair % H
    pairs = B * H
    last = K if TEXT or RATIONAL else 0
    o_r = (pid - pair * T) * BM + tl.arange(0, BM)
    o_e = tl.arange(0, BE)
    p_rows = b.to(tl.int64) * K * D + h * E
    p_image = b.to(tl.int64) * D + h * E
    p_joint = (TEXT + RATIONAL) * pairs + pair  # the image's
    layer = B.to(tl.int64) * K * D
    b_grad_rows = _load_queries(grad_rows, upstream, p_rows, p_image, o_r, K, o_e, D, E, BE, TEXT or RATIONAL, IMAGE)
    if FIRST_TEXT:
        b_text = _load_queries(query_text, query_image, h * E, p_image, o_r, K, o_e, D, E, BE, TEXT, IMAGE)
        b_text_top = _row_values(joint_tops, pair, p_joint, o_r, K, TEXT, IMAGE)
        b_text_scale = _row_values(joint_scales, pair, p_joint, o_r, K, TEXT, IMAGE)
        b_text_delta = _row_values(deltas, pair, p_joint, o_r, K, TEXT, IMAGE)
    if RATIONAL:
        IMAGE_HERE: tl.constexpr = IMAGE and not TEXT
        p_kind = TEXT * pairs + pair
        b_rational = _load_queries(
            projections + 2 * layer, query_image, p_rows, p_image, o_r, K, o_e, D, E, BE, True, IMAGE_HERE
        )
        b_rational_top = _row_values(joint_tops, p_kind, p_joint, o_r, K, True, IMAGE_HERE)
        b_rational_scale = _row_values(joint_scales, p_kind, p_joint, o_r, K, True, IMAGE_HERE)
        b_rational_delta = _row_values(deltas, p_kind, p_joint, o_r, K, True, IMAGE_HERE)
    b_grad_text = tl.zeros([BM, BE], tl.float32)
    b_grad_rational = tl.zeros([BM, BE], tl.float32)
    for start in range(0, K, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < K
        b_key = load_rows(projections + p_rows, o_n, m_n, o_e, D, E, BE)  # [BN, BE]
        b_value = load_rows(projections + layer + p_rows, o_n, m_n, o_e, D, E, BE)
        b_grad_weights = tl.dot(b_grad_rows, tl.trans(b_value), input_precision=PRECISION) * (1.0 / KINDS)
        if FIRST_TEXT:
            _, b_grad_scores = _weights_and_gradient(
                b_text, b_key, b_grad_weights, b_text_top, b_text_scale, b_text_delta, o_n, K, factor, PRECISION
            )
            b_grad_text = tl.dot(b_grad_scores, b_key, b_grad_text, input_precision=PRECISION)
        if RATIONAL:
            _, b_grad_scores = _weights_and_gradient(
                b_rational,
                b_key,
                b_grad_weights,
                b_rational_top,
                b_rational_scale,
                b_rational_delta,
                o_n,
                K,
                factor,
                PRECISION,
            )
            b_grad_rational = tl.dot(b_grad_scores, b_key, b_grad_rational, input_precision=PRECISION)
    b_grad_text *= grad_factor
    b_grad_rational *= grad_factor
    if TEXT:
        store_rows(grad_text + p_rows, b_grad_text, o_r, o_r < K, o_e, D, E, BE)
    if RATIONAL:
        store_rows(grad_projections + 2 * layer + p_rows, b_grad_rational, o_r, o_r < K, o_e, D, E, BE)
    if IMAGE:
        if FIRST_TEXT:
            store_rows(grad_image + p_image, b_grad_text, o_r * 0, o_r == last, o_e, D, E, BE)
        else:
            store_rows(grad_image + p_image, b_grad_rational, o_r * 0, o_r == last, o_e, D, E, BE)


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_bwd_keys_kernel(
    query_image,  # [B, D]
    query_text,  # [K, D]
    projections,  # [LAYERS, B, K, D]
    joint_tops,  # [matrix kinds + 1, B, H]
    joint_scales,  # [matrix kinds + 1, B, H]
    deltas,  # [matrix kinds + 1, B, H]
    upstream,  # [B, D]
    grad_rows,  # [B, K, D]
    grad_projections,  # [LAYERS, B, K, D] the keys' and the values' parts are written
    B,
    K,
    factor,  # log2(e) / (√E τ)
    grad_factor,  # 1 / (√E τ)
    H: tl.constexpr,
    E: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
):
    D: tl.constexpr = H * E
    KINDS: tl.constexpr = IMAGE + TEXT + RATIONAL
    FIRST_TEXT: tl.constexpr = TEXT or not RATIONAL
    IMAGE_HERE: tl.constexpr = IMAGE and not TEXT  # the image's row goes with the rational queries
    tiles = tl.cdiv(K, BN)
    pid = tl.program_id(0)
    pair = pid // tiles  # (image, head)
    b = pair // H
    h = pair % H
    pairs = B * H
    o_n = (pid - pair * tiles) * BN + tl.arange(0, BN)
    m_n = o_n < K
    o_e = tl.arange(0, BE)
    p_rows = b.to(tl.int64) * K * D + h * E
    p_image = b.to(tl.int64) * D + h * E
    p_joint = (TEXT + RATIONAL) * pairs + pair  # the image's
    p_kind = TEXT * pairs + pair  # the rational kind's
    layer = B.to(tl.int64) * K * D
    b_key = load_rows(projections + p_rows, o_n, m_n, o_e, D, E, BE)  # [BN, BE]
    b_value = load_rows(projections + layer + p_rows, o_n, m_n, o_e, D, E, BE)
    b_grad_key = tl.zeros([BN, BE], tl.float32)
    b_grad_value = tl.zeros([BN, BE], tl.float32)
    for start in range(0, (K if TEXT or RATIONAL else 0) + IMAGE, BM):
        o_r = start + tl.arange(0, BM)
        b_grad_rows = _load_queries(
            grad_rows, upstream, p_rows, p_image, o_r, K, o_e, D, E, BE, TEXT or RATIONAL, IMAGE
        )  # [BM, BE]
        b_grad_weights = tl.dot(b_grad_rows, tl.trans(b_value), input_precision=PRECISION) * (1.0 / KINDS)
        b_weights = tl.zeros([BM, BN], tl.float32)
        if FIRST_TEXT:
            b_query = _load_queries(query_text, query_image, h * E, p_image, o_r, K, o_e, D, E, BE, TEXT, IMAGE)
            b_top = _row_values(joint_tops, pair, p_joint, o_r, K, TEXT, IMAGE)
            b_scale = _row_values(joint_scales, pair, p_joint, o_r, K, TEXT, IMAGE)
            b_delta = _row_values(deltas, pair, p_joint, o_r, K, TEXT, IMAGE)
            b_part, b_grad_scores = _weights_and_gradient(
                b_query, b_key, b_grad_weights, b_top, b_scale, b_delta, o_n, K, factor, PRECISION
            )
            b_weights += b_part
            b_grad_key = tl.dot(tl.trans(b_grad_scores), b_query, b_grad_key, input_precision=PRECISION)
        if RATIONAL:
            b_query = _load_queries(
                projections + 2 * layer, query_image, p_rows, p_image, o_r, K, o_e, D, E, BE, True, IMAGE_HERE
            )
            b_top = _row_values(joint_tops, p_kind, p_joint, o_r, K, True, IMAGE_HERE)
            b_scale = _row_values(joint_scales, p_kind, p_joint, o_r, K, True, IMAGE_HERE)
            b_delta = _row_values(deltas, p_kind, p_joint, o_r, K, True, IMAGE_HERE)
            b_part, b_grad_scores = _weights_and_gradient(
                b_query, b_key, b_grad_weights, b_top, b_scale, b_delta, o_n, K, factor, PRECISION
            )
            b_weights += b_part
            b_grad_key = tl.dot(tl.trans(b_grad_scores), b_query, b_grad_key, input_precision=PRECISION)
        b_weights = (b_weights * (1.0 / KINDS)).to(b_grad_rows.dtype)
        b_grad_value = tl.dot(tl.trans(b_weights), b_grad_rows, b_grad_value, input_precision=PRECISION)
    store_rows(grad_projections + p_rows, b_grad_key * grad_factor, o_n, m_n, o_e, D, E, BE)
    store_rows(grad_projections + layer + p_rows, b_grad_value, o_n, m_n, o_e, D, E, BE)


class AttendedRows(NamedTuple):
    """What the attention leaves to the next steps."""

    rows: Tensor  # direct: attended rows [1, B, K, D]; streaming: each kind's, weighted in its row tile [n, B, K, D]
    image_row: Tensor  # streaming: the image query's attended row [B, D]
    tops: Tensor  # [n, B, H, T] largest score of each row tile, n matrix query kinds; direct: T = 1
    totals: Tensor  # [n, B, H, T] sum of exp2(score - largest)
    image_top: Tensor  # streaming: the same of the image's row [B, H]
    image_total: Tensor  # [B, H]


def empty_attended_rows(image: Tensor, classes: int, options: Options) -> AttendedRows:
    """Uninitialised tensors for a call's attended rows, from shapes alone."""
    batch, width = image.shape
    heads = options.num_heads
    direct = is_direct(classes)
    kinds = len(options.queries) - ("image" in options.queries)
    tiles = 1 if direct else row_tiles(image, classes, options)

    def float32(*shape: int) -> Tensor:
        return image.new_empty(shape, dtype=torch.float32)

    return AttendedRows(
        rows=image.new_empty(1 if direct else kinds, batch, classes, width),
        image_row=image.new_empty(0 if direct else batch, width),
        tops=float32(kinds, batch, heads, tiles),
        totals=float32(kinds, batch, heads, tiles),
        image_top=float32(0 if direct else batch, heads),
        image_total=float32(0 if direct else batch, heads),
    )


def row_tiles(image: Tensor, classes: int, options: Options) -> int:
    """T: tiles of score rows of one (image, head), the image query's row included."""
    config = attention_config(device_of(image), image.dtype, classes, image.shape[-1] // options.num_heads)
    matrix = options.queries != ("image",)
    return triton.cdiv(matrix * classes + ("image" in options.queries), config.BM)


def mask_attention_fwd(
    query_image: Tensor,  # [B, D]
    query_text: Tensor,  # [K, D]
    projections: Tensor,  # [2 or 3, B, K, D]
    options: Options,
    attended: AttendedRows,  # to be filled
) -> None:
    """Joint-softmax attention of every (image, head); its form is told by what is to be filled."""
    _, batch, classes, width = projections.shape
    heads = options.num_heads
    head_width = width // heads
    common = _common(query_image, query_text, projections, options)
    device = device_of(projections)
    if is_direct(classes):
        config = direct_config(device, projections.dtype, classes, head_width)
        _mask_attention_direct_fwd_kernel[(batch * heads,)](
            rows=attended.rows, tops=attended.tops, totals=attended.totals, BK=config.BM, **common, **config.launch
        )
        return
    config = attention_config(device, projections.dtype, classes, head_width)
    _mask_attention_streaming_fwd_kernel[(batch * heads * attended.tops.shape[-1],)](
        **attended._asdict(), BM=config.BM, BN=config.BN, **common, **config.launch,
    )  # fmt: skip


def _common(query_image: Tensor, query_text: Tensor, projections: Tensor, options: Options) -> dict:
    """What every attention kernel that computes scores is launched with."""
    _, batch, classes, width = projections.shape
    head_width = width // options.num_heads
    return {
        "query_image": query_image, "query_text": query_text, "projections": projections, "B": batch, "K": classes,
        "factor": options.score_factor(width) * math.log2(math.e), "H": options.num_heads, "E": head_width,
        **kind_flags(options), "PRECISION": product_precision(projections.dtype, device_of(projections)),
        "BE": max(16, next_power(head_width)),
    }  # fmt: skip


def mask_attention_bwd(
    grad_rows: Tensor,  # [B, K, D]
    query_image: Tensor,  # [B, D]
    query_text: Tensor,  # [K, D]
    projections: Tensor,  # [2 or 3, B, K, D]
    options: Options,
    attended: AttendedRows,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the projections [2 or 3, B, K, D], of the text query by image [B, K, D], of the image query [B, D].

    The last in float32. What is not in use has B = 0.
    """
    _, batch, classes, width = projections.shape
    heads = options.num_heads
    head_width = width // heads
    device = device_of(projections)
    gradients = {
        "grad_projections": torch.empty_like(projections),
        "grad_text": projections.new_empty(batch * ("text" in options.queries), classes, width),
        "grad_image": projections.new_empty(batch * ("image" in options.queries), width, dtype=torch.float32),
    }
    common = _common(query_image, query_text, projections, options)
    common |= {"grad_rows": grad_rows, "grad_factor": options.score_factor(width)}
    if is_direct(classes):
        config = direct_bwd_config(device, projections.dtype, classes, head_width)
        _mask_attention_direct_bwd_kernel[(batch * heads,)](
            tops=attended.tops, totals=attended.totals, BK=config.BM, **gradients, **common, **config.launch
        )
        return tuple(gradients.values())
    joint = {
        name: attended.tops.new_empty(len(attended.tops) + 1, batch, heads)
        for name in ("joint_tops", "joint_scales", "deltas")
    } | {"upstream": attended.tops.new_empty(batch, width)}
    tiles = attended.tops.shape[-1]
    config = delta_config(device, projections.dtype, head_width)
    _mask_attention_delta_kernel[(batch * heads,)](
        **attended._asdict(), grad_rows=grad_rows, **joint, B=batch, K=classes,
        T=tiles, H=heads, E=head_width, **kind_flags(options),
        BM=attention_config(device, projections.dtype, classes, head_width).BM, BN=config.BN,
        BT=tile_block(tiles), BE=common["BE"], **config.launch,
    )  # fmt: skip
    common |= joint
    config = queries_bwd_config(device, projections.dtype, head_width)
    rows = (options.queries != ("image",)) * classes + ("image" in options.queries)
    _mask_attention_bwd_queries_kernel[(batch * heads * triton.cdiv(rows, config.BM),)](
        BM=config.BM, BN=config.BN, **gradients, **common, **config.launch
    )
    config = keys_bwd_config(device, projections.dtype, head_width)
    _mask_attention_bwd_keys_kernel[(batch * heads * triton.cdiv(classes, config.BN),)](
        grad_projections=gradients["grad_projections"], BM=config.BM, BN=config.BN, **common, **config.launch
    )
    return tuple(gradients.values())


def kind_flags(options: Options) -> dict[str, bool]:
    """The query kinds in use, as the kernels take them."""
    return {name.upper(): name in options.queries for name in QUERIES}
