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
    std::string usable, refused;
    for (const InstructionSet& set : rada::instruction_sets()) {
      const bool named = !wanted || !*wanted || std::string(wanted) == set.name;
      if (named && set.usable()) return set;
      if (named) refused = " (" + set.refused + ")";
      if (set.usable()) usable += std::string(usable.empty() ? "" : ", ") + set.name;
    }
    STD_TORCH_CHECK(false, "RADA_CPU_ISA: got ", wanted, refused, "; this machine takes one of ", usable);
  }();
  return chosen;
}

std::string describe() { return instruction_set().name; }
bool has_bfloat16() { return instruction_set().bfloat16_loops; }

// Each instruction set that this machine does not run, with the reason.
std::string describe_refused() {
  std::string all;
  for (const InstructionSet& set : rada::instruction_sets())
    if (!set.usable()) all += std::string(all.empty() ? "" : "; ") + "not " + set.name + ": " + set.refused;
  return all;
}

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
Call make_call(const Tensor& image, const Tensor& text, const Tensors& layers, const Tensors& kept, int64_t heads,
               double scale, double score_factor, bool normalize, int64_t queries, int64_t penalty,
               int64_t score_bytes) {
  STD_TORCH_CHECK(image.dim() == 2 && text.dim() == 2, "image, text: they take [B, D] and [K, D]");
  STD_TORCH_CHECK(layers.size() == 12 && kept.size() == 8, "layers, kept: they take 12 and 8 tensors");
  Call call{};
  const ScalarType dtype = image.scalar_type();
  call.images = image.size(0);
  call.classes = text.size(0);
  call.width = image.size(1);
  call.heads = heads;
  STD_TORCH_CHECK(call.images > 0 && call.classes > 0 && call.width > 0,
                  "image, text: they take at least one row and column");
  STD_TORCH_CHECK(heads > 0 && call.width % heads == 0, "num_heads: it takes a divisor of ", call.width);
  STD_TORCH_CHECK(dtype == ScalarType::Float || call.width / heads % 2 == 0, "num_heads: bfloat16 takes an even D / H");
  STD_TORCH_CHECK(queries > 0 && queries < 8, "queries: it takes 1 to 7");
  STD_TORCH_CHECK(penalty >= 0 && penalty <= 2, "penalty: it takes 0, 1 or 2");
  call.scale = (float)scale;
  call.score_factor = score_factor;
  call.score_bytes = score_bytes;
  call.normalize = normalize;
  call.penalty = (rada::Penalty)penalty;
  const int64_t rows = call.images * call.classes * call.width, pairs = call.images * heads;
  call.image = pointer<void>("image", image, call.images * call.width, dtype);
  call.text = pointer<void>("text", text, call.classes * call.width, dtype);
  for (int l = 0; l < rada::LAYERS; l++) {
    const bool used = l > rada::QUERY_RATIONAL || queries >> l & 1;
    call.weight[l] = used ? pointer<void>("layers", layers[2 * l], call.width * call.width, dtype) : nullptr;
    call.bias[l] = used ? pointer<void>("layers", layers[2 * l + 1], call.width, dtype) : nullptr;
    STD_TORCH_CHECK(!used || (call.weight[l] && call.bias[l]), "layers: a layer in use is empty");
  }
  call.query_image = pointer<void>("kept query_image", kept[0], call.images * call.width, dtype);
  call.query_text = pointer<void>("kept query_text", kept[1], call.classes * call.width, dtype);
  for (int l = 0; l < 3; l++) call.projection[l] = pointer<void>("kept projection", kept[2 + l], rows, dtype);
  call.attended = pointer<void>("kept attended", kept[5], rows, dtype);
  call.change = pointer<void>("kept change", kept[6], rows, dtype);
  call.references = pointer<float>("kept references", kept[7], rada::KINDS * pairs, ScalarType::Float);
  const bool rows_kept = call.attended != nullptr;
  auto consistent = [&](const void* pointer, bool in_use) { return (pointer != nullptr) == (rows_kept && in_use); };
  STD_TORCH_CHECK(consistent(call.query_image, queries & 1) && consistent(call.query_text, queries & 2) &&
                      consistent(call.projection[0], queries & 4) && consistent(call.projection[1], true) &&
                      consistent(call.projection[2], true) && consistent(call.change, true) &&
                      consistent(call.references, true),
                  "kept: it takes all of a call's tensors or none");
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

Loops loops_for(ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || (dtype == ScalarType::BFloat16 && has_bfloat16()),
                  "image: it takes float32, or bfloat16 where the machine has its dot products");
  return dtype == ScalarType::Float ? instruction_set().float_loops() : instruction_set().bfloat16_loops();
}

