#include <type_traits>

#include "cuda/dtypes.cuh"
#include "cuda/dynamic_memory.h"
#include "cuda/pointwise_tiles.cuh"

namespace dwsconv::cuda {
namespace {

template <class T, int kRowTiles, int kDown, int kAcross, int kSteps, int kStages>
void LaunchTiles(const PointwiseCall& call, const PointwiseShape& shape) {
  PointwiseTask m = DescribePointwise(call);
  m.feature_tiles = Divisor(static_cast<uint32_t>(shape.feature_tiles));
  m.pixel_tiles = static_cast<int>(shape.pixel_tiles);
  m.gates = shape.gates;
  m.kernel_chunks = shape.kernel_chunks;
  auto kernel = PointwiseTilesKernel<T, kRowTiles, kDown, kAcross, kSteps, kStages, false>;
  if constexpr (!std::is_same_v<T, int8_t>) {
    if (shape.gates > 0) kernel = PointwiseTilesKernel<T, kRowTiles, kDown, kAcross, kSteps, kStages, true>;
  }
  AllowDynamicMemory(kernel, shape.bytes);
  constexpr PointwiseTile kTile{kRowTiles, kDown, kAcross, kSteps, kStages};
  kernel<<<static_cast<unsigned>(shape.down * shape.feature_tiles), kTile.threads(), shape.bytes, call.stream>>>(
      m, static_cast<const T*>(call.source), static_cast<const T*>(call.kernel), static_cast<T*>(call.result));
}

template <class T>
bool LaunchTilesOf(const PointwiseCall& call, const PointwiseTile& tile, const PointwiseShape& shape) {
#define DWSCONV_TRY(kRowTiles, kDown, kAcross, kSteps, kStages)                                              \
  if (tile.row_tiles == kRowTiles && tile.down == kDown && tile.across == kAcross && tile.steps == kSteps && \
      tile.stages == kStages) {                                                                              \
    LaunchTiles<T, kRowTiles, kDown, kAcross, kSteps, kStages>(call, shape);                                 \
    return true;                                                                                             \
  }
  DWSCONV_POINTWISE_TILES(DWSCONV_TRY)
#undef DWSCONV_TRY
  return false;
}

}  // namespace

bool LaunchPointwiseTile(const PointwiseCall& call, const PointwiseTile& tile, const PointwiseShape& shape) {
  if (call.problem.dtype == Dtype::kI8) return LaunchTilesOf<int8_t>(call, tile, shape);
  return WithDtype(call.problem.dtype,
                   [&](auto type) { return LaunchTilesOf<typename decltype(type)::type>(call, tile, shape); });
}

}  // namespace dwsconv::cuda
