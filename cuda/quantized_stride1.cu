#include <limits>

#include "cuda/quantized_launch.cuh"

namespace dwsconv::cuda {
namespace {

template <class Y>
void LaunchGather(const QuantizedCall& call) {
  constexpr int64_t kThreads = 256, kMostBlocks = std::numeric_limits<int32_t>::max();
  const int64_t count = call.problem.y_elements();
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  const auto kernel = count <= std::numeric_limits<uint32_t>::max() ? QuantizedGatherKernel<uint32_t, Y>
                                                                    : QuantizedGatherKernel<uint64_t, Y>;
  kernel<<<static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks), kThreads, 0, call.stream>>>(
      call.problem, call.requantization, Rounding(call.requantization), static_cast<const int8_t*>(call.x),
      static_cast<const int8_t*>(call.filter), static_cast<Y*>(call.y));
}

}  // namespace

bool LaunchQuantizedStride1(const QuantizedCall& call, const QuantizedMarch& march, const QuantizedTile& tile) {
  return LaunchQuantizedTile<1>(call, march, tile);
}

bool LaunchQuantized(const QuantizedCall& call, const QuantizedPlan& plan) {
  if (!plan.words) {
    call.problem.y_dtype == Dtype::kI8 ? LaunchGather<int8_t>(call) : LaunchGather<int32_t>(call);
    return true;
  }
  const Problem p = Squared(call.problem);
  const PassCall pass{p, /*forward=*/true, Epilogue{}, call.x, call.filter, call.y, call.stream};
  const MarchTile tile{QuantizedTile::kVector, plan.tile.columns, plan.tile.ahead, plan.tile.rows};
  const QuantizedMarch march{DescribeMarch(pass, tile), call.requantization, Rounding(call.requantization),
                             static_cast<int>(p.kernel_h), static_cast<int>(p.kernel_w)};
  if (plan.tile.bursts()) return LaunchQuantizedBurst(call, march, plan.tile);
  return p.stride_h == 1 ? LaunchQuantizedStride1(call, march, plan.tile)
                         : LaunchQuantizedStride2(call, march, plan.tile);
}

}  // namespace dwsconv::cuda
