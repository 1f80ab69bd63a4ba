#include <limits>

#include "cuda/gather.cuh"
#include "cuda/gather.h"

namespace dwsconv::cuda {
namespace {

template <bool kForward, class S, class F, class R>
void Launch(const PassCall& call) {
  constexpr int64_t kThreads = 256, kMostBlocks = std::numeric_limits<int32_t>::max();
  const Problem& p = call.problem;
  const int64_t count = kForward ? p.y_elements() : p.x_elements();
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  const auto kernel = count <= std::numeric_limits<uint32_t>::max() ? GatherKernel<kForward, uint32_t, S, F, R>
                                                                    : GatherKernel<kForward, uint64_t, S, F, R>;
  kernel<<<static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), kThreads, 0, call.stream>>>(
      p, DescribeEpilogue(call.epilogue), static_cast<const S*>(call.source), static_cast<const F*>(call.filter),
      static_cast<R*>(call.result));
}

}  // namespace

bool LaunchGather(const PassCall& call) {
  return WithDtypes(call.problem, [&](auto x, auto f, auto y) {
    using X = typename decltype(x)::type;
    using F = typename decltype(f)::type;
    using Y = typename decltype(y)::type;
    if (call.forward) {
      Launch<true, X, F, Y>(call);
    } else {
      Launch<false, Y, F, X>(call);
    }
  });
}

}  // namespace dwsconv::cuda
