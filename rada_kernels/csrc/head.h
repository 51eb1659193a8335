// The whole head: both passes over waves of images, each wave in phases that spread over the threads.
//
// Every result is written by exactly one task, and sums over images run in the order of the images: the numbers do
// not depend on the number of threads.
#pragma once

#include "../logit_reduction/cpu.h"
#include "../mask_attention/cpu.h"
#include "../rational_projection/cpu.h"

namespace RADA_ISA {

using rada::Call;
using rada::Pool;

constexpr int64_t BLOCK_ROWS = 64;     // rows of a task that runs products against whole layers
constexpr int64_t WAVE_ROWS = 2048;    // rows of a wave, at least one image
constexpr int64_t WEIGHT_ROWS = 256;   // rows of one step of a weight gradient's sum
constexpr int64_t WEIGHT_COLUMNS = 64; // a task's share of a weight gradient

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
  pool.run(pool, tasks, [](void* context, int64_t i, int thread) { (*(Task*)context)(i, thread); }, (void*)&task);
}

template <class P>
class Head {
  typedef typename P::element element;

 public:
  Head(const Call& call, const Pool& pool, bool backward, void* workspace)
      : c(call), pool(pool), shape(call.classes, call.width / call.heads, call.score_bytes), arena{(char*)workspace} {
    over_width = round_up(c.width, W);
    wave_images = smaller_of(larger_of(WAVE_ROWS / c.classes, 1), c.images);
    const int64_t rows = wave_images * c.classes, pairs = wave_images * c.heads;
    const int64_t packed = Panels(c.width).padded() * ceil_div(c.width, P::per_word);
    sf = arena.take<float>(c.images * over_width);
    f = arena.take<float>(c.images * over_width);
    h = arena.take<float>(c.classes * over_width);
    for (int l = 0; l < rada::LAYERS; l++) {
      weight[l] = arena.take<word>(packed);
      bias[l] = arena.take<float>(over_width);
    }
    again = !backward || !c.attended;
    for (int l = 0; l < 3; l++)
      projection[l] = c.projection[l] || !in_use(l) ? nullptr : arena.take<element>(rows * c.width);
    attended = c.attended ? nullptr : arena.take<element>(rows * c.width);
    if (again) {
      statistic = arena.take<float>(rows);
      if (!c.statistics) statistics = arena.take<float>(2 * rada::KINDS * pairs);
    }
    if (backward) {
      if (!c.change) change = arena.take<float>(rows * c.width);
      for (int l = 0; l < rada::LAYERS; l++) {
        weight_back[l] = l == rada::OUT || c.grad_f ? arena.take<word>(packed) : nullptr;
        grad_rows[l] = l == rada::OUT || in_use(l) ? arena.take<element>(rows * c.width) : nullptr;
      }
      grad_attended = arena.take<element>(rows * c.width);
      text_rows = c.text_query ? arena.take<float>(rows * c.width) : nullptr;
      peak = arena.take<int64_t>(wave_images);
      if (c.grad_weight[0]) {
        const int64_t steps = ceil_div(rows, WEIGHT_ROWS);
        for (auto& panel : operands)
          panel = arena.take<word>(steps * ceil_div(WEIGHT_ROWS, P::per_word) * Panels(c.width).padded());
      }
      if (c.grad_f) grad_r = arena.take<float>(rows * over_width);
    }
    // A thread's phases follow each other, and so may share its scratch.
    const size_t start = arena.used;
    size_t end = start;
    const int64_t words = ceil_div(shape.width, P::per_word), half = ceil_div(c.classes, P::per_word);
    const int64_t width_ld = shape.over_width.padded();
    auto fit = [&](auto&& layout) {
      arena.used = start;
      layout();
      end = end > arena.used ? end : arena.used;
    };
    if (again) {
      fit([&] {
        attention.keys = arena.take<word>(words * shape.ld());
        attention.values = arena.take<word>(half * width_ld);
        attention.exponentials = c.weights ? nullptr : arena.take<float>(rada::KINDS * shape.score_rows() * shape.ld());
        attention.kinds = shape.streams && !c.weights ? arena.take<float>(rada::KINDS * c.classes * width_ld) : nullptr;
        attention.block_scale = arena.take<float>(rada::KINDS * shape.blocks);
        attention.image_row = arena.take<float>(shape.ld() + width_ld);
        attention.mixed = (word*)arena.take<element>(rada::SCORE_ROWS * shape.ld());
      });
      fit([&] {
        x_rows = arena.take<element>(BLOCK_ROWS * c.width);
        partial = arena.take<float>(2 * BLOCK_ROWS * W);
      });
    }
    if (backward) {
      fit([&] {
        auto& s = attention_backward;
        s.keys = arena.take<word>(words * shape.ld());
        s.values = arena.take<word>(words * shape.ld());
        s.key_rows = arena.take<word>(half * width_ld);
        s.exponentials = c.weights ? nullptr : arena.take<float>(rada::KINDS * shape.score_rows() * shape.ld());
        s.grad_weights = arena.take<float>(shape.score_rows() * shape.ld());
        s.grad_key = arena.take<float>(round_up(c.classes, MR) * width_ld);
        s.grad_value = arena.take<float>(round_up(c.classes, MR) * width_ld);
        s.grad_scores = (word*)arena.take<element>(rada::SCORE_ROWS * shape.ld());
        s.by_column = arena.take<word>(ceil_div(rada::SCORE_ROWS, P::per_word) * shape.ld());
        s.block_rows = arena.take<word>(ceil_div(rada::SCORE_ROWS, P::per_word) * width_ld);
        s.image_row = arena.take<float>(2 * shape.ld() + width_ld);
      });
      fit([&] {
        weight_rows = arena.take<element>(WEIGHT_ROWS * c.width);
        weight_left = arena.take<word>(ceil_div(WEIGHT_ROWS, P::per_word) * WEIGHT_COLUMNS);
        weight_bias = arena.take<float>(WEIGHT_COLUMNS);
      });
    }
    thread_bytes = end - start;
    arena.used = start + pool.threads * thread_bytes;
  }

