// AMX: bfloat16 products on tile registers, each 16 rows of 16 words.
//
// A block of up to 32 rows times a panel of up to 32 columns fills the eight registers: four of sums, two of A, two of
// B. Panels hold their words as the instruction takes them, and so do rows of A. Sums leave through memory.
//
// With RADA_TILE_MODEL the instructions are a plain C++ model, which any machine runs: tests/kernels/loops compares
// both, bit for bit, with the definition.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "vector.h"

namespace RADA_ISA {

constexpr int64_t TILE = 16;                   // rows of a tile register, and words in each
constexpr int64_t TILE_ROWS = 2 * TILE;        // of a block
constexpr int64_t GROUP_ROWS = 4 * TILE_ROWS;  // that share a panel while the first-level cache holds it
constexpr int64_t TRANSPOSED_WORDS = 128;      // of an A that comes by columns, at most

// What each of the eight registers holds. Laid out as LDTILECFG takes it.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t count) {
    rows[tile] = count;
    row_bytes[tile] = count ? TILE * sizeof(word) : 0;
  }
};

// ---- the registers

enum Register { SUM_00, SUM_01, SUM_10, SUM_11, UPPER_A, LOWER_A, LEFT_B, RIGHT_B, REGISTERS };

#if !defined(RADA_TILE_MODEL)

template <int T>
RADA_INLINE void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(T) : "memory");
}
template <int T>
RADA_INLINE void store_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(T) : "memory");
}
template <int T>
RADA_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T));
}
// sums += A B
template <int SUMS, int A, int B>
RADA_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
}
RADA_INLINE void set_tile_shapes(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
RADA_INLINE void release_tiles() { asm volatile("tilerelease"); }

#else

struct TileModel {
  TileShapes shapes;  // no register has rows before set_tile_shapes
  uint32_t at[REGISTERS][TILE][TILE];
};
inline thread_local TileModel tile_model;

// Where the processor would raise a fault.
inline void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "tile registers: %s\n", what);
  std::abort();
}
inline int64_t rows_of_tile(int tile) {
  expect(tile_model.shapes.rows[tile], "no shape is set");
  return tile_model.shapes.rows[tile];
}

