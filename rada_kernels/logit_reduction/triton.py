"""The logit reduction in Triton: attended rows → output layer → mask → masked sums and the statistic of |M - 1|.

The mask lives in registers only. The rows come joined, [B·K, D], where the attention had all pairs of classes in one
program; else as one tensor per matrix query kind, to be weighted by head and row tile, plus the image query's row. A
tile of rows is all pairs of BI images and BK classes, whatever tiles the attention made of them.

An image's largest |M - 1| is one integer maximum over its programs' largest, in memory: the bits of numbers that are
not negative are ordered as the numbers are, and a maximum does not depend on the order in which it is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.blocks import (
    factors_of_pairs,
    load_columns,
    load_rows,
    load_transposed,
    pair_rows,
    products_of_pairs,
    store_rows,
)
from rada_kernels.launch import (
    attention_config,
    device_of,
    next_power,
    pair_block,
    product_precision,
    reduction_config,
    share_block,
)
from rada_kernels.mask_attention.triton import AttendedRows, kind_flags
from rada_kernels.options import Options, Params


@triton.jit
def _row_shares(
    tops, totals, o_i, m_i, o_k, m_k, T, factor,
    H: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """factor times the weight of each row's attended row in O_n / K, by head: [BH, BR].

    It is the part that the row's tile of the attention has of the sum over all pairs of classes.
    """
    o_h = tl.arange(0, BH)
    m_pair = m_i[:, None] & (o_h < H)[None, :]
    p_pair = (o_i.to(tl.int64)[:, None] * H + o_h[None, :]) * T  # [BI, BH]
    b_most = tl.full([BI, BH, BT], float("-inf"), tl.float32)
    for start in range(0, T, BT):
        o_t = start + tl.arange(0, BT)
        m_t = m_pair[:, :, None] & (o_t < T)[None, None, :]
        b_most = tl.maximum(b_most, tl.load(tops + p_pair[:, :, None] + o_t, mask=m_t, other=float("-inf")))
    b_top = tl.max(b_most, 2)
    b_sum = tl.zeros([BI, BH, BT], tl.float32)
    for start in range(0, T, BT):
        o_t = start + tl.arange(0, BT)
        m_t = m_pair[:, :, None] & (o_t < T)[None, None, :]
        b_exps = tl.exp2(tl.load(tops + p_pair[:, :, None] + o_t, mask=m_t, other=float("-inf")) - b_top[:, :, None])
        b_sum += tl.where(m_t, b_exps * tl.load(totals + p_pair[:, :, None] + o_t, mask=m_t, other=0.0), 0.0)
    b_scale = factor / tl.sum(b_sum, 2)
    p_row = p_pair[:, None, :] + (o_k // BM)[None, :, None]  # [BI, BK, BH]
    m_row = m_pair[:, None, :] & m_k[None, :, None]
    b_exps = tl.exp2(tl.load(tops + p_row, mask=m_row, other=float("-inf")) - b_top[:, None, :])
    b_shares = b_exps * tl.load(totals + p_row, mask=m_row, other=0.0) * b_scale[:, None, :]
    # Heads first: a sum over the second axis would impose its layout on the rows that the shares multiply.
    return tl.trans(tl.where(m_row, b_shares, 0.0).reshape(BI * BK, BH))


@triton.jit
def _of_head(b_shares, h, BH: tl.constexpr):
    """Row h of shares [BH, BR]: [BR]."""
    return tl.sum(tl.where((tl.arange(0, BH) == h)[:, None], b_shares, 0.0), 0)


@triton.jit
def _shares_of_kinds(
    tops, totals, o_i, m_i, o_k, m_k, B, K, T,
    H: tl.constexpr, IMAGE: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr, JOINED: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """_row_shares of the matrix query kinds in use, first and second: what takes their stored rows to those of O."""
    b_first = tl.zeros([BH, BI * BK], tl.float32)
    b_second = tl.zeros([BH, BI * BK], tl.float32)
    factor = K * (1.0 / (IMAGE + TEXT + RATIONAL))
    if (TEXT or RATIONAL) and not JOINED:
        b_first = _row_shares(tops, totals, o_i, m_i, o_k, m_k, T, factor, H, BM, BT, BI, BK, BH)
    if TEXT and RATIONAL and not JOINED:
        kind = B * H * T
        b_second = _row_shares(tops + kind, totals + kind, o_i, m_i, o_k, m_k, T, factor, H, BM, BT, BI, BK, BH)
    return b_first, b_second


@triton.jit
def _output_block(
    rows, image_row, weight, bias, b_first, b_second, o_i, m_i, o_r, m_r, o_c, B, K,
    H: tl.constexpr, E: tl.constexpr, IMAGE: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr,
    JOINED: tl.constexpr, PRECISION: tl.constexpr,
    BI: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr,
    attended, m_keep, KEEP: tl.constexpr,
):  # fmt: skip
    """max(O Woᵀ + co, -1) = M - 1 for rows o_r and columns o_c: [BR, BC]. KEEP: store O where m_keep."""
    D: tl.constexpr = H * E
    KINDS: tl.constexpr = IMAGE + TEXT + RATIONAL
    layer = B.to(tl.int64) * K * D
    b_out = tl.zeros([BI * BK, BC], tl.float32)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        if JOINED:
            b_rows = load_rows(rows, o_r, m_r, o_d, D, D, BD)  # [BR, BD]
        else:
            b_rows = tl.zeros([BI * BK, BD], tl.float32)
            if TEXT or RATIONAL:
                b_share = _of_head(b_first, start // E, BH)[:, None]
                b_rows += b_share * load_rows(rows, o_r, m_r, o_d, D, D, BD).to(tl.float32)
            if TEXT and RATIONAL:
                b_share = _of_head(b_second, start // E, BH)[:, None]
                b_rows += b_share * load_rows(rows + layer, o_r, m_r, o_d, D, D, BD).to(tl.float32)
            if IMAGE:
                b_image = load_rows(image_row, o_i, m_i, o_d, D, D, BD).to(tl.float32) * (1.0 / KINDS)
                b_rows += products_of_pairs(b_image, tl.full([BK, BD], 1.0, tl.float32))
            b_rows = b_rows.to(weight.dtype.element_ty)
            if KEEP:
                store_rows(attended, b_rows, o_r, m_keep, o_d, D, D, BD)
        b_weight = load_transposed(weight, o_c, o_d, D, BC, BD)
        b_out = tl.dot(b_rows, b_weight, b_out, input_precision=PRECISION)
    b_out += load_columns(bias, o_c, D, BC)[None, :]
    return tl.where(b_out < -1.0, -1.0, b_out)  # NaN stays NaN


@triton.jit
def _peak_key(b_bits, b_place):
    """A number's bits before its place, k·D + d < 2³²: the greatest key is the first place of the largest number."""
    return (b_bits.to(tl.int64) << 32) | (0xFFFFFFFF - b_place.to(tl.int64))


