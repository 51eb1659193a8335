// The mask attention on the CPU, one (image, head) pair at a time.
//
// A block of SCORE_ROWS score rows is exponentiated as its tiles leave the product, against a reference that a
// block before it has seen; the exponentials of both query kinds stay in memory until the joint normalisers are
// known, and are then added before the one product with the values. Where they would take more than score_bytes
// they stream: forward, each kind has a product of its own (8K²D instead of 6K²D); backward, scores are computed twice.
#pragma once

#include "../csrc/call.h"
#include "../csrc/gemm.h"

namespace RADA_ISA {

using rada::KINDS;
using rada::SCORE_ROWS;

constexpr double LOG2E = 1.4426950408889634;
// A block whose exponentials add up to more is computed again against its own maximum.
constexpr float LARGE = 1e30f;

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

  Shape(int64_t classes, int64_t width, int64_t score_bytes)
      : classes(classes), width(width), over_classes(classes), over_width(width), blocks(ceil_div(classes, SCORE_ROWS)),
        streams(classes > SCORE_ROWS && KINDS * classes * ld() * (int64_t)sizeof(float) > score_bytes) {}
  int64_t score_rows() const { return streams ? SCORE_ROWS : classes; }  // in memory at a time, unless kept
  int64_t block_rows(int64_t block) const { return smaller_of(SCORE_ROWS, classes - block * SCORE_ROWS); }
  int64_t ld() const { return round_up(classes, 16); }  // of a row of scores, in floats: the same for every W
};

// The exponentials 2^(factor · (query keyᵀ - reference)) of `rows` score rows; their sum. Padding columns are zero.
// The reference is subtracted from the bare product, so that the largest exponential is exactly 1.
template <class P>
float exponentials(float* to, const word* query, int64_t query_ld, int64_t rows, const word* keys, const Shape& s,
                   float factor, float reference) {
  vec total{};
  const vec scale = splat(factor), shift = splat(reference);
  multiply<P, true>(rows, s.width / P::per_word, query, query_ld, keys, s.over_classes,
                    [&](int64_t row, int count, int64_t column, const auto& c) {
                      constexpr int N = sizeof(c.at[0]) / sizeof(vec);
                      const bool last = column + N * W > s.classes;
                      for (int r = 0; r < count; r++)
                        for (int v = 0; v < N; v++) {
                          vec e = exp2((c.at[r][v] - shift) * scale);
                          if (last) e = keep_first(e, s.classes - column - v * W);
                          total += e;
                          store(to + (row + r) * s.ld() + column + v * W, e);
                        }
                    });
  return sum(total);
}

// The same against the block's own maximum, which is written to reference.
template <class P>
float exponentials_from_maximum(float* to, const word* query, int64_t query_ld, int64_t rows, const word* keys,
                                const Shape& s, float factor, float* reference) {
  vec top = splat(-__builtin_inff());
  multiply<P, true>(rows, s.width / P::per_word, query, query_ld, keys, s.over_classes,
                    [&](int64_t row, int count, int64_t column, const auto& c) {
                      constexpr int N = sizeof(c.at[0]) / sizeof(vec);
                      for (int r = 0; r < count; r++)
                        for (int v = 0; v < N; v++) {
                          const vec x = c.at[r][v];
                          // Not the padding: its zeros may lie far above every score.
                          if (column + (v + 1) * W <= s.classes)
                            top = larger(x, top);
                          else
                            for (int64_t i = 0; i < s.classes - column - v * W; i++)
                              top[i] = x[i] > top[i] ? x[i] : top[i];
                          store(to + (row + r) * s.ld() + column + v * W, x);
                        }
                    });
  *reference = largest(top);
  const vec scale = splat(factor), shift = splat(*reference);
  vec total{};
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < s.ld(); j += W) {
      const vec e = keep_first(exp2((load(to + r * s.ld() + j) - shift) * scale), s.classes - j);
      total += e;
      store(to + r * s.ld() + j, e);
    }
  return sum(total);
}

