// What the operators hand to the loops of one instruction set: plain pointers and sizes, no torch in sight.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rada {

enum Layer { QUERY_IMAGE, QUERY_TEXT, QUERY_RATIONAL, KEY, VALUE, OUT, LAYERS };  // as in options.Params
enum Kind { TEXT_KIND, RATIONAL_KIND, KINDS };  // the query kinds with a row per class
enum class Penalty { LINF, L1, MSE };

constexpr int64_t SCORE_ROWS = 32;  // score rows per block: each block has a reference maximum of its own

// Runs task(context, i, thread) for every i < tasks, on at most `threads` threads at once.
struct Pool {
  int threads;
  void (*run)(const Pool&, int64_t tasks, void (*task)(void*, int64_t, int), void* context);
};

enum class Type { FLOAT, BFLOAT16, HALF };

// A matrix as somebody else laid it out: strides in elements, at any address.
struct Matrix {
  void* at;
  Type type;
  int64_t rows, columns, row_stride, column_stride;
};

// `element` arrays hold floats or bfloat16, as the loops were chosen. A null pointer: not in use or not wanted.
struct Call {
  int64_t images, classes, width, heads;
  float scale;
  double score_factor;
  int64_t score_bytes;  // a thread's room for the scores of one image and head, in both kinds
  Penalty penalty;
  bool normalize;
  const void* image;           // [B, D] elements, features as given
  const void* text;            // [K, D] elements
  const void* weight[LAYERS];  // [D, D] elements; null for a query that is not in use
  const void* bias[LAYERS];    // [D] elements

  // Kept for the backward pass, or null.
  void* query_image;    // [B, D] elements
  void* query_text;     // [K, D] elements
  void* projection[3];  // [B, K, D] elements: QUERY_RATIONAL, KEY, VALUE
  void* attended;       // [B, K, D] elements
  void* change;         // [B, K, D] elements M - 1
  float* references;    // [KINDS, B·H] the reference q·k of a pair's exponentials

  float* sums;       // [B, K]; null: attended rows alone
  float* deviation;  // [B]

  // Backward only.
  const float* grad_sums;       // [B, K]
  const float* grad_deviation;  // [B]
  float* grad_weight[LAYERS];   // [D, D]
  float* grad_bias[LAYERS];     // [D]
  float* grad_image;            // [B, D]
  float* grad_text;             // [K, D]
};

// One instruction set's loops for one element type. Workspace sizes are in bytes; workspaces are aligned to 64.
struct Loops {
  size_t (*forward_bytes)(const Call&, const Pool&);
  void (*forward)(const Call&, const Pool&, void* workspace);
  size_t (*backward_bytes)(const Call&, const Pool&);
  void (*backward)(const Call&, const Pool&, void* workspace);
  void (*convert)(const Matrix& to, const Matrix& from);  // of equal size
};

}  // namespace rada
