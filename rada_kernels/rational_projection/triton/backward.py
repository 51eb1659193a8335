"""Backward: the layers' gradients, and those of the features through the rational matrix R = f ⊙ h.

    dY [2 or 3, B, K, D] of Projections.projections  →  dW, dc of the layers; df [B, D], dh [K, D]

X = s·R is formed again in registers, tile by tile; R's gradient [B, K, D] is in memory where features want gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.options import Options, Params
from rada_kernels.rational_projection.config import FEATURES, row_split, rows_bwd_config, weight_bwd_config
from rada_kernels.rational_projection.triton.state import Projections
from rada_kernels.triton_common.config import GemmConfig, pair_block
from rada_kernels.triton_common.dialect import Shapes, load_rows, outer_rows, pair_rows, store_rows
from rada_kernels.triton_common.target import Target, target_of


@triton.jit(do_not_specialize=["B", "K", "SPLIT"])
def _rational_projection_bwd_weight_kernel(
    image,  # [B, D]
    text,  # [K, D]
    inverse_image,  # [B]
    inverse_text,  # [K]
    scale,  # []
    grad_projections,  # [LAYERS, B·K, D]
    grad_layers,  # [splits, LAYERS, D + 1, D] sums over a split's rows: dW, then dc
    B,
    K,
    SPLIT,  # tiles of rows of a split
    S: tl.constexpr,
    C: tl.constexpr,  # GemmConfig
    BI: tl.constexpr,
    BK: tl.constexpr,
):
    D: tl.constexpr = S.D
    outputs: tl.constexpr = (D + C.BC - 1) // C.BC
    inputs: tl.constexpr = (D + C.BD - 1) // C.BD
    pid = tl.program_id(0)
    inside = pid % (outputs * inputs)
    o_c = (inside // inputs) * C.BC + tl.arange(0, C.BC)  # outputs of the layer
    o_d = (inside % inputs) * C.BD + tl.arange(0, C.BD)  # inputs of the layer
    layer = (pid // (outputs * inputs)) % S.LAYERS
    split = pid // (outputs * inputs * S.LAYERS)
    grad = grad_projections + layer.to(tl.int64) * B * K * D
    b_scale = tl.load(scale)
    first = inside % inputs == 0
    b_weight = tl.zeros([C.BD, C.BC], tl.float32)  # dWᵀ: X is the first factor and stays in registers
    b_bias = tl.zeros([C.BC], tl.float32)
    end = min(tl.cdiv(B, BI) * tl.cdiv(K, BK), (split + 1) * SPLIT)
    for tile in range(split * SPLIT, end):
        pairs = pair_rows(tile, B, K, BI, BK)
        b_image = tl.load(inverse_image + pairs.o_i, mask=pairs.m_i, other=0.0) * b_scale
        b_text = tl.load(inverse_text + pairs.o_k, mask=pairs.m_k, other=0.0)
        b_f = load_rows(image, pairs.o_i, pairs.m_i, o_d, D, C.BD).to(tl.float32) * b_image[:, None]
        b_h = load_rows(text, pairs.o_k, pairs.m_k, o_d, D, C.BD).to(tl.float32) * b_text[:, None]
        b_x = outer_rows(b_f, b_h).to(image.dtype.element_ty)  # a tile of X: [BR, BD]
        b_grad = load_rows(grad, pairs.o_r, pairs.m_r, o_c, D, C.BC)  # [BR, BC]
        b_weight = tl.dot(tl.trans(b_x), b_grad, b_weight, input_precision=S.PRECISION)
        if first:
            b_bias += tl.sum(b_grad.to(tl.float32), 0)
    p_out = grad_layers + (split * S.LAYERS + layer).to(tl.int64) * (D + 1) * D
    store_rows(p_out, tl.trans(b_weight), o_c, o_c < D, o_d, D, C.BD)
    if first:
        tl.store(p_out + D * D + o_c, b_bias, mask=o_c < D)


@triton.jit(do_not_specialize=["N"])
def _rational_projection_bwd_rows_kernel(
    scale,  # []
    key_weight,  # [D, D]
    value_weight,
    query_weight,
    grad_projections,  # [LAYERS, B·K, D]
    masked,  # [B·K, D] dR through the sums
    grad_rational,  # [B·K, D] dR
    N,  # B·K
    S: tl.constexpr,
    C: tl.constexpr,  # GemmConfig
):
    D: tl.constexpr = S.D
    LAYERS: tl.constexpr = S.LAYERS
    columns: tl.constexpr = (D + C.BC - 1) // C.BC
    pid = tl.program_id(0)
    o_r = (pid // columns) * C.BR + tl.arange(0, C.BR)
    o_c = (pid % columns) * C.BC + tl.arange(0, C.BC)
    m_r = o_r < N
    b_grad = tl.zeros([C.BR, C.BC], tl.float32)
    for layer in tl.static_range(0, LAYERS):
        weight = key_weight if layer == 0 else (value_weight if layer == 1 else query_weight)
        grad = grad_projections + layer * N.to(tl.int64) * D
        for start in range(0, D, C.BD):
            o_d = start + tl.arange(0, C.BD)
            b_rows = load_rows(grad, o_r, m_r, o_d, D, C.BD)
            b_weight = load_rows(weight, o_d, o_d < D, o_c, D, C.BC)  # [BD, BC]
            b_grad = tl.dot(b_rows, b_weight, b_grad, input_precision=S.PRECISION)
    b_grad = b_grad * tl.load(scale) + load_rows(masked, o_r, m_r, o_c, D, C.BC).to(tl.float32)
    store_rows(grad_rational, b_grad, o_r, m_r, o_c, D, C.BC)


@triton.jit(do_not_specialize=["M"])
def _rational_projection_bwd_features_kernel(
    grad_rational,  # [B·K, D]
    other,  # [M, D] the features of the other side
    inverse,  # [M]
    grad,  # [N, D] Σ_m grad_rational[n, m] other[m] / |other[m]|
    M,
    row_stride,  # between two n, in rows of grad_rational
    other_stride,  # between two m
    S: tl.constexpr,
    C: tl.constexpr,  # GemmConfig
):
    D: tl.constexpr = S.D
    n = tl.program_id(0)
    o_c = tl.program_id(1) * C.BC + tl.arange(0, C.BC)
    b_grad = tl.zeros([C.BC], tl.float32)
    for start in range(0, M, C.BR):
        o_m = start + tl.arange(0, C.BR)
        m_m = o_m < M
        o_r = n.to(tl.int64) * row_stride + o_m.to(tl.int64) * other_stride
        b_rows = load_rows(grad_rational, o_r, m_m, o_c, D, C.BC).to(tl.float32)
        b_unit = load_rows(other, o_m, m_m, o_c, D, C.BC).to(tl.float32)
        b_unit *= tl.load(inverse + o_m, mask=m_m, other=0.0)[:, None]
        b_grad += tl.sum(b_rows * b_unit, 0)
    tl.store(grad + n.to(tl.int64) * D + o_c, b_grad, mask=o_c < D)


def rational_projection_bwd_weights(
    grad_projections: Tensor,  # [2 or 3, B, K, D]
    image: Tensor,  # [B, D]
    text: Tensor,  # [K, D]
    params: Params,
    projected: Projections,
    options: Options,
    *,
    config: GemmConfig | None = None,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """dW [2 or 3, D, D] and dc [2 or 3, D] of the layers in float32. X is never in memory."""
    layers, batch, classes, width = grad_projections.shape
    target = target or target_of(image)

    def blocks(c: GemmConfig):
        pairs = pair_block(batch, classes, c.BR)
        programs = layers * triton.cdiv(width, c.BC) * triton.cdiv(width, c.BD)
        row_tiles = triton.cdiv(batch, pairs["BI"]) * triton.cdiv(classes, pairs["BK"])
        split = row_split(row_tiles, programs)
        splits = triton.cdiv(row_tiles, split)
        grad_layers = image.new_empty(splits, layers, width + 1, width, dtype=torch.float32)
        return (splits * programs,), pairs | {"SPLIT": split, "grad_layers": grad_layers}

    config = config or weight_bwd_config(target, image.dtype, width)
    launched = target.launch(
        _rational_projection_bwd_weight_kernel, config, blocks, image=image, text=text,
        inverse_image=projected.inverse_image, inverse_text=projected.inverse_text, scale=params.logit_scale,
        grad_projections=grad_projections, B=batch, K=classes,
        S=Shapes.of(options, width, image.dtype, target.device),
    )  # fmt: skip
    total = launched["grad_layers"].sum(0)
    return total[:, :width], total[:, width]


def rational_projection_bwd_features(
    grad_projections: Tensor,  # [2 or 3, B, K, D]
    masked: Tensor,  # [B, K, D] dR through the sums
    image: Tensor,  # [B, D]
    text: Tensor,  # [K, D]
    params: Params,
    projected: Projections,
    options: Options,
    *,
    config: GemmConfig | None = None,
    target: Target | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of the unit rows f [B, D] and h [K, D] through R, in float32."""
    _, batch, classes, width = grad_projections.shape
    target = target or target_of(image)
    shapes = Shapes.of(options, width, image.dtype, target.device)
    grad_rational = torch.empty_like(masked)
    target.launch(
        _rational_projection_bwd_rows_kernel, config or rows_bwd_config(target, image.dtype, width),
        lambda c: ((triton.cdiv(batch * classes, c.BR) * triton.cdiv(width, c.BC),), {}),
        scale=params.logit_scale, key_weight=params.key_weight, value_weight=params.value_weight,
        query_weight=params.query_rational_weight, grad_projections=grad_projections, masked=masked,
        grad_rational=grad_rational, N=batch * classes, S=shapes,
    )  # fmt: skip

    def reduce(rows: Tensor, other: Tensor, inverse: Tensor, row_stride: int, other_stride: int) -> Tensor:
        grad = rows.new_empty(rows.shape, dtype=torch.float32)
        target.launch(
            _rational_projection_bwd_features_kernel, FEATURES, lambda c: ((len(rows), triton.cdiv(width, c.BC)), {}),
            grad_rational=grad_rational, other=other, inverse=inverse, grad=grad, M=len(other),
            row_stride=row_stride, other_stride=other_stride, S=shapes,
        )  # fmt: skip
        return grad

    grad_image = reduce(image, text, projected.inverse_text, classes, 1)
    return grad_image, reduce(text, image, projected.inverse_image, 1, classes)
