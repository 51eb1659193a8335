// The whole head: both passes over waves of images, each wave in phases that spread over the threads.
//
// Every result is written by exactly one task, and sums over images run in the order of the images: the numbers do
// not depend on how the tasks fall to the threads.
#pragma once

#include "../logit_reduction/cpu.h"
#include "../mask_attention/cpu.h"
#include "../rational_projection/cpu.h"
#include "call.h"
#include "convert.h"

namespace RADA_ISA {

using rada::Call;
using rada::Pool;

constexpr int64_t WAVE_ROWS = 2048;     // rows of a wave, at least one image
constexpr int64_t FEW_ROWS = 64;        // up to here a layer's weight is read where it lies
constexpr int64_t WEIGHT_ROWS = 256;    // rows of one step of a weight gradient's sum
constexpr int64_t WEIGHT_COLUMNS = 64;  // a task's share of a weight gradient
constexpr int64_t LIGHT_ROWS = 32;      // rows of a task that only goes over them

#if defined(RADA_TILES)
static_assert(WEIGHT_ROWS / Bfloat16::per_word <= TRANSPOSED_WORDS, "weight gradients' A comes by columns");
static_assert(rada::KINDS * rada::SCORE_ROWS / Bfloat16::per_word <= TRANSPOSED_WORDS, "key gradients' A does too");
#endif

// Hands out 64-byte aligned pieces. Without a base it only measures.
struct Arena {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* at = (T*)((uintptr_t)base + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return at;
  }
};

template <class Task>
void run(const Pool& pool, int64_t tasks, Task&& task) {
  pool.run(
      pool, tasks,
      [](void* context, int64_t i, int thread) {
        const TaskScope scope;
        const SubnormalsAreZero mode;  // in the task: threads that the pool starts keep the mode of their creator
        (*(Task*)context)(i, thread);
      },
      (void*)&task);
}

// task(first, count, thread) over `rows` rows in blocks.
template <class Task>
void run_rows(const Pool& pool, int64_t rows, int64_t block, Task&& task) {
  run(pool, ceil_div(rows, block),
      [&](int64_t i, int thread) { task(i * block, smaller_of(block, rows - i * block), thread); });
}

// How a product of `rows` rows with a layer falls into tasks: blocks of rows, and of columns where there are few rows.
// The shares of columns do not depend on the number of threads: sums over them are put together in one order.
struct Split {
  int64_t rows, width, block = BLOCK_ROWS, share, shares;

  Split(int64_t rows, int64_t width, bool whole_width, int threads)
      : rows(rows), width(width), share(whole_width ? round_up(width, W) : 4 * W), shares(ceil_div(width, share)) {
    if (whole_width) block = smaller_of(round_up(ceil_div(rows, 4 * threads), MR), BLOCK_ROWS);
  }
  int64_t tasks() const { return ceil_div(rows, block) * shares; }

  // f(first row, rows, first column, end column, share)
  template <class F>
  void with(int64_t task, F&& f) const {
    const int64_t row = task / shares * block, column = task % shares * share;
    f(row, smaller_of(block, rows - row), column, smaller_of(column + share, width), task % shares);
  }
};

template <class P>
class Head {
  typedef typename P::element element;