// ---- operators

void forward(Tensor image, Tensor text, Tensors layers, Tensors kept, int64_t num_heads, double scale,
             double score_factor, bool normalize, int64_t queries, int64_t penalty, int64_t score_bytes, Tensor sums,
             Tensor deviation) {
  const Loops loops = loops_for(image.scalar_type());
  Call call =
      make_call(image, text, layers, kept, num_heads, scale, score_factor, normalize, queries, penalty, score_bytes);
  call.sums = pointer<float>("sums", sums, call.images * call.classes, ScalarType::Float);
  call.deviation = pointer<float>("deviation", deviation, call.images, ScalarType::Float);
  STD_TORCH_CHECK(call.sums && call.deviation, "sums, deviation: they take [B, K] and [B]");
  for (const Tensor& tensor : kept)
    if (tensor.numel()) advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size());
  const Pool pool = threads();
  loops.forward(call, pool, workspace(loops.forward_bytes(call, pool)).get());
}

void backward(Tensor image, Tensor text, Tensors layers, Tensors kept, int64_t num_heads, double scale,
              double score_factor, bool normalize, int64_t queries, int64_t penalty, int64_t score_bytes,
              Tensor grad_sums, Tensor grad_deviation, Tensors grad_layers, Tensor grad_image, Tensor grad_text) {
  const Loops loops = loops_for(image.scalar_type());
  Call call =
      make_call(image, text, layers, kept, num_heads, scale, score_factor, normalize, queries, penalty, score_bytes);
  STD_TORCH_CHECK(grad_layers.size() == 12, "grad_layers: they take 12 tensors");
  call.grad_sums = pointer<float>("grad_sums", grad_sums, call.images * call.classes, ScalarType::Float);
  call.grad_deviation = pointer<float>("grad_deviation", grad_deviation, call.images, ScalarType::Float);
  call.grad_image = pointer<float>("grad_image", grad_image, call.images * call.width, ScalarType::Float);
  call.grad_text = pointer<float>("grad_text", grad_text, call.classes * call.width, ScalarType::Float);
  for (int l = 0; l < rada::LAYERS; l++) {
    call.grad_weight[l] = pointer<float>("grad_layers", grad_layers[2 * l], call.width * call.width, ScalarType::Float);
    call.grad_bias[l] = pointer<float>("grad_layers", grad_layers[2 * l + 1], call.width, ScalarType::Float);
    STD_TORCH_CHECK((call.grad_weight[l] != nullptr) == (call.grad_weight[0] != nullptr) &&
                        (call.grad_bias[l] != nullptr) == (call.grad_weight[0] != nullptr),
                    "grad_layers: they take all or none");
  }
  STD_TORCH_CHECK(call.grad_sums && (call.grad_image != nullptr) == (call.grad_text != nullptr),
                  "grad_sums, grad_image, grad_text: one that is needed is empty");
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

#define RADA_CALL                                                                                               \
  "Tensor image, Tensor text, Tensor[] layers, Tensor[] kept, int num_heads, float scale, float score_factor, " \
  "bool normalize, int queries, int penalty, int score_bytes, "

STABLE_TORCH_LIBRARY(rada_cpu, m) {
  m.def("instruction_set() -> str");
  m.def("refused_instruction_sets() -> str");
  m.def("has_bfloat16() -> bool");
  m.def("forward(" RADA_CALL "Tensor sums, Tensor deviation) -> ()");
  m.def("backward(" RADA_CALL
        "Tensor grad_sums, Tensor grad_deviation, Tensor[] grad_layers, Tensor grad_image, "
        "Tensor grad_text) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rada_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&describe));
  m.impl("refused_instruction_sets", TORCH_BOX(&describe_refused));
  m.impl("has_bfloat16", TORCH_BOX(&has_bfloat16));
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

}  // namespace
