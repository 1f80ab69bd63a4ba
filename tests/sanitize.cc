// Runs the CPU kernels of every instruction set on random problems with 1, 2 and 4 threads. Exact results are compared
// with plain loops, rounded ones between the numbers of threads, bit by bit. `make sanitize` builds it with the
// sanitizers.
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "cuda/problem.h"

namespace dwsconv::cpu {
namespace {

class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Work(); });
  }
  ~Pool() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      done_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  int64_t num_threads() const { return static_cast<int64_t>(threads_.size()); }
  void Schedule(std::function<void()> job) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(std::move(job));
    }
    changed_.notify_one();
  }

 private:
  void Work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return done_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      const std::function<void()> job = std::move(jobs_.front());
      jobs_.pop_front();
      lock.unlock();
      job();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> jobs_;
  bool done_ = false;
  std::vector<std::thread> threads_;
};

std::mt19937 random_bits(0);

int64_t Random(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random_bits); }

Strides Packed(bool channels_last, int64_t h, int64_t w, int64_t c) {
  return channels_last ? Strides{h * w * c, w * c, c, 1} : Strides{h * w * c, w, 1, h * w};
}

enum class Kind {
  kSmall,
  kLarge,
  kOverlapping,  // the last vector of channels, alone in its task of grad_filter, reaches into another task's channels
};

Problem RandomProblem(Kind kind) {
  const bool large = kind == Kind::kLarge;
  Problem p{};
  p.groups = Random(1, 2);
  p.batch = p.groups * (large ? 4 : Random(1, 2));
  p.in_h = large ? 64 : Random(1, 17);
  p.in_w = large ? 65 : Random(1, 40);
  p.channels = large ? 96 : Random(1, 3) * Random(1, 24);
  p.multiplier = !large && Random(0, 4) == 0 ? 2 : 1;
  p.kernel_h = Random(1, 8);
  p.kernel_w = Random(0, 2) ? p.kernel_h : Random(1, 9);
  p.stride_h = Random(1, 3);
  p.stride_w = Random(0, 3) ? p.stride_h : Random(1, 3);
  p.dilation_h = Random(0, 3) ? 1 : Random(1, 3);
  p.dilation_w = Random(0, 3) ? 1 : Random(1, 3);
  p.pad_top = Random(-1, p.kernel_h);
  p.pad_left = Random(-1, p.kernel_w);
  p.out_h = Random(1, p.in_h / p.stride_h + 2);
  p.out_w = Random(1, p.in_w / p.stride_w + 2);
  p.channels_last = Random(0, 3) != 0;
  if (kind == Kind::kOverlapping) {
    p.groups = p.batch = p.multiplier = 1;
    p.in_h = p.in_w = p.out_h = p.out_w = 28;
    p.channels = 64 + Random(1, 3);  // an odd number of vectors for every instruction set, the last one nearly empty
    p.kernel_h = p.kernel_w = 2 * Random(2, 3) + 1;
    p.stride_h = p.stride_w = p.dilation_h = p.dilation_w = 1;
    p.pad_top = p.pad_left = p.kernel_h / 2;
    p.channels_last = true;
  }
  p.x = Packed(p.channels_last, p.in_h, p.in_w, p.channels);
  p.y = Packed(p.channels_last, p.out_h, p.out_w, p.out_channels());
  const int64_t taps = p.kernel_h * p.kernel_w, c = p.out_channels();
  p.filter = Random(0, 1) ? Strides{taps * c, p.kernel_w * c, c, 1} : Strides{taps * c, p.kernel_w, 1, taps};
  return p;
}

// Multiples of 1/8, whose sums of products are exact, or any values. Of 16-bit floats the bits: numbers from 0.5 to 2.
template <class T>
std::vector<T> RandomValues(int64_t count, bool exact) {
  std::vector<T> values(count);
  for (T& value : values) {
    if constexpr (sizeof(T) == 2) {
      value = static_cast<T>(Random(0x3f00, 0x3fff));
    } else {
      value = exact ? static_cast<T>(Random(-8, 8)) / 8 : std::normal_distribution<T>()(random_bits);
    }
  }
  return values;
}

template <class Visit>
void ForEachProduct(const Problem& p, const Visit& visit) {
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      for (int64_t j = 0; j < p.kernel_w; ++j) {
        for (int64_t oh = 0; oh < p.out_h; ++oh) {
          const int64_t h = oh * p.stride_h + i * p.dilation_h - p.pad_top;
          if (h < 0 || h >= p.in_h) continue;
          for (int64_t ow = 0; ow < p.out_w; ++ow) {
            const int64_t w = ow * p.stride_w + j * p.dilation_w - p.pad_left;
            if (w < 0 || w >= p.in_w) continue;
            for (int64_t c = 0; c < p.out_channels(); ++c) {
              visit(n * p.x.n + h * p.x.h + w * p.x.w + c / p.multiplier * p.x.c,
                    p.group_of(n) * p.filter.n + i * p.filter.h + j * p.filter.w + c * p.filter.c,
                    n * p.y.n + oh * p.y.h + ow * p.y.w + c * p.y.c);
            }
          }
        }
      }
    }
  }
}

