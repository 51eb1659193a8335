// Copies between the arrays that the loops take and matrices of another type, layout or alignment.
#pragma once

#include "call.h"
#include "vector.h"

namespace RADA_ISA {

using rada::Matrix;
using rada::Type;

typedef uint16_t short_vec __attribute__((vector_size(W * 2), may_alias));

// ---- one vector: 16 bits in the low half of a lane

constexpr uint32_t FLOAT_INFINITY = 0x7f800000;  // in bits; those of a NaN are above

RADA_INLINE vec from_half(uvec bits) {
  constexpr uint32_t LEAST_NORMAL = 0x400, INFINITE = 0x7c00, BIAS = (127 - 15) << 23;
  const uvec size = bits & 0x7fff, wide = size << 13;
  const uvec large = size < INFINITE ? wide + BIAS : wide + 2 * BIAS;
  const uvec small = (uvec)(__builtin_convertvector((ivec)size, vec) * 0x1p-24f);
  return (vec)((size < LEAST_NORMAL ? small : large) | (bits & 0x8000) << 16);
}

// To the nearest, ties to even.
RADA_INLINE uvec to_half(vec x) {
  constexpr uint32_t BIAS = (127 - 15) << 23, LEAST_NORMAL = BIAS + (1 << 23), TOO_LARGE = (127 + 16) << 23;
  const uvec size = (uvec)magnitude(x);
  const uvec normal = (size - BIAS + 0xfff + (size >> 13 & 1)) >> 13;
  const vec magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer, held in the low bits
  const uvec small = (uvec)((vec)size * 0x1p24f + magic) - (uvec)magic;
  const uvec finite = size < LEAST_NORMAL ? small : normal;
  const uvec large = size > FLOAT_INFINITY ? uvec{} + 0x7e00 : uvec{} + 0x7c00;
  return (size < TOO_LARGE ? finite : large) | ((uvec)x >> 16 & 0x8000);
}

RADA_INLINE vec from_bfloat16(uvec bits) { return (vec)(bits << 16); }

RADA_INLINE uvec to_bfloat16(vec x) {
  const uvec bits = (uvec)x;
  const uvec nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return (uvec)magnitude(x) > FLOAT_INFINITY ? bits >> 16 | 0x40 : nearest;
}

// ---- matrices

// n numbers of a row, at most W, their first one at `at`; nothing is known of its alignment.
template <class Bits, class Vector>
RADA_INLINE uvec read(const void* at, int64_t stride, int64_t n) {
  Vector v{};
  if (stride == 1 && n == W)
    std::memcpy(&v, at, sizeof v);
  else
    for (int64_t i = 0; i < n; i++) {
      Bits x;
      std::memcpy(&x, (const char*)at + i * stride * (int64_t)sizeof x, sizeof x);
      v[i] = x;
    }
  return __builtin_convertvector(v, uvec);
}

template <class Bits, class Vector>
RADA_INLINE void write(void* at, int64_t stride, int64_t n, uvec bits) {
  const Vector v = __builtin_convertvector(bits, Vector);
  if (stride == 1 && n == W)
    std::memcpy(at, &v, sizeof v);
  else
    for (int64_t i = 0; i < n; i++) {
      const Bits x = v[i];
      std::memcpy((char*)at + i * stride * (int64_t)sizeof x, &x, sizeof x);
    }
}

inline void convert(const Matrix& to, const Matrix& from) {
  for (int64_t row = 0; row < from.rows; row++)
    for (int64_t column = 0; column < from.columns; column += W) {
      const int64_t n = from.columns - column < W ? from.columns - column : W, stride = from.column_stride;
      const void* source = from.block(row, 1, column, n).at;
      vec x;
      if (from.type == Type::FLOAT)
        x = (vec)read<uint32_t, uvec>(source, stride, n);
      else if (from.type == Type::HALF)
        x = from_half(read<uint16_t, short_vec>(source, stride, n));
      else
        x = from_bfloat16(read<uint16_t, short_vec>(source, stride, n));
      void* target = to.block(row, 1, column, n).at;
      if (to.type == Type::FLOAT)
        write<uint32_t, uvec>(target, to.column_stride, n, (uvec)x);
      else if (to.type == Type::HALF)
        write<uint16_t, short_vec>(target, to.column_stride, n, to_half(x));
      else
        write<uint16_t, short_vec>(target, to.column_stride, n, to_bfloat16(x));
    }
}

}  // namespace RADA_ISA