 public:
  Head(const Call& call, const Pool& pool, bool backward, void* workspace)
      : c(call), pool(pool), shape(call.classes, call.width / call.heads, sizeof(element), call.score_bytes),
        forward_shape(call.classes, shape.width, sizeof(element), smaller_of(call.score_bytes, HELD_SCORE_BYTES)),
        again(!backward || !call.attended), arena{(char*)workspace} {
    over_width = round_up(c.width, W);
    wave_images = smaller_of(larger_of(WAVE_ROWS / c.classes, 1), c.images);
    const int64_t rows = wave_images * c.classes, pairs = wave_images * c.heads;
    f = arena.take<float>(c.images * over_width);
    h = arena.take<float>(c.classes * over_width);
    inverse = arena.take<float>(c.images + c.classes);
    const int64_t packed = Panels(c.width).padded() * ceil_div(c.width, P::per_word);
    for (int l = 0; l < rada::LAYERS; l++) {
      if (!c.weight[l]) continue;
      const bool few = rows_of(l) <= FEW_ROWS, goes_back = backward && (l == rada::OUT || c.grad_image);
      layer[l].weight = (const element*)c.weight[l];
      layer[l].packed = few || !again ? nullptr : arena.take<word>(packed);
      layer[l].packed_back = few || !goes_back ? nullptr : arena.take<word>(packed);
      layer[l].bias = arena.take<float>(over_width);
    }
    if (c.weight[rada::QUERY_IMAGE])
      query_image = c.query_image ? (element*)c.query_image : arena.take<element>(c.images * c.width);
    if (c.weight[rada::QUERY_TEXT])
      query_text = c.query_text ? (element*)c.query_text : arena.take<element>(c.classes * c.width);
    for (int l = 0; l < 3; l++)
      if (!c.projection[l] && c.weight[rada::QUERY_RATIONAL + l]) projection[l] = arena.take<element>(rows * c.width);
    if (!c.attended) attended = arena.take<element>(rows * c.width);
    if (!c.references) references = arena.take<float>(rada::KINDS * pairs);
    if (again) {
      const Split split = split_of(rows, rada::OUT);
      row_sums = arena.take<float>(split.shares * rows);
      row_statistics = arena.take<float>(split.shares * rows);
    }
    if (backward) {
      if (!c.change) change = arena.take<element>(rows * c.width);
      for (int l = rada::QUERY_RATIONAL; l < rada::LAYERS; l++)
        if (c.weight[l]) grad_rows[l] = arena.take<element>(rows * c.width);
      grad_attended = arena.take<element>(rows * c.width);
      peak = arena.take<int64_t>(wave_images);
      if (query_text) {
        text_rows = arena.take<float>(rows * c.width);
        grad_query_text = arena.take<float>(c.classes * c.width);
        query_rows[0] = arena.take<element>(c.classes * c.width);
      }
      if (query_image) {
        grad_query_image = arena.take<float>(c.images * c.width);
        query_rows[1] = arena.take<element>(c.images * c.width);
      }
      if (c.grad_weight[0])
        for (word*& operand : operands) operand = arena.take<word>(ceil_div(most_rows(), WEIGHT_ROWS) * step_words());
      if (c.grad_image) grad_r = arena.take<float>(rows * over_width);
    }
    // A thread's phases follow each other, and so may share its scratch.
    const size_t start = arena.used;
    size_t end = start;
    const int64_t words = ceil_div(shape.width, P::per_word), half = ceil_div(c.classes, P::per_word);
    const int64_t width_ld = shape.over_width.padded(), ld = shape.ld();
    const int64_t block_words = ceil_div(rada::SCORE_ROWS, P::per_word);
    auto fit = [&](auto&& layout) {
      arena.used = start;
      layout();
      end = end > arena.used ? end : arena.used;
    };
    if (again) {
      fit([&] {
        attention.keys = arena.take<word>(words * ld);
        attention.values = arena.take<word>(half * width_ld);
        attention.exponentials = arena.take<element>(rada::KINDS * forward_shape.score_rows() * ld);
        attention.scores = arena.take<float>(rada::SCORE_ROWS * ld);
        if (forward_shape.streams) attention.kinds = arena.take<float>(rada::KINDS * c.classes * width_ld);
        attention.block_scale = arena.take<float>(rada::KINDS * shape.blocks);
        attention.image_row = arena.take<float>(ld + width_ld);
        attention.mixed = arena.take<element>(rada::SCORE_ROWS * ld);
      });
      fit([&] { input_rows = arena.take<element>(BLOCK_ROWS * c.width); });
    }
    if (backward) {
      fit([&] {
        auto& s = attention_backward;
        s.keys = arena.take<word>(words * ld);
        s.values = arena.take<word>(words * ld);
        s.key_rows = arena.take<word>(half * width_ld);
        s.exponentials = arena.take<element>(rada::KINDS * shape.score_rows() * ld);
        s.grad_weights = arena.take<element>(shape.score_rows() * ld);
        s.grad_key = arena.take<float>(c.classes * width_ld);
        s.grad_value = arena.take<float>(c.classes * width_ld);
        s.grad_scores = arena.take<element>(rada::KINDS * rada::SCORE_ROWS * ld);
        if (P::per_word > 1) s.grad_scores_by_column = arena.take<word>(rada::KINDS * block_words * ld);
        s.weights_by_column = arena.take<word>(block_words * ld);
        s.block_rows = arena.take<word>(rada::KINDS * block_words * width_ld);
        s.image_row = arena.take<float>(2 * ld + width_ld);
      });
      fit([&] {
        weight_rows = arena.take<element>(WEIGHT_ROWS * c.width);
        weight_left = arena.take<word>(ceil_div(WEIGHT_ROWS, P::per_word) * WEIGHT_COLUMNS);
      });
    }
    thread_bytes = end - start;
    arena.used = start + pool.threads * thread_bytes;
  }

