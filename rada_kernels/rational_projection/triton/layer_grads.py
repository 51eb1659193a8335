"""Backward: the gradients of all six layers, from the gradients of their results.

    AttentionGrads, ReductionGrads, Projections  →  LayerGrads

Of the layers over the rows of X, which are formed in registers, a program sums a part of the rows, and a launch at the
end adds up and rounds these parts; in the same way it finishes the output layer's. The queries of images and of classes
have few rows: a launch of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.rational_projection.config import QUERIES_BWD, ROUND, queries_registers, row_split, weight_bwd_config
from rada_kernels.triton_common.call import Call
from rada_kernels.triton_common.config import GemmConfig, PairBlock, cdiv
from rada_kernels.triton_common.dialect import load_rows, operand, outer_rows, pair_rows, store_rows, unit_features
from rada_kernels.triton_common.state import AttentionGrads, LayerGrads, Linear, Projections


@triton.jit
def _tile_of(inside, D: tl.constexpr, C: tl.constexpr):
    """A layer's outputs [BC] and inputs [BD] that a program has."""
    inputs: tl.constexpr = (D + C.BD - 1) // C.BD
    return (inside // inputs) * C.BC + tl.arange(0, C.BC), (inside % inputs) * C.BD + tl.arange(0, C.BD)


@triton.jit(do_not_specialize=["B", "K", "SPLIT"])
def _rational_projection_bwd_weight_kernel(
    features,  # Features
    scale,  # []
    grad_projections,  # [LAYERS, B·K, D]
    parts,  # [splits, LAYERS, D + 1, D] sums over a split's rows: dW, then dc
    B,
    K,
    SPLIT,  # tiles of rows of a split
    S: tl.constexpr,
    C: tl.constexpr,  # GemmConfig
    P: tl.constexpr,  # PairBlock
):
    D: tl.constexpr = S.D
    inputs: tl.constexpr = (D + C.BD - 1) // C.BD
    programs: tl.constexpr = ((D + C.BC - 1) // C.BC) * inputs  # of a layer
    inside = tl.program_id(0) % programs
    o_c, o_d = _tile_of(inside, D, C)
    block = tl.program_id(0) // programs
    layer = block % S.LAYERS
    split = block // S.LAYERS
    grad = grad_projections + layer.to(tl.int64) * B * K * D
    b_scale = tl.load(scale)
    first = inside % inputs == 0
    b_weight = tl.full([C.BD, C.BC], 0.0, tl.float32)  # dWᵀ: X is the first factor and stays in registers
    b_bias = tl.full([C.BC], 0.0, tl.float32)
    end = min(tl.cdiv(B, P.BI) * tl.cdiv(K, P.BK), (split + 1) * SPLIT)
    for tile in range(split * SPLIT, end):
        pairs = pair_rows(tile, B, K, P.BI, P.BK)
        b_f, b_h = unit_features(features, b_scale, pairs, o_d, D, C.BD)
        b_x = outer_rows(b_f, b_h).to(features.image.dtype.element_ty)  # a tile of X: [BR, BD]
        b_grad = load_rows(grad, pairs.o_r, pairs.m_r, o_c, D, C.BC)  # [BR, BC]
        b_weight = tl.dot(tl.trans(b_x), b_grad, b_weight, input_precision=S.PRECISION)
        if first:
            b_bias += tl.sum(b_grad.to(tl.float32), 0)
    p_out = parts + block.to(tl.int64) * (D + 1) * D
    store_rows(p_out, tl.trans(b_weight), o_c, o_c < D, o_d, D, C.BD)
    if first:
        tl.store(p_out + D * D + o_c, b_bias, mask=o_c < D)


@triton.jit
def _query_layer(rows, inverse, scale, grad_rows, grad, N, o_c, o_d, S: tl.constexpr, C: tl.constexpr):
    """dW = Σ_n dq[n] (√s u[n]), dc = Σ_n dq[n] of feature rows: dq [N, D] float32, u = rows inverse."""
    D: tl.constexpr = S.D
    b_root = tl.sqrt(tl.load(scale))
    b_weight = tl.full([C.BC, C.BD], 0.0, tl.float32)
    b_bias = tl.full([C.BC], 0.0, tl.float32)
    for start in range(0, N, C.BR):
        o_n = start + tl.arange(0, C.BR)
        m_n = o_n < N
        b_factor = tl.load(inverse + o_n, mask=m_n, other=0.0) * b_root
        b_x = load_rows(rows, o_n, m_n, o_d, D, C.BD).to(tl.float32) * b_factor[:, None]
        b_grad = load_rows(grad_rows, o_n, m_n, o_c, D, C.BC)
        b_operand, b_unit = operand(b_grad, rows.dtype.element_ty)
        b_x = b_x.to(rows.dtype.element_ty)
        b_weight += b_unit * tl.dot(tl.trans(b_operand), b_x, input_precision=S.PRECISION)
        b_bias += tl.sum(b_grad, 0)
    store_rows(grad.weight, b_weight, o_c, o_c < D, o_d, D, C.BD)
    if tl.min(o_d, 0) == 0:
        tl.store(grad.bias + o_c, b_bias.to(grad.bias.dtype.element_ty), mask=o_c < D)


@triton.jit(do_not_specialize=["B", "K"])
def _rational_projection_bwd_queries_kernel(
    features,  # Features
    scale,  # []
    grad_image,  # [B, D] float32: of the image queries
    grad_text,  # [K, D] float32
    grads,  # LayerGrads
    B,
    K,
    S: tl.constexpr,
    C: tl.constexpr,  # GemmConfig: BR rows, BC outputs, BD inputs
):
    D: tl.constexpr = S.D
    o_c, o_d = _tile_of(tl.program_id(0), D, C)
    if S.TEXT and tl.program_id(1) == 0:
        _query_layer(features.text, features.inverse_text, scale, grad_text, grads.query_text, K, o_c, o_d, S, C)
    else:
        _query_layer(features.image, features.inverse_image, scale, grad_image, grads.query_image, B, o_c, o_d, S, C)


@triton.jit(do_not_specialize=["SPLITS", "TILES"])
def _rational_projection_bwd_round_kernel(
    parts,  # [SPLITS, LAYERS, D + 1, D]
    out_weight,  # [D, D] float32
    out_biases,  # [TILES, D] float32
    grads,  # LayerGrads: of the layers over X, and the output layer's
    SPLITS,
    TILES,
    S: tl.constexpr,
    C: tl.constexpr,  # GemmConfig: BC numbers at a time
):
    D: tl.constexpr = S.D
    weight_blocks: tl.constexpr = (D * D + C.BC - 1) // C.BC
    blocks: tl.constexpr = weight_blocks + (D + C.BC - 1) // C.BC
    layer = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    target = grads.key
    if layer == 1:
        target = grads.value
    if S.RATIONAL and layer == 2:
        target = grads.query_rational
    source = parts + layer.to(tl.int64) * (D + 1) * D
    stride = S.LAYERS * (D + 1) * D
    count = SPLITS
    is_weight = block < weight_blocks
    if layer == S.LAYERS:
        target = grads.out
        source = out_weight if is_weight else out_biases
        stride = D
        count = 1 if is_weight else TILES
    elif not is_weight:
        source += D * D
    o_x = (block if is_weight else block - weight_blocks) * C.BC + tl.arange(0, C.BC)
    m_x = o_x < (D * D if is_weight else D)
    b_sum = tl.full([C.BC], 0.0, tl.float32)
    p_part = source + o_x
    for _ in range(count):
        b_sum += tl.load(p_part, mask=m_x, other=0.0)
        p_part += stride
    p_x = (target.weight if is_weight else target.bias) + o_x
    tl.store(p_x, b_sum.to(p_x.dtype.element_ty), mask=m_x)


def layer_grads(
    call: Call,
    projected: Projections,
    attention: AttentionGrads,
    sum_query_text: Tensor,  # [K, D] float32: of attention.query_text over the images
    out: Linear,  # the output layer's gradients: weight [D, D], bias [tiles, D] to be summed, float32
    grads: LayerGrads,
    *,
    config: GemmConfig | None = None,
) -> None:
    """Fills the gradients of the layers in use."""
    batch, classes, width = call.sizes
    shapes, features, scale = call.shapes, call.features(projected), call.params.logit_scale

    def split(c: GemmConfig) -> tuple[PairBlock, int, int, int]:
        pairs = PairBlock.of(batch, classes, c.BR)
        programs = shapes.LAYERS * cdiv(width, c.BC) * cdiv(width, c.BD)
        row_tiles = pairs.tiles(batch, classes)
        tiles = row_split(row_tiles, programs, call.target.device.multiprocessors)
        return pairs, programs, tiles, cdiv(row_tiles, tiles)

    def blocks(c: GemmConfig):
        pairs, programs, tiles, splits = split(c)
        return (splits * programs,), {"P": pairs, "SPLIT": tiles}

    def tensors(c: GemmConfig):
        return {"parts": sum_query_text.new_empty(split(c)[-1], shapes.LAYERS, width + 1, width)}

    launched = call.launch(
        _rational_projection_bwd_weight_kernel, config or call.config(weight_bwd_config), blocks, tensors=tensors,
        features=features, scale=scale, grad_projections=attention.projections, B=batch, K=classes, S=shapes,
    )  # fmt: skip
    if shapes.TEXT or shapes.IMAGE:
        registers = call.config(queries_registers)
        call.launch(
            _rational_projection_bwd_queries_kernel, QUERIES_BWD,
            lambda c: ((cdiv(width, c.BC) * cdiv(width, c.BD), shapes.TEXT + shapes.IMAGE), {**registers}),
            features=features, scale=scale, grad_image=attention.query_image, grad_text=sum_query_text, grads=grads,
            B=batch, K=classes, S=shapes,
        )  # fmt: skip
    parts = launched["parts"]
    call.launch(
        _rational_projection_bwd_round_kernel, ROUND,
        lambda c: (((shapes.LAYERS + 1) * (cdiv(width**2, c.BC) + cdiv(width, c.BC)),), {}),
        parts=parts, out_weight=out.weight, out_biases=out.bias, grads=grads, SPLITS=parts.shape[0],
        TILES=out.bias.shape[0], S=shapes,
    )  # fmt: skip
