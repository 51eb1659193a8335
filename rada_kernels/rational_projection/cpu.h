// The rational projection on the CPU: rows of X are formed a block at a time, in the cache that the products read.
#pragma once

#include "../csrc/convert.h"
#include "../csrc/gemm.h"

namespace RADA_ISA {

// A layer y = x Wᵀ + c. Its weight is packed once a call as the operand of each direction, or read in place
// where too few rows go through it to pay for that.
template <class P>
struct Linear {
  typedef typename P::element element;

  Matrix weight{};                    // [D, D], of any type and layout
  const word* packed = nullptr;       // Wᵀ in panels, or null
  const word* packed_back = nullptr;  // W in panels, or null
  const float* bias = nullptr;        // [D] padded to whole vectors

  // A block of the weight: where it lies, or else in `copy`.
  Rows<P> block(int64_t row, int64_t count, int64_t column, int64_t columns, element* copy) const {
    const Matrix from = weight.block(row, count, column, columns);
    if (weight.plain(P::type)) return {(const element*)from.at, weight.columns};
    convert({copy, P::type, count, columns, columns, 1}, from);
    return {copy, columns};
  }
};

// rows[m, D] Wᵀ, columns first to end, to epilogue(row, column, tile). Packed, all columns are computed.
// copy: scratch [IN_PLACE_COLUMNS, D].
template <class P, class Epilogue>
RADA_INLINE void apply(const Linear<P>& layer, const typename P::element* rows, int64_t m, int64_t width, int64_t first,
                       int64_t end, typename P::element* copy, Epilogue&& epilogue) {
  const int64_t words = width / P::per_word;
  if (layer.packed) return multiply<P, true>(m, words, (const word*)rows, words, layer.packed, Panels(width), epilogue);
  auto multiply_by = [&](const auto& b) RADA_LAMBDA {
    multiply_in_place<P>(m, words, (const word*)rows, words, b, first, end, epilogue);
  };
  // 16 bits are widened in the product's registers: a copy of them would go through the second-level cache.
  if constexpr (P::per_word == 1)
    if (layer.weight.column_stride == 1)
      return with_numbers(layer.weight.type, [&](auto numbers) {
        typedef DecodedRows<decltype(numbers)> B;
        multiply_by(B{(decltype(B::at))layer.weight.block(first, end - first, 0, width).at, layer.weight.row_stride});
      });
  multiply_by(layer.block(first, end - first, 0, width, copy));
}

// rows[m, D] W, columns first to end: the gradient of a layer's input, to put(row, column, vec).
template <class P, class Put>
RADA_INLINE void apply_back(const Linear<P>& layer, const typename P::element* rows, int64_t m, int64_t width,
                            int64_t first, int64_t end, typename P::element* copy, Put&& put) {
  const int64_t words = width / P::per_word;
  if (layer.packed_back)
    return multiply<P, true>(m, words, (const word*)rows, words, layer.packed_back, Panels(width), for_each(put));
  const Rows<P> b = layer.block(0, width, first, end - first, copy);
  multiply_panels<P, true>(
      m, words, (const word*)rows, words, Panels(end - first),
      [&](int64_t column, auto) { return RowsOf<P>{b.at + column, b.ld, end - first - column}; },
      for_each([&](int64_t row, int64_t column, vec x) { put(row, first + column, x); }));
}

// to = scale · features / |features|, padded to ld floats; the inverse norm: 0 for a zero row, 1 without normalize.
template <class P>
float unit_row(float* to, const typename P::element* features, int64_t width, int64_t ld, bool normalize) {
  constexpr double ZERO_NORM = 1e-12;  // as in numerics.py
  double square = 0;
  for (int64_t d = 0; d < ld; d += W) {
    const vec x = P::get_first(features + d, width - d);
    for (int i = 0; i < W && normalize; i++) square += (double)x[i] * x[i];
    store(to + d, x);
  }
  if (!normalize) return 1;
  const double norm = __builtin_sqrt(square);
  const float inverse = norm < ZERO_NORM ? 0 : (float)(1 / norm);
  for (int64_t d = 0; d < ld; d += W) store(to + d, load(to + d) * inverse);
  return inverse;
}

// The gradient of a row from that of the unit row, in place: (g - u (u·g)) · inverse.
inline void unit_row_backward(float* grad, const float* unit, float inverse, int64_t width, bool normalize) {
  if (!normalize) return;
  vec along{};
  for (int64_t d = 0; d < width; d += W) along += load_first(grad + d, width - d) * load(unit + d);
  const float dot = sum(along);
  for (int64_t d = 0; d < width; d += W)
    store_first(grad + d, (load_first(grad + d, width - d) - load(unit + d) * dot) * inverse, width - d);
}

// to[count, D] = scale · rows, rounded once. rows have ld floats.
template <class P>
void scaled_rows(typename P::element* to, const float* rows, int64_t ld, int64_t count, int64_t width, float scale) {
  for (int64_t r = 0; r < count; r++, to += width, rows += ld)
    for (int64_t d = 0; d < width; d += W) P::put_first(to + d, load(rows + d) * scale, width - d);
}

// X[row] = (s f[b]) ⊙ h[k] for rows of the flattened [B, K], rounded once; to: [count, D]. f and h have ld floats.
template <class P>
void rational_rows(typename P::element* to, const float* f, const float* h, int64_t ld, int64_t first, int64_t count,
                   int64_t classes, int64_t width, float scale) {
  for (int64_t row = first; row < first + count; row++, to += width) {
    const float* a = f + row / classes * ld;
    const float* b = h + row % classes * ld;
    for (int64_t d = 0; d < width; d += W) P::put_first(to + d, load(a + d) * scale * load(b + d), width - d);
  }
}

// to[m, D] = rows[m, D] Wᵀ + c, columns first to end.
template <class P>
void project(typename P::element* to, const typename P::element* rows, int64_t m, int64_t width, const Linear<P>& layer,
             int64_t first, int64_t end, typename P::element* copy) {
  apply<P>(layer, rows, m, width, first, end, copy, for_each([&](int64_t row, int64_t d, vec x) {
             P::put_first(to + row * width + d, x + load(layer.bias + d), width - d);
           }));
}

}  // namespace RADA_ISA