  size_t bytes() const { return arena.used; }

  void forward() {
    prepare();
    for (first = 0; first < c.images; first += wave_images) {
      images = smaller_of(wave_images, c.images - first);
      compute();
    }
  }

  void backward() {
    prepare();
    for (first = 0; first < c.images; first += wave_images) {
      images = smaller_of(wave_images, c.images - first);
      if (again) compute();
      compute_gradients();
    }
    compute_query_gradients();
  }

 private:
  int64_t rows_of(int l) const {
    return l == rada::QUERY_IMAGE ? c.images : l == rada::QUERY_TEXT ? c.classes : c.images * c.classes;
  }
  int64_t most_rows() const { return larger_of(larger_of(wave_images * c.classes, c.classes), c.images); }
  int64_t step_words() const { return ceil_div(WEIGHT_ROWS, P::per_word) * Panels(c.width).padded(); }
  Split split(int64_t rows, const word* packed) const { return Split(rows, c.width, packed, pool.threads); }
  Split split_of(int64_t rows, int l) const { return split(rows, layer[l].packed); }

  template <class T>
  T* mine(T* scratch, int thread) const {
    return (T*)((uintptr_t)scratch + thread * thread_bytes);
  }

  // The wave's rows of a [B, K, D] array: kept for the whole batch, or the wave's own.
  element* wave(void* kept, element* own) const { return kept ? (element*)kept + first * c.classes * c.width : own; }
  element* projected(int l) const {
    return wave(c.projection[l - rada::QUERY_RATIONAL], projection[l - rada::QUERY_RATIONAL]);
  }
  element* attended_rows() const { return wave(c.attended, attended); }
  element* change_rows() const { return wave(c.change, change); }
  float* reference_of(int kind, int64_t pair) const {
    return c.references ? c.references + (kind * c.images + first) * c.heads + pair
                        : references + kind * wave_images * c.heads + pair;
  }
  const float* f_of(int64_t row) const { return f + (first + row / c.classes) * over_width; }
  const float* h_of(int64_t row) const { return h + row % c.classes * over_width; }

  // Unit rows padded to whole vectors, weights packed.
  void prepare() {
    run_rows(pool, c.images + c.classes, LIGHT_ROWS, [&](int64_t row, int64_t count, int) {
      for (int64_t i = row; i < row + count; i++) {
        const bool image = i < c.images;
        const int64_t k = i - c.images;
        inverse[i] = unit_row<P>(image ? f + i * over_width : h + k * over_width,
                                 image ? (const element*)c.image + i * c.width : (const element*)c.text + k * c.width,
                                 c.width, over_width, c.normalize);
      }
    });
    for (const Layer<P>& l : layer)
      for (int64_t d = 0; d < over_width && l.weight; d += W)
        store((float*)l.bias + d, P::get_first((const element*)c.bias[&l - layer] + d, c.width - d));
    const int64_t words = c.width / P::per_word;
    run(pool, 2 * rada::LAYERS, [&](int64_t i, int) {
      const Layer<P>& l = layer[i / 2];
      if (i % 2 && l.packed_back) pack_rows<P>((word*)l.packed_back, l.weight, c.width, c.width, c.width);
      if (i % 2 == 0 && l.packed) pack_columns((word*)l.packed, (const word*)l.weight, words, words, c.width);
    });
  }

