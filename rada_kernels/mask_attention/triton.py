"""The mask attention in Triton: text and rational scores side by side on the same blocks of keys and values.

Three forms. *Direct*: one program holds all scores of an (image, head), the joint softmax is finished in registers and
one value product serves all query kinds. *Joined*: one program has all score rows of an (image, head) and goes over
the classes once per query kind, with a running softmax per row; then it knows what the rows weigh against each other
and adds the kinds up. *Streaming*, for any K: a program has BM of the score rows; the rows of a tile are weighted
against each other, and the tiles' own weights are left to the next step. The image query is one more score row after
the K class rows. No score leaves the registers in any form.

Where registers are short, a streaming program takes one query kind (APART): twice the programs, each with half of
what is alive.

Backward differentiates the sum Σ_n A_n: the mean's 1 / KINDS is part of `grad_factor`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.blocks import (
    add_heads,
    add_product,
    along_rows,
    load_head,
    product_transposed,
    scale_head,
    store_head,
    sum_rows,
    zero_head,
)
from rada_kernels.launch import (
    attention_config,
    attention_form,
    delta_config,
    device_of,
    direct_bwd_classes,
    direct_bwd_config,
    direct_config,
    joined_config,
    joint_config,
    keys_bwd_config,
    product_precision,
    queries_bwd_config,
    tile_block,
)
from rada_kernels.options import QUERIES, Options


@triton.jit
def joint_normaliser(tops, totals, p_tiles, T, BT: tl.constexpr):
    """The maximum over all pairs of classes and the sum of exp2(score - maximum), from those of the row tiles."""
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
def _by_kind(text, rational, kind, TEXT: tl.constexpr, RATIONAL: tl.constexpr, APART: tl.constexpr):
    """Of a pointer per matrix query kind, those of the kinds that a program takes; the text's where there is none."""
    if APART:
        return (tl.where(kind == 0, text, rational),)
    elif TEXT and RATIONAL:
        return text, rational
    elif RATIONAL:
        return (rational,)
    else:
        return (text,)


@triton.jit
def _head_offsets(pair, K, H: tl.constexpr, E: tl.constexpr):
    """Where the head of a pair (image, head) begins: in a row of D, in [B, D], in [B, K, D]."""
    p_head = pair % H * E
    b = (pair // H).to(tl.int64)
    return p_head, b * (H * E) + p_head, b * K * (H * E) + p_head


@triton.jit
def _joint_weights(b_query, b_key, m_pair, factor, K, PRECISION: tl.constexpr):
    """A_n of one query kind where a block holds all pairs, the scores' maximum, the sum of exp2(score - maximum)."""
    b_scores = product_transposed(b_query, b_key, PRECISION)
    b_scores = tl.where(m_pair, b_scores, float("-inf"))
    b_top = tl.max(tl.max(b_scores, 1), 0) * factor
    b_exps = tl.exp2(b_scores * factor - b_top)
    b_total = tl.sum(tl.sum(b_exps, 1), 0)
    return b_exps * (K / b_total), b_top, b_total


@triton.jit
def _image_weights(p_query, b_key, m_k, factor, E: tl.constexpr):
    """The one row of A_image, [BK], and the image query, pieces [1, BE]."""
    o_one = tl.arange(0, 1)
    b_query = load_head(p_query + o_one, o_one == 0, E)
    b_scores = tl.where(m_k, along_rows(b_key, b_query) * factor, float("-inf"))
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
):
    D: tl.constexpr = H * E
    KINDS: tl.constexpr = IMAGE + TEXT + RATIONAL
    pair = tl.program_id(0)  # (image, head)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    m_pair = m_k[:, None] & m_k[None, :]
    p_head, p_image, p_rows = _head_offsets(pair, K, H, E)
    p_k = o_k.to(tl.int64) * D
    layer = B.to(tl.int64) * K * D
    keys = projections + p_rows
    queries = _by_kind(query_text + p_head, keys + 2 * layer, 0, TEXT, RATIONAL, False)
    b_key = load_head(keys + p_k, m_k, E)  # [BK, E]
    b_weights = tl.zeros([BK, BK], tl.float32)
    for n in tl.static_range(TEXT + RATIONAL):
        b_query = load_head(queries[n] + p_k, m_k, E)
        b_joint, b_top, b_total = _joint_weights(b_query, b_key, m_pair, factor, K, PRECISION)
        b_weights += b_joint
        tl.store(tops + n * B * H + pair, b_top)
        tl.store(totals + n * B * H + pair, b_total)
    if IMAGE:
        b_image, _ = _image_weights(query_image + p_image, b_key, m_k, factor, E)
        b_weights += b_image[None, :]
    b_value = load_head(keys + layer + p_k, m_k, E)
    b_weights = (b_weights * (1.0 / KINDS)).to(b_value[0].dtype)
    store_head(rows + p_rows + p_k, add_product(zero_head(BK, E), b_weights, b_value, PRECISION), m_k, E)


