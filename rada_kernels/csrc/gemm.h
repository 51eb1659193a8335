// Matrix products on register tiles of MR rows by up to NV vectors.
//
// A product C[m, n] = Σ_k A[m, k] B[k, n] reads A in place, one scalar at a time, and B from panels packed by
// pack_rows or pack_columns, or, where A has too few rows to pay for the packing, in place (RowsOf,
// multiply_in_place). The result never goes through memory here: each finished tile is handed to an epilogue.
//
// Operands are made of 32-bit words: a float, or two bfloat16 that are neighbours along k. So the same loops serve
// both; only the multiply-add and the packing differ (Float, Bfloat16).
#pragma once

#include <type_traits>

#include "call.h"
#include "vector.h"
#if defined(RADA_TILES)
#include "amx.h"
#endif

namespace RADA_ISA {

// Around a thread's task: what products set up in the processor is taken back.
#if defined(RADA_TILES)
using TaskScope = TileUse;
#else
struct TaskScope {
  ~TaskScope() {}
};
#endif

RADA_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
RADA_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
RADA_INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
RADA_INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

struct Float {
  typedef float element;
  static constexpr rada::Type type = rada::Type::FLOAT;
  static constexpr int64_t per_word = 1;
  static constexpr bool coarse = false;  // exponentials: see exp2

  // One word of A with a vector of B, or word by word.
  static RADA_INLINE vec multiply_add(word a, vec b, vec c) { return splat(a) * b + c; }
  static RADA_INLINE vec multiply_add(vec a, vec b, vec c) { return a * b + c; }
  static RADA_INLINE vec get(const float* p) { return load(p); }
  static RADA_INLINE void put(float* p, vec v) { store(p, v); }
  static RADA_INLINE void put_first(float* p, vec v, int64_t n) { store_first(p, v, n); }
  static RADA_INLINE vec get_first(const float* p, int64_t n) { return load_first(p, n); }
  // Stores v and returns what was stored.
  static RADA_INLINE vec put_rounded(float* p, vec v) {
    store(p, v);
    return v;
  }
  // Words of one column of A from rows k and k + 1 (the second one is not used).
  static RADA_INLINE vec column_words(vec v, vec) { return v; }
  // The first n words of a row of B.
  static RADA_INLINE vec words_first(const float* row, int64_t, int64_t n) { return load_first(row, n); }
  // Words of one row of B from rows k and k + 1 of a matrix (the second one is not used).
  static RADA_INLINE void interleave(word* to, const float* row, const float*, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] = row[j];
  }
};

#if defined(RADA_BFLOAT16)
struct Bfloat16 {
  typedef uint16_t element;
  static constexpr rada::Type type = rada::Type::BFLOAT16;
  static constexpr int64_t per_word = 2;
  static constexpr bool coarse = true;

