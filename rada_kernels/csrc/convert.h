// Copies between the arrays that the loops take and matrices of another type, layout or alignment.
#pragma once

#include "call.h"
#include "vector.h"

namespace RADA_ISA {

using rada::Matrix;
using rada::Type;

// ---- one vector of each type

struct FloatNumbers {
  typedef uint32_t bits;
  typedef uvec vector;

  static RADA_INLINE vec decode(uvec v) { return (vec)v; }
  static RADA_INLINE uvec encode(vec x) { return (uvec)x; }
};

constexpr uint32_t FLOAT_INFINITY = 0x7f800000;  // in bits; those of a NaN are above

// Written to the nearest, ties to even, and so are the halves below. Subnormal numbers keep their value.
struct Bfloat16Numbers {
  typedef uint16_t bits;
  typedef half_vec vector;

  static RADA_INLINE vec decode(half_vec v) { return widen(v); }
  static RADA_INLINE half_vec encode(vec x) {
    const uvec bits = (uvec)x;
    const uvec nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return cut_to_halves((uvec)magnitude(x) > FLOAT_INFINITY ? bits >> 16 | 0x40 : nearest);
  }
};

struct HalfNumbers {
  typedef uint16_t bits;
  typedef half_vec vector;

#if defined(__AVX512F__)
  static RADA_INLINE vec decode(half_vec v) { return (vec)_mm512_cvtph_ps((__m256i)v); }
  static RADA_INLINE half_vec encode(vec x) { return (half_vec)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
  static RADA_INLINE vec decode(half_vec v) { return (vec)_mm256_cvtph_ps((__m128i)v); }
  static RADA_INLINE half_vec encode(vec x) { return (half_vec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
  static RADA_INLINE vec decode(half_vec v) {
    constexpr uint32_t LEAST_NORMAL = 0x400, INFINITE = 0x7c00, BIAS = (127 - 15) << 23;
    const uvec bits = low_halves(v), size = bits & 0x7fff, wide = size << 13;
    const uvec large = size < INFINITE ? wide + BIAS : wide + 2 * BIAS;
    const uvec small = (uvec)(__builtin_convertvector((ivec)size, vec) * 0x1p-24f);
    return (vec)((size < LEAST_NORMAL ? small : large) | (bits & 0x8000) << 16);
  }
  static RADA_INLINE half_vec encode(vec x) {
    constexpr uint32_t BIAS = (127 - 15) << 23, LEAST_NORMAL = BIAS + (1 << 23), TOO_LARGE = (127 + 16) << 23;
    const uvec size = (uvec)magnitude(x);
    const uvec normal = (size - BIAS + 0xfff + (size >> 13 & 1)) >> 13;
    const vec magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer, held in the low bits
    const uvec small = (uvec)((vec)size * 0x1p24f + magic) - (uvec)magic;
    const uvec finite = size < LEAST_NORMAL ? small : normal;
    const uvec large = size > FLOAT_INFINITY ? uvec{} + 0x7e00 : uvec{} + 0x7c00;
    return cut_to_halves((size < TOO_LARGE ? finite : large) | ((uvec)x >> 16 & 0x8000));
  }
#endif
};

template <class F>
RADA_INLINE void with_numbers(Type type, F&& f) {
  switch (type) {
    case Type::FLOAT: return f(FloatNumbers());
    case Type::BFLOAT16: return f(Bfloat16Numbers());
    case Type::HALF: return f(HalfNumbers());
  }
}

// ---- matrices

// n numbers of a row, at most W, their first one at `at`; nothing is known of its alignment.
template <class Numbers>
RADA_INLINE vec read(const char* at, int64_t stride, int64_t n) {
  typename Numbers::vector v{};
  if (stride == 1 && n == W)
    std::memcpy(&v, at, sizeof v);
  else
    for (int64_t i = 0; i < n; i++) {
      typename Numbers::bits x;
      std::memcpy(&x, at + i * stride * (int64_t)sizeof x, sizeof x);
      v[i] = x;
    }
  return Numbers::decode(v);
}

// Rows of a matrix of any type, ld apart, which a product decodes as it reads them.
template <class Numbers>
struct DecodedRows {
  const typename Numbers::bits* at;
  int64_t ld;

  DecodedRows from(int64_t row) const { return {at + row * ld, ld}; }
  // Of the first row, n numbers from i on; zeros past them.
  RADA_INLINE vec words_at(int64_t i, int64_t n) const { return read<Numbers>((const char*)(at + i), 1, n); }
};

template <class Numbers>
RADA_INLINE void write(char* at, int64_t stride, int64_t n, vec x) {
  const typename Numbers::vector v = Numbers::encode(x);
  if (stride == 1 && n == W)
    std::memcpy(at, &v, sizeof v);
  else
    for (int64_t i = 0; i < n; i++) {
      const typename Numbers::bits bits = v[i];
      std::memcpy(at + i * stride * (int64_t)sizeof bits, &bits, sizeof bits);
    }
}

template <class To, class From>
void convert_row(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t n) {
  constexpr int64_t to_bytes = sizeof(typename To::bits), from_bytes = sizeof(typename From::bits);
  int64_t i = 0;
  if (to_stride == 1 && from_stride == 1)
    for (; i + W <= n; i += W) write<To>(to + i * to_bytes, 1, W, read<From>(from + i * from_bytes, 1, W));
  for (; i < n; i += W) {
    const int64_t count = n - i < W ? n - i : W;
    const vec x = read<From>(from + i * from_stride * from_bytes, from_stride, count);
    write<To>(to + i * to_stride * to_bytes, to_stride, count, x);
  }
}

inline void convert(const Matrix& to, const Matrix& from) {
  with_numbers(from.type, [&](auto source) {
    with_numbers(to.type, [&](auto target) {
      for (int64_t row = 0; row < from.rows; row++)
        convert_row<decltype(target), decltype(source)>((char*)to.block(row, 1, 0, to.columns).at, to.column_stride,
                                                        (const char*)from.block(row, 1, 0, from.columns).at,
                                                        from.column_stride, from.columns);
    });
  });
}

}  // namespace RADA_ISA
