"""Backward of the sum Σ_n A_n: the mean's 1 / KINDS is part of `grad_factor`.

    dO [B, K, D], Projections, Attended  →  AttentionGrads

With P = A_n: dS = P (dP - delta) / (√E τ), dP = dO Vᵀ the same for every query kind, and one delta per (image, head,
query kind). Three or four launches: what all rows share and the image query's row (joint); delta, from the stored rows
in 16 bits, in float32 from the P and dP that the gradients are made of, because rounded rows would show where
dP - delta cancels; the queries' gradients by score rows; the keys' and values' by classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rada_kernels.mask_attention.config import (
    by_descriptors,
    joint_bwd_config,
    joint_bwd_registers,
    keys_bwd_config,
    keys_bwd_registers,
    queries_bwd_config,
    queries_bwd_registers,
)
from rada_kernels.mask_attention.triton.forward import in_base_2, launch_arguments, of_kinds, unit_offsets
from rada_kernels.triton_common.blocks import Blocks, head_blocks
from rada_kernels.triton_common.call import Call
from rada_kernels.triton_common.config import AttentionConfig, cdiv
from rada_kernels.triton_common.dialect import (
    add_dot,
    add_heads,
    dot_rows,
    dot_transposed,
    load_classes,
    load_head,
    scale_head,
    store_head,
    sum_rows,
    zero_head,
)
from rada_kernels.triton_common.state import Attended, AttentionGrads, Projections


@triton.jit
def _joint_normaliser(m, l, o_tiles, T, BT: tl.constexpr):
    """The largest score of all pairs of classes, and the sum of exp2(score - it), from those of the row tiles."""
    b_top = tl.full([BT], float("-inf"), tl.float32)
    for start in range(0, T, BT):
        o_t = start + tl.arange(0, BT)
        b_top = tl.maximum(b_top, tl.load(m + o_tiles + o_t, mask=o_t < T, other=float("-inf")))
    b_m = tl.max(b_top, 0)
    b_sum = tl.full([BT], 0.0, tl.float32)
    for start in range(0, T, BT):
        o_t = start + tl.arange(0, BT)
        b_share = tl.exp2(tl.load(m + o_tiles + o_t, mask=o_t < T, other=float("-inf")) - b_m)
        b_sum += b_share * tl.load(l + o_tiles + o_t, mask=o_t < T, other=0.0)
    return b_m, tl.sum(b_sum, 0)


@triton.jit
def _image_row(keys, values, b_q, b_dO, o_k, K, factor, S: tl.constexpr):
    """A block of classes: keys [BN, E], the image query's scores and their dP [BN].

    b_q: [16, E], zero but for its first row: scores are products of the precision of all others.
    """
    m_k = o_k < K
    o_d = o_k.to(tl.int64) * S.D
    b_k = load_head(keys + o_d, m_k, S.E)
    b_s = tl.sum(dot_transposed(b_q, b_k, S), 0) * factor
    b_s = tl.where(m_k, b_s, float("-inf"))
    return b_k, b_s, dot_rows(load_head(values + o_d, m_k, S.E), b_dO)


class Joint(NamedTuple):
    """What all rows of an (image, head) share: P = unit scale exp2(score - m); and the image query's row.

    float16 ends at 65504, and P goes up to K: there `unit` is a power of two, scale is from 1 to 2, and what a product
    takes in 16 bits is P / unit. Its sum is multiplied in float32. For other dtypes `unit` is 1.
    """

    m: Tensor  # [matrix kinds, B, H] largest score of all pairs of classes
    scale: Tensor  # [matrix kinds, B, H] K / their sum of exp2(score - m), over unit
    unit: Tensor  # [matrix kinds, B, H]
    delta: Tensor  # [matrix kinds, B, H]
    image_dO: Tensor  # [B, D] Σ_i dO[i]
    image_P: Tensor  # [B, H, K]
    image_dS: Tensor  # [B, H, K]


@triton.jit(do_not_specialize=["B", "K", "T"])
def _mask_attention_bwd_joint_kernel(
    dO,  # [B, K, D]
    projected,  # Projections
    attended,  # Attended
    joint,  # Joint: delta if ROWS
    grad_query_image,  # [B, D]
    B,
    K,
    T,
    factor,  # of products of a query and a key
    grad_factor,  # 1 / (√E τ KINDS)
    S: tl.constexpr,
    C: tl.constexpr,  # AttentionConfig
    ROWS: tl.constexpr,  # delta = Σ_i dO[i] · O_n[i] / K from the stored rows
    TILE: tl.constexpr,  # of the forward pass
):
    """What all rows of an (image, head) share, and everything about the image's row: K numbers, not K²."""
    MATRIX: tl.constexpr = S.MATRIX
    unit = tl.program_id(0)  # (image, head)
    units = B * S.H
    _, o_image, o_rows, plane = unit_offsets(unit, B, K, S)
    b_joint = ()
    b_deltas = ()
    for n in tl.static_range(MATRIX):
        b_m, b_l = _joint_normaliser(attended.m, attended.l, (n * units + unit) * T, T, 64)
        tl.store(joint.m + n * units + unit, b_m)
        b_unit = 1.0
        if dO.dtype.element_ty == tl.float16:
            b_unit = tl.exp2(tl.floor(tl.log2(K / b_l)))
        tl.store(joint.scale + n * units + unit, K / b_l / b_unit)
        tl.store(joint.unit + n * units + unit, b_unit)
        b_joint += ((b_m, b_l),)
        b_deltas += (tl.full([C.BN], 0.0, tl.float32),)
    b_sum_dO = zero_head(1, S.E)
    for start in range(0, K, C.BN):
        o_k = start + tl.arange(0, C.BN)
        m_k = o_k < K
        o_d = o_rows + o_k.to(tl.int64) * S.D
        b_dO = load_head(dO + o_d, m_k, S.E)  # [BN, E]
        b_sum_dO = add_heads(b_sum_dO, sum_rows(b_dO))
        if ROWS:
            b_new = ()
            for n in tl.static_range(MATRIX):
                o_tile = (n * units + unit) * T + o_k // TILE
                b_share = tl.exp2(tl.load(attended.m + o_tile, mask=m_k, other=float("-inf")) - b_joint[n][0])
                b_share *= tl.load(attended.l + o_tile, mask=m_k, other=0.0) / b_joint[n][1]
                b_rows = load_head(attended.rows + n * plane + o_d, m_k, S.E)
                b_new += (b_deltas[n] + b_share * dot_rows(b_rows, b_dO),)
            b_deltas = b_new
    if ROWS:
        for n in tl.static_range(MATRIX):
            tl.store(joint.delta + n * units + unit, tl.sum(b_deltas[n], 0))
    if S.IMAGE:
        o_one = tl.arange(0, 1)
        store_head(joint.image_dO + o_image + o_one, b_sum_dO, o_one == 0, S.E)
        o_16 = tl.arange(0, 16)
        b_q = load_head(projected.query_image + o_image + o_16 * 0, o_16 == 0, S.E)  # [16, E]
        keys = projected.projections + o_rows
        # A softmax of its own again: rounded otherwise, the forward pass's would not cancel where dP - delta does.
        row_m = float("-inf")
        row_l = 0.0
        row_delta = 0.0
        for start in range(0, K, C.BN):
            o_k = start + tl.arange(0, C.BN)
            b_k, b_s, b_dP = _image_row(keys, keys + plane, b_q, b_sum_dO, o_k, K, factor, S)
            new_m = tl.maximum(row_m, tl.max(b_s, 0))
            b_p = tl.exp2(b_s - new_m)
            decay = tl.exp2(row_m - new_m)
            row_l = row_l * decay + tl.sum(b_p, 0)
            row_delta = row_delta * decay + tl.sum(b_p * b_dP, 0)
            row_m = new_m
        row_delta /= row_l
        b_dq = zero_head(1, S.E)
        for start in range(0, K, C.BN):
            o_k = start + tl.arange(0, C.BN)
            b_k, b_s, b_dP = _image_row(keys, keys + plane, b_q, b_sum_dO, o_k, K, factor, S)
            b_p = tl.exp2(b_s - row_m) / row_l
            b_dS = b_p * (b_dP - row_delta)
            tl.store(joint.image_P + unit.to(tl.int64) * K + o_k, b_p, mask=o_k < K)
            tl.store(joint.image_dS + unit.to(tl.int64) * K + o_k, b_dS, mask=o_k < K)
            b_dq = add_heads(b_dq, sum_rows(scale_head(b_k, b_dS[:, None])))
        store_head(grad_query_image + o_image + o_one, scale_head(b_dq, grad_factor), o_one == 0, S.E)


