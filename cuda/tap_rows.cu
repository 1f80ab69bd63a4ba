#include "cuda/cluster.h"
#include "cuda/dtypes.cuh"
#include "cuda/tap_rows.cuh"

namespace dwsconv::cuda {
namespace {

template <class T, int kK, int kS>
bool Launch(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter, float* workspace,
            cudaStream_t stream) {
  const TapRowsTile& tile = plan.tap_rows;
  const TapRowsShape shape(p, tile);
  const int pixel_bytes = tile.lanes * tile.kVector * static_cast<int>(sizeof(T));
  TapRows m{DescribeParts(p, tile.kVector, tile.lanes, tile.walkers, plan)};
  m.x = InputGrid(p);
  m.g = OutputGrid(p);
  m.x_tile = DescribeTile(shape.x_rows, shape.x_columns, shape.x_pitch, pixel_bytes, shape.threads);
  m.g_tile = DescribeTile(tile.rows, tile.columns, shape.g_pitch, pixel_bytes, shape.threads);
  m.stretches = Divisor(static_cast<uint32_t>(CeilDiv(p.out_w, tile.columns)));
  m.strips = Divisor(static_cast<uint32_t>(CeilDiv(p.out_h, tile.rows)));
  m.pieces = static_cast<uint32_t>(p.images_per_group() * m.stretches.value * m.strips.value);
  m.rows = tile.rows;
  m.columns = tile.columns;
  m.pad_top = static_cast<int>(p.pad_top);
  m.pad_left = static_cast<int>(p.pad_left);
  m.images_per_group = p.images_per_group();
  const auto kernel = TapRowsKernel<T, kK, kS>;
  const unsigned blocks = m.lane_groups.value * m.groups.value * m.splits.value;
  LaunchClusters(kernel, blocks, shape.threads, shape.bytes, m.one_launch ? m.splits.value : 1, stream, m,
                 static_cast<const T*>(x), static_cast<const T*>(g), filter, workspace);
  return true;
}

template <class T>
bool LaunchFor(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
               float* workspace, cudaStream_t stream) {
#define DWSCONV_TRY(kK)                                                                  \
  if (p.kernel_h == kK) {                                                                \
    return p.stride_h == 1 ? Launch<T, kK, 1>(p, plan, x, g, filter, workspace, stream)  \
                           : Launch<T, kK, 2>(p, plan, x, g, filter, workspace, stream); \
  }
  DWSCONV_TRY(3)
  DWSCONV_TRY(5)
  DWSCONV_TRY(7)
#undef DWSCONV_TRY
  return false;
}

}  // namespace

bool LaunchTapRows(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
                   float* workspace, cudaStream_t stream) {
  return WithDtype(p.x_dtype, [&](auto type) {
    return LaunchFor<typename decltype(type)::type>(p, plan, x, g, filter, workspace, stream);
  });
}

}  // namespace dwsconv::cuda
