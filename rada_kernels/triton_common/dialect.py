"""The dialect of the Triton kernels, and the loads, stores and products that they share.

- `x` is a tensor's pointer and bears the tensor's name, `p_x` a pointer into it; `b_x` is a block in registers; `o_`
  are offsets, `m_` masks. Sizes are capitals: B images, K classes, D width, H heads, E head width, T row tiles.
- Blocks: BM rows of scores; BN columns of scores, which are classes; BR rows of width D; BI images and BK classes
  whose pairs are those rows (BR = BI·BK); BC columns written; BD columns contracted at a time.
- Attention has the field's names: m row maximum, l row sum, acc accumulated values, P weights, delta; dO, dP, dS
  gradients. `unit` counts (image, head).
- A kernel takes what is compiled into it as two constants: S, a `Shapes`, and C, the launch configuration. Before
  Triton 3.8 their fields are plain Python values, which jit functions refuse as strings and within lists: S is passed
  as a whole, and `tl.full` stands for `tl.zeros`.
- A head's rows [R, E] are a tuple of pieces, each a power of two wide: 96 = 64 + 32, 72 = 64 + 16 with 8 columns of
  padding, which are zero.
- Rows of the last axis are contiguous. Row offsets are int64 before they are multiplied.
- Products accumulate in float32 with `input_precision=S.PRECISION`; a result is rounded once, when it is stored.
- Scores are in base 2: log2(e) is folded into their factor, and exp2 takes the place of exp.
- Launches pass every argument by keyword.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Pairs(NamedTuple):
    """A tile of image-class pairs as rows of [B·K, D]."""

    o_i: Any  # [BI] images
    m_i: Any
    o_k: Any  # [BK] classes
    m_k: Any
    o_r: Any  # [BR] rows: all pairs
    m_r: Any


@triton.jit
def pair_rows(tile, B, K, BI: tl.constexpr, BK: tl.constexpr):
    tiles = tl.cdiv(K, BK)
    o_i = tile // tiles * BI + tl.arange(0, BI)
    o_k = tile % tiles * BK + tl.arange(0, BK)
    m_i = o_i < B
    m_k = o_k < K
    o_r = (o_i.to(tl.int64)[:, None] * K + o_k[None, :]).reshape(BI * BK)
    m_r = (m_i[:, None] & m_k[None, :]).reshape(BI * BK)
    return Pairs(o_i, m_i, o_k, m_k, o_r, m_r)


@triton.jit
def outer_rows(b_image, b_text):
    """b_image[i] * b_text[k] of all pairs: [BI, BD], [BK, BD] -> [BR, BD]."""
    b_pairs = b_image[:, None, :] * b_text[None, :, :]
    return b_pairs.reshape(b_image.shape[0] * b_text.shape[0], b_image.shape[1])


@triton.jit
def outer(b_image, b_text):
    """b_image[i] * b_text[k] of all pairs: [BI], [BK] -> [BR]."""
    return (b_image[:, None] * b_text[None, :]).reshape(b_image.shape[0] * b_text.shape[0])


@triton.jit
def load_rows(x, o_r, m_r, o_c, D: tl.constexpr, BC: tl.constexpr, m_c=None):
    """Rows o_r of x [R, D] at BC columns o_c: [rows, BC]; zero where m_r or m_c is false. m_c: default o_c < D."""
    p_x = x + o_r.to(tl.int64)[:, None] * D + o_c[None, :]
    if m_c is not None:
        return tl.load(p_x, mask=m_r[:, None] & m_c[None, :], other=0.0)
    elif D % BC == 0:
        return tl.load(p_x, mask=m_r[:, None], other=0.0)
    else:
        return tl.load(p_x, mask=m_r[:, None] & (o_c[None, :] < D), other=0.0)


@triton.jit
def store_rows(x, b_x, o_r, m_r, o_c, D: tl.constexpr, BC: tl.constexpr, m_c=None):
    """Round a block [rows, BC] and store it where load_rows would read it."""
    p_x = x + o_r.to(tl.int64)[:, None] * D + o_c[None, :]
    m_x = m_r[:, None]
    if m_c is not None:
        m_x = m_x & m_c[None, :]
    elif D % BC != 0:
        m_x = m_x & (o_c[None, :] < D)
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=m_x)


@triton.jit
def load_transposed(weight, o_out, o_in, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, m_in=None):
    """A block of Wᵀ: [BD, BC] from a layer's weight [D, D]; zero where m_in is false. m_in: default o_in < D."""
    p_w = weight + o_out[None, :] * D + o_in[:, None]
    if m_in is not None:
        return tl.load(p_w, mask=(o_out[None, :] < D) & m_in[:, None], other=0.0)
    elif D % BC == 0 and D % BD == 0:
        return tl.load(p_w)
    else:
        return tl.load(p_w, mask=(o_out[None, :] < D) & (o_in[:, None] < D), other=0.0)


