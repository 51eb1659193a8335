// torch.ops.rada_cpu: the loops for the machine at hand behind torch's stable ABI. What the arguments mean stands in
// call.h; rada_kernels/backends/cpu.py gives them. An empty tensor stands for an array that is not in use.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "arrays.h"
#include "instruction_sets.h"
#include "threads.h"

namespace {

using rada::Arrays;
using rada::Call;
using rada::InstructionSet;
using rada::Loops;
using rada::Matrix;
using rada::Pool;
using rada::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::vector<Tensor> Tensors;

// The best usable instruction set, or the one that RADA_CPU_ISA names.
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
    throw std::runtime_error(std::string("RADA_CPU_ISA: got ") + wanted + refused + "; this machine takes one of " +
                             usable);
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

// ---- arguments

// What both operators take first, in the order of RADA_CALL.
struct Arguments {
  const Tensor &image, &text;
  const Tensors &layers, &saved;  // weight and bias of each layer; each layer's output, attended, shifts
  int64_t num_heads;
  double scale, score_factor;
  bool normalize;
  int64_t queries, penalty, score_bytes;
};

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

Type element_of(const Tensors& saved) {
  STD_TORCH_CHECK(saved.size() == rada::LAYERS + 2, "saved: it takes ", rada::LAYERS + 2, " tensors");
  return type_of("saved", saved[rada::KEY]);
}

Loops loops_for(const Arguments& given) {
  const Type element = element_of(given.saved);
  STD_TORCH_CHECK(element == Type::FLOAT ||
                      (element == Type::BFLOAT16 && type_of("image", given.image) == element && has_bfloat16()),
                  "saved: it takes float32, or bfloat16 for bfloat16 features where the machine has its dot products");
  return element == Type::FLOAT ? instruction_set().float_loops() : instruction_set().bfloat16_loops();
}

// The fields that both passes share. The forward pass writes what is saved, the backward pass reads it.
Call make_call(Arrays& arrays, bool backward, const Arguments& given) {
  STD_TORCH_CHECK(given.image.dim() == 2 && given.text.dim() == 2, "image, text: they take [B, D] and [K, D]");
  STD_TORCH_CHECK(given.layers.size() == 2 * rada::LAYERS, "layers: they take ", 2 * rada::LAYERS, " tensors");
  Call call{};
  const Type type = type_of("image", given.image), element = element_of(given.saved);
  const int64_t B = call.images = given.image.size(0), K = call.classes = given.text.size(0);
  const int64_t D = call.width = given.image.size(1), heads = call.heads = given.num_heads;
  STD_TORCH_CHECK(K > 0 && D > 0, "image, text: they take at least one class and column");
  STD_TORCH_CHECK(heads > 0 && D % heads == 0, "num_heads: it takes a divisor of ", D);
  STD_TORCH_CHECK(element == Type::FLOAT || D / heads % 2 == 0, "num_heads: bfloat16 takes an even D / H");
  STD_TORCH_CHECK(given.queries > 0 && given.queries < 8, "queries: it takes 1 to 7");
  STD_TORCH_CHECK(given.penalty >= 0 && given.penalty <= 2, "penalty: it takes 0, 1 or 2");
  call.backward = backward;
  call.scale = (float)given.scale;
  call.score_factor = given.score_factor;
  call.score_bytes = given.score_bytes;
  call.normalize = given.normalize;
  call.penalty = (rada::Penalty)given.penalty;
  auto input = [&](const char* name, const Tensor& tensor, int64_t rows) {
    return arrays.input(matrix(name, tensor, rows, D, type), element);
  };
  auto saved = [&](int i, int64_t rows, int64_t columns, Type type) {
    const Matrix at = matrix("saved", given.saved[i], rows, columns, type);
    return backward ? arrays.input(at, type) : arrays.output(at, type);
  };
  call.image = input("image", given.image, B);
  call.text = input("text", given.text, K);
  call.attended = saved(rada::LAYERS, B * K, D, element);
  call.shifts = (float*)saved(rada::LAYERS + 1, rada::KINDS, B * heads, Type::FLOAT);
  // All or nothing; a forward pass may be asked for the attended rows alone.
  bool consistent = backward ? !call.shifts == !call.attended : !call.shifts || call.attended;
  for (int l = 0; l < rada::LAYERS; l++) {
    rada::Layer& layer = call.layers[l];
    const bool used = l > rada::QUERY_RATIONAL || given.queries >> l & 1;
    layer.output = saved(l, l == rada::QUERY_IMAGE ? B : l == rada::QUERY_TEXT ? K : B * K, D, element);
    consistent = consistent && !layer.output == !(used && call.shifts);
    if (!used) continue;
    layer.weight = matrix("layers", given.layers[2 * l], D, D, type);
    layer.bias = input("layers", given.layers[2 * l + 1], 1);
    STD_TORCH_CHECK(layer.weight.at && layer.bias, "layers: a layer in use is empty");
  }
  // Of no images, the text query's K rows are there.
  STD_TORCH_CHECK(consistent || !B, "saved: it takes all of a call's tensors or none");
  return call;
}

void set_to_zero(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(),
                  "gradients of no images: they take contiguous CPU tensors");
  if (tensor.numel()) std::memset(tensor.data_ptr(), 0, tensor.numel() * tensor.element_size());
}