  size_t bytes() const { return arena.used; }

  void forward() {
    prepare(false);
    for (first = 0; first < c.images; first += wave_images) {
      images = smaller_of(wave_images, c.images - first);
      compute();
    }
  }

  void backward() {
    prepare(true);
    for (first = 0; first < c.images; first += wave_images) {
      images = smaller_of(wave_images, c.images - first);
      if (again) compute();
      compute_gradients();
    }
  }

 private:
  bool in_use(int layer) const { return layer != rada::RATIONAL || c.rational; }

  template <class T>
  T* mine(T* scratch, int thread) const {
    return (T*)((uintptr_t)scratch + thread * thread_bytes);
  }

  // The wave's rows of a [B, K, D] array: kept for the whole batch, or the wave's own.
  element* wave(void* kept, element* own) const {
    return kept ? (element*)kept + first * c.classes * c.width : own;
  }
  element* projected(int l) const { return wave(c.projection[l], projection[l]); }
  element* attended_rows() const { return wave(c.attended, attended); }
  float* change_rows() const { return c.change ? c.change + first * c.classes * c.width : change; }
  float* statistics_of(int kind, int64_t pair) const {
    return c.statistics ? c.statistics + 2 * ((kind * c.images + first) * c.heads + pair)
                        : statistics + 2 * (kind * wave_images * c.heads + pair);
  }
  float* kept_weights(int kind, int64_t pair) const {
    return c.weights + ((kind * c.images + first) * c.heads + pair) * c.classes * shape.ld();
  }
  float* kept_scale(int kind, int64_t pair) const {
    return c.weight_scale + ((kind * c.images + first) * c.heads + pair) * shape.blocks;
  }

  // Unit rows padded to whole vectors, weights packed.
  void prepare(bool backward) {
    run(pool, c.images + c.classes, [&](int64_t i, int) {
      const bool image = i < c.images;
      const float* from = image ? c.f + i * c.width : c.h + (i - c.images) * c.width;
      float* to = image ? f + i * over_width : h + (i - c.images) * over_width;
      for (int64_t d = 0; d < over_width; d += W) {
        const vec v = load_first(from + d, c.width - d);
        store(to + d, v);
        if (image) store(sf + i * over_width + d, v * c.scale);
      }
    });
    run(pool, 2 * rada::LAYERS, [&](int64_t i, int) {
      const int l = i % rada::LAYERS;
      if (l != rada::OUT && !in_use(l)) return;
      if (i >= rada::LAYERS) {
        if (backward && weight_back[l])
          pack_rows<P>(weight_back[l], (const element*)c.weight[l], c.width, c.width, c.width);
        return;
      }
      if (!again) return;
      const int64_t words = c.width / P::per_word;
      pack_columns(weight[l], (const word*)c.weight[l], words, words, c.width);
      for (int64_t d = 0; d < over_width; d += W) store(bias[l] + d, load_first(c.bias[l] + d, c.width - d));
    });
  }

  PackedLayer layer(int l) const { return {weight[l], bias[l]}; }

