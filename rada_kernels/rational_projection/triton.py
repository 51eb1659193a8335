"""The rational projection in Triton: queries, keys and values from tiles of the rational matrix made in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.blocks import load_columns, load_rows, load_transposed, store_rows
from rada_kernels.launch import device_of, product_precision, projection_config, query_config
from rada_kernels.options import Params
from rada_kernels.rows import ZERO_NORM


@triton.jit(do_not_specialize=["N"])
def _query_fwd_kernel(
    rows,  # [N, D] features as given
    weight,  # [D, D]
    bias,  # [D]
    scale,  # []
    query,  # [N, D]
    inverse,  # [N] 1 / norm, 0 for a zero row, 1 without NORMALIZE
    N,
    D: tl.constexpr,
    ZERO: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PROJECT: tl.constexpr,  # false: the norms only
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_r = o_r < N
    b_query = tl.zeros([BR, BC], tl.float32)
    b_square = tl.zeros([BR], tl.float32)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        b_rows = load_rows(rows, o_r, m_r, o_d, D, D, BD)  # [BR, BD]
        b_wide = b_rows.to(tl.float32)
        b_square += tl.sum(b_wide * b_wide, 1)
        if PROJECT:
            b_weight = load_transposed(weight, o_c, o_d, D, BC, BD)  # [BD, BC]
            b_query = tl.dot(b_rows, b_weight, b_query, input_precision=PRECISION)
    b_inverse = tl.full([BR], 1.0, tl.float32)
    if NORMALIZE:
        b_norm = tl.sqrt(b_square)
        b_inverse = tl.where(b_norm < ZERO, 0.0, 1.0 / tl.where(b_norm < ZERO, 1.0, b_norm))
    if tl.program_id(1) == 0:
        tl.store(inverse + o_r, b_inverse, mask=m_r)
    if PROJECT:
        # W (√s x / |x|) + c with the row's factor taken out of the product.
        b_query = b_query * (tl.sqrt(tl.load(scale)) * b_inverse)[:, None] + load_columns(bias, o_c, D, BC)[None, :]
        store_rows(query, b_query, o_r, m_r, o_c, D, D, BC)


@triton.jit
def _rational_block(image, text, o_b, o_k, m_r, o_d, b_factor, D: tl.constexpr, BD: tl.constexpr):
    """Rows of X / b_factor in the features' dtype, or in float16 rows of X: [BR, BD].

    A factor per row may as well multiply the product's result. In float16 the raw features' products could overflow.
    """
    b_f = load_rows(image, o_b, m_r, o_d, D, D, BD)
    b_h = load_rows(text, o_k, m_r, o_d, D, D, BD)
    if image.dtype.element_ty == tl.float16:
        return (b_f.to(tl.float32) * b_factor[:, None] * b_h.to(tl.float32)).to(tl.float16)
    return b_f * b_h


@triton.jit(do_not_specialize=["R", "K"])
def _rational_projection_fwd_kernel(
    image,  # [B, D]
    text,  # [K, D]
    inverse_image,  # [B]
    inverse_text,  # [K]
    scale,  # []
    key_weight,  # [D, D]
    key_bias,  # [D]
    value_weight,
    value_bias,
    query_weight,
    query_bias,
    projections,  # [LAYERS, B·K, D]
    R,  # B·K
    K,
    D: tl.constexpr,
    LAYERS: tl.constexpr,  # 2: keys and values; 3: rational queries too
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    # Neighbouring programs share a tile of X: its rows come from L2 for all but the first.
    columns: tl.constexpr = (D + BC - 1) // BC
    pid = tl.program_id(0)
    o_r = (pid // columns) * BR + tl.arange(0, BR)  # rows of several images where K is small
    o_c = (pid % columns) * BC + tl.arange(0, BC)
    m_r = o_r < R
    o_b = o_r // K
    o_k = o_r - o_b * K
    b_factor = tl.load(inverse_image + o_b, mask=m_r, other=0.0) * tl.load(inverse_text + o_k, mask=m_r, other=0.0)
    b_factor *= tl.load(scale)  # [BR]
    b_key = tl.zeros([BR, BC], tl.float32)
    b_value = tl.zeros([BR, BC], tl.float32)
    b_query = tl.zeros([BR, BC], tl.float32)
    for start in range(0, D, BD):
        o_d = start + tl.arange(0, BD)
        b_x = _rational_block(image, text, o_b, o_k, m_r, o_d, b_factor, D, BD)  # one tile of X for all layers
        b_key = tl.dot(b_x, load_transposed(key_weight, o_c, o_d, D, BC, BD), b_key, input_precision=PRECISION)
        b_value = tl.dot(b_x, load_transposed(value_weight, o_c, o_d, D, BC, BD), b_value, input_precision=PRECISION)
        if LAYERS == 3:
            b_query = tl.dot(
                b_x, load_transposed(query_weight, o_c, o_d, D, BC, BD), b_query, input_precision=PRECISION
            )
    if image.dtype.element_ty == tl.float16:
        b_factor = tl.full([BR], 1.0, tl.float32)
    layer = R.to(tl.int64) * D
    b_key = b_key * b_factor[:, None] + load_columns(key_bias, o_c, D, BC)[None, :]
    store_rows(projections, b_key, o_r, m_r, o_c, D, D, BC)
    b_value = b_value * b_factor[:, None] + load_columns(value_bias, o_c, D, BC)[None, :]
    store_rows(projections + layer, b_value, o_r, m_r, o_c, D, D, BC)
    if LAYERS == 3:
        b_query = b_query * b_factor[:, None] + load_columns(query_bias, o_c, D, BC)[None, :]
        store_rows(projections + 2 * layer, b_query, o_r, m_r, o_c, D, D, BC)


def query_fwd(
    rows: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, normalize: bool, project: bool
) -> tuple[Tensor, Tensor]:
    """W (√s x / |x|) + c for feature rows x, and 1 / |x| (0 for a zero row; 1 without normalize).

    rows [N, D] -> query [N, D], or [0, D] without project, and inverse [N] in float32.
    """
    count, width = rows.shape
    device = device_of(rows)
    config = query_config(device, rows.dtype, width)
    query = torch.empty_like(rows) if project else rows.new_empty(0, width)
    inverse = rows.new_empty(count, dtype=torch.float32)
    grid = (triton.cdiv(count, config.BR), triton.cdiv(width, config.BC) if project else 1)
    _query_fwd_kernel[grid](
        rows=rows, weight=weight, bias=bias, scale=scale, query=query, inverse=inverse, N=count, D=width,
        ZERO=ZERO_NORM, NORMALIZE=normalize, PROJECT=project, PRECISION=product_precision(rows.dtype, device),
        **config.blocks, **config.launch,
    )  # fmt: skip
    return query, inverse


def rational_projection_fwd(
    image: Tensor,  # [B, D]
    text: Tensor,  # [K, D]
    inverse_image: Tensor,  # [B]
    inverse_text: Tensor,  # [K]
    params: Params,
    projections: Tensor,  # [2 or 3, B, K, D] to be filled with keys, values and rational queries
) -> None:
    layers, batch, classes, width = projections.shape
    device = device_of(image)
    config = projection_config(device, image.dtype, width, layers)
    grid = (triton.cdiv(batch * classes, config.BR) * triton.cdiv(width, config.BC),)
    _rational_projection_fwd_kernel[grid](
        image=image, text=text, inverse_image=inverse_image, inverse_text=inverse_text, scale=params.logit_scale,
        key_weight=params.key_weight, key_bias=params.key_bias,
        value_weight=params.value_weight, value_bias=params.value_bias,
        query_weight=params.query_rational_weight, query_bias=params.query_rational_bias,
        projections=projections, R=batch * classes, K=classes, D=width, LAYERS=layers,
        PRECISION=product_precision(image.dtype, device), **config.blocks, **config.launch,
    )  # fmt: skip
