// The mask attention on the CPU, backward: dS_n = A_n ⊙ (dA - δ_n) with one δ_n a unit. The scores are computed once
// more: that costs less than fresh memory for saving them.
#pragma once

#include "cpu.h"

namespace RADA_ISA {

// grad [K, padded E] = A B, or adds it unless `fresh`, over `words` words of score rows: A in columns, rows ld apart,
// B packed.
template <class P>
void add_by_class(float* grad, bool fresh, const word* a, int64_t words, const word* b, const Shape& s) {
  multiply<P, false>(s.classes, words, a, s.ld(), b, s.over_width, for_each([&](int64_t row, int64_t e, vec x) {
                       float* at = grad + row * s.width_ld() + e;
                       store(at, fresh ? x : load(at) + x);
                     }));
}

// Where one unit's gradients go.
template <class P>
struct UnitGradients {
  typename P::element *key, *value;  // [K, E], rows ld apart
  typename P::element* rational;     // the same; null without that kind
  float* text;                       // the same, or null
  float* image;                      // [E] or null
  int64_t ld;
};

// One unit's backward pass: prepare, score, differentiate, add_up, each of all chunks, which may run at once.
template <class P>
class AttentionBackward {
  typedef typename P::element element;

 public:
  // What a unit carries from step to step.
  struct State {
    word *keys, *values, *key_rows;  // keyᵀ, valueᵀ and key panels
    element* exps;                   // [KINDS, K, ld] exponentials, unless scores stream
    element* dP;                     // [K, ld] dO valueᵀ, unless scores stream
    float *totals, *dots;            // [KINDS, chunks] sums of exponentials, and of their products with dP
    float *grad_key, *grad_value;    // [chunks, K, padded E]
    float *image_row, *grad_scores;  // [ld] the image query's weights, and the gradient of its scores
    float* upstream;                 // [padded E] Σ_i dO[i]

    State(Arena& arena, const Shape& s)
        : keys(arena.take<word>(s.width / P::per_word * s.ld())),
          values(arena.take<word>(s.width / P::per_word * s.ld())),
          key_rows(arena.take<word>(ceil_div(s.classes, P::per_word) * s.width_ld())),
          exps(arena.take<element>(KINDS * s.held_rows() * s.ld())), dP(arena.take<element>(s.held_rows() * s.ld())),
          totals(arena.take<float>(KINDS * s.chunks)), dots(arena.take<float>(KINDS * s.chunks)),
          grad_key(arena.take<float>(s.chunks * s.classes * s.width_ld())),
          grad_value(arena.take<float>(s.chunks * s.classes * s.width_ld())), image_row(arena.take<float>(s.ld())),
          grad_scores(arena.take<float>(s.ld())), upstream(arena.take<float>(s.width_ld())) {}
  };
  // What a task works in.
  struct Scratch {
    element *exps, *dP;       // as the state's, of one block, where scores stream
    element* dS;              // [KINDS, SCORE_ROWS, ld]
    word* dS_by_column;       // [KINDS · words of SCORE_ROWS, ld]; not used where an element is a word
    word* weights_by_column;  // [words of SCORE_ROWS, ld]
    word* rows;               // panels of KINDS · SCORE_ROWS rows

    Scratch(Arena& arena, const Shape& s)
        : exps(arena.take<element>(KINDS * s.streamed_rows() * s.ld())),
          dP(arena.take<element>(s.streamed_rows() * s.ld())), dS(arena.take<element>(KINDS * SCORE_ROWS * s.ld())),
          dS_by_column(arena.take<word>(P::per_word > 1 ? KINDS * WORDS * s.ld() : 0)),
          weights_by_column(arena.take<word>(WORDS * s.ld())), rows(arena.take<word>(KINDS * WORDS * s.width_ld())) {}
  };

  AttentionBackward(const Unit<P>& unit, const Rows<P>& grad_rows, const UnitGradients<P>& grads, const Shape& shape,
                    double score_factor, const float* const* shift_of_kind, const State& state, const Scratch& scratch)
      : unit(unit), grad_rows(grad_rows), grads(grads), s(shape), score_factor(score_factor), shifts(shift_of_kind),
        state(state), scratch(scratch) {}

  void prepare(int64_t chunk) const {
    const int64_t first = s.first_row(chunk), words = s.width / P::per_word;
    pack_columns(state.keys, unit.key.words(), unit.key.word_ld(), words, s.classes, chunk, s.chunks);
    pack_columns(state.values, unit.value.words(), unit.value.word_ld(), words, s.classes, chunk, s.chunks);
    pack_rows<P>(state.key_rows, unit.key.from(first).at, unit.key.ld, s.first_row(chunk + 1) - first, s.width,
                 ceil_div(s.classes, P::per_word), first / P::per_word);
  }