void Check(bool ok, const char* what, const Kernels& kernels, const Problem& p) {
  if (ok) return;
  std::printf("%s, %s: batch %d of %d, %dx%dx%d m%d, kernel %dx%d, strides %d %d, dilations %d %d, %s\n", what,
              kernels.isa, int(p.batch), int(p.groups), int(p.in_h), int(p.in_w), int(p.channels), int(p.multiplier),
              int(p.kernel_h), int(p.kernel_w), int(p.stride_h), int(p.stride_w), int(p.dilation_h), int(p.dilation_w),
              p.channels_last ? "NHWC" : "NCHW");
  std::exit(1);
}

template <class T>
void Test(Problem p, Dtype dtype, bool exact, const std::vector<Pool*>& pools) {
  p.x_dtype = p.filter_dtype = p.y_dtype = dtype;
  using A = std::conditional_t<sizeof(T) == 2, float, T>;
  const auto x = RandomValues<T>(p.x_elements(), exact), y = RandomValues<T>(p.y_elements(), exact);
  const auto filter = RandomValues<T>(p.filter_elements(), exact);
  const auto scale = RandomValues<A>(p.out_channels(), exact), bias = RandomValues<A>(p.out_channels(), exact);
  Epilogue epilogue;
  epilogue.scale = scale.data();
  epilogue.bias = bias.data();
  epilogue.activation = Activation::kRelu;

  std::vector<T> expected[4] = {std::vector<T>(y.size()), std::vector<T>(y.size()), std::vector<T>(x.size()),
                                std::vector<T>(filter.size())};
  if (exact) {
    ForEachProduct(p, [&](int64_t in, int64_t tap, int64_t out) {
      expected[0][out] += x[in] * filter[tap];
      expected[2][in] += y[out] * filter[tap];
      expected[3][tap] += x[in] * y[out];
    });
    for (int64_t i = 0; i < p.y_elements(); ++i) {
      const int64_t c = i / p.y.c % p.out_channels();
      expected[1][i] = std::fmax(expected[0][i] * scale[c] + bias[c], T(0));
    }
  }

  for (const Kernels* const* kernels = UsableKernels(); *kernels; ++kernels) {
    const Kernels& k = **kernels;
    for (Pool* pool : pools) {
      PoolParallel<Pool> parallel(*pool);
      std::vector<T> found[4] = {std::vector<T>(y.size()), std::vector<T>(y.size()), std::vector<T>(x.size()),
                                 std::vector<T>(filter.size())};
      Check(k.forward(p, x.data(), filter.data(), found[0].data(), parallel) &&
                k.fused_forward(p, epilogue, x.data(), filter.data(), found[1].data(), parallel) &&
                k.grad_input(p, y.data(), filter.data(), found[2].data(), parallel) &&
                k.grad_filter(p, x.data(), y.data(), found[3].data(), parallel),
            "no instance", k, p);
      if (!exact && pool == pools[0]) {
        for (int i = 0; i < 4; ++i) expected[i] = found[i];
      }
      for (int i = 0; i < 4; ++i) {
        static const char* const kNames[] = {"forward", "fused_forward", "grad_input", "grad_filter"};
        Check(found[i] == expected[i], kNames[i], k, p);
      }
    }
  }
}

}  // namespace
}  // namespace dwsconv::cpu

int main(int argc, char** argv) {
  using namespace dwsconv::cpu;
  const int problems = argc > 1 ? std::atoi(argv[1]) : 300;
  Pool one(1), two(2), four(4);
  for (int i = 0; i < problems; ++i) {
    const Kind kind = i % 100 == 99 ? Kind::kLarge : i % 20 == 10 ? Kind::kOverlapping : Kind::kSmall;
    const dwsconv::Problem problem = RandomProblem(kind);
    Test<float>(problem, dwsconv::Dtype::kF32, /*exact=*/true, {&one, &two, &four});
    Test<float>(problem, dwsconv::Dtype::kF32, /*exact=*/false, {&one, &two, &four});
    if (i % 4 == 0) Test<double>(problem, dwsconv::Dtype::kF64, /*exact=*/true, {&one, &four});
    if (i % 4 == 1) Test<uint16_t>(problem, dwsconv::Dtype::kBF16, /*exact=*/false, {&one, &four});
    if (i % 4 == 2) Test<uint16_t>(problem, dwsconv::Dtype::kF16, /*exact=*/false, {&one, &four});
  }
  std::printf("%d problems: no error\n", problems);
}
