// The whole head: both passes over slices of images, each slice in phases that spread over the threads. What is where;
// the phases stand in forward.h and backward.h.
//
// Every result is written by exactly one task, and sums over images run in the order of the images: the numbers do
// not depend on how the tasks fall to the threads.
#pragma once

#include "../logit_reduction/cpu.h"
#include "../mask_attention/cpu_backward.h"
#include "../rational_projection/cpu.h"

namespace RADA_ISA {

using rada::Call;

constexpr int64_t SLICE_ROWS = 2048;      // rows of a slice, at least one image
constexpr int64_t FEW_ROWS = 64;          // up to here a layer's weight is read in place
constexpr int64_t WEIGHT_ROWS = 256;      // rows of one step of a weight gradient's sum
constexpr int64_t SHARE_COLUMNS = 64;     // a task's share of a gradient, at most
constexpr int64_t CHUNKS_PER_THREAD = 2;  // at a time, at least
constexpr int64_t LIGHT_ROWS = 32;        // rows of a task that only goes over them

#if defined(RADA_TILES)
static_assert(WEIGHT_ROWS / Bfloat16::per_word <= TRANSPOSED_WORDS, "weight gradients' A comes by columns");
static_assert(rada::KINDS * rada::SCORE_ROWS / Bfloat16::per_word <= TRANSPOSED_WORDS, "key gradients' A does too");
#endif

template <class P>
class Head {
  typedef typename P::element element;

 public:
  // Without a workspace it only measures.
  Head(const Call& call, const Pool& pool, void* workspace = nullptr)
      : c(call), pool(pool), shape(c.classes, c.width / c.heads, sizeof(element), c.score_bytes),
        forward_shape(c.classes, shape.width, sizeof(element), smaller_of(c.score_bytes, HELD_SCORE_BYTES)),
        runs_forward(!c.backward || !c.attended), over_width(round_up(c.width, W)),
        slice_images(smaller_of(larger_of(SLICE_ROWS / c.classes, 1), c.images)), arena{(char*)workspace} {
    const int64_t rows = slice_images * c.classes;
    f = arena.take<float>(c.images * over_width);
    h = arena.take<float>(c.classes * over_width);
    inverse_norms = arena.take<float>(c.images + c.classes);
    const int64_t packed = Panels(c.width).padded() * ceil_div(c.width, P::per_word);
    for (int l = 0; l < rada::LAYERS; l++) {
      const rada::Layer& layer = c.layers[l];
      if (!layer.weight.at) continue;
      const bool few = all_rows(l) <= FEW_ROWS, goes_back = c.backward && (l == rada::OUT || c.grad_image);
      linear[l].weight = layer.weight;
      linear[l].packed = few || !runs_forward ? nullptr : arena.take<word>(packed);
      linear[l].packed_back = few || !goes_back ? nullptr : arena.take<word>(packed);
      linear[l].bias = arena.take<float>(over_width);
      if (l != rada::OUT || c.backward || layer.output) output[l] = rows_at(layer.output, l);
    }
    attended = rows_at(c.attended, rada::OUT);
    shifts = c.shifts ? c.shifts : arena.take<float>(rada::KINDS * c.images * c.heads);
    if (runs_forward) place_forward(rows);
    if (c.backward) place_backward(rows);
    scratch.fit<LayerScratch>(c.width);
    if (runs_forward) {
      scratch.fit<typename Attention<P>::Scratch>(forward_shape);
      states.fit<typename Attention<P>::State>(forward_shape);
    }
    if (c.backward) {
      scratch.fit<typename AttentionBackward<P>::Scratch>(shape);
      scratch.fit<WeightScratch>(c.width);
      states.fit<typename AttentionBackward<P>::State>(shape);
    }
    scratch.place(arena, pool.threads);
    state_count = shape.chunks == 1
                      ? pool.threads
                      : smaller_of(ceil_div(CHUNKS_PER_THREAD * pool.threads, shape.chunks), slice_images * c.heads);
    states.place(arena, state_count);
  }

  size_t bytes() const { return arena.used; }

  void run() {
    prepare();
    for (first = 0; first < c.images; first += images) {
      images = smaller_of(slice_images, c.images - first);
      if (runs_forward) {
        project_rows();
        attend_units();
        if (c.sums) reduce_rows();
      }
      if (c.backward) {
        reduce_rows_backward();
        attend_units_backward();
        if (output[rada::QUERY_TEXT].base) add_text_rows();
        if (c.layers[0].grad_weight.at) add_row_weight_gradients();
        if (c.grad_image) add_feature_gradients();
      }
    }
    if (c.backward) differentiate_queries();
  }

 private:
  // [B, K, D] rows, of all images where they are saved, or of the slice at hand; or a query's, which no slice cuts.
  struct SliceRows {
    element* base = nullptr;
    int64_t image_stride = 0;

    element* from(int64_t image) const { return base + image * image_stride; }
  };
  SliceRows rows_at(void* saved, int l) {
    const bool query = l <= rada::QUERY_TEXT;
    const int64_t rows = query ? all_rows(l) : slice_images * c.classes;
    if (!saved) return {arena.take<element>(rows * c.width), 0};
    return {(element*)saved, query ? 0 : c.classes * c.width};
  }
  element* rows_of(int l) const { return output[l].from(first); }
  element* attended_rows() const { return attended.from(first); }