  // The three steps for one wave; without sums the first two.
  void compute() {
    project_rows();
    run(pool, images * c.heads, [&](int64_t pair, int thread) { attend_pair(pair, thread); });
    if (c.sums) reduce_rows();
  }

  // Keys, values and rational queries of the wave; with the first wave the image and text queries.
  void project_rows() {
    const int64_t rows = images * c.classes;
    struct Part {
      Split split;
      int layer;
      const float* unit;  // rows that a query is made of; null: the rows of X
      element* to;
    };
    const float root = __builtin_sqrtf(c.scale);
    const Part parts[] = {
        {split_of(rows, rada::KEY), rada::KEY, nullptr, nullptr},
        {split_of(c.classes, rada::QUERY_TEXT), rada::QUERY_TEXT, h, query_text},
        {split_of(c.images, rada::QUERY_IMAGE), rada::QUERY_IMAGE, f, query_image},
    };
    auto tasks_of = [&](const Part& part) { return !part.unit || (first == 0 && part.to) ? part.split.tasks() : 0; };
    int64_t tasks = 0;
    for (const Part& part : parts) tasks += tasks_of(part);
    run(pool, tasks, [&](int64_t task, int thread) {
      const Part* part = parts;
      while (task >= tasks_of(*part)) task -= tasks_of(*part++);
      element* x = mine(input_rows, thread);
      part->split.with(task, [&](int64_t row, int64_t count, int64_t column, int64_t end, int64_t) {
        if (part->unit) {
          scaled_rows<P>(x, part->unit + row * over_width, over_width, count, c.width, root);
          project<P>(part->to + row * c.width, x, count, c.width, layer[part->layer], column, end);
          return;
        }
        rational_rows<P>(x, f + first * over_width, h, over_width, row, count, c.classes, c.width, c.scale);
        for (int l = rada::QUERY_RATIONAL; l <= rada::VALUE; l++)
          if (c.weight[l]) project<P>(projected(l) + row * c.width, x, count, c.width, layer[l], column, end);
      });
    });
  }

  void attend_pair(int64_t pair, int thread) {
    const Pair p(*this, pair);
    AttentionScratch<P> s = attention;
    s.keys = mine(s.keys, thread), s.values = mine(s.values, thread), s.mixed = mine(s.mixed, thread);
    s.image_row = mine(s.image_row, thread), s.kinds = mine(s.kinds, thread), s.scores = mine(s.scores, thread);
    s.block_scale = mine(s.block_scale, thread), s.exponentials = mine(s.exponentials, thread);
    float* const reference[] = {reference_of(rada::TEXT_KIND, pair), reference_of(rada::RATIONAL_KIND, pair)};
    attend<P>(attended_rows() + p.start, c.width, p.image_query, p.queries, p.key, p.value, c.score_factor,
              forward_shape, s, reference);
  }

  // Logits without their scale and each image's deviation, from the attended rows.
  void reduce_rows() {
    const int64_t rows = images * c.classes;
    const Split split = split_of(rows, rada::OUT);
    run(pool, split.tasks(), [&](int64_t task, int) {
      split.with(task, [&](int64_t row, int64_t count, int64_t column, int64_t end, int64_t share) {
        const float *fs[BLOCK_ROWS], *hs[BLOCK_ROWS];
        for (int64_t r = 0; r < count; r++) fs[r] = f_of(row + r), hs[r] = h_of(row + r);
        element* changes = change_rows();
        reduce_logits<P>(row_sums + share * rows + row, row_statistics + share * rows + row,
                         changes ? changes + row * c.width : nullptr, attended_rows() + row * c.width, count, c.width,
                         layer[rada::OUT], fs, hs, c.penalty, column, end);
      });
    });
    for (int64_t share = 1; share < split.shares; share++)
      for (int64_t row = 0; row < rows; row++) {
        const float part = row_statistics[share * rows + row];
        row_sums[row] += row_sums[share * rows + row];
        float& statistic = row_statistics[row];
        statistic = c.penalty != rada::Penalty::LINF ? statistic + part : part > statistic ? part : statistic;
      }
    std::memcpy(c.sums + first * c.classes, row_sums, rows * sizeof(float));
    for (int64_t b = 0; b < images; b++)
      c.deviation[first + b] =
          deviation_of(row_sums + b * c.classes, row_statistics + b * c.classes, c.classes, c.width, c.penalty);
  }

