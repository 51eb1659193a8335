"""The rational projection in Triton: queries, keys and values from tiles of the rational matrix made in registers.

A tile's rows are all pairs of BI images and BK classes: BI + BK rows of features make BI·BK rows of X.
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
    device_of,
    feature_bwd_config,
    next_power,
    pair_block,
    product_precision,
    projection_config,
    row_split,
    rows_bwd_config,
    weight_bwd_config,
)
from rada_kernels.numerics import ZERO_NORM
from rada_kernels.options import Options, Params


@triton.jit
def _inverse_norms(rows, o_r, m_r, D: tl.constexpr, ZERO: tl.constexpr, NORMALIZE: tl.constexpr, BW: tl.constexpr):
    """1 / norm of feature rows: 0 for a zero row, 1 without NORMALIZE."""
    b_square = tl.zeros([o_r.shape[0]], tl.float32)
    if NORMALIZE:
        for start in tl.static_range(0, D, BW):
            b_rows = load_rows(rows, o_r, m_r, start + tl.arange(0, BW), D, D, BW).to(tl.float32)
            b_square += tl.sum(b_rows * b_rows, 1)
        b_norm = tl.sqrt(b_square)
        b_inverse = tl.where(b_norm < ZERO, 0.0, 1.0 / tl.where(b_norm < ZERO, 1.0, b_norm))
    else:
        b_inverse = b_square + 1.0
    return b_inverse


@triton.jit
def _query_tile(
    rows, weight, bias, scale, query, inverse, tile, column, N, project,
    D: tl.constexpr, ZERO: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """W (√s x / |x|) + c for a tile of feature rows x, if project; the first columns' program stores 1 / |x| too."""
    o_r = tile * BR + tl.arange(0, BR)
    o_c = column * BC + tl.arange(0, BC)
    m_r = o_r < N
    b_inverse = _inverse_norms(rows, o_r, m_r, D, ZERO, NORMALIZE, BW)
    if column == 0:
        tl.store(inverse + o_r, b_inverse, mask=m_r)
    if project:
        b_query = tl.zeros([BR, BC], tl.float32)
        for start in range(0, D, BD):
            o_d = start + tl.arange(0, BD)
            b_rows = load_rows(rows, o_r, m_r, o_d, D, D, BD)  # [BR, BD]
            b_weight = load_transposed(weight, o_c, o_d, D, BC, BD)  # [BD, BC]
            b_query = tl.dot(b_rows, b_weight, b_query, input_precision=PRECISION)
        b_factor = tl.sqrt(tl.load(scale)) * b_inverse  # a factor per row may as well multiply the result
        b_query = b_query * b_factor[:, None] + load_columns(bias, o_c, D, BC)[None, :]
        store_rows(query, b_query, o_r, m_r, o_c, D, D, BC)


