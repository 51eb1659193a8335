// The loops without torch: every instruction set that runs here, forward and backward, against plain double precision.
//
//   loops_test [instruction set ...]
//
// Memory is of the exact size that is asked for and holds NaN before a call, so that AddressSanitizer sees a step over an
// end and the comparison sees what was read before it was written. Every call is made with 1, 2 and 3 threads, each time
// by two callers at once, and always for the same bits: ThreadSanitizer sees what they share.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../../../rada_kernels/csrc/instruction_sets.h"

// tiles.cpp. amx_model: AMX's loops on a plain C++ model of its tile registers.
#define RADA_DECLARE_TILES(isa)                                                                                       \
  namespace isa {                                                                                                     \
  void tile_product(bool row_major, int64_t m, int64_t n, int64_t k, const uint16_t* a, const uint16_t* b, float* c); \
  bool releases_tiles();                                                                                              \
  bool tiles_in_use();                                                                                                \
  }
RADA_DECLARE_TILES(amx_bf16)
RADA_DECLARE_TILES(amx_model)
RADA_DECLARE_LOOPS(amx_model)

namespace {

using rada::Call;
using rada::InstructionSet;
using rada::Loops;
using rada::Penalty;
using rada::Pool;
using rada::Type;
typedef std::vector<double> Doubles;

// Root mean square errors of a tensor, relative to the truth's size: about three times the largest one seen.
constexpr double FLOAT_TOLERANCE = 2e-5, BFLOAT16_TOLERANCE = 4e-2;

bool subnormals_are_zero() {
  volatile float smallest = std::numeric_limits<float>::min();
  return smallest / 2 == 0;
}

std::atomic<bool> mode_left_behind{false};  // a thread takes subnormal numbers for zero after a task

void run_on_threads(const Pool& pool, int64_t tasks, void (*task)(void*, int64_t, int), void* context) {
  std::atomic<int64_t> next{0};
  const bool before = subnormals_are_zero();  // new threads start in their creator's mode
  auto work = [&](int thread) {
    for (int64_t i; (i = next.fetch_add(1)) < tasks;) {
      task(context, i, thread);
      if (subnormals_are_zero() != before) mode_left_behind = true;
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < std::min<int64_t>(pool.threads, tasks); thread++) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
}

// ---- inputs

enum Query { IMAGE = 1, TEXT = 2, RATIONAL = 4 };

struct Case {
  int64_t images, classes, width, heads;
  int queries;
  Penalty penalty;
  bool kept;
  bool streams, layers, features;  // scores stream; whose gradients are wanted
  bool normalize, bfloat16;
};

uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

float from_bfloat16(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// An array of floats or bfloat16 of the exact size; NaN until it is written.
class Array {
 public:
  Array(int64_t count, bool bfloat16 = false)
      : count(count), bfloat16(bfloat16), bytes(count * (bfloat16 ? 2 : 4), '\xff') {}
  Array(const Doubles& values, bool bfloat16 = false) : Array(values.size(), bfloat16) {
    for (int64_t i = 0; i < count; i++) {
      const float x = values[i];
      const uint16_t half = to_bfloat16(x);
      std::memcpy(&bytes[i * (bfloat16 ? 2 : 4)], bfloat16 ? (const void*)&half : &x, bfloat16 ? 2 : 4);
    }
  }
  template <class T = float>
  T* data() {
    return count ? (T*)bytes.data() : nullptr;
  }
  Doubles values() const {
    Doubles out(count);
    for (int64_t i = 0; i < count; i++) {
      float x;
      uint16_t half;
      if (bfloat16)
        std::memcpy(&half, &bytes[i * 2], 2), x = from_bfloat16(half);
      else
        std::memcpy(&x, &bytes[i * 4], 4);
      out[i] = x;
    }
    return out;
  }
  bool operator==(const Array& other) const { return bytes == other.bytes; }

 private:
  int64_t count;
  bool bfloat16;
  std::vector<char> bytes;
};

struct Inputs {
  Doubles image, text, weight[rada::LAYERS], bias[rada::LAYERS], grad_sums, grad_deviation;
  double scale, factor;
};

Inputs random_inputs(const Case& c) {
  std::mt19937 generator(1);
  std::normal_distribution<double> normal;
  auto draw = [&](int64_t count, double size, bool bfloat16) {
    Doubles out(count);
    for (double& x : out) {
      x = (float)(size * normal(generator));
      if (bfloat16) x = from_bfloat16(to_bfloat16(x));
    }
    return out;
  };
  Inputs in;
  in.scale = (float)(0.7 * c.width);
  in.factor = 1 / std::sqrt((double)c.width / c.heads);
  in.image = draw(c.images * c.width, (c.normalize ? 3 : 1) / std::sqrt((double)c.width), c.bfloat16);
  in.text = draw(c.classes * c.width, (c.normalize ? 3 : 1) / std::sqrt((double)c.width), c.bfloat16);
  for (int l = 0; l < rada::LAYERS; l++) {
    // The output layer keeps every mask element off the kinks: in 16 bits gradients would jump there.
    in.weight[l] = draw(c.width * c.width, (l == rada::OUT ? 0.1 : 1) / std::sqrt((double)c.width), c.bfloat16);
    in.bias[l] = draw(c.width, 1, c.bfloat16);
    if (l == rada::OUT)
      for (double& x : in.bias[l]) x = x > -0.5 ? 1 : -3;
  }
  in.grad_sums = draw(c.images * c.classes, 1, false);
  in.grad_deviation = draw(c.images, 3, false);
  return in;
}

// ---- double precision, word for word

struct Results {
  Doubles sums, deviation, grad_weight[rada::LAYERS], grad_bias[rada::LAYERS], grad_image, grad_text;
};

// c[m, n] += Σ_k a[m, k] b[n, k], or b[k, n] where `by_rows`, or a[k, m] where `by_columns`.
void add_product(double* c, const double* a, const double* b, int64_t m, int64_t n, int64_t k, bool by_columns,
                 bool by_rows) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++)
      for (int64_t l = 0; l < k; l++)
        c[i * n + j] += a[by_columns ? l * m + i : i * k + l] * b[by_rows ? l * n + j : j * k + l];
}

Results compute_truth(const Case& c, const Inputs& in) {
  const int64_t B = c.images, K = c.classes, D = c.width, E = D / c.heads;
  Results out;
  out.sums.assign(B * K, 0), out.deviation.assign(B, 0);
  for (int l = 0; l < rada::LAYERS; l++) out.grad_weight[l].assign(D * D, 0), out.grad_bias[l].assign(D, 0);
  auto norm_of = [&](const Doubles& rows, int64_t row) {
    double square = 0;
    for (int64_t d = 0; d < D; d++) square += rows[row * D + d] * rows[row * D + d];
    return c.normalize ? std::sqrt(square) : 1;
  };
  auto unit_rows = [&](Doubles rows) {
    for (int64_t row = 0; row < (int64_t)rows.size() / D; row++) {
      const double norm = norm_of(rows, row);
      for (int64_t d = 0; d < D; d++) rows[row * D + d] /= norm;
    }
    return rows;
  };
  const Doubles f = unit_rows(in.image), h = unit_rows(in.text);
  auto apply = [&](int l, const Doubles& rows) {
    Doubles to(rows.size());
    for (size_t i = 0; i < to.size(); i++) to[i] = in.bias[l][i % D];
    add_product(to.data(), rows.data(), in.weight[l].data(), rows.size() / D, D, D, false, false);
    return to;
  };
  auto scaled = [&](Doubles rows) {
    for (double& x : rows) x *= std::sqrt(in.scale);
    return rows;
  };
  const Doubles image_query = apply(rada::QUERY_IMAGE, scaled(f)), text_query = apply(rada::QUERY_TEXT, scaled(h));
  Doubles grad_f(B * D), grad_h(K * D), grad_image_query(B * D), grad_text_query(K * D);
  auto add_layer = [&](int l, const Doubles& grad_rows, const Doubles& rows, Doubles& grad_input) {
    const int64_t count = rows.size() / D;
    add_product(out.grad_weight[l].data(), grad_rows.data(), rows.data(), D, D, count, true, true);
    for (int64_t i = 0; i < count * D; i++) out.grad_bias[l][i % D] += grad_rows[i];
    add_product(grad_input.data(), grad_rows.data(), in.weight[l].data(), count, D, D, false, true);
  };
  const double kinds = !!(c.queries & IMAGE) + !!(c.queries & TEXT) + !!(c.queries & RATIONAL);
  for (int64_t b = 0; b < B; b++) {
    Doubles R(K * D), X(K * D), projected[3], O(K * D), M(K * D), change(K * D);
    for (int64_t i = 0; i < K * D; i++) R[i] = f[b * D + i % D] * h[i], X[i] = in.scale * R[i];
    for (int n = 0; n < 3; n++) projected[n] = apply(rada::QUERY_RATIONAL + n, X);
    const Doubles &rational = projected[0], &key = projected[1], &value = projected[2];
    auto query_of = [&](int kind, int64_t i, int64_t d) {
      return kind == IMAGE ? image_query[b * D + d] : kind == TEXT ? text_query[i * D + d] : rational[i * D + d];
    };
    // A[kind][head, i, j]: K times the softmax over all pairs.
    Doubles A[RATIONAL + 1];
    for (int kind : {IMAGE, TEXT, RATIONAL}) {
      if (!(c.queries & kind)) continue;
      A[kind].resize(c.heads * K * K);
      for (int64_t n = 0; n < c.heads; n++) {
        double* a = &A[kind][n * K * K];
        for (int64_t i = 0; i < K; i++)
          for (int64_t j = 0; j < K; j++) {
            double dot = 0;
            for (int64_t d = n * E; d < (n + 1) * E; d++) dot += query_of(kind, i, d) * key[j * D + d];
            a[i * K + j] = dot * in.factor;
          }
        const double top = *std::max_element(a, a + K * K);
        double total = 0;
        for (int64_t i = 0; i < K * K; i++) total += a[i] = std::exp(a[i] - top);
        for (int64_t i = 0; i < K * K; i++) a[i] *= K / total;
        for (int64_t i = 0; i < K; i++)
          for (int64_t j = 0; j < K; j++)
            for (int64_t d = n * E; d < (n + 1) * E; d++) O[i * D + d] += a[i * K + j] / kinds * value[j * D + d];
      }
    }
    const Doubles reduced = apply(rada::OUT, O);
    double* sums = &out.sums[b * K];
    int64_t peak = 0;
    for (int64_t i = 0; i < K * D; i++) {
      change[i] = std::max(reduced[i], -1.0), M[i] = 1 + change[i];
      sums[i / D] += M[i] * R[i];
      const double size = std::abs(change[i]);
      if (c.penalty == Penalty::LINF)
        out.deviation[b] = std::max(out.deviation[b], size);
      else
        out.deviation[b] += (c.penalty == Penalty::L1 ? size : size * size) / (K * D);
      if (size > std::abs(change[peak])) peak = i;
    }

    const double *grad_sums = &in.grad_sums[b * K], grad_deviation = in.grad_deviation[b];
    Doubles grad(K * D), grad_O(K * D), grad_projected[3], grad_X(K * D);
    for (int64_t i = 0; i < K * D; i++) {
      grad[i] = grad_sums[i / D] * R[i];
      const double sign = change[i] > 0 ? 1 : -1;
      if (c.penalty == Penalty::LINF)
        grad[i] += i == peak ? sign * grad_deviation : 0;
      else
        grad[i] += grad_deviation / (K * D) * (c.penalty == Penalty::L1 ? sign : 2 * change[i]);
      if (M[i] == 0) grad[i] = 0;
    }
    add_layer(rada::OUT, grad, O, grad_O);
    for (Doubles& rows : grad_projected) rows.assign(K * D, 0);
    for (int kind : {IMAGE, TEXT, RATIONAL}) {
      if (!(c.queries & kind)) continue;
      for (int64_t n = 0; n < c.heads; n++) {
        const double* a = &A[kind][n * K * K];
        Doubles grad_A(K * K);
        double delta = 0;
        for (int64_t i = 0; i < K; i++)
          for (int64_t j = 0; j < K; j++) {
            for (int64_t d = n * E; d < (n + 1) * E; d++) {
              grad_A[i * K + j] += grad_O[i * D + d] * value[j * D + d] / kinds;
              grad_projected[2][j * D + d] += a[i * K + j] / kinds * grad_O[i * D + d];
            }
            delta += a[i * K + j] * grad_A[i * K + j] / K;
          }
        for (int64_t i = 0; i < K; i++)
          for (int64_t j = 0; j < K; j++) {
            const double grad_score = in.factor * a[i * K + j] * (grad_A[i * K + j] - delta);
            for (int64_t d = n * E; d < (n + 1) * E; d++) {
              double& grad_query = kind == IMAGE  ? grad_image_query[b * D + d]
                                   : kind == TEXT ? grad_text_query[i * D + d]
                                                  : grad_projected[0][i * D + d];
              grad_query += grad_score * key[j * D + d];
              grad_projected[1][j * D + d] += grad_score * query_of(kind, i, d);
            }
          }
      }
    }
    for (int n = 0; n < 3; n++) add_layer(rada::QUERY_RATIONAL + n, grad_projected[n], X, grad_X);
    for (int64_t i = 0; i < K * D; i++) {
      const double grad_R = in.scale * grad_X[i] + grad_sums[i / D] * M[i];
      grad_f[b * D + i % D] += grad_R * h[i];
      grad_h[i] += grad_R * f[b * D + i % D];
    }
  }
  auto through_query = [&](int l, const Doubles& grad_query, const Doubles& unit, Doubles& grad_unit) {
    Doubles grad_rows(unit.size());
    add_layer(l, grad_query, scaled(unit), grad_rows);
    for (size_t i = 0; i < unit.size(); i++) grad_unit[i] += std::sqrt(in.scale) * grad_rows[i];
  };
  through_query(rada::QUERY_IMAGE, grad_image_query, f, grad_f);
  through_query(rada::QUERY_TEXT, grad_text_query, h, grad_h);
  auto through_norm = [&](const Doubles& rows, const Doubles& unit, Doubles grad_unit) {
    for (int64_t row = 0; row < (int64_t)rows.size() / D && c.normalize; row++) {
      double along = 0;
      for (int64_t d = row * D; d < (row + 1) * D; d++) along += grad_unit[d] * unit[d];
      for (int64_t d = row * D; d < (row + 1) * D; d++)
        grad_unit[d] = (grad_unit[d] - along * unit[d]) / norm_of(rows, row);
    }
    return grad_unit;
  };
  out.grad_image = through_norm(in.image, f, grad_f), out.grad_text = through_norm(in.text, h, grad_h);
  return out;
}

// ---- the loops

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<void, Free> workspace(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  std::unique_ptr<void, Free> memory(std::aligned_alloc(64, bytes));
  std::memset(memory.get(), 0xff, bytes);
  return memory;
}

// All that comes out of a forward and a backward pass, by name.
typedef std::vector<std::pair<std::string, Array>> Outcome;

const char* const LAYER_NAMES[] = {"image query", "text query", "rational query", "key", "value", "out"};

Outcome compute(const Loops& loops, const Case& c, const Inputs& in, int threads) {
  const int64_t B = c.images, K = c.classes, D = c.width, pairs = B * c.heads;
  const bool rows = c.kept;
  auto elements = [&](bool wanted, int64_t count) { return Array(wanted ? count : 0, c.bfloat16); };
  Array image(in.image, c.bfloat16), text(in.text, c.bfloat16);
  Array grad_sums(in.grad_sums), grad_deviation(in.grad_deviation);
  Array query_image = elements(rows && c.queries & IMAGE, B * D),
        query_text = elements(rows && c.queries & TEXT, K * D);
  Array rational = elements(rows && c.queries & RATIONAL, B * K * D), key = elements(rows, B * K * D);
  Array value = elements(rows, B * K * D), attended = elements(rows, B * K * D), change = elements(rows, B * K * D);
  Array references(rows ? rada::KINDS * pairs : 0);
  Array sums(B * K), deviation(B), grad_image(c.features ? B * D : 0), grad_text(c.features ? K * D : 0);
  std::vector<Array> weight, bias, grad_weight, grad_bias;
  for (int l = 0; l < rada::LAYERS; l++) {
    weight.emplace_back(in.weight[l], c.bfloat16);
    bias.emplace_back(in.bias[l], c.bfloat16);
    grad_weight.emplace_back(c.layers ? D * D : 0);
    grad_bias.emplace_back(c.layers ? D : 0);
  }

  Call call{};
  call.images = B, call.classes = K, call.width = D, call.heads = c.heads;
  call.scale = in.scale, call.score_factor = in.factor;
  call.score_bytes = c.streams ? 1 : int64_t(1) << 30;
  call.penalty = c.penalty;
  call.normalize = c.normalize;
  call.image = image.data<void>(), call.text = text.data<void>();
  for (int l = 0; l < rada::LAYERS; l++) {
    const bool in_use = l > rada::QUERY_RATIONAL || c.queries >> l & 1;
    call.weight[l] = in_use ? weight[l].data<void>() : nullptr;
    call.bias[l] = in_use ? bias[l].data<void>() : nullptr;
  }
  call.query_image = query_image.data<void>(), call.query_text = query_text.data<void>();
  call.projection[0] = rational.data<void>();
  call.projection[1] = key.data<void>(), call.projection[2] = value.data<void>();
  call.attended = attended.data<void>(), call.change = change.data<void>();
  call.references = references.data();
  call.sums = sums.data(), call.deviation = deviation.data();
  const Pool pool{threads, run_on_threads};
  loops.forward(call, pool, workspace(loops.forward_bytes(call, pool)).get());

  for (int l = 0; l < rada::LAYERS; l++)
    call.grad_weight[l] = grad_weight[l].data(), call.grad_bias[l] = grad_bias[l].data();
  call.grad_sums = grad_sums.data(), call.grad_deviation = grad_deviation.data();
  call.grad_image = grad_image.data(), call.grad_text = grad_text.data();
  Array sums_again(rows ? 0 : B * K), deviation_again(rows ? 0 : B);
  call.sums = sums_again.data(), call.deviation = deviation_again.data();
  loops.backward(call, pool, workspace(loops.backward_bytes(call, pool)).get());

  Outcome out{{"sums", sums}, {"deviation", deviation}};
  for (int l = 0; l < rada::LAYERS && c.layers; l++) {
    out.emplace_back(std::string(LAYER_NAMES[l]) + " weight's gradient", grad_weight[l]);
    out.emplace_back(std::string(LAYER_NAMES[l]) + " bias's gradient", grad_bias[l]);
  }
  if (c.features) out.emplace_back("image's gradient", grad_image), out.emplace_back("text's gradient", grad_text);
  return out;
}

std::vector<std::pair<std::string, Doubles>> by_name(const Results& r) {
  std::vector<std::pair<std::string, Doubles>> out{{"sums", r.sums},
                                                   {"deviation", r.deviation},
                                                   {"image's gradient", r.grad_image},
                                                   {"text's gradient", r.grad_text}};
  for (int l = 0; l < rada::LAYERS; l++) {
    out.emplace_back(std::string(LAYER_NAMES[l]) + " weight's gradient", r.grad_weight[l]);
    out.emplace_back(std::string(LAYER_NAMES[l]) + " bias's gradient", r.grad_bias[l]);
  }
  return out;
}

double rms(const Doubles& values) {
  double total = 0;
  for (double x : values) total += x * x;
  return values.empty() ? 0 : std::sqrt(total / values.size());
}

// ---- the comparison

struct Judge {
  double worst = 0;
  int failures = 0;