  // Where one (image, head) pair of the wave lies in the [B, K, D] arrays.
  struct Pair {
    int64_t start, image_start;
    Rows<P> text, rational, key, value;
    const Rows<P>* queries[rada::KINDS];
    const element* image_query;

    Pair(const Head& head, int64_t pair) {
      const Call& c = head.c;
      const int64_t b = pair / c.heads, column = pair % c.heads * head.shape.width;
      start = b * c.classes * c.width + column;
      image_start = (head.first + b) * c.width + column;
      text = {head.query_text ? head.query_text + column : nullptr, c.width};
      rational = {c.weight[rada::QUERY_RATIONAL] ? head.projected(rada::QUERY_RATIONAL) + start : nullptr, c.width};
      key = {head.projected(rada::KEY) + start, c.width};
      value = {head.projected(rada::VALUE) + start, c.width};
      queries[rada::TEXT_KIND] = text.at ? &text : nullptr;
      queries[rada::RATIONAL_KIND] = rational.at ? &rational : nullptr;
      image_query = head.query_image ? head.query_image + image_start : nullptr;
    }
    Pair(const Pair&) = delete;
  };

  // The three steps backward for one wave.
  void compute_gradients() {
    reduce_rows_backward();
    run(pool, images * c.heads, [&](int64_t pair, int thread) { attend_pair_backward(pair, thread); });
    if (query_text)
      run_rows(pool, c.classes, LIGHT_ROWS, [&](int64_t row, int64_t count, int) {
        float* to = grad_query_text + row * c.width;
        for (int64_t d = 0; d < count * c.width; d += W) {
          const int64_t n = count * c.width - d;
          vec total = first ? load_first(to + d, n) : vec{};
          for (int64_t b = 0; b < images; b++) total += load_first(text_rows + (b * c.classes + row) * c.width + d, n);
          store_first(to + d, total, n);
        }
      });
    if (c.grad_weight[0]) {
      const int64_t rows = images * c.classes;
      pack_inputs(operands[0], rows, [&](element* x, int64_t row, int64_t count) {
        rational_rows<P>(x, f + first * over_width, h, over_width, row, count, c.classes, c.width, c.scale);
        return x;
      });
      pack_inputs(operands[1], rows, [&](element*, int64_t row, int64_t) { return attended_rows() + row * c.width; });
      const WeightGradient gradients[] = {
          {rada::QUERY_RATIONAL, grad_rows[rada::QUERY_RATIONAL], rows, operands[0]},
          {rada::KEY, grad_rows[rada::KEY], rows, operands[0]},
          {rada::VALUE, grad_rows[rada::VALUE], rows, operands[0]},
          {rada::OUT, grad_rows[rada::OUT], rows, operands[1]},
      };
      add_weight_gradients(gradients, first == 0);
    }
    if (c.grad_image) add_feature_gradients();
  }