void compute(const Call& call, const Loops& loops, Arrays& arrays) {
  rada::with_threads([&](const Pool& pool) {
    arrays.copy_in(pool, loops);
    loops.run(call, pool, rada::Workspace(loops.bytes(call, pool)).at());
    arrays.copy_out(pool, loops);
  });
}

// From here on this thread's calls are recorded, cut as for `threads`; see recorded_tasks.
void record_tasks(int64_t threads) {
  STD_TORCH_CHECK(threads > 0, "threads: got ", threads, "; it takes 1 or more");
  rada::recorder = std::make_unique<rada::Recorder>((int)threads);
}

// Ends it: a row (call, phase, start, end) for each task, in seconds, of which `tasks` receives as many as it has room
// for. Returns how many there were.
int64_t recorded_tasks(Tensor tasks) {
  STD_TORCH_CHECK(rada::recorder, "recorded_tasks: nothing is recorded; record_tasks begins it");
  const std::vector<double> all = std::move(rada::recorder->tasks);
  STD_TORCH_CHECK(tasks.is_cpu() && tasks.is_contiguous() && tasks.scalar_type() == ScalarType::Double,
                  "tasks: it takes a contiguous float64 tensor");
  std::memcpy(tasks.data_ptr(), all.data(), std::min<size_t>(tasks.numel(), all.size()) * sizeof(double));
  rada::recorder.reset();
  return all.size() / 4;
}

// ---- operators

void forward(Tensor image, Tensor text, Tensors layers, Tensors saved, int64_t num_heads, double scale,
             double score_factor, bool normalize, int64_t queries, int64_t penalty, int64_t score_bytes, Tensor sums,
             Tensor deviation) {
  const Arguments given{image,        text,      layers,  saved,   num_heads,  scale,
                        score_factor, normalize, queries, penalty, score_bytes};
  Arrays arrays;
  Call call = make_call(arrays, false, given);
  if (!call.images) return;
  const Loops loops = loops_for(given);
  call.sums = (float*)arrays.output(matrix("sums", sums, call.images, call.classes, Type::FLOAT), Type::FLOAT);
  call.deviation = (float*)arrays.output(matrix("deviation", deviation, 1, call.images, Type::FLOAT), Type::FLOAT);
  const bool attended_alone = call.attended && !call.shifts;
  STD_TORCH_CHECK(!call.sums == attended_alone && !call.deviation == attended_alone,
                  "sums, deviation: they take [B, K] and [B], nothing where saved takes the attended rows alone");
  for (const Tensor& tensor : saved)
    if (tensor.numel()) rada::advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size());
  compute(call, loops, arrays);
}

