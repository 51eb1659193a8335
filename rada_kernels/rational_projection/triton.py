"""The rational projection in Triton: queries, keys and values from tiles of the rational matrix made in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.blocks import load_columns, load_rows, load_transposed, store_rows
from rada_kernels.launch import (
    device_of,
    feature_bwd_config,
    product_precision,
    projection_config,
    query_config,
    row_split,
    rows_bwd_config,
    weight_bwd_config,
)
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


@triton.jit(do_not_specialize=["R", "K", "SPLIT"])
def _rational_projection_bwd_weight_kernel(
    image,  # [B, D]
    text,  # [K, D]
    inverse_image,  # [B]
    inverse_text,  # [K]
    scale,  # []
    grad_projections,  # [LAYERS, B·K, D]
    grad_weights,  # [splits, LAYERS, D, D] sums over a split's rows
    grad_biases,  # [splits, LAYERS, D]
    R,  # B·K
    K,
    SPLIT,  # rows of a split
    D: tl.constexpr,
    LAYERS: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    outputs: tl.constexpr = (D + BC - 1) // BC
    inputs: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    inside = pid % (outputs * inputs)
    o_c = (inside // inputs) * BC + tl.arange(0, BC)  # outputs of the layer
    o_d = (inside % inputs) * BD + tl.arange(0, BD)  # inputs of the layer
    layer = (pid // (outputs * inputs)) % LAYERS
    split = pid // (outputs * inputs * LAYERS)
    grad = grad_projections + layer.to(tl.int64) * R * D
    b_scale = tl.load(scale)
    b_weight = tl.zeros([BC, BD], tl.float32)
    b_bias = tl.zeros([BC], tl.float32)
    end = min(R, (split + 1) * SPLIT)
    for start in range(split * SPLIT, end, BR):
        o_r = start + tl.arange(0, BR)
        m_r = o_r < end
        o_b = o_r // K
        o_k = o_r - o_b * K
        b_factor = tl.load(inverse_image + o_b, mask=m_r, other=0.0) * tl.load(inverse_text + o_k, mask=m_r, other=0.0)
        b_f = load_rows(image, o_b, m_r, o_d, D, D, BD).to(tl.float32)
        b_h = load_rows(text, o_k, m_r, o_d, D, D, BD).to(tl.float32)
        b_x = ((b_factor * b_scale)[:, None] * b_f * b_h).to(image.dtype.element_ty)  # a tile of X: [BR, BD]
        b_grad = load_rows(grad, o_r, m_r, o_c, D, D, BC)  # [BR, BC]
        b_weight = tl.dot(tl.trans(b_grad), b_x, b_weight, input_precision=PRECISION)
        b_bias += tl.sum(b_grad.to(tl.float32), 0)
    p_out = (split * LAYERS + layer).to(tl.int64) * D
    store_rows(grad_weights + p_out * D, b_weight, o_c, o_c < D, o_d, D, D, BD)
    if inside % inputs == 0:
        tl.store(grad_biases + p_out + o_c, b_bias, mask=o_c < D)


@triton.jit(do_not_specialize=["R"])
def _rational_projection_bwd_rows_kernel(
    scale,  # []
    key_weight,  # [D, D]
    value_weight,
    query_weight,
    grad_projections,  # [LAYERS, B·K, D]
    masked,  # [B·K, D] the gradient of R that comes through the sums
    grad_rational,  # [B·K, D] the whole gradient of R
    R,  # B·K
    D: tl.constexpr,
    LAYERS: tl.constexpr,
    PRECISION: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
):
    columns: tl.constexpr = (D + BC - 1) // BC
    pid = tl.program_id(0)
    o_r = (pid // columns) * BR + tl.arange(0, BR)
    o_c = (pid % columns) * BC + tl.arange(0, BC)
    m_r = o_r < R
    b_grad = tl.zeros([BR, BC], tl.float32)
    for layer in tl.static_range(0, LAYERS):
        weight = key_weight if layer == 0 else (value_weight if layer == 1 else query_weight)
        grad = grad_projections + layer * R.to(tl.int64) * D
        for start in range(0, D, BD):
            o_d = start + tl.arange(0, BD)
            b_rows = load_rows(grad, o_r, m_r, o_d, D, D, BD)
            b_weight = load_rows(weight, o_d, o_d < D, o_c, D, D, BC)  # [BD, BC]
            b_grad = tl.dot(b_rows, b_weight, b_grad, input_precision=PRECISION)
    b_grad = b_grad * tl.load(scale) + load_rows(masked, o_r, m_r, o_c, D, D, BC).to(tl.float32)
    store_rows(grad_rational, b_grad, o_r, m_r, o_c, D, D, BC)


@triton.jit(do_not_specialize=["N", "M"])
def _feature_bwd_kernel(
    grad_rational,  # [B·K, D]
    other,  # [M, D] the features of the other side
    inverse,  # [M]
    grad,  # [N, D] Σ_m grad_rational[n, m] other[m] / |other[m]|
    N,
    M,
    row_stride,  # between two n, in rows of grad_rational
    other_stride,  # between two m
    D: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    n = tl.program_id(0)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    b_grad = tl.zeros([BC], tl.float32)
    for start in range(0, M, BR):
        o_m = start + tl.arange(0, BR)
        m_m = o_m < M
        o_r = n.to(tl.int64) * row_stride + o_m.to(tl.int64) * other_stride
        b_rows = load_rows(grad_rational, o_r, m_m, o_c, D, D, BC).to(tl.float32)
        b_unit = load_rows(other, o_m, m_m, o_c, D, D, BC).to(tl.float32)
        b_unit *= tl.load(inverse + o_m, mask=m_m, other=0.0)[:, None]
        b_grad += tl.sum(b_rows * b_unit, 0)
    tl.store(grad + n.to(tl.int64) * D + o_c, b_grad, mask=o_c < D)


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


def rational_projection_bwd_weights(
    image: Tensor,  # [B, D]
    text: Tensor,  # [K, D]
    inverse_image: Tensor,  # [B]
    inverse_text: Tensor,  # [K]
    scale: Tensor,  # []
    grad_projections: Tensor,  # [2 or 3, B, K, D]
) -> tuple[Tensor, Tensor]:
    """The layers' gradients in float32: weights [2 or 3, D, D] and biases [2 or 3, D]. X is never in memory."""
    layers, batch, classes, width = grad_projections.shape
    rows = batch * classes
    device = device_of(image)
    config = weight_bwd_config(device, image.dtype, width)
    tiles = layers * triton.cdiv(width, config.BC) * triton.cdiv(width, config.BD)
    split = row_split(rows, tiles, config.BR)
    splits = triton.cdiv(rows, split)
    grad_weights = image.new_empty(splits, layers, width, width, dtype=torch.float32)
    grad_biases = grad_weights.new_empty(splits, layers, width)
    _rational_projection_bwd_weight_kernel[(splits * tiles,)](
        image=image, text=text, inverse_image=inverse_image, inverse_text=inverse_text, scale=scale,
        grad_projections=grad_projections, grad_weights=grad_weights, grad_biases=grad_biases, R=rows, K=classes,
        SPLIT=split, D=width, LAYERS=layers, PRECISION=product_precision(image.dtype, device),
        **config.blocks, **config.launch,
    )  # fmt: skip
    return grad_weights.sum(0), grad_biases.sum(0)