  // The gradient of the output layer's result, and of what went into it.
  void reduce_rows_backward() {
    const int64_t rows = images * c.classes, width = c.width;
    const element* changes = change_rows();
    const bool find_peak = c.grad_deviation && c.penalty == rada::Penalty::LINF;
    if (find_peak)
      run(pool, images,
          [&](int64_t b, int) { peak[b] = first_peak<P>(changes + b * c.classes * width, c.classes, width); });
    auto form = [&](int64_t row, int64_t count) {
      for (int64_t r = row; r < row + count; r++) {
        const int64_t b = r / c.classes, k = r % c.classes;
        reduce_logits_backward<P>(grad_rows[rada::OUT] + r * width, changes + r * width, f_of(r), h_of(r), width,
                                  c.grad_sums[first * c.classes + r],
                                  c.grad_deviation ? c.grad_deviation[first + b] : 0,
                                  find_peak ? peak[b] - k * width : -1, c.classes * width, c.penalty);
      }
    };
    const Split split = this->split(rows, layer[rada::OUT].packed_back);
    if (split.shares > 1) run_rows(pool, rows, LIGHT_ROWS, [&](int64_t row, int64_t count, int) { form(row, count); });
    run(pool, split.tasks(), [&](int64_t task, int) {
      split.with(task, [&](int64_t row, int64_t count, int64_t column, int64_t end, int64_t) {
        if (split.shares == 1) form(row, count);
        apply_back<P>(layer[rada::OUT], grad_rows[rada::OUT] + row * width, count, width, column, end,
                      [&](int64_t r, int64_t d, vec v) __attribute__((always_inline)) {
                        P::put_first(grad_attended + (row + r) * width + d, v, width - d);
                      });
      });
    });
  }

  void attend_pair_backward(int64_t pair, int thread) {
    const Pair p(*this, pair);
    AttentionBackwardScratch<P> s = attention_backward;
    word** const words[] = {&s.keys,      &s.values, &s.key_rows, &s.grad_scores_by_column, &s.weights_by_column,
                            &s.block_rows};
    float** const floats[] = {&s.grad_key, &s.grad_value, &s.image_row};
    element** const elements[] = {&s.exponentials, &s.grad_weights, &s.grad_scores};
    for (word** at : words) *at = mine(*at, thread);
    for (float** at : floats) *at = mine(*at, thread);
    for (element** at : elements) *at = mine(*at, thread);
    const float* const reference[] = {reference_of(rada::TEXT_KIND, pair), reference_of(rada::RATIONAL_KIND, pair)};
    const AttentionGradients<P> grads{grad_rows[rada::KEY] + p.start,
                                      grad_rows[rada::VALUE] + p.start,
                                      p.rational.at ? grad_rows[rada::QUERY_RATIONAL] + p.start : nullptr,
                                      p.text.at ? text_rows + p.start : nullptr,
                                      p.image_query ? grad_query_image + p.image_start : nullptr,
                                      c.width};
    attend_backward<P>(grads, {grad_attended + p.start, c.width}, p.image_query, p.queries, p.key, p.value,
                       c.score_factor, shape, s, reference);
  }

  // What went into layers, row by row, packed in steps of WEIGHT_ROWS. form(scratch, row, count) returns the rows.
  template <class Form>
  void pack_inputs(word* operand, int64_t rows, Form&& form) {
    run_rows(pool, rows, WEIGHT_ROWS, [&](int64_t row, int64_t count, int thread) {
      const element* from = form(mine(weight_rows, thread), row, count);
      pack_rows<P>(operand + row / WEIGHT_ROWS * step_words(), from, c.width, count, c.width);
    });
  }

  // A layer's gradient: Σ_rows grad[row, e] input[row, d].
  struct WeightGradient {
    int layer;
    const element* grad;  // [rows, D]
    int64_t rows;
    const word* inputs;  // packed
  };

  // Writes layers' gradients, or adds to them unless `fresh`.
  template <size_t N>
  void add_weight_gradients(const WeightGradient (&gradients)[N], bool fresh) {
    const int64_t shares = ceil_div(c.width, WEIGHT_COLUMNS);
    run(pool, N * shares, [&](int64_t task, int thread) {
      const WeightGradient& g = gradients[task / shares];
      if (g.grad) add_weight_gradient(g, task % shares * WEIGHT_COLUMNS, fresh, mine(weight_left, thread));
    });
  }

