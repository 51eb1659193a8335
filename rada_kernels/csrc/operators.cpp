// torch.ops.rada_cpu: the loops for the machine at hand behind torch's stable ABI. What the arguments mean stands in
// call.h; rada_kernels/backends/cpu.py gives them. An empty tensor stands for an array that is not in use.
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

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "instruction_sets.h"

namespace {

using rada::Call;
using rada::InstructionSet;
using rada::Loops;
using rada::Matrix;
using rada::Pool;
using rada::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::vector<Tensor> Tensors;

// ---- threads

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

// A thread that runs what it is handed.
class Worker {
 public:
  explicit Worker(int threads) : threads(threads), thread([this] { serve(); }) {}
  ~Worker() {
    hand_over({});
    thread.join();
  }

  void run(std::packaged_task<void()> task) {
    std::future<void> done = task.get_future();
    hand_over(std::move(task));
    done.get();
  }

  const int threads;  // of a team: torch tells OpenMP when a thread opens its first one, and not again

 private:
  void hand_over(std::packaged_task<void()> task) {
    const std::lock_guard<std::mutex> lock(mutex);
    next = std::move(task);
    changed.notify_one();
  }
  void serve() {
    for (std::unique_lock<std::mutex> lock(mutex);;) {
      changed.wait(lock, [&] { return next.has_value(); });
      if (!next->valid()) return;
      (*next)();
      next.reset();
    }
  }

  std::mutex mutex;
  std::condition_variable changed;
  std::optional<std::packaged_task<void()>> next;  // one without a function: the end
  std::thread thread;
};

// OpenMP keeps a team for every thread that has opened a parallel region, one of these or of torch's own. In a forked
// child the team is missing, and the thread that forked would wait for it for ever; whether it had one cannot be asked.
// A thread that the child itself starts has none: it opens the regions there.
thread_local bool forked = false;
thread_local std::unique_ptr<Worker> worker;
#if !defined(_WIN32)
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] {
  forked = true;
  (void)worker.release();  // its thread is the parent's
});
#endif

// work(pool), on this thread or for it.
template <class Work>
void with_threads(Work&& work) {
  const Pool pool{(int)torch::stable::get_num_threads(), run_on_threads};
  if (!forked || pool.threads == 1) return work(pool);
  if (!worker || worker->threads < pool.threads) worker = std::make_unique<Worker>(pool.threads);
  worker->run(std::packaged_task<void()>([&] { work(pool); }));
}

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

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<void, Free> allocate(size_t bytes) {
  std::unique_ptr<void, Free> memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  STD_TORCH_CHECK(memory, "out of memory: the CPU operators need ", bytes >> 20, " MiB to work in");
  return memory;
}

std::unique_ptr<void, Free> workspace(size_t bytes) {
  auto memory = allocate(bytes);
  advise_huge_pages(memory.get(), bytes);
  return memory;
}

// ---- arguments

Type type_of(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  ": it takes float32, bfloat16 or float16");
  return dtype == ScalarType::Float ? Type::FLOAT : dtype == ScalarType::Half ? Type::HALF : Type::BFLOAT16;
}

// A tensor of two dimensions, or a contiguous one of as many numbers. An empty one has no address.
Matrix matrix(const char* name, const Tensor& tensor, int64_t rows, int64_t columns, Type type) {
  if (tensor.numel() == 0) return {nullptr, type, 0, 0, 0, 0};
  const bool two = tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
  const bool one = tensor.dim() == 1 && rows == 1 && tensor.size(0) == columns;
  const bool more = tensor.is_contiguous() && tensor.numel() == rows * columns;
  STD_TORCH_CHECK(tensor.is_cpu() && (two || one || more) && type_of(name, tensor) == type, name,
                  ": it takes a CPU tensor [", rows, ", ", columns, "] in the call's dtype");
  if (two) return {tensor.data_ptr(), type, rows, columns, tensor.stride(0), tensor.stride(1)};
  return {tensor.data_ptr(), type, rows, columns, columns, one ? tensor.stride(0) : 1};
}