  // The three steps for one wave.
  void compute() {
    const int64_t rows = images * c.classes;
    run(pool, ceil_div(rows, BLOCK_ROWS), [&](int64_t task, int thread) {
      const int64_t row = task * BLOCK_ROWS, count = smaller_of(BLOCK_ROWS, rows - row);
      element* x = mine(x_rows, thread);
      rational_rows<P>(x, sf + first * over_width, h, over_width, row, count, c.classes, c.width);
      for (int l = 0; l < 3; l++)
        if (in_use(l)) project<P>(projected(l) + row * c.width, x, count, c.width, layer(l));
    });
    run(pool, images * c.heads, [&](int64_t pair, int thread) { attend_pair(pair, thread); });
    const int64_t blocks = ceil_div(c.classes, BLOCK_ROWS);
    run(pool, images * blocks, [&](int64_t task, int thread) {
      const int64_t b = task / blocks, k = task % blocks * BLOCK_ROWS, count = smaller_of(BLOCK_ROWS, c.classes - k);
      const int64_t row = b * c.classes + k;
      float* changes = change_rows();
      reduce_logits<P>(c.sums + (first + b) * c.classes + k, statistic + row, changes ? changes + row * c.width : nullptr,
                       attended_rows() + row * c.width, count, c.width, layer(rada::OUT), f + (first + b) * over_width,
                       h + k * over_width, over_width, c.penalty, mine(partial, thread));
    });
    for (int64_t b = 0; b < images; b++)
      c.deviation[first + b] =
          deviation_of(c.sums + (first + b) * c.classes, statistic + b * c.classes, c.classes, c.width, c.penalty);
  }

  void attend_pair(int64_t pair, int thread) {
    const int64_t b = pair / c.heads, column = pair % c.heads * shape.width;
    const int64_t start = b * c.classes * c.width + column;
    const Rows<P> text{c.text_query ? (const element*)c.text_query + column : nullptr, c.width};
    const Rows<P> rational{c.rational ? projected(rada::RATIONAL) + start : nullptr, c.width};
    const Rows<P>* queries[] = {c.text_query ? &text : nullptr, c.rational ? &rational : nullptr};
    AttentionScratch s = attention;
    s.keys = mine(s.keys, thread), s.values = mine(s.values, thread), s.mixed = mine(s.mixed, thread);
    s.image_row = mine(s.image_row, thread), s.kinds = mine(s.kinds, thread);
    float *exps[rada::KINDS], *scale[rada::KINDS], *stats[rada::KINDS];
    for (int n = 0; n < rada::KINDS; n++) {
      exps[n] = c.weights ? kept_weights(n, pair) : mine(attention.exponentials, thread) + n * shape.score_rows() * shape.ld();
      scale[n] = c.weights ? kept_scale(n, pair) : mine(s.block_scale, thread) + n * shape.blocks;
      stats[n] = statistics_of(n, pair);
    }
    attend<P>(attended_rows() + start, c.width, c.image_query ? c.image_query + (first + b) * c.width + column : nullptr,
              queries, {projected(rada::KEY) + start, c.width}, {projected(rada::VALUE) + start, c.width}, c.score_factor,
              shape, s, c.weights != nullptr, exps, scale, stats);
  }

  // The three steps backward for one wave.
  void compute_gradients() {
    const int64_t rows = images * c.classes, width = c.width;
    const float* changes = change_rows();
    const bool find_peak = c.grad_deviation && c.penalty == rada::Penalty::LINF;
    if (find_peak)
      run(pool, images, [&](int64_t b, int) {
        peak[b] = first_peak(changes + b * c.classes * width, c.classes * width);
      });
    run(pool, ceil_div(rows, BLOCK_ROWS), [&](int64_t task, int) {
      const int64_t row = task * BLOCK_ROWS, count = smaller_of(BLOCK_ROWS, rows - row);
      element* to = grad_rows[rada::OUT] + row * width;
      for (int64_t r = row; r < row + count; r++) {
        const int64_t b = r / c.classes, k = r % c.classes;
        reduce_logits_backward<P>(to + (r - row) * width, changes + r * width, f + (first + b) * over_width,
                                  h + k * over_width, width, c.grad_sums[(first + b) * c.classes + k],
                                  c.grad_deviation ? c.grad_deviation[first + b] : 0,
                                  find_peak ? peak[b] - k * width : -1, c.classes * width, c.penalty);
      }
      element* back = grad_attended + row * width;
      project_back<P>(to, count, width, weight_back[rada::OUT],
                      [&](int64_t r, int64_t d, vec v) { P::put_first(back + r * width + d, v, width - d); });
    });
    run(pool, images * c.heads, [&](int64_t pair, int thread) { attend_pair_backward(pair, thread); });
    if (c.text_query)
      run(pool, c.classes, [&](int64_t k, int) {
        for (int64_t b = 0; b < images; b++) {
          const float* from = text_rows + (b * c.classes + k) * width;
          float* to = c.grad_text_query + k * width;
          for (int64_t d = 0; d < width; d += W)
            store_first(to + d, load_first(to + d, width - d) + load_first(from + d, width - d), width - d);
        }
      });
    if (c.grad_weight[0]) compute_weight_gradients();
    if (c.grad_f) compute_feature_gradients();
  }

