#include "cuda/march_planes.cuh"

namespace dwsconv::cuda {
namespace {

MarchPlanes Describe(const Problem& p, bool forward, const MarchTile& tile) {
  MarchPlanes m{};
  m.march = DescribeMarch(p, tile, forward);
  const auto tiles = static_cast<uint32_t>(p.in_w / tile.columns);
  m.tiles = Divisor(tiles);
  m.channels = Divisor(static_cast<uint32_t>(p.channels));
  m.rows_per_warp = 32 / tiles;
  m.units = static_cast<uint32_t>(p.batch * m.march.strips.value * p.channels);
  return m;
}

template <class T>
bool LaunchFor(const Problem& p, bool forward, const MarchTile& tile, const void* source, const void* filter,
               void* result, cudaStream_t stream) {
  const MarchPlanes m = Describe(p, forward, tile);
  const uint32_t warps = (m.units + m.rows_per_warp - 1) / m.rows_per_warp, per_block = kMarchThreads / 32;
#define DWSCONV_TRY(kK, kTile, kAhead)                                                                          \
  if (p.kernel_h == kK && tile.columns == kTile && tile.ahead == kAhead) {                                      \
    MarchPlanesKernel<T, kK, kTile, kAhead><<<(warps + per_block - 1) / per_block, kMarchThreads, 0, stream>>>( \
        m, static_cast<const T*>(source), filter, static_cast<T*>(result));                                     \
    return true;                                                                                                \
  }
  DWSCONV_MARCH_PLANES_TILES(DWSCONV_TRY)
#undef DWSCONV_TRY
  return false;
}

}  // namespace

bool LaunchMarchPlanes(const Problem& p, bool forward, const MarchTile& tile, const void* source, const void* filter,
                       void* result, cudaStream_t stream) {
  switch (p.x_dtype) {
    case Dtype::kF32: return LaunchFor<float>(p, forward, tile, source, filter, result, stream);
    case Dtype::kBF16: return LaunchFor<BFloat16>(p, forward, tile, source, filter, result, stream);
    case Dtype::kF16: return LaunchFor<Float16>(p, forward, tile, source, filter, result, stream);
    default: return false;
  }
}

}  // namespace dwsconv::cuda