  int64_t all_rows(int l) const {
    return l == rada::QUERY_IMAGE ? c.images : l == rada::QUERY_TEXT ? c.classes : c.images * c.classes;
  }
  int64_t slice_rows() const { return images * c.classes; }
  int64_t step_words() const { return ceil_div(WEIGHT_ROWS, P::per_word) * Panels(c.width).padded(); }
  Split split(int64_t rows, const word* packed) const { return Split(rows, c.width, packed, pool.threads); }

  const float* f_of(int64_t row) const { return f + (first + row / c.classes) * over_width; }
  const float* h_of(int64_t row) const { return h + row % c.classes * over_width; }

  // Where a unit of the slice begins, an (image, head): in [B, K, D] rows of the slice, in [K, D] and in [B, D] of all.
  struct Place {
    int64_t rows, text, image;
  };
  Place place_of(int64_t i) const {
    const int64_t column = i % c.heads * shape.width, image = i / c.heads;
    return {image * c.classes * c.width + column, column, (first + image) * c.width + column};
  }
  Unit<P> unit_of(int64_t i) const {
    const Place at = place_of(i);
    auto from = [&](int l, int64_t offset) -> const element* { return output[l].base ? rows_of(l) + offset : nullptr; };
    return {{{from(rada::QUERY_TEXT, at.text), c.width}, {from(rada::QUERY_RATIONAL, at.rows), c.width}},
            {from(rada::KEY, at.rows), c.width},
            {from(rada::VALUE, at.rows), c.width},
            from(rada::QUERY_IMAGE, at.image)};
  }
  float* shift_of(int kind, int64_t i) const { return shifts + (kind * c.images + first) * c.heads + i; }

  struct LayerScratch {
    element* rows;    // [BLOCK_ROWS, D]
    element* weight;  // [IN_PLACE_COLUMNS, D] a block of a weight

    LayerScratch(Arena& arena, int64_t width)
        : rows(arena.take<element>(BLOCK_ROWS * width)), weight(arena.take<element>(IN_PLACE_COLUMNS * width)) {}
  };
  struct WeightScratch {
    element* rows;  // [WEIGHT_ROWS, D]
    word* columns;  // [words of WEIGHT_ROWS, SHARE_COLUMNS]
    float* sums;    // [SHARE_COLUMNS, D]

    WeightScratch(Arena& arena, int64_t width)
        : rows(arena.take<element>(WEIGHT_ROWS * width)),
          columns(arena.take<word>(ceil_div(WEIGHT_ROWS, P::per_word) * SHARE_COLUMNS)),
          sums(arena.take<float>(SHARE_COLUMNS * width)) {}
  };
  LayerScratch layer_scratch(int thread) const { return scratch.at<LayerScratch>(thread, c.width); }

  // forward.h
  void place_forward(int64_t rows);
  void prepare();
  void project_rows();
  template <class... Steps>
  void run_units(Steps&&... steps);
  void attend_units();
  void reduce_rows();

  // backward.h
  struct WeightGradient;
  void place_backward(int64_t rows);
  void reduce_rows_backward();
  void attend_units_backward();
  void add_text_rows();
  template <class Form>
  void pack_inputs(word* inputs, int64_t rows, Form&& form);
  template <size_t N>
  void add_weight_gradients(const WeightGradient (&gradients)[N], bool fresh, bool last);
  void add_weight_gradient(const WeightGradient& gradient, int64_t column, int64_t share, bool fresh, bool last,
                           const WeightScratch& scratch);
  void add_row_weight_gradients();
  void add_feature_gradients();
  void differentiate_queries();

  const Call& c;
  const Pool& pool;
  const Shape shape, forward_shape;
  const bool runs_forward;  // forward call, or backward without saved tensors
  const int64_t over_width, slice_images;
  int64_t first = 0, images = 0;  // of the slice at hand
  Arena arena;
  Slots scratch, states;  // of threads, of units in work
  int64_t state_count;

  float *f, *h, *inverse_norms;  // unit rows [B, padded D] and [K, padded D], 1 / norms [B + K]
  Linear<P> linear[rada::LAYERS];
  SliceRows output[rada::LAYERS], attended;
  float* shifts;
  float *row_sums = nullptr, *row_deviations = nullptr;  // [shares of columns, rows]

  element *grad_output[rada::LAYERS] = {}, *grad_attended = nullptr;  // of a slice, or of a query
  float* grad_query[2] = {};  // [B, D] and [K, D] of the image and the text query, summed over slices
  float *grad_text_rows = nullptr, *grad_rational = nullptr;  // [rows, D] of the text query, [rows, padded D] of R
  int64_t* peaks = nullptr;                                   // [B of the slice] where |M - 1| is largest, K·D
  float* row_largest = nullptr;                               // [rows] the largest |M - 1|
  word* inputs[2] = {};                                       // of layers, packed in steps of WEIGHT_ROWS
  float* weight_sums[rada::LAYERS] = {};                      // [D, D] gradients of other types, from slice to slice
};

}  // namespace RADA_ISA
