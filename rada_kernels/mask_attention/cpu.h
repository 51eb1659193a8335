// The mask attention on the CPU, one (image, head) pair at a time.
//
// A block of SCORE_ROWS score rows is exponentiated as its tiles leave the product, against a reference that a
// block before it has seen; the exponentials of both query kinds stay in memory, as elements, until the joint
// normalisers are known, and are then added before the one product with the values. Where they would take more than
// score_bytes they stream: forward, each kind has a product of its own (8K²D instead of 6K²D); backward, scores are
// computed twice.
#pragma once

#include "../csrc/call.h"
#include "../csrc/gemm.h"

namespace RADA_ISA {

using rada::KINDS;
using rada::SCORE_ROWS;

constexpr double LOG2E = 1.4426950408889634;
// A block whose exponentials add up to more is computed again against its own maximum.
constexpr float LARGE = 1e30f;

// Forward, scores stream above this too: a product on tile registers takes less time than reading back what the
// second-level cache did not hold.
#if defined(RADA_TILES)
constexpr int64_t HELD_SCORE_BYTES = 1 << 20;
#else
constexpr int64_t HELD_SCORE_BYTES = INT64_MAX;
#endif

// One pair's rows: [K, E] elements, their rows `ld` elements apart.
template <class P>
struct Rows {
  const typename P::element* at;
  int64_t ld;

  const word* words(int64_t row) const { return (const word*)(at + row * ld); }
  int64_t word_ld() const { return ld / P::per_word; }
};

struct Shape {
  int64_t classes, width;  // K, E
  Panels over_classes, over_width;
  int64_t blocks;
  bool streams;

  Shape(int64_t classes, int64_t width, int64_t element_bytes, int64_t score_bytes)
      : classes(classes), width(width), over_classes(classes), over_width(width), blocks(ceil_div(classes, SCORE_ROWS)),
        streams(classes > SCORE_ROWS && KINDS * classes * ld() * element_bytes > score_bytes) {}
  int64_t score_rows() const { return streams ? SCORE_ROWS : classes; }  // in memory at a time
  int64_t block_rows(int64_t block) const { return smaller_of(SCORE_ROWS, classes - block * SCORE_ROWS); }
  int64_t ld() const { return round_up(classes, 16); }  // of a row of scores: the same for every W
};

// The exponentials 2^(factor · (query keyᵀ - reference)) of `rows` score rows; their sum. Padding columns are zero.
// The reference is subtracted from the bare product, so that a score that equals it becomes exactly 1. Once the sum is
// LARGE, or NaN, the rest is left out.
template <class P>
float exponentials(typename P::element* to, const word* query, int64_t query_ld, int64_t rows, const word* keys,
                   const Shape& s, float factor, float reference) {
  vec total{};
  bool large = false;
  const vec scale = splat(factor), shift = splat(reference);
  const int64_t ld = s.ld();
  multiply<P, true>(rows, s.width / P::per_word, query, query_ld, keys, s.over_classes,
                    [&](int64_t row, int64_t column, const auto& tile) __attribute__((always_inline)) {
                      if (row == 0) large = !(sum(total) < LARGE);
                      if (large) return;
                      const bool last = column + tile.columns > s.classes;
                      tile.each([&](int r, int v, vec x) __attribute__((always_inline)) {
                        vec e = exp2<P::coarse>((x - shift) * scale);
                        if (last) e = keep_first(e, s.classes - column - v * W);
                        total += e;
                        P::put(to + (row + r) * ld + column + v * W, e);
                      });
                    });
  return sum(total);
}

// The same against the block's own maximum, which is written to reference. scores: scratch [rows, ld].
template <class P>
float exponentials_from_maximum(typename P::element* to, const word* query, int64_t query_ld, int64_t rows,
                                const word* keys, const Shape& s, float factor, float* reference, float* scores) {
  vec top = splat(-__builtin_inff());
  const int64_t ld = s.ld();
  multiply<P, true>(rows, s.width / P::per_word, query, query_ld, keys, s.over_classes,
                    [&](int64_t row, int64_t column, const auto& tile) __attribute__((always_inline)) {
                      tile.each([&](int r, int v, vec x) __attribute__((always_inline)) {
                        // Not the padding: its zeros may lie far above every score.
                        const vec counted = first_or(x, s.classes - column - v * W, top);
                        top = larger(counted, top);
                        store(scores + (row + r) * ld + column + v * W, x);
                      });
                    });
  *reference = largest(top);
  const vec scale = splat(factor), shift = splat(*reference);
  vec total{};
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < ld; j += W) {
      const vec e = keep_first(exp2<P::coarse>((load(scores + r * ld + j) - shift) * scale), s.classes - j);
      total += e;
      P::put(to + r * ld + j, e);
    }
  return sum(total);
}