  // Of WEIGHT_COLUMNS of a layer's outputs. left: scratch for a step of them, by column.
  void add_weight_gradient(const WeightGradient& g, int64_t column, bool fresh, word* left) {
    const int64_t width = c.width, share = smaller_of(WEIGHT_COLUMNS, width - column);
    const Panels panels(width);
    float* bias = c.grad_bias[g.layer] + column;
    if (fresh) std::memset(bias, 0, share * sizeof(float));
    for (int64_t row = 0; row < g.rows; row += WEIGHT_ROWS) {
      const int64_t count = smaller_of(WEIGHT_ROWS, g.rows - row), words = ceil_div(count, P::per_word);
      const element* from = g.grad + row * width + column;
      for (int64_t r = 0; r < count; r += P::per_word)
        P::interleave(left + r / P::per_word * WEIGHT_COLUMNS, from + r * width,
                      r + 1 < count ? from + (r + 1) * width : nullptr, share);
      for (int64_t e = 0; e < share; e += W) {
        vec total = load_first(bias + e, share - e);
        for (int64_t r = 0; r < count; r++) total += P::get_first(from + r * width + e, share - e);
        store_first(bias + e, total, share - e);
      }
      const bool first_step = fresh && row == 0;
      multiply<P, false>(share, words, left, WEIGHT_COLUMNS, g.inputs + row / WEIGHT_ROWS * step_words(), panels,
                         [&](int64_t e, int64_t d, const auto& tile) __attribute__((always_inline)) {
                           tile.each([&](int r, int v, vec x) __attribute__((always_inline)) {
                             const int64_t at = d + v * W;
                             float* to = c.grad_weight[g.layer] + (column + e + r) * width + at;
                             store_first(to, first_step ? x : load_first(to, width - at) + x, width - at);
                           });
                         });
    }
  }

  // The unit features' gradients through X = s R and through the sums M R.
  void add_feature_gradients() {
    const int64_t rows = images * c.classes, width = c.width;
    const element* changes = change_rows();
    const Split split = this->split(rows, layer[rada::KEY].packed_back);
    run(pool, split.tasks(), [&](int64_t task, int) {
      split.with(task, [&](int64_t row, int64_t count, int64_t column, int64_t end, int64_t) {
        float* to = grad_r + row * over_width;
        for (int64_t r = 0; r < count; r++)
          for (int64_t d = column; d < end; d += W) store(to + r * over_width + d, vec{});
        for (int l = rada::QUERY_RATIONAL; l <= rada::VALUE; l++)
          if (c.weight[l])
            apply_back<P>(layer[l], grad_rows[l] + row * width, count, width, column, end,
                          [&](int64_t r, int64_t d, vec v) __attribute__((always_inline)) {
                            float* at = to + r * over_width + d;
                            store(at, load(at) + v);
                          });
        for (int64_t r = 0; r < count; r++) {
          const float g = c.grad_sums[first * c.classes + row + r];
          for (int64_t d = column; d < end; d += W) {
            const vec mask = P::get_first(changes + (row + r) * width + d, width - d) + 1.0f;
            float* at = to + r * over_width + d;
            store(at, load(at) * c.scale + mask * g);
          }
        }
      });
    });
    run_rows(pool, images + c.classes, LIGHT_ROWS, [&](int64_t row, int64_t count, int) {
      for (int64_t i = row; i < row + count; i++) {
        const bool image = i < images;
        const int64_t k = i - images;
        float* to = image ? c.grad_image + (first + i) * width : c.grad_text + k * width;
        for (int64_t d = 0; d < width; d += W) {
          vec total{};
          if (image)
            for (int64_t j = 0; j < c.classes; j++)
              total += load(grad_r + (i * c.classes + j) * over_width + d) * load(h + j * over_width + d);
          else
            for (int64_t b = 0; b < images; b++)
              total += load(grad_r + (b * c.classes + k) * over_width + d) * load(f_of(b * c.classes) + d);
          if (!image && first) total += load_first(to + d, width - d);
          store_first(to + d, total, width - d);
        }
      }
    });
  }

