// The memory of a call: its workspace, and plain arrays in the place of tensors that the loops cannot read in place.
#pragma once

#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include "call.h"

namespace rada {

// Advice to the system about the huge pages wholly in [at, at + bytes).
inline void advise(void* at, size_t bytes, [[maybe_unused]] bool fresh) {
#if defined(__linux__)
  constexpr size_t page = size_t(2) << 20;
  const uintptr_t first = ((uintptr_t)at + page - 1) & ~(page - 1), end = ((uintptr_t)at + bytes) & ~(page - 1);
  if (at && end > first) madvise((void*)first, end - first, fresh ? MADV_HUGEPAGE : MADV_FREE);
#else
  (void)at, (void)bytes;
#endif
}
// Large arrays that are about to be written for the first time: in huge pages they fault and miss the TLB less.
inline void advise_huge_pages(void* at, size_t bytes) { advise(at, bytes, true); }
// Nobody needs what is there: where memory is short, the system takes the pages.
inline void advise_free(void* at, size_t bytes) { advise(at, bytes, false); }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

inline std::unique_ptr<void, Free> allocate(size_t bytes) {
  std::unique_ptr<void, Free> memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  STD_TORCH_CHECK(memory, "out of memory: the CPU operators need ", bytes >> 20, " MiB to work in");
  return memory;
}

// Malloc keeps as much of what is freed as twice the largest piece that it has unmapped. A kept workspace teaches it
// nothing, and would leave a step's gradients to be mapped anew each time. Once a process.
inline void teach_malloc() {
  static const bool taught = [] {
    *(volatile char*)allocate(size_t(8) << 20).get() = 0;
    return true;
  }();
  (void)taught;
}

// What a call works in, kept for the next call. Given back to malloc, a piece would leave holes in its heap that the
// caller's results fill, and the heap would grow by a piece with every call; a large one would be mapped and cleared page
// by page each time. Of a large one the system may take the pages meanwhile.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : piece(kept.exchange(nullptr)) {
    if (piece && piece->bytes >= bytes) return;
    teach_malloc();
    piece.reset();
    piece.reset(new Piece{allocate(bytes), bytes});
    advise_huge_pages(at(), bytes);
  }
  ~Workspace() {
    if (piece->bytes < LEAST_KEPT || piece->bytes > MOST_KEPT) return;
    if (piece->bytes > LARGE) advise_free(at(), piece->bytes);
    piece.reset(kept.exchange(piece.release()));
  }
  void* at() const { return piece->memory.get(); }

 private:
  static constexpr size_t LEAST_KEPT = size_t(64) << 10, LARGE = size_t(32) << 20, MOST_KEPT = size_t(512) << 20;
  struct Piece {
    std::unique_ptr<void, Free> memory;
    size_t bytes;
  };
  inline static std::atomic<Piece*> kept{nullptr};  // of all threads: two calls at once do not share it

  std::unique_ptr<Piece> piece;
};

// The arrays that stand for a call's tensors: the tensors' own memory, or else copies.
class Arrays {
 public:
  // What `from` holds, once copy_in has run. Null for an empty tensor.
  void* input(const Matrix& from, Type type) {
    if (!from.at || from.plain(type)) return from.at;
    inputs.push_back({like(from, type), from});
    return inputs.back().to.at;
  }
  // Where to write what `to` holds once copy_out has run.
  void* output(const Matrix& to, Type type) {
    if (!to.at || to.plain(type)) return to.at;
    outputs.push_back({to, like(to, type)});
    return outputs.back().from.at;
  }

  void copy_in(const Pool& pool, const Loops& loops) { copy(inputs, pool, loops); }
  void copy_out(const Pool& pool, const Loops& loops) { copy(outputs, pool, loops); }

 private:
  struct Copy {
    Matrix to, from;
  };

  Matrix like(const Matrix& m, Type type) {
    memory.push_back(allocate(m.rows * m.columns * bytes_of(type)));
    return {memory.back().get(), type, m.rows, m.columns, m.columns, 1};
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
      const int64_t count = std::min(BLOCK, copy->to.rows - row), columns = copy->to.columns;
      loops.convert(copy->to.block(row, count, 0, columns), copy->from.block(row, count, 0, columns));
    };
    typedef decltype(run) Run;
    pool.run(pool, tasks.size(), [](void* context, int64_t i, int) { (*(Run*)context)(i); }, &run);
  }

  std::vector<std::unique_ptr<void, Free>> memory;
  std::vector<Copy> inputs, outputs;
};

}  // namespace rada
