// Vectors of W floats on top of the compiler's vector extensions: one source for AVX2, AVX-512, NEON and anything
// else.
// Every file that includes this one is compiled once per instruction set, each time in a namespace of its own
// (RADA_ISA), so that the linker cannot mix them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define RADA_INLINE inline __attribute__((always_inline))
#define RADA_LAMBDA __attribute__((always_inline))  // after the parameters of a lambda

namespace RADA_ISA {

// In scope, this thread reads subnormal operands as zero and flushes subnormal results to zero (DAZ, FTZ). A sharp
// softmax has many subnormal exponentials, and processors compute with them in microcode.
class SubnormalsAreZero {
 public:
#if defined(__x86_64__)
  SubnormalsAreZero() : before(_mm_getcsr()) { _mm_setcsr(before | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON); }
  ~SubnormalsAreZero() { _mm_setcsr(before); }

 private:
  const uint32_t before;
#elif defined(__aarch64__)
  SubnormalsAreZero() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" : : "r"(before | FZ));
  }
  ~SubnormalsAreZero() { asm volatile("msr fpcr, %0" : : "r"(before)); }

 private:
  static constexpr uint64_t FZ = 1 << 24;
  uint64_t before;
#else
  SubnormalsAreZero() {}  // there is no such mode to set
#endif
};

// W lanes; MR rows of a register tile with NV vectors in each: MR · NV accumulators and NV + 1 operands fit in the
// 32 registers of AVX-512 and NEON, or in the 16 of the others. Two vectors are two of AMX's tiles.
#if defined(__AVX512F__)
constexpr int W = 16, MR = 8;
#elif defined(RADA_TILE_MODEL)
constexpr int W = 16, MR = 4;
#elif defined(__AVX2__)
constexpr int W = 8, MR = 4;
#elif defined(__aarch64__)
constexpr int W = 4, MR = 8;
#else
constexpr int W = 4, MR = 4;
#endif
#if defined(RADA_TILES)
constexpr int NV = 2;
#else
constexpr int NV = 3;
#endif

typedef float vec __attribute__((vector_size(W * 4), may_alias));
typedef float vec_at_any_address __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(W * 4), may_alias));
typedef uint32_t uvec __attribute__((vector_size(W * 4), may_alias));
typedef float word __attribute__((may_alias));  // of an operand: a float, or two bfloat16

RADA_INLINE vec load(const void* p) { return *static_cast<const vec_at_any_address*>(p); }
RADA_INLINE void store(void* p, vec v) { *static_cast<vec_at_any_address*>(p) = v; }

#if defined(__AVX512F__)
RADA_INLINE __mmask16 lanes_below(int64_t n) { return (__mmask16)(n < 0 ? 0 : (1u << n) - 1); }  // n < W
#elif defined(__AVX2__)
RADA_INLINE __m256i lanes_below(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first n lanes, the others zero. n may exceed W. No calls here: what lives across one does not stay in registers.
RADA_INLINE vec load_first(const float* p, int64_t n) {
  if (n >= W) return load(p);
#if defined(__AVX512F__)
  return (vec)_mm512_maskz_loadu_ps(lanes_below(n), p);
#elif defined(__AVX2__)
  return (vec)_mm256_maskload_ps(p, lanes_below(n));
#else
  vec v{};
#pragma GCC unroll 4
  for (int i = 0; i < W; i++)
    if (i < n) v[i] = p[i];
  return v;
#endif
}
RADA_INLINE void store_first(float* p, vec v, int64_t n) {
  if (n >= W) return store(p, v);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, lanes_below(n), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, lanes_below(n), (__m256)v);
#else
#pragma GCC unroll 4
  for (int i = 0; i < W; i++)
    if (i < n) p[i] = v[i];
#endif
}

RADA_INLINE vec splat(float x) {
#if defined(__AVX512F__)
  return (vec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vec)_mm256_set1_ps(x);
#else
  vec v;
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) v[i] = x;
  return v;
#endif
}

RADA_INLINE vec larger(vec a, vec b) { return a > b ? a : b; }
RADA_INLINE vec magnitude(vec a) { return (vec)((ivec)a & 0x7fffffff); }