  // After all waves: the image and text queries' layers, and the features' gradients through them and the norms.
  void compute_query_gradients() {
    const float root = __builtin_sqrtf(c.scale);
    struct Query {
      int layer;
      int64_t rows;
      const float *unit, *inverse, *grad;
      float* grad_features;
      element* grad_rows;
    };
    const Query queries[] = {
        {rada::QUERY_TEXT, c.classes, h, inverse + c.images, grad_query_text, c.grad_text, query_rows[0]},
        {rada::QUERY_IMAGE, c.images, f, inverse, grad_query_image, c.grad_image, query_rows[1]},
    };
    for (const Query& q : queries)
      for (int64_t i = 0; q.grad && i < q.rows * c.width; i += W)
        P::put_first(q.grad_rows + i, load_first(q.grad + i, q.rows * c.width - i), q.rows * c.width - i);
    if (c.grad_weight[0]) {
      WeightGradient gradients[2];
      for (int n = 0; n < 2; n++) {
        const Query& q = queries[n];
        gradients[n] = {q.layer, q.grad_rows, q.rows, operands[n]};
        if (q.grad)
          pack_inputs(operands[n], q.rows, [&](element* x, int64_t row, int64_t count) {
            scaled_rows<P>(x, q.unit + row * over_width, over_width, count, c.width, root);
            return x;
          });
      }
      add_weight_gradients(gradients, true);
      for (int l = 0; l < rada::LAYERS; l++) {
        if (c.weight[l]) continue;  // a query that is not in use has no part in the logits
        std::memset(c.grad_weight[l], 0, c.width * c.width * sizeof(float));
        std::memset(c.grad_bias[l], 0, c.width * sizeof(float));
      }
    }
    if (!c.grad_image) return;
    for (const Query& q : queries) {
      if (q.grad) {
        const Split split = this->split(q.rows, layer[q.layer].packed_back);
        run(pool, split.tasks(), [&](int64_t task, int) {
          split.with(task, [&](int64_t row, int64_t count, int64_t column, int64_t end, int64_t) {
            apply_back<P>(layer[q.layer], q.grad_rows + row * c.width, count, c.width, column, end,
                          [&](int64_t r, int64_t d, vec v) __attribute__((always_inline)) {
                            float* at = q.grad_features + (row + r) * c.width + d;
                            store_first(at, load_first(at, c.width - d) + v * root, c.width - d);
                          });
          });
        });
      }
      run_rows(pool, q.rows, LIGHT_ROWS, [&](int64_t row, int64_t count, int) {
        for (int64_t i = row; i < row + count; i++)
          unit_row_backward(q.grad_features + i * c.width, q.unit + i * over_width, q.inverse[i], c.width, c.normalize);
      });
    }
  }

  const Call& c;
  const Pool& pool;
  const Shape shape, forward_shape;
  const bool again;  // the forward pass: it is the call, or nothing was kept of it
  Arena arena;
  int64_t over_width, wave_images, first = 0, images = 0;
  float *f, *h, *inverse;  // unit rows [B, padded D] and [K, padded D], 1 / norms [B + K]
  Layer<P> layer[rada::LAYERS];
  element *query_image = nullptr, *query_text = nullptr;
  element *projection[3] = {}, *attended = nullptr, *change = nullptr;
  float *references = nullptr, *row_sums = nullptr, *row_statistics = nullptr;
  element *grad_rows[rada::LAYERS] = {}, *grad_attended = nullptr, *query_rows[2] = {};
  float *text_rows = nullptr, *grad_query_text = nullptr, *grad_query_image = nullptr, *grad_r = nullptr;
  int64_t* peak = nullptr;
  word* operands[2] = {};
  size_t thread_bytes;
  AttentionScratch<P> attention{};
  AttentionBackwardScratch<P> attention_backward{};
  element *input_rows = nullptr, *weight_rows = nullptr;
  word* weight_left = nullptr;
};

template <class P>
rada::Loops loops_of() {
  return {
      [](const Call& call, const Pool& pool) { return Head<P>(call, pool, false, nullptr).bytes(); },
      [](const Call& call, const Pool& pool, void* workspace) { Head<P>(call, pool, false, workspace).forward(); },
      [](const Call& call, const Pool& pool) { return Head<P>(call, pool, true, nullptr).bytes(); },
      [](const Call& call, const Pool& pool, void* workspace) { Head<P>(call, pool, true, workspace).backward(); },
      convert,
  };
}

}  // namespace RADA_ISA