@triton.jit
def _row_tile(K, T, BM: tl.constexpr, CLASSES: tl.constexpr, APART: tl.constexpr):
    """A program's pair (image, head), first matrix kind, tile; its score rows [BM], and which of them are the K
    classes' and which is the image's, the one after them. It goes with the first kind.
    """
    pid = tl.program_id(0)
    tile = pid % T  # neighbours read the same keys and values
    pair = pid // T
    kind = 0
    o_r = tile * BM + tl.arange(0, BM)
    last = K if CLASSES else 0
    m_image = o_r == last
    if APART:
        kind = pair % 2
        pair = pair // 2
        m_image = m_image & (kind == 0)
    return pair, kind, tile, o_r, o_r < last, m_image


@triton.jit
def _score_rows(rows, image, o_r, m_class, m_image, D: tl.constexpr, WITH_IMAGE: tl.constexpr):
    """Where score rows o_r [BM] begin, and which there are: class rows and, if WITH_IMAGE, the image's."""
    p_rows = rows + o_r.to(tl.int64) * D
    if WITH_IMAGE:
        return tl.where(m_image, image, p_rows), m_class | m_image
    else:
        return p_rows, m_class


@triton.jit
def _online_softmax(b_scores, b_state, b_value, factor, PRECISION: tl.constexpr):
    """One block of classes more: scores [BM, BN] without factor; state: top [BM], total [BM], rows [BM, E]."""
    b_top, b_total, b_rows = b_state
    b_new = tl.maximum(b_top, tl.max(b_scores, 1) * factor)
    b_exps = tl.exp2(b_scores * factor - b_new[:, None])
    b_decay = tl.exp2(b_top - b_new)
    b_total = b_total * b_decay + tl.sum(b_exps, 1)
    b_rows = scale_head(b_rows, b_decay[:, None])
    return b_new, b_total, add_product(b_rows, b_exps.to(b_value[0].dtype), b_value, PRECISION)


@triton.jit
def _attend(
    b_queries, keys, values, K, factor,
    D: tl.constexpr, E: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """All classes' values under the row softmax of each of some queries [BM, E]: states as of _online_softmax."""
    b_states = ()
    for _ in tl.static_range(len(b_queries)):
        b_states += ((tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32), zero_head(BM, E)),)
    for start in range(0, K, BN):
        o_n = start + tl.arange(0, BN)
        m_n = o_n < K
        p_n = o_n.to(tl.int64) * D
        b_key = load_head(keys + p_n, m_n, E)  # [BN, E]
        b_value = load_head(values + p_n, m_n, E)
        b_new = ()
        for n in tl.static_range(len(b_queries)):
            b_scores = product_transposed(b_queries[n], b_key, PRECISION)
            if start + BN > K:  # the last block alone
                b_scores = tl.where(m_n[None, :], b_scores, float("-inf"))
            b_new += (_online_softmax(b_scores, b_states[n], b_value, factor, PRECISION),)
        b_states = b_new
    return b_states