// What a pair's forward pass works in.
template <class P>
struct AttentionScratch {
  word* keys;                         // keyᵀ panels
  word* values;                       // value panels
  typename P::element* exponentials;  // [KINDS, score_rows, ld]
  float* scores;                      // [SCORE_ROWS, ld]
  float* kinds;        // [KINDS, K, padded E] each kind's rows against its block's reference, where scores stream
  float* block_scale;  // [KINDS, blocks]
  float* image_row;    // [ld] then [padded E]
  typename P::element* mixed;  // [SCORE_ROWS, ld]
};

// softmax(factor · q keyᵀ) for one query row q [E] (in units of log2); keys in panels; row [ld], padding zero.
template <class P>
void image_row_weights(float* row, const typename P::element* query, const word* keys, const Shape& s, float factor) {
  vec highest = splat(-__builtin_inff());
  for (int64_t j = s.over_classes.padded(); j < s.ld(); j++) row[j] = 0;
  multiply<P, true>(1, s.width / P::per_word, (const word*)query, 0, keys, s.over_classes,
                    [&](int64_t, int64_t column, const auto& tile) __attribute__((always_inline)) {
                      tile.each([&](int, int v, vec x) __attribute__((always_inline)) {
                        const int64_t j = column + v * W;
                        highest = larger(first_or(x * factor, s.classes - j, highest), highest);
                        store(row + j, x * factor);
                      });
                    });
  const float top = largest(highest);
  vec total{};
  for (int64_t j = 0; j < s.ld(); j += W) {
    const vec e = keep_first(exp2(load(row + j) - top), s.classes - j);
    total += e;
    store(row + j, e);
  }
  const float share = 1 / sum(total);
  for (int64_t j = 0; j < s.ld(); j += W) store(row + j, load(row + j) * share);
}

// to [padded E] = row [K] · rows [K, E]
template <class P>
void weighted_sum(float* to, const float* row, const Rows<P>& rows, const Shape& s) {
  for (int64_t e = 0; e < s.width; e += W) {
    vec total{};
    for (int64_t j = 0; j < s.classes; j++) total += P::get_first(rows.at + j * rows.ld + e, s.width - e) * row[j];
    store(to + e, total);
  }
}

