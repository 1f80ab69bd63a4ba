#include "cuda/march.h"

namespace dwsconv::cuda {

March DescribeMarch(const PassCall& call, const MarchTile& tile) {
  const Problem& p = call.problem;
  March m{DescribeCorrelation(call)};
  const auto [rows, columns] = DividedSize(m, PassOf(p, call.forward));
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

bool LaunchMarch(const PassCall& pass, const MarchTile& tile) {
  const MarchCall call{pass, DescribeMarch(pass, tile), tile};
  switch (PassOf(pass.problem, pass.forward)) {
    case Pass::kStride1: return LaunchMarchStride1(call);
    case Pass::kStride2: return LaunchMarchStride2Forward(call);
    case Pass::kStride2Gradient: return LaunchMarchStride2Gradient(call);
  }
  return false;
}

}  // namespace dwsconv::cuda