@triton.jit
def _among_rows(b_top, b_total, m_class):
    """The class rows' largest score, exp2(a row's largest - that) [BM], and its sum over the rows with their totals."""
    b_most = tl.max(tl.where(m_class, b_top, float("-inf")), 0)
    b_share = tl.where(m_class, tl.exp2(b_top - b_most), 0.0)
    return b_most, b_share, tl.sum(b_share * b_total, 0)


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_joined_fwd_kernel(
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
    BM: tl.constexpr,  # at least K + IMAGE
    BN: tl.constexpr,
):
    D: tl.constexpr = H * E
    KINDS: tl.constexpr = IMAGE + TEXT + RATIONAL
    pair = tl.program_id(0)  # (image, head)
    o_r = tl.arange(0, BM)
    last = K if TEXT or RATIONAL else 0
    m_class = o_r < last
    m_image = o_r == last
    p_head, p_image, p_rows = _head_offsets(pair, K, H, E)
    layer = B.to(tl.int64) * K * D
    keys = projections + p_rows
    queries = _by_kind(query_text + p_head, keys + 2 * layer, 0, TEXT, RATIONAL, False)
    b_joined = zero_head(BM, E)
    for n in tl.static_range(len(queries)):
        p_query, m_query = _score_rows(queries[n], query_image + p_image, o_r, m_class, m_image, D, IMAGE and n == 0)
        b_query = load_head(p_query, m_query, E)
        b_top, b_total, b_rows = _attend((b_query,), keys, keys + layer, K, factor, D, E, PRECISION, BM, BN)[0]
        if IMAGE and n == 0:  # the same row for every class
            b_weight = tl.where(m_image, 1.0 / (KINDS * b_total), 0.0)
            b_joined = add_heads(b_joined, sum_rows(scale_head(b_rows, b_weight[:, None])))
        if TEXT or RATIONAL:
            b_most, b_share, b_sum = _among_rows(b_top, b_total, m_class)
            b_joined = add_heads(b_joined, scale_head(b_rows, (b_share * (K / (KINDS * b_sum)))[:, None]))
            tl.store(tops + n * B * H + pair, b_most)
            tl.store(totals + n * B * H + pair, b_sum)
    store_head(rows + p_rows + o_r.to(tl.int64) * D, b_joined, o_r < K, E)


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_streaming_fwd_kernel(
    query_image,  # [B, D]
    query_text,  # [K, D]
    projections,  # [LAYERS, B, K, D] keys, values, rational queries
    rows,  # [matrix kinds, B, K, D] each kind's rows, weighted within their tile
    image_row,  # [B, D]
    tops,  # [matrix kinds, B, H, T] each row tile's largest score
    totals,  # [matrix kinds, B, H, T] each row tile's sum of exp2(score - top)
    B,
    K,
    factor,  # log2(e) / (√E τ)
    H: tl.constexpr,
    E: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    APART: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    D: tl.constexpr = H * E
    T = tl.cdiv((K if TEXT or RATIONAL else 0) + IMAGE, BM)
    pair, kind, tile, o_r, m_class, m_image = _row_tile(K, T, BM, TEXT or RATIONAL, APART)
    p_head, p_image, p_rows = _head_offsets(pair, K, H, E)
    layer = B.to(tl.int64) * K * D
    keys = projections + p_rows
    queries = _by_kind(query_text + p_head, keys + 2 * layer, kind, TEXT, RATIONAL, APART)
    b_queries = ()
    for n in tl.static_range(len(queries)):
        p_query, m_query = _score_rows(queries[n], query_image + p_image, o_r, m_class, m_image, D, IMAGE and n == 0)
        b_queries += (load_head(p_query, m_query, E),)
    b_states = _attend(b_queries, keys, keys + layer, K, factor, D, E, PRECISION, BM, BN)
    for n in tl.static_range(len(queries)):
        b_top, b_total, b_rows = b_states[n]
        # A tile's class rows are weighted against each other; the image's row has a softmax of its own.
        b_most, b_share, b_sum = _among_rows(b_top, b_total, m_class)
        b_weight = tl.where(m_class, b_share / b_sum, 1.0 / b_total)
        p_row, m_row = _score_rows(
            rows + (kind + n) * layer + p_rows, image_row + p_image, o_r, m_class, m_image, D, IMAGE and n == 0
        )
        store_head(p_row, scale_head(b_rows, b_weight[:, None]), m_row, E)
        if TEXT or RATIONAL:
            p_tile = ((kind + n) * B * H + pair) * T + tile
            tl.store(tops + p_tile, b_most)
            tl.store(totals + p_tile, b_sum)


@triton.jit
def _joint_backward(b_query, b_key, m_pair, b_grad_weights, top, total, factor, K, PRECISION: tl.constexpr):
    """A_n and dS_n = A_n (dA - δ_n) of one query kind where a block holds all pairs: [BK, BK] each."""
    b_exps = tl.exp2(product_transposed(b_query, b_key, PRECISION) * factor - top)
    b_shares = tl.where(
        m_pair, b_exps * (1.0 / total), 0.0
    )  # exactly 1 where one pair has all the weight, and δ is its dA
    b_delta = tl.sum(tl.sum(b_shares * b_grad_weights, 1), 0)
    b_weights = b_shares * K
    return b_weights, (b_weights * (b_grad_weights - b_delta)).to(b_key[0].dtype)


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
    grad_factor,  # 1 / (√E τ KINDS)
    H: tl.constexpr,
    E: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BK: tl.constexpr,
):
    D: tl.constexpr = H * E
    KINDS: tl.constexpr = IMAGE + TEXT + RATIONAL
    pair = tl.program_id(0)  # (image, head)
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    m_pair = m_k[:, None] & m_k[None, :]
    p_head, p_image, p_rows = _head_offsets(pair, K, H, E)
    p_k = o_k.to(tl.int64) * D
    layer = B.to(tl.int64) * K * D
    keys = projections + p_rows
    grad_keys = grad_projections + p_rows
    queries = _by_kind(query_text + p_head, keys + 2 * layer, 0, TEXT, RATIONAL, False)
    grad_queries = _by_kind(grad_text + p_rows, grad_keys + 2 * layer, 0, TEXT, RATIONAL, False)
    b_key = load_head(keys + p_k, m_k, E)  # [BK, E]
    b_value = load_head(keys + layer + p_k, m_k, E)
    b_grad_rows = load_head(grad_rows + p_rows + p_k, m_k, E)
    b_grad_weights = product_transposed(b_grad_rows, b_value, PRECISION)  # [BK, BK], the same for every query kind
    b_weights = tl.zeros([BK, BK], tl.float32)
    b_grad_key = zero_head(BK, E)
    for n in tl.static_range(TEXT + RATIONAL):
        b_query = load_head(queries[n] + p_k, m_k, E)
        p_joint = n * B * H + pair
        b_part, b_grad_scores = _joint_backward(
            b_query, b_key, m_pair, b_grad_weights, tl.load(tops + p_joint), tl.load(totals + p_joint), factor, K,
            PRECISION,
        )  # fmt: skip
        b_weights += b_part
        b_grad_key = add_product(b_grad_key, tl.trans(b_grad_scores), b_query, PRECISION)
        b_grad_query = add_product(zero_head(BK, E), b_grad_scores, b_key, PRECISION)
        store_head(grad_queries[n] + p_k, scale_head(b_grad_query, grad_factor), m_k, E)
    if IMAGE:
        b_row, b_query_row = _image_weights(query_image + p_image, b_key, m_k, factor, E)
        b_grad_row = tl.sum(b_grad_weights, 0)  # every class row has the image's weights
        b_grad_row = b_row * (b_grad_row - tl.sum(b_row * b_grad_row, 0))  # [BK]
        b_weights += b_row[None, :]
        b_grad_key = add_heads(b_grad_key, scale_head(b_query_row, b_grad_row[:, None]))
        b_grad_query_row = sum_rows(scale_head(b_key, b_grad_row[:, None]))
        o_one = tl.arange(0, 1)
        store_head(grad_image + p_image + o_one, scale_head(b_grad_query_row, grad_factor), o_one == 0, E)
    store_head(grad_keys + p_k, scale_head(b_grad_key, grad_factor), m_k, E)
    b_weights = (b_weights * (1.0 / KINDS)).to(b_grad_rows[0].dtype)
    b_grad_value = add_product(zero_head(BK, E), tl.trans(b_weights), b_grad_rows, PRECISION)
    store_head(grad_keys + layer + p_k, b_grad_value, m_k, E)