  void compare(const std::string& where, const Outcome& outcome, const Results& results, double tolerance) {
    const auto truths = by_name(results);
    double largest = 0;  // of all gradients: one far below is what is left of terms that cancel
    for (const auto& [name, truth] : truths)
      if (name.find("gradient") != std::string::npos) largest = std::max(largest, rms(truth));
    for (const auto& [name, array] : outcome) {
      const auto& truth = std::find_if(truths.begin(), truths.end(), [&, &name = name](auto& named) {
                            return named.first == name;
                          })->second;
      Doubles difference = array.values();
      for (size_t i = 0; i < truth.size(); i++) difference[i] -= truth[i];
      const bool gradient = name.find("gradient") != std::string::npos;
      const double error = rms(difference) / std::max(rms(truth), gradient ? 1e-2 * largest : 0);
      worst = error > worst || error != error ? error : worst;
      if (!(error <= tolerance)) fail(where + ": " + name + ": relative error " + std::to_string(error));
    }
  }

  void expect_same(const std::string& where, const Outcome& a, const Outcome& b) {
    for (size_t i = 0; i < a.size(); i++)
      if (!(a[i].second == b[i].second)) fail(where + ": " + a[i].first + ": other bits");
  }

  void fail(const std::string& message) {
    std::printf("FAILED %s\n", message.c_str());
    failures++;
  }
};

std::string describe(const InstructionSet& set, const Case& c) {
  char text[200];
  std::snprintf(text, sizeof text, "%s %s B=%d K=%d D=%d H=%d queries=%d penalty=%d kept=%d streams=%d", set.name,
                c.bfloat16 ? "bfloat16" : "float32", (int)c.images, (int)c.classes, (int)c.width, (int)c.heads,
                c.queries, (int)c.penalty, c.kept, c.streams);
  return text;
}

std::vector<Case> cases(bool bfloat16) {
  struct {
    int64_t images, classes, width, heads;
  } const shapes[] = {
      {1, 1, 2, 1},     // single everything
      {3, 1, 16, 4},    // a softmax over one pair
      {5, 13, 36, 6},   // one vector and a part of one
      {2, 65, 48, 2},   // score blocks, the last one of one row; whole panels
      {70, 31, 12, 2},  // several waves
      {2, 70, 68, 2},   // width and head width past whole panels, weight gradients in several shares
      {3, 37, 35, 5},   // odd width and head width (float32 alone: dot products take pairs)
      {2, 19, 33, 3},
  };
  std::vector<Case> out;
  int n = 0;
  for (const auto& s : shapes) {
    if (bfloat16 && s.width / s.heads % 2) continue;
    for (bool kept : {false, true})
      for (bool streams : {false, true}) {
        // The rest takes turns: 7 subsets of queries, 3 penalties, whose gradients are wanted.
        Case c{s.images, s.classes, s.width,    s.heads,    7 - n % 7,  (Penalty)(n % 3),
               kept,     streams,   n % 5 != 1, n % 5 != 2, n % 4 != 3, bfloat16};
        if (bfloat16 && c.penalty == Penalty::LINF)
          c.penalty = Penalty::MSE;  // near ties decide where its gradient goes
        out.push_back(c);
        n++;
      }
  }
  return out;
}

// Subnormal products count as zero in every task of both passes, and in the caller's code all is as it was.
void test_subnormals(const std::string& where, const Loops& loops, bool bfloat16, Judge& judge) {
#if defined(__x86_64__) || defined(__aarch64__)
  const Case c{70, 31, 12, 2, IMAGE | TEXT | RATIONAL, Penalty::MSE, true, false, true, true, false, bfloat16};
  Inputs in = random_inputs(c);
  auto set = [](Doubles& values, double value) { std::fill(values.begin(), values.end(), value); };
  set(in.image, 1e-20), set(in.text, 1e-20);  // f h is subnormal, and so are the sums M f h
  set(in.grad_sums, 1e-20), set(in.grad_deviation, 0);
  for (const auto& [name, array] : compute(loops, c, in, 3))
    for (double x : array.values())
      if (x != 0 && (name == "sums" || name == "out bias's gradient"))
        return judge.fail(where + ": " + name + ": a subnormal number");
  if (mode_left_behind || subnormals_are_zero()) judge.fail(where + ": subnormal numbers are zero after a call");
#else
  (void)where, (void)loops, (void)bfloat16, (void)judge;
#endif
}

double from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                      : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                     : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -size : size;
}

