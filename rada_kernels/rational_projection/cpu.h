// The rational projection on the CPU: rows of X are formed a block at a time, in the cache that the products read.
#pragma once

#include "../csrc/gemm.h"

namespace RADA_ISA {

// A layer's weight [D, D] as the operand B, with its bias padded to whole vectors.
struct PackedLayer {
  const word* weight;
  const float* bias;
};

// X[row] = (s f[b]) ⊙ h[k] for rows of the flattened [B, K], rounded once; to: [count, D]. sf and h have ld floats.
template <class P>
void rational_rows(typename P::element* to, const float* sf, const float* h, int64_t ld, int64_t first, int64_t count,
                   int64_t classes, int64_t width) {
  for (int64_t row = first; row < first + count; row++, to += width) {
    const float* a = sf + row / classes * ld;
    const float* b = h + row % classes * ld;
    for (int64_t d = 0; d < width; d += W) P::put_first(to + d, load(a + d) * load(b + d), width - d);
  }
}

// to[m, D] = rows[m, D] Wᵀ + c
template <class P>
void project(typename P::element* to, const typename P::element* rows, int64_t m, int64_t width,
             const PackedLayer& layer) {
  const int64_t words = width / P::per_word;
  multiply<P, true>(m, words, (const word*)rows, words, layer.weight, Panels(width),
                    [&](int64_t row, int count, int64_t column, const auto& c) {
                      constexpr int N = sizeof(c.at[0]) / sizeof(vec);
                      for (int r = 0; r < count; r++)
                        for (int v = 0; v < N; v++) {
                          const int64_t d = column + v * W;
                          P::put_first(to + (row + r) * width + d, c.at[r][v] + load(layer.bias + d), width - d);
                        }
                    });
}

// to[m, D] = rows[m, D] W, the gradient of the rows that went through a layer, added to what is there if `add`.
template <class P, class Put>
RADA_INLINE void project_back(const typename P::element* rows, int64_t m, int64_t width, const word* weight, Put&& put) {
  const int64_t words = width / P::per_word;
  multiply<P, true>(m, words, (const word*)rows, words, weight, Panels(width),
                    [&](int64_t row, int count, int64_t column, const auto& c) {
                      constexpr int N = sizeof(c.at[0]) / sizeof(vec);
                      for (int r = 0; r < count; r++)
                        for (int v = 0; v < N; v++) put(row + r, column + v * W, c.at[r][v]);
                    });
}

}  // namespace RADA_ISA
