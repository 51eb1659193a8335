// What the operators hand to the loops of one instruction set: plain pointers and sizes, no torch in sight.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rada {

enum LayerIndex { QUERY_IMAGE, QUERY_TEXT, QUERY_RATIONAL, KEY, VALUE, OUT, LAYERS };  // as in options.Params
enum Kind { TEXT_KIND, RATIONAL_KIND, KINDS };  // the query kinds with a row per class
enum class Penalty { LINF, L1, MSE };

constexpr int64_t SCORE_ROWS = 32;  // score rows per block: each block has a shift of its own

// Runs task(context, i, thread) for every i < tasks, on at most `threads` threads at once.
struct Pool {
  int threads;
  void (*run)(const Pool&, int64_t tasks, void (*task)(void*, int64_t, int), void* context);
};

enum class Type { FLOAT, BFLOAT16, HALF };

inline int64_t bytes_of(Type type) { return type == Type::FLOAT ? 4 : 2; }

// A matrix of any layout and alignment: strides in elements. Null: not in use or not wanted.
struct Matrix {
  void* at;
  Type type;
  int64_t rows, columns, row_stride, column_stride;

  Matrix block(int64_t row, int64_t count, int64_t column, int64_t width) const {
    const int64_t element = row * row_stride + column * column_stride;
    return {(char*)at + element * bytes_of(type), type, count, width, row_stride, column_stride};
  }
  // Whether the loops use it in place as one of `type`: rows without gaps, of whole words of 4 bytes.
  bool plain(Type type) const {
    const bool dense = (row_stride == columns || rows == 1) && (column_stride == 1 || columns == 1);
    return this->type == type && dense && (uintptr_t)at % 4 == 0;
  }
};

// A linear layer. Elements, as in a call; matrices of any type.
struct Layer {
  Matrix weight;     // [D, D]; null for a query that is not in use
  const void* bias;  // [D] elements
  // Saved for the backward pass, or null: elements [B, D] of the image query, [K, D] of the text query, else [B, K, D];
  // of OUT M - 1.
  void* output;
  Matrix grad_weight;  // [D, D]
  float* grad_bias;    // [D]
};

// `element` arrays hold floats or bfloat16, as the loops were chosen. A null pointer: not in use or not wanted.
struct Call {
  bool backward;  // the gradients; what was not saved is computed first. Otherwise the forward pass
  int64_t images, classes, width, heads;
  float scale;
  double score_factor;
  int64_t score_bytes;  // room for the scores of one image and head, in both kinds
  Penalty penalty;
  bool normalize;
  const void* image;  // [B, D] elements, features as given
  const void* text;   // [K, D] elements
  Layer layers[LAYERS];

  // Saved for the backward pass as the layers' outputs, or null.
  void* attended;  // [B, K, D] elements
  float* shifts;   // [KINDS, B·H] what is subtracted from a unit's q·k before it is exponentiated

  float* sums;       // [B, K]; null: attended rows alone
  float* deviation;  // [B]

  // Backward only.
  const float* grad_sums;       // [B, K]
  const float* grad_deviation;  // [B]
  float* grad_image;            // [B, D]
  float* grad_text;             // [K, D]
};

// One instruction set's loops for one element type. A workspace has the size that `bytes` gives and is aligned to 64.
struct Loops {
  size_t (*bytes)(const Call&, const Pool&);
  void (*run)(const Call&, const Pool&, void* workspace);
  void (*convert)(const Matrix& to, const Matrix& from);  // of equal size
};

}  // namespace rada