template <class To, class From>
std::vector<To> converted(const Loops& loops, const std::vector<From>& from, Type to_type, Type from_type) {
  const int64_t count = from.size();
  std::vector<To> to(count);
  loops.convert({to.data(), to_type, 1, count, count, 1}, {(void*)from.data(), from_type, 1, count, count, 1});
  return to;
}

// Every 16-bit number becomes the same float; a float becomes the nearest 16-bit number, of two the even one.
void test_values(const std::string& where, const Loops& loops, Judge& judge) {
  std::vector<uint16_t> all(1 << 16);
  for (size_t i = 0; i < all.size(); i++) all[i] = i;
  for (Type type : {Type::HALF, Type::BFLOAT16}) {
    const char* name = type == Type::HALF ? "float16" : "bfloat16";
    auto decode = [&](uint16_t bits) { return type == Type::HALF ? from_half(bits) : (double)from_bfloat16(bits); };
    const std::vector<float> floats = converted<float>(loops, all, Type::FLOAT, type);
    std::vector<float> between;
    std::vector<uint16_t> nearest;
    for (uint16_t bits : all) {
      const double value = decode(bits), up = decode(bits + 1);
      if (floats[bits] != (float)value && !(std::isnan(floats[bits]) && std::isnan(value)))
        return judge.fail(where + ": from " + name + " " + std::to_string(bits));
      if (!std::isfinite(value)) continue;
      // What lies between the largest number and infinity rounds as if one more number followed.
      const double next = std::isinf(up) ? 2 * value - decode(bits - 1) : up;
      const float middle = (value + next) / 2;
      for (auto [x, to] : {std::pair<float, int>{value, bits},
                           {middle, bits + (bits & 1)},
                           {std::nextafter(middle, 0.0f), bits},
                           {std::nextafter(middle, (float)next), bits + 1}})
        between.push_back(x), nearest.push_back(to);
    }
    for (int sign : {0, 1}) {
      const uint16_t infinite = (type == Type::HALF ? 0x7c00 : 0x7f80) | sign << 15;
      between.push_back(sign ? -INFINITY : INFINITY), nearest.push_back(infinite);
      between.push_back(std::copysign(std::numeric_limits<float>::max(), sign ? -1.0f : 1.0f)),
          nearest.push_back(infinite);
    }
    const std::vector<uint16_t> rounded = converted<uint16_t>(loops, between, type, Type::FLOAT);
    for (size_t i = 0; i < rounded.size(); i++)
      if (rounded[i] != nearest[i])
        return judge.fail(where + ": to " + name + ": " + std::to_string(between[i]) + " becomes " +
                          std::to_string(rounded[i]) + ", not " + std::to_string(nearest[i]));
    // A NaN whose payload lies in the bits that are cut off.
    for (uint16_t bits : converted<uint16_t>(loops, std::vector<uint32_t>{0x7f800001, 0xffffffff}, type, Type::FLOAT))
      if (!std::isnan(decode(bits))) return judge.fail(where + ": to " + name + ": a NaN becomes a number");
  }
}