// The arrays that stand for a call's tensors: the tensors' own memory, or else copies.
class Arrays {
 public:
  // What `from` holds, once copy_in has run. Null for an empty tensor.
  void* input(const Matrix& from, Type type) {
    if (fits(from, type)) return from.at;
    inputs.push_back({like(from, type), from});
    return inputs.back().to.at;
  }
  // Where to write what `to` holds once copy_out has run.
  void* output(const Matrix& to, Type type) {
    if (fits(to, type)) return to.at;
    outputs.push_back({to, like(to, type)});
    return outputs.back().from.at;
  }

  void copy_in(const Pool& pool, const Loops& loops) { copy(inputs, pool, loops); }
  void copy_out(const Pool& pool, const Loops& loops) { copy(outputs, pool, loops); }

 private:
  struct Copy {
    Matrix to, from;
  };

  static int64_t bytes_of(Type type) { return type == Type::FLOAT ? 4 : 2; }

  // The loops take rows without gaps and read them in words of 4 bytes.
  static bool fits(const Matrix& m, Type type) {
    const bool dense = (m.row_stride == m.columns || m.rows == 1) && (m.column_stride == 1 || m.columns == 1);
    return !m.at || (m.type == type && dense && (uintptr_t)m.at % 4 == 0);
  }

  Matrix like(const Matrix& m, Type type) {
    return {take(m.rows * m.columns * bytes_of(type)), type, m.rows, m.columns, m.columns, 1};
  }

  // From pieces that hold several arrays: the allocator keeps one piece for the next call, where it gives many back.
  void* take(size_t bytes) {
    constexpr size_t PIECE = size_t(8) << 20;
    bytes = (bytes + 63) / 64 * 64;
    if (bytes > left) {
      left = std::max(bytes, PIECE);
      memory.push_back(allocate(left));
      next = (char*)memory.back().get();
    }
    left -= bytes;
    return std::exchange(next, next + bytes);
  }

  // In blocks of rows, so that a single large matrix spreads over the threads.
  static void copy(const std::vector<Copy>& copies, const Pool& pool, const Loops& loops) {
    constexpr int64_t BLOCK = 32;
    struct Task {
      const Copy* copy;
      int64_t row;
    };
    std::vector<Task> tasks;
    for (const Copy& c : copies)
      for (int64_t row = 0; row < c.to.rows; row += BLOCK) tasks.push_back({&c, row});
    auto run = [&](int64_t i) {
      const auto [copy, row] = tasks[i];
      loops.convert(rows_from(copy->to, row, BLOCK), rows_from(copy->from, row, BLOCK));
    };
    typedef decltype(run) Run;
    pool.run(pool, tasks.size(), [](void* context, int64_t i, int) { (*(Run*)context)(i); }, &run);
  }
  static Matrix rows_from(const Matrix& m, int64_t row, int64_t count) {
    char* at = (char*)m.at + row * m.row_stride * bytes_of(m.type);
    return {at, m.type, std::min(count, m.rows - row), m.columns, m.row_stride, m.column_stride};
  }

  std::vector<std::unique_ptr<void, Free>> memory;
  char* next = nullptr;
  size_t left = 0;
  std::vector<Copy> inputs, outputs;
};

Type element_of(const Tensors& kept) {
  STD_TORCH_CHECK(kept.size() == 8, "kept: it takes 8 tensors");
  return type_of("kept", kept[3]);
}

Loops loops_for(const Tensor& image, Type element) {
  STD_TORCH_CHECK(
      element == Type::FLOAT || (element == Type::BFLOAT16 && type_of("image", image) == element && has_bfloat16()),
      "kept: it takes float32, or bfloat16 for bfloat16 features where the machine has its dot products");
  return element == Type::FLOAT ? instruction_set().float_loops() : instruction_set().bfloat16_loops();
}

