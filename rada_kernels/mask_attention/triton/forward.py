"""Forward: text and rational scores side by side on the same blocks of keys and values.

    Projections  →  Attended (state.py)

Two forms. *Direct*: one program holds all scores of an (image, head), the joint softmax is finished in registers and
one value product serves all query kinds. *Streaming*, for any K: a program has BM score rows of every matrix query
kind and goes over the classes with a running softmax per row; a tile's rows are weighted against each other, and what
the tiles weigh against each other is left to the next step as (m, l). The image query is one more score row, after the
K class rows. No score leaves the registers.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.mask_attention.config import forward_config
from rada_kernels.mask_attention.triton.state import Attended
from rada_kernels.options import Options
from rada_kernels.rational_projection.triton.state import Projections
from rada_kernels.triton_common.config import AttentionConfig
from rada_kernels.triton_common.dialect import (
    Shapes,
    add_dot,
    dot_rows,
    dot_transposed,
    load_head,
    scale_head,
    store_head,
    zero_head,
)
from rada_kernels.triton_common.target import Target, target_of


@triton.jit
def of_kinds(text, rational, S: tl.constexpr):
    """The pointers of the matrix query kinds in use; the text's, for the image row alone, where there is none."""
    if S.TEXT and S.RATIONAL:
        return text, rational
    elif S.RATIONAL:
        return (rational,)
    else:
        return (text,)