@triton.jit
def operand(b_x, dtype: tl.constexpr):
    """A float32 block as the operand of a product, and what that has to be multiplied by: in float16, which ends at
    65504, a power of two, else 1.
    """
    if dtype == tl.float16:
        b_unit = tl.exp2(tl.floor(tl.log2(tl.maximum(tl.max(tl.abs(b_x)), 1e-30))))
        return (b_x / b_unit).to(dtype), b_unit
    else:
        return b_x.to(dtype), 1.0


@triton.jit
def unit_features(features, scale, pairs, o_c, D: tl.constexpr, BC: tl.constexpr):
    """scale f [BI, BC] and h [BK, BC] of a tile's pairs, in float32."""
    b_image = tl.load(features.inverse_image + pairs.o_i, mask=pairs.m_i, other=0.0) * scale
    b_text = tl.load(features.inverse_text + pairs.o_k, mask=pairs.m_k, other=0.0)
    b_f = load_rows(features.image, pairs.o_i, pairs.m_i, o_c, D, BC).to(tl.float32) * b_image[:, None]
    b_h = load_rows(features.text, pairs.o_k, pairs.m_k, o_c, D, BC).to(tl.float32) * b_text[:, None]
    return b_f, b_h


@triton.jit
def load_columns(bias, o_c, D: tl.constexpr, BC: tl.constexpr):
    """A block [BC] of a vector [D], in float32."""
    if D % BC == 0:
        return tl.load(bias + o_c).to(tl.float32)
    return tl.load(bias + o_c, mask=o_c < D, other=0.0).to(tl.float32)