// Attended rows of one pair. queries[n] null: kind not in use; image_query [E] likewise. references[n] comes out: the
// largest reference of a block, against which the backward pass computes the exponentials again.
template <class P>
void attend(typename P::element* attended, int64_t attended_ld, const typename P::element* image_query,
            const Rows<P>* const* queries, const Rows<P>& key, const Rows<P>& value, double score_factor,
            const Shape& s, const AttentionScratch<P>& scratch, float* const* references) {
  const float factor = score_factor * LOG2E;
  const float count = (image_query != nullptr) + (queries[0] != nullptr) + (queries[1] != nullptr);
  pack_columns(scratch.keys, key.words(0), key.word_ld(), s.width / P::per_word, s.classes);
  pack_rows<P>(scratch.values, value.at, value.ld, s.classes, s.width);
  const int64_t width_ld = s.over_width.padded(), ld = s.ld();
  auto weigh_values = [&](int64_t rows, const typename P::element* weights, auto&& put) {
    multiply<P, true>(
        rows, ceil_div(s.classes, P::per_word), (const word*)weights, ld / P::per_word, scratch.values, s.over_width,
        [&](int64_t row, int64_t column, const auto& tile) __attribute__((always_inline)) {
          tile.each([&](int r, int v, vec x) __attribute__((always_inline)) { put(row + r, column + v * W, x); });
        });
  };
  typename P::element* const exps[KINDS] = {scratch.exponentials, scratch.exponentials + s.score_rows() * ld};
  float* const block_scale = scratch.block_scale;  // from a block's reference to the pair's
  float totals[KINDS] = {};
  for (int n = 0; n < KINDS; n++) {
    if (!queries[n]) continue;
    float reference = 0, total = 0, top = 0;  // total: all blocks so far, against top
    for (int64_t block = 0; block < s.blocks; block++) {
      const int64_t first = block * SCORE_ROWS, rows = s.block_rows(block);
      const word* query = queries[n]->words(first);
      typename P::element* to = exps[n] + (s.streams ? 0 : first * ld);
      float sum = LARGE;
      if (block) sum = exponentials<P>(to, query, queries[n]->word_ld(), rows, scratch.keys, s, factor, reference);
      if (!(sum < LARGE))
        sum = exponentials_from_maximum<P>(to, query, queries[n]->word_ld(), rows, scratch.keys, s, factor, &reference,
                                           scratch.scores);
      block_scale[n * s.blocks + block] = reference;
      if (block == 0 || reference > top) {
        total = block ? total * __builtin_exp2f((top - reference) * factor) : 0;
        top = reference;
      }
      total += sum;  // reference is top: it never falls below a block before it
      if (s.streams) {
        float* kind = scratch.kinds + (n * s.classes + first) * width_ld;
        weigh_values(rows, to, [&](int64_t row, int64_t e, vec v) { store(kind + row * width_ld + e, v); });
      }
    }
    for (int64_t block = 0; block < s.blocks; block++)
      block_scale[n * s.blocks + block] = __builtin_exp2f((block_scale[n * s.blocks + block] - top) * factor);
    *references[n] = top;
    totals[n] = total;
  }
  float* image_part = scratch.image_row + ld;
  std::memset(image_part, 0, width_ld * sizeof(float));
  if (image_query) {
    image_row_weights<P>(scratch.image_row, image_query, scratch.keys, s, factor);
    weighted_sum<P>(image_part, scratch.image_row, value, s);
    for (int64_t e = 0; e < s.width; e += W) store(image_part + e, load(image_part + e) * (1 / count));
  }
  auto put = [&](int64_t row, int64_t e, vec v) __attribute__((always_inline)) {
    P::put_first(attended + row * attended_ld + e, v + load(image_part + e), s.width - e);
  };
  if (!queries[0] && !queries[1]) {
    for (int64_t i = 0; i < s.classes; i++)
      for (int64_t e = 0; e < s.width; e += W) put(i, e, vec{});
    return;
  }
  auto share_of = [&](int n, int64_t block) {
    return queries[n] ? block_scale[n * s.blocks + block] * (s.classes / (count * totals[n])) : 0;
  };
  for (int64_t block = 0; block < s.blocks; block++) {
    const int64_t first = block * SCORE_ROWS, rows = s.block_rows(block);
    const float a = share_of(0, block), b = share_of(1, block);
    const int one = queries[0] ? 0 : 1, other = queries[1] ? 1 : 0;  // the same, times zero, where one is not in use
    if (s.streams) {
      const float* x = scratch.kinds + (one * s.classes + first) * width_ld;
      const float* y = scratch.kinds + (other * s.classes + first) * width_ld;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t e = 0; e < s.width; e += W)
          put(first + r, e, load(x + r * width_ld + e) * a + load(y + r * width_ld + e) * b);
      continue;
    }
    const auto *x = exps[one] + first * ld, *y = exps[other] + first * ld;
    for (int64_t i = 0; i < rows * ld; i += W) P::put(scratch.mixed + i, P::get(x + i) * a + P::get(y + i) * b);
    weigh_values(rows, scratch.mixed,
                 [&](int64_t row, int64_t e, vec v) __attribute__((always_inline)) { put(first + row, e, v); });
  }
}