// Between all types, strides and addresses; what lies between the elements stays as it is.
void test_layouts(const std::string& where, const Loops& loops, Judge& judge) {
  constexpr int64_t ROWS = 5, COLUMNS = 37, STRIDES[][2] = {{COLUMNS, 1}, {COLUMNS + 3, 1}, {1, ROWS}, {80, 2}};
  constexpr Type TYPES[] = {Type::FLOAT, Type::BFLOAT16, Type::HALF};
  auto bytes_of = [](Type type) { return type == Type::FLOAT ? 4 : 2; };
  auto bits_of = [](Type type, int value) -> uint32_t {
    uint32_t bits;
    const float x = value;
    std::memcpy(&bits, &x, 4);
    if (type == Type::FLOAT) return bits;
    if (type == Type::BFLOAT16) return bits >> 16;
    for (uint32_t half = 0;; half++)
      if (from_half(half) == value) return half;
  };
  for (Type from_type : TYPES)
    for (Type to_type : TYPES)
      for (const auto& from_stride : STRIDES)
        for (const auto& to_stride : STRIDES)
          for (int offset : {0, 1, 2}) {
            std::vector<char> from(2000, 'x'), to(2000, 'y'), expected(2000, 'y');
            for (int64_t r = 0; r < ROWS; r++)
              for (int64_t c = 0; c < COLUMNS; c++) {
                auto put = [&](std::vector<char>& bytes, Type type, const int64_t* stride) {
                  const uint32_t bits = bits_of(type, r * COLUMNS + c);  // below 256: the same in every type
                  std::memcpy(&bytes[offset + (r * stride[0] + c * stride[1]) * bytes_of(type)], &bits, bytes_of(type));
                };
                put(from, from_type, from_stride), put(expected, to_type, to_stride);
              }
            loops.convert({&to[offset], to_type, ROWS, COLUMNS, to_stride[0], to_stride[1]},
                          {&from[offset], from_type, ROWS, COLUMNS, from_stride[0], from_stride[1]});
            if (to != expected)
              return judge.fail(where + ": from type " + std::to_string((int)from_type) + " to " +
                                std::to_string((int)to_type) + " at an offset of " + std::to_string(offset) + " bytes");
          }
}

