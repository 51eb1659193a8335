// torch.ops.rada_cpu: the loops for the machine at hand behind torch's stable ABI. What the arguments mean stands in
// call.h; rada_kernels/backends/cpu.py prepares them. An empty tensor stands for an array that is not in use.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "instruction_sets.h"

namespace {

using rada::Call;
using rada::InstructionSet;
using rada::Loops;
using rada::Pool;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::vector<Tensor> Tensors;

// ---- threads

// libgomp's threads do not survive a fork, and a parallel region in the child would wait for them forever.
std::atomic<bool> forked{false};
#if !defined(_WIN32)
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

void run_on_threads(const Pool& pool, int64_t tasks, void (*task)(void*, int64_t, int), void* context) {
  if (pool.threads == 1 || tasks <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(context, i, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, pool.threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++)
      for (int64_t i; (i = next.fetch_add(1)) < tasks;) task(context, i, (int)thread);
  });
}

Pool threads() { return {forked ? 1 : (int)torch::stable::get_num_threads(), run_on_threads}; }

// ---- instruction sets

// The best usable one, or the one that RADA_CPU_ISA names.
const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = []() -> const InstructionSet& {
    const char* wanted = std::getenv("RADA_CPU_ISA");
    std::string usable;
    for (const InstructionSet& set : rada::instruction_sets()) {
      if (!set.usable) continue;
      if (!wanted || !*wanted || std::string(wanted) == set.name) return set;
      usable += std::string(usable.empty() ? "" : ", ") + set.name;
    }
    STD_TORCH_CHECK(false, "RADA_CPU_ISA: got ", wanted, "; this machine takes one of ", usable);
  }();
  return chosen;
}

std::string describe() { return instruction_set().name; }
bool has_bfloat16() { return instruction_set().bfloat16_loops; }

// ---- memory

// Large arrays that are about to be written for the first time: in huge pages they fault and miss the TLB less.
void advise_huge_pages(void* at, size_t bytes) {
#if defined(__linux__)
  constexpr size_t page = size_t(2) << 20;
  const uintptr_t first = ((uintptr_t)at + page - 1) & ~(page - 1), end = ((uintptr_t)at + bytes) & ~(page - 1);
  if (at && end > first) madvise((void*)first, end - first, MADV_HUGEPAGE);
#else
  (void)at, (void)bytes;
#endif
}

// ---- arguments

template <class T>
T* pointer(const char* name, const Tensor& tensor, int64_t numel, ScalarType dtype) {
  if (tensor.numel() == 0) return nullptr;
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == dtype && tensor.numel() == numel,
                  name, ": it takes a contiguous CPU tensor of ", numel, " numbers in the call's dtype");
  return static_cast<T*>(tensor.data_ptr());
}

// The fields that both passes share.
struct Arguments {
  const Tensor &f, &h, &image_query, &text_query;
  const Tensors &layers, &kept;
  int64_t heads;
  double scale, score_factor;
  bool rational;
  int64_t penalty, score_bytes;
};