@triton.jit
def _image_row(keys, values, b_query, b_upstream, o_k, K, factor, D: tl.constexpr, E: tl.constexpr):
    """A block of classes: keys [BN, E], the image query's scores and the gradients of its weights [BN]."""
    m_k = o_k < K
    p_k = o_k.to(tl.int64) * D
    b_key = load_head(keys + p_k, m_k, E)
    b_scores = tl.where(m_k, along_rows(b_key, b_query) * factor, float("-inf"))
    return b_key, b_scores, along_rows(load_head(values + p_k, m_k, E), b_upstream)


@triton.jit(do_not_specialize=["B", "K", "T"])
def _mask_attention_bwd_joint_kernel(
    query_image,  # [B, D]
    projections,  # [LAYERS, B, K, D]
    rows,  # [matrix kinds, B, K, D]
    tops,  # [matrix kinds, B, H, T]
    totals,  # [matrix kinds, B, H, T]
    grad_rows,  # [B, K, D]
    joint_tops,  # [matrix kinds, B, H] A_n = scale exp2(score - top)
    joint_scales,  # [matrix kinds, B, H]
    deltas,  # [matrix kinds, B, H] written if ROWS
    upstream,  # [B, D] Σ_i grad_rows[i], what the image's row receives
    image_parts,  # [2, B, H, K] the weights of the image's row, the gradients of its scores
    grad_image,  # [B, D]
    B,
    K,
    T,
    factor,  # log2(e) / (√E τ)
    grad_factor,  # 1 / (√E τ KINDS)
    H: tl.constexpr,
    E: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    ROWS: tl.constexpr,  # δ_n = Σ_i grad_rows[i] · O_n[i] / K from the stored rows
    BM: tl.constexpr,  # of the forward pass
    BN: tl.constexpr,
    BT: tl.constexpr,
):
    """What all rows of an (image, head) share, and everything about the image's row: K numbers, not K²."""
    D: tl.constexpr = H * E
    pair = tl.program_id(0)  # (image, head)
    pairs = B * H
    _, p_image, p_rows = _head_offsets(pair, K, H, E)
    layer = B.to(tl.int64) * K * D
    b_joint = ()
    b_sums = ()
    for n in tl.static_range(TEXT + RATIONAL):
        b_top, b_total = joint_normaliser(tops, totals, (n * pairs + pair) * T, T, BT)
        tl.store(joint_tops + n * pairs + pair, b_top)
        tl.store(joint_scales + n * pairs + pair, K / b_total)
        b_joint += ((b_top, b_total),)
        b_sums += (tl.zeros([BN], tl.float32),)
    b_upstream = zero_head(1, E)
    for start in range(0, K, BN):
        o_k = start + tl.arange(0, BN)
        m_k = o_k < K
        p_k = p_rows + o_k.to(tl.int64) * D
        b_grad = load_head(grad_rows + p_k, m_k, E)  # [BN, E]
        b_upstream = add_heads(b_upstream, sum_rows(b_grad))
        if ROWS:
            b_new = ()
            for n in tl.static_range(TEXT + RATIONAL):
                p_tiles = (n * pairs + pair) * T + o_k // BM
                b_share = tl.exp2(tl.load(tops + p_tiles, mask=m_k, other=float("-inf")) - b_joint[n][0])
                b_share *= tl.load(totals + p_tiles, mask=m_k, other=0.0) / b_joint[n][1]
                b_new += (b_sums[n] + b_share * along_rows(load_head(rows + n * layer + p_k, m_k, E), b_grad),)
            b_sums = b_new
    if ROWS:
        for n in tl.static_range(TEXT + RATIONAL):
            tl.store(deltas + n * pairs + pair, tl.sum(b_sums[n], 0))
    if IMAGE:
        o_one = tl.arange(0, 1)
        store_head(upstream + p_image + o_one, b_upstream, o_one == 0, E)
        b_query = load_head(query_image + p_image + o_one, o_one == 0, E)  # [1, E]
        keys = projections + p_rows
        # A softmax of its own again: rounded otherwise, the forward pass's would not cancel where dA - δ does.
        top = float("-inf")
        total = 0.0
        delta = 0.0
        for start in range(0, K, BN):
            o_k = start + tl.arange(0, BN)
            b_key, b_scores, b_grad_row = _image_row(keys, keys + layer, b_query, b_upstream, o_k, K, factor, D, E)
            new = tl.maximum(top, tl.max(b_scores, 0))
            b_exps = tl.exp2(b_scores - new)
            decay = tl.exp2(top - new)
            total = total * decay + tl.sum(b_exps, 0)
            delta = delta * decay + tl.sum(b_exps * b_grad_row, 0)
            top = new
        delta /= total
        b_grad_query = zero_head(1, E)
        for start in range(0, K, BN):
            o_k = start + tl.arange(0, BN)
            b_key, b_scores, b_grad_row = _image_row(keys, keys + layer, b_query, b_upstream, o_k, K, factor, D, E)
            b_row = tl.exp2(b_scores - top) / total
            b_grad_scores = b_row * (b_grad_row - delta)
            p_part = image_parts + pair.to(tl.int64) * K + o_k
            tl.store(p_part, b_row, mask=o_k < K)
            tl.store(p_part + pairs.to(tl.int64) * K, b_grad_scores, mask=o_k < K)
            b_grad_query = add_heads(b_grad_query, sum_rows(scale_head(b_key, b_grad_scores[:, None])))
        store_head(grad_image + p_image + o_one, scale_head(b_grad_query, grad_factor), o_one == 0, E)