  static RADA_INLINE vec multiply_add(word a, vec b, vec c) { return add_dot_products(a, b, c); }
  static RADA_INLINE vec multiply_add(vec a, vec b, vec c) { return add_dot_products(a, b, c); }
  static RADA_INLINE void put(uint16_t* p, vec v) { store(p, narrow(v)); }
  static RADA_INLINE void put_first(uint16_t* p, vec v, int64_t n) {
    if (n >= W) return put(p, v);
    store_first(p, narrow(v), n);
  }
  static RADA_INLINE vec get(const uint16_t* p) { return widen(load_half(p)); }
  static RADA_INLINE vec get_first(const uint16_t* p, int64_t n) {
    return n >= W ? get(p) : widen(load_half_first(p, n));
  }
  static RADA_INLINE vec put_rounded(uint16_t* p, vec v) {
    const half_vec bits = narrow(v);
    store(p, bits);
    return widen(bits);
  }
  // Words of one column of A from rows k and k + 1.
  static RADA_INLINE vec column_words(vec v, vec next) {
    return (vec)(low_halves(narrow(v)) | (uvec)widen(narrow(next)));
  }
  // The first n words of a row of B from two neighbouring rows of a matrix.
  static RADA_INLINE vec words_first(const uint16_t* row, int64_t ld, int64_t n) {
    return (vec)((uvec)get_first(row, n) >> 16 | (uvec)get_first(row + ld, n));
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

// Rows of a matrix: elements, ld apart. Null: not in use.
template <class P>
struct Rows {
  const typename P::element* at;
  int64_t ld;

  Rows from(int64_t row) const { return {at + row * ld, ld}; }
  const word* words() const { return (const word*)at; }
  int64_t word_ld() const { return ld / P::per_word; }
  // Of the first row, n words from i on; zeros past them.
  RADA_INLINE vec words_at(int64_t i, int64_t n) const { return load_first((const float*)words() + i, n); }
};

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

// B[k, n] = rows[k, n], packed. The result has ceil(k / per_word) · padded() words; or these are the rows from `first`
// of a B with more of them, `words` in all.
template <class P>
void pack_rows(word* to, const typename P::element* rows, int64_t ld, int64_t k, int64_t n, int64_t words = 0,
               int64_t first = 0) {
  const Panels panels(n);
  if (!words) words = ceil_div(k, P::per_word);
  for (int64_t p = 0; p < panels.count; p++) {
    const int64_t column = panels.first_column(p), stride = panels.vectors_of(p) * W;
    const int64_t valid = smaller_of(stride, n - column);
    word* at = to + column * words + first * stride;
    for (int64_t i = 0; i < k; i += P::per_word, at += stride) {
      const auto* row = rows + i * ld + column;
      P::interleave(at, row, i + 1 < k ? row + ld : nullptr, valid);
      for (int64_t j = valid; j < stride; j++) at[j] = 0;
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

// One panel of B[k, n] = rows[n, k], packed: the transpose of words, so k counts words and so does ld. rows: from the
// panel's first column on.
inline void pack_panel(word* to, const word* rows, int64_t ld, int64_t k, const Panels& panels, int64_t p) {
  const int64_t first = panels.first_column(p), stride = panels.vectors_of(p) * W;
  word* panel = to + first * k;
  for (int64_t j = 0; j < stride; j += W) {
    const int64_t valid = smaller_of(W, panels.columns - first - j);
    const word* from = rows + j * ld;
    for (int64_t i = 0; i < k; i += W) {
      const int64_t count = smaller_of(W, k - i);
      vec block[W];
#pragma GCC unroll 16
      for (int r = 0; r < W; r++) block[r] = r < valid ? load_first((const float*)from + r * ld + i, count) : vec{};
      transpose(block);
#pragma GCC unroll 16
      for (int c = 0; c < W; c++)
        if (c < count) store(panel + (i + c) * stride + j, block[c]);
    }
  }
}

// Of `parts` of the panels one.
inline void pack_columns(word* to, const word* rows, int64_t ld, int64_t k, int64_t n, int64_t part, int64_t parts) {
  const Panels panels(n);
  for (int64_t p = panels.count * part / parts; p < panels.count * (part + 1) / parts; p++)
    pack_panel(to, rows + panels.first_column(p) * ld, ld, k, panels, p);
}

// C of one register tile. each(f) calls f(row, vector, value) for all of it, unrolled, so that it stays in registers.
template <int M, int N>
struct Tile {
  static constexpr int64_t columns = N * W;

  vec at[M][N];

  template <class F>
  RADA_INLINE void each(F&& f) const {
#pragma GCC unroll 8
    for (int r = 0; r < M; r++)
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) f(r, v, at[r][v]);
  }
};

// An epilogue: f(row, column, vector) for every vector of a tile. `flatten`: f is inlined with all that it calls, since
// no vector register survives a call, and the tile would stay in memory during the whole product.
template <class F>
RADA_INLINE auto for_each(const F& f) {
  return [&](int64_t row, int64_t column, const auto& tile) RADA_LAMBDA {
    tile.each([&](int r, int v, vec x) __attribute__((flatten, always_inline)) { f(row + r, column + v * W, x); });
  };
}

// B in panels: one panel of N vectors.
template <int N>
struct Panel {
  const word* at;

  RADA_INLINE vec operator()(int64_t i, int v) const { return load(at + i * (N * W) + v * W); }
};

// B = rows of a matrix [k, columns], read in place.
template <class P>
struct RowsOf {
  const typename P::element* at;
  int64_t ld, columns;

  RADA_INLINE vec operator()(int64_t i, int v) const {
    return P::words_first(at + i * P::per_word * ld + v * W, ld, columns - v * W);
  }
};

// One register tile. Row-major A: rows ld apart. Otherwise A[m, k] = a[k · ld + m].
template <class P, bool ROW_MAJOR, int M, int N, class B>
RADA_INLINE Tile<M, N> multiply_tile(int64_t k, const word* a, int64_t ld, const B& b_at) {
  Tile<M, N> c{};
  const word* rows[M];
  for (int m = 0; m < M; m++) rows[m] = ROW_MAJOR ? a + m * ld : a;
  for (int64_t i = 0; i < k; i++) {
    vec b[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; v++) b[v] = b_at(i, v);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const word x = ROW_MAJOR ? rows[m][i] : a[i * ld + m];
#pragma GCC unroll 4
      for (int v = 0; v < N; v++) c.at[m][v] = P::multiply_add(x, b[v], c.at[m][v]);
    }
  }
  return c;
}

// All rows against one panel: tiles of MR rows, then of the powers of two that make up the rest.
template <class P, bool ROW_MAJOR, int N, int M = MR, class B, class Epilogue>
RADA_INLINE void multiply_panel(int64_t row, int64_t m, int64_t k, const word* a, int64_t ld, const B& b,
                                int64_t column, Epilogue&& epilogue) {
  for (; row + M <= m; row += M)
    epilogue(row, column, multiply_tile<P, ROW_MAJOR, M, N>(k, ROW_MAJOR ? a + row * ld : a + row, ld, b));
  if constexpr (M > 1)
    if (row < m) multiply_panel<P, ROW_MAJOR, N, M / 2>(row, m, k, a, ld, b, column, epilogue);
}

// C = A B, tile by tile to epilogue(first row, first column, tile). k and ld count words.
// b_at(panel's first column, an integral constant N) gives the operand for a panel of N vectors.
template <class P, bool ROW_MAJOR, class Operand, class Epilogue>
RADA_INLINE void multiply_panels(int64_t m, int64_t k, const word* a, int64_t ld, const Panels& panels, Operand&& b_at,
                                 Epilogue&& epilogue) {
  for (int64_t p = 0; p < panels.count; p++) {
    const int64_t column = panels.first_column(p);
    auto with = [&](auto n) RADA_LAMBDA {
      multiply_panel<P, ROW_MAJOR, n()>(0, m, k, a, ld, b_at(column, n), column, epilogue);
    };
    switch (panels.vectors_of(p)) {
      case 1: with(std::integral_constant<int, 1>()); break;
      case 2: with(std::integral_constant<int, 2>()); break;
      default: with(std::integral_constant<int, 3>());
    }
  }
}

#if defined(RADA_TILES)
// C of one block, as the tile registers left it in memory. Its rows are not known to the compiler.
template <int N>
struct StoredTile {
  static constexpr int64_t columns = N * W;

  const word* at;
  int64_t rows;

  template <class F>
  RADA_INLINE void each(F&& f) const {
    for (int r = 0; r < (int)rows; r++)
#pragma GCC unroll 2
      for (int v = 0; v < N; v++) f(r, v, load(at + (r * N + v) * W));
  }
};

// What rows of A and a panel of B have past whole steps along k, filled up with zeros; and an A that comes by columns,
// transposed.
struct TileScratch {
  alignas(64) word a[GROUP_ROWS * TILE], b[NV * TILE * TILE], transposed[GROUP_ROWS * TRANSPOSED_WORDS];

  Steps rows(const word* rows, int64_t ld, int64_t count, int64_t k) {
    const int64_t whole = k / TILE * TILE;
    for (int64_t r = 0; r < count && whole < k; r++)
      store(a + r * TILE, load_first((const float*)rows + r * ld + whole, k - whole));
    return {rows, ld, a, TILE};
  }
  Steps columns(const word* columns, int64_t ld, int64_t count, int64_t k) {
    const int64_t words = round_up(k, TILE);
    for (int64_t r = 0; r < count; r += W)
      for (int64_t i = 0; i < k; i += W) {
        vec block[W];
#pragma GCC unroll 16
        for (int j = 0; j < W; j++)
          block[j] = i + j < k ? load_first((const float*)columns + (i + j) * ld + r, count - r) : vec{};
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < W; j++)
          if (r + j < count) store(transposed + (r + j) * words + i, block[j]);
      }
    return {transposed, words, transposed + k / TILE * TILE, words};
  }
  const word* panel(const word* at, int64_t columns, int64_t k) {
    const int64_t whole = k / TILE * TILE;
    for (int64_t i = 0; i < TILE && whole < k; i++)
      for (int64_t j = 0; j < columns; j += W)
        store(b + i * columns + j, whole + i < k ? load(at + (whole + i) * columns + j) : vec{});
    return b;
  }
};

// C = A B with B packed, on tile registers. The epilogue of a block runs while they work on the next one.
template <bool ROW_MAJOR, class Epilogue>
RADA_INLINE void multiply_on_tiles(int64_t m, int64_t k, const word* a, int64_t ld, const word* b, const Panels& panels,
                                   Epilogue&& epilogue) {
  TileScratch scratch;
  alignas(64) word sums[2][TILE_ROWS * NV * W];
  for (int64_t first = 0, rows; first < m; first += rows) {
    const int64_t whole = (m - first) / TILE_ROWS * TILE_ROWS;
    rows = whole ? smaller_of(whole, GROUP_ROWS) : m - first;
    const int64_t block = smaller_of(rows, TILE_ROWS), blocks = rows / block;
    const Steps left = ROW_MAJOR ? scratch.rows(a + first * ld, ld, rows, k) : scratch.columns(a + first, ld, rows, k);
    shape_tiles(block);
    auto with = [&](auto n, int64_t panel, int64_t end) RADA_LAMBDA {
      constexpr int N = n();
      const int64_t turns = (end - panel) * blocks;
      const word *right = nullptr, *right_last = nullptr;
      int64_t row = 0, column = 0;
      for (int64_t turn = 0; turn <= turns; turn++) {
        const int64_t last_row = row, last_column = column;
        if (turn < turns) {
          row = turn % blocks * TILE_ROWS;
          if (row == 0) {
            column = panels.first_column(panel++);
            right = b + column * k;
            right_last = scratch.panel(right, N * W, k);
          }
          start_block<N>(left.from(row), right, right_last, k);
        }
        if (turn) epilogue(first + last_row, last_column, StoredTile<N>{sums[turn % 2], block});
        if (turn < turns) store_block<N>(sums[(turn + 1) % 2]);
      }
    };
    const int64_t double_panels = panels.width == 2 ? panels.count : panels.wide;  // the first ones
    with(std::integral_constant<int, 2>(), 0, double_panels);
    with(std::integral_constant<int, 1>(), double_panels, panels.count);
  }
}
#endif

// C = A B with B packed. On tile registers k is at most TRANSPOSED_WORDS where A comes by columns.
template <class P, bool ROW_MAJOR, class Epilogue>
RADA_INLINE void multiply(int64_t m, int64_t k, const word* a, int64_t ld, const word* b, const Panels& panels,
                          Epilogue&& epilogue) {
#if defined(RADA_TILES)
  multiply_on_tiles<ROW_MAJOR>(m, k, a, ld, b, panels, epilogue);
#else
  multiply_panels<P, ROW_MAJOR>(
      m, k, a, ld, panels, [=](int64_t column, auto n) { return Panel<n()>{b + column * k}; }, epilogue);
#endif
}

constexpr int64_t IN_PLACE_COLUMNS = 4 * W;  // of a task whose operand is not packed

// C[m, columns first to end] = A Bᵀ, B's rows first to end read in place: every element is a dot product along k, and
// W of them share the loads and one transpose. first is a multiple of W. Tiles of one row and one vector.
template <class P, class B, class Epilogue>
RADA_INLINE void multiply_in_place(int64_t m, int64_t k, const word* a, int64_t ld, const B& b, int64_t first,
                                   int64_t end, Epilogue&& epilogue) {
  constexpr int C = 4, R = W / C;  // R rows of A by C rows of the matrix
  for (int64_t column = first; column < end; column += W)
    for (int64_t row = 0; row < m; row += R) {
      float block[R][W] = {};
      for (int c = 0; c < W && column + c < end; c += C) {
        const word* left[R];
        B right[C];
        for (int r = 0; r < R; r++) left[r] = a + smaller_of(row + r, m - 1) * ld;
        for (int j = 0; j < C; j++) right[j] = b.from(smaller_of(column + c + j, end - 1) - first);
        vec dots[W] = {};
        auto step = [&](int64_t i, int64_t n) RADA_LAMBDA {  // n words from i on
          vec y[C];
#pragma GCC unroll 4
          for (int j = 0; j < C; j++) {
            y[j] = right[j].words_at(i, n);
            if (row == 0) __builtin_prefetch(right[j].at + i * P::per_word + C * b.ld);  // the C rows after these
          }
#pragma GCC unroll 4
          for (int r = 0; r < R; r++) {
            const vec x = load_first((const float*)left[r] + i, n);
#pragma GCC unroll 4
            for (int j = 0; j < C; j++) dots[r * C + j] = P::multiply_add(x, y[j], dots[r * C + j]);
          }
        };
        int64_t i = 0;
        for (; i + W <= k; i += W) step(i, W);
        if (i < k) step(i, k - i);
        transpose(dots);
        vec total{};
        for (int w = 0; w < W; w++) total += dots[w];
        for (int r = 0; r < R; r++) std::memcpy(&block[r][c], (const float*)&total + r * C, C * sizeof(float));
      }
      for (int r = 0; r < smaller_of(R, m - row); r++) {
        Tile<1, 1> tile;
        tile.at[0][0] = keep_first(load(block[r]), end - column);
        epilogue(row + r, column, tile);
      }
    }
}

}  // namespace RADA_ISA