// The fields that both passes share. The forward pass writes what is kept, the backward pass reads it.
Call make_call(Arrays& arrays, bool forward, const Tensor& image, const Tensor& text, const Tensors& layers,
               const Tensors& kept, int64_t heads, double scale, double score_factor, bool normalize, int64_t queries,
               int64_t penalty, int64_t score_bytes) {
  STD_TORCH_CHECK(image.dim() == 2 && text.dim() == 2, "image, text: they take [B, D] and [K, D]");
  STD_TORCH_CHECK(layers.size() == 12, "layers: they take 12 tensors");
  Call call{};
  const Type type = type_of("image", image), element = element_of(kept);
  const int64_t B = call.images = image.size(0), K = call.classes = text.size(0), D = call.width = image.size(1);
  call.heads = heads;
  STD_TORCH_CHECK(K > 0 && D > 0, "image, text: they take at least one class and column");
  STD_TORCH_CHECK(heads > 0 && D % heads == 0, "num_heads: it takes a divisor of ", D);
  STD_TORCH_CHECK(element == Type::FLOAT || D / heads % 2 == 0, "num_heads: bfloat16 takes an even D / H");
  STD_TORCH_CHECK(queries > 0 && queries < 8, "queries: it takes 1 to 7");
  STD_TORCH_CHECK(penalty >= 0 && penalty <= 2, "penalty: it takes 0, 1 or 2");
  call.scale = (float)scale;
  call.score_factor = score_factor;
  call.score_bytes = score_bytes;
  call.normalize = normalize;
  call.penalty = (rada::Penalty)penalty;
  auto features = [&](const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
    return arrays.input(matrix(name, tensor, rows, columns, type), element);
  };
  call.image = features("image", image, B, D);
  call.text = features("text", text, K, D);
  for (int l = 0; l < rada::LAYERS; l++) {
    const bool used = l > rada::QUERY_RATIONAL || queries >> l & 1;
    call.weight[l] = used ? features("layers", layers[2 * l], D, D) : nullptr;
    call.bias[l] = used ? features("layers", layers[2 * l + 1], 1, D) : nullptr;
    STD_TORCH_CHECK(!used || (call.weight[l] && call.bias[l]), "layers: a layer in use is empty");
  }
  auto rows_kept = [&](const char* name, int i, int64_t rows, int64_t columns, Type type) {
    const Matrix at = matrix(name, kept[i], rows, columns, type);
    return forward ? arrays.output(at, type) : arrays.input(at, type);
  };
  call.query_image = rows_kept("kept query_image", 0, B, D, element);
  call.query_text = rows_kept("kept query_text", 1, K, D, element);
  for (int l = 0; l < 3; l++) call.projection[l] = rows_kept("kept projection", 2 + l, B * K, D, element);
  call.attended = rows_kept("kept attended", 5, B * K, D, element);
  call.change = rows_kept("kept change", 6, B * K, D, element);
  call.references = (float*)rows_kept("kept references", 7, rada::KINDS, B * heads, Type::FLOAT);
  const bool attended_alone = forward && call.attended && !call.change;
  auto consistent = [&](const void* array, bool in_use) {
    const bool kept = call.attended && !attended_alone;
    return !B || (array != nullptr) == (kept && in_use);  // of no images only K rows are there
  };
  STD_TORCH_CHECK(consistent(call.query_image, queries & 1) && consistent(call.query_text, queries & 2) &&
                      consistent(call.projection[0], queries & 4) && consistent(call.projection[1], true) &&
                      consistent(call.projection[2], true) && consistent(call.change, true) &&
                      consistent(call.references, true),
                  "kept: it takes all of a call's tensors or none, forward also the attended rows alone");
  return call;
}

void set_to_zero(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(),
                  "gradients of no images: they take contiguous CPU tensors");
  if (tensor.numel()) std::memset(tensor.data_ptr(), 0, tensor.numel() * tensor.element_size());
}

// ---- operators

void forward(Tensor image, Tensor text, Tensors layers, Tensors kept, int64_t num_heads, double scale,
             double score_factor, bool normalize, int64_t queries, int64_t penalty, int64_t score_bytes, Tensor sums,
             Tensor deviation) {
  Arrays arrays;
  Call call = make_call(arrays, true, image, text, layers, kept, num_heads, scale, score_factor, normalize, queries,
                        penalty, score_bytes);
  if (!call.images) return;
  const Loops loops = loops_for(image, element_of(kept));
  call.sums = (float*)arrays.output(matrix("sums", sums, call.images, call.classes, Type::FLOAT), Type::FLOAT);
  call.deviation = (float*)arrays.output(matrix("deviation", deviation, 1, call.images, Type::FLOAT), Type::FLOAT);
  STD_TORCH_CHECK(call.sums ? call.deviation != nullptr : call.attended && !call.change,
                  "sums, deviation: they take [B, K] and [B], or nothing where kept takes the attended rows alone");
  for (const Tensor& tensor : kept)
    if (tensor.numel()) advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size());
  with_threads([&](const Pool& pool) {
    arrays.copy_in(pool, loops);
    loops.forward(call, pool, workspace(loops.forward_bytes(call, pool)).get());
    arrays.copy_out(pool, loops);
  });
}

