"""Backward: the layers' gradients, and those of the features through queries and the rational matrix R = f ⊙ h.

    AttentionGrads, dR [B, K, D] through the sums, Projections  →  ProjectionGrads

X = s·R is formed again in registers, tile by tile; R's gradient [B, K, D] is in memory where features want gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.numerics import unit_rows_backward
from rada_kernels.options import Wanted
from rada_kernels.rational_projection.config import FEATURES, row_split, rows_bwd_config, weight_bwd_config
from rada_kernels.triton_common.call import Call
from rada_kernels.triton_common.config import GemmConfig, PairBlock, cdiv
from rada_kernels.triton_common.dialect import load_rows, outer_rows, pair_rows, store_rows, unit_features
from rada_kernels.triton_common.state import AttentionGrads, ProjectionGrads, Projections


@triton.jit(do_not_specialize=["B", "K", "SPLIT"])
def _rational_projection_bwd_weight_kernel(
    features,  # Features
    scale,  # []
    grad_projections,  # [LAYERS, B·K, D]
    grad_layers,  # [splits, LAYERS, D + 1, D] sums over a split's rows: dW, then dc
    B,
    K,
    SPLIT,  # tiles of rows of a split
    S: tl.constexpr,
    C: tl.constexpr,  # GemmConfig
    P: tl.constexpr,  # PairBlock
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
    end = min(tl.cdiv(B, P.BI) * tl.cdiv(K, P.BK), (split + 1) * SPLIT)
    for tile in range(split * SPLIT, end):
        pairs = pair_rows(tile, B, K, P.BI, P.BK)
        b_f, b_h = unit_features(features, b_scale, pairs, o_d, D, C.BD)
        b_x = outer_rows(b_f, b_h).to(features.image.dtype.element_ty)  # a tile of X: [BR, BD]
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


@triton.jit(do_not_specialize=["M", "row_stride", "other_stride"])
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


def rational_projection_bwd(
    call: Call, projected: Projections, grads: AttentionGrads, masked: Tensor, wanted: Wanted
) -> ProjectionGrads:
    """masked [B, K, D]: dR through the sums, where features want gradients."""
    layers = _layers_over_x(call, projected, grads.projections) if wanted.layers else {}
    units: tuple[Tensor | None, ...] = (None, None)
    if wanted.image or wanted.text:
        through_r = _units_through_r(call, projected, grads.projections, masked)
        units = tuple(grad if asked else None for grad, asked in zip(through_r, wanted[:2], strict=True))
    p, root, grad_rows = call.params, call.params.scale.sqrt(), []
    for rows, inverse, kind, weight, grad_query, grad in (
        (call.image, projected.inverse_image, "image", p.query_image_weight, grads.query_image, units[0]),
        (call.text, projected.inverse_text, "text", p.query_text_weight, grads.query_text, units[1]),
    ):
        unit = rows * inverse.unsqueeze(1)  # u
        if kind in call.options.queries:  # W (√s u) + c
            if kind == "text":
                grad_query = grad_query.sum(0, dtype=torch.float32)  # of the images
            grad_scaled = root * grad_query
            if wanted.layers:
                layers[f"query_{kind}"] = grad_scaled.t() @ unit, grad_query.sum(0)
            if grad is not None:
                grad = grad.addmm_(grad_scaled, weight.float())
        if grad is not None and call.options.normalize:
            grad = unit_rows_backward(grad, unit, inverse)
        grad_rows.append(grad)
    return ProjectionGrads(grad_rows[0], grad_rows[1], layers)


def _layers_over_x(
    call: Call, projected: Projections, grad_projections: Tensor, *, config: GemmConfig | None = None
) -> dict[str, tuple[Tensor, Tensor]]:
    """dW and dc of keys, values and rational queries in float32. X is never in memory."""
    batch, classes, width = call.sizes
    layers = len(grad_projections)

    def blocks(c: GemmConfig):
        pairs = PairBlock.of(batch, classes, c.BR)
        programs = layers * cdiv(width, c.BC) * cdiv(width, c.BD)
        row_tiles = pairs.tiles(batch, classes)
        split = row_split(row_tiles, programs)
        splits = cdiv(row_tiles, split)
        grad_layers = call.image.new_empty(splits, layers, width + 1, width, dtype=torch.float32)
        return (splits * programs,), {"P": pairs, "SPLIT": split, "grad_layers": grad_layers}

    launched = call.target.launch(
        _rational_projection_bwd_weight_kernel, config or call.config(weight_bwd_config), blocks,
        features=call.features(projected), scale=call.params.logit_scale, grad_projections=grad_projections,
        B=batch, K=classes, S=call.shapes,
    )  # fmt: skip
    total = launched["grad_layers"].sum(0)
    weights, biases = total[:, :width].unbind(), total[:, width].unbind()
    return dict(zip(("key", "value", "query_rational"), zip(weights, biases, strict=True), strict=False))


def _units_through_r(
    call: Call, projected: Projections, grad_projections: Tensor, masked: Tensor, *, config: GemmConfig | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of the unit rows f [B, D] and h [K, D] through R, in float32."""
    batch, classes, width = call.sizes
    grad_rational, p = torch.empty_like(masked), call.params
    call.target.launch(
        _rational_projection_bwd_rows_kernel, config or call.config(rows_bwd_config),
        lambda c: ((cdiv(batch * classes, c.BR) * cdiv(width, c.BC),), {}),
        scale=p.logit_scale, key_weight=p.key_weight, value_weight=p.value_weight, query_weight=p.query_rational_weight,
        grad_projections=grad_projections, masked=masked, grad_rational=grad_rational, N=batch * classes, S=call.shapes,
    )  # fmt: skip

    def reduce(rows: Tensor, other: Tensor, inverse: Tensor, row_stride: int, other_stride: int) -> Tensor:
        grad = rows.new_empty(rows.shape, dtype=torch.float32)
        call.target.launch(
            _rational_projection_bwd_features_kernel, FEATURES, lambda c: ((len(rows), cdiv(width, c.BC)), {}),
            grad_rational=grad_rational, other=other, inverse=inverse, grad=grad, M=len(other),
            row_stride=row_stride, other_stride=other_stride, S=call.shapes,
        )  # fmt: skip
        return grad

    grad_image = reduce(call.image, call.text, projected.inverse_text, classes, 1)
    return grad_image, reduce(call.text, call.image, projected.inverse_image, 1, classes)
