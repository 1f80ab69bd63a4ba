#include "cuda/march.h"

namespace dwsconv::cuda {

Grid InputGrid(const Problem& p) { return {static_cast<int>(p.in_h), static_cast<int>(p.in_w), p.x}; }

Grid OutputGrid(const Problem& p) { return {static_cast<int>(p.out_h), static_cast<int>(p.out_w), p.y}; }

namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

March DescribeMarch(const Problem& p, const MarchTile& tile, bool forward) {
  const bool stride_2_gradient = !forward && p.stride_h == 2;
  March m{};
  m.strip_rows = tile.rows;
  m.source = forward ? InputGrid(p) : OutputGrid(p);
  m.result = forward ? OutputGrid(p) : InputGrid(p);
  m.filter = p.filter;
  m.images_per_group = p.groups == 1 ? 0 : p.images_per_group();
  m.filter_is_float = p.filter_dtype == Dtype::kF32;
  m.mirrored = !forward && !stride_2_gradient;
  m.pad_top = static_cast<int>(m.mirrored ? p.kernel_h - 1 - p.pad_top : p.pad_top);
  m.pad_left = static_cast<int>(m.mirrored ? p.kernel_w - 1 - p.pad_left : p.pad_left);

  int64_t rows = m.result.h, columns = m.result.w;
  if (stride_2_gradient) {  // in pairs of padded coordinates
    rows = CeilDiv(m.pad_top + m.result.h, 2) - m.pad_top / 2;
    columns = CeilDiv(m.pad_left + m.result.w, 2) - m.pad_left / 2;
  }
  const uint32_t vectors = static_cast<uint32_t>(p.channels / tile.vector);
  const auto lanes = static_cast<uint32_t>(ChannelLanes(p, tile.vector));
  m.lanes = Divisor(lanes);
  m.lane_groups = Divisor(vectors / lanes);
  m.tiles = Divisor(static_cast<uint32_t>(CeilDiv(columns, tile.columns)));
  m.strips = Divisor(static_cast<uint32_t>(CeilDiv(rows, tile.rows)));
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
  if (p.stride_h == 1) return LaunchMarchStride1(call);
  return forward ? LaunchMarchStride2Forward(call) : LaunchMarchStride2Gradient(call);
}

}  // namespace dwsconv::cuda
