"""Backward: the gradients of the features, through the rational matrix R = f ⊙ h and through their queries.

    AttentionGrads, ReductionGrads, Projections  →  image [B, D], text [K, D]

R's gradient [B, K, D] is in memory. A side that is not wanted has no programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.rational_projection.config import FEATURES, UNITS, rows_bwd_config
from rada_kernels.triton_common.call import Call
from rada_kernels.triton_common.config import GemmConfig, cdiv
from rada_kernels.triton_common.dialect import load_rows, operand, store_rows
from rada_kernels.triton_common.state import AttentionGrads, Projections, ReductionGrads


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
    b_grad = tl.full([C.BR, C.BC], 0.0, tl.float32)
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


@triton.jit(do_not_specialize=["B", "K", "FIRST"])
def _rational_projection_bwd_features_kernel(
    grad_rational,  # [B·K, D]
    features,  # Features
    grad_units,  # [B + K, D] of image n: Σ_k dR[n, k] h[k], of class n: Σ_b dR[b, n] f[b]
    B,
    K,
    FIRST,  # 0, or B where images are not wanted
    S: tl.constexpr,
    C: tl.constexpr,  # GemmConfig
):
    D: tl.constexpr = S.D
    n = FIRST + tl.program_id(0)
    is_image = n < B
    o_c = tl.program_id(1) * C.BC + tl.arange(0, C.BC)
    other = features.text if is_image else features.image
    inverse = features.inverse_text if is_image else features.inverse_image
    M = K if is_image else B
    start_row = n.to(tl.int64) * K if is_image else n.to(tl.int64) - B
    stride = 1 if is_image else K
    b_grad = tl.full([C.BC], 0.0, tl.float32)
    for start in range(0, M, C.BR):
        o_m = start + tl.arange(0, C.BR)
        m_m = o_m < M
        b_rows = load_rows(grad_rational, start_row + o_m.to(tl.int64) * stride, m_m, o_c, D, C.BC).to(tl.float32)
        b_unit = load_rows(other, o_m, m_m, o_c, D, C.BC).to(tl.float32)
        b_unit *= tl.load(inverse + o_m, mask=m_m, other=0.0)[:, None]
        b_grad += tl.sum(b_rows * b_unit, 0)
    tl.store(grad_units + n.to(tl.int64) * D + o_c, b_grad, mask=o_c < D)


@triton.jit
def _finish_rows(
    rows, inverse, weight, scale, grad_query, grad_units, grad, tile, N, through_query,
    S: tl.constexpr, C: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """du = grad_units + √s dq W of a tile of feature rows; then the rows' own: (du - u (u·du)) / |row|.

    Between the two passes over the columns du lies in grad_units, for the program alone.
    """
    D: tl.constexpr = S.D
    o_n = tile * C.BR + tl.arange(0, C.BR)
    m_n = o_n < N
    b_root = tl.sqrt(tl.load(scale))
    b_inverse = tl.load(inverse + o_n, mask=m_n, other=0.0)[:, None]
    b_along = tl.full([C.BR], 0.0, tl.float32)
    for start in range(0, D, C.BC):
        o_c = start + tl.arange(0, C.BC)
        b_grad = load_rows(grad_units, o_n, m_n, o_c, D, C.BC)
        if through_query:
            for inner in range(0, D, C.BD):
                o_d = inner + tl.arange(0, C.BD)
                b_query = load_rows(grad_query, o_n, m_n, o_d, D, C.BD) * b_root
                b_operand, b_unit = operand(b_query, weight.dtype.element_ty)
                b_weight = load_rows(weight, o_d, o_d < D, o_c, D, C.BC)
                b_grad += b_unit * tl.dot(b_operand, b_weight, input_precision=S.PRECISION)
        if NORMALIZE:
            b_along += tl.sum(b_grad * (load_rows(rows, o_n, m_n, o_c, D, C.BC).to(tl.float32) * b_inverse), 1)
            store_rows(grad_units, b_grad, o_n, m_n, o_c, D, C.BC)
        else:
            store_rows(grad, b_grad, o_n, m_n, o_c, D, C.BC)
    if NORMALIZE:
        tl.debug_barrier()
        for start in range(0, D, C.BC):
            o_c = start + tl.arange(0, C.BC)
            b_u = load_rows(rows, o_n, m_n, o_c, D, C.BC).to(tl.float32) * b_inverse
            b_grad = load_rows(grad_units, o_n, m_n, o_c, D, C.BC) - b_u * b_along[:, None]
            store_rows(grad, b_grad * b_inverse, o_n, m_n, o_c, D, C.BC)


@triton.jit(do_not_specialize=["B", "K", "IMAGE_TILES"])
def _rational_projection_bwd_units_kernel(
    features,  # Features
    scale,  # []
    query_image_weight,  # [D, D]
    query_text_weight,
    grad_query_image,  # [B, D] float32
    grad_query_text,  # [K, D] float32
    grad_units,  # [B + K, D]
    grad_image,  # [B, D]
    grad_text,  # [K, D]
    B,
    K,
    IMAGE_TILES,  # 0 where images are not wanted
    S: tl.constexpr,
    C: tl.constexpr,  # GemmConfig
    NORMALIZE: tl.constexpr,
):
    is_image = tl.program_id(0) < IMAGE_TILES
    _finish_rows(
        features.image if is_image else features.text,
        features.inverse_image if is_image else features.inverse_text,
        query_image_weight if is_image else query_text_weight,
        scale,
        grad_query_image if is_image else grad_query_text,
        grad_units if is_image else grad_units + B.to(tl.int64) * S.D,
        grad_image if is_image else grad_text,
        tl.program_id(0) - (0 if is_image else IMAGE_TILES),
        B if is_image else K,
        S.IMAGE if is_image else S.TEXT,
        S, C, NORMALIZE,
    )  # fmt: skip


def feature_grads(
    call: Call,
    projected: Projections,
    attention: AttentionGrads,
    sum_query_text: Tensor,  # [K, D] float32: of attention.query_text over the images
    reduction: ReductionGrads,
    grad_image: Tensor | None,
    grad_text: Tensor | None,
    *,
    config: GemmConfig | None = None,
) -> None:
    """Fills the gradients of the features that are wanted, one or both."""
    batch, classes, width = call.sizes
    grad_rational, p = torch.empty_like(reduction.masked), call.params
    call.launch(
        _rational_projection_bwd_rows_kernel, config or call.config(rows_bwd_config),
        lambda c: ((cdiv(batch * classes, c.BR) * cdiv(width, c.BC),), {}),
        scale=p.logit_scale, key_weight=p.key_weight, value_weight=p.value_weight, query_weight=p.query_rational_weight,
        grad_projections=attention.projections, masked=reduction.masked, grad_rational=grad_rational,
        N=batch * classes, S=call.shapes,
    )  # fmt: skip
    images, texts = batch * (grad_image is not None), classes * (grad_text is not None)
    shared: dict[str, Any] = {
        "features": call.features(projected), "B": batch, "K": classes, "S": call.shapes,
        "grad_units": sum_query_text.new_empty(batch + classes, width),
    }  # fmt: skip
    call.launch(
        _rational_projection_bwd_features_kernel, FEATURES, lambda c: ((images + texts, cdiv(width, c.BC)), {}),
        grad_rational=grad_rational, FIRST=batch - images, **shared,
    )  # fmt: skip
    call.launch(
        _rational_projection_bwd_units_kernel, UNITS,
        lambda c: ((cdiv(images, c.BR) + cdiv(texts, c.BR),), {"IMAGE_TILES": cdiv(images, c.BR)}),
        scale=p.logit_scale, query_image_weight=p.query_image_weight, query_text_weight=p.query_text_weight,
        grad_query_image=attention.query_image, grad_query_text=sum_query_text,
        grad_image=grad_text if grad_image is None else grad_image,
        grad_text=grad_image if grad_text is None else grad_text, NORMALIZE=call.options.normalize, **shared,
    )  # fmt: skip
