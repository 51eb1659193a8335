"""Forward: keys, values and queries from tiles of the rational matrix X that are made in registers.

    image [B, D], text [K, D], six layers  →  Projections

A tile's rows are all pairs of BI images and BK classes: BI + BK rows of features make BI·BK rows of X. One launch makes
all projections: its first programs those of the feature rows, the others those of X, of one layer or of one after the
other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rada_kernels.numerics import ZERO_NORM
from rada_kernels.rational_projection.config import forward_config, layers_of_a_program
from rada_kernels.triton_common.call import Call
from rada_kernels.triton_common.config import GemmConfig, PairBlock, cdiv, next_power
from rada_kernels.triton_common.dialect import (
    load_columns,
    load_rows,
    load_transposed,
    outer,
    outer_rows,
    pair_rows,
    store_rows,
)
from rada_kernels.triton_common.state import Linear, Projections


@triton.jit
def _inverse_norms(rows, o_r, m_r, D: tl.constexpr, ZERO: tl.constexpr, NORMALIZE: tl.constexpr, BW: tl.constexpr):
    """1 / norm of feature rows: 0 for a zero row, 1 without NORMALIZE."""
    b_square = tl.full([o_r.shape[0]], 0.0, tl.float32)
    if NORMALIZE:
        for start in tl.static_range(0, D, BW):
            b_rows = load_rows(rows, o_r, m_r, start + tl.arange(0, BW), D, BW).to(tl.float32)
            b_square += tl.sum(b_rows * b_rows, 1)
        b_norm = tl.sqrt(b_square)
        b_inverse = tl.where(b_norm < ZERO, 0.0, 1.0 / tl.where(b_norm < ZERO, 1.0, b_norm))
    else:
        b_inverse = b_square + 1.0
    return b_inverse


@triton.jit
def _project_features(
    rows, weight, bias, scale, factor, query, inverse, tile, column, N, project,
    S: tl.constexpr, C: tl.constexpr, ZERO: tl.constexpr, NORMALIZE: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """factor (W (√s x / |x|) + c) of a tile of feature rows x, if project; the first columns' program stores 1/|x|."""
    o_r = tile * C.BR + tl.arange(0, C.BR)
    o_c = column * C.BC + tl.arange(0, C.BC)
    m_r = o_r < N
    b_inverse = _inverse_norms(rows, o_r, m_r, S.D, ZERO, NORMALIZE, BW)
    if column == 0:
        tl.store(inverse + o_r, b_inverse, mask=m_r)
    if project:
        b_query = tl.full([C.BR, C.BC], 0.0, tl.float32)
        for start in range(0, S.D, C.BD):
            o_d = start + tl.arange(0, C.BD)
            b_rows = load_rows(rows, o_r, m_r, o_d, S.D, C.BD)  # [BR, BD]
            b_weight = load_transposed(weight, o_c, o_d, S.D, C.BC, C.BD)  # [BD, BC]
            b_query = tl.dot(b_rows, b_weight, b_query, input_precision=S.PRECISION)
        b_factor = tl.sqrt(tl.load(scale)) * b_inverse  # a factor per row may as well multiply the result
        b_query = b_query * b_factor[:, None] + load_columns(bias, o_c, S.D, C.BC)[None, :]
        store_rows(query, b_query * factor, o_r, m_r, o_c, S.D, C.BC)


@triton.jit
def _layer_over_x(layer, query_rational, key, value, factor):
    """Weight, bias, and what the result is multiplied by."""
    weight = key.weight
    bias = key.bias
    layer_factor = 1.0
    if layer == 1:
        weight = value.weight
        bias = value.bias
    if layer == 2:
        weight = query_rational.weight
        bias = query_rational.bias
        layer_factor = factor
    return weight, bias, layer_factor


