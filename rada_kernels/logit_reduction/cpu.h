// The logit reduction on the CPU: everything that is read off the mask, while its tile is in registers.
#pragma once

#include "../csrc/call.h"
#include "../rational_projection/cpu.h"

namespace RADA_ISA {

using rada::Penalty;

// Attended rows [m, D] of one image -> sums[m] = Σ_d M f h and statistic[m] (largest, sum or sum of squares of
// M - 1 over d). h: the rows' class features. change [m, D] receives M - 1 unless null. f and h have ld floats.
// partial: scratch [2, m, W].
template <class P>
void reduce_logits(float* sums, float* statistic, float* change, const typename P::element* attended, int64_t m,
                   int64_t width, const PackedLayer& layer, const float* f, const float* h, int64_t ld,
                   Penalty penalty, float* partial) {
  const int64_t words = width / P::per_word;
  float* peaks = partial + m * W;
  std::memset(partial, 0, 2 * m * W * sizeof(float));
  multiply<P, true>(m, words, (const word*)attended, words, layer.weight, Panels(width),
                    [&](int64_t row, int count, int64_t column, const auto& c) {
                      constexpr int N = sizeof(c.at[0]) / sizeof(vec);
                      for (int r = 0; r < count; r++) {
                        vec total = load(partial + (row + r) * W), stat = load(peaks + (row + r) * W);
                        for (int v = 0; v < N; v++) {
                          const int64_t d = column + v * W;
                          const vec out = c.at[r][v] + load(layer.bias + d);
                          const vec diff = out < splat(-1.0f) ? splat(-1.0f) : out;  // NaN stays NaN
                          if (change) store_first(change + (row + r) * width + d, diff, width - d);
                          total += (diff + 1.0f) * (load(f + d) * load(h + (row + r) * ld + d));
                          if (penalty == Penalty::LINF)
                            stat = larger(magnitude(diff), stat);
                          else if (penalty == Penalty::L1)
                            stat += magnitude(diff);
                          else
                            stat += diff * diff;
                        }
                        store(partial + (row + r) * W, total);
                        store(peaks + (row + r) * W, stat);
                      }
                    });
  for (int64_t r = 0; r < m; r++) {
    sums[r] = sum(load(partial + r * W));
    const vec stat = load(peaks + r * W);
    statistic[r] = penalty == Penalty::LINF ? largest(stat) : sum(stat);
  }
}

// An image's statistic of |M - 1| from those of its rows. A NaN in the image's sums makes it NaN.
inline float deviation_of(const float* sums, const float* statistic, int64_t classes, int64_t width, Penalty penalty) {
  double result = 0, check = 0;
  for (int64_t k = 0; k < classes; k++) {
    check += sums[k] - sums[k];
    if (penalty == Penalty::LINF)
      result = statistic[k] > result ? statistic[k] : result;
    else
      result += statistic[k];
  }
  return (float)((penalty == Penalty::LINF ? result : result / ((double)classes * width)) + check);
}

// The first place, k·D + d, of an image's largest |M - 1|. A NaN counts as the largest.
inline int64_t first_peak(const float* change, int64_t count) {
  int64_t place = 0;
  float peak = -1;
  for (int64_t i = 0; i < count; i++) {
    const float size = change[i] < 0 ? -change[i] : change[i];
    if (!(size <= peak)) {
      if (size != size) return i;
      peak = size;
      place = i;
    }
  }
  return place;
}

// The gradient of the output layer's result for one row: to [D]. relu passes none at M = 0.
template <class P>
void reduce_logits_backward(typename P::element* to, const float* change, const float* f, const float* h, int64_t width,
                            float grad_sum, float grad_deviation, int64_t peak, int64_t elements, Penalty penalty) {
  const float share = penalty == Penalty::LINF ? 0 : grad_deviation / (float)elements;
  for (int64_t d = 0; d < width; d += W) {
    const vec m = load_first(change + d, width - d);
    vec grad = (load(f + d) * grad_sum) * load(h + d);
    if (penalty == Penalty::L1)
      grad += m > 0 ? splat(share) : m < 0 ? splat(-share) : vec{};
    else if (penalty == Penalty::MSE)
      grad += m * (2 * share);
    if (peak >= d && peak < smaller_of(d + W, width)) {
      const float size = change[peak];
      grad[peak - d] += size > 0 ? grad_deviation : size < 0 ? -grad_deviation : 0;
    }
    grad = m > -1.0f ? grad : vec{};
    P::put_first(to + d, grad, width - d);
  }
}

}  // namespace RADA_ISA
