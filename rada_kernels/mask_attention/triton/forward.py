"""Forward: text and rational scores side by side on the same blocks of keys and values.

    Projections  →  Attended

A program has BM score rows of every matrix query kind and goes over the classes with a running softmax per row, or, of
many classes in bfloat16, with sums of exp2(score); a second launch takes again what leaves float32's range so. A
tile's rows are weighted against each other, and what the tiles weigh against each other is left to the next step as
(m, l). The image query is one more score row, after the K class rows. No score leaves the registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.mask_attention.config import against_zero, by_descriptors, forward_config, forward_registers
from rada_kernels.triton_common.blocks import head_blocks
from rada_kernels.triton_common.call import Call
from rada_kernels.triton_common.config import AttentionConfig
from rada_kernels.triton_common.dialect import (
    add_dot,
    dot_transposed,
    load_classes,
    load_head,
    scale_head,
    store_head,
    zero_head,
)
from rada_kernels.triton_common.state import Attended, Projections


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
def in_base_2(b_products, factor, DTYPE: tl.constexpr):
    """Scores from products of queries and keys of that dtype: 16-bit queries bear the factor."""
    if tl.float32 == DTYPE:
        return b_products * factor
    else:
        return b_products


@triton.jit
def _online_softmax(b_s, b_state, b_v, factor, S: tl.constexpr):
    """One block of classes more: products of queries and keys [BM, BN]; state: m [BM], l [BM], acc [BM, E]."""
    b_m, b_l, b_acc = b_state
    b_new = tl.maximum(b_m, in_base_2(tl.max(b_s, 1), factor, b_v[0].dtype))
    b_p = tl.exp2(in_base_2(b_s, factor, b_v[0].dtype) - b_new[:, None])
    b_decay = tl.exp2(b_m - b_new)
    b_l = b_l * b_decay + tl.sum(b_p, 1)
    b_acc = scale_head(b_acc, b_decay[:, None])
    return b_new, b_l, add_dot(b_acc, b_p.to(b_v[0].dtype), b_v, S)


@triton.jit
def _softmax_to_zero(b_s, b_state, b_v, S: tl.constexpr):
    """The same with m = 0, whatever the scores are."""
    b_m, b_l, b_acc = b_state
    b_p = tl.exp2(b_s)
    return b_m, b_l + tl.sum(b_p, 1), add_dot(b_acc, b_p.to(b_v[0].dtype), b_v, S)


@triton.jit
def _in_range(b_l, pairs):
    """Whether a sum of exp2(score) over so many pairs is far from overflow, and large beside the ones of padding."""
    return (b_l >= pairs * 2.0**-8) & (b_l <= 2.0**64)


@triton.jit
def _attend(
    projected, blocks, out, unit, tile, B, K, factor, S: tl.constexpr, C: tl.constexpr, ZERO: tl.constexpr
):  # fmt: skip
    """One row tile of an (image, head), all matrix query kinds. ZERO: against m = 0, or m = inf where that fails."""
    last = K if S.MATRIX else 0  # score row of the image query
    T = tl.cdiv(last + S.IMAGE, C.BM)
    o_head, o_image, o_rows, plane = unit_offsets(unit, B, K, S)
    o_r = tile * C.BM + tl.arange(0, C.BM)
    m_class = o_r < last
    o_rd = o_r.to(tl.int64) * S.D
    m_image = o_r == last
    keys = projected.projections + o_rows
    queries = of_kinds(projected.query_text + o_head, keys + 2 * plane, S)
    b_qs = ()
    b_states = ()
    for n in tl.static_range(len(queries)):
        p_q = queries[n] + o_rd
        m_q = m_class
        if S.IMAGE and n == 0:  # the image's row goes with the first kind
            p_q = tl.where(m_image, projected.query_image + o_image, p_q)
            if S.E * p_q.dtype.scalar.element_ty.primitive_bitwidth % 128 == 0:  # a choice of pointers forgets it
                p_q = tl.multiple_of(p_q, 16)
            m_q = m_class | m_image
        b_qs += (load_head(p_q, m_q, S.E),)
        b_m = tl.full([C.BM], 0.0 if ZERO else float("-inf"), tl.float32)
        b_states += ((b_m, tl.full([C.BM], 0.0, tl.float32), zero_head(C.BM, S.E)),)
    for start in range(0, K, C.BN):
        b_k = load_classes(blocks, keys, unit // S.H, start, K, unit % S.H, S, C.BN)  # [BN, E]
        b_v = load_classes(blocks, keys + plane, B + unit // S.H, start, K, unit % S.H, S, C.BN)
        b_new = ()
        for n in tl.static_range(len(queries)):
            b_s = dot_transposed(b_qs[n], b_k, S)
            if ZERO:
                b_new += (_softmax_to_zero(b_s, b_states[n], b_v, S),)
            else:
                if start + C.BN > K:  # the last block alone
                    b_s = tl.where((start + tl.arange(0, C.BN) < K)[None, :], b_s, float("-inf"))
                b_new += (_online_softmax(b_s, b_states[n], b_v, factor, S),)
        b_states = b_new
    for n in tl.static_range(len(queries)):
        b_m, b_l, b_acc = b_states[n]
        # Class rows are weighted against the tile's others; the image's row has a softmax of its own.
        if ZERO:
            b_l -= tl.cdiv(K, C.BN) * C.BN - K  # keys past the last are zero, and so are their scores
            b_sum = tl.sum(tl.where(m_class, b_l, 0.0), 0)
            fits = _in_range(b_sum, K * tl.sum(m_class.to(tl.float32), 0))
            if S.IMAGE and n == 0:
                fits &= (tile < last // C.BM) | _in_range(tl.sum(tl.where(m_image, b_l, 0.0), 0), K)
            b_top = tl.where(fits, tl.where(tile * C.BM < K, 0.0, float("-inf")), float("inf"))
            b_weight = 1.0 / tl.where(m_class, b_sum, b_l)
        else:
            b_top = tl.max(tl.where(m_class, b_m, float("-inf")), 0)
            b_share = tl.where(m_class, tl.exp2(b_m - b_top), 0.0)
            b_sum = tl.sum(b_share * b_l, 0)
            b_weight = tl.where(m_class, b_share / b_sum, 1.0 / b_l)
        b_rows = scale_head(b_acc, b_weight[:, None])
        store_head(out.rows + n * plane + o_rows + o_rd, b_rows, m_class, S.E)
        if S.IMAGE and n == 0 and tile == last // C.BM:
            store_head(out.image_row + o_image + o_r * 0, b_rows, m_image, S.E)
        if S.TEXT or S.RATIONAL:
            tl.store(out.m + (n * B * S.H + unit) * T + tile, b_top)
            tl.store(out.l + (n * B * S.H + unit) * T + tile, b_sum)


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_fwd_kernel(
    projected,  # Projections
    blocks,  # head_blocks of the projections [LAYERS B, K, D], or none
    out,  # Attended
    B,
    K,
    factor,  # of products of a query and a key
    S: tl.constexpr,
    C: tl.constexpr,  # AttentionConfig
    ZERO: tl.constexpr,
):
    T = tl.cdiv((K if S.MATRIX else 0) + S.IMAGE, C.BM)
    # Neighbours read the same keys and values.
    _attend(projected, blocks, out, tl.program_id(0) // T, tl.program_id(0) % T, B, K, factor, S, C, ZERO)


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_fwd_again_kernel(
    projected,  # Projections
    blocks,  # head_blocks of the projections [LAYERS B, K, D], or none
    out,  # Attended
    B,
    K,
    factor,  # of products of a query and a key
    S: tl.constexpr,
    C: tl.constexpr,  # AttentionConfig
):
    """An (image, head) of which some row tile has m = inf, once more with a running maximum."""
    MATRIX: tl.constexpr = S.MATRIX
    T = tl.cdiv(K + S.IMAGE, C.BM)
    unit = tl.program_id(0)
    b_failed = tl.full([64], 0, tl.int32)
    for n in tl.static_range(MATRIX):
        for start in range(0, T, 64):
            o_t = start + tl.arange(0, 64)
            b_m = tl.load(out.m + (n * B * S.H + unit) * T + o_t, mask=o_t < T, other=0.0)
            b_failed |= (b_m == float("inf")).to(tl.int32)
    if tl.max(b_failed, 0) > 0:
        for tile in range(T):
            _attend(projected, blocks, out, unit, tile, B, K, factor, S, C, False)


def mask_attention_fwd(call: Call, projected: Projections, *, config: AttentionConfig | None = None) -> Attended:
    """Joint-softmax attention of every (image, head). A config's BM is the row tile of the result."""
    batch, classes, _ = call.sizes
    config = config or call.config(forward_config, classes)
    zero = call.config(against_zero, classes)
    described = zero and call.config(by_descriptors, classes)  # beside a running maximum they leave 8 bytes of spill
    out = Attended.empty(call.image, classes, call.options, config.BM)
    units, tiles = batch * call.shapes.H, out.m.shape[-1]

    def launch(kernel, programs: int, **options) -> None:
        def blocks(c: AttentionConfig):
            return (programs,), {}

        def tensors(c: AttentionConfig):
            rows = projected.projections.flatten(0, 1)
            return {"blocks": head_blocks(rows, c.BN, call.shapes) if described else ()}

        call.launch(
            kernel, config, blocks, tensors=tensors, keep=("BM",),
            **launch_arguments(call), projected=projected, out=out.pointers, **options,
        )  # fmt: skip

    launch(_mask_attention_fwd_kernel, units * tiles, ZERO=zero, **call.config(forward_registers, classes))
    if zero:
        launch(_mask_attention_fwd_again_kernel, units)
    return out


def combine_rows(call: Call, attended: Attended) -> Tensor:
    """O [B, K, D] in memory, in the dtype of the features. The logit reduction forms the same tile by tile."""
    (_, classes, _), shapes = call.sizes, call.shapes
    rows = call.image.new_zeros((), dtype=torch.float32)
    if shapes.IMAGE:
        rows = attended.image_row.float().unsqueeze(1).expand(-1, classes, -1) / shapes.KINDS
    if shapes.MATRIX:
        share = torch.exp2(attended.m - attended.m.amax(-1, keepdim=True)) * attended.l
        share = share / share.sum(-1, keepdim=True) * (classes / shapes.KINDS)  # [n, B, H, T]
        share = share.repeat_interleave(attended.tile, -1)[..., :classes].transpose(2, 3).unsqueeze(-1)
        by_head = attended.rows.unflatten(-1, (shapes.H, shapes.E))  # [n, B, K, H, E]
        rows = rows + (share * by_head).sum(0).flatten(-2)
    return rows.to(call.dtype)


def launch_arguments(call: Call) -> dict:
    """What every attention kernel is launched with."""
    batch, classes, _ = call.sizes
    return {"B": batch, "K": classes, "factor": call.factors[1], "S": call.shapes}
