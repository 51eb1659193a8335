// Torch's threads as a pool for the loops, in forked children, too.
#pragma once

#include <torch/csrc/stable/ops.h>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include <atomic>
#include <condition_variable>
#include <ctime>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "call.h"

namespace rada {

// A thread's calls, cut for `threads` threads but run on this one, task by task: what bench/thread_model.py deals out
// to threads that the machine lacks.
struct Recorder {
  const int threads;
  int64_t calls = 0, phases = 0;
  std::vector<double> tasks;  // [n, 4] call, phase, start and end in seconds

  explicit Recorder(int threads) : threads(threads) {}

  // This thread's own time: what else runs on the machine does not count.
  static double now() {
    timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
  }
  void run(int64_t count, void (*task)(void*, int64_t, int), void* context) {
    for (int64_t i = 0; i < count; i++) {
      const double start = now();
      task(context, i, 0);
      tasks.insert(tasks.end(), {(double)calls, (double)phases, start, now()});
    }
    phases++;
  }
};
inline thread_local std::unique_ptr<Recorder> recorder;

inline void run_on_threads(const Pool& pool, int64_t tasks, void (*task)(void*, int64_t, int), void* context) {
  if (recorder) return recorder->run(tasks, task, context);
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
inline thread_local bool forked = false;
inline thread_local std::unique_ptr<Worker> worker;
#if !defined(_WIN32)
[[maybe_unused]] inline const int watches_forks = pthread_atfork(nullptr, nullptr, [] {
  forked = true;
  (void)worker.release();  // its thread is the parent's
});
#endif

// work(pool), on this thread or for it.
template <class Work>
void with_threads(Work&& work) {
  const Pool pool{(int)torch::stable::get_num_threads(), run_on_threads};
  if (recorder) {
    recorder->calls++;
    return work(Pool{recorder->threads, run_on_threads});
  }
  if (!forked || pool.threads == 1) return work(pool);
  if (!worker || worker->threads < pool.threads) worker = std::make_unique<Worker>(pool.threads);
  worker->run(std::packaged_task<void()>([&] { work(pool); }));
}

}  // namespace rada
