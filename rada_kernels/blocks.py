"""What the Triton kernels share: their dialect, and the loads and stores of a block.

The dialect, in every kernel of this package:

- `x` is a tensor's pointer and bears the tensor's name; `b_x` is a block of it in registers; `o_` are offsets along
  an axis, `m_` masks. Sizes are capitals: B images, K classes, D width, H heads, E head width.
- Block sizes are BM (rows of scores), BN (columns of scores, which are classes), BR (rows of width D), BI and BK (the
  images and the classes whose pairs are those rows: BR = BI·BK), BC (columns that are written), BD (columns that are
  contracted), BE (E padded to a power of two).
- Rows of the last axis are contiguous. Row offsets are int64 before they are multiplied.
- Products accumulate in float32 with `input_precision=PRECISION`; a result is rounded once, when it is stored.
- Scores are in base 2: log2(e) is folded into the factor, and exp2 takes the place of exp.
- Launches pass every argument by keyword.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(x, o_r, m_r, o_c, stride, C: tl.constexpr, BC: tl.constexpr):
    """Rows o_r of x at columns o_c: [rows, BC], zero where m_r is false. C is a multiple of BC or less than BC."""
    p_x = x + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
    if C % BC == 0:
        return tl.load(p_x, mask=m_r[:, None], other=0.0)
    return tl.load(p_x, mask=m_r[:, None] & (o_c[None, :] < C), other=0.0)


@triton.jit
def store_rows(x, b_x, o_r, m_r, o_c, stride, C: tl.constexpr, BC: tl.constexpr):
    """Round a block [rows, BC] and store it in rows o_r of x at columns o_c."""
    p_x = x + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
    m_x = m_r[:, None]
    if C % BC != 0:
        m_x = m_x & (o_c[None, :] < C)
    tl.store(p_x, b_x.to(x.dtype.element_ty), mask=m_x)


@triton.jit
def load_transposed(weight, o_out, o_in, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr):
    """A block of Wᵀ: [BD, BC] from a layer's weight [D, D]."""
    p_w = weight + o_out[None, :] * D + o_in[:, None]
    if D % BC == 0 and D % BD == 0:
        return tl.load(p_w)
    return tl.load(p_w, mask=(o_out[None, :] < D) & (o_in[:, None] < D), other=0.0)


@triton.jit
def load_columns(bias, o_c, D: tl.constexpr, BC: tl.constexpr):
    """A block [BC] of a vector of width D, in float32."""
    if D % BC == 0:
        return tl.load(bias + o_c).to(tl.float32)
    return tl.load(bias + o_c, mask=o_c < D, other=0.0).to(tl.float32)


@triton.jit
def pair_rows(tile, B, K, BI: tl.constexpr, BK: tl.constexpr):
    """A tile's images [BI] and classes [BK] with masks, and their pairs as rows of [B·K]: offsets [BR] and mask."""
    tiles = tl.cdiv(K, BK)
    o_i = tile // tiles * BI + tl.arange(0, BI)
    o_k = tile % tiles * BK + tl.arange(0, BK)
    m_i = o_i < B
    m_k = o_k < K
    o_r = (o_i.to(tl.int64)[:, None] * K + o_k[None, :]).reshape(BI * BK)
    m_r = (m_i[:, None] & m_k[None, :]).reshape(BI * BK)
    return o_i, m_i, o_k, m_k, o_r, m_r


@triton.jit
def products_of_pairs(b_image, b_text):
    """b_image[i] * b_text[k] of all pairs: [BI, BD], [BK, BD] -> [BR, BD]."""
    b_pairs = b_image[:, None, :] * b_text[None, :, :]
    return b_pairs.reshape(b_image.shape[0] * b_text.shape[0], b_image.shape[1])


@triton.jit
def factors_of_pairs(b_image, b_text):
    """b_image[i] * b_text[k] of all pairs: [BI], [BK] -> [BR]."""
    return (b_image[:, None] * b_text[None, :]).reshape(b_image.shape[0] * b_text.shape[0])