bool test(const InstructionSet& set, bool bfloat16) {
  const Loops loops = bfloat16 ? set.bfloat16_loops() : set.float_loops();
  Judge judge;
  const std::string name = std::string(set.name) + (bfloat16 ? " bfloat16" : " float32");
  test_values(name, loops, judge);
  test_layouts(name, loops, judge);
  test_subnormals(name, loops, bfloat16, judge);
  const std::vector<Case> all = cases(bfloat16);
  for (const Case& c : all) {
    const std::string where = describe(set, c);
    const Inputs in = random_inputs(c);
    const Results truth = compute_truth(c, in);
    const Outcome once = compute(loops, c, in, 1);
    judge.compare(where, once, truth, bfloat16 ? BFLOAT16_TOLERANCE : FLOAT_TOLERANCE);
    for (int threads : {1, 2, 3}) {
      const std::string with = where + " threads=" + std::to_string(threads);
      Outcome others;
      std::thread other([&] { others = compute(loops, c, in, threads); });
      judge.expect_same(with, compute(loops, c, in, threads), once);
      other.join();
      judge.expect_same(with, others, once);
    }
  }
  std::printf("%-12s %-8s %d cases, %d failures, largest relative error %.1e\n", set.name,
              bfloat16 ? "bfloat16" : "float32", (int)all.size(), judge.failures, judge.worst);
  return judge.failures == 0;
}

