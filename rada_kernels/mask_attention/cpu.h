// The mask attention on the CPU, forward: one unit, an (image, head), in chunks of query rows.
//
// exp2 in the GEMM epilogue, shifted by an earlier block's maximum, in blocks of SCORE_ROWS. The exponentials of both
// query kinds stay in memory, as elements, until the joint normalisers are known; both are added before one product
// with the values. Beyond score_bytes they stream: forward, a product for each kind (8K²D instead of 6K²D); backward,
// scores are computed twice.
#pragma once

#include "../csrc/call.h"
#include "../csrc/gemm.h"
#include "../csrc/workspace.h"

namespace RADA_ISA {

using rada::KINDS;
using rada::SCORE_ROWS;

constexpr double LOG2E = 1.4426950408889634;
// A block whose exponentials add up to more is computed once more, shifted by its own maximum.
constexpr float LARGE = 1e30f;

// Forward, scores stream above this too: a product on tile registers takes less time than reading back what the
// second-level cache did not hold.
#if defined(RADA_TILES)
constexpr int64_t HELD_SCORE_BYTES = 1 << 20;
#else
constexpr int64_t HELD_SCORE_BYTES = INT64_MAX;
#endif

// From so many classes on a unit's score rows fall into chunks, of about CHUNK_ROWS and no more than MAX_CHUNKS: what a
// chunk adds to the gradients of all keys and values has an array of its own. They depend on K alone, and so do the
// bits. Below, a unit's scores stay in a core's cache from step to step.
constexpr int64_t CHUNKED_CLASSES = 512, CHUNK_ROWS = 128, MAX_CHUNKS = 8;

struct Shape {
  int64_t classes, width;  // K, E
  Panels over_classes, over_width;
  int64_t blocks, chunks;
  bool streams;

  Shape(int64_t classes, int64_t width, int64_t element_bytes, int64_t score_bytes)
      : classes(classes), width(width), over_classes(classes), over_width(width), blocks(ceil_div(classes, SCORE_ROWS)),
        chunks(classes < CHUNKED_CLASSES ? 1 : smaller_of(ceil_div(classes, CHUNK_ROWS), MAX_CHUNKS)),
        streams(classes > SCORE_ROWS && KINDS * classes * ld() * element_bytes > score_bytes) {}

  int64_t ld() const { return round_up(classes, 16); }         // of a row of scores: the same for every W
  int64_t width_ld() const { return over_width.padded(); }     // of a row of E
  int64_t held_rows() const { return streams ? 0 : classes; }  // of scores, in memory from step to step
  int64_t streamed_rows() const { return streams ? SCORE_ROWS : 0; }
  int64_t block_rows(int64_t block) const { return smaller_of(SCORE_ROWS, classes - block * SCORE_ROWS); }
  int64_t first_block(int64_t chunk) const { return blocks * chunk / chunks; }
  int64_t first_row(int64_t chunk) const { return smaller_of(first_block(chunk) * SCORE_ROWS, classes); }
};

template <class P>
struct Unit {
  Rows<P> queries[KINDS], key, value;      // [K, E]
  const typename P::element* image_query;  // [E] or null

