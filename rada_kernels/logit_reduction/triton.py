"""The logit reduction in Triton: attended rows → output layer → mask → masked sums and each row's statistic of |M - 1|.

The mask lives in registers only. The rows come from the direct attention as they are, [B·K, D]; from the streaming
attention as one tensor per matrix query kind, to be weighted by head and row tile, plus the image query's row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.blocks import load_columns, load_rows, load_transposed, store_rows
from rada_kernels.launch import attention_config, device_of, is_direct, product_precision, reduction_config, tile_block
from rada_kernels.mask_attention.triton import AttendedRows, kind_flags, share_of_tile
from rada_kernels.options import Options, Params


@triton.jit
def _row_tile(pid, B, K, BR: tl.constexpr, DIRECT: tl.constexpr):
    """A program's rows: offsets [BR] in B·K, image and class of each [BR], mask; streaming: the image, the first class.

    Direct: rows as they come, of several images where K is small. Streaming: rows of one image.
    """
    if DIRECT:
        k = pid * BR
        o_r = (k + tl.arange(0, BR)).to(tl.int64)
        m_r = o_r < B * K
        o_b = (o_r // K).to(tl.int32)
        o_k = (o_r - o_b * K).to(tl.int32)
        b = pid
    else:
        tiles = tl.cdiv(K, BR)
        b = pid // tiles
        k = (pid - b * tiles) * BR
        o_k = k + tl.arange(0, BR)
        m_r = o_k < K
        o_b = b + o_k * 0
        o_r = b.to(tl.int64) * K + o_k
    return o_r, o_b, o_k, m_r, b, k


@triton.jit
def _output_block(
    rows, image_row, tops, totals, weight, bias, o_r, m_r, o_c, b, k, B, K, T,
    H: tl.constexpr, E: tl.constexpr, IMAGE: tl.constexpr, TEXT: tl.constexpr, RATIONAL: tl.constexpr,
    DIRECT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, attended, m_keep, KEEP: tl.constexpr,
):  # fmt: skip
    """max(O Woᵀ + co, -1) = M - 1 for rows o_r and columns o_c: [BR, BC]. KEEP: store O where m_keep."""
    D: tl.constexpr = H * E
    KINDS: tl.constexpr = IMAGE + TEXT + RATIONAL
    b_out = tl.zeros([BR, BC], tl.float32)
    if DIRECT:
        for start in range(0, D, BD):
            o_d = start + tl.arange(0, BD)
            b_rows = load_rows(rows, o_r, m_r, o_d, D, D, BD)  # [BR, BD]
            b_weight = load_transposed(weight, o_c, o_d, D, BC, BD)
            b_out = tl.dot(b_rows, b_weight, b_out, input_precision=PRECISION)
    else:
        layer = B.to(tl.int64) * K * D
        kind_tiles = B * H * T
        for h in range(0, H):
            p_tiles = (b * H + h) * T
            b_first = 0.0
            b_second = 0.0
            if TEXT or RATIONAL:
                b_first = share_of_tile(tops, totals, p_tiles, k // BM, T, BT) * (K * 1.0 / KINDS)
            if TEXT and RATIONAL:
                b_second = share_of_tile(tops, totals, kind_tiles + p_tiles, k // BM, T, BT) * (K * 1.0 / KINDS)
            for start in tl.static_range(0, E, BD):
                o_d = h * E + start + tl.arange(0, BD)
                b_rows = tl.zeros([BR, BD], tl.float32)
                if TEXT or RATIONAL:
                    b_rows += b_first * load_rows(rows, o_r, m_r, o_d, D, D, BD).to(tl.float32)
                if TEXT and RATIONAL:
                    b_rows += b_second * load_rows(rows + layer, o_r, m_r, o_d, D, D, BD).to(tl.float32)
                if IMAGE:
                    b_image = tl.load(image_row + b.to(tl.int64) * D + o_d).to(tl.float32)
                    b_rows += (b_image * (1.0 / KINDS))[None, :]
                b_rows = b_rows.to(weight.dtype.element_ty)
                if KEEP:
                    store_rows(attended, b_rows, o_r, m_keep, o_d, D, D, BD)
                b_weight = load_transposed(weight, o_c, o_d, D, BC, BD)
                b_out = tl.dot(b_rows, b_weight, b_out, input_precision=PRECISION)
    b_out += load_columns(bias, o_c, D, BC)[None, :]
    return tl.where(b_out < -1.0, -1.0, b_out)  # NaN stays NaN


@triton.jit(do_not_specialize=["B", "K", "T"])
def _logit_reduction_fwd_kernel(
    rows,  # direct: [B, K, D]; streaming: [matrix kinds, B, K, D]
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
    statistic,  # [B, K] of |M - 1| over a row: largest, sum, or sum of squares
    place,  # [B, K] first column that attains the largest
    B,
    K,
    T,
    H: tl.constexpr,
    E: tl.constexpr,
    PENALTY: tl.constexpr,
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    RATIONAL: tl.constexpr,
    DIRECT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    D: tl.constexpr = H * E
    o_r, o_b, o_k, m_r, b, k = _row_tile(tl.program_id(0), B, K, BR, DIRECT)
    b_sum = tl.zeros([BR], tl.float32)
    b_statistic = tl.zeros([BR], tl.float32)
    b_place = tl.zeros([BR], tl.int32)
    for start in range(0, D, BC):
        o_c = start + tl.arange(0, BC)
        b_change = _output_block(
            rows, image_row, tops, totals, weight, bias, o_r, m_r, o_c, b, k, B, K, T, H, E, IMAGE, TEXT, RATIONAL,
            DIRECT, PRECISION, BM, BT, BR, BC, BD, rows, m_r, False,
        )  # fmt: skip
        b_f = load_rows(image, o_b, m_r, o_c, D, D, BC).to(tl.float32)
        b_h = load_rows(text, o_k, m_r, o_c, D, D, BC).to(tl.float32)
        b_sum += tl.sum((1.0 + b_change) * (b_f * b_h), 1)
        if D % BC != 0:
            b_change = tl.where((o_c < D)[None, :], b_change, 0.0)
        if PENALTY == "linf":
            b_largest, b_first = tl.max(tl.abs(b_change), 1, return_indices=True)
            m_new = b_largest > b_statistic
            b_statistic = tl.where(m_new, b_largest, b_statistic)
            b_place = tl.where(m_new, start + b_first, b_place)
        elif PENALTY == "l1":
            b_statistic += tl.sum(tl.abs(b_change), 1)
        else:
            b_statistic += tl.sum(b_change * b_change, 1)
    b_scale = tl.load(inverse_image + o_b, mask=m_r, other=0.0) * tl.load(inverse_text + o_k, mask=m_r, other=0.0)
    b_sum *= b_scale
    tl.store(sums + o_r, b_sum, mask=m_r)
    # A comparison loses NaN; a mask element that is NaN has made the sum NaN too.
    tl.store(statistic + o_r, tl.where(b_sum == b_sum, b_statistic, b_sum), mask=m_r)
    if PENALTY == "linf":
        tl.store(place + o_r, b_place, mask=m_r)


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
    peak,  # [B] int64, "linf"
    grad_sums,  # [B, K]
    grad_deviation,  # [B]
    grad_out,  # [B, K, D] gradient of the output layer's result
    attended,  # [B, K, D] the output layer's input; streaming, KEEP
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
    DIRECT: tl.constexpr,
    KEEP: tl.constexpr,
    FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    D: tl.constexpr = H * E
    columns: tl.constexpr = (D + BC - 1) // BC
    pid = tl.program_id(0)
    column = pid % columns
    o_r, o_b, o_k, m_r, b, k = _row_tile(pid // columns, B, K, BR, DIRECT)
    o_c = column * BC + tl.arange(0, BC)
    b_change = _output_block(
        rows, image_row, tops, totals, weight, bias, o_r, m_r, o_c, b, k, B, K, T, H, E, IMAGE, TEXT, RATIONAL,
        DIRECT, PRECISION, BM, BT, BR, BC, BD, attended, m_r & (column == 0), KEEP,
    )  # fmt: skip
    b_scale = tl.load(inverse_image + o_b, mask=m_r, other=0.0) * tl.load(inverse_text + o_k, mask=m_r, other=0.0)
    b_upstream = tl.load(grad_sums + o_r, mask=m_r, other=0.0)
    b_f = load_rows(image, o_b, m_r, o_c, D, D, BC).to(tl.float32)
    b_h = load_rows(text, o_k, m_r, o_c, D, D, BC).to(tl.float32)
    b_grad = (b_upstream * b_scale)[:, None] * (b_f * b_h)
    if PENALTY != "none":
        b_deviation = tl.load(grad_deviation + o_b, mask=m_r, other=0.0)[:, None]
        b_sign = tl.where(b_change > 0.0, 1.0, tl.where(b_change < 0.0, -1.0, 0.0))
        if PENALTY == "linf":
            b_peak = tl.load(peak + o_b, mask=m_r, other=-1)
            m_peak = (o_k.to(tl.int64) * D)[:, None] + o_c[None, :] == b_peak[:, None]
            b_grad += tl.where(m_peak, b_deviation * b_sign, 0.0)
        elif PENALTY == "l1":
            b_grad += b_deviation * b_sign / (K * 1.0 * D)
        else:
            b_grad += b_deviation * b_change * 2.0 / (K * 1.0 * D)
    b_grad = tl.where(b_change > -1.0, b_grad, 0.0)  # relu passes none at M = 0
    store_rows(grad_out, b_grad, o_r, m_r, o_c, D, D, BC)
    if FEATURES:
        store_rows(masked, b_upstream[:, None] * (1.0 + b_change), o_r, m_r, o_c, D, D, BC)


def logit_reduction_fwd(
    attended: AttendedRows,
    params: Params,
    image: Tensor,  # [B, D]
    text: Tensor,  # [K, D]
    inverse_image: Tensor,  # [B]
    inverse_text: Tensor,  # [K]
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_d M R [B, K] and each row's statistic of |M - 1| [B, K], both float32; for "linf" the column, [B, K] int32."""
    batch, classes = len(image), len(text)
    sums, statistic = (image.new_empty(batch, classes, dtype=torch.float32) for _ in range(2))
    linf = options.penalty == "linf"
    place = image.new_empty(batch if linf else 0, classes, dtype=torch.int32)
    arguments, config = _common(attended, image, text, options, backward=False)
    tiles = row_tile_count(batch, classes, config.BR, is_direct(classes))
    _logit_reduction_fwd_kernel[(tiles,)](
        weight=params.out_weight, bias=params.out_bias, image=image, text=text, inverse_image=inverse_image,
        inverse_text=inverse_text, sums=sums, statistic=statistic, place=place, PENALTY=options.penalty,
        **arguments, **config.blocks, **config.launch,
    )  # fmt: skip
    return sums, statistic, place