// ---- tile registers

// What Intel's manual gives for TDPBF16PS, in steps of 32 along k: even and odd products are added up apart, each with one
// rounding; the two sums are added, and the result to what was there. Numbers below the normal ones are zero.
float tile_definition(const uint16_t* a, const uint16_t* b, int64_t n, int64_t k) {
  auto normal = [](float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; };
  float sum = 0;
  for (int64_t first = 0; first < k; first += 32) {
    float parts[2] = {};
    for (int64_t i = first; i < std::min(first + 32, k); i++)
      parts[i % 2] = normal(std::fma(normal(from_bfloat16(a[i])), normal(from_bfloat16(b[i * n])), parts[i % 2]));
    sum = normal(sum + normal(parts[0] + parts[1]));
  }
  return sum;
}

struct Tiles {
  const char* name;
  decltype(&amx_model::tile_product) product;
  bool (*releases)();
  bool (*in_use)();
};

// Products of every remainder of rows, columns and steps, bit for bit. Memory ends where the operands do.
bool test_tiles(const Tiles& tiles) {
  std::mt19937 generator(1);
  int products = 0, failures = 0;
  enum { USUAL, TINY, WILD };
  auto draw = [&](int64_t count, int kind) {
    std::vector<uint16_t> out(count);
    for (uint16_t& x : out) {
      const unsigned bits = generator();
      unsigned exponent = (kind == TINY ? 52 : 110) + bits / 128 % 24;  // tiny: products about the smallest normal one
      if (kind == WILD && bits % 64 == 0) exponent = bits / 128 % 2 * 255;  // zero, below the normal ones, inf, NaN
      x = (bits >> 16 & 0x807f) | exponent << 7;
    }
    return out;
  };
  for (int64_t m : {1, 15, 16, 17, 32, 33, 127, 129, 200})
    for (int64_t n : {1, 16, 17, 40, 64})
      for (int64_t k : {2, 30, 32, 34, 64, 100, 256}) {
        const int kind = products++ % 3;
        const std::vector<uint16_t> a = draw(m * k, kind), b = draw(k * n, kind);
        std::vector<uint16_t> columns(m * k);
        for (int64_t i = 0; i < m; i++)
          for (int64_t j = 0; j < k; j++) columns[j / 2 * 2 * m + i * 2 + j % 2] = a[i * k + j];
        for (bool row_major : {true, false}) {
          std::vector<float> c(m * n, std::numeric_limits<float>::quiet_NaN());
          tiles.product(row_major, m, n, k, row_major ? a.data() : columns.data(), b.data(), c.data());
          int wrong = 0;
          for (int64_t i = 0; i < m * n; i++) {
            const float truth = tile_definition(&a[i / n * k], &b[i % n], n, k);
            wrong += !(std::memcmp(&truth, &c[i], sizeof truth) == 0 || (truth != truth && c[i] != c[i]));
          }
          if (wrong) {
            std::printf("FAILED %s %s product m=%d n=%d k=%d: other bits in %d elements\n", tiles.name,
                        row_major ? "row-major" : "column-major", (int)m, (int)n, (int)k, wrong);
            failures++;
          }
        }
      }
  const bool released = tiles.releases() && !tiles.in_use();
  if (!released) std::printf("FAILED %s: a task leaves its tile registers in use\n", tiles.name);
  std::printf("%-12s %-8s %d products, %d failures\n", tiles.name, "tiles", products, failures);
  return !failures && released;
}

}  // namespace

