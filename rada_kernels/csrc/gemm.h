// Matrix products on register tiles of MR rows by up to NV vectors.
//
// A product C[m, n] = Σ_k A[m, k] B[k, n] reads A where it lies, one scalar at a time, and B from panels packed by
// pack_rows or pack_columns. The result never goes through memory here: each finished tile is handed to an epilogue.
//
// Operands are made of 32-bit words: a float, or two bfloat16 that are neighbours along k. So the same loops serve
// both; only the multiply-add and the packing differ (Float, Bfloat16).
#pragma once

#include "vector.h"

namespace RADA_ISA {

typedef float word __attribute__((may_alias));

RADA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
RADA_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
RADA_INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
RADA_INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

struct Float {
  typedef float element;
  static constexpr int64_t per_word = 1;

  static RADA_INLINE vec multiply_add(word a, vec b, vec c) { return splat(a) * b + c; }
  static RADA_INLINE void put(float* p, vec v) { store(p, v); }
  static RADA_INLINE void put_first(float* p, vec v, int64_t n) { store_first(p, v, n); }
  static RADA_INLINE vec get_first(const float* p, int64_t n) { return load_first(p, n); }
  // Words of one row of B from rows k and k + 1 of a matrix (the second one is not used).
  static RADA_INLINE void interleave(word* to, const float* row, const float*, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] = row[j];
  }
};

#if defined(RADA_BFLOAT16)
struct Bfloat16 {
  typedef uint16_t element;
  static constexpr int64_t per_word = 2;

  static RADA_INLINE vec multiply_add(word a, vec b, vec c) { return add_pair_products(a, b, c); }
  static RADA_INLINE void put(uint16_t* p, vec v) { *(half_vec_at_any_address*)p = narrow(v); }
  static RADA_INLINE void put_first(uint16_t* p, vec v, int64_t n) {
    if (n >= W) return put(p, v);
    const half_vec narrowed = narrow(v);
    if (n > 0) std::memcpy(p, &narrowed, n * 2);
  }
  static RADA_INLINE vec get_first(const uint16_t* p, int64_t n) {
    half_vec bits{};
    if (n >= W)
      bits = *(const half_vec_at_any_address*)p;
    else if (n > 0)
      std::memcpy(&bits, p, n * 2);
    return widen(bits);
  }
  static RADA_INLINE void interleave(word* to, const uint16_t* row, const uint16_t* next, int64_t n) {
    uint32_t* words = (uint32_t*)to;
    if (next)
      for (int64_t j = 0; j < n; j++) words[j] = row[j] | (uint32_t)next[j] << 16;
    else
      for (int64_t j = 0; j < n; j++) words[j] = row[j];
  }
};
#endif

// How n columns are cut in panels of at most NV vectors, as equally as possible.
struct Panels {
  int64_t columns, vectors, count, wide, width;

  explicit Panels(int64_t n) : columns(n), vectors(ceil_div(n, W)), count(ceil_div(vectors, NV)) {
    width = vectors / count;
    wide = vectors % count;
  }
  RADA_INLINE int64_t vectors_of(int64_t p) const { return width + (p < wide); }
  RADA_INLINE int64_t first_column(int64_t p) const { return (p * width + smaller_of(p, wide)) * W; }
  RADA_INLINE int64_t padded() const { return vectors * W; }
};

// B[k, n] = rows[k, n], packed. The result has ceil(k / per_word) · padded() words.
template <class P>
void pack_rows(word* to, const typename P::element* rows, int64_t ld, int64_t k, int64_t n) {
  const Panels panels(n);
  for (int64_t p = 0; p < panels.count; p++) {
    const int64_t first = panels.first_column(p), stride = panels.vectors_of(p) * W;
    const int64_t valid = smaller_of(stride, n - first);
    for (int64_t i = 0; i < k; i += P::per_word, to += stride) {
      const auto* row = rows + i * ld + first;
      P::interleave(to, row, i + 1 < k ? row + ld : nullptr, valid);
      for (int64_t j = valid; j < stride; j++) to[j] = 0;
    }
  }
}