@triton.jit
def _weights(b_q, b_k, m, scale, start, K, factor, BN: tl.constexpr, S: tl.constexpr):
    """P of a block of classes from `start` on: [BM, BN]; zero past the last class."""
    b_s = in_base_2(dot_transposed(b_q, b_k, S), factor, b_q[0].dtype)
    if start + BN > K:  # the last block alone
        b_s = tl.where((start + tl.arange(0, BN) < K)[None, :], b_s, float("-inf"))
    if b_q[0].dtype == tl.float32:
        return tl.exp2(b_s - m) * scale
    else:  # rounded at the size of the scores: nothing to what rounding P to 16 bits is
        return tl.exp2(b_s - (m - tl.log2(scale)))


@triton.jit
def _sum(b_parts):
    b_sum = b_parts[0]
    for n in tl.static_range(1, len(b_parts)):
        b_sum += b_parts[n]
    return b_sum


@triton.jit
def _row_tile(K, BM: tl.constexpr):
    """A program's (image, head), row tile and class rows [BM]."""
    T = tl.cdiv(K, BM)
    tile = tl.program_id(0) % T  # neighbours read the same keys and values
    return tl.program_id(0) // T, tile, T, tile * BM + tl.arange(0, BM)


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_bwd_queries_kernel(
    dO,  # [B, K, D]
    projected,  # Projections
    blocks,  # head_blocks of the projections [LAYERS B, K, D], or none
    joint,  # Joint
    grads,  # AttentionGrads: text and rational queries are written, unless DELTA
    parts,  # [2, matrix kinds, B, H, T] each row tile's Σ P dP and Σ P, DELTA
    B,
    K,
    factor,  # of products of a query and a key
    grad_factor,  # 1 / (√E τ KINDS)
    S: tl.constexpr,
    C: tl.constexpr,  # AttentionConfig
    DELTA: tl.constexpr,
):
    """DELTA: delta from the very P and dP that the gradients are made of, over the sum of that P: exact where one pair
    has all the weight, whatever its score was rounded to in another kernel.
    """
    unit, tile, T, o_r = _row_tile(K, C.BM)
    image, head = unit // S.H, unit % S.H
    o_head, _, o_rows, plane = unit_offsets(unit, B, K, S)
    o_d = o_r.to(tl.int64) * S.D
    keys = projected.projections + o_rows
    queries = of_kinds(projected.query_text + o_head, keys + 2 * plane, S)
    grad_queries = of_kinds(grads.query_text + o_rows, grads.projections + 2 * plane + o_rows, S)
    b_dO = load_head(dO + o_rows + o_d, o_r < K, S.E)  # [BM, E]
    b_kinds = ()
    b_sums = ()
    for n in tl.static_range(len(queries)):
        o_kind = n * B * S.H + unit
        b_scale = tl.load(joint.scale + o_kind)
        b_q = load_head(queries[n] + o_d, o_r < K, S.E)
        if DELTA:  # (K / l) / K is 1 where l is
            b_kinds += ((b_q, tl.load(joint.m + o_kind), b_scale / K, 0.0),)
            b_sums += ((tl.full([C.BM], 0.0, tl.float32), tl.full([C.BM], 0.0, tl.float32)),)
        else:
            b_kinds += ((b_q, tl.load(joint.m + o_kind), b_scale, tl.load(joint.delta + o_kind)),)
            b_sums += (zero_head(C.BM, S.E),)
    for start in range(0, K, C.BN):
        b_k = load_classes(blocks, keys, image, start, K, head, S, C.BN)  # [BN, E]
        b_v = load_classes(blocks, keys + plane, B + image, start, K, head, S, C.BN)
        b_dP = dot_transposed(b_dO, b_v, S)  # [BM, BN]
        b_new = ()
        for n in tl.static_range(len(queries)):
            b_q, b_m, b_scale, b_delta = b_kinds[n]
            b_p = _weights(b_q, b_k, b_m, b_scale, start, K, factor, C.BN, S)
            if DELTA:
                b_new += ((b_sums[n][0] + tl.sum(b_p * b_dP, 1), b_sums[n][1] + tl.sum(b_p, 1)),)
            else:
                b_dS = (b_p * (b_dP - b_delta)).to(b_k[0].dtype)
                b_new += (add_dot(b_sums[n], b_dS, b_k, S),)
        b_sums = b_new
    for n in tl.static_range(len(queries)):
        if DELTA:
            for i in tl.static_range(2):
                o_part = ((i * S.MATRIX + n) * B * S.H + unit) * T + tile
                tl.store(parts + o_part, tl.sum(tl.where(o_r < K, b_sums[n][i], 0.0), 0))
        else:
            b_factor = tl.load(joint.unit + n * B * S.H + unit) * grad_factor
            store_head(grad_queries[n] + o_d, scale_head(b_sums[n], b_factor), o_r < K, S.E)