// What a pair's forward pass works in.
struct AttentionScratch {
  word* keys;             // keyᵀ panels
  word* values;           // value panels
  float* exponentials;    // [KINDS, score_rows, ld]
  float* kinds;           // [KINDS, K, padded E] each kind's rows against its block's reference, where scores stream
  float* block_scale;     // [KINDS, blocks]
  float* image_row;       // [ld] then [padded E]
  word* mixed;            // [SCORE_ROWS, ld] elements
};

// softmax(factor · q keyᵀ) for one query row q [E] (in units of log2); row [ld], padding zero.
template <class P>
void image_row_weights(float* row, const float* query, const Rows<P>& key, const Shape& s, float factor) {
  float top = -__builtin_inff();
  for (int64_t j = 0; j < s.classes; j++) {
    vec dot{};
    for (int64_t e = 0; e < s.width; e += W)
      dot += load_first(query + e, s.width - e) * P::get_first(key.at + j * key.ld + e, s.width - e);
    row[j] = sum(dot) * factor;
    top = row[j] > top ? row[j] : top;
  }
  for (int64_t j = s.classes; j < s.ld(); j++) row[j] = 0;
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
    for (int64_t j = 0; j < s.classes; j++)
      total += P::get_first(rows.at + j * rows.ld + e, s.width - e) * row[j];
    store(to + e, total);
  }
}

