#include "cuda/dtypes.cuh"
#include "cuda/pointwise_split.cuh"

namespace dwsconv::cuda {
namespace {

template <class T, int kFeatures>
void LaunchSplit(const PointwiseCall& call) {
  const PointwiseProblem& p = call.problem;
  const dim3 blocks(static_cast<unsigned>(CeilDiv(p.pixels(), PointwiseSplit::kPixels)),
                    static_cast<unsigned>(CeilDiv(p.features, 8 * kFeatures)));
  PointwiseSplitKernel<T, kFeatures><<<blocks, 32 * PointwiseSplit::kWarps, 0, call.stream>>>(
      DescribePointwise(call), static_cast<const T*>(call.source), static_cast<const T*>(call.kernel),
      static_cast<T*>(call.result));
}

}  // namespace

PointwiseTask DescribePointwise(const PointwiseCall& call) {
  const PointwiseProblem& p = call.problem;
  PointwiseTask m{};
  m.pixels = static_cast<int>(p.pixels());
  m.channels = static_cast<int>(p.channels);
  m.features = static_cast<int>(p.features);
  m.images = static_cast<int>(p.images);
  m.pixels_per_image = Divisor(static_cast<uint32_t>(p.pixels_per_image));
  m.gate = call.gate;
  m.epilogue = DescribeEpilogue(call.epilogue);
  m.requantization = call.requantization;
  return m;
}

bool LaunchPointwise(const PointwiseCall& call, const PointwisePlan& plan, const Device& device) {
  switch (plan.kernel) {
    case PointwisePlan::Kernel::kNone: return false;
    case PointwisePlan::Kernel::kTiles:
      return LaunchPointwiseTile(call, plan.tile, PointwiseShape(call.problem, plan.tile, device));
    case PointwisePlan::Kernel::kSplit:
      if (call.problem.dtype == Dtype::kI8) {
        LaunchSplit<int8_t, 4>(call);
        return true;
      }
      return WithDtype(call.problem.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        plan.split.features == 8 ? LaunchSplit<T, 8>(call) : LaunchSplit<T, 4>(call);
        return true;
      });
  }
  return false;
}

}  // namespace dwsconv::cuda