  int kinds() const { return (queries[0].at != nullptr) + (queries[1].at != nullptr); }
  float query_count() const { return (image_query != nullptr) + kinds(); }
  // The first and the second kind in use; the same one where there is one.
  int one() const { return queries[0].at ? 0 : 1; }
  int other() const { return queries[1].at ? 1 : 0; }
};

// The exponentials 2^(factor · (query keyᵀ - shift)) of `rows` score rows; their sum. Padding columns are zero.
// The shift is subtracted from the bare product, so that a score that equals it becomes exactly 1. Once the sum is
// LARGE, or NaN, the rest is left out.
template <class P>
float exponentials(typename P::element* to, const Rows<P>& query, int64_t rows, const word* keys, const Shape& s,
                   float factor, float shift) {
  vec total{};
  bool large = false;
  const vec scale = splat(factor), shifts = splat(shift);
  const int64_t ld = s.ld();
  multiply<P, true>(rows, s.width / P::per_word, query.words(), query.word_ld(), keys, s.over_classes,
                    [&](int64_t row, int64_t column, const auto& tile) RADA_LAMBDA {
                      if (row == 0) large = !(sum(total) < LARGE);
                      if (large) return;
                      const bool last = column + tile.columns > s.classes;
                      tile.each([&](int r, int v, vec x) RADA_LAMBDA {
                        vec e = exp2<P::coarse>((x - shifts) * scale);
                        if (last) e = keep_first(e, s.classes - column - v * W);
                        total += e;
                        P::put(to + (row + r) * ld + column + v * W, e);
                      });
                    });
  return sum(total);
}

// The same, shifted by the block's own maximum, which is written to shift. scores: scratch [rows, ld].
template <class P>
float exponentials_from_maximum(typename P::element* to, const Rows<P>& query, int64_t rows, const word* keys,
                                const Shape& s, float factor, float* shift, float* scores) {
  vec m = splat(-__builtin_inff());
  const int64_t ld = s.ld();
  multiply<P, true>(rows, s.width / P::per_word, query.words(), query.word_ld(), keys, s.over_classes,
                    for_each([&](int64_t row, int64_t j, vec x) {
                      // Not the padding: its zeros may be far above every score.
                      m = larger(first_or(x, s.classes - j, m), m);
                      store(scores + row * ld + j, x);
                    }));
  *shift = largest(m);
  const vec scale = splat(factor), shifts = splat(*shift);
  vec total{};
  for (int64_t r = 0; r < rows; r++)
    for (int64_t j = 0; j < ld; j += W) {
      const vec e = keep_first(exp2<P::coarse>((load(scores + r * ld + j) - shifts) * scale), s.classes - j);
      total += e;
      P::put(to + r * ld + j, e);
    }
  return sum(total);
}

// The largest score of one row of queries.
template <class P>
float largest_score(const Rows<P>& query, const word* keys, const Shape& s) {
  vec m = splat(-__builtin_inff());
  multiply<P, true>(1, s.width / P::per_word, query.words(), query.word_ld(), keys, s.over_classes,
                    for_each([&](int64_t, int64_t j, vec x) { m = larger(first_or(x, s.classes - j, m), m); }));
  return largest(m);
}

// softmax(factor · q keyᵀ) for one query row q [E] (in units of log2); keys in panels; row [ld], padding zero.
template <class P>
void image_row_weights(float* row, const typename P::element* query, const word* keys, const Shape& s, float factor) {
  vec lanes = splat(-__builtin_inff());
  for (int64_t j = s.over_classes.padded(); j < s.ld(); j++) row[j] = 0;
  multiply<P, true>(1, s.width / P::per_word, (const word*)query, 0, keys, s.over_classes,
                    for_each([&](int64_t, int64_t j, vec x) {
                      lanes = larger(first_or(x * factor, s.classes - j, lanes), lanes);
                      store(row + j, x * factor);
                    }));
  const float m = largest(lanes);
  vec total{};
  for (int64_t j = 0; j < s.ld(); j += W) {
    const vec e = keep_first(exp2(load(row + j) - m), s.classes - j);
    total += e;
    store(row + j, e);
  }
  const float inverse = 1 / sum(total);
  for (int64_t j = 0; j < s.ld(); j += W) store(row + j, load(row + j) * inverse);
}

// to [E] = row [K] · rows [K, E]
template <class P>
void weighted_sum(float* to, const float* row, const Rows<P>& rows, const Shape& s) {
  for (int64_t e = 0; e < s.width; e += W) {
    vec total{};
    for (int64_t j = 0; j < s.classes; j++) total += P::get_first(rows.at + j * rows.ld + e, s.width - e) * row[j];
    store_first(to + e, total, s.width - e);
  }
}

// One unit's forward pass: prepare, score, attend, each of all chunks, which may run at once.
template <class P>
class Attention {
  typedef typename P::element element;

