"""The direct form of the backward pass: a program has all pairs of classes of an (image, head) in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from rada_kernels.mask_attention.triton.forward import image_weights, of_kinds, unit_offsets
from rada_kernels.triton_common.dialect import (
    add_dot,
    add_heads,
    dot_transposed,
    load_head,
    scale_head,
    store_head,
    sum_rows,
    zero_head,
)


@triton.jit(do_not_specialize=["B", "K"])
def mask_attention_direct_bwd_kernel(
    dO,  # [B, K, D]
    projected,  # Projections
    attended,  # Attended: m, l; T = 1
    grads,  # AttentionGrads
    B,
    K,
    factor,  # log2(e) / (√E τ)
    grad_factor,  # 1 / (√E τ KINDS)
    S: tl.constexpr,
    C: tl.constexpr,  # AttentionConfig with BM = BN, at least K
):
    unit = tl.program_id(0)  # (image, head)
    o_head, o_image, o_rows, plane = unit_offsets(unit, B, K, S)
    o_k = tl.arange(0, C.BN)
    m_k = o_k < K
    m_pair = m_k[:, None] & m_k[None, :]
    o_d = o_k.to(tl.int64) * S.D
    keys = projected.projections + o_rows
    grad_keys = grads.projections + o_rows
    queries = of_kinds(projected.query_text + o_head, keys + 2 * plane, S)
    grad_queries = of_kinds(grads.query_text + o_rows, grad_keys + 2 * plane, S)
    MATRIX: tl.constexpr = S.MATRIX
    b_k = load_head(keys + o_d, m_k, S.E)  # [BN, E]
    b_v = load_head(keys + plane + o_d, m_k, S.E)
    b_dO = load_head(dO + o_rows + o_d, m_k, S.E)
    b_dP = dot_transposed(b_dO, b_v, S.PRECISION)  # [BN, BN]
    b_p = tl.zeros([C.BN, C.BN], tl.float32)
    b_dk = zero_head(C.BN, S.E)
    for n in tl.static_range(MATRIX):
        b_q = load_head(queries[n] + o_d, m_k, S.E)
        b_e = tl.exp2(dot_transposed(b_q, b_k, S.PRECISION) * factor - tl.load(attended.m + n * B * S.H + unit))
        # Exactly 1 where one pair of classes has all the weight, and delta is its dP.
        b_share = tl.where(m_pair, b_e * (1.0 / tl.load(attended.l + n * B * S.H + unit)), 0.0)
        b_delta = tl.sum(tl.sum(b_share * b_dP, 1), 0)
        b_p += b_share * K
        b_dS = (b_share * K * (b_dP - b_delta)).to(b_k[0].dtype)
        b_dk = add_dot(b_dk, tl.trans(b_dS), b_q, S.PRECISION)
        b_dq = add_dot(zero_head(C.BN, S.E), b_dS, b_k, S.PRECISION)
        store_head(grad_queries[n] + o_d, scale_head(b_dq, grad_factor), m_k, S.E)
    if S.IMAGE:
        b_row, b_q_row = image_weights(projected.query_image + o_image, b_k, m_k, factor, S.E)
        b_dP_row = tl.sum(b_dP, 0)  # every class row has the image's weights
        b_dS_row = b_row * (b_dP_row - tl.sum(b_row * b_dP_row, 0))  # [BN]
        b_p += b_row[None, :]
        b_dk = add_heads(b_dk, scale_head(b_q_row, b_dS_row[:, None]))
        b_dq_row = sum_rows(scale_head(b_k, b_dS_row[:, None]))
        o_one = tl.arange(0, 1)
        store_head(grads.query_image + o_image + o_one, scale_head(b_dq_row, grad_factor), o_one == 0, S.E)
    store_head(grad_keys + o_d, scale_head(b_dk, grad_factor), m_k, S.E)
    b_p = (b_p * (1.0 / S.KINDS)).to(b_dO[0].dtype)
    b_dv = add_dot(zero_head(C.BN, S.E), tl.trans(b_p), b_dO, S.PRECISION)
    store_head(grad_keys + plane + o_d, b_dv, m_k, S.E)