void backward(Tensor image, Tensor text, Tensors layers, Tensors kept, int64_t num_heads, double scale,
              double score_factor, bool normalize, int64_t queries, int64_t penalty, int64_t score_bytes,
              Tensor grad_sums, Tensor grad_deviation, Tensors grad_layers, Tensor grad_image, Tensor grad_text) {
  Arrays arrays;
  Call call = make_call(arrays, false, image, text, layers, kept, num_heads, scale, score_factor, normalize, queries,
                        penalty, score_bytes);
  STD_TORCH_CHECK(grad_layers.size() == 12, "grad_layers: they take 12 tensors");
  const int64_t B = call.images, K = call.classes, D = call.width;
  auto upstream = [&](const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
    return (const float*)arrays.input(matrix(name, tensor, rows, columns, Type::FLOAT), Type::FLOAT);
  };
  const Type type = type_of("image", image);
  auto gradient = [&](const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
    return (float*)arrays.output(matrix(name, tensor, rows, columns, type), Type::FLOAT);
  };
  call.grad_sums = upstream("grad_sums", grad_sums, B, K);
  call.grad_deviation = upstream("grad_deviation", grad_deviation, 1, B);
  call.grad_image = gradient("grad_image", grad_image, B, D);
  call.grad_text = gradient("grad_text", grad_text, K, D);
  for (int l = 0; l < rada::LAYERS; l++) {
    call.grad_weight[l] = gradient("grad_layers", grad_layers[2 * l], D, D);
    call.grad_bias[l] = gradient("grad_layers", grad_layers[2 * l + 1], 1, D);
    STD_TORCH_CHECK((call.grad_weight[l] != nullptr) == (call.grad_weight[0] != nullptr) &&
                        (call.grad_bias[l] != nullptr) == (call.grad_weight[0] != nullptr),
                    "grad_layers: they take all or none");
  }
  if (!B) {
    set_to_zero(grad_text);
    for (const Tensor& tensor : grad_layers) set_to_zero(tensor);
    return;
  }
  STD_TORCH_CHECK(call.grad_sums && (call.grad_image != nullptr) == (call.grad_text != nullptr),
                  "grad_sums, grad_image, grad_text: one that is needed is empty");
  const Loops loops = loops_for(image, element_of(kept));
  std::vector<float> sums, deviation;  // computed again, and of no further use
  if (!call.attended) {
    sums.resize(B * K);
    deviation.resize(B);
    call.sums = sums.data();
    call.deviation = deviation.data();
  }
  with_threads([&](const Pool& pool) {
    arrays.copy_in(pool, loops);
    loops.backward(call, pool, workspace(loops.backward_bytes(call, pool)).get());
    arrays.copy_out(pool, loops);
  });
}

#define RADA_CALL(kept)                                                                               \
  "Tensor image, Tensor text, Tensor[] layers, " kept                                                 \
  " kept, int num_heads, float scale, float score_factor, bool normalize, int queries, int penalty, " \
  "int score_bytes, "

STABLE_TORCH_LIBRARY(rada_cpu, m) {
  m.def("instruction_set() -> str");
  m.def("refused_instruction_sets() -> str");
  m.def("has_bfloat16() -> bool");
  m.def("forward(" RADA_CALL("Tensor(a!)[]") "Tensor(b!) sums, Tensor(c!) deviation) -> ()");
  m.def("backward(" RADA_CALL("Tensor[]")
        "Tensor grad_sums, Tensor grad_deviation, Tensor(a!)[] grad_layers, Tensor(b!) grad_image, "
        "Tensor(c!) grad_text) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rada_cpu, CompositeExplicitAutograd, m) {  // no tensor tells these a device
  m.impl("instruction_set", TORCH_BOX(&describe));
  m.impl("refused_instruction_sets", TORCH_BOX(&describe_refused));
  m.impl("has_bfloat16", TORCH_BOX(&has_bfloat16));
}

STABLE_TORCH_LIBRARY_IMPL(rada_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
}

}  // namespace