@triton.jit(do_not_specialize=["B", "K"])
def _mask_attention_bwd_keys_kernel(
    dO,  # [B, K, D]
    projected,  # Projections
    dO_blocks,  # head_blocks of dO, or none
    query_blocks,  # of [1, K, D] text and [LAYERS B, K, D] rational queries
    joint,  # Joint
    grads,  # AttentionGrads: keys and values are written
    B,
    K,
    factor,  # of products of a query and a key
    grad_factor,  # 1 / (√E τ KINDS), over what the queries bear
    S: tl.constexpr,
    C: tl.constexpr,  # AttentionConfig
):
    """Scores are transposed, [BN, BM]: what is rounded for the next product lies as that takes its left operand.

    b_dk is summed in the unit of the query kind whose turn it is, b_dv in the greatest unit and over KINDS at its end.
    """
    MATRIX: tl.constexpr = S.MATRIX
    FLOAT16: tl.constexpr = dO.dtype.element_ty == tl.float16
    unit, _, _, o_n = _row_tile(K, C.BN)
    image, head = unit // S.H, unit % S.H
    o_head, o_image, o_rows, plane = unit_offsets(unit, B, K, S)
    m_n = o_n < K
    o_d = o_n.to(tl.int64) * S.D
    keys = projected.projections + o_rows
    queries = of_kinds(projected.query_text + o_head, keys + 2 * plane, S)
    planes = of_kinds(0, 2 * B + image, S)
    b_k = load_head(keys + o_d, m_n, S.E)  # [BN, E]
    b_v = load_head(keys + plane + o_d, m_n, S.E)
    b_dk = zero_head(C.BN, S.E)
    b_dv = zero_head(C.BN, S.E)
    b_units = ()
    greatest = 0.0
    for n in tl.static_range(MATRIX):
        b_units += (tl.load(joint.unit + n * B * S.H + unit),)
        greatest = tl.maximum(greatest, b_units[n])
    if S.IMAGE:
        o_one = tl.arange(0, 1)
        b_row = tl.load(joint.image_P + unit.to(tl.int64) * K + o_n, mask=m_n, other=0.0)
        b_row_dS = tl.load(joint.image_dS + unit.to(tl.int64) * K + o_n, mask=m_n, other=0.0)
        if FLOAT16 and MATRIX > 0:
            b_row = b_row / greatest
            b_row_dS = b_row_dS / b_units[MATRIX - 1]
        b_dk = scale_head(load_head(projected.query_image + o_image + o_one, o_one == 0, S.E), b_row_dS[:, None])
        b_dv = scale_head(load_head(joint.image_dO + o_image + o_one, o_one == 0, S.E), b_row[:, None])
    for start in range(0, K if S.MATRIX else 0, C.BM):
        b_dO = load_classes(dO_blocks, dO + o_rows, image, start, K, head, S, C.BM)  # [BM, E]
        b_dP = dot_transposed(b_v, b_dO, S)  # [BN, BM]
        b_parts = ()
        for n in tl.static_range(MATRIX):
            o_kind = n * B * S.H + unit
            b_q = load_classes(query_blocks[n], queries[n], planes[n], start, K, head, S, C.BM)
            b_m, b_scale = tl.load(joint.m + o_kind), tl.load(joint.scale + o_kind)
            b_p = _weights(b_k, b_q, b_m, b_scale, start, K, factor, C.BM, S)
            if FLOAT16 and MATRIX == 2:
                b_part = b_p * (b_units[n] / greatest)
                b_dk = scale_head(b_dk, b_units[1 - n] / b_units[n])
            else:
                b_part = b_p
            b_parts += (b_part,)
            b_dS = (b_p * (b_dP - tl.load(joint.delta + o_kind))).to(b_k[0].dtype)
            b_dk = add_dot(b_dk, b_dS, b_q, S)
        b_dv = add_dot(b_dv, _sum(b_parts).to(b_dO[0].dtype), b_dO, S)
    if FLOAT16 and MATRIX > 0:
        b_dk = scale_head(b_dk, b_units[MATRIX - 1])
        b_dv = scale_head(b_dv, greatest)
    grad_keys = grads.projections + o_rows + o_d
    store_head(grad_keys, scale_head(b_dk, grad_factor), m_n, S.E)
    store_head(grad_keys + plane, scale_head(b_dv, 1.0 / S.KINDS), m_n, S.E)