Call make_call(const Arguments& a, ScalarType dtype) {
  STD_TORCH_CHECK(a.f.dim() == 2 && a.h.dim() == 2, "f, h: they take [B, D] and [K, D]");
  Call call{};
  call.images = a.f.size(0);
  call.classes = a.h.size(0);
  call.width = a.f.size(1);
  call.heads = a.heads;
  STD_TORCH_CHECK(call.images > 0 && call.classes > 0 && call.width > 0, "f, h: they take at least one row and column");
  STD_TORCH_CHECK(a.heads > 0 && call.width % a.heads == 0, "num_heads: it takes a divisor of ", call.width);
  STD_TORCH_CHECK(dtype == ScalarType::Float || call.width / a.heads % 2 == 0, "num_heads: bfloat16 takes an even D / H");
  STD_TORCH_CHECK(a.layers.size() == 8 && a.kept.size() == 8, "layers, kept: they take 8 tensors each");
  STD_TORCH_CHECK(a.penalty >= 0 && a.penalty <= 2, "penalty: it takes 0, 1 or 2");
  call.scale = (float)a.scale;
  call.score_factor = a.score_factor;
  call.score_bytes = a.score_bytes;
  call.rational = a.rational;
  call.penalty = (rada::Penalty)a.penalty;
  const int64_t image_numbers = call.images * call.width, text_numbers = call.classes * call.width;
  const int64_t rows = call.images * text_numbers, pairs = call.images * call.heads;
  call.f = pointer<float>("f", a.f, image_numbers, ScalarType::Float);
  call.h = pointer<float>("h", a.h, text_numbers, ScalarType::Float);
  call.image_query = pointer<float>("image_query", a.image_query, image_numbers, ScalarType::Float);
  call.text_query = pointer<void>("text_query", a.text_query, text_numbers, dtype);
  for (int l = 0; l < rada::LAYERS; l++) {
    call.weight[l] = pointer<void>("layers", a.layers[2 * l], call.width * call.width, dtype);
    call.bias[l] = pointer<float>("layers", a.layers[2 * l + 1], call.width, ScalarType::Float);
    const bool used = l != rada::RATIONAL || a.rational;
    STD_TORCH_CHECK(!used || (call.weight[l] && call.bias[l]), "layers: a layer in use is empty");
  }
  for (int l = 0; l < 3; l++) call.projection[l] = pointer<void>("kept projection", a.kept[l], rows, dtype);
  call.attended = pointer<void>("kept attended", a.kept[3], rows, dtype);
  call.change = pointer<float>("kept change", a.kept[4], rows, ScalarType::Float);
  call.statistics = pointer<float>("kept statistics", a.kept[5], 2 * rada::KINDS * pairs, ScalarType::Float);
  const int64_t ld = a.kept[6].numel() / (rada::KINDS * pairs * call.classes);
  STD_TORCH_CHECK(ld == 0 || ld == (call.classes + 15) / 16 * 16, "kept weights: they take [2, B·H, K, K rounded up to 16]");
  call.weights = pointer<float>("kept weights", a.kept[6], rada::KINDS * pairs * call.classes * ld, ScalarType::Float);
  const int64_t blocks = (call.classes + rada::SCORE_ROWS - 1) / rada::SCORE_ROWS;
  call.weight_scale = pointer<float>("kept weight_scale", a.kept[7], rada::KINDS * pairs * blocks, ScalarType::Float);
  const bool rows_kept = call.attended != nullptr;
  STD_TORCH_CHECK(rows_kept == (call.change != nullptr) && rows_kept == (call.statistics != nullptr) &&
                      rows_kept == (call.projection[rada::KEY] != nullptr) &&
                      rows_kept == (call.projection[rada::VALUE] != nullptr) &&
                      (rows_kept && a.rational) == (call.projection[rada::RATIONAL] != nullptr) &&
                      (call.weights != nullptr) == (call.weight_scale != nullptr) && (rows_kept || !call.weights),
                  "kept: it takes all of the rows or none, and the weights only with them");
  return call;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<void, Free> workspace(size_t bytes) {
  std::unique_ptr<void, Free> memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  advise_huge_pages(memory.get(), bytes);
  STD_TORCH_CHECK(memory, "out of memory: the CPU operators need ", bytes >> 20, " MiB to work in");
  return memory;
}

Loops loops_for(const Tensor& weight, ScalarType* dtype) {
  *dtype = weight.scalar_type();
  STD_TORCH_CHECK(*dtype == ScalarType::Float || (*dtype == ScalarType::BFloat16 && has_bfloat16()),
                  "layers: they take float32, or bfloat16 where the machine has its dot products");
  return *dtype == ScalarType::Float ? instruction_set().float_loops() : instruction_set().bfloat16_loops();
}

// ---- operators

void forward(Tensor f, Tensor h, Tensor image_query, Tensor text_query, Tensors layers, Tensors kept, int64_t num_heads,
             double scale, double score_factor, bool rational, int64_t penalty, int64_t score_bytes, Tensor sums, Tensor deviation) {
  STD_TORCH_CHECK(layers.size() == 8, "layers: they take 8 tensors");
  ScalarType dtype;
  const Loops loops = loops_for(layers[rada::KEY * 2], &dtype);
  Call call = make_call({f, h, image_query, text_query, layers, kept, num_heads, scale, score_factor, rational, penalty, score_bytes},
                        dtype);
  call.sums = pointer<float>("sums", sums, call.images * call.classes, ScalarType::Float);
  call.deviation = pointer<float>("deviation", deviation, call.images, ScalarType::Float);
  STD_TORCH_CHECK(call.sums && call.deviation, "sums, deviation: they take [B, K] and [B]");
  for (const Tensor& tensor : kept)
    if (tensor.numel()) advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size());
  const Pool pool = threads();
  loops.forward(call, pool, workspace(loops.forward_bytes(call, pool)).get());
}