template <int T>
void load_tile(const void* from, int64_t row_bytes) {
  for (int64_t r = 0; r < rows_of_tile(T); r++)
    std::memcpy(tile_model.at[T][r], (const char*)from + r * row_bytes, TILE * sizeof(word));
}
template <int T>
void store_tile(void* to, int64_t row_bytes) {
  for (int64_t r = 0; r < rows_of_tile(T); r++)
    std::memcpy((char*)to + r * row_bytes, tile_model.at[T][r], TILE * sizeof(word));
}
template <int T>
void clear_tile() {
  rows_of_tile(T);
  std::memset(tile_model.at[T], 0, sizeof tile_model.at[T]);
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
// Numbers below the normal ones are zero, in and out, whatever the thread's mode.
inline float flushed(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? __builtin_copysignf(0, x) : x; }
// One element: the even and the odd products are added up apart, each with one rounding.
inline float add_dot(float sum, const uint32_t* a, const uint32_t* b, int64_t b_ld, int64_t words) {
  float parts[2] = {};
  for (int64_t k = 0; k < words; k++)
    for (int i = 0; i < 2; i++) {
      const uint32_t x = a[k], y = b[k * b_ld];
      const float left = flushed(float_of(i ? x & 0xffff0000 : x << 16));
      const float right = flushed(float_of(i ? y & 0xffff0000 : y << 16));
      parts[i] = flushed(__builtin_fmaf(left, right, parts[i]));
    }
  return flushed(flushed(sum) + flushed(parts[0] + parts[1]));
}
template <int SUMS, int A, int B>
void multiply_tiles() {
  expect(rows_of_tile(SUMS) == rows_of_tile(A) && rows_of_tile(B) == TILE, "shapes do not fit");
  for (int64_t r = 0; r < rows_of_tile(A); r++)
    for (int64_t c = 0; c < TILE; c++) {
      uint32_t& sum = tile_model.at[SUMS][r][c];
      const float result = add_dot(float_of(sum), tile_model.at[A][r], &tile_model.at[B][0][c], TILE, TILE);
      std::memcpy(&sum, &result, sizeof sum);
    }
}
inline void set_tile_shapes(const TileShapes& shapes) {
  tile_model.shapes = shapes;
  std::memset(tile_model.at, 0, sizeof tile_model.at);
}
inline void release_tiles() { tile_model.shapes = {}; }

#endif

// ---- one thread's use of them

inline thread_local int64_t block_rows_set = 0;  // 0: released

// Shapes the registers for blocks of up to TILE_ROWS rows. Rows past them are neither read nor written.
inline void shape_tiles(int64_t rows) {
  if (rows == block_rows_set) return;
  const int64_t upper = rows < TILE ? rows : TILE, lower = rows - upper;
  const int64_t counts[REGISTERS] = {upper, upper, lower, lower, upper, lower, TILE, TILE};
  TileShapes shapes;
  for (int tile = 0; tile < REGISTERS; tile++) shapes.set(tile, counts[tile]);
  set_tile_shapes(shapes);
  block_rows_set = rows;
}

// Around a thread's task: what a product shaped is released when the task ends.
struct TileUse {
  TileUse() = default;
  TileUse(const TileUse&) = delete;
  ~TileUse() {
    if (block_rows_set) release_tiles();
    block_rows_set = 0;
  }
};

// ---- one block

// A's rows for the steps of TILE words along k: in place, and past the whole steps filled up with zeros.
struct Steps {
  const word* at;
  int64_t ld;  // words from row to row
  const word* last;
  int64_t last_ld;

  Steps from(int64_t row) const { return {at + row * ld, ld, last + row * last_ld, last_ld}; }
};

// Starts sums = A B for up to TILE_ROWS rows and N tiles of columns. b: [k, N · TILE], b_last: the last step's.
template <int N>
inline void start_block(const Steps& a, const word* b, const word* b_last, int64_t k) {
  const bool lower = block_rows_set > TILE;
  auto step = [&](const word* left, int64_t ld, const word* right) RADA_LAMBDA {
    load_tile<LEFT_B>(right, N * TILE * sizeof(word));
    load_tile<UPPER_A>(left, ld * sizeof(word));
    multiply_tiles<SUM_00, UPPER_A, LEFT_B>();
    if (N > 1) {
      load_tile<RIGHT_B>(right + TILE, N * TILE * sizeof(word));
      multiply_tiles<SUM_01, UPPER_A, RIGHT_B>();
    }
    if (!lower) return;
    load_tile<LOWER_A>(left + TILE * ld, ld * sizeof(word));
    multiply_tiles<SUM_10, LOWER_A, LEFT_B>();
    if (N > 1) multiply_tiles<SUM_11, LOWER_A, RIGHT_B>();
  };
  clear_tile<SUM_00>();
  if (N > 1) clear_tile<SUM_01>();
  if (lower) clear_tile<SUM_10>();
  if (lower && N > 1) clear_tile<SUM_11>();
  int64_t i = 0;
  for (; i + TILE <= k; i += TILE) step(a.at + i, a.ld, b + i * N * TILE);
  if (i < k) step(a.last, a.last_ld, b_last);
}

// Waits for the sums and stores them: rows of N tiles.
template <int N>
inline void store_block(word* to) {
  const bool lower = block_rows_set > TILE;
  constexpr int64_t ld = N * TILE * sizeof(word);
  store_tile<SUM_00>(to, ld);
  if (N > 1) store_tile<SUM_01>(to + TILE, ld);
  to += TILE * N * TILE;
  if (lower) store_tile<SUM_10>(to, ld);
  if (lower && N > 1) store_tile<SUM_11>(to + TILE, ld);
}

}  // namespace RADA_ISA