  void score(int64_t chunk) const {
    if (unit.image_query && chunk == s.chunks - 1) differentiate_image_row();
    float totals[KINDS] = {}, dots[KINDS] = {};
    for (int64_t block = s.first_block(chunk); block < s.first_block(chunk + 1) && unit.kinds(); block++)
      score_block(block, totals, dots);
    for (int n = 0; n < KINDS; n++) {
      state.totals[n * s.chunks + chunk] = totals[n];
      state.dots[n * s.chunks + chunk] = dots[n];
    }
  }

  // The queries' gradients, and the chunk's part of the keys' and values'.
  void differentiate(int64_t chunk) const {
    const int64_t size = s.classes * s.width_ld();
    float delta[KINDS] = {}, scale[KINDS] = {};  // A_n / query count = exponentials · scale
    for (int n = 0; n < KINDS; n++) {
      if (!unit.queries[n].at) continue;
      float total = 0, dot = 0;
      for (int64_t i = 0; i < s.chunks; i++)
        total += state.totals[n * s.chunks + i], dot += state.dots[n * s.chunks + i];
      delta[n] = dot / total;
      scale[n] = s.classes / (unit.query_count() * total);
    }
    for (int64_t block = s.first_block(chunk); block < s.first_block(chunk + 1) && unit.kinds(); block++)
      differentiate_block(block, block == s.first_block(chunk), delta, scale, state.grad_key + chunk * size,
                          state.grad_value + chunk * size);
  }

  // The keys' and values' gradients for the chunk's classes, from all chunks' parts and the image query.
  void add_up(int64_t chunk) const {
    const int64_t size = s.classes * s.width_ld();
    const int64_t parts = unit.kinds() ? s.chunks : 0;
    for (int64_t j = s.first_row(chunk); j < s.first_row(chunk + 1); j++)
      for (int64_t e = 0; e < s.width; e += W) {
        const int64_t at = j * s.width_ld() + e, n = s.width - e;
        vec key{}, value{};
        for (int64_t i = 0; i < parts; i++)
          key += load(state.grad_key + i * size + at), value += load(state.grad_value + i * size + at);
        if (unit.image_query) {
          key += P::get_first(unit.image_query + e, n) * state.grad_scores[j];
          value += load(state.upstream + e) * state.image_row[j];
        }
        P::put_first(grads.key + j * grads.ld + e, key, n);
        P::put_first(grads.value + j * grads.ld + e, value, n);
      }
  }

 private:
  static constexpr int64_t WORDS = (SCORE_ROWS + P::per_word - 1) / P::per_word;

  element* exps(int n, int64_t block) const {
    return s.streams ? scratch.exps + n * SCORE_ROWS * s.ld()
                     : state.exps + (n * s.classes + block * SCORE_ROWS) * s.ld();
  }
  element* dP(int64_t block) const { return s.streams ? scratch.dP : state.dP + block * SCORE_ROWS * s.ld(); }

  // Exponentials and dP of one block; adds to the sums of the exponentials and of their products with dP. All sums are
  // of the numbers that `differentiate` reads, so that what cancels, cancels.
  void score_block(int64_t block, float* totals, float* dots) const {
    const int64_t first = block * SCORE_ROWS, rows = s.block_rows(block);
    for (int n = 0; n < KINDS; n++)
      if (unit.queries[n].at)
        exponentials<P>(exps(n, block), unit.queries[n].from(first), rows, state.keys, s, score_factor * LOG2E,
                        *shifts[n]);
    vec products[KINDS] = {}, parts[KINDS] = {};
    const element *a = exps(unit.one(), block), *b = exps(unit.other(), block);
    element* to = dP(block);
    multiply<P, true>(rows, s.width / P::per_word, grad_rows.from(first).words(), grad_rows.word_ld(), state.values,
                      s.over_classes, for_each([&](int64_t row, int64_t j, vec x) {
                        const int64_t at = row * s.ld() + j;
                        const vec d = P::put_rounded(to + at, x), ea = P::get(a + at), eb = P::get(b + at);
                        parts[0] += ea, parts[1] += eb;
                        products[0] += ea * d, products[1] += eb * d;
                      }));
    for (int n = 0; n < KINDS; n++) totals[n] += sum(parts[n]), dots[n] += sum(products[n]);
  }