def mask_attention_bwd(call: Call, projected: Projections, attended: Attended, dO: Tensor) -> AttentionGrads:
    """Gradients of the projections, of the text query by image, and of the image query. dO: [B, K, D]"""
    batch, classes, width = call.sizes
    grads = AttentionGrads(
        projections=torch.empty_like(projected.projections),
        query_text=dO.new_empty(batch * call.shapes.TEXT, classes, width),
        query_image=dO.new_empty(batch * call.shapes.IMAGE, width, dtype=torch.float32),
    )
    arguments = launch_arguments(call) | {"dO": dO, "projected": projected}
    arguments["grad_factor"] = call.options.score_factor(width) / call.shapes.KINDS
    joint = mask_attention_bwd_joint(call, attended, grads, arguments)
    if call.shapes.MATRIX:
        if dO.dtype == torch.float32:
            joint = mask_attention_bwd_queries(call, joint, grads, arguments, delta=True)
        mask_attention_bwd_queries(call, joint, grads, arguments)
    mask_attention_bwd_keys(call, joint, grads, arguments)
    return grads


def mask_attention_bwd_joint(call: Call, attended: Attended, grads: AttentionGrads, arguments: dict) -> Joint:
    """arguments: the launch arguments that the backward kernels share. Fills grads.query_image."""
    classes, tiles = call.sizes[1], attended.m.shape[-1]
    m, scale, unit, delta = (attended.m.new_empty(attended.m.shape[:-1]) for _ in range(4))
    images = len(grads.query_image)
    joint = Joint(
        m,
        scale,
        unit,
        delta,
        image_dO=torch.empty_like(grads.query_image),
        image_P=m.new_empty(images, call.shapes.H, classes),
        image_dS=m.new_empty(images, call.shapes.H, classes),
    )
    call.target.launch(
        _mask_attention_bwd_joint_kernel, joint_bwd_config(call.shapes),
        lambda c: ((call.sizes[0] * call.shapes.H,), joint_bwd_registers(call.target, call.shapes)), keep=("BM",),
        **arguments, attended=attended.pointers, joint=joint, grad_query_image=grads.query_image, T=tiles,
        ROWS=call.dtype != torch.float32, TILE=attended.tile,
    )  # fmt: skip
    return joint