@triton.jit
def _weights(b_query, b_key, top, scale, start, o_n, K, factor, BN: tl.constexpr, PRECISION: tl.constexpr):
    """A_n of a block that begins at class `start`: [BM, BN]; zero past the last class."""
    b_scores = product_transposed(b_query, b_key, PRECISION)
    if start + BN > K:  # the last block alone
        b_scores = tl.where((o_n < K)[None, :], b_scores, float("-inf"))
    return tl.exp2(b_scores * factor - top) * scale


@triton.jit
def _weights_upstream(
    keys, values, b_grad_rows, start, K, D: tl.constexpr, E: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr
):
    """The classes from `start` on [BN], their keys [BN, E], and dA of some rows with them, of all kinds: [BM, BN]."""
    o_n = start + tl.arange(0, BN)
    p_n = o_n.to(tl.int64) * D
    b_key = load_head(keys + p_n, o_n < K, E)
    b_value = load_head(values + p_n, o_n < K, E)
    return o_n, b_key, product_transposed(b_grad_rows, b_value, PRECISION)


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_bwd_delta_kernel(
    query_text,  # [K, D]
    projections,  # [LAYERS, B, K, D]
    joint_tops,  # [matrix kinds, B, H]
    joint_scales,  # [matrix kinds, B, H]
    grad_rows,  # [B, K, D]
    parts,  # [matrix kinds, B, H, T] each row tile's part of δ
    B,
    K,
    factor,  # log2(e) / (√E τ)
    H: tl.constexpr,
    E: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    APART: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """δ_n from the very A_n and dA that the gradients are made of: exact where one pair has all the weight."""
    D: tl.constexpr = H * E
    T = tl.cdiv(K, BM)
    pair, kind, tile, o_r, m_r, _ = _row_tile(K, T, BM, True, APART)
    p_head, _, p_rows = _head_offsets(pair, K, H, E)
    p_r = o_r.to(tl.int64) * D
    layer = B.to(tl.int64) * K * D
    keys = projections + p_rows
    queries = _by_kind(query_text + p_head, keys + 2 * layer, kind, TEXT, RATIONAL, APART)
    b_grad_rows = load_head(grad_rows + p_rows + p_r, m_r, E)  # [BM, E]
    b_kinds = ()
    b_deltas = ()
    for n in tl.static_range(len(queries)):
        p_kind = (kind + n) * B * H + pair
        # (K / total) / K is 1 where the total is.
        b_kinds += (
            (load_head(queries[n] + p_r, m_r, E), tl.load(joint_tops + p_kind), tl.load(joint_scales + p_kind) / K),
        )
        b_deltas += (tl.zeros([BM], tl.float32),)
    for start in range(0, K, BN):
        o_n, b_key, b_grad_weights = _weights_upstream(keys, keys + layer, b_grad_rows, start, K, D, E, BN, PRECISION)
        b_new = ()
        for n in tl.static_range(len(queries)):
            b_query, top, scale = b_kinds[n]
            b_weights = _weights(b_query, b_key, top, scale, start, o_n, K, factor, BN, PRECISION)
            b_new += (b_deltas[n] + tl.sum(b_weights * b_grad_weights, 1),)
        b_deltas = b_new
    for n in tl.static_range(len(queries)):
        tl.store(parts + ((kind + n) * B * H + pair) * T + tile, tl.sum(tl.where(m_r, b_deltas[n], 0.0), 0))


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_bwd_queries_kernel(
    query_text,  # [K, D]
    projections,  # [LAYERS, B, K, D]
    joint_tops,  # [matrix kinds, B, H]
    joint_scales,  # [matrix kinds, B, H]
    deltas,  # [matrix kinds, B, H]
    grad_rows,  # [B, K, D]
    grad_projections,  # [LAYERS, B, K, D] the rational queries' part is written
    grad_text,  # [B, K, D] each image's part
    B,
    K,
    factor,  # log2(e) / (√E τ)
    grad_factor,  # 1 / (√E τ KINDS)
    H: tl.constexpr,
    E: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    APART: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    D: tl.constexpr = H * E
    pair, kind, _, o_r, m_r, _ = _row_tile(K, tl.cdiv(K, BM), BM, True, APART)
    p_head, _, p_rows = _head_offsets(pair, K, H, E)
    p_r = o_r.to(tl.int64) * D
    layer = B.to(tl.int64) * K * D
    keys = projections + p_rows
    queries = _by_kind(query_text + p_head, keys + 2 * layer, kind, TEXT, RATIONAL, APART)
    grad_queries = _by_kind(grad_text + p_rows, grad_projections + 2 * layer + p_rows, kind, TEXT, RATIONAL, APART)
    b_grad_rows = load_head(grad_rows + p_rows + p_r, m_r, E)  # [BM, E]
    b_kinds = ()
    b_grads = ()
    for n in tl.static_range(len(queries)):
        p_kind = (kind + n) * B * H + pair
        b_query = load_head(queries[n] + p_r, m_r, E)
        b_kinds += ((b_query, tl.load(joint_tops + p_kind), tl.load(joint_scales + p_kind), tl.load(deltas + p_kind)),)
        b_grads += (zero_head(BM, E),)
    for start in range(0, K, BN):
        o_n, b_key, b_grad_weights = _weights_upstream(keys, keys + layer, b_grad_rows, start, K, D, E, BN, PRECISION)
        b_new = ()
        for n in tl.static_range(len(queries)):
            b_query, top, scale, delta = b_kinds[n]
            b_weights = _weights(b_query, b_key, top, scale, start, o_n, K, factor, BN, PRECISION)
            b_grad_scores = (b_weights * (b_grad_weights - delta)).to(b_key[0].dtype)
            b_new += (add_product(b_grads[n], b_grad_scores, b_key, PRECISION),)
        b_grads = b_new
    for n in tl.static_range(len(queries)):
        store_head(grad_queries[n] + p_r, scale_head(b_grads[n], grad_factor), m_r, E)


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_bwd_keys_kernel(
    query_image,  # [B, D]
    query_text,  # [K, D]
    projections,  # [LAYERS, B, K, D]
    joint_tops,  # [matrix kinds, B, H]
    joint_scales,  # [matrix kinds, B, H]
    deltas,  # [matrix kinds, B, H]
    upstream,  # [B, D]
    image_parts,  # [2, B, H, K]
    grad_rows,  # [B, K, D]
    grad_projections,  # [LAYERS, B, K, D] the keys' and the values' parts are written
    B,
    K,
    factor,  # log2(e) / (√E τ)
    grad_factor,  # 1 / (√E τ KINDS)
    H: tl.constexpr,
    E: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    KEYS: tl.constexpr,  # which gradients are computed
    VALUES: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Scores are transposed here: what is rounded for the next product lies as that product takes its left operand."""
    D: tl.constexpr = H * E
    KINDS: tl.constexpr = IMAGE + TEXT + RATIONAL
    tiles = tl.cdiv(K, BN)
    pid = tl.program_id(0)
    pair = pid // tiles  # (image, head)
    p_head, p_image, p_rows = _head_offsets(pair, K, H, E)
    layer = B.to(tl.int64) * K * D
    keys = projections + p_rows
    queries = _by_kind(query_text + p_head, keys + 2 * layer, 0, TEXT, RATIONAL, False)
    o_n = pid % tiles * BN + tl.arange(0, BN)
    m_n = o_n < K
    p_n = o_n.to(tl.int64) * D
    b_key = load_head(keys + p_n, m_n, E)  # [BN, E]
    if KEYS:
        b_value = load_head(keys + layer + p_n, m_n, E)
    b_grad_key = zero_head(BN, E)
    b_grad_value = zero_head(BN, E)
    if IMAGE:
        o_one = tl.arange(0, 1)
        p_part = image_parts + pair.to(tl.int64) * K + o_n
        if KEYS:
            b_part = tl.load(p_part + B.to(tl.int64) * H * K, mask=m_n, other=0.0)
            b_grad_key = scale_head(load_head(query_image + p_image + o_one, o_one == 0, E), b_part[:, None])
        if VALUES:
            b_part = tl.load(p_part, mask=m_n, other=0.0) * (1.0 / KINDS)
            b_grad_value = scale_head(load_head(upstream + p_image + o_one, o_one == 0, E), b_part[:, None])
    for start in range(0, K if TEXT or RATIONAL else 0, BM):
        o_r = start + tl.arange(0, BM)
        p_r = o_r.to(tl.int64) * D
        b_grad_rows = load_head(grad_rows + p_rows + p_r, o_r < K, E)  # [BM, E]
        if KEYS:
            b_grad_weights = product_transposed(b_value, b_grad_rows, PRECISION)  # [BN, BM]
        b_weights = tl.zeros([BN, BM], tl.float32)
        for n in tl.static_range(TEXT + RATIONAL):
            p_kind = n * B * H + pair
            b_query = load_head(queries[n] + p_r, o_r < K, E)
            b_kind = _weights(
                b_key, b_query, tl.load(joint_tops + p_kind), tl.load(joint_scales + p_kind),
                start, o_r, K, factor, BM, PRECISION,
            )  # fmt: skip
            b_weights += b_kind
            if KEYS:
                b_grad_scores = (b_kind * (b_grad_weights - tl.load(deltas + p_kind))).to(b_key[0].dtype)
                b_grad_key = add_product(b_grad_key, b_grad_scores, b_query, PRECISION)
        if VALUES:
            b_weights = (b_weights * (1.0 / KINDS)).to(b_grad_rows[0].dtype)
            b_grad_value = add_product(b_grad_value, b_weights, b_grad_rows, PRECISION)
    grad_keys = grad_projections + p_rows + p_n
    if KEYS:
        store_head(grad_keys, scale_head(b_grad_key, grad_factor), m_n, E)
    if VALUES:
        store_head(grad_keys + layer, b_grad_value, m_n, E)


class AttendedRows(NamedTuple):
    """What the attention leaves to the next steps."""

    rows: Tensor  # joined: attended rows [1, B, K, D]; streaming: each kind's, weighted in its row tile [n, B, K, D]
    image_row: Tensor  # streaming: the image query's attended row [B, D]
    tops: Tensor  # [n, B, H, T] largest score of each row tile, n matrix query kinds; joined: T = 1
    totals: Tensor  # [n, B, H, T] sum of exp2(score - largest)

    @property
    def joined(self) -> bool:
        """Whether `rows` are the attended rows already: of the direct and of the joined form."""
        return not len(self.image_row)


def empty_attended_rows(image: Tensor, classes: int, options: Options) -> AttendedRows:
    """Uninitialised tensors for a call's attended rows, from shapes alone."""
    batch, width = image.shape
    heads = options.num_heads
    joined = attention_form(device_of(image), image.dtype, classes, width // heads) != "streaming"
    kinds = len(options.queries) - ("image" in options.queries)
    tiles = 1 if joined else row_tiles(image, classes, options)

    def float32(*shape: int) -> Tensor:
        return image.new_empty(shape, dtype=torch.float32)

    return AttendedRows(
        rows=image.new_empty(1 if joined else kinds, batch, classes, width),
        image_row=image.new_empty(0 if joined else batch, width),
        tops=float32(kinds, batch, heads, tiles),
        totals=float32(kinds, batch, heads, tiles),
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
    """Joint-softmax attention of every (image, head)."""
    _, batch, classes, width = projections.shape
    heads = options.num_heads
    sizes = device_of(projections), projections.dtype, classes, width // heads
    common = _common(query_image, query_text, projections, options)
    joined = {name: getattr(attended, name) for name in ("rows", "tops", "totals")}
    form = attention_form(*sizes)
    if form == "direct":
        config = direct_config(*sizes)
        _mask_attention_direct_fwd_kernel[(batch * heads,)](**joined, BK=config.BM, **common, **config.launch)
    elif form == "joined":
        config = joined_config(*sizes)
        _mask_attention_joined_fwd_kernel[(batch * heads,)](
            **joined, BM=config.BM, BN=config.BN, **common, **config.launch
        )
    else:
        config = attention_config(*sizes)
        apart = config.apart and len(attended.tops) == 2
        _mask_attention_streaming_fwd_kernel[(batch * heads * (1 + apart) * attended.tops.shape[-1],)](
            **attended._asdict(), APART=apart, BM=config.BM, BN=config.BN, **common, **config.launch
        )


def _common(query_image: Tensor, query_text: Tensor, projections: Tensor, options: Options) -> dict:
    """What every attention kernel that computes scores is launched with."""
    _, batch, classes, width = projections.shape
    head_width = width // options.num_heads
    return {
        "query_image": query_image, "query_text": query_text, "projections": projections, "B": batch, "K": classes,
        "factor": options.score_factor(width) * math.log2(math.e), "H": options.num_heads, "E": head_width,
        **kind_flags(options), "PRECISION": product_precision(projections.dtype, device_of(projections)),
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
    backward = {"grad_rows": grad_rows, "grad_factor": options.score_factor(width) / len(options.queries)}
    if classes <= direct_bwd_classes(device, projections.dtype, head_width):
        config = direct_bwd_config(device, projections.dtype, classes, head_width)
        _mask_attention_direct_bwd_kernel[(batch * heads,)](
            tops=attended.tops, totals=attended.totals, BK=config.BM, **gradients, **backward, **common, **config.launch
        )
        return gradients["grad_projections"], gradients["grad_text"], gradients["grad_image"]
    joint_tops, joint_scales, deltas = (attended.tops.new_empty(attended.tops.shape[:-1]) for _ in range(3))
    upstream = torch.empty_like(gradients["grad_image"])
    image_parts = upstream.new_empty(2, len(upstream), heads, classes)
    tiles = attended.tops.shape[-1]
    # Joined rows don't say what each query kind has of them. In float32, rounding of the rows would show where
    # A (dA - δ) cancels; 16-bit gradients are coarser than that.
    exact = attended.joined or projections.dtype == torch.float32
    config = joint_config(device, projections.dtype, head_width, attended.joined)
    _mask_attention_bwd_joint_kernel[(batch * heads,)](
        query_image=query_image, projections=projections, rows=attended.rows, tops=attended.tops,
        totals=attended.totals, joint_tops=joint_tops,
        joint_scales=joint_scales, deltas=deltas, upstream=upstream, image_parts=image_parts,
        grad_image=gradients["grad_image"], B=batch, K=classes, T=tiles, factor=common["factor"], H=heads,
        E=head_width, **kind_flags(options), ROWS=not exact,
        BM=attention_config(device, projections.dtype, classes, head_width).BM, BN=config.BN, BT=tile_block(tiles),
        **backward, **config.launch,
    )  # fmt: skip
    image = {name: common.pop(name) for name in ("query_image", "IMAGE")}
    common |= {"joint_tops": joint_tops, "joint_scales": joint_scales, "grad_rows": grad_rows}
    kinds = len(deltas)
    if kinds and exact:
        config = delta_config(device, projections.dtype, head_width)
        parts = deltas.new_empty(*deltas.shape, triton.cdiv(classes, config.BM))
        apart = config.apart and kinds == 2
        _mask_attention_bwd_delta_kernel[(parts[0].numel() * (1 + apart),)](
            parts=parts, APART=apart, BM=config.BM, BN=config.BN, **common, **config.launch
        )
        deltas = parts.sum(-1) if parts.shape[-1] > 1 else parts.squeeze(-1)
    common |= backward | {"deltas": deltas, "grad_projections": gradients["grad_projections"]}
    if kinds:
        config = queries_bwd_config(device, projections.dtype, head_width)
        apart = config.apart and kinds == 2
        _mask_attention_bwd_queries_kernel[(batch * heads * (1 + apart) * triton.cdiv(classes, config.BM),)](
            grad_text=gradients["grad_text"], APART=apart, BM=config.BM, BN=config.BN, **common, **config.launch
        )
    config = keys_bwd_config(device, projections.dtype, head_width)
    for keys, values in ((True, False), (False, True)) if config.apart else ((True, True),):
        _mask_attention_bwd_keys_kernel[(batch * heads * triton.cdiv(classes, config.BN),)](
            upstream=upstream, image_parts=image_parts, KEYS=keys, VALUES=values, BM=config.BM, BN=config.BN,
            **common, **image, **config.launch,
        )  # fmt: skip
    return gradients["grad_projections"], gradients["grad_text"], gradients["grad_image"]


def kind_flags(options: Options) -> dict[str, bool]:
    """The query kinds in use, as the kernels take them."""
    return {name.upper(): name in options.queries for name in QUERIES}
