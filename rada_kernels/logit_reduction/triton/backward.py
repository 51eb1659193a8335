"""Backward: the output layer again, and the gradients of its input, its weight and bias, and R through the sums.

dsums [B, K], ddeviation [B], O, Projections, output layer  →  ReductionGrads
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.logit_reduction.config import backward_config
from rada_kernels.logit_reduction.triton.forward import launch_arguments, output_block, place_of
from rada_kernels.options import Wanted
from rada_kernels.triton_common.call import Call
from rada_kernels.triton_common.config import GemmConfig, PairBlock, cdiv
from rada_kernels.triton_common.dialect import outer, outer_rows, pair_rows, store_rows, unit_features
from rada_kernels.triton_common.state import Linear, Projections, ReductionGrads


@triton.jit(do_not_specialize=["B", "K"])
def _logit_reduction_bwd_kernel(
    rows,  # [B, K, D] O, the output layer's input
    weight,  # [D, D]
    bias,  # [D]
    features,  # Features
    peak,  # [B] int64, "linf": bits and place of the largest |M - 1|
    grad_sums,  # [B, K]
    grad_deviation,  # [B]
    grad_out,  # [B, K, D] of the output layer's result
    grad_biases,  # [tiles of rows, D] a tile's part of the output bias's, LAYERS
    masked,  # [B, K, D] of R through the sums: grad_sums M, FEATURES
    B,
    K,
    S: tl.constexpr,
    C: tl.constexpr,  # GemmConfig
    P: tl.constexpr,  # PairBlock
    PENALTY: tl.constexpr,  # "none" without grad_deviation
    LAYERS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    D: tl.constexpr = S.D
    columns: tl.constexpr = (D + C.BC - 1) // C.BC
    tile = tl.program_id(0) // columns
    column = tl.program_id(0) % columns
    pairs = pair_rows(tile, B, K, P.BI, P.BK)
    o_c = column * C.BC + tl.arange(0, C.BC)
    b_change = output_block(rows, weight, bias, pairs, o_c, S, C)
    b_upstream = tl.load(grad_sums + pairs.o_r, mask=pairs.m_r, other=0.0)[:, None]  # [BR, 1]
    b_f, b_h = unit_features(features, 1.0, pairs, o_c, D, C.BC)
    b_grad = b_upstream * outer_rows(b_f, b_h)
    if PENALTY != "none":
        b_deviation = tl.load(grad_deviation + pairs.o_i, mask=pairs.m_i, other=0.0)
        b_deviation = outer(b_deviation, pairs.m_k.to(tl.float32))[:, None]  # 0 in rows that there are not
        if PENALTY == "linf":
            b_peak = tl.load(peak + pairs.o_i, mask=pairs.m_i, other=0)
            b_place = place_of(b_peak)[:, None] - pairs.o_k.to(tl.int64)[None, :] * D  # d, if of this class
            m_place = (b_place >= 0) & (b_place < D) & (b_peak >= 1 << 32)[:, None]  # a largest of 0 has no gradient
            b_place = tl.where(m_place, b_place, -1).to(tl.int32).reshape(C.BR)[:, None]
            b_signed = tl.where(b_change > 0.0, b_deviation, -b_deviation)
            b_grad += tl.where(b_place == o_c[None, :], b_signed, 0.0)
        elif PENALTY == "l1":
            b_sign = tl.where(b_change > 0.0, 1.0, tl.where(b_change < 0.0, -1.0, 0.0))
            b_grad += b_deviation * b_sign / (K * 1.0 * D)
        else:
            b_grad += b_deviation * b_change * 2.0 / (K * 1.0 * D)
    b_grad = tl.where(b_change > -1.0, b_grad, 0.0)  # relu passes none at M = 0
    if LAYERS:
        p_bias = grad_biases + tile.to(tl.int64) * D + o_c
        tl.store(p_bias, tl.sum(b_grad, 0), mask=o_c < D)
    store_rows(grad_out, b_grad, pairs.o_r, pairs.m_r, o_c, D, C.BC)
    if FEATURES:
        store_rows(masked, b_upstream * (1.0 + b_change), pairs.o_r, pairs.m_r, o_c, D, C.BC)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed and returned in float32; torch's own 16-bit products may round partial sums to 16 bits."""
    if left.dtype == torch.float32:
        return left @ right
    if torch.version.hip or left.is_cpu:  # torch has no such product there
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def logit_reduction_bwd(
    call: Call,
    projected: Projections,
    rows: Tensor,  # [B, K, D] of the forward pass
    grad_sums: Tensor,  # [B, K]
    grad_deviation: Tensor | None,  # [B]
    wanted: Wanted,
    *,
    config: GemmConfig | None = None,
) -> ReductionGrads:
    batch, classes, width = call.sizes
    features = wanted.image or wanted.text
    grad_out = call.image.new_empty(batch, classes, width)
    # Gradients of R are as large as the logit scale times the loss scale: beyond float16's range.
    range_dtype = torch.float32 if call.dtype == torch.float16 else call.dtype
    masked = call.image.new_empty(batch * features, classes, width, dtype=range_dtype)

    def blocks(c: GemmConfig):
        pairs = PairBlock.of(batch, classes, c.BR)
        return (pairs.tiles(batch, classes) * cdiv(width, c.BC),), {"P": pairs}

    def tensors(c: GemmConfig):
        tiles = PairBlock.of(batch, classes, c.BR).tiles(batch, classes) * wanted.layers
        return {"grad_biases": call.image.new_empty(tiles, width, dtype=torch.float32)}

    launched = call.launch(
        _logit_reduction_bwd_kernel, config or call.config(backward_config, classes), blocks, tensors=tensors,
        **launch_arguments(call, projected), rows=rows, peak=projected.peak, grad_sums=grad_sums,
        grad_deviation=grad_sums if grad_deviation is None else grad_deviation,
        grad_out=grad_out, masked=masked, LAYERS=wanted.layers, FEATURES=features,
        PENALTY="none" if grad_deviation is None else call.options.penalty,
    )  # fmt: skip
    flat = grad_out.flatten(0, 1)
    layer = Linear(_product(flat.t(), rows.flatten(0, 1)), launched["grad_biases"]) if wanted.layers else None
    return ReductionGrads((flat @ call.params.out_weight).view_as(grad_out), masked, layer)
