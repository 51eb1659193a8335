"""Forward: attended rows → output layer → mask M → masked sums and each image's deviation |M - 1|.

    Attended, Projections, output layer  →  Reduced

The mask lives in registers only. A tile's rows are all pairs of BI images and BK classes, whatever row tiles the
attention made of them: one tensor per matrix query kind, weighted by head and row tile, plus the image query's row.
A program forms the sum of these, O, once and stores it: its own product reads it for every block of columns, and the
backward pass reads it again.

Where a row tile had all classes the attention has made O. Programs are then of one block of columns: their sums of
columns are added up, in the order of the columns, by the last that arrives of some images' programs, which a counter
tells.

An image's largest |M - 1| is an integer maximum over its programs' largest, in memory: the bits of numbers that are
not negative are ordered as the numbers are, and a maximum does not depend on the order in which it is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from rada_kernels.logit_reduction.config import forward_config
from rada_kernels.triton_common.call import Call
from rada_kernels.triton_common.config import GemmConfig, PairBlock, cdiv, contracted_block, next_power
from rada_kernels.triton_common.dialect import (
    load_columns,
    load_rows,
    load_transposed,
    outer,
    outer_rows,
    pair_rows,
    store_rows,
)
from rada_kernels.triton_common.state import Attended, Projections, Reduced


@dataclass(frozen=True)
class RowBlocks:
    """A program's pairs of BI images and BK classes, and how it reads their attended rows."""

    TILE: int  # rows of a row tile of the attention
    BT: int  # row tiles whose m and l are read at a time
    BH: int  # heads, padded to a power of two
    BD: int  # columns of a head at a time
    BI: int
    BK: int

    @staticmethod
    def of(attended: Attended, call: Call, rows: int) -> RowBlocks:
        pairs, heads = PairBlock.of(*call.sizes[:2], rows), next_power(call.options.num_heads)
        tiles = max(1, min(16, 2048 // (pairs.BI * heads)))  # 2048 numbers at most: 8 for each of 256 threads
        return RowBlocks(attended.tile, tiles, heads, contracted_block(call.shapes.E, 64), pairs.BI, pairs.BK)


@triton.jit
def _row_shares(m, l, pairs, T, factor, S: tl.constexpr, R: tl.constexpr):
    """factor times the weight of each row's attended row in O_n / K, by head: [BH, BR].

    It is the part that the row's tile of the attention has of the sum over all pairs of classes.
    """
    o_h = tl.arange(0, R.BH)
    m_unit = pairs.m_i[:, None] & (o_h < S.H)[None, :]
    o_unit = (pairs.o_i.to(tl.int64)[:, None] * S.H + o_h[None, :]) * T  # [BI, BH]
    b_top = tl.full([R.BI, R.BH, R.BT], float("-inf"), tl.float32)
    for start in range(0, T, R.BT):
        o_t = start + tl.arange(0, R.BT)
        m_t = m_unit[:, :, None] & (o_t < T)[None, None, :]
        b_top = tl.maximum(b_top, tl.load(m + o_unit[:, :, None] + o_t, mask=m_t, other=float("-inf")))
    b_m = tl.max(b_top, 2)
    b_sum = tl.full([R.BI, R.BH, R.BT], 0.0, tl.float32)
    for start in range(0, T, R.BT):
        o_t = start + tl.arange(0, R.BT)
        m_t = m_unit[:, :, None] & (o_t < T)[None, None, :]
        b_e = tl.exp2(tl.load(m + o_unit[:, :, None] + o_t, mask=m_t, other=float("-inf")) - b_m[:, :, None])
        b_sum += tl.where(m_t, b_e * tl.load(l + o_unit[:, :, None] + o_t, mask=m_t, other=0.0), 0.0)
    b_scale = factor / tl.sum(b_sum, 2)
    o_row = o_unit[:, None, :] + (pairs.o_k // R.TILE)[None, :, None]  # [BI, BK, BH]
    m_row = m_unit[:, None, :] & pairs.m_k[None, :, None]
    b_e = tl.exp2(tl.load(m + o_row, mask=m_row, other=float("-inf")) - b_m[:, None, :])
    b_shares = b_e * tl.load(l + o_row, mask=m_row, other=0.0) * b_scale[:, None, :]
    # Heads first: a sum over the second axis would impose its layout on the rows that the shares multiply.
    return tl.trans(tl.where(m_row, b_shares, 0.0).reshape(R.BI * R.BK, R.BH))


@triton.jit
def _of_head(b_shares, h, BH: tl.constexpr):
    """Row h of shares [BH, BR]: [BR]."""
    return tl.sum(tl.where((tl.arange(0, BH) == h)[:, None], b_shares, 0.0), 0)


@triton.jit
def _store_combined(attended, pairs, B, K, T, S: tl.constexpr, R: tl.constexpr):
    """O of a tile's rows into memory, head by head, for all threads of the program to read."""
    MATRIX: tl.constexpr = S.MATRIX
    plane = B.to(tl.int64) * K * S.D
    b_shares = ()
    for n in tl.static_range(MATRIX):
        o_kind = n * B * S.H * T
        factor = K * (1.0 / S.KINDS)
        b_shares += (_row_shares(attended.m + o_kind, attended.l + o_kind, pairs, T, factor, S, R),)
    blocks: tl.constexpr = (S.E + R.BD - 1) // R.BD  # of a head
    for block in range(S.H * blocks):
        head = block // blocks
        o_e = block % blocks * R.BD + tl.arange(0, R.BD)
        o_d = head * S.E + o_e
        m_d = o_e < S.E
        b_rows = tl.full([R.BI * R.BK, R.BD], 0.0, tl.float32)
        for n in tl.static_range(MATRIX):
            b_kind = load_rows(attended.rows + n * plane, pairs.o_r, pairs.m_r, o_d, S.D, R.BD, m_d).to(tl.float32)
            b_rows += _of_head(b_shares[n], head, R.BH)[:, None] * b_kind
        if S.IMAGE:
            b_image = load_rows(attended.image_row, pairs.o_i, pairs.m_i, o_d, S.D, R.BD, m_d).to(tl.float32)
            b_rows += outer_rows(b_image * (1.0 / S.KINDS), tl.full([R.BK, R.BD], 1.0, tl.float32))
        store_rows(attended.combined, b_rows, pairs.o_r, pairs.m_r, o_d, S.D, R.BD, m_d)
    tl.debug_barrier()


@triton.jit
def output_block(rows, weight, bias, pairs, o_c, S: tl.constexpr, C: tl.constexpr):
    """max(O Woᵀ + co, -1) = M - 1 of a tile's rows and columns o_c: [BR, BC]. rows: O [B, K, D]"""
    b_out = tl.full([C.BR, C.BC], 0.0, tl.float32)
    for start in range(0, S.D, C.BD):
        o_d = start + tl.arange(0, C.BD)
        b_rows = load_rows(rows, pairs.o_r, pairs.m_r, o_d, S.D, C.BD)
        b_weight = load_transposed(weight, o_c, o_d, S.D, C.BC, C.BD)
        b_out = tl.dot(b_rows, b_weight, b_out, input_precision=S.PRECISION)
    b_out += load_columns(bias, o_c, S.D, C.BC)[None, :]
    return tl.where(b_out < -1.0, -1.0, b_out)  # NaN stays NaN


@triton.jit
def _peak_key(b_bits, b_place):
    """A number's bits before its place, k·D + d < 2³²: the greatest key is the first place of the largest number."""
    return (b_bits.to(tl.int64) << 32) | (0xFFFFFFFF - b_place.to(tl.int64))


@triton.jit
def place_of(b_peak):
    return 0xFFFFFFFF - (b_peak & 0xFFFFFFFF)


@triton.jit
def _add_columns(
    state, attended, weight, bias, features, pairs, start, S: tl.constexpr, C: tl.constexpr,
    PENALTY: tl.constexpr, PEAK: tl.constexpr,
):  # fmt: skip
    """One block of columns more: a tile's sums of M f h, deviations and, PEAK, columns of the largest: [BR] each."""
    b_sum, b_deviation, b_place = state
    o_c = start + tl.arange(0, C.BC)
    b_change = output_block(attended.combined, weight, bias, pairs, o_c, S, C)
    b_f = load_rows(features.image, pairs.o_i, pairs.m_i, o_c, S.D, C.BC).to(tl.float32)  # [BI, BC]
    b_h = load_rows(features.text, pairs.o_k, pairs.m_k, o_c, S.D, C.BC).to(tl.float32)  # [BK, BC]
    b_sum += tl.sum((1.0 + b_change) * outer_rows(b_f, b_h), 1)
    if S.D % C.BC != 0:
        b_change = tl.where((o_c < S.D)[None, :], b_change, 0.0)
    if PENALTY == "linf" and PEAK:
        b_largest, b_column = tl.max(tl.abs(b_change), 1, return_indices=True)
        m_new = b_largest > b_deviation
        b_deviation = tl.where(m_new, b_largest, b_deviation)
        b_place = tl.where(m_new, start + b_column, b_place)
    elif PENALTY == "linf":
        b_deviation = tl.maximum(b_deviation, tl.max(tl.abs(b_change), 1))
    elif PENALTY == "l1":
        b_deviation += tl.sum(tl.abs(b_change), 1)
    else:
        b_deviation += tl.sum(b_change * b_change, 1)
    return b_sum, b_deviation, b_place


@triton.jit
def _add_parts(parts, out, first, B, K, R: tl.constexpr, PARTS: tl.constexpr):
    """The sum of PARTS [B, K] into out [B, K], of BI images: K is at most a row tile of the attention."""
    o_i = first + tl.arange(0, R.BI)
    o_k = tl.arange(0, R.TILE)
    m_k = (o_i < B)[:, None] & (o_k < K)[None, :]
    o_r = o_i.to(tl.int64)[:, None] * K + o_k[None, :]
    b_sum = tl.full([R.BI, R.TILE], 0.0, tl.float32)
    for n in tl.static_range(PARTS):
        b_sum += tl.load(parts + n * B.to(tl.int64) * K + o_r, mask=m_k, other=0.0)
    tl.store(out + o_r, b_sum, mask=m_k)


@triton.jit(do_not_specialize=["B", "K", "T"])
def _logit_reduction_fwd_kernel(
    attended,  # Attended
    weight,  # [D, D]
    bias,  # [D]
    features,  # Features
    sums,  # [B, K]
    largest,  # [B] int32 bits of the largest |M - 1|, "linf"
    peak,  # [B] int64 those bits and the place, PEAK
    means,  # [B, K] a row's mean, "l1", "mse"
    parts,  # [1 or 2, PARTS, B, K] sums, and means, of a block of columns
    arrived,  # [B] int32, of an image block's first image: programs that have stored their parts
    B,
    K,
    T,
    S: tl.constexpr,
    C: tl.constexpr,  # GemmConfig
    R: tl.constexpr,  # RowBlocks
    PENALTY: tl.constexpr,
    PEAK: tl.constexpr,
    WHOLE: tl.constexpr,  # O is made, and a program has one block of columns
    PARTS: tl.constexpr,  # such blocks; else 1
):
    D: tl.constexpr = S.D
    part = tl.program_id(0) % PARTS
    tile = tl.program_id(0) // PARTS
    pairs = pair_rows(tile, B, K, R.BI, R.BK)
    b_zero = tl.full([C.BR], 0.0, tl.float32)
    b_state = b_zero, b_zero, tl.full([C.BR], 0, tl.int32)
    if WHOLE:
        b_state = _add_columns(b_state, attended, weight, bias, features, pairs, part * C.BC, S, C, PENALTY, PEAK)
    else:
        _store_combined(attended, pairs, B, K, T, S, R)
        for start in range(0, D, C.BC):
            b_state = _add_columns(b_state, attended, weight, bias, features, pairs, start, S, C, PENALTY, PEAK)
    b_sum, b_deviation, b_place = b_state
    b_image = tl.load(features.inverse_image + pairs.o_i, mask=pairs.m_i, other=0.0)
    b_text = tl.load(features.inverse_text + pairs.o_k, mask=pairs.m_k, other=0.0)
    b_sum *= outer(b_image, b_text)
    # A comparison loses NaN; a mask element that is NaN has made the sum NaN too.
    b_deviation = tl.where(b_sum == b_sum, b_deviation, float("nan"))
    if PENALTY == "linf":
        b_bits = tl.where(pairs.m_r, b_deviation.to(tl.int32, bitcast=True), 0).reshape(R.BI, R.BK)
        tl.atomic_max(largest + pairs.o_i, tl.max(b_bits, 1), mask=pairs.m_i, sem="relaxed")
        if PEAK:
            b_peak = _peak_key(b_bits, pairs.o_k[None, :] * D + b_place.reshape(R.BI, R.BK))
            b_peak = tl.max(tl.where(pairs.m_k[None, :], b_peak, 0), 1)
            tl.atomic_max(peak + pairs.o_i, b_peak, mask=pairs.m_i, sem="relaxed")
    p_sums = sums
    p_means = means
    if PARTS > 1:
        p_sums = parts + part.to(tl.int64) * B * K
        p_means = parts + (PARTS + part.to(tl.int64)) * B * K
    tl.store(p_sums + pairs.o_r, b_sum, mask=pairs.m_r)
    if PENALTY != "linf":
        tl.store(p_means + pairs.o_r, b_deviation * (1.0 / D), mask=pairs.m_r)
    if PARTS > 1:
        tl.debug_barrier()  # every thread's stores before the count
        class_tiles = tl.cdiv(K, R.BK)
        first = tile // class_tiles * R.BI
        if tl.atomic_add(arrived + first, 1, sem="acq_rel") == PARTS * class_tiles - 1:
            _add_parts(parts, sums, first, B, K, R, PARTS)
            if PENALTY != "linf":
                _add_parts(parts + PARTS * B.to(tl.int64) * K, means, first, B, K, R, PARTS)


def logit_reduction_fwd(
    call: Call, projected: Projections, attended: Attended, *, config: GemmConfig | None = None
) -> Reduced:
    """Masked sums in float32, and each image's deviation of the mask from one. Raises projected.peak and .largest, and
    makes attended.combined unless it is made.
    """
    batch, classes, width = call.sizes
    linf = call.options.penalty == "linf"
    whole = Attended.whole(classes, call.options, attended.tile)
    sums = call.image.new_empty(batch, classes, dtype=torch.float32)
    means = sums if linf else torch.empty_like(sums)  # "linf" writes none

    def parts_of(c: GemmConfig) -> int:
        return cdiv(width, c.BC) if whole else 1

    def blocks(c: GemmConfig):
        tile, parts = RowBlocks.of(attended, call, c.BR), parts_of(c)
        programs = parts * cdiv(batch, tile.BI) * cdiv(classes, tile.BK)
        return (programs,), {"R": tile, "PARTS": parts}

    def tensors(c: GemmConfig):
        parts = parts_of(c)
        return {"parts": sums.new_empty(2 - linf, parts, batch, classes) if parts > 1 else sums}

    read = attended.pointers_but("rows", "image_row", "m", "l") if whole else attended.pointers
    call.launch(
        _logit_reduction_fwd_kernel, config or call.config(forward_config, classes), blocks, tensors=tensors,
        **launch_arguments(call, projected), attended=read, T=attended.m.shape[-1], sums=sums,
        largest=projected.largest, peak=projected.peak, means=means, arrived=projected.arrived,
        PENALTY=call.options.penalty, PEAK=projected.peak.shape[0] > 0, WHOLE=whole,
    )  # fmt: skip
    return Reduced(sums, projected.largest.view(torch.float32) if linf else means.mean(1))


def launch_arguments(call: Call, projected: Projections) -> dict:
    """What the forward and the backward kernel are both launched with."""
    batch, classes, _ = call.sizes
    return {
        "weight": call.params.out_weight, "bias": call.params.out_bias, "features": call.features(projected),
        "B": batch, "K": classes, "S": call.shapes,
    }  # fmt: skip
