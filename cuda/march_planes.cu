#include "cuda/march_planes.cuh"

namespace dwsconv::cuda {
namespace {

MarchPlanes Describe(const PassCall& call, const MarchPlanesTile& tile) {
  const Problem& p = call.problem;
  MarchPlanes m{};
  m.march = DescribeMarch(call, {1, tile.columns, 0, tile.rows});
  const auto tiles = static_cast<uint32_t>(p.in_w / tile.columns);
  m.tiles = Divisor(tiles);
  m.channels = Divisor(static_cast<uint32_t>(p.channels));
  m.rows_per_warp = 32 / tiles;
  m.units = static_cast<uint32_t>(p.batch * m.march.strips.value * p.channels);
  return m;
}

template <class T>
bool LaunchFor(const PassCall& call, const MarchPlanesTile& tile) {
  const MarchPlanes m = Describe(call, tile);
  const uint32_t warps = (m.units + m.rows_per_warp - 1) / m.rows_per_warp, per_block = kMarchThreads / 32;
  const uint32_t blocks = (warps + per_block - 1) / per_block;
#define DWSCONV_TRY(kK, kTile)                                                             \
  if (call.problem.kernel_h == kK && tile.columns == kTile) {                              \
    MarchPlanesKernel<T, kK, kTile><<<blocks, kMarchThreads, 0, call.stream>>>(            \
        m, static_cast<const T*>(call.source), call.filter, static_cast<T*>(call.result)); \
    return true;                                                                           \
  }
  DWSCONV_MARCH_PLANES_TILES(DWSCONV_TRY)
#undef DWSCONV_TRY
  return false;
}

}  // namespace

bool LaunchMarchPlanes(const PassCall& call, const MarchPlanesTile& tile) {
  return WithDtype(call.problem.x_dtype,
                   [&](auto type) { return LaunchFor<typename decltype(type)::type>(call, tile); });
}

}  // namespace dwsconv::cuda
