// Threads that look out for more work for a moment.
#ifndef JAX_DWSCONV_CPU_STANDBY_H_
#define JAX_DWSCONV_CPU_STANDBY_H_

#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

namespace dwsconv::cpu {

// Waits for `done`, but no longer than it takes to put a thread to sleep and to wake it up.
template <class Done>
bool SpinUntil(const Done& done) {
  constexpr std::chrono::microseconds kLongest{50};
  const auto end = std::chrono::steady_clock::now() + kLongest;
  while (!done()) {
    if (std::chrono::steady_clock::now() > end) return false;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  return true;
}

// To wake up a thread takes tens of microseconds, as long as a small convolution. So while one call follows another
// closely, the threads that helped stay awake. Otherwise they do not: they would be in the way of other operators.
class Standby {
 public:
  using Job = std::function<void()>;

  static Standby& Get() {
    static Standby& standby = *new Standby;  // threads may use it until the process ends
    return standby;
  }

  // At the beginning and at the end of a call.
  void Begin() { calls_are_close_ = Clock::now().time_since_epoch() - Clock::duration(last_end_) < kClose; }
  void End() { last_end_ = Clock::now().time_since_epoch().count(); }

  // Gives a job to a waiting thread. Returns false where there is none.
  bool TryGive(const Job& job) {
    if (waiting_ == 0) return false;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (waiting_ == static_cast<int>(jobs_.size())) return false;
    jobs_.push_back(job);
    given_ = true;
    return true;
  }

  // Runs a job, and then others that are given to this thread.
  void Run(const Job& first) {
    first();
    std::unique_lock<std::mutex> lock(mutex_);
    while (calls_are_close_) {
      ++waiting_;
      lock.unlock();
      SpinUntil([this] { return given_.load(); });
      lock.lock();
      --waiting_;
      if (jobs_.empty()) return;
      const Job job = std::move(jobs_.back());
      jobs_.pop_back();
      given_ = !jobs_.empty();
      lock.unlock();
      job();
      lock.lock();
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::microseconds kClose{50};

  std::atomic<Clock::rep> last_end_{0};
  std::atomic<bool> calls_are_close_{false}, given_{false};
  std::atomic<int> waiting_{0};
  std::mutex mutex_;
  std::vector<Job> jobs_;
};

}  // namespace dwsconv::cpu

#endif  // JAX_DWSCONV_CPU_STANDBY_H_
