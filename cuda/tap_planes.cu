#include "cuda/cluster.h"
#include "cuda/dtypes.cuh"
#include "cuda/tap_planes.cuh"

namespace dwsconv::cuda {
namespace {

PlaneRows DescribeRows(const RowsShape& shape, const Grid& grid, int element, int threads) {
  PlaneRows m{shape};
  m.grid = grid;
  const auto divisor = [](int value) { return Divisor(static_cast<uint32_t>(value)); };
  m.plane_rows = divisor(shape.rows);
  m.row_chunks = divisor(grid.w * element / shape.chunk);
  m.copied_rows = std::max(1u, threads / m.row_chunks.value);
  m.further_rows = static_cast<int>(m.copied_rows) % shape.rows;
  const int planes = static_cast<int>(m.copied_rows) / shape.rows;
  m.step = static_cast<int>(planes * grid.step.c + m.further_rows * grid.step.h);
  m.next_row = static_cast<int>(grid.step.c - shape.rows * grid.step.h);
  return m;
}

template <class T, int kK, int kS, int kTile>
bool Launch(const Problem& p, const GradFilterPlan& plan, const TapPlanesShape& shape, const void* x, const void* g,
            void* filter, float* workspace, cudaStream_t stream) {
  const TapPlanesTile& tile = plan.tap_planes;
  TapPlanes m{DescribeParts(p, 1, tile.planes, tile.walkers, plan)};
  m.x = DescribeRows(shape.x, InputGrid(p), sizeof(T), shape.threads);
  m.g = DescribeRows(shape.g, OutputGrid(p), sizeof(T), shape.threads);
  m.strips = Divisor(static_cast<uint32_t>(CeilDiv(p.out_h, tile.rows)));
  m.pieces = static_cast<uint32_t>(p.images_per_group() * m.strips.value);
  m.rows = tile.rows;
  m.pad_top = static_cast<int>(p.pad_top);
  m.pad_left = static_cast<int>(p.pad_left);
  m.x_bytes = shape.x_bytes;
  m.images_per_group = p.images_per_group();
  const auto kernel = TapPlanesKernel<T, kK, kS, kTile>;
  const unsigned blocks = m.lane_groups.value * m.groups.value * m.splits.value;
  LaunchClusters(kernel, blocks, shape.threads, shape.bytes, m.one_launch ? m.splits.value : 1, stream, m,
                 static_cast<const T*>(x), static_cast<const T*>(g), filter, workspace);
  return true;
}

template <class T>
bool LaunchFor(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
               float* workspace, cudaStream_t stream) {
  const TapPlanesShape shape(p, plan.tap_planes);
#define DWSCONV_TRY(kK, kS, kTile)                                                    \
  if (p.kernel_h == kK && p.stride_h == kS && shape.columns == kTile) {               \
    return Launch<T, kK, kS, kTile>(p, plan, shape, x, g, filter, workspace, stream); \
  }
#define DWSCONV_TRY_SIZE(kK) DWSCONV_TRY(kK, 1, 7) DWSCONV_TRY(kK, 1, 14) DWSCONV_TRY(kK, 2, 7) DWSCONV_TRY(kK, 2, 14)
  DWSCONV_TRY_SIZE(3)
  DWSCONV_TRY_SIZE(5)
  DWSCONV_TRY_SIZE(7)
#undef DWSCONV_TRY_SIZE
#undef DWSCONV_TRY
  return false;
}

}  // namespace

bool LaunchTapPlanes(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
                     float* workspace, cudaStream_t stream) {
  return WithDtype(p.x_dtype, [&](auto type) {
    return LaunchFor<typename decltype(type)::type>(p, plan, x, g, filter, workspace, stream);
  });
}

}  // namespace dwsconv::cuda