 public:
  // What a unit carries from step to step.
  struct State {
    word *keys, *values;  // keyᵀ panels, value panels
    element* exps;        // [KINDS, K, ld] exponentials, unless scores stream
    float* streamed;      // [KINDS, K, padded E] where they do: each kind's rows, shifted as their block
    float* shifts;        // [KINDS, blocks]
    float* totals;        // [KINDS, chunks] sums of exponentials, shifted as the chunk's last block
    float* image_part;    // [padded E]

    State(Arena& arena, const Shape& s)
        : keys(arena.take<word>(s.width / P::per_word * s.ld())),
          values(arena.take<word>(ceil_div(s.classes, P::per_word) * s.width_ld())),
          exps(arena.take<element>(KINDS * s.held_rows() * s.ld())),
          streamed(arena.take<float>(s.streams ? KINDS * s.classes * s.width_ld() : 0)),
          shifts(arena.take<float>(KINDS * s.blocks)), totals(arena.take<float>(KINDS * s.chunks)),
          image_part(arena.take<float>(s.width_ld())) {}
  };
  // What a task works in.
  struct Scratch {
    float* scores;     // [SCORE_ROWS, ld]
    element* block;    // [SCORE_ROWS, ld] one kind's exponentials, or both kinds' added
    float* image_row;  // [ld]

    Scratch(Arena& arena, const Shape& s)
        : scores(arena.take<float>(SCORE_ROWS * s.ld())), block(arena.take<element>(SCORE_ROWS * s.ld())),
          image_row(arena.take<float>(s.ld())) {}
  };

  // attended: [K, E], rows ld apart. shifts[n]: comes out, by which the backward pass computes the exponentials.
  Attention(const Unit<P>& unit, const Shape& shape, double score_factor, element* attended, int64_t ld,
            float* const* shifts, const State& state, const Scratch& scratch)
      : unit(unit), s(shape), factor(score_factor * LOG2E), attended(attended), ld(ld), shifts(shifts), state(state),
        scratch(scratch) {}

  void prepare(int64_t chunk) const {
    const int64_t first = s.first_row(chunk), words = ceil_div(s.classes, P::per_word);
    pack_columns(state.keys, unit.key.words(), unit.key.word_ld(), s.width / P::per_word, s.classes, chunk, s.chunks);
    pack_rows<P>(state.values, unit.value.from(first).at, unit.value.ld, s.first_row(chunk + 1) - first, s.width, words,
                 first / P::per_word);
  }

  void score(int64_t chunk) const {
    if (chunk == s.chunks - 1) attend_image_row();
    for (int n = 0; n < KINDS; n++) {
      if (!unit.queries[n].at) continue;
      // total: of the chunk so far, shifted by m. The first shift is the first block's maximum, and in later chunks,
      // where that would cost a second product too often, that of their first row.
      float total = 0, shift = 0, m = 0;
      if (chunk) shift = m = largest_score<P>(unit.queries[n].from(s.first_row(chunk)), state.keys, s);
      for (int64_t block = s.first_block(chunk); block < s.first_block(chunk + 1); block++) {
        const int64_t first = block * SCORE_ROWS, rows = s.block_rows(block);
        const Rows<P> query = unit.queries[n].from(first);
        element* to = s.streams ? scratch.block : held(n, block);
        float sum = LARGE;
        if (block) sum = exponentials<P>(to, query, rows, state.keys, s, factor, shift);
        if (!(sum < LARGE))
          sum = exponentials_from_maximum<P>(to, query, rows, state.keys, s, factor, &shift, scratch.scores);
        state.shifts[n * s.blocks + block] = shift;
        if (block == 0 || shift > m) {
          total = block ? total * __builtin_exp2f((m - shift) * factor) : 0;
          m = shift;
        }
        total += sum;  // the shift is m: it never falls below a block before it
        if (s.streams) {
          float* rows_of_kind = state.streamed + (n * s.classes + first) * s.width_ld();
          weigh_values(rows, to,
                       [&](int64_t row, int64_t e, vec v) { store(rows_of_kind + row * s.width_ld() + e, v); });
        }
      }
      state.totals[n * s.chunks + chunk] = total;
    }
  }