@triton.constexpr_function
def pieces(E):
    """Widths of the pieces of a head's E columns: powers of two, the largest first, the last padded.

    From 16 on, beyond 128 from 32: beside a piece of 128 columns one of 16 costs more registers than it saves products.
    """
    least = 16 if E <= 128 else 32
    padded = -(-E // least) * least
    return tuple(1 << bit for bit in reversed(range(padded.bit_length())) if padded >> bit & 1)


@triton.constexpr_function
def piece_start(widths, index):
    """The first column of a piece."""
    return sum(widths[:index])


@triton.jit
def _piece(p_rows, m_r, E: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to a piece of the rows that begin at p_rows [R], and which of them there are."""
    o_e = START + tl.arange(0, WIDTH)
    m_e = m_r[:, None]
    if START + WIDTH > E:
        m_e = m_e & (o_e < E)[None, :]
    return p_rows[:, None] + o_e[None, :], m_e


@triton.jit
def load_head(p_rows, m_r, E: tl.constexpr):
    """E columns of the rows that begin at p_rows [R], zero where m_r [R] is false: pieces [R, their widths]."""
    WIDTHS: tl.constexpr = pieces(E)
    b_head = ()
    for i in tl.static_range(len(WIDTHS)):
        p_e, m_e = _piece(p_rows, m_r, E, piece_start(WIDTHS, i), WIDTHS[i])
        b_head += (tl.load(p_e, mask=m_e, other=0.0),)
    return b_head


@triton.jit
def load_classes(blocks, p_rows, plane, start, K, head, S: tl.constexpr, R: tl.constexpr):
    """A head's rows of the classes from `start` on, zero past the last: pieces [R, their widths].

    By `head_blocks` of [planes, K, D], or, where there are none, from p_rows, where the head of class 0 begins.
    """
    if len(blocks) > 0:
        WIDTHS: tl.constexpr = pieces(S.E)
        b_head = ()
        for i in tl.static_range(len(WIDTHS)):
            b_piece = blocks[i].load([plane, start, head, piece_start(WIDTHS, i)])
            b_head += (b_piece.reshape(R, WIDTHS[i]),)
        return b_head
    else:
        o_r = start + tl.arange(0, R)
        return load_head(p_rows + o_r.to(tl.int64) * S.D, o_r < K, S.E)


@triton.jit
def store_head(p_rows, b_head, m_r, E: tl.constexpr):
    """Round pieces and store them in the rows that begin at p_rows [R]."""
    WIDTHS: tl.constexpr = pieces(E)
    for i in tl.static_range(len(WIDTHS)):
        p_e, m_e = _piece(p_rows, m_r, E, piece_start(WIDTHS, i), WIDTHS[i])
        tl.store(p_e, b_head[i].to(p_rows.dtype.element_ty), mask=m_e)


@triton.jit
def store_classes(blocks, p_rows, plane, start, m_r, head, b_head, S: tl.constexpr):
    """Round pieces and store them where load_classes would read them. p_rows [R]: where the rows begin."""
    if len(blocks) > 0:
        WIDTHS: tl.constexpr = pieces(S.E)
        for i in tl.static_range(len(WIDTHS)):
            b_piece = b_head[i].to(p_rows.dtype.element_ty).reshape(1, b_head[i].shape[0], 1, WIDTHS[i])
            blocks[i].store([plane, start, head, piece_start(WIDTHS, i)], b_piece)
    else:
        store_head(p_rows, b_head, m_r, S.E)


@triton.jit
def zero_head(R: tl.constexpr, E: tl.constexpr):
    """Pieces of float32."""
    WIDTHS: tl.constexpr = pieces(E)
    b_head = ()
    for i in tl.static_range(len(WIDTHS)):
        b_head += (tl.full([R, WIDTHS[i]], 0.0, tl.float32),)
    return b_head


@triton.jit
def scale_head(b_head, b_factor):
    """Pieces times a number or a column [R, 1]."""
    b_scaled = ()
    for i in tl.static_range(len(b_head)):
        b_scaled += (b_head[i] * b_factor,)
    return b_scaled


@triton.jit
def dot_transposed(b_left, b_right, S: tl.constexpr):
    """left rightᵀ of two heads' rows, summed over the pieces: [M, N]."""
    b_sum = tl.dot(b_left[0], tl.trans(b_right[0]), input_precision=S.PRECISION)
    for i in tl.static_range(1, len(b_left)):
        b_sum = tl.dot(b_left[i], tl.trans(b_right[i]), b_sum, input_precision=S.PRECISION)
    return b_sum


@triton.jit
def add_dot(b_sum, b_weights, b_head, S: tl.constexpr):
    """sum + weights head, piece by piece: weights [M, N], head [N, E]."""
    b_new = ()
    for i in tl.static_range(len(b_head)):
        b_new += (tl.dot(b_weights, b_head[i], b_sum[i], input_precision=S.PRECISION),)
    return b_new


@triton.jit
def dot_rows(b_left, b_right):
    """Σ_e left · right in float32, [R]; right may be one row for all, [1, E]."""
    b_sum = tl.sum(b_left[0].to(tl.float32) * b_right[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(b_left)):
        b_sum += tl.sum(b_left[i].to(tl.float32) * b_right[i].to(tl.float32), 1)
    return b_sum


@triton.jit
def add_heads(b_left, b_right):
    """left + right, piece by piece; either may be one row for all, [1, E]."""
    b_sum = ()
    for i in tl.static_range(len(b_left)):
        b_sum += (b_left[i] + b_right[i],)
    return b_sum


@triton.jit
def sum_rows(b_head):
    """Σ_r head[r] in float32: [1, E]."""
    b_sum = ()
    for i in tl.static_range(len(b_head)):
        b_sum += (tl.sum(b_head[i].to(tl.float32), 0, keep_dims=True),)
    return b_sum