// Attended rows of one pair. queries[n] null: kind not in use; image_query [E] likewise. statistics[n] and
// block_scale[n] come out as call.h describes them. kept: exps are of all rows, to stay.
template <class P>
void attend(typename P::element* attended, int64_t attended_ld, const float* image_query, const Rows<P>* const* queries,
            const Rows<P>& key, const Rows<P>& value, double score_factor, const Shape& s,
            const AttentionScratch& scratch, bool kept, float* const* exps, float* const* block_scale,
            float* const* statistics) {
  const float factor = score_factor * LOG2E;
  const float count = (image_query != nullptr) + (queries[0] != nullptr) + (queries[1] != nullptr);
  pack_columns(scratch.keys, key.words(0), key.word_ld(), s.width / P::per_word, s.classes);
  pack_rows<P>(scratch.values, value.at, value.ld, s.classes, s.width);
  const bool streams = s.streams && !kept;
  const int64_t width_ld = s.over_width.padded();
  typename P::element* const mixed = (typename P::element*)scratch.mixed;
  auto weigh_values = [&](int64_t rows, auto&& put) {
    multiply<P, true>(rows, ceil_div(s.classes, P::per_word), scratch.mixed, s.ld() / P::per_word, scratch.values,
                      s.over_width, [&](int64_t row, int count, int64_t column, const auto& c) {
                        constexpr int N = sizeof(c.at[0]) / sizeof(vec);
                        for (int r = 0; r < count; r++)
                          for (int v = 0; v < N; v++) put(row + r, column + v * W, c.at[r][v]);
                      });
  };
  for (int n = 0; n < KINDS; n++) {
    if (!queries[n]) continue;
    float reference = 0, total = 0, top = 0;  // total: all blocks so far, against top
    for (int64_t block = 0; block < s.blocks; block++) {
      const int64_t first = block * SCORE_ROWS, rows = s.block_rows(block);
      const word* query = queries[n]->words(first);
      float* to = exps[n] + (streams ? 0 : first * s.ld());
      float sum = LARGE;
      if (block)
        sum = exponentials<P>(to, query, queries[n]->word_ld(), rows, scratch.keys, s, factor, reference);
      if (!(sum < LARGE))
        sum = exponentials_from_maximum<P>(to, query, queries[n]->word_ld(), rows, scratch.keys, s, factor, &reference);
      block_scale[n][block] = reference;
      if (block == 0 || reference > top) {
        total = block ? total * __builtin_exp2f((top - reference) * factor) : 0;
        top = reference;
      }
      total += sum;  // reference is top: it never falls below a block before it
      if (streams) {
        for (int64_t i = 0; i < rows * s.ld(); i += W) P::put(mixed + i, load(to + i));
        float* kind = scratch.kinds + (n * s.classes + first) * width_ld;
        weigh_values(rows, [&](int64_t row, int64_t e, vec v) { store(kind + row * width_ld + e, v); });
      }
    }
    for (int64_t block = 0; block < s.blocks; block++)
      block_scale[n][block] = __builtin_exp2f((block_scale[n][block] - top) * factor);
    statistics[n][0] = top;
    statistics[n][1] = total;
  }
  float* image_part = scratch.image_row + s.ld();
  std::memset(image_part, 0, s.over_width.padded() * sizeof(float));
  if (image_query) {
    image_row_weights<P>(scratch.image_row, image_query, key, s, factor);
    weighted_sum<P>(image_part, scratch.image_row, value, s);
    for (int64_t e = 0; e < s.width; e += W) store(image_part + e, load(image_part + e) * (1 / count));
  }
  if (!queries[0] && !queries[1]) {
    for (int64_t i = 0; i < s.classes; i++)
      for (int64_t e = 0; e < s.width; e += W) P::put_first(attended + i * attended_ld + e, load(image_part + e), s.width - e);
    return;
  }
  auto share_of = [&](int n, int64_t block) {
    return queries[n] ? block_scale[n][block] * (s.classes / (count * statistics[n][1])) : 0;
  };
  for (int64_t block = 0; block < s.blocks; block++) {
    const int64_t first = block * SCORE_ROWS, rows = s.block_rows(block);
    const float a = share_of(0, block), b = share_of(1, block);
    auto put = [&](int64_t row, int64_t e, vec v) {
      P::put_first(attended + (first + row) * attended_ld + e, v + load(image_part + e), s.width - e);
    };
    const int one = queries[0] ? 0 : 1, other = queries[1] ? 1 : 0;  // the same, times zero, where one is not in use
    if (streams) {
      const float* x = scratch.kinds + (one * s.classes + first) * width_ld;
      const float* y = scratch.kinds + (other * s.classes + first) * width_ld;
      for (int64_t r = 0; r < rows; r++)
        for (int64_t e = 0; e < s.width; e += W)
          put(r, e, load(x + r * width_ld + e) * a + load(y + r * width_ld + e) * b);
      continue;
    }
    const float* x = exps[one] + first * s.ld();
    const float* y = exps[other] + first * s.ld();
    for (int64_t i = 0; i < rows * s.ld(); i += W) P::put(mixed + i, load(x + i) * a + load(y + i) * b);
    weigh_values(rows, put);
  }
}

struct AttentionBackwardScratch {
  word *keys, *values;        // keyᵀ and valueᵀ panels
  word* key_rows;             // key panels
  float* exponentials;        // [KINDS, score_rows, ld]
  float* grad_weights;        // [score_rows, ld] dP = dO valueᵀ
  float *grad_key, *grad_value;  // [K rounded up to MR, padded E]
  word* grad_scores;          // [SCORE_ROWS, ld] elements
  word* by_column;            // [SCORE_ROWS / per_word, ld] words
  word* block_rows;           // panels of SCORE_ROWS rows
  float* image_row;           // [3 ld]
};

template <class P>
struct AttentionGradients {
  typename P::element *key, *value;       // [K, E], rows ld apart
  typename P::element* rational;          // null without that kind
  float* text;                            // [K, E], rows text_ld apart, or null
  float* image;                           // [E] or null
  int64_t ld, text_ld;
};

// The left operand of a product over score rows: A[j, i] = rows[i, j].
template <class P>
RADA_INLINE const word* by_column(const typename P::element* rows, int64_t count, int64_t ld, word* scratch) {
  if constexpr (P::per_word == 1) {
    return (const word*)rows;
  } else {
    for (int64_t i = 0; i < count; i += P::per_word)
      P::interleave(scratch + i / P::per_word * ld, rows + i * ld, i + 1 < count ? rows + (i + 1) * ld : nullptr, ld);
    return scratch;
  }
}