  void differentiate_block(int64_t block, bool fresh, const float* delta, const float* scale, float* grad_key,
                           float* grad_value) const {
    const int64_t first = block * SCORE_ROWS, rows = s.block_rows(block), row_words = ceil_div(rows, P::per_word);
    if (s.streams) {
      float totals[KINDS] = {}, dots[KINDS] = {};
      score_block(block, totals, dots);
    }
    element* dS[KINDS] = {};
    word* by_column[KINDS] = {};
    int kinds = 0;
    for (int n = 0; n < KINDS; n++) {
      if (!unit.queries[n].at) continue;
      dS[n] = scratch.dS + kinds * rows * s.ld();
      by_column[n] = P::per_word > 1 ? scratch.dS_by_column + kinds * row_words * s.ld() : (word*)dS[n];
      kinds++;
    }
    form_score_gradients(block, delta, scale, dS, by_column);
    int64_t packed = 0;
    for (int n = 0; n < KINDS; n++) {
      if (!dS[n]) continue;
      multiply<P, true>(rows, ceil_div(s.classes, P::per_word), (const word*)dS[n], s.ld() / P::per_word,
                        state.key_rows, s.over_width, for_each([&](int64_t row, int64_t e, vec x) {
                          const int64_t at = (first + row) * grads.ld + e;
                          if (n == rada::TEXT_KIND)
                            store_first(grads.text + at, x, s.width - e);
                          else
                            P::put_first(grads.rational + at, x, s.width - e);
                        }));
      const Rows<P> query = unit.queries[n].from(first);
      pack_rows<P>(scratch.rows, query.at, query.ld, rows, s.width, kinds * row_words, packed);
      packed += row_words;
    }
    add_by_class<P>(grad_key, fresh, by_column[unit.one()], kinds * row_words, scratch.rows, s);
    pack_rows<P>(scratch.rows, grad_rows.from(first).at, grad_rows.ld, rows, s.width);
    add_by_class<P>(grad_value, fresh, scratch.weights_by_column, row_words, scratch.rows, s);
  }

  // dS of both kinds and A; by row where a product has score rows to its left, by column where it sums over them.
  void form_score_gradients(int64_t block, const float* delta, const float* scale, element* const* dS,
                            word* const* by_column) const {
    const int64_t rows = s.block_rows(block), ld = s.ld();
    const element *d_at = dP(block), *x = exps(unit.one(), block), *y = exps(unit.other(), block);
    const float a = scale[0], b = scale[1], factor = score_factor;
    for (int64_t i = 0; i < rows; i += P::per_word)
      for (int64_t j = 0; j < ld; j += W) {
        vec scores[KINDS][2] = {}, weights[2] = {};
        auto compute = [&](int r) RADA_LAMBDA {
          const int64_t at = (i + r) * ld + j;
          const vec d = P::get(d_at + at), ea = P::get(x + at) * a, eb = P::get(y + at) * b;
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
          if (dS[n]) store(by_column[n] + at, P::column_words(scores[n][0], scores[n][1]));
        store(scratch.weights_by_column + at, P::column_words(weights[0], weights[1]));
      }
  }

  // The image query's weights and the gradients of its scores, by class, for `add_up`; its own gradient.
  void differentiate_image_row() const {
    float *weights = state.image_row, *grad = state.grad_scores;
    image_row_weights<P>(weights, unit.image_query, state.keys, s, score_factor * LOG2E);
    for (int64_t j = 0; j < s.ld(); j++) grad[j] = 1;
    weighted_sum<P>(state.upstream, grad, grad_rows, s);
    float dot = 0;
    for (int64_t j = 0; j < s.classes; j++) {
      vec u{};
      for (int64_t e = 0; e < s.width; e += W)
        u += keep_first(load(state.upstream + e), s.width - e) *
             P::get_first(unit.value.at + j * unit.value.ld + e, s.width - e);
      grad[j] = sum(u);
      dot += weights[j] * grad[j];
    }
    for (int64_t j = 0; j < s.classes; j++) {
      weights[j] /= unit.query_count();
      grad[j] = (float)score_factor * weights[j] * (grad[j] - dot);
    }
    weighted_sum<P>(grads.image, grad, unit.key, s);
  }

  const Unit<P>& unit;
  const Rows<P> grad_rows;
  const UnitGradients<P>& grads;
  const Shape& s;
  const double score_factor;
  const float* const* shifts;
  const State state;
  const Scratch scratch;
};

}  // namespace RADA_ISA