template <class P>
struct AttentionBackwardScratch {
  word *keys, *values;                // keyᵀ and valueᵀ panels
  word* key_rows;                     // key panels
  typename P::element* exponentials;  // [KINDS, score_rows, ld]
  typename P::element* grad_weights;  // [score_rows, ld] dP = dO valueᵀ
  float *grad_key, *grad_value;       // [K, padded E]
  typename P::element* grad_scores;   // [KINDS, SCORE_ROWS, ld]
  word* grad_scores_by_column;        // [KINDS · words of SCORE_ROWS, ld]; not used where an element is a word
  word* weights_by_column;            // [words of SCORE_ROWS, ld]
  word* block_rows;                   // panels of KINDS · SCORE_ROWS rows
  float* image_row;                   // [2 ld] then [padded E]
};

template <class P>
struct AttentionGradients {
  typename P::element *key, *value;  // [K, E], rows ld apart
  typename P::element* rational;     // null without that kind
  float* text;                       // [K, E], rows ld apart, or null
  float* image;                      // [E] or null
  int64_t ld;
};

// grad [K, E] += A B over `words` words of score rows: A in columns, rows ld apart, B packed.
template <class P>
void add_by_class(float* grad, const word* a, int64_t words, const word* b, const Shape& s) {
  const int64_t ld = s.over_width.padded();
  multiply<P, false>(s.classes, words, a, s.ld(), b, s.over_width,
                     [&](int64_t row, int64_t column, const auto& tile) __attribute__((always_inline)) {
                       tile.each([&](int r, int v, vec x) __attribute__((always_inline)) {
                         float* at = grad + (row + r) * ld + column + v * W;
                         store(at, load(at) + x);
                       });
                     });
}