int main(int count, char** arguments) {
  const std::vector<std::string> wanted(arguments + 1, arguments + count);
  bool good = true;
  size_t found = 0;
  std::vector<InstructionSet> sets = rada::instruction_sets();
#if defined(__x86_64__)
  sets.push_back({"amx_model", "", nullptr, amx_model::bfloat16_loops});
#endif
  for (const InstructionSet& set : sets) {
    const bool named = std::find(wanted.begin(), wanted.end(), set.name) != wanted.end();
    found += named && set.usable();
    if (!wanted.empty() && !named) continue;
    if (!set.usable()) {
      std::printf("%-12s not here: %s\n", set.name, set.refused.c_str());
      continue;
    }
    if (set.float_loops) good &= test(set, false);
    if (set.bfloat16_loops) good &= test(set, true);
#if defined(RADA_AMX)
    if (set.name == std::string("amx_bf16"))
      good &= test_tiles({set.name, amx_bf16::tile_product, amx_bf16::releases_tiles, amx_bf16::tiles_in_use});
#endif
#if defined(__x86_64__)
    if (set.name == std::string("amx_model"))
      good &= test_tiles({set.name, amx_model::tile_product, amx_model::releases_tiles, amx_model::tiles_in_use});
#endif
  }
  return good && found == wanted.size() ? 0 : 1;
}