// Transposes W rows of W words in registers: in stage `step`, rows i and i + step exchange blocks of `step` words.
RADA_INLINE void transpose(vec (&rows)[W]) {
#pragma GCC unroll 8
  for (int step = 1; step < W; step *= 2) {
    ivec low, high;
    for (int j = 0; j < W; j++) {
      low[j] = j & step ? W + j - step : j;
      high[j] = j & step ? W + j : j + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if (!(i & step)) {
        const vec a = rows[i], b = rows[i + step];
        rows[i] = shuffle(a, b, low);
        rows[i + step] = shuffle(a, b, high);
      }
  }
}

// B[k, n] = rows[n, k], packed: the transpose of a matrix of words, so k counts words and so does ld.
inline void pack_columns(word* to, const word* rows, int64_t ld, int64_t k, int64_t n) {
  const Panels panels(n);
  for (int64_t p = 0; p < panels.count; p++) {
    const int64_t first = panels.first_column(p), stride = panels.vectors_of(p) * W;
    for (int64_t j = 0; j < stride; j += W) {
      const int64_t valid = smaller_of(W, n - first - j);
      const word* from = rows + (first + j) * ld;
      for (int64_t i = 0; i < k; i += W) {
        const int64_t count = smaller_of(W, k - i);
        vec block[W];
        for (int r = 0; r < W; r++) block[r] = r < valid ? load_first((const float*)from + r * ld + i, count) : vec{};
        transpose(block);
        for (int c = 0; c < count; c++) store(to + (i + c) * stride + j, block[c]);
      }
    }
    to += k * stride;
  }
}

template <int N>
struct Tile {
  vec at[MR][N];
};

// One register tile. Row-major A: rows[m] points to row m. Otherwise A[m, k] = rows[0][k · ld + m].
template <class P, bool ROW_MAJOR, int N>
RADA_INLINE Tile<N> multiply_tile(int64_t k, const word* const* rows, int64_t ld, const word* panel) {
  Tile<N> c{};
  const word* a[MR];
  for (int m = 0; m < MR; m++) a[m] = rows[ROW_MAJOR ? m : 0];
  for (int64_t i = 0; i < k; i++) {
    vec b[N];
#pragma GCC unroll 8
    for (int v = 0; v < N; v++) b[v] = load(panel + i * (N * W) + v * W);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const word x = ROW_MAJOR ? a[m][i] : a[0][i * ld + m];
#pragma GCC unroll 8
      for (int v = 0; v < N; v++) c.at[m][v] = P::multiply_add(x, b[v], c.at[m][v]);
    }
  }
  return c;
}

template <class P, bool ROW_MAJOR, int N, class Epilogue>
RADA_INLINE void multiply_panel(int64_t m, int64_t k, const word* a, int64_t ld, const word* panel, int64_t column,
                                Epilogue&& epilogue) {
  for (int64_t row = 0; row < m; row += MR) {
    const word* rows[MR];
    // Rows beyond the last one repeat it, and the epilogue leaves them out.
    for (int r = 0; r < MR; r++) rows[r] = ROW_MAJOR ? a + smaller_of(row + r, m - 1) * ld : a + row;
    const Tile<N> c = multiply_tile<P, ROW_MAJOR, N>(k, rows, ld, panel);
    epilogue(row, (int)smaller_of(MR, m - row), column, c);
  }
}

// C = A B, tile by tile to epilogue(first row, rows, first column, tile). k and ld count words. A in columns
// (ROW_MAJOR false) is read in blocks of MR rows: ld is at least m rounded up to MR.
template <class P, bool ROW_MAJOR, class Epilogue>
RADA_INLINE void multiply(int64_t m, int64_t k, const word* a, int64_t ld, const word* b, const Panels& panels,
                          Epilogue&& epilogue) {
  for (int64_t p = 0; p < panels.count; p++) {
    const int64_t column = panels.first_column(p);
    const word* panel = b + column * k;
    switch (panels.vectors_of(p)) {
      case 1: multiply_panel<P, ROW_MAJOR, 1>(m, k, a, ld, panel, column, epilogue); break;
      case 2: multiply_panel<P, ROW_MAJOR, 2>(m, k, a, ld, panel, column, epilogue); break;
      case 3: multiply_panel<P, ROW_MAJOR, 3>(m, k, a, ld, panel, column, epilogue); break;
    }
  }
}

}  // namespace RADA_ISA
