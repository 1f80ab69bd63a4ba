#include "cuda/toeplitz_planes.cuh"

namespace dwsconv::cuda {
namespace {

ToeplitzPlanes Describe(const PassCall& call, const ToeplitzPlanesTile& tile) {
  const Problem& p = call.problem;
  ToeplitzPlanes m{DescribeCorrelation(call)};
  m.kernel_h = static_cast<int>(p.kernel_h);
  m.kernel_w = static_cast<int>(p.kernel_w);
  m.margin = ToeplitzPlanesMargin(m.pad_left, tile.access);
  m.tiles = Divisor(static_cast<uint32_t>(CeilDiv(m.result.w, ToeplitzPlanesTile::kColumns)));
  m.strips = Divisor(static_cast<uint32_t>(CeilDiv(m.result.h, tile.rows)));
  m.channels = Divisor(static_cast<uint32_t>(p.channels));
  m.units = static_cast<uint32_t>(p.batch * m.strips.value * m.tiles.value);
  m.warps = static_cast<uint32_t>(p.channels * CeilDiv(m.units, ToeplitzPlanesTile::kMarchers));
  m.strip_rows = tile.rows;
  return m;
}

template <class T>
bool LaunchFor(const PassCall& call, const ToeplitzPlanesTile& tile) {
  const ToeplitzPlanes m = Describe(call, tile);
  const auto blocks = static_cast<unsigned>(CeilDiv(m.warps, kToeplitzPlanesThreads / 32));
#define DWSCONV_TRY(kK, kAccess)                                                                                  \
  if (tile.kernel_size == kK && tile.access == kAccess) {                                                         \
    ToeplitzPlanesKernel<T, kK, kAccess><<<blocks, kToeplitzPlanesThreads, 0, call.stream>>>(                     \
        m, static_cast<const T*>(call.source), static_cast<const T*>(call.filter), static_cast<T*>(call.result)); \
    return true;                                                                                                  \
  }
  DWSCONV_TOEPLITZ_PLANES_TILES(DWSCONV_TRY)
#undef DWSCONV_TRY
  return false;
}

}  // namespace

bool LaunchToeplitzPlanes(const PassCall& call, const ToeplitzPlanesTile& tile) {
  if (call.problem.x_dtype == Dtype::kBF16) return LaunchFor<BFloat16>(call, tile);
  return call.problem.x_dtype == Dtype::kF16 && LaunchFor<Float16>(call, tile);
}

}  // namespace dwsconv::cuda
