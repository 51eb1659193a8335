// The logit reduction on the CPU: everything that is read off the mask, while its tile is in registers.
#pragma once

#include "../csrc/call.h"
#include "../csrc/workspace.h"
#include "../rational_projection/cpu.h"

namespace RADA_ISA {

using rada::Penalty;

// Attended rows [m, D] -> sums[m] = Σ_d M f h and row_deviations[m] (largest, sum or sum of squares of |M - 1| over d),
// over columns first to end. f[r], h[r]: the unit features of row r, whole vectors. change [m, D] receives M - 1, or is
// null.
template <class P>
void reduce_logits(float* sums, float* row_deviations, typename P::element* change, const typename P::element* attended,
                   int64_t m, int64_t width, const Linear<P>& layer, const float* const* f, const float* const* h,
                   Penalty penalty, int64_t first, int64_t end, typename P::element* copy) {
  vec totals[BLOCK_ROWS], deviations[BLOCK_ROWS];
  for (int64_t r = 0; r < m; r++) totals[r] = deviations[r] = vec{};
  apply<P>(layer, attended, m, width, first, end, copy, for_each([&](int64_t r, int64_t d, vec x) {
             const vec out = x + load(layer.bias + d);
             const vec diff = out < splat(-1.0f) ? splat(-1.0f) : out;  // NaN stays NaN
             if (change) P::put_first(change + r * width + d, diff, width - d);
             totals[r] += (diff + 1.0f) * (load(f[r] + d) * load(h[r] + d));
             if (penalty == Penalty::LINF)
               deviations[r] = larger(magnitude(diff), deviations[r]);
             else if (penalty == Penalty::L1)
               deviations[r] += magnitude(diff);
             else
               deviations[r] += diff * diff;
           }));
  for (int64_t r = 0; r < m; r++) {
    sums[r] = sum(totals[r]);
    row_deviations[r] = penalty == Penalty::LINF ? largest(deviations[r]) : sum(deviations[r]);
  }
}

// An image's deviation |M - 1| from those of its rows. A NaN in the image's sums makes it NaN.
inline float deviation_of(const float* sums, const float* row_deviations, int64_t classes, int64_t width,
                          Penalty penalty) {
  double result = 0, check = 0;
  for (int64_t k = 0; k < classes; k++) {
    check += sums[k] - sums[k];
    if (penalty == Penalty::LINF)
      result = row_deviations[k] > result ? row_deviations[k] : result;
    else
      result += row_deviations[k];
  }
  return (float)((penalty == Penalty::LINF ? result : result / ((double)classes * width)) + check);
}

// The largest |M - 1| of a row.
template <class P>
float largest_change(const typename P::element* change, int64_t width) {
  vec lanes{};
  for (int64_t d = 0; d < width; d += W) lanes = larger(magnitude(P::get_first(change + d, width - d)), lanes);
  return largest(lanes);
}

// The first place, k·D + d, of an image's largest |M - 1|, from the largest one of each row.
template <class P>
int64_t first_peak(const typename P::element* change, const float* row_largest, int64_t classes, int64_t width) {
  float largest_seen = -1;
  int64_t best = 0;
  for (int64_t k = 0; k < classes; k++)
    if (row_largest[k] > largest_seen) largest_seen = row_largest[k], best = k;
  for (int64_t d = 0; d < width; d += W) {
    const vec size = magnitude(P::get_first(change + best * width + d, width - d));
    for (int i = 0; i < W && d + i < width; i++)
      if (size[i] == largest_seen) return best * width + d + i;
  }
  return 0;  // a NaN: there is no largest
}

// The gradient of the output layer's result for one row: to [D]. relu passes none at M = 0.
template <class P>
void reduce_logits_backward(typename P::element* to, const typename P::element* change, const float* f, const float* h,
                            int64_t width, float grad_sum, float grad_deviation, int64_t peak, int64_t elements,
                            Penalty penalty) {
  const float share = penalty == Penalty::LINF ? 0 : grad_deviation / (float)elements;
  for (int64_t d = 0; d < width; d += W) {
    const vec m = P::get_first(change + d, width - d);
    vec grad = (load(f + d) * grad_sum) * load(h + d);
    if (penalty == Penalty::L1)
      grad += m > 0 ? splat(share) : m < 0 ? splat(-share) : vec{};
    else if (penalty == Penalty::MSE)
      grad += m * (2 * share);
    if (peak >= d && peak < smaller_of(d + W, width)) {
      const float size = m[peak - d];
      grad[peak - d] += size > 0 ? grad_deviation : size < 0 ? -grad_deviation : 0;
    }
    grad = m > -1.0f ? grad : vec{};
    P::put_first(to + d, grad, width - d);
  }
}

}  // namespace RADA_ISA
