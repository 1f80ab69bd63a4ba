#include "cuda/cluster.h"
#include "cuda/dtypes.cuh"
#include "cuda/tap_sums.cuh"

namespace dwsconv::cuda {
namespace {

TapSums Describe(const Problem& p, const GradFilterPlan& plan) {
  const TapSumsTile& tile = plan.tap_sums;
  TapSums m{DescribeParts(p, tile.vector, tile.lanes, kTapSumsThreads / tile.lanes, plan)};
  m.tiles = Divisor(static_cast<uint32_t>(CeilDiv(p.out_w, tile.columns)));
  m.strips = Divisor(static_cast<uint32_t>(CeilDiv(p.out_h, tile.rows)));
  m.units = static_cast<uint32_t>(p.images_per_group() * m.tiles.value * m.strips.value);
  m.strip_rows = tile.rows;
  m.x = InputGrid(p);
  m.g = OutputGrid(p);
  m.pad_top = static_cast<int>(p.pad_top);
  m.pad_left = static_cast<int>(p.pad_left);
  m.images_per_group = p.images_per_group();
  return m;
}

template <class T, int kH, int kW, int kS, int kVector, int kTile, int kAhead>
bool Launch(const TapSums& m, const void* x, const void* g, void* filter, float* workspace, cudaStream_t stream) {
  const auto kernel = TapSumsKernel<T, kH, kW, kS, kVector, kTile, kAhead>;
  const int shared = m.walkers * kH * kW * static_cast<int>(m.lanes.value) * kVector * static_cast<int>(sizeof(float));
  const unsigned blocks = m.lane_groups.value * m.groups.value * m.splits.value;
  LaunchClusters(kernel, blocks, kTapSumsThreads, shared, m.one_launch ? m.splits.value : 1, stream, m,
                 static_cast<const T*>(x), static_cast<const T*>(g), filter, workspace);
  return true;
}

template <class T>
bool LaunchFor(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
               float* workspace, cudaStream_t stream) {
  const TapSums m = Describe(p, plan);
#define DWSCONV_TRY(kH, kW, kVector, kTile, kAhead)                                                                  \
  if (p.kernel_h == kH && p.kernel_w == kW && plan.tap_sums.vector == kVector && plan.tap_sums.columns == kTile) {   \
    if (p.stride_h == 1) return Launch<T, kH, kW, 1, kVector, kTile, kAhead>(m, x, g, filter, workspace, stream);    \
    if constexpr (kH == kW) return Launch<T, kH, kW, 2, kVector, kTile, kAhead>(m, x, g, filter, workspace, stream); \
  }
  DWSCONV_TAP_SUMS_TILES(DWSCONV_TRY)
#undef DWSCONV_TRY
  return false;
}

}  // namespace

bool LaunchTapSums(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
                   float* workspace, cudaStream_t stream) {
  return WithDtype(p.x_dtype, [&](auto type) {
    return LaunchFor<typename decltype(type)::type>(p, plan, x, g, filter, workspace, stream);
  });
}

}  // namespace dwsconv::cuda