@triton.jit
def _place_of(b_peak):
    return 0xFFFFFFFF - (b_peak & 0xFFFFFFFF)


@triton.jit(do_not_specialize=["B", "K", "T"])
def _logit_reduction_fwd_kernel(
    rows,  # joined: [B, K, D]; streaming: [matrix kinds, B, K, D]
    image_row,  # [B, D] streaming
    tops,  # [matrix kinds, B, H, T] streaming
    totals,  # [matrix kinds, B, H, T] streaming
    weight,  # [D, D]
    bias,  # [D]
    image,  # [B, D]
    text,  # [K, D]
    inverse_image,  # [B]
    inverse_text,  # [K]
    sums,  # [B, K]
    largest,  # [B] int32, see Statistic
    peak,  # [B] int64, with PEAK
    means,  # [B, K] "l1", "mse"
    B,
    K,
    T,
    H: tl.constexpr,
    E: tl.constexpr,
    PENALTY: tl.constexpr,
    PEAK: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    JOINED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    D: tl.constexpr = H * E
    o_i, m_i, o_k, m_k, o_r, m_r = pair_rows(tl.program_id(0), B, K, BI, BK)
    b_first, b_second = _shares_of_kinds(
        tops, totals, o_i, m_i, o_k, m_k, B, K, T, H, IMAGE, TEXT, RATIONAL, JOINED, BM, BT, BI, BK, BH
    )
    b_sum = tl.zeros([BI * BK], tl.float32)
    b_statistic = tl.zeros([BI * BK], tl.float32)
    b_place = tl.zeros([BI * BK], tl.int32)
    for start in range(0, D, BC):
        o_c = start + tl.arange(0, BC)
        b_change = _output_block(
            rows, image_row, weight, bias, b_first, b_second, o_i, m_i, o_r, m_r, o_c, B, K,
            H, E, IMAGE, TEXT, RATIONAL, JOINED, PRECISION, BI, BK, BH, BC, BD, rows, m_r, False,
        )  # fmt: skip
        b_f = load_rows(image, o_i, m_i, o_c, D, D, BC).to(tl.float32)  # [BI, BC]
        b_h = load_rows(text, o_k, m_k, o_c, D, D, BC).to(tl.float32)  # [BK, BC]
        b_sum += tl.sum((1.0 + b_change) * products_of_pairs(b_f, b_h), 1)
        if D % BC != 0:
            b_change = tl.where((o_c < D)[None, :], b_change, 0.0)
        if PENALTY == "linf" and PEAK:
            b_largest, b_column = tl.max(tl.abs(b_change), 1, return_indices=True)
            m_new = b_largest > b_statistic
            b_statistic = tl.where(m_new, b_largest, b_statistic)
            b_place = tl.where(m_new, start + b_column, b_place)
        elif PENALTY == "linf":
            b_statistic = tl.maximum(b_statistic, tl.max(tl.abs(b_change), 1))
        elif PENALTY == "l1":
            b_statistic += tl.sum(tl.abs(b_change), 1)
        else:
            b_statistic += tl.sum(b_change * b_change, 1)
    b_image = tl.load(inverse_image + o_i, mask=m_i, other=0.0)
    b_text = tl.load(inverse_text + o_k, mask=m_k, other=0.0)
    b_sum *= factors_of_pairs(b_image, b_text)
    tl.store(sums + o_r, b_sum, mask=m_r)
    # A comparison loses NaN; a mask element that is NaN has made the sum NaN too.
    b_statistic = tl.where(b_sum == b_sum, b_statistic, float("nan"))
    if PENALTY == "linf":
        b_bits = tl.where(m_r, b_statistic.to(tl.int32, bitcast=True), 0)
        tl.atomic_max(largest + o_i, tl.max(b_bits.reshape(BI, BK), 1), mask=m_i, sem="relaxed")
        if PEAK:
            b_peak = _peak_key(b_bits.reshape(BI, BK), o_k[None, :] * D + b_place.reshape(BI, BK))
            tl.atomic_max(peak + o_i, tl.max(tl.where(m_k[None, :], b_peak, 0), 1), mask=m_i, sem="relaxed")
    else:
        tl.store(means + o_r, b_statistic * (1.0 / D), mask=m_r)


@triton.jit(do_not_specialize=["B", "K", "T"])
def _logit_reduction_bwd_kernel(
    rows,  # as in the forward kernel
    image_row,
    tops,
    totals,
    weight,  # [D, D]
    bias,  # [D]
    image,  # [B, D]
    text,  # [K, D]
    inverse_image,  # [B]
    inverse_text,  # [K]
    peak,  # [B] int64, "linf", see Statistic
    grad_sums,  # [B, K]
    grad_deviation,  # [B]
    grad_out,  # [B, K, D] gradient of the output layer's result
    grad_biases,  # [tiles of rows, D] the output layer's bias gradient, a tile's part; LAYERS
    attended,  # [B, K, D] the output layer's input; streaming, LAYERS
    masked,  # [B, K, D] gradient of R through the sums: grad_sums M; FEATURES
    B,
    K,
    T,
    H: tl.constexpr,
    E: tl.constexpr,
    PENALTY: tl.constexpr,  # "none" without grad_deviation
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    JOINED: tl.constexpr,
    LAYERS: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    BH: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    D: tl.constexpr = H * E
    columns: tl.constexpr = (D + BC - 1) // BC
    pid = tl.program_id(0)
    column = pid % columns
    o_i, m_i, o_k, m_k, o_r, m_r = pair_rows(pid // columns, B, K, BI, BK)
    o_c = column * BC + tl.arange(0, BC)
    b_first, b_second = _shares_of_kinds(
        tops, totals, o_i, m_i, o_k, m_k, B, K, T, H, IMAGE, TEXT, RATIONAL, JOINED, BM, BT, BI, BK, BH
    )
    b_change = _output_block(
        rows, image_row, weight, bias, b_first, b_second, o_i, m_i, o_r, m_r, o_c, B, K,
        H, E, IMAGE, TEXT, RATIONAL, JOINED, PRECISION, BI, BK, BH, BC, BD,
        attended, m_r & (column == 0), LAYERS and not JOINED,
    )  # fmt: skip
    b_upstream = tl.load(grad_sums + o_r, mask=m_r, other=0.0)[:, None]  # [BR, 1]
    b_image = tl.load(inverse_image + o_i, mask=m_i, other=0.0)
    b_text = tl.load(inverse_text + o_k, mask=m_k, other=0.0)
    b_f = load_rows(image, o_i, m_i, o_c, D, D, BC).to(tl.float32) * b_image[:, None]  # [BI, BC]
    b_h = load_rows(text, o_k, m_k, o_c, D, D, BC).to(tl.float32) * b_text[:, None]  # [BK, BC]
    b_grad = b_upstream * products_of_pairs(b_f, b_h)
    if PENALTY != "none":
        b_ones = tl.full([BK], 1.0, tl.float32)
        b_deviation = factors_of_pairs(tl.load(grad_deviation + o_i, mask=m_i, other=0.0), b_ones)[:, None]
        b_sign = tl.where(b_change > 0.0, 1.0, tl.where(b_change < 0.0, -1.0, 0.0))
        if PENALTY == "linf":
            b_place = _place_of(tl.load(peak + o_i, mask=m_i, other=0))  # k·D + d of each image
            b_place = (b_place[:, None] - o_k.to(tl.int64)[None, :] * D).reshape(BI * BK)  # d, where this is the class
            b_grad += tl.where(b_place[:, None] == o_c[None, :], b_deviation * b_sign, 0.0)
        elif PENALTY == "l1":
            b_grad += b_deviation * b_sign / (K * 1.0 * D)
        else:
            b_grad += b_deviation * b_change * 2.0 / (K * 1.0 * D)
    b_grad = tl.where(b_change > -1.0, b_grad, 0.0)  # relu passes none at M = 0
    store_rows(grad_out, b_grad, o_r, m_r, o_c, D, D, BC)
    if LAYERS:
        p_bias = grad_biases + (pid // columns).to(tl.int64) * D + o_c
        tl.store(p_bias, tl.sum(tl.where(m_r[:, None], b_grad, 0.0), 0), mask=o_c < D)
    if FEATURES:
        store_rows(masked, b_upstream * (1.0 + b_change), o_r, m_r, o_c, D, D, BC)


class Statistic(NamedTuple):
    """What the reduction leaves of |M - 1|: of the penalty's kind, the others with B = 0.

    `peak` says what `largest` does; but `largest` is given out, and an operator's results must not share memory.
    """

    largest: Tensor  # [B] int32, "linf": the bits of the largest. Cleared before the launch
    peak: Tensor  # [B] int64, "linf" where a backward pass follows: those bits and the place. Cleared before the launch
    means: Tensor  # [B, K] "l1", "mse": a row's mean

    def deviation(self) -> Tensor:
        """Each image's statistic, [B]."""
        return self.largest.view(torch.float32) if len(self.largest) else self.means.mean(1)


def empty_statistic(image: Tensor, classes: int, options: Options, save: bool) -> Statistic:
    """Uninitialised tensors, from shapes alone; save: a backward pass follows."""
    batch, linf = len(image), options.penalty == "linf"
    return Statistic(
        largest=image.new_empty(batch * linf, dtype=torch.int32),
        peak=image.new_empty(batch * (linf and save), dtype=torch.int64),
        means=image.new_empty(batch * (not linf), classes, dtype=torch.float32),
    )


def logit_reduction_fwd(
    attended: AttendedRows,
    params: Params,
    image: Tensor,  # [B, D]
    text: Tensor,  # [K, D]
    inverse_image: Tensor,  # [B]
    inverse_text: Tensor,  # [K]
    options: Options,
    statistic: Statistic,  # to be filled
) -> Tensor:
    """Σ_d M R: [B, K] float32."""
    sums = image.new_empty(len(image), len(text), dtype=torch.float32)
    tiles, arguments = _common(attended, image, text, options, backward=False)
    _logit_reduction_fwd_kernel[(tiles,)](
        weight=params.out_weight, bias=params.out_bias, image=image, text=text, inverse_image=inverse_image,
        inverse_text=inverse_text, sums=sums, **statistic._asdict(), PENALTY=options.penalty,
        PEAK=len(statistic.peak) > 0, **arguments,
    )  # fmt: skip
    return sums


def _common(attended: AttendedRows, image: Tensor, text: Tensor, options: Options, backward: bool) -> tuple[int, dict]:
    """Tiles of rows, and what the forward and the backward kernel are both launched with."""
    (batch, width), classes, heads = image.shape, len(text), options.num_heads
    head_width, device = width // heads, device_of(image)
    config = reduction_config(device, image.dtype, batch, classes, width, head_width, attended.joined, backward)
    pairs = pair_block(batch, classes, config.BR)
    tiles, head_block = attended.tops.shape[-1], next_power(heads)
    arguments = {
        "rows": attended.rows, "image_row": attended.image_row, "tops": attended.tops, "totals": attended.totals,
        "B": batch, "K": classes, "T": tiles, "H": heads, "E": head_width, **kind_flags(options),
        "JOINED": attended.joined, "PRECISION": product_precision(image.dtype, device),
        "BM": attention_config(device, image.dtype, classes, head_width).BM,
        "BT": share_block(tiles, pairs["BI"] * head_block), "BH": head_block,
        **pairs, **config.columns, **config.launch,
    }  # fmt: skip
    return triton.cdiv(batch, pairs["BI"]) * triton.cdiv(classes, pairs["BK"]), arguments


def logit_reduction_bwd(
    grad_sums: Tensor,  # [B, K]
    grad_deviation: Tensor | None,  # [B]
    attended: AttendedRows,
    peak: Tensor,  # [B]
    params: Params,
    image: Tensor,  # [B, D]
    text: Tensor,  # [K, D]
    inverse_image: Tensor,  # [B]
    inverse_text: Tensor,  # [K]
    options: Options,
    *,
    layers: bool,
    features: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of the output layer's result, that layer's input and its bias's gradient [D], and the gradient of
    R through the sums.

    Each but the bias's [B, K, D]; the second and the third are empty unless layers, the fourth unless features.
    """
    batch, classes, width = len(image), len(text), image.shape[-1]
    tiles, arguments = _common(attended, image, text, options, backward=True)
    grad_out = image.new_empty(batch, classes, width)
    combined = attended.rows[0] if attended.joined else image.new_empty(batch * layers, classes, width)
    grad_biases = image.new_empty(tiles * layers, width, dtype=torch.float32)
    masked = image.new_empty(batch * features, classes, width)
    _logit_reduction_bwd_kernel[(tiles * triton.cdiv(width, arguments["BC"]),)](
        weight=params.out_weight, bias=params.out_bias, image=image, text=text, inverse_image=inverse_image,
        inverse_text=inverse_text, peak=peak, grad_sums=grad_sums,
        grad_deviation=grad_sums if grad_deviation is None else grad_deviation, grad_out=grad_out,
        grad_biases=grad_biases, attended=combined, masked=masked,
        PENALTY="none" if grad_deviation is None else options.penalty, LAYERS=layers, FEATURES=features, **arguments,
    )  # fmt: skip
    return grad_out, combined, grad_biases.sum(0), masked
