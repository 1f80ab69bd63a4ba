// Runs kernel tasks on XLA's intra-op thread pool.
#ifndef JAX_DWSCONV_CPU_THREAD_POOL_H_
#define JAX_DWSCONV_CPU_THREAD_POOL_H_

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "cpu/parallel.h"
#include "cpu/standby.h"

namespace dwsconv::cpu {

// The calling thread works too and waits only for tasks that other threads have begun. It never waits for a thread that
// has yet to come, so handlers that fill the whole pool cannot block one another.
template <class Pool>  // xla::ffi::ThreadPool, or what has its functions
class PoolParallel final : public Parallel {
 public:
  explicit PoolParallel(Pool& pool) : pool_(pool) {}

  void Run(int64_t count, void (*task)(void*, int64_t), void* context) override {
    const int64_t helpers = count < pool_.num_threads() ? count - 1 : pool_.num_threads() - 1;
    if (helpers < 1) {
      for (int64_t i = 0; i < count; ++i) task(context, i);
      return;
    }
    auto work = std::make_shared<Work>(count, helpers + 1, task, context);
    Standby& standby = Standby::Get();
    standby.Begin();
    for (int64_t i = 1; i <= helpers; ++i) {
      const Standby::Job help = [work, i] { work->Help(i); };
      if (!standby.TryGive(help)) pool_.Schedule([&standby, help] { standby.Run(help); });
    }
    work->Help(0);
    work->Wait();
    standby.End();
  }

 private:
  // Every thread has a range of consecutive tasks, which share data in its cache and new pages of memory with nobody;
  // who has finished takes from the others' ranges.
  class Work {
   public:
    Work(int64_t count, int64_t threads, void (*task)(void*, int64_t), void* context)
        : count_(count), threads_(threads), task_(task), context_(context), ranges_(new Range[threads]) {
      for (int64_t t = 0; t < threads; ++t) {
        ranges_[t].next = count * t / threads;
        ranges_[t].end = count * (t + 1) / threads;
      }
    }

    // A helper that comes after the last task was taken touches neither task nor context, which may be gone by then.
    void Help(int64_t thread) {
      int64_t done = 0;
      for (int64_t t = 0; t < threads_; ++t) {
        Range& range = ranges_[(thread + t) % threads_];
        for (int64_t i = range.next++; i < range.end; i = range.next++, ++done) task_(context_, i);
      }
      if (done == 0) return;
      std::lock_guard<std::mutex> lock(mutex_);
      finished_ += done;
      if (finished_ == count_) all_finished_.notify_one();
    }

    void Wait() {
      if (SpinUntil([this] { return finished_ == count_; })) return;
      std::unique_lock<std::mutex> lock(mutex_);
      all_finished_.wait(lock, [this] { return finished_ == count_; });
    }

   private:
    struct alignas(64) Range {
      std::atomic<int64_t> next;
      int64_t end;
    };

    const int64_t count_, threads_;
    void (*const task_)(void*, int64_t);
    void* const context_;
    const std::unique_ptr<Range[]> ranges_;
    std::mutex mutex_;
    std::condition_variable all_finished_;
    std::atomic<int64_t> finished_{0};
  };

  Pool& pool_;
};

}  // namespace dwsconv::cpu

#endif  // JAX_DWSCONV_CPU_THREAD_POOL_H_