void backward(Tensor image, Tensor text, Tensors layers, Tensors saved, int64_t num_heads, double scale,
              double score_factor, bool normalize, int64_t queries, int64_t penalty, int64_t score_bytes,
              Tensor grad_sums, Tensor grad_deviation, Tensors grad_layers, Tensor grad_image, Tensor grad_text) {
  const Arguments given{image,        text,      layers,  saved,   num_heads,  scale,
                        score_factor, normalize, queries, penalty, score_bytes};
  Arrays arrays;
  Call call = make_call(arrays, true, given);
  STD_TORCH_CHECK(grad_layers.size() == layers.size(), "grad_layers: they take ", layers.size(), " tensors");
  const int64_t B = call.images, K = call.classes, D = call.width;
  const Type type = type_of("image", image);
  auto upstream = [&](const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
    return (const float*)arrays.input(matrix(name, tensor, rows, columns, Type::FLOAT), Type::FLOAT);
  };
  auto gradient = [&](const char* name, const Tensor& tensor, int64_t rows) {
    return (float*)arrays.output(matrix(name, tensor, rows, D, type), Type::FLOAT);
  };
  call.grad_sums = upstream("grad_sums", grad_sums, B, K);
  call.grad_deviation = upstream("grad_deviation", grad_deviation, 1, B);
  call.grad_image = gradient("grad_image", grad_image, B);
  call.grad_text = gradient("grad_text", grad_text, K);
  for (int l = 0; l < rada::LAYERS; l++) {
    rada::Layer& layer = call.layers[l];
    layer.grad_weight = matrix("grad_layers", grad_layers[2 * l], D, D, type);
    layer.grad_bias = gradient("grad_layers", grad_layers[2 * l + 1], 1);
    const bool wanted = call.layers[0].grad_weight.at;
    STD_TORCH_CHECK(!layer.grad_weight.at == !wanted && !layer.grad_bias == !wanted,
                    "grad_layers: they take all or none");
  }
  if (!B) {
    set_to_zero(grad_text);
    for (const Tensor& tensor : grad_layers) set_to_zero(tensor);
    return;
  }
  STD_TORCH_CHECK(call.grad_sums && !call.grad_image == !call.grad_text,
                  "grad_sums, grad_image, grad_text: one that is needed is empty");
  std::vector<float> sums(call.attended ? 0 : B * K), deviation(call.attended ? 0 : B);  // computed, of no further use
  call.sums = sums.data();
  call.deviation = deviation.data();
  compute(call, loops_for(given), arrays);
}

#define RADA_CALL(saved)                                                                               \
  "Tensor image, Tensor text, Tensor[] layers, " saved                                                 \
  " saved, int num_heads, float scale, float score_factor, bool normalize, int queries, int penalty, " \
  "int score_bytes, "

STABLE_TORCH_LIBRARY(rada_cpu, m) {
  m.def("instruction_set() -> str");
  m.def("refused_instruction_sets() -> str");
  m.def("has_bfloat16() -> bool");
  m.def("record_tasks(int threads) -> ()");
  m.def("recorded_tasks(Tensor(a!) tasks) -> int");
  m.def("forward(" RADA_CALL("Tensor(a!)[]") "Tensor(b!) sums, Tensor(c!) deviation) -> ()");
  m.def("backward(" RADA_CALL("Tensor[]")
        "Tensor grad_sums, Tensor grad_deviation, Tensor(a!)[] grad_layers, Tensor(b!) grad_image, "
        "Tensor(c!) grad_text) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rada_cpu, CompositeExplicitAutograd, m) {  // no tensor tells these a device
  m.impl("instruction_set", TORCH_BOX(&describe));
  m.impl("refused_instruction_sets", TORCH_BOX(&describe_refused));
  m.impl("has_bfloat16", TORCH_BOX(&has_bfloat16));
  m.impl("record_tasks", TORCH_BOX(&record_tasks));
}

STABLE_TORCH_LIBRARY_IMPL(rada_cpu, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("recorded_tasks", TORCH_BOX(&recorded_tasks));
}

}  // namespace
