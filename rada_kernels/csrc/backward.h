// The head's backward phases over one slice of images, and after all slices.
#pragma once

#include "head.h"

namespace RADA_ISA {

template <class P>
void Head<P>::place_backward(int64_t rows) {
  for (int l = rada::QUERY_RATIONAL; l < rada::LAYERS; l++)
    if (linear[l].weight.at) grad_output[l] = arena.take<element>(rows * c.width);
  for (int l = rada::QUERY_IMAGE; l <= rada::QUERY_TEXT; l++)
    if (linear[l].weight.at) {
      grad_query[l] = arena.take<float>(all_rows(l) * c.width);
      grad_output[l] = arena.take<element>(all_rows(l) * c.width);
    }
  grad_attended = arena.take<element>(rows * c.width);
  peaks = arena.take<int64_t>(slice_images);
  row_largest = arena.take<float>(rows);
  if (linear[rada::QUERY_TEXT].weight.at) grad_text_rows = arena.take<float>(rows * c.width);
  if (c.layers[0].grad_weight.at)
    for (word*& steps : inputs)
      steps = arena.take<word>(ceil_div(larger_of(rows, larger_of(c.images, c.classes)), WEIGHT_ROWS) * step_words());
  for (int l = rada::QUERY_RATIONAL; l < rada::LAYERS && slice_images < c.images; l++)
    if (c.layers[l].grad_weight.at && !c.layers[l].grad_weight.plain(rada::Type::FLOAT))
      weight_sums[l] = arena.take<float>(c.width * c.width);
  if (c.grad_image) grad_rational = arena.take<float>(rows * over_width);
}

// Gradients of the output layer's result and of its input.
template <class P>
void Head<P>::reduce_rows_backward() {
  const int64_t rows = slice_rows(), width = c.width, elements = c.classes * width;
  const element* change = rows_of(rada::OUT);
  const bool find_peaks = c.grad_deviation && c.penalty == rada::Penalty::LINF;
  if (find_peaks) {
    run_rows(pool, rows, LIGHT_ROWS, [&](int64_t row, int64_t count, int) {
      for (int64_t r = row; r < row + count; r++) row_largest[r] = largest_change<P>(change + r * width, width);
    });
    for (int64_t b = 0; b < images; b++)
      peaks[b] = first_peak<P>(change + b * elements, row_largest + b * c.classes, c.classes, width);
  }
  auto form = [&](int64_t row, int64_t count) {
    for (int64_t r = row; r < row + count; r++) {
      const int64_t b = r / c.classes, k = r % c.classes;
      reduce_logits_backward<P>(grad_output[rada::OUT] + r * width, change + r * width, f_of(r), h_of(r), width,
                                c.grad_sums[first * c.classes + r], c.grad_deviation ? c.grad_deviation[first + b] : 0,
                                find_peaks ? peaks[b] - k * width : -1, elements, c.penalty);
    }
  };
  const Split split = this->split(rows, linear[rada::OUT].packed_back);
  if (split.shares > 1) run_rows(pool, rows, LIGHT_ROWS, [&](int64_t row, int64_t count, int) { form(row, count); });
  run_tasks(pool, split.tasks(), [&](int64_t task, int thread) {
    split.with(task, [&](int64_t row, int64_t count, int64_t column, int64_t end, int64_t) {
      if (split.shares == 1) form(row, count);
      element* to = grad_attended + row * width;
      apply_back<P>(linear[rada::OUT], grad_output[rada::OUT] + row * width, count, width, column, end,
                    layer_scratch(thread).weight,
                    [&](int64_t r, int64_t d, vec v) { P::put_first(to + r * width + d, v, width - d); });
    });
  });
}

template <class P>
void Head<P>::attend_units_backward() {
  typedef AttentionBackward<P> Pass;
  auto offset = [](auto* base, int64_t by) { return base ? base + by : nullptr; };
  auto step = [&](void (Pass::*compute)(int64_t) const) {
    return [=](int64_t i, int64_t state, int thread, int64_t chunk) {
      const Unit<P> unit = unit_of(i);
      const Place at = place_of(i);
      const UnitGradients<P> grads{grad_output[rada::KEY] + at.rows,
                                   grad_output[rada::VALUE] + at.rows,
                                   offset(grad_output[rada::QUERY_RATIONAL], at.rows),
                                   offset(grad_text_rows, at.rows),
                                   offset(grad_query[rada::QUERY_IMAGE], at.image),
                                   c.width};
      const float* const shift_of_kind[] = {shift_of(rada::TEXT_KIND, i), shift_of(rada::RATIONAL_KIND, i)};
      const Pass pass(unit, {grad_attended + at.rows, c.width}, grads, shape, c.score_factor, shift_of_kind,
                      states.at<typename Pass::State>(state, shape), scratch.at<typename Pass::Scratch>(thread, shape));
      (pass.*compute)(chunk);
    };
  };
  run_units(step(&Pass::prepare), step(&Pass::score), step(&Pass::differentiate), step(&Pass::add_up));
}

// The text query's gradient: its rows summed over the images.
template <class P>
void Head<P>::add_text_rows() {
  run_rows(pool, c.classes, LIGHT_ROWS, [&](int64_t row, int64_t count, int) {
    float* to = grad_query[rada::QUERY_TEXT] + row * c.width;
    for (int64_t d = 0; d < count * c.width; d += W) {
      const int64_t n = count * c.width - d;
      vec total = first ? load_first(to + d, n) : vec{};
      for (int64_t b = 0; b < images; b++) total += load_first(grad_text_rows + (b * c.classes + row) * c.width + d, n);
      store_first(to + d, total, n);
    }
  });
}

// Layer inputs, row by row, packed in steps of WEIGHT_ROWS. form(scratch, row, count) returns the rows.
template <class P>
template <class Form>
void Head<P>::pack_inputs(word* inputs, int64_t rows, Form&& form) {
  run_rows(pool, rows, WEIGHT_ROWS, [&](int64_t row, int64_t count, int thread) {
    const element* from = form(scratch.at<WeightScratch>(thread, c.width).rows, row, count);
    pack_rows<P>(inputs + row / WEIGHT_ROWS * step_words(), from, c.width, count, c.width);
  });
}

// A layer's gradient: Σ_rows grad_output[row, e] input[row, d].
template <class P>
struct Head<P>::WeightGradient {
  int layer;
  int64_t rows;
  const word* inputs;  // packed
};

// Begins layers' gradients where `fresh`, or adds to them; ends them where `last`.
template <class P>
template <size_t N>
void Head<P>::add_weight_gradients(const WeightGradient (&gradients)[N], bool fresh, bool last) {
  // A task for each thread at least, where that leaves it a vector of columns; what is summed stays the same.
  const int64_t columns = larger_of(16, smaller_of(SHARE_COLUMNS, N * c.width / pool.threads / 16 * 16));
  const int64_t shares = ceil_div(c.width, columns);
  run_tasks(pool, N * shares, [&](int64_t task, int thread) {
    const WeightGradient& g = gradients[task / shares];
    const int64_t column = task % shares * columns;
    if (grad_output[g.layer])
      add_weight_gradient(g, column, smaller_of(columns, c.width - column), fresh, last,
                          scratch.at<WeightScratch>(thread, c.width));
  });
}

// Of a share of a layer's outputs from `column` on. A gradient of another type or layout is summed in an array of its
// own, in scratch where one slice ends what it begins.
template <class P>
void Head<P>::add_weight_gradient(const WeightGradient& g, int64_t column, int64_t share, bool fresh, bool last,
                                  const WeightScratch& scratch) {
  const int64_t width = c.width;
  const Panels panels(width);
  const Matrix to = c.layers[g.layer].grad_weight.block(column, share, 0, width);
  const bool in_place = c.layers[g.layer].grad_weight.plain(rada::Type::FLOAT);
  float* const elsewhere = weight_sums[g.layer] ? weight_sums[g.layer] + column * width : scratch.sums;
  float* const weight = in_place ? (float*)to.at : elsewhere;
  float* const bias = c.layers[g.layer].grad_bias + column;
  word* const columns = scratch.columns;
  if (fresh) std::memset(bias, 0, share * sizeof(float));
  for (int64_t row = 0; row < g.rows; row += WEIGHT_ROWS) {
    const int64_t count = smaller_of(WEIGHT_ROWS, g.rows - row), words = ceil_div(count, P::per_word);
    const element* from = grad_output[g.layer] + row * width + column;
    for (int64_t r = 0; r < count; r += P::per_word)
      P::interleave(columns + r / P::per_word * SHARE_COLUMNS, from + r * width,
                    r + 1 < count ? from + (r + 1) * width : nullptr, share);
    for (int64_t e = 0; e < share; e += W) {
      vec total = load_first(bias + e, share - e);
      for (int64_t r = 0; r < count; r++) total += P::get_first(from + r * width + e, share - e);
      store_first(bias + e, total, share - e);
    }
    const bool first_step = fresh && row == 0;
    multiply<P, false>(share, words, columns, SHARE_COLUMNS, g.inputs + row / WEIGHT_ROWS * step_words(), panels,
                       for_each([&](int64_t e, int64_t d, vec x) {
                         float* at = weight + e * width + d;
                         store_first(at, first_step ? x : load_first(at, width - d) + x, width - d);
                       }));
  }
  if (last && !in_place) convert(to, {weight, rada::Type::FLOAT, share, width, width, 1});
}

template <class P>
void Head<P>::add_row_weight_gradients() {
  const int64_t rows = slice_rows();
  pack_inputs(inputs[0], rows, [&](element* x, int64_t row, int64_t count) {
    rational_rows<P>(x, f + first * over_width, h, over_width, row, count, c.classes, c.width, c.scale);
    return x;
  });
  pack_inputs(inputs[1], rows, [&](element*, int64_t row, int64_t) { return attended_rows() + row * c.width; });
  const WeightGradient gradients[] = {{rada::QUERY_RATIONAL, rows, inputs[0]},
                                      {rada::KEY, rows, inputs[0]},
                                      {rada::VALUE, rows, inputs[0]},
                                      {rada::OUT, rows, inputs[1]}};
  add_weight_gradients(gradients, first == 0, first + images == c.images);
}

// The unit features' gradients through X = s R and through the sums M R.
template <class P>
void Head<P>::add_feature_gradients() {
  const int64_t rows = slice_rows(), width = c.width;
  const element* change = rows_of(rada::OUT);
  const Split split = this->split(rows, linear[rada::KEY].packed_back);
  run_tasks(pool, split.tasks(), [&](int64_t task, int thread) {
    split.with(task, [&](int64_t row, int64_t count, int64_t column, int64_t end, int64_t) {
      float* to = grad_rational + row * over_width;
      for (int64_t r = 0; r < count; r++)
        for (int64_t d = column; d < end; d += W) store(to + r * over_width + d, vec{});
      for (int l = rada::QUERY_RATIONAL; l <= rada::VALUE; l++)
        if (linear[l].weight.at)
          apply_back<P>(linear[l], grad_output[l] + row * width, count, width, column, end,
                        layer_scratch(thread).weight, [&](int64_t r, int64_t d, vec v) {
                          float* at = to + r * over_width + d;
                          store(at, load(at) + v);
                        });
      for (int64_t r = 0; r < count; r++) {
        const float g = c.grad_sums[first * c.classes + row + r];
        for (int64_t d = column; d < end; d += W) {
          const vec mask = P::get_first(change + (row + r) * width + d, width - d) + 1.0f;
          float* at = to + r * over_width + d;
          store(at, load(at) * c.scale + mask * g);
        }
      }
    });
  });
  // An image's gradient sums over the classes, in shares of the columns; a class's over the images, in order.
  const int64_t shares = ceil_div(width, SHARE_COLUMNS);
  run_tasks(pool, images * shares + ceil_div(c.classes, LIGHT_ROWS), [&](int64_t task, int) {
    auto add = [&](float* to, bool fresh, int64_t column, int64_t end, int64_t row, int64_t stride, int64_t count,
                   auto&& unit_row) {
      for (int64_t d = column; d < end; d += W) {
        vec total{};
        for (int64_t i = 0; i < count; i++)
          total += load(grad_rational + (row + i * stride) * over_width + d) * load(unit_row(i) + d);
        if (!fresh) total += load_first(to + d, width - d);
        store_first(to + d, total, width - d);
      }
    };
    if (task < images * shares) {
      const int64_t b = task / shares, column = task % shares * SHARE_COLUMNS;
      return add(c.grad_image + (first + b) * width, true, column, smaller_of(column + SHARE_COLUMNS, width),
                 b * c.classes, 1, c.classes, [&](int64_t k) { return h_of(k); });
    }
    const int64_t row = (task - images * shares) * LIGHT_ROWS;
    for (int64_t k = row; k < smaller_of(row + LIGHT_ROWS, c.classes); k++)
      add(c.grad_text + k * width, first == 0, 0, width, k, c.classes, images,
          [&](int64_t b) { return f_of(b * c.classes); });
  });
}

// After all slices: the image and text queries' layers, and the features' gradients through them and the norms.
template <class P>
void Head<P>::differentiate_queries() {
  const float root = __builtin_sqrtf(c.scale);
  const struct Query {
    const float *unit_rows, *inverse_norms;
    float* grad_features;
  } queries[] = {{f, inverse_norms, c.grad_image}, {h, inverse_norms + c.images, c.grad_text}};
  for (int l = 0; l < 2; l++)
    for (int64_t i = 0, size = all_rows(l) * c.width; grad_query[l] && i < size; i += W)
      P::put_first(grad_output[l] + i, load_first(grad_query[l] + i, size - i), size - i);
  if (c.layers[0].grad_weight.at) {
    for (int l = 0; l < 2; l++)
      if (grad_query[l])
        pack_inputs(inputs[l], all_rows(l), [&](element* x, int64_t row, int64_t count) {
          scaled_rows<P>(x, queries[l].unit_rows + row * over_width, over_width, count, c.width, root);
          return x;
        });
    const WeightGradient gradients[] = {{rada::QUERY_IMAGE, c.images, inputs[0]},
                                        {rada::QUERY_TEXT, c.classes, inputs[1]}};
    add_weight_gradients(gradients, true, true);
    for (const rada::Layer& layer : c.layers) {
      if (layer.weight.at) continue;  // a query that is not in use has no part in the logits
      std::memset(layer.grad_bias, 0, c.width * sizeof(float));
      convert(layer.grad_weight, {layer.grad_bias, rada::Type::FLOAT, c.width, c.width, 0, 1});
    }
  }
  if (!c.grad_image) return;
  for (int l = 0; l < 2; l++) {
    const Query& q = queries[l];
    const Split split = this->split(all_rows(l), linear[l].packed_back);
    if (grad_query[l])
      run_tasks(pool, split.tasks(), [&](int64_t task, int thread) {
        split.with(task, [&](int64_t row, int64_t count, int64_t column, int64_t end, int64_t) {
          float* to = q.grad_features + row * c.width;
          apply_back<P>(linear[l], grad_output[l] + row * c.width, count, c.width, column, end,
                        layer_scratch(thread).weight, [&](int64_t r, int64_t d, vec v) {
                          float* at = to + r * c.width + d;
                          store_first(at, load_first(at, c.width - d) + v * root, c.width - d);
                        });
        });
      });
    run_rows(pool, all_rows(l), LIGHT_ROWS, [&](int64_t row, int64_t count, int) {
      for (int64_t i = row; i < row + count; i++)
        unit_row_backward(q.grad_features + i * c.width, q.unit_rows + i * over_width, q.inverse_norms[i], c.width,
                          c.normalize);
    });
  }
}

}  // namespace RADA_ISA