@triton.jit(do_not_specialize=["B", "K"])
def _rational_projection_fwd_kernel(
    image,  # [B, D]
    text,  # [K, D]
    scale,  # []
    query_image_weight,  # [D, D]
    query_image_bias,  # [D]
    query_text_weight,
    query_text_bias,
    query_rational_weight,
    query_rational_bias,
    key_weight,
    key_bias,
    value_weight,
    value_bias,
    query_image,  # [B, D]
    query_text,  # [K, D]
    inverse_image,  # [B] see _inverse_norms
    inverse_text,  # [K]
    projections,  # [LAYERS, B·K, D]
    largest,  # [B] or [0]: cleared for the logit reduction
    peak,  # [B] or [0]: cleared for the logit reduction
    B,
    K,
    D: tl.constexpr,
    LAYERS: tl.constexpr,  # 2: keys and values; 3: rational queries too
    IMAGE: tl.constexpr,
    TEXT: tl.constexpr,
    LARGEST: tl.constexpr,  # which are to be cleared
    PEAK: tl.constexpr,
    ZERO: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    BD: tl.constexpr,
    BW: tl.constexpr,  # columns of features that are squared at a time
):
    BR: tl.constexpr = BI * BK
    columns: tl.constexpr = (D + BC - 1) // BC
    pid = tl.program_id(0)
    column = pid % columns
    tile = pid // columns
    o_c = column * BC + tl.arange(0, BC)
    image_tiles = tl.cdiv(B, BR)
    query_tiles = image_tiles + tl.cdiv(K, BR)
    if tile < query_tiles:
        is_image = tile < image_tiles
        if LARGEST and is_image and column == 0:
            o_i = tile * BR + tl.arange(0, BR)
            tl.store(largest + o_i, 0, mask=o_i < B)
            if PEAK:
                tl.store(peak + o_i, 0, mask=o_i < B)
        _query_tile(
            image if is_image else text,
            query_image_weight if is_image else query_text_weight,
            query_image_bias if is_image else query_text_bias,
            scale,
            query_image if is_image else query_text,
            inverse_image if is_image else inverse_text,
            tile if is_image else tile - image_tiles,
            column,
            B if is_image else K,
            IMAGE if is_image else TEXT,
            D, ZERO, NORMALIZE, PRECISION, BR, BC, BD, BW,
        )  # fmt: skip
    else:
        layer = (tile - query_tiles) % LAYERS
        weight = key_weight
        bias = key_bias
        if layer == 1:
            weight = value_weight
            bias = value_bias
        if layer == 2:
            weight = query_rational_weight
            bias = query_rational_bias
        o_i, m_i, o_k, m_k, o_r, m_r = pair_rows((tile - query_tiles) // LAYERS, B, K, BI, BK)
        b_image = _inverse_norms(image, o_i, m_i, D, ZERO, NORMALIZE, BW) * tl.load(scale)
        b_text = _inverse_norms(text, o_k, m_k, D, ZERO, NORMALIZE, BW)
        b_out = tl.zeros([BR, BC], tl.float32)
        for start in range(0, D, BD):
            o_d = start + tl.arange(0, BD)
            b_f = load_rows(image, o_i, m_i, o_d, D, D, BD)  # [BI, BD]
            b_h = load_rows(text, o_k, m_k, o_d, D, D, BD)  # [BK, BD]
            if image.dtype.element_ty == tl.float16:
                # The product of two raw features may exceed float16's largest number.
                b_f = b_f.to(tl.float32) * b_image[:, None]
                b_h = b_h.to(tl.float32) * b_text[:, None]
            b_x = products_of_pairs(b_f, b_h).to(image.dtype.element_ty)  # a tile of X: [BR, BD]
            b_weight = load_transposed(weight, o_c, o_d, D, BC, BD)
            b_out = tl.dot(b_x, b_weight, b_out, input_precision=PRECISION)
        if image.dtype.element_ty != tl.float16:
            b_out *= factors_of_pairs(b_image, b_text)[:, None]
        b_out += load_columns(bias, o_c, D, BC)[None, :]
        store_rows(projections + layer.to(tl.int64) * B * K * D, b_out, o_r, m_r, o_c, D, D, BC)


@triton.jit(do_not_specialize=["B", "K", "SPLIT"])
def _rational_projection_bwd_weight_kernel(
    image,  # [B, D]
    text,  # [K, D]
    inverse_image,  # [B]
    inverse_text,  # [K]
    scale,  # []
    grad_projections,  # [LAYERS, B·K, D]
    grad_layers,  # [splits, LAYERS, D + 1, D] sums over a split's rows: the weight's gradient, then the bias's
    B,
    K,
    SPLIT,  # tiles of rows of a split
    D: tl.constexpr,
    LAYERS: tl.constexpr,
    PRECISION: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
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
    grad = grad_projections + layer.to(tl.int64) * B * K * D
    b_scale = tl.load(scale)
    first = inside % inputs == 0
    b_weight = tl.zeros([BD, BC], tl.float32)  # transposed: tiles of X are formed as the first factor, in registers
    b_bias = tl.zeros([BC], tl.float32)
    end = min(tl.cdiv(B, BI) * tl.cdiv(K, BK), (split + 1) * SPLIT)
    for tile in range(split * SPLIT, end):
        o_i, m_i, o_k, m_k, o_r, m_r = pair_rows(tile, B, K, BI, BK)
        b_image = tl.load(inverse_image + o_i, mask=m_i, other=0.0) * b_scale
        b_text = tl.load(inverse_text + o_k, mask=m_k, other=0.0)
        b_f = load_rows(image, o_i, m_i, o_d, D, D, BD).to(tl.float32) * b_image[:, None]
        b_h = load_rows(text, o_k, m_k, o_d, D, D, BD).to(tl.float32) * b_text[:, None]
        b_x = products_of_pairs(b_f, b_h).to(image.dtype.element_ty)  # a tile of X: [BR, BD]
        b_grad = load_rows(grad, o_r, m_r, o_c, D, D, BC)  # [BR, BC]
        b_weight = tl.dot(tl.trans(b_x), b_grad, b_weight, input_precision=PRECISION)
        if first:
            b_bias += tl.sum(b_grad.to(tl.float32), 0)
    p_out = grad_layers + (split * LAYERS + layer).to(tl.int64) * (D + 1) * D
    store_rows(p_out, tl.trans(b_weight), o_c, o_c < D, o_d, D, D, BD)
    if first:
        tl.store(p_out + D * D + o_c, b_bias, mask=o_c < D)


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


class Projections(NamedTuple):
    """What the projection leaves to the next steps and to the backward pass."""

    query_image: Tensor  # [B, D], or [0, D] where that kind is not in use
    query_text: Tensor  # [K, D], or [0, D]
    inverse_image: Tensor  # [B] float32: 1 / norm, 0 for a zero row; 1 without normalize
    inverse_text: Tensor  # [K] float32
    projections: Tensor  # [2 or 3, B, K, D] keys, values, rational queries if in use


def rational_projection_fwd(
    image: Tensor,  # [B, D]
    text: Tensor,  # [K, D]
    params: Params,
    options: Options,
    largest: Tensor,  # [B] or [0]
    peak: Tensor,  # [B] or [0]
) -> Projections:
    """All projections in one launch: W (√s x / |x|) + c of the feature rows, and of the rows of X.

    It also sets `largest` and `peak` to 0, for the logit reduction to raise.
    """
    (batch, width), classes = image.shape, len(text)
    layers = 2 + ("rational" in options.queries)
    device = device_of(image)
    config = projection_config(device, image.dtype, width, batch, classes)
    out = Projections(
        query_image=image.new_empty(batch * ("image" in options.queries), width),
        query_text=image.new_empty(classes * ("text" in options.queries), width),
        inverse_image=image.new_empty(batch, dtype=torch.float32),
        inverse_text=image.new_empty(classes, dtype=torch.float32),
        projections=image.new_empty(layers, batch, classes, width),
    )
    pairs = pair_block(batch, classes, config.BR)
    rational_tiles = triton.cdiv(batch, pairs["BI"]) * triton.cdiv(classes, pairs["BK"])
    query_tiles = triton.cdiv(batch, config.BR) + triton.cdiv(classes, config.BR)
    _rational_projection_fwd_kernel[((query_tiles + layers * rational_tiles) * triton.cdiv(width, config.BC),)](
        image=image, text=text, scale=params.logit_scale,
        **{name: layer for name, layer in params._asdict().items() if name.startswith(("query", "key", "value"))},
        **out._asdict(), largest=largest, peak=peak, B=batch, K=classes, D=width, LAYERS=layers,
        IMAGE="image" in options.queries, TEXT="text" in options.queries, LARGEST=len(largest) > 0, PEAK=len(peak) > 0,
        ZERO=ZERO_NORM, NORMALIZE=options.normalize,
        PRECISION=product_precision(image.dtype, device), BW=min(128, next_power(width)),
        **pairs, **config.columns, **config.launch,
    )  # fmt: skip
    return out


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
    device = device_of(image)
    config = weight_bwd_config(device, image.dtype, width)
    pairs = pair_block(batch, classes, config.BR)
    blocks = layers * triton.cdiv(width, config.BC) * triton.cdiv(width, config.BD)
    row_tiles = triton.cdiv(batch, pairs["BI"]) * triton.cdiv(classes, pairs["BK"])
    split = row_split(row_tiles, blocks)
    splits = triton.cdiv(row_tiles, split)
    grad_layers = image.new_empty(splits, layers, width + 1, width, dtype=torch.float32)
    _rational_projection_bwd_weight_kernel[(splits * blocks,)](
        image=image, text=text, inverse_image=inverse_image, inverse_text=inverse_text, scale=scale,
        grad_projections=grad_projections, grad_layers=grad_layers, B=batch, K=classes, SPLIT=split, D=width,
        LAYERS=layers, PRECISION=product_precision(image.dtype, device), **pairs, **config.columns, **config.launch,
    )  # fmt: skip
    total = grad_layers.sum(0)
    return total[:, :width], total[:, width]


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
        PRECISION=product_precision(image.dtype, device), BR=config.BR, **config.columns, **config.launch,
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