def row_tile_count(batch: int, classes: int, block: int, direct: bool) -> int:
    """Programs that cover B·K rows: tiles of rows as they come (direct) or of one image's rows."""
    return triton.cdiv(batch * classes, block) if direct else batch * triton.cdiv(classes, block)


def _common(attended: AttendedRows, image: Tensor, text: Tensor, options: Options, backward: bool):
    """What the forward and the backward kernel are both launched with."""
    width, heads = image.shape[-1], options.num_heads
    device, direct = device_of(image), is_direct(len(text))
    config = reduction_config(device, image.dtype, len(text), width, width // heads, direct, backward)
    tiles = attended.tops.shape[-1]
    arguments = {
        "rows": attended.rows, "image_row": attended.image_row, "tops": attended.tops, "totals": attended.totals,
        "B": len(image), "K": len(text), "T": tiles, "H": heads, "E": width // heads, **kind_flags(options),
        "DIRECT": direct, "PRECISION": product_precision(image.dtype, device),
        "BM": attention_config(device, image.dtype, len(text), width // heads).BM, "BT": tile_block(tiles),
    }  # fmt: skip
    return arguments, config


def deviation_and_peak(
    statistic: Tensor, place: Tensor, width: int, penalty: str
) -> tuple[Tensor, Tensor]:  # [B, K], [B, K] -> [B], [B]
    """Each image's statistic of |M - 1| and, for "linf", the first place k·D + d of the largest, else [0] int64."""
    if penalty != "linf":
        total = statistic.sum(1) / (statistic.shape[1] * width)
        return total, place.new_empty(0, dtype=torch.int64)
    deviation, row = statistic.max(1)
    return deviation, row * width + place.gather(1, row[:, None]).squeeze(1)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the output layer's result, that layer's input, and the gradient of R through the sums.

    Each [B, K, D]; the second with B = 0 unless layers, the third with B = 0 unless features.
    """
    batch, classes, width = len(image), len(text), image.shape[-1]
    arguments, config = _common(attended, image, text, options, backward=True)
    direct = is_direct(classes)
    grad_out = image.new_empty(batch, classes, width)
    combined = attended.rows[0] if direct else image.new_empty(batch * layers, classes, width)
    masked = image.new_empty(batch * features, classes, width)
    programs = row_tile_count(batch, classes, config.BR, direct) * triton.cdiv(width, config.BC)
    _logit_reduction_bwd_kernel[(programs,)](
        weight=params.out_weight, bias=params.out_bias, image=image, text=text, inverse_image=inverse_image,
        inverse_text=inverse_text, peak=peak, grad_sums=grad_sums,
        grad_deviation=grad_sums if grad_deviation is None else grad_deviation, grad_out=grad_out, attended=combined,
        masked=masked, PENALTY="none" if grad_deviation is None else options.penalty, KEEP=layers and not direct,
        FEATURES=features, **arguments, **config.blocks, **config.launch,
    )  # fmt: skip
    return grad_out, combined, masked