  // Attended rows of the chunk.
  void attend(int64_t chunk) const {
    auto put = [&](int64_t row, int64_t e, vec v)
                   RADA_LAMBDA { P::put_first(attended + row * ld + e, v + load(state.image_part + e), s.width - e); };
    const int one = unit.one(), other = unit.other();
    float m[KINDS] = {}, scales[KINDS] = {};
    for (int n = 0; n < KINDS; n++) {
      if (!unit.queries[n].at) continue;
      float total = 0;
      for (int64_t i = 0; i < s.chunks; i++) m[n] = i == 0 || shift_of(n, i) > m[n] ? shift_of(n, i) : m[n];
      for (int64_t i = 0; i < s.chunks; i++)
        total += state.totals[n * s.chunks + i] * __builtin_exp2f((shift_of(n, i) - m[n]) * factor);
      scales[n] = s.classes / (unit.query_count() * total);
      if (chunk == 0) *shifts[n] = m[n];
    }
    for (int64_t block = s.first_block(chunk); block < s.first_block(chunk + 1); block++) {
      const int64_t first = block * SCORE_ROWS, rows = s.block_rows(block);
      auto scale_of = [&](int n) {
        if (!unit.queries[n].at) return 0.0f;
        return __builtin_exp2f((state.shifts[n * s.blocks + block] - m[n]) * factor) * scales[n];
      };
      const float a = scale_of(0), b = scale_of(1);
      if (!unit.kinds()) {
        for (int64_t r = 0; r < rows; r++)
          for (int64_t e = 0; e < s.width; e += W) put(first + r, e, vec{});
      } else if (s.streams) {
        const float* x = state.streamed + (one * s.classes + first) * s.width_ld();
        const float* y = state.streamed + (other * s.classes + first) * s.width_ld();
        for (int64_t r = 0; r < rows; r++, x += s.width_ld(), y += s.width_ld())
          for (int64_t e = 0; e < s.width; e += W) put(first + r, e, load(x + e) * a + load(y + e) * b);
      } else {
        const element *x = held(one, block), *y = held(other, block);
        for (int64_t i = 0; i < rows * s.ld(); i += W) P::put(scratch.block + i, P::get(x + i) * a + P::get(y + i) * b);
        weigh_values(rows, scratch.block, [&](int64_t row, int64_t e, vec v) { put(first + row, e, v); });
      }
    }
  }

 private:
  void attend_image_row() const {
    std::memset(state.image_part, 0, s.width_ld() * sizeof(float));
    if (!unit.image_query) return;
    image_row_weights<P>(scratch.image_row, unit.image_query, state.keys, s, factor);
    weighted_sum<P>(state.image_part, scratch.image_row, unit.value, s);
    for (int64_t e = 0; e < s.width; e += W)
      store(state.image_part + e, load(state.image_part + e) * (1 / unit.query_count()));
  }

  element* held(int n, int64_t block) const { return state.exps + (n * s.classes + block * SCORE_ROWS) * s.ld(); }
  // Of the last block of a chunk, which is the largest one.
  float shift_of(int n, int64_t chunk) const { return state.shifts[n * s.blocks + s.first_block(chunk + 1) - 1]; }

  template <class Put>
  void weigh_values(int64_t rows, const element* weights, Put&& put) const {
    multiply<P, true>(rows, ceil_div(s.classes, P::per_word), (const word*)weights, s.ld() / P::per_word, state.values,
                      s.over_width, for_each(put));
  }

  const Unit<P>& unit;
  const Shape& s;
  const float factor;
  element* const attended;
  const int64_t ld;
  float* const* const shifts;
  const State state;
  const Scratch scratch;
};

}  // namespace RADA_ISA