@triton.jit(do_not_specialize=["B", "K"])
def _rational_projection_fwd_kernel(
    image,  # [B, D]
    text,  # [K, D]
    scale,  # []
    factor,  # of queries
    query_image,  # a Linear each
    query_text,
    query_rational,
    key,
    value,
    out,  # Projections
    B,
    K,
    S: tl.constexpr,
    C: tl.constexpr,  # GemmConfig
    LARGEST: tl.constexpr,  # which are to be cleared
    PEAK: tl.constexpr,
    ZERO: tl.constexpr,
    NORMALIZE: tl.constexpr,
    P: tl.constexpr,  # PairBlock
    LAYERS: tl.constexpr,  # over X, of a program
    BW: tl.constexpr,  # columns of features that are squared at a time
):
    D: tl.constexpr = S.D
    columns: tl.constexpr = (D + C.BC - 1) // C.BC
    pid = tl.program_id(0)
    column = pid % columns
    tile = pid // columns
    image_tiles = tl.cdiv(B, C.BR)
    feature_tiles = image_tiles + tl.cdiv(K, C.BR)
    if tile < feature_tiles:
        is_image = tile < image_tiles
        if is_image and column == 0:
            o_i = tile * C.BR + tl.arange(0, C.BR)
            tl.store(out.arrived + o_i, 0, mask=o_i < B)
            if LARGEST:
                tl.store(out.largest + o_i, 0, mask=o_i < B)
            if PEAK:
                tl.store(out.peak + o_i, 0, mask=o_i < B)
        _project_features(
            image if is_image else text,
            query_image.weight if is_image else query_text.weight,
            query_image.bias if is_image else query_text.bias,
            scale,
            factor,
            out.query_image if is_image else out.query_text,
            out.inverse_image if is_image else out.inverse_text,
            tile if is_image else tile - image_tiles,
            column,
            B if is_image else K,
            S.IMAGE if is_image else S.TEXT,
            S, C, ZERO, NORMALIZE, BW,
        )  # fmt: skip
    else:
        first = (tile - feature_tiles) * LAYERS
        layer = first % S.LAYERS
        weight, bias, layer_factor = _layer_over_x(layer, query_rational, key, value, factor)
        pairs = pair_rows(first // S.LAYERS, B, K, P.BI, P.BK)
        o_c = column * C.BC + tl.arange(0, C.BC)
        b_scale = tl.load(scale)
        b_image = _inverse_norms(image, pairs.o_i, pairs.m_i, D, ZERO, NORMALIZE, BW)
        b_text = _inverse_norms(text, pairs.o_k, pairs.m_k, D, ZERO, NORMALIZE, BW)
        # A flat loop: the first copies of a layer are under way before the results of the one before are stored.
        for n in tl.range(0, LAYERS, flatten=LAYERS > 1):
            if LAYERS > 1:
                layer = (first + n) % S.LAYERS
                weight, bias, layer_factor = _layer_over_x(layer, query_rational, key, value, factor)
            b_factor = b_image * (b_scale * layer_factor)
            b_out = tl.full([C.BR, C.BC], 0.0, tl.float32)
            for start in range(0, D, C.BD):
                o_d = start + tl.arange(0, C.BD)
                b_f = load_rows(image, pairs.o_i, pairs.m_i, o_d, D, C.BD)  # [BI, BD]
                b_h = load_rows(text, pairs.o_k, pairs.m_k, o_d, D, C.BD)  # [BK, BD]
                if image.dtype.element_ty == tl.float16:  # the product of two raw features may overflow
                    b_f = b_f.to(tl.float32) * b_factor[:, None]
                    b_h = b_h.to(tl.float32) * b_text[:, None]
                b_x = outer_rows(b_f, b_h).to(image.dtype.element_ty)  # a tile of X: [BR, BD]
                b_weight = load_transposed(weight, o_c, o_d, D, C.BC, C.BD)
                b_out = tl.dot(b_x, b_weight, b_out, input_precision=S.PRECISION)
            if image.dtype.element_ty != tl.float16:
                b_out *= outer(b_factor, b_text)[:, None]
            b_out += load_columns(bias, o_c, D, C.BC)[None, :] * layer_factor
            p_out = out.projections + layer.to(tl.int64) * B * K * D
            # With several layers the same rows once more, so as not to hold them in registers through the loop.
            rows = pair_rows((first + n) // S.LAYERS, B, K, P.BI, P.BK) if LAYERS > 1 else pairs
            store_rows(p_out, b_out, rows.o_r, rows.m_r, o_c, D, C.BC)


def rational_projection_fwd(call: Call, *, save: bool, config: GemmConfig | None = None) -> Projections:
    """W (√s x / |x|) + c of the feature rows, W x + c of the rows x of X. save: a backward pass follows.

    Queries are multiplied by call.factors[0].
    """
    batch, classes, width = call.sizes
    out = Projections.empty(call.image, call.text, call.options, save)
    layers, linf = call.config(layers_of_a_program, classes), call.options.penalty == "linf"

    def blocks(c: GemmConfig):
        pairs = PairBlock.of(batch, classes, c.BR)
        tiles = call.shapes.LAYERS // layers * pairs.tiles(batch, classes) + cdiv(batch, c.BR) + cdiv(classes, c.BR)
        return (tiles * cdiv(width, c.BC),), {"P": pairs}

    # In the order of Params: the queries of image, text and rational matrix, keys, values.
    query_image, query_text, query_rational, key, value = map(Linear, call.params[0:10:2], call.params[1:10:2])
    call.launch(
        _rational_projection_fwd_kernel, config or call.config(forward_config, classes), blocks,
        image=call.image, text=call.text, scale=call.params.logit_scale, query_image=query_image, query_text=query_text,
        factor=call.factors[0],
        query_rational=query_rational, key=key, value=value, out=out, B=batch, K=classes, S=call.shapes,
        LAYERS=layers, LARGEST=linf, PEAK=linf and save,
        ZERO=ZERO_NORM, NORMALIZE=call.options.normalize, BW=min(128, next_power(width)),
    )  # fmt: skip
    return out