@triton.jit
def unit_offsets(unit, B, K, S: tl.constexpr):
    """Where an (image, head) begins in a row of D, in [B, D], in [B, K, D]; the size of one [B, K, D]."""
    o_head = unit % S.H * S.E
    b = (unit // S.H).to(tl.int64)
    return o_head, b * S.D + o_head, b * K * S.D + o_head, B.to(tl.int64) * K * S.D


@triton.jit
def image_weights(p_query, b_k, m_n, factor, E: tl.constexpr):
    """The one row of A_image, [BN], and the image query, [1, E]."""
    o_one = tl.arange(0, 1)
    b_q = load_head(p_query + o_one, o_one == 0, E)
    b_s = tl.where(m_n, dot_rows(b_k, b_q) * factor, float("-inf"))
    b_p = tl.exp2(b_s - tl.max(b_s, 0))
    return b_p / tl.sum(b_p, 0), b_q


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_direct_fwd_kernel(
    projected,  # Projections
    out,  # Attended: rows, m, l; T = 1
    B,
    K,
    factor,  # log2(e) / (√E τ)
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
    queries = of_kinds(projected.query_text + o_head, keys + 2 * plane, S)
    MATRIX: tl.constexpr = S.MATRIX
    b_k = load_head(keys + o_d, m_k, S.E)  # [BN, E]
    b_p = tl.zeros([C.BN, C.BN], tl.float32)
    for n in tl.static_range(MATRIX):
        b_q = load_head(queries[n] + o_d, m_k, S.E)
        b_s = tl.where(m_pair, dot_transposed(b_q, b_k, S.PRECISION), float("-inf"))
        b_m = tl.max(tl.max(b_s, 1), 0) * factor
        b_e = tl.exp2(b_s * factor - b_m)
        b_l = tl.sum(tl.sum(b_e, 1), 0)
        b_p += b_e * (K / b_l)
        tl.store(out.m + n * B * S.H + unit, b_m)
        tl.store(out.l + n * B * S.H + unit, b_l)
    if S.IMAGE:
        b_row, _ = image_weights(projected.query_image + o_image, b_k, m_k, factor, S.E)
        b_p += b_row[None, :]
    b_v = load_head(keys + plane + o_d, m_k, S.E)
    b_p = (b_p * (1.0 / S.KINDS)).to(b_v[0].dtype)
    store_head(out.rows + o_rows + o_d, add_dot(zero_head(C.BN, S.E), b_p, b_v, S.PRECISION), m_k, S.E)


@triton.jit
def _score_rows(rows, image, o_r, m_class, m_image, n: tl.constexpr, S: tl.constexpr):
    """Where score rows [BM] begin, and which there are. The image's row goes with the first kind."""
    p_rows = rows + o_r.to(tl.int64) * S.D
    if S.IMAGE and n == 0:
        return tl.where(m_image, image, p_rows), m_class | m_image
    else:
        return p_rows, m_class


@triton.jit
def _online_softmax(b_s, b_state, b_v, factor, PRECISION: tl.constexpr):
    """One block of classes more: scores [BM, BN] before the factor; state: m [BM], l [BM], acc [BM, E]."""
    b_m, b_l, b_acc = b_state
    b_new = tl.maximum(b_m, tl.max(b_s, 1) * factor)
    b_p = tl.exp2(b_s * factor - b_new[:, None])
    b_decay = tl.exp2(b_m - b_new)
    b_l = b_l * b_decay + tl.sum(b_p, 1)
    b_acc = scale_head(b_acc, b_decay[:, None])
    return b_new, b_l, add_dot(b_acc, b_p.to(b_v[0].dtype), b_v, PRECISION)


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_streaming_fwd_kernel(
    projected,  # Projections
    out,  # Attended
    B,
    K,
    factor,  # log2(e) / (√E τ)
    S: tl.constexpr,
    C: tl.constexpr,  # AttentionConfig
):
    last = K if S.MATRIX else 0  # score row of the image query
    T = tl.cdiv(last + S.IMAGE, C.BM)
    tile = tl.program_id(0) % T  # neighbours read the same keys and values
    unit = tl.program_id(0) // T  # (image, head)
    o_head, o_image, o_rows, plane = unit_offsets(unit, B, K, S)
    o_r = tile * C.BM + tl.arange(0, C.BM)
    m_class = o_r < last
    m_image = o_r == last
    keys = projected.projections + o_rows
    queries = of_kinds(projected.query_text + o_head, keys + 2 * plane, S)
    b_qs = ()
    b_states = ()
    for n in tl.static_range(len(queries)):
        p_q, m_q = _score_rows(queries[n], projected.query_image + o_image, o_r, m_class, m_image, n, S)
        b_qs += (load_head(p_q, m_q, S.E),)
        b_states += ((tl.full([C.BM], float("-inf"), tl.float32), tl.zeros([C.BM], tl.float32), zero_head(C.BM, S.E)),)
    for start in range(0, K, C.BN):
        o_n = start + tl.arange(0, C.BN)
        o_d = o_n.to(tl.int64) * S.D
        b_k = load_head(keys + o_d, o_n < K, S.E)  # [BN, E]
        b_v = load_head(keys + plane + o_d, o_n < K, S.E)
        b_new = ()
        for n in tl.static_range(len(queries)):
            b_s = dot_transposed(b_qs[n], b_k, S.PRECISION)
            if start + C.BN > K:  # the last block alone
                b_s = tl.where((o_n < K)[None, :], b_s, float("-inf"))
            b_new += (_online_softmax(b_s, b_states[n], b_v, factor, S.PRECISION),)
        b_states = b_new
    for n in tl.static_range(len(queries)):
        b_m, b_l, b_acc = b_states[n]
        # Class rows are weighted against the tile's others; the image's row has a softmax of its own.
        b_top = tl.max(tl.where(m_class, b_m, float("-inf")), 0)
        b_share = tl.where(m_class, tl.exp2(b_m - b_top), 0.0)
        b_sum = tl.sum(b_share * b_l, 0)
        b_weight = tl.where(m_class, b_share / b_sum, 1.0 / b_l)
        p_row, m_row = _score_rows(out.rows + n * plane + o_rows, out.image_row + o_image, o_r, m_class, m_image, n, S)
        store_head(p_row, scale_head(b_acc, b_weight[:, None]), m_row, S.E)
        if S.TEXT or S.RATIONAL:
            tl.store(out.m + (n * B * S.H + unit) * T + tile, b_top)
            tl.store(out.l + (n * B * S.H + unit) * T + tile, b_sum)


def mask_attention_fwd(
    projected: Projections,
    options: Options,
    *,
    config: AttentionConfig | None = None,
    target: Target | None = None,
) -> Attended:
    """Joint-softmax attention of every (image, head). A config's BM is the row tile of the result."""
    keys = projected.projections[0]
    batch, classes, width = keys.shape
    target = target or target_of(keys)
    direct, default = forward_config(target, keys.dtype, classes, width // options.num_heads)
    config = config or default
    out = Attended.empty(keys[:, 0], classes, options, direct, config.BM)
    units = batch * options.num_heads
    if direct:
        kernel, grid, keep = _mask_attention_direct_fwd_kernel, (units,), ("BM", "BN")
    else:
        kernel, grid, keep = _mask_attention_streaming_fwd_kernel, (units * out.m.shape[-1],), ("BM",)
    target.launch(
        kernel, config, lambda c: (grid, {}), keep=keep,
        projected=projected, out=out.pointers, **launch_arguments(keys, options, target),
    )  # fmt: skip
    return out


def launch_arguments(keys: Tensor, options: Options, target: Target) -> dict:
    """What every attention kernel is launched with, of keys [B, K, D]."""
    batch, classes, width = keys.shape
    factor = options.score_factor(width) * math.log2(math.e)
    return {"B": batch, "K": classes, "factor": factor, "S": Shapes.of(options, width, keys.dtype, target.device)}
