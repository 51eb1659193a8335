// Memory and tasks: where a call's arrays are, and which thread computes what.
#pragma once

#include "call.h"
#include "gemm.h"

namespace RADA_ISA {

using rada::Pool;

// Most rows of a task of layer products. Tile registers finish 64 rows before the weight is read; more rows share it.
#if defined(RADA_TILES)
constexpr int64_t BLOCK_ROWS = 256;
#else
constexpr int64_t BLOCK_ROWS = 64;
#endif

// Hands out 64-byte aligned pieces. Without a base it only measures.
struct Arena {
  char* base = nullptr;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* at = (T*)((uintptr_t)base + used);
    used += (count * sizeof(T) + 63) / 64 * 64;
    return at;
  }
};

// Equal slots of a workspace, one a thread, or one a unit in work. Each may hold one Scratch after the other, built
// by Scratch(Arena&, arguments...).
struct Slots {
  char* base = nullptr;
  size_t bytes = 0;

  template <class Scratch, class... Arguments>
  void fit(const Arguments&... arguments) {
    Arena arena;
    Scratch(arena, arguments...);
    bytes = arena.used > bytes ? arena.used : bytes;
  }
  void place(Arena& arena, int64_t count) { base = arena.take<char>(count * bytes); }
  template <class Scratch, class... Arguments>
  Scratch at(int64_t i, const Arguments&... arguments) const {
    Arena arena{base + i * bytes};
    return Scratch(arena, arguments...);
  }
};

template <class Task>
void run_tasks(const Pool& pool, int64_t tasks, Task&& task) {
  pool.run(
      pool, tasks,
      [](void* context, int64_t i, int thread) {
        const TaskScope scope;
        const SubnormalsAreZero mode;  // in the task: threads that the pool starts keep the mode of their creator
        (*(Task*)context)(i, thread);
      },
      (void*)&task);
}

// task(first, count, thread) over `rows` rows in blocks.
template <class Task>
void run_rows(const Pool& pool, int64_t rows, int64_t block, Task&& task) {
  run_tasks(pool, ceil_div(rows, block),
            [&](int64_t i, int thread) { task(i * block, smaller_of(block, rows - i * block), thread); });
}

// How a product of `rows` rows with a layer falls into tasks: blocks of rows, and of columns where there are few rows.
// The shares of columns do not depend on the number of threads: sums over them are put together in one order.
struct Split {
  int64_t rows, width, block = BLOCK_ROWS, share, shares;

  Split(int64_t rows, int64_t width, bool whole_width, int threads)
      : rows(rows), width(width), share(whole_width ? round_up(width, W) : IN_PLACE_COLUMNS),
        shares(ceil_div(width, share)) {
    if (whole_width) block = smaller_of(round_up(ceil_div(rows, 4 * threads), MR), BLOCK_ROWS);
  }
  int64_t tasks() const { return ceil_div(rows, block) * shares; }

  // f(first row, rows, first column, end column, share)
  template <class F>
  void with(int64_t task, F&& f) const {
    const int64_t row = task / shares * block, column = task % shares * share;
    f(row, smaller_of(block, rows - row), column, smaller_of(column + share, width), task % shares);
  }
};

}  // namespace RADA_ISA