def rational_projection_bwd_features(
    image: Tensor,  # [B, D]
    text: Tensor,  # [K, D]
    inverse_image: Tensor,  # [B]
    inverse_text: Tensor,  # [K]
    params: Params,
    grad_projections: Tensor,  # [2 or 3, B, K, D]
    masked: Tensor,  # [B, K, D] the gradient of R that comes through the sums
) -> tuple[Tensor, Tensor]:
    """The gradients of the unit rows f [B, D] and h [K, D] through R, in float32."""
    layers, batch, classes, width = grad_projections.shape
    device = device_of(image)
    config = rows_bwd_config(device, image.dtype, width)
    grad_rational = torch.empty_like(masked)
    grid = (triton.cdiv(batch * classes, config.BR) * triton.cdiv(width, config.BC),)
    _rational_projection_bwd_rows_kernel[grid](
        scale=params.logit_scale, key_weight=params.key_weight, value_weight=params.value_weight,
        query_weight=params.query_rational_weight, grad_projections=grad_projections, masked=masked,
        grad_rational=grad_rational, R=batch * classes, D=width, LAYERS=layers,
        PRECISION=product_precision(image.dtype, device), **config.blocks, **config.launch,
    )  # fmt: skip
    grad_image, grad_text = (rows.new_empty(rows.shape, dtype=torch.float32) for rows in (image, text))
    config = feature_bwd_config(device, image.dtype, width)
    for grad, other, inverse, strides in (
        (grad_image, text, inverse_text, (classes, 1)),
        (grad_text, image, inverse_image, (1, classes)),
    ):
        _feature_bwd_kernel[(len(grad), triton.cdiv(width, config.BC))](
            grad_rational=grad_rational, other=other, inverse=inverse, grad=grad, N=len(grad), M=len(other),
            row_stride=strides[0], other_stride=strides[1], D=width, BR=config.BR, BC=config.BC, **config.launch,
        )  # fmt: skip
    return grad_image, grad_text