// Lane i of the result is lane from[i] of a and b side by side. clang makes one shuffle of it where `from` is constant.
RADA_INLINE vec shuffle(vec a, vec b, ivec from) {
#if defined(__clang__)
  vec v;
#pragma unroll
  for (int i = 0; i < W; i++) v[i] = from[i] < W ? a[from[i]] : b[from[i] - W];
  return v;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// All lanes combined, half with half. HALF is a constant, and so are the shuffles.
template <int HALF = W / 2, class F>
RADA_INLINE float reduce(vec v, F&& combine) {
  if constexpr (HALF == 0) {
    return v[0];
  } else {
    ivec other;
    for (int i = 0; i < W; i++) other[i] = (i + HALF) % W;
    return reduce<HALF / 2>(combine(v, shuffle(v, v, other)), combine);
  }
}
RADA_INLINE float sum(vec v) {
  return reduce(v, [](vec a, vec b) { return a + b; });
}
RADA_INLINE float largest(vec v) {
  return reduce(v, [](vec a, vec b) { return larger(a, b); });
}

// Lanes below n keep their value, the others take that of `rest`.
RADA_INLINE vec first_or(vec v, int64_t n, vec rest) {
  ivec lane;
  for (int i = 0; i < W; i++) lane[i] = i;
  return lane < (int32_t)(n > W ? W : n) ? v : rest;
}
RADA_INLINE vec keep_first(vec v, int64_t n) { return first_or(v, n, vec{}); }

// 2^x; NaN stays NaN, 2^0 is 1. Results end at 2^-126 and 2^126 but on AVX-512, where larger ones go on to inf and
// smaller ones are subnormal, which SubnormalsAreZero makes zero.
// A polynomial, minimax on [-1/2, 1/2]: of degree 5, to 2e-7 of the value, or of degree 3, to 2e-4, for what is
// rounded to bfloat16 next.
template <bool COARSE = false>
RADA_INLINE vec exp2(vec x) {
#if defined(__AVX512F__)
  if constexpr (COARSE) {  // minimax on [0, 1), to 9e-5: the scaling takes the integer part from x itself
    const vec r = (vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    vec p = splat(7.70671964e-2f) * r + splat(2.27644816e-1f);
    p = p * r + splat(6.95116818e-1f);
    p = p * r + splat(1.0f);
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)x);
  }
  const vec n = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
#if defined(__aarch64__)
  x = (vec)vmaxq_f32(vminq_f32((float32x4_t)x, vdupq_n_f32(126)), vdupq_n_f32(-126));
#else
  x = x > 126.0f ? splat(126.0f) : x;
  x = x < -126.0f ? splat(-126.0f) : x;
#endif
  const vec magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer, held in the low bits
  const vec shifted = x + magic;
  const vec n = shifted - magic;
#endif
  const vec r = x - n;
  vec p;
  if constexpr (COARSE) {
    p = splat(5.50089311e-2f) * r + splat(2.42210959e-1f);
    p = p * r + splat(6.93282927e-1f);
  } else {
    p = splat(1.32647273e-3f) * r + splat(9.67151299e-3f);
    p = p * r + splat(5.55073358e-2f);
    p = p * r + splat(2.40222424e-1f);
    p = p * r + splat(6.93147004e-1f);
  }
  p = p * r + splat(1.0f);
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (vec)(((ivec)shifted << 23) + 0x3f800000);
#endif
}

// W numbers of 16 bits, and each in the low half of its lane. gcc 12 converts them in two halves where it is left to itself.
typedef uint16_t half_vec __attribute__((vector_size(W * 2), may_alias));

RADA_INLINE uvec low_halves(half_vec v) {
#if defined(__AVX512F__)
  return (uvec)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (uvec)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, uvec);
#endif
}
RADA_INLINE half_vec cut_to_halves(uvec v) {
#if defined(__AVX512F__)
  return (half_vec)_mm512_cvtepi32_epi16((__m512i)v);
#else
  return __builtin_convertvector(v, half_vec);
#endif
}
// bfloat16 is the upper half of a float.
RADA_INLINE vec widen(half_vec v) { return (vec)(low_halves(v) << 16); }

#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) || defined(RADA_TILE_MODEL)
#define RADA_BFLOAT16

typedef uint16_t half_vec_at_any_address __attribute__((vector_size(W * 2), aligned(2), may_alias));

// In each lane c plus the dot product of two bfloat16 of a with two of b; or a is one word for every lane.
RADA_INLINE vec add_dot_products(vec a, vec b, vec c) {
#if defined(__AVX512BF16__)
  return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#elif defined(__aarch64__)
  return (vec)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
  const uvec x = (uvec)a, y = (uvec)b, second = uvec{} + 0xffff0000;
  return c + (vec)(x & second) * (vec)(y & second) + (vec)(x << 16) * (vec)(y << 16);
#endif
}
RADA_INLINE vec add_dot_products(float a, vec b, vec c) {
#if !defined(__aarch64__)
  return add_dot_products(splat(a), b, c);
#else
  const float32x2_t two = {a, 0};  // a plain load, where a copy to every lane would take a vector pipe
  return (vec)vbfdotq_lane_f32((float32x4_t)c, (bfloat16x8_t)b, (bfloat16x4_t)two, 0);
#endif
}

RADA_INLINE half_vec load_half(const void* p) { return *static_cast<const half_vec_at_any_address*>(p); }
RADA_INLINE void store(void* p, half_vec v) { *static_cast<half_vec_at_any_address*>(p) = v; }

// The first n of W, the others zero.
RADA_INLINE half_vec load_half_first(const uint16_t* p, int64_t n) {
#if defined(__AVX512BF16__)
  return (half_vec)_mm256_maskz_loadu_epi16(lanes_below(n), p);
#else
  half_vec v{};
#pragma GCC unroll 4
  for (int i = 0; i < W; i++)
    if (i < n) v[i] = p[i];
  return v;
#endif
}
RADA_INLINE void store_first(uint16_t* p, half_vec v, int64_t n) {
#if defined(__AVX512BF16__)
  _mm256_mask_storeu_epi16(p, lanes_below(n), (__m256i)v);
#else
#pragma GCC unroll 4
  for (int i = 0; i < W; i++)
    if (i < n) p[i] = v[i];
#endif
}

RADA_INLINE half_vec narrow(vec v) {
#if defined(__AVX512BF16__)
  return (half_vec)_mm512_cvtneps_pbh((__m512)v);
#elif defined(__aarch64__)
  return (half_vec)vcvt_bf16_f32((float32x4_t)v);
#else
  const uvec bits = (uvec)v, rounded = bits + 0x7fff + (bits >> 16 & 1);
  return __builtin_convertvector((v == v ? rounded : bits | 0x400000) >> 16, half_vec);
#endif
}
#endif

}  // namespace RADA_ISA
