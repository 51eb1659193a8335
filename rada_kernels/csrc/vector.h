// Vectors of W floats on top of the compiler's vector extensions: one source for AVX2, AVX-512 and anything else.
// Every file that includes this one is compiled once per instruction set, each time in a namespace of its own
// (RADA_ISA), so that the linker cannot mix them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define RADA_INLINE inline __attribute__((always_inline))

namespace RADA_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;  // lanes
constexpr int MR = 8;  // rows of a register tile
constexpr int NV = 3;  // vectors in each of its rows: MR · NV accumulators, NV + 1 operands
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int MR = 4;
constexpr int NV = 3;
#else
constexpr int W = 4;
constexpr int MR = 4;
constexpr int NV = 4;
#endif

typedef float vec __attribute__((vector_size(W * 4), may_alias));
typedef float vec_at_any_address __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(W * 4), may_alias));

RADA_INLINE vec load(const void* p) { return *static_cast<const vec_at_any_address*>(p); }
RADA_INLINE void store(void* p, vec v) { *static_cast<vec_at_any_address*>(p) = v; }

// The first n lanes, the others zero. n may exceed W.
RADA_INLINE vec load_first(const float* p, int64_t n) {
  if (n >= W) return load(p);
  vec v{};
  std::memcpy(&v, p, n > 0 ? n * sizeof(float) : 0);
  return v;
}
RADA_INLINE void store_first(float* p, vec v, int64_t n) {
  if (n >= W) return store(p, v);
  if (n > 0) std::memcpy(p, &v, n * sizeof(float));
}

RADA_INLINE vec splat(float x) {
#if defined(__AVX512F__)
  return (vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vec)_mm256_set1_ps(x);
#else
  return vec{x, x, x, x};
#endif
}

RADA_INLINE vec larger(vec a, vec b) { return a > b ? a : b; }
RADA_INLINE vec magnitude(vec a) { return (vec)((ivec)a & 0x7fffffff); }

RADA_INLINE float sum(vec v) {
  float s = 0;
  for (int i = 0; i < W; i++) s += v[i];
  return s;
}
RADA_INLINE float largest(vec v) {
  float s = v[0];
  for (int i = 1; i < W; i++) s = v[i] > s ? v[i] : s;
  return s;
}

// Lanes below n keep their value, the others become zero.
RADA_INLINE vec keep_first(vec v, int64_t n) {
  ivec lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  return (vec)((ivec)v & (lane < (int32_t)(n > W ? W : n)));
}

// 2^x to 2e-7 of its value. Below 2^-126 the result is zero or 2^-126, above 2^126 it is at least 2^126 or inf;
// NaN stays NaN. The polynomial is the minimax one of degree 5 on [-1/2, 1/2].
RADA_INLINE vec exp2(vec x) {
#if defined(__AVX512F__)
  const vec n = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  x = x > 126.0f ? splat(126.0f) : x;
  x = x < -126.0f ? splat(-126.0f) : x;
  const vec magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer, held in the low bits
  const vec shifted = x + magic;
  const vec n = shifted - magic;
#endif
  const vec r = x - n;
  vec p = splat(1.32647273e-3f);
  p = p * r + splat(9.67151299e-3f);
  p = p * r + splat(5.55073358e-2f);
  p = p * r + splat(2.40222424e-1f);
  p = p * r + splat(6.93147004e-1f);
  p = p * r + splat(1.0f);
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (vec)(((ivec)shifted << 23) + 0x3f800000);
#endif
}

}  // namespace RADA_ISA
