// The loops without torch: every instruction set that runs here, forward and backward, against plain double precision.
//
//   loops_test [instruction set ...]
//
// Memory is of the exact size that is asked for and holds NaN before a call, so that AddressSanitizer sees a step over
// an end and the comparison sees what was read before it was written. Every call is made with 1, 2 and 3 threads, each
// time by two callers at once, and always for the same bits: ThreadSanitizer sees what they share.
#include <atomic>
#include <cstdlib>
#include <functional>
#include <memory>
#include <thread>

#include "../../../rada_kernels/csrc/instruction_sets.h"
#include "conversions.h"
#include "tiles.h"

RADA_DECLARE_LOOPS(amx_model)

namespace {

using rada::Call;
using rada::InstructionSet;
using rada::Pool;

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
  rada::Type type() const { return bfloat16 ? rada::Type::BFLOAT16 : rada::Type::FLOAT; }

 private:
  int64_t count;
  bool bfloat16;
  std::vector<char> bytes;
};

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

rada::Matrix matrix(Array& square, int64_t width) {
  return {square.data<void>(), square.type(), width, width, width, 1};
}

// All that comes out of a forward and a backward pass, by name.
typedef std::vector<std::pair<std::string, Array>> Outcome;

const char* const LAYER_NAMES[] = {"image query", "text query", "rational query", "key", "value", "out"};

Outcome compute(const Loops& loops, const Case& c, const Inputs& in, int threads) {
  const int64_t B = c.images, K = c.classes, D = c.width;
  Array image(in.image, c.bfloat16), text(in.text, c.bfloat16);
  Array grad_sums(in.grad_sums), grad_deviation(in.grad_deviation);
  Array attended(c.saved ? B * K * D : 0, c.bfloat16), shifts(c.saved ? rada::KINDS * B * c.heads : 0);
  Array sums(B * K), deviation(B), grad_image(c.features ? B * D : 0), grad_text(c.features ? K * D : 0);
  std::vector<Array> weight, bias, output, grad_weight, grad_bias;
  auto in_use = [&](int l) { return l > rada::QUERY_RATIONAL || c.queries >> l & 1; };
  for (int l = 0; l < rada::LAYERS; l++) {
    const int64_t rows = l == rada::QUERY_IMAGE ? B : l == rada::QUERY_TEXT ? K : B * K;
    weight.emplace_back(in.weight[l], c.bfloat16);
    bias.emplace_back(in.bias[l], c.bfloat16);
    output.emplace_back(c.saved && in_use(l) ? rows * D : 0, c.bfloat16);
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
    call.layers[l].output = output[l].data<void>();
    if (in_use(l)) call.layers[l].weight = matrix(weight[l], D), call.layers[l].bias = bias[l].data<void>();
  }
  call.attended = attended.data<void>(), call.shifts = shifts.data();
  call.sums = sums.data(), call.deviation = deviation.data();
  const Pool pool{threads, run_on_threads};
  loops.run(call, pool, workspace(loops.bytes(call, pool)).get());

  call.backward = true;
  for (int l = 0; l < rada::LAYERS; l++)
    call.layers[l].grad_weight = matrix(grad_weight[l], D), call.layers[l].grad_bias = grad_bias[l].data();
  call.grad_sums = grad_sums.data(), call.grad_deviation = grad_deviation.data();
  call.grad_image = grad_image.data(), call.grad_text = grad_text.data();
  Array recomputed_sums(c.saved ? 0 : B * K), recomputed_deviation(c.saved ? 0 : B);
  call.sums = recomputed_sums.data(), call.deviation = recomputed_deviation.data();
  loops.run(call, pool, workspace(loops.bytes(call, pool)).get());

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

void compare(Judge& judge, const std::string& where, const Outcome& outcome, const Results& results, double tolerance) {
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
    judge.worst = error > judge.worst || error != error ? error : judge.worst;
    if (!(error <= tolerance)) judge.fail(where + ": " + name + ": relative error " + std::to_string(error));
  }
}

void expect_same(Judge& judge, const std::string& where, const Outcome& a, const Outcome& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (!(a[i].second == b[i].second)) judge.fail(where + ": " + a[i].first + ": other bits");
}

std::string describe(const InstructionSet& set, const Case& c) {
  char text[200];
  std::snprintf(text, sizeof text, "%s %s B=%d K=%d D=%d H=%d queries=%d penalty=%d saved=%d streams=%d", set.name,
                c.bfloat16 ? "bfloat16" : "float32", (int)c.images, (int)c.classes, (int)c.width, (int)c.heads,
                c.queries, (int)c.penalty, c.saved, c.streams);
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
      {70, 31, 12, 2},  // several slices
      {1, 515, 8, 2},   // several chunks of score rows, the last block of three
      {2, 70, 68, 2},   // width and head width past whole panels, weight gradients in several shares
      {3, 37, 35, 5},   // odd width and head width (float32 alone: dot products take pairs)
      {2, 19, 33, 3},
  };
  std::vector<Case> out;
  int n = 0;
  for (const auto& s : shapes) {
    if (bfloat16 && s.width / s.heads % 2) continue;
    for (bool saved : {false, true})
      for (bool streams : {false, true}) {
        // The rest takes turns: 7 subsets of queries, 3 penalties, whose gradients are wanted.
        Case c{s.images, s.classes, s.width,    s.heads,    7 - n % 7,  (Penalty)(n % 3),
               saved,    streams,   n % 5 != 1, n % 5 != 2, n % 4 != 3, bfloat16};
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
    compare(judge, where, once, truth, bfloat16 ? BFLOAT16_TOLERANCE : FLOAT_TOLERANCE);
    for (int threads : {1, 2, 3}) {
      const std::string with = where + " threads=" + std::to_string(threads);
      Outcome others;
      std::thread other([&] { others = compute(loops, c, in, threads); });
      expect_same(judge, with, compute(loops, c, in, threads), once);
      other.join();
      expect_same(judge, with, others, once);
    }
  }
  std::printf("%-12s %-8s %d cases, %d failures, largest relative error %.1e\n", set.name,
              bfloat16 ? "bfloat16" : "float32", (int)all.size(), judge.failures, judge.worst);
  return judge.failures == 0;
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