// dS_n = A_n ⊙ (dA - δ_n) with one δ_n a pair. The scores are computed again: that costs less than fresh memory for what
// would be kept of them.
template <class P>
void attend_backward(const AttentionGradients<P>& grads, const Rows<P>& grad_rows,
                     const typename P::element* image_query, const Rows<P>* const* queries, const Rows<P>& key,
                     const Rows<P>& value, double score_factor, const Shape& s,
                     const AttentionBackwardScratch<P>& scratch, const float* const* references) {
  typedef typename P::element element;
  const float count = (image_query != nullptr) + (queries[0] != nullptr) + (queries[1] != nullptr);
  const int64_t words = s.width / P::per_word, width_ld = s.over_width.padded(), ld = s.ld();
  pack_columns(scratch.keys, key.words(0), key.word_ld(), words, s.classes);
  pack_columns(scratch.values, value.words(0), value.word_ld(), words, s.classes);
  pack_rows<P>(scratch.key_rows, key.at, key.ld, s.classes, s.width);
  std::memset(scratch.grad_key, 0, s.classes * width_ld * sizeof(float));
  std::memset(scratch.grad_value, 0, s.classes * width_ld * sizeof(float));

  element* exps[KINDS] = {};
  float delta[KINDS] = {};
  float total[KINDS] = {};
  for (int n = 0; n < KINDS; n++)
    if (queries[n]) exps[n] = scratch.exponentials + n * s.score_rows() * ld;
  auto exps_of = [&](int n, int64_t block) { return exps[n] + (s.streams ? 0 : block * SCORE_ROWS * ld); };
  auto grad_weights_of = [&](int64_t block) {
    return scratch.grad_weights + (s.streams ? 0 : block * SCORE_ROWS * ld);
  };
  // Exponentials and dP of one block, with the sums of the exponentials and of their products with dP. All sums are of
  // the numbers that the second pass reads, so that what cancels, cancels.
  auto compute_scores = [&](int64_t block, float* sums, float* dots) {
    const int64_t first = block * SCORE_ROWS, rows = s.block_rows(block);
    for (int n = 0; n < KINDS; n++)
      if (exps[n])
        exponentials<P>(exps_of(n, block), queries[n]->words(first), queries[n]->word_ld(), rows, scratch.keys, s,
                        score_factor * LOG2E, *references[n]);
    element* dP = grad_weights_of(block);
    vec products[KINDS] = {}, parts[KINDS] = {};
    const element* a = exps_of(exps[0] ? 0 : 1, block);
    const element* b = exps_of(exps[1] ? 1 : 0, block);
    multiply<P, true>(rows, words, grad_rows.words(first), grad_rows.word_ld(), scratch.values, s.over_classes,
                      [&](int64_t row, int64_t column, const auto& tile) __attribute__((always_inline)) {
                        tile.each([&](int r, int v, vec x) __attribute__((always_inline)) {
                          const int64_t at = (row + r) * ld + column + v * W;
                          const vec d = P::put_rounded(dP + at, x), ea = P::get(a + at), eb = P::get(b + at);
                          parts[0] += ea, parts[1] += eb;
                          products[0] += ea * d, products[1] += eb * d;
                        });
                      });
    for (int n = 0; n < KINDS; n++) sums[n] = sum(parts[n]), dots[n] = sum(products[n]);
  };
  const int64_t kinds = (queries[0] != nullptr) + (queries[1] != nullptr);
  for (int64_t block = 0; block < s.blocks && kinds; block++) {
    float sums[KINDS], dots[KINDS];
    compute_scores(block, sums, dots);
    for (int n = 0; n < KINDS; n++) {
      total[n] += sums[n];
      delta[n] += dots[n];
    }
  }
  for (int n = 0; n < KINDS; n++) delta[n] = exps[n] ? delta[n] / total[n] : 0;
  // A_n / kinds = exponentials times this.
  float scale[KINDS];
  for (int n = 0; n < KINDS; n++) scale[n] = exps[n] ? s.classes / (count * total[n]) : 0;

  for (int64_t block = 0; block < s.blocks && kinds; block++) {
    const int64_t first = block * SCORE_ROWS, rows = s.block_rows(block), row_words = ceil_div(rows, P::per_word);
    if (s.streams) {
      float sums[KINDS], dots[KINDS];
      compute_scores(block, sums, dots);
    }
    // dS of both kinds and A; by row where a product has score rows to its left, by column where it sums over them.
    const element* dP = grad_weights_of(block);
    const element* x = exps_of(exps[0] ? 0 : 1, block);
    const element* y = exps_of(exps[1] ? 1 : 0, block);
    const float a = scale[0], b = scale[1], factor = score_factor;
    element* dS[KINDS] = {};
    word* by_column[KINDS] = {};
    int64_t used = 0;
    for (int n = 0; n < KINDS; n++) {
      if (!exps[n]) continue;
      dS[n] = scratch.grad_scores + used * rows * ld;
      by_column[n] = scratch.grad_scores_by_column + used * row_words * ld;
      if (P::per_word == 1) by_column[n] = (word*)dS[n];
      used++;
    }
    for (int64_t i = 0; i < rows; i += P::per_word)
      for (int64_t j = 0; j < ld; j += W) {
        vec scores[KINDS][2] = {}, weights[2] = {};
        auto compute = [&](int r) __attribute__((always_inline)) {
          const int64_t at = (i + r) * ld + j;
          const vec d = P::get(dP + at), ea = P::get(x + at) * a, eb = P::get(y + at) * b;
          scores[0][r] = ea * factor * (d - delta[0]);
          scores[1][r] = eb * factor * (d - delta[1]);
          weights[r] = ea + eb;
          if (dS[0]) P::put(dS[0] + at, scores[0][r]);
          if (dS[1]) P::put(dS[1] + at, scores[1][r]);
        };
        compute(0);
        if (P::per_word > 1 && i + 1 < rows) compute(1);
        const int64_t at = i / P::per_word * ld + j;
        for (int n = 0; n < KINDS && P::per_word > 1; n++)
          if (dS[n]) store(by_column[n] + at, P::pair(scores[n][0], scores[n][1]));
        store(scratch.weights_by_column + at, P::pair(weights[0], weights[1]));
      }
    used = 0;
    for (int n = 0; n < KINDS; n++) {
      if (!exps[n]) continue;
      multiply<P, true>(rows, ceil_div(s.classes, P::per_word), (const word*)dS[n], ld / P::per_word, scratch.key_rows,
                        s.over_width,
                        [&](int64_t row, int64_t column, const auto& tile) __attribute__((always_inline)) {
                          tile.each([&](int r, int v, vec c) __attribute__((always_inline)) {
                            const int64_t e = column + v * W, at = (first + row + r) * grads.ld + e;
                            if (n == rada::TEXT_KIND)
                              store_first(grads.text + at, c, s.width - e);
                            else
                              P::put_first(grads.rational + at, c, s.width - e);
                          });
                        });
      pack_rows<P>(scratch.block_rows, queries[n]->at + first * queries[n]->ld, queries[n]->ld, rows, s.width,
                   kinds * row_words, row_words * used++);
    }
    add_by_class<P>(scratch.grad_key, by_column[exps[0] ? 0 : 1], kinds * row_words, scratch.block_rows, s);
    pack_rows<P>(scratch.block_rows, grad_rows.at + first * grad_rows.ld, grad_rows.ld, rows, s.width);
    add_by_class<P>(scratch.grad_value, scratch.weights_by_column, row_words, scratch.block_rows, s);
  }

  if (image_query) {
    float* weights = scratch.image_row;
    float* grad_row = weights + s.ld();
    float* upstream = grad_row + s.ld();  // Σ_i dO[i]
    image_row_weights<P>(weights, image_query, scratch.keys, s, score_factor * LOG2E);
    for (int64_t j = 0; j < s.ld(); j++) grad_row[j] = 1;
    weighted_sum<P>(upstream, grad_row, grad_rows, s);
    float dot = 0;
    for (int64_t j = 0; j < s.classes; j++) {
      vec u{};
      for (int64_t e = 0; e < s.width; e += W)
        u += keep_first(load(upstream + e), s.width - e) * P::get_first(value.at + j * value.ld + e, s.width - e);
      grad_row[j] = sum(u);
      dot += weights[j] * grad_row[j];
    }
    for (int64_t j = 0; j < s.classes; j++) {
      weights[j] /= count;
      grad_row[j] = (float)score_factor * weights[j] * (grad_row[j] - dot);
    }
    for (int64_t j = 0; j < s.classes; j++)
      for (int64_t e = 0; e < s.width; e += W) {
        float* k = scratch.grad_key + j * width_ld + e;
        float* v = scratch.grad_value + j * width_ld + e;
        store(k, load(k) + P::get_first(image_query + e, s.width - e) * grad_row[j]);
        store(v, load(v) + load(upstream + e) * weights[j]);
      }
    weighted_sum<P>(upstream, grad_row, key, s);
    for (int64_t e = 0; e < s.width; e += W) store_first(grads.image + e, load(upstream + e), s.width - e);
  }
  for (int64_t j = 0; j < s.classes; j++)
    for (int64_t e = 0; e < s.width; e += W) {
      P::put_first(grads.key + j * grads.ld + e, load(scratch.grad_key + j * width_ld + e), s.width - e);
      P::put_first(grads.value + j * grads.ld + e, load(scratch.grad_value + j * width_ld + e), s.width - e);
    }
}

}  // namespace RADA_ISA
