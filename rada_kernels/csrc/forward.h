// The head's forward phases over one slice of images.
#pragma once

#include "head.h"

namespace RADA_ISA {

template <class P>
void Head<P>::place_forward(int64_t rows) {
  const int64_t shares = split(rows, linear[rada::OUT].packed).shares;
  row_sums = arena.take<float>(shares * rows);
  row_deviations = arena.take<float>(shares * rows);
}

// Unit rows padded to whole vectors, weights packed.
template <class P>
void Head<P>::prepare() {
  run_rows(pool, c.images + c.classes, LIGHT_ROWS, [&](int64_t row, int64_t count, int) {
    for (int64_t i = row; i < row + count; i++) {
      const bool image = i < c.images;
      const int64_t k = image ? i : i - c.images;
      const element* features = (const element*)(image ? c.image : c.text) + k * c.width;
      inverse_norms[i] = unit_row<P>((image ? f : h) + k * over_width, features, c.width, over_width, c.normalize);
    }
  });
  const Panels panels(c.width);
  run_tasks(pool, rada::LAYERS * panels.count, [&](int64_t task, int thread) {
    const int64_t panel = task % panels.count, row = panels.first_column(panel);
    const int64_t rows = smaller_of(panels.vectors_of(panel) * W, c.width - row);
    const Linear<P>& l = linear[task / panels.count];
    if (l.weight.at && panel == 0)
      for (int64_t d = 0; d < over_width; d += W)
        store((float*)l.bias + d, P::get_first((const element*)c.layers[task / panels.count].bias + d, c.width - d));
    if (!l.packed && !l.packed_back) return;
    const Rows<P> block = l.block(row, rows, 0, c.width, layer_scratch(thread).weight);
    if (l.packed) pack_panel((word*)l.packed, block.words(), block.word_ld(), c.width / P::per_word, panels, panel);
    if (l.packed_back)
      pack_rows<P>((word*)l.packed_back, block.at, block.ld, rows, c.width, ceil_div(c.width, P::per_word),
                   row / P::per_word);
  });
}

// Keys, values and rational queries of the slice; with the first slice the image and text queries.
template <class P>
void Head<P>::project_rows() {
  struct Part {
    int layer;
    Split split;
    const float* unit_rows;  // rows that a query is made of; null: the rows of X
    int64_t tasks;
  };
  auto part = [&](int l, int64_t rows, const float* unit_rows) {
    const Split split = this->split(rows, linear[l].packed);
    return Part{l, split, unit_rows, !unit_rows || (first == 0 && output[l].base) ? split.tasks() : 0};
  };
  const Part parts[] = {part(rada::KEY, slice_rows(), nullptr), part(rada::QUERY_TEXT, c.classes, h),
                        part(rada::QUERY_IMAGE, c.images, f)};
  const float root = __builtin_sqrtf(c.scale);
  run_tasks(pool, parts[0].tasks + parts[1].tasks + parts[2].tasks, [&](int64_t task, int thread) {
    const Part* part = parts;
    while (task >= part->tasks) task -= part++->tasks;
    const LayerScratch at = layer_scratch(thread);
    element* const x = at.rows;
    part->split.with(task, [&](int64_t row, int64_t count, int64_t column, int64_t end, int64_t) {
      auto project_to = [&](int l) {
        project<P>(rows_of(l) + row * c.width, x, count, c.width, linear[l], column, end, at.weight);
      };
      if (part->unit_rows) {
        scaled_rows<P>(x, part->unit_rows + row * over_width, over_width, count, c.width, root);
        return project_to(part->layer);
      }
      rational_rows<P>(x, f + first * over_width, h, over_width, row, count, c.classes, c.width, c.scale);
      for (int l = rada::QUERY_RATIONAL; l <= rada::VALUE; l++)
        if (linear[l].weight.at) project_to(l);
    });
  });
}

// step(unit, its state, thread, chunk) of every unit of the slice, one step after the other. A unit of one chunk is one
// task; the steps of others spread over the threads, as many units at a time as there are states.
template <class P>
template <class... Steps>
void Head<P>::run_units(Steps&&... steps) {
  const int64_t units = images * c.heads, chunks = shape.chunks;
  if (chunks == 1) return run_tasks(pool, units, [&](int64_t i, int thread) { (steps(i, thread, thread, 0), ...); });
  for (int64_t from = 0; from < units; from += state_count) {
    auto step_of_all = [&](auto& step) {
      run_tasks(pool, smaller_of(state_count, units - from) * chunks,
                [&](int64_t i, int thread) { step(from + i / chunks, i / chunks, thread, i % chunks); });
    };
    (step_of_all(steps), ...);
  }
}

template <class P>
void Head<P>::attend_units() {
  typedef Attention<P> Pass;
  auto step = [&](void (Pass::*compute)(int64_t) const) {
    return [=](int64_t i, int64_t state, int thread, int64_t chunk) {
      const Unit<P> unit = unit_of(i);
      float* const shift_of_kind[] = {shift_of(rada::TEXT_KIND, i), shift_of(rada::RATIONAL_KIND, i)};
      const Pass pass(unit, forward_shape, c.score_factor, attended_rows() + place_of(i).rows, c.width, shift_of_kind,
                      states.at<typename Pass::State>(state, forward_shape),
                      scratch.at<typename Pass::Scratch>(thread, forward_shape));
      (pass.*compute)(chunk);
    };
  };
  run_units(step(&Pass::prepare), step(&Pass::score), step(&Pass::attend));
}

// Logits without their scale and each image's deviation, from the attended rows.
template <class P>
void Head<P>::reduce_rows() {
  const int64_t rows = slice_rows();
  const Split split = this->split(rows, linear[rada::OUT].packed);
  run_tasks(pool, split.tasks(), [&](int64_t task, int thread) {
    split.with(task, [&](int64_t row, int64_t count, int64_t column, int64_t end, int64_t share) {
      const float *fs[BLOCK_ROWS], *hs[BLOCK_ROWS];
      for (int64_t r = 0; r < count; r++) fs[r] = f_of(row + r), hs[r] = h_of(row + r);
      element* change = rows_of(rada::OUT);
      reduce_logits<P>(row_sums + share * rows + row, row_deviations + share * rows + row,
                       change ? change + row * c.width : nullptr, attended_rows() + row * c.width, count, c.width,
                       linear[rada::OUT], fs, hs, c.penalty, column, end, layer_scratch(thread).weight);
    });
  });
  for (int64_t share = 1; share < split.shares; share++)
    for (int64_t row = 0; row < rows; row++) {
      const float part = row_deviations[share * rows + row];
      row_sums[row] += row_sums[share * rows + row];
      float& deviation = row_deviations[row];
      deviation = c.penalty != rada::Penalty::LINF ? deviation + part : part > deviation ? part : deviation;
    }
  std::memcpy(c.sums + first * c.classes, row_sums, rows * sizeof(float));
  for (int64_t b = 0; b < images; b++)
    c.deviation[first + b] =
        deviation_of(row_sums + b * c.classes, row_deviations + b * c.classes, c.classes, c.width, c.penalty);
}

}  // namespace RADA_ISA