void backward(Tensor f, Tensor h, Tensor image_query, Tensor text_query, Tensors layers, Tensors kept, int64_t num_heads,
              double scale, double score_factor, bool rational, int64_t penalty, int64_t score_bytes, Tensor grad_sums,
              Tensor grad_deviation, Tensors grad_layers, Tensor grad_image_query, Tensor grad_text_query,
              Tensor grad_f, Tensor grad_h) {
  STD_TORCH_CHECK(layers.size() == 8 && grad_layers.size() == 8, "layers, grad_layers: they take 8 tensors each");
  ScalarType dtype;
  const Loops loops = loops_for(layers[rada::KEY * 2], &dtype);
  Call call = make_call({f, h, image_query, text_query, layers, kept, num_heads, scale, score_factor, rational, penalty, score_bytes},
                        dtype);
  const int64_t image_numbers = call.images * call.width, text_numbers = call.classes * call.width;
  call.grad_sums = pointer<float>("grad_sums", grad_sums, call.images * call.classes, ScalarType::Float);
  call.grad_deviation = pointer<float>("grad_deviation", grad_deviation, call.images, ScalarType::Float);
  call.grad_image_query = pointer<float>("grad_image_query", grad_image_query, image_numbers, ScalarType::Float);
  call.grad_text_query = pointer<float>("grad_text_query", grad_text_query, text_numbers, ScalarType::Float);
  call.grad_f = pointer<float>("grad_f", grad_f, image_numbers, ScalarType::Float);
  call.grad_h = pointer<float>("grad_h", grad_h, text_numbers, ScalarType::Float);
  for (int l = 0; l < rada::LAYERS; l++) {
    call.grad_weight[l] = pointer<float>("grad_layers", grad_layers[2 * l], call.width * call.width, ScalarType::Float);
    call.grad_bias[l] = pointer<float>("grad_layers", grad_layers[2 * l + 1], call.width, ScalarType::Float);
    STD_TORCH_CHECK((call.grad_weight[l] != nullptr) == (call.grad_weight[0] != nullptr) &&
                        (call.grad_bias[l] != nullptr) == (call.grad_weight[0] != nullptr),
                    "grad_layers: they take all or none");
  }
  STD_TORCH_CHECK(call.grad_sums && (!call.image_query || call.grad_image_query) &&
                      (!call.text_query || call.grad_text_query) && (call.grad_f != nullptr) == (call.grad_h != nullptr),
                  "gradients: one that is needed is empty");
  std::vector<float> sums, deviation;  // computed again, and of no further use
  if (!call.attended) {
    sums.resize(call.images * call.classes);
    deviation.resize(call.images);
    call.sums = sums.data();
    call.deviation = deviation.data();
  }
  const Pool pool = threads();
  loops.backward(call, pool, workspace(loops.backward_bytes(call, pool)).get());
}

STABLE_TORCH_LIBRARY(rada_cpu, m) {
  m.def("instruction_set() -> str");
  m.def("has_bfloat16() -> bool");
  m.def("forward(Tensor f, Tensor h, Tensor image_query, Tensor text_query, Tensor[] layers, Tensor[] kept, "
        "int num_heads, float scale, float score_factor, bool rational, int penalty, int score_bytes, Tensor sums, "
        "Tensor deviation) -> ()");
  m.def("backward(Tensor f, Tensor h, Tensor image_query, Tensor text_query, Tensor[] layers, Tensor[] kept, "
        "int num_heads, float scale, float score_factor, bool rational, int penalty, int score_bytes, Tensor grad_sums, "
        "Tensor grad_deviation, Tensor[] grad_layers, Tensor grad_image_query, Tensor grad_text_query, "
        "Tensor grad_f, Tensor grad_h) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rada_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&describe));
  m.impl("has_bfloat16", TORCH_BOX(&has_bfloat16));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

}  // namespace
