#include "cuda/dynamic_memory.h"
#include "cuda/small_planes.cuh"

namespace dwsconv::cuda {
namespace {

SmallPlanes Describe(const PassCall& call, const SmallPlanesTile& tile, const SmallPlanesShape& shape) {
  const Problem& p = call.problem;
  SmallPlanes m{DescribeCorrelation(call)};
  m.batch = static_cast<int>(p.batch);
  m.channels = static_cast<int>(p.channels);
  m.tiles = Divisor(static_cast<uint32_t>(shape.tiles));
  m.planes_per_warp = shape.planes_per_warp;
  m.planes = shape.planes;
  m.channel_groups = Divisor(static_cast<uint32_t>(CeilDiv(p.channels, shape.planes)));
  m.images = tile.images;
  m.plane_bytes = shape.plane_bytes;
  m.buffer_bytes = shape.buffer_bytes;
  m.chunk = SmallPlanesChunk(p, shape, Alignment(call.source, call.result));
  return m;
}

template <class T, int kK, int kTile, bool kOne>
void Launch(const PassCall& call, const SmallPlanesTile& tile, const SmallPlanesShape& shape) {
  const SmallPlanes m = Describe(call, tile, shape);
  const auto kernel = SmallPlanesKernel<T, kK, kTile, kOne>;
  AllowDynamicMemory(kernel, shape.bytes);
  const auto blocks = static_cast<unsigned>(m.channel_groups.value * CeilDiv(call.problem.batch, tile.images));
  kernel<<<blocks, tile.warps * 32, shape.bytes, call.stream>>>(m, static_cast<const T*>(call.source), call.filter,
                                                                static_cast<T*>(call.result));
}

template <class T>
bool LaunchFor(const PassCall& call, const SmallPlanesTile& tile) {
  const SmallPlanesShape shape(call.problem, tile);
#define DWSCONV_TRY(kK, kTile)                                                                                         \
  if (call.problem.kernel_h == kK && tile.columns == kTile) {                                                          \
    shape.tiles == 1 ? Launch<T, kK, kTile, true>(call, tile, shape) : Launch<T, kK, kTile, false>(call, tile, shape); \
    return true;                                                                                                       \
  }
  DWSCONV_SMALL_PLANES_TILES(DWSCONV_TRY)
#undef DWSCONV_TRY
  return false;
}

}  // namespace

bool LaunchSmallPlanes(const PassCall& call, const SmallPlanesTile& tile) {
  return WithDtype(call.problem.x_dtype,
                   [&](auto type) { return LaunchFor<typename decltype(type)::type>(call, tile); });
}

}  // namespace dwsconv::cuda