def mask_attention_bwd_queries(
    call: Call,
    joint: Joint,
    grads: AttentionGrads,
    arguments: dict,
    *,
    delta: bool = False,
    config: AttentionConfig | None = None,
) -> Joint:
    """Fills the queries' gradients; or, with `delta`, returns joint with delta, and scale by the weights' own sum."""
    batch, classes, _ = call.sizes

    described, registers = call.config(by_descriptors, classes), call.config(queries_bwd_registers, classes)

    def blocks(c: AttentionConfig):
        row_tiles = cdiv(classes, c.BM)
        parts = joint.m.new_empty(2 * delta, call.shapes.MATRIX, batch, call.shapes.H, row_tiles)
        rows = head_blocks(arguments["projected"].projections.flatten(0, 1), c.BN, call.shapes) if described else ()
        return (batch * call.shapes.H * row_tiles,), {"parts": parts, "blocks": rows, **registers}

    launched = call.target.launch(
        _mask_attention_bwd_queries_kernel, config or call.config(queries_bwd_config, classes), blocks,
        joint=joint, grads=grads, DELTA=delta, **arguments
    )  # fmt: skip
    if delta:
        weighted, weights = launched["parts"].sum(-1)
        joint = joint._replace(delta=weighted / weights, scale=joint.scale / weights)
    return joint


def mask_attention_bwd_keys(
    call: Call, joint: Joint, grads: AttentionGrads, arguments: dict, *, config: AttentionConfig | None = None
) -> None:
    """Fills the gradients of keys and values."""
    batch, classes, _ = call.sizes
    described, shapes, projected = call.config(by_descriptors, classes), call.shapes, arguments["projected"]
    registers = call.config(keys_bwd_registers)

    def blocks(c: AttentionConfig):
        def of(rows: Tensor) -> Blocks:
            return head_blocks(rows, c.BM, shapes) if described else ()

        text, everything = projected.query_text.unsqueeze(0), projected.projections.flatten(0, 1)
        queries = [of(rows) for rows, used in ((text, shapes.TEXT), (everything, shapes.RATIONAL)) if used]
        grid = (batch * shapes.H * cdiv(classes, c.BN),)
        return grid, {"dO_blocks": of(arguments["dO"]), "query_blocks": tuple(queries), **registers}

    call.target.launch(
        _mask_attention_bwd_keys_kernel, config or call.config(keys_bwd_config, classes), blocks,
        joint=joint, grads=grads, **arguments | {"grad_factor": arguments["grad_factor"] / call.factors[0]},
    )  # fmt: skip