// grad [K, E] += Aᵀ rows for one block of score rows; A [count, ld] elements, rows [count, E].
template <class P>
void add_by_class(float* grad, const word* a, const Rows<P>& rows, int64_t first, int64_t count, const Shape& s,
                  word* packed) {
  pack_rows<P>(packed, rows.at + first * rows.ld, rows.ld, count, s.width);
  const int64_t ld = s.over_width.padded();
  multiply<P, false>(s.classes, ceil_div(count, P::per_word), a, s.ld(), packed, s.over_width,
                     [&](int64_t row, int, int64_t column, const auto& c) {
                       constexpr int N = sizeof(c.at[0]) / sizeof(vec);
                       for (int r = 0; r < MR; r++)
                         for (int v = 0; v < N; v++) {
                           float* at = grad + (row + r) * ld + column + v * W;
                           store(at, load(at) + c.at[r][v]);
                         }
                     });
}

// dS_n = A_n ⊙ (dA - δ_n) with one δ_n a pair. exps[n], block_scale[n]: kept, or null and computed again.
template <class P>
void attend_backward(const AttentionGradients<P>& grads, const Rows<P>& grad_rows, const float* image_query,
                     const Rows<P>* const* queries, const Rows<P>& key, const Rows<P>& value, double score_factor,
                     const Shape& s, const AttentionBackwardScratch& scratch, const float* const* kept,
                     const float* const* block_scale, const float* const* statistics) {
  const float count = (image_query != nullptr) + (queries[0] != nullptr) + (queries[1] != nullptr);
  const int64_t words = s.width / P::per_word, width_ld = s.over_width.padded();
  pack_columns(scratch.keys, key.words(0), key.word_ld(), words, s.classes);
  pack_columns(scratch.values, value.words(0), value.word_ld(), words, s.classes);
  pack_rows<P>(scratch.key_rows, key.at, key.ld, s.classes, s.width);
  const int64_t grad_bytes = round_up(s.classes, MR) * width_ld * sizeof(float);
  std::memset(scratch.grad_key, 0, grad_bytes);
  std::memset(scratch.grad_value, 0, grad_bytes);

  const float* exps[KINDS] = {};
  float delta[KINDS] = {};
  float total[KINDS] = {};
  for (int n = 0; n < KINDS; n++)
    if (queries[n]) {
      exps[n] = kept[n] ? kept[n] : scratch.exponentials + n * s.score_rows() * s.ld();
      total[n] = kept[n] ? statistics[n][1] : 0;
    }
  auto exps_of = [&](int n, int64_t block) {
    return exps[n] + (s.streams && !kept[n] ? 0 : block * SCORE_ROWS * s.ld());
  };
  auto grad_weights_of = [&](int64_t block) {
    return scratch.grad_weights + (s.streams ? 0 : block * SCORE_ROWS * s.ld());
  };
  // Exponentials and dP of one block, with their sums and dots.
  auto compute_scores = [&](int64_t block, float* sums, float* dots) {
    const int64_t first = block * SCORE_ROWS, rows = s.block_rows(block);
    const float* a[KINDS] = {};
    for (int n = 0; n < KINDS; n++) {
      if (!exps[n]) continue;
      a[n] = exps_of(n, block);
      if (!kept[n])
        sums[n] = exponentials<P>((float*)a[n], queries[n]->words(first), queries[n]->word_ld(), rows, scratch.keys, s,
                                  score_factor * LOG2E, statistics[n][0]);
    }
    float* dP = grad_weights_of(block);
    vec products[KINDS] = {};
    multiply<P, true>(rows, words, grad_rows.words(first), grad_rows.word_ld(), scratch.values, s.over_classes,
                      [&](int64_t row, int valid, int64_t column, const auto& c) {
                        constexpr int N = sizeof(c.at[0]) / sizeof(vec);
                        for (int r = 0; r < valid; r++)
                          for (int v = 0; v < N; v++) {
                            const int64_t at = (row + r) * s.ld() + column + v * W;
                            store(dP + at, c.at[r][v]);
                            for (int n = 0; n < KINDS; n++)
                              if (a[n]) products[n] += load(a[n] + at) * c.at[r][v];
                          }
                      });
    for (int n = 0; n < KINDS; n++) dots[n] = sum(products[n]);
  };
  const bool matrix = queries[0] || queries[1];
  for (int64_t block = 0; block < s.blocks && matrix; block++) {
    float sums[KINDS] = {}, dots[KINDS];
    compute_scores(block, sums, dots);
    for (int n = 0; n < KINDS; n++) {
      total[n] += sums[n];
      delta[n] += dots[n] * (kept[n] ? block_scale[n][block] : 1);
    }
  }
  for (int n = 0; n < KINDS; n++)
    if (exps[n]) delta[n] /= total[n];
  // A_n / kinds = exponentials times this.
  auto scale_of = [&](int n, int64_t block) {
    return exps[n] ? (kept[n] ? block_scale[n][block] : 1) * (s.classes / (count * total[n])) : 0;
  };

  typename P::element* const dS = (typename P::element*)scratch.grad_scores;
  const Rows<P>* all_queries[KINDS] = {queries[0], queries[1]};
  for (int64_t block = 0; block < s.blocks && matrix; block++) {
    const int64_t first = block * SCORE_ROWS, rows = s.block_rows(block);
    if (s.streams) {
      float sums[KINDS], dots[KINDS];
      compute_scores(block, sums, dots);
    }
    const float* dP = grad_weights_of(block);
    for (int n = 0; n < KINDS; n++) {
      if (!exps[n]) continue;
      const float* a = exps_of(n, block);
      const vec scale = splat(scale_of(n, block) * (float)score_factor), offset = splat(delta[n]);
      for (int64_t i = 0; i < rows * s.ld(); i += W) P::put(dS + i, load(a + i) * scale * (load(dP + i) - offset));
      multiply<P, true>(rows, ceil_div(s.classes, P::per_word), (const word*)dS, s.ld() / P::per_word, scratch.key_rows,
                        s.over_width, [&](int64_t row, int valid, int64_t column, const auto& c) {
                          constexpr int N = sizeof(c.at[0]) / sizeof(vec);
                          for (int r = 0; r < valid; r++)
                            for (int v = 0; v < N; v++) {
                              const int64_t i = first + row + r, e = column + v * W;
                              if (n == rada::TEXT_KIND)
                                store_first(grads.text + i * grads.text_ld + e, c.at[r][v], s.width - e);
                              else
                                P::put_first(grads.rational + i * grads.ld + e, c.at[r][v], s.width - e);
                            }
                        });
      add_by_class<P>(scratch.grad_key, by_column<P>(dS, rows, s.ld(), scratch.by_column), *all_queries[n], first, rows,
                      s, scratch.block_rows);
    }
    const float a = scale_of(0, block), b = scale_of(1, block);
    const float* one = exps_of(exps[0] ? 0 : 1, block);
    const float* other = exps_of(exps[1] ? 1 : 0, block);
    for (int64_t i = 0; i < rows * s.ld(); i += W) P::put(dS + i, load(one + i) * a + load(other + i) * b);
    add_by_class<P>(scratch.grad_value, by_column<P>(dS, rows, s.ld(), scratch.by_column), grad_rows, first, rows, s,
                    scratch.block_rows);
  }

  if (image_query) {
    float* weights = scratch.image_row;
    float* grad_row = weights + s.ld();
    float* upstream = grad_row + s.ld();  // Σ_i dO[i]
    image_row_weights<P>(weights, image_query, key, s, score_factor * LOG2E);
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
        store(k, load(k) + load_first(image_query + e, s.width - e) * grad_row[j]);
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
