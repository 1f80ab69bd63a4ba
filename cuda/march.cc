#include "cuda/march.h"

namespace dwsconv::cuda {

namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

March DescribeMarch(const Problem& p, const MarchTile& tile, bool forward) {
  March m{DescribeCorrelation(p, forward)};
  const auto [rows, columns] = DividedSize(m, PassOf(p, forward));
  const uint32_t vectors = static_cast<uint32_t>(p.channels / tile.vector);
  const auto lanes = static_cast<uint32_t>(ChannelLanes(p, tile.vector));
  m.lanes = Divisor(lanes);
  m.lane_groups = Divisor(vectors / lanes);
  m.tiles = Divisor(static_cast<uint32_t>(CeilDiv(columns, tile.columns)));
  m.strips = Divisor(static_cast<uint32_t>(CeilDiv(rows, tile.rows)));
  m.strip_rows = tile.rows;
  m.threads = p.batch * m.strips.value * vectors * m.tiles.value;
  return m;
}

bool LaunchMarch(const Problem& p, bool forward, const MarchTile& tile, const void* source, const void* filter,
                 void* result, cudaStream_t stream) {
  const MarchCall call{DescribeMarch(p, tile, forward),
                       tile,
                       static_cast<int>(p.kernel_h),
                       static_cast<int>(p.kernel_w),
                       forward ? p.x_dtype : p.y_dtype,
                       forward ? p.y_dtype : p.x_dtype,
                       source,
                       filter,
                       result,
                       stream};
  switch (PassOf(p, forward)) {
    case Pass::kStride1: return LaunchMarchStride1(call);
    case Pass::kStride2: return LaunchMarchStride2Forward(call);
    case Pass::kStride2Gradient: return LaunchMarchStride2Gradient(call);
  }
  return false;
}

}  // namespace dwsconv::cuda
