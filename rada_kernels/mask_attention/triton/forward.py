"""Forward: text and rational scores side by side on the same blocks of keys and values.

    Projections  →  Attended

A program has BM score rows of every matrix query kind and goes over the classes with a running softmax per row, or, of
many classes in bfloat16, with sums of exp2(score); a second launch takes again what leaves float32's range so. A
tile's rows are weighted against each other, and what the tiles weigh against each other is left to the next step as
(m, l). The image query is one more score row, after the K class rows. No score leaves the registers.

On devices with tensor memory, whose products take 128 rows at full rate, a program has that many rows of one kind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.mask_attention.config import (
    against_zero,
    by_descriptors,
    forward_config,
    forward_registers,
    in_tensor_memory,
)
from rada_kernels.mask_attention.triton.exponentials import exp2_on_two_units, round_after
from rada_kernels.triton_common.blocks import head_blocks
from rada_kernels.triton_common.call import Call
from rada_kernels.triton_common.config import AttentionConfig
from rada_kernels.triton_common.dialect import (
    add_dot,
    add_heads,
    dot_transposed,
    load_classes,
    load_head,
    scale_head,
    store_head,
    sum_rows,
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
def _softmax_to_zero(b_s, b_state, b_v, S: tl.constexpr, TMEM: tl.constexpr):
    """The same with m = 0, whatever the scores are."""
    b_m, b_l, b_acc = b_state
    if TMEM:
        b_p = exp2_on_two_units(b_s)
        b_l += tl.sum(b_p, 1)
        return b_m, b_l, add_dot(b_acc, round_after(b_p, b_l), b_v, S)
    else:
        b_p = tl.exp2(b_s)
        return b_m, b_l + tl.sum(b_p, 1), add_dot(b_acc, b_p.to(b_v[0].dtype), b_v, S)


@triton.jit
def _in_range(b_l, pairs):
    """Whether a sum of exp2(score) over so many pairs is far from overflow, and large beside the ones of padding."""
    return (b_l >= pairs * 2.0**-8) & (b_l <= 2.0**64)


@triton.jit
def _attend(
    projected, blocks, out, unit, tile, first, B, K, factor, S: tl.constexpr, C: tl.constexpr,
    ZERO: tl.constexpr, TMEM: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One row tile of an (image, head), all matrix query kinds, or with TMEM the one that is `first`.

    ZERO: against m = 0, or m = inf where that fails.
    """
    last = K if S.MATRIX else 0  # score row of the image query
    T = tl.cdiv(last + S.IMAGE, C.BM)
    o_head, o_image, o_rows, plane = unit_offsets(unit, B, K, S)
    o_r = tile * C.BM + tl.arange(0, C.BM)
    m_class = o_r < last
    o_rd = o_r.to(tl.int64) * S.D
    m_image = o_r == last
    keys = projected.projections + o_rows
    queries = of_kinds(projected.query_text + o_head, keys + 2 * plane, S)
    if TMEM and len(queries) == 2:
        queries = (queries[0] if first == 0 else queries[1],)
        m_image &= first == 0  # the image's row goes with the first kind
    b_qs = ()
    b_states = ()
    for n in tl.static_range(len(queries)):
        p_q = queries[n] + o_rd
        m_q = m_class
        if S.IMAGE and n == 0:
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
                b_new += (_softmax_to_zero(b_s, b_states[n], b_v, S, TMEM),)
            else:
                if start + C.BN > K:  # the last block alone
                    b_s = tl.where((start + tl.arange(0, C.BN) < K)[None, :], b_s, float("-inf"))
                b_new += (_online_softmax(b_s, b_states[n], b_v, factor, S),)
        b_states = b_new
    b_sum_of_kinds = ()
    for n in tl.static_range(len(queries)):
        b_m, b_l, b_acc = b_states[n]
        # Class rows are weighted against the tile's others; the image's row has a softmax of its own.
        if ZERO:
            b_l -= tl.cdiv(K, C.BN) * C.BN - K  # keys past the last are zero, and so are their scores
            b_sum = tl.sum(tl.where(m_class, b_l, 0.0), 0)
            fits = _in_range(b_sum, K * tl.sum(m_class.to(tl.float32), 0))
            if S.IMAGE and n == 0:
                fits &= (first > 0) | (tile < last // C.BM) | _in_range(tl.sum(tl.where(m_image, b_l, 0.0), 0), K)
            b_top = tl.where(fits, tl.where(tile * C.BM < K, 0.0, float("-inf")), float("inf"))
            b_weight = 1.0 / tl.where(m_class, b_sum, b_l)
        else:
            b_top = tl.max(tl.where(m_class, b_m, float("-inf")), 0)
            b_share = tl.where(m_class, tl.exp2(b_m - b_top), 0.0)
            b_sum = tl.sum(b_share * b_l, 0)
            b_weight = tl.where(m_class, b_share / b_sum, 1.0 / b_l)
        b_rows = scale_head(b_acc, b_weight[:, None])
        if ROWS:
            store_head(out.rows + (first + n) * plane + o_rows + o_rd, b_rows, m_class, S.E)
        if WHOLE:
            b_sum_of_kinds = add_heads(b_sum_of_kinds, b_rows) if n > 0 else b_rows
        if S.IMAGE and n == 0 and first == 0 and tile == last // C.BM:
            store_head(out.image_row + o_image + o_r * 0, b_rows, m_image, S.E)
        if S.TEXT or S.RATIONAL:
            o_tile = ((first + n) * B * S.H + unit) * T + tile
            tl.store(out.m + o_tile, b_top)
            tl.store(out.l + o_tile, b_sum)
    if WHOLE:
        b_sum_of_kinds = scale_head(b_sum_of_kinds, K * (1.0 / S.KINDS))
        if S.IMAGE:
            tl.debug_barrier()  # the image's row is in memory for all threads
            o_0 = tl.arange(0, 1)
            b_image = sum_rows(load_head(out.image_row + o_image + o_0, o_0 == 0, S.E))  # of one row: in float32
            b_sum_of_kinds = add_heads(b_sum_of_kinds, scale_head(b_image, 1.0 / S.KINDS))
        store_head(out.combined + o_rows + o_rd, b_sum_of_kinds, m_class, S.E)


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
    TMEM: tl.constexpr,
    WHOLE: tl.constexpr,  # a row tile has all classes: O is to be stored
    ROWS: tl.constexpr,  # whether the kinds' rows are
):
    KINDS: tl.constexpr = S.MATRIX if TMEM else 1  # programs of a row tile
    T = tl.cdiv((K if S.MATRIX else 0) + S.IMAGE, C.BM)
    # Neighbours read the same keys and values.
    tile = tl.program_id(0) % T
    kind = tl.program_id(0) // T % KINDS
    unit = tl.program_id(0) // T // KINDS
    _attend(projected, blocks, out, unit, tile, kind, B, K, factor, S, C, ZERO, TMEM, WHOLE, ROWS)


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
    TMEM: tl.constexpr,
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
        for part in range(T * MATRIX if TMEM else T):
            _attend(projected, blocks, out, unit, part % T, part // T, B, K, factor, S, C, False, TMEM, False, True)


def mask_attention_fwd(
    call: Call, projected: Projections, *, save: bool, config: AttentionConfig | None = None
) -> Attended:
    """Joint-softmax attention of every (image, head). A config's BM is the row tile of the result. save: a backward
    pass follows.
    """
    batch, classes, _ = call.sizes
    config = config or call.config(forward_config, classes)
    zero = call.config(against_zero, classes)
    in_memory = call.config(in_tensor_memory, classes)
    described = zero and call.config(by_descriptors, classes)  # beside a running maximum they leave 8 bytes of spill
    out = Attended.empty(call.image, classes, call.options, config.BM, save)
    whole = Attended.whole(classes, call.options, config.BM)
    pointers = out.pointers if whole else out.pointers_but("combined")
    units, tiles = batch * call.shapes.H, out.m.shape[-1]

    def launch(kernel, programs: int, **options) -> None:
        def blocks(c: AttentionConfig):
            return (programs,), {}

        def tensors(c: AttentionConfig):
            rows = projected.projections.flatten(0, 1)
            return {"blocks": head_blocks(rows, c.BN, call.shapes) if described else ()}

        call.launch(
            kernel, config, blocks, tensors=tensors, keep=("BM",),
            **launch_arguments(call), projected=projected, out=pointers, **options,
        )  # fmt: skip

    programs = units * tiles * (call.shapes.MATRIX if in_memory else 1)
    constants = {"ZERO": zero, "TMEM": in_memory, "WHOLE": whole, "ROWS": out.rows.shape[0] > 0}
    launch(_mask_attention_fwd_kernel, programs, **constants, **call.config(forward_registers, classes))
    if zero:
        launch(_mask_attention_fwd_again_kernel, units, TMEM=in_memory)
    return out


def combine_rows(call: Call, attended: Attended) -> Tensor:
    """O [B, K, D] in memory, in the dtype of the features. The logit reduction forms the same tile by tile."""
    (_, classes, _), shapes = call.sizes, call.shapes
    if Attended.whole(classes, call.options, attended.tile):
        return attended.combined
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