  void attend_pair_backward(int64_t pair, int thread) {
    const int64_t b = pair / c.heads, column = pair % c.heads * shape.width;
    const int64_t start = b * c.classes * c.width + column;
    const Rows<P> text{c.text_query ? (const element*)c.text_query + column : nullptr, c.width};
    const Rows<P> rational{c.rational ? projected(rada::RATIONAL) + start : nullptr, c.width};
    const Rows<P>* queries[] = {c.text_query ? &text : nullptr, c.rational ? &rational : nullptr};
    AttentionBackwardScratch s = attention_backward;
    word** const words[] = {&s.keys, &s.values, &s.key_rows, &s.grad_scores, &s.by_column, &s.block_rows};
    float** const floats[] = {&s.exponentials, &s.grad_weights, &s.grad_key, &s.grad_value, &s.image_row};
    for (word** p : words) *p = mine(*p, thread);
    for (float** p : floats) *p = mine(*p, thread);
    const float *kept[rada::KINDS], *scale[rada::KINDS], *stats[rada::KINDS];
    for (int n = 0; n < rada::KINDS; n++) {
      kept[n] = c.weights ? kept_weights(n, pair) : nullptr;
      scale[n] = c.weights ? kept_scale(n, pair) : nullptr;
      stats[n] = statistics_of(n, pair);
    }
    const int64_t image_at = (first + b) * c.width + column;
    const AttentionGradients<P> grads{grad_rows[rada::KEY] + start,
                                      grad_rows[rada::VALUE] + start,
                                      c.rational ? grad_rows[rada::RATIONAL] + start : nullptr,
                                      c.text_query ? text_rows + start : nullptr,
                                      c.image_query ? c.grad_image_query + image_at : nullptr,
                                      c.width,
                                      c.width};
    attend_backward<P>(grads, {grad_attended + start, c.width}, c.image_query ? c.image_query + image_at : nullptr,
                       queries, {projected(rada::KEY) + start, c.width}, {projected(rada::VALUE) + start, c.width},
                       c.score_factor, shape, s, kept, scale, stats);
  }

  // Adds the wave's part of every weight's gradient: Σ_rows grad[row, e] input[row, d].
  void compute_weight_gradients() {
    const int64_t rows = images * c.classes, width = c.width, steps = ceil_div(rows, WEIGHT_ROWS);
    const Panels panels(width);
    const int64_t step_words = ceil_div(WEIGHT_ROWS, P::per_word) * panels.padded();
    run(pool, 2 * steps, [&](int64_t task, int thread) {
      const int64_t step = task / 2, row = step * WEIGHT_ROWS, count = smaller_of(WEIGHT_ROWS, rows - row);
      const element* from = attended_rows() + row * width;
      if (task % 2 == 0) {
        element* x = mine(weight_rows, thread);
        rational_rows<P>(x, sf + first * over_width, h, over_width, row, count, c.classes, width);
        from = x;
      }
      pack_rows<P>(operands[task % 2] + step * step_words, from, width, count, width);
    });
    const int64_t shares = ceil_div(width, WEIGHT_COLUMNS);
    run(pool, rada::LAYERS * shares, [&](int64_t task, int thread) {
      const int l = task / shares;
      if (l != rada::OUT && !in_use(l)) return;
      const int64_t column = task % shares * WEIGHT_COLUMNS, share = smaller_of(WEIGHT_COLUMNS, width - column);
      word* left = mine(weight_left, thread);
      float* bias_sum = mine(weight_bias, thread);
      std::memset(bias_sum, 0, WEIGHT_COLUMNS * sizeof(float));
      for (int64_t step = 0; step < steps; step++) {
        const int64_t row = step * WEIGHT_ROWS, count = smaller_of(WEIGHT_ROWS, rows - row);
        const element* from = grad_rows[l] + row * width + column;
        if (share < WEIGHT_COLUMNS) std::memset(left, 0, ceil_div(count, P::per_word) * WEIGHT_COLUMNS * sizeof(word));
        for (int64_t r = 0; r < count; r += P::per_word)
          P::interleave(left + r / P::per_word * WEIGHT_COLUMNS, from + r * width,
                        r + 1 < count ? from + (r + 1) * width : nullptr, share);
        for (int64_t e = 0; e < share; e += W) {
          vec total = load(bias_sum + e);
          for (int64_t r = 0; r < count; r++) total += P::get_first(from + r * width + e, share - e);
          store(bias_sum + e, total);
        }
        multiply<P, false>(share, ceil_div(count, P::per_word), left, WEIGHT_COLUMNS,
                           operands[l == rada::OUT] + step * step_words, panels,
                           [&](int64_t e, int valid, int64_t d, const auto& t) {
                             constexpr int N = sizeof(t.at[0]) / sizeof(vec);
                             for (int r = 0; r < valid; r++)
                               for (int v = 0; v < N; v++) {
                                 const int64_t n = width - d - v * W;
                                 float* to = c.grad_weight[l] + (column + e + r) * width + d + v * W;
                                 store_first(to, load_first(to, n) + t.at[r][v], n);
                               }
                           });
      }
      for (int64_t e = 0; e < share; e++) c.grad_bias[l][column + e] += bias_sum[e];
    });
  }

  // The features' gradients through X = s R and through the sums M R.
  void compute_feature_gradients() {
    const int64_t rows = images * c.classes, width = c.width;
    const float* changes = change_rows();
    run(pool, ceil_div(rows, BLOCK_ROWS), [&](int64_t task, int) {
      const int64_t row = task * BLOCK_ROWS, count = smaller_of(BLOCK_ROWS, rows - row);
      float* to = grad_r + row * over_width;
      std::memset(to, 0, count * over_width * sizeof(float));
      for (int l = 0; l < 3; l++)
        if (in_use(l))
          project_back<P>(grad_rows[l] + row * width, count, width, weight_back[l], [&](int64_t r, int64_t d, vec v) {
            float* at = to + r * over_width + d;
            store(at, load(at) + v);
          });
      for (int64_t r = 0; r < count; r++) {
        const float g = c.grad_sums[first * c.classes + row + r];
        for (int64_t d = 0; d < width; d += W) {
          float* at = to + r * over_width + d;
          store(at, load(at) * c.scale + (load_first(changes + (row + r) * width + d, width - d) + 1.0f) * g);
        }
      }
    });
    run(pool, images + c.classes, [&](int64_t i, int) {
      const bool image = i < images;
      const int64_t k = i - images;
      float* to = image ? c.grad_f + (first + i) * width : c.grad_h + k * width;
      for (int64_t d = 0; d < width; d += W) {
        vec total{};
        if (image)
          for (int64_t k = 0; k < c.classes; k++)
            total += load(grad_r + (i * c.classes + k) * over_width + d) * load(h + k * over_width + d);
        else
          for (int64_t b = 0; b < images; b++)
            total += load(grad_r + (b * c.classes + k) * over_width + d) * load(f + (first + b) * over_width + d);
        store_first(to + d, load_first(to + d, width - d) + total, width - d);
      }
    });
  }

  const Call& c;
  const Pool& pool;
  const Shape shape;
  Arena arena;
  int64_t over_width, wave_images, first = 0, images = 0;
  bool again;
  float *sf, *f, *h;
  word* weight[rada::LAYERS];
  float* bias[rada::LAYERS];
  word* weight_back[rada::LAYERS] = {};
  element* projection[3];
  element *attended, *grad_attended, *grad_rows[rada::LAYERS];
  float *statistic = nullptr, *statistics = nullptr, *change = nullptr, *text_rows = nullptr, *grad_r = nullptr;
  int64_t* peak = nullptr;
  word* operands[2] = {};
  size_t thread_bytes;
  AttentionScratch attention{};
  AttentionBackwardScratch attention_backward{};
  element *x_rows = nullptr, *weight_rows = nullptr;
  float *partial = nullptr, *weight_bias = nullptr;
  word* weight_left = nullptr;
};

template <class P>
rada::Loops loops_of() {
  return {
      [](const Call& call, const Pool& pool) { return Head<P>(call, pool, false, nullptr).bytes(); },
      [](const Call& call, const Pool& pool, void* workspace) { Head<P>(call, pool, false, workspace).forward(); },
      [](const Call& call, const Pool& pool) { return Head<P>(call, pool, true, nullptr).bytes(); },
      [](const Call& call, const Pool& pool, void* workspace) { Head<P>(call, pool, true, workspace).backward(); },
  };
}

}  // namespace RADA_ISA
