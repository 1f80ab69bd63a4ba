#include <algorithm>

#include "cuda/cluster.h"
#include "cuda/tap_products.cuh"

namespace dwsconv::cuda {
namespace {

TapProducts Describe(const Problem& p, const GradFilterPlan& plan) {
  const TapProductsTile& tile = plan.tap_products;
  const int stride = static_cast<int>(p.stride_h);
  const int reach_h = static_cast<int>((p.kernel_h - 1) * p.dilation_h);
  const int reach_w = static_cast<int>((p.kernel_w - 1) * p.dilation_w);
  const auto divisor = [](int64_t value) { return Divisor(static_cast<uint32_t>(std::max<int64_t>(1, value))); };
  TapProducts m{};
  m.chunks = divisor(tile.chunks);
  m.walkers = tile.walkers;
  m.channel_blocks = divisor(CeilDiv(p.channels, tile.chunks * kSlotChannels));
  m.splits = divisor(tile.splits);
  m.groups = divisor(p.groups);
  m.one_launch = plan.one_launch;
  m.stretches = divisor(CeilDiv(p.out_w, tile.columns));
  m.strips = divisor(CeilDiv(p.in_h, tile.rows));
  m.images = tile.images;
  m.stretch_columns = tile.columns;
  m.images_per_group = static_cast<int>(p.images_per_group());
  m.tiles = m.stretches.value * m.strips.value * CeilDiv(m.images_per_group, tile.images);
  m.pad_top = static_cast<int>(p.pad_top);
  m.pad_left = static_cast<int>(p.pad_left);
  m.channels = static_cast<int>(p.channels);
  m.kernel_h = static_cast<int>(p.kernel_h);
  m.kernel_w = divisor(p.kernel_w);
  m.stride = stride;
  m.dilation_h = static_cast<int>(p.dilation_h);
  m.dilation_w = divisor(p.dilation_w);
  m.filter = p.filter;
  m.filter_is_float = p.filter_dtype == Dtype::kF32;

  // The rows of g that a tile's rows of x meet.
  m.lead = reach_h / stride;
  m.first_parity = (m.pad_top % stride + stride) % stride;
  m.first_g_row = (m.pad_top - m.first_parity) / stride - m.lead;
  const int g_rows = m.lead + (tile.rows - 1 + m.first_parity) / stride + 1;
  const int threads = tile.chunks * tile.walkers * 32;
  const auto side = [&](TapProductsSide& s, const Strides& strides, int64_t h, int64_t w, int rows, int first_row,
                        int width) {
    s.h = static_cast<int>(h), s.w = static_cast<int>(w);
    s.row_step = static_cast<int>(strides.h);
    s.image_step = strides.n;
    s.period = rows;
    s.pitch = CeilDiv(width, 8) * 8 + 1;  // odd, so that neighbouring rows are in different banks
    // With one strip, the rows outside of the image are always the same.
    s.skipped_rows = m.strips.value > 1 ? 0 : std::clamp(-first_row, 0, rows);
    s.rows = m.strips.value > 1 ? rows : std::clamp(s.h - first_row, s.skipped_rows, rows) - s.skipped_rows;
    // With one stretch, the columns outside of the image are always the same.
    const int first_column = &s == &m.x ? -m.pad_left : 0;
    s.begin = m.stretches.value > 1 ? 0 : std::clamp(-first_column, 0, width);
    s.end = m.stretches.value > 1 ? width : std::clamp(s.w - first_column, s.begin, width);
    const int lanes = std::min(std::max(1, s.end - s.begin) * tile.chunks, threads / tile.chunks * tile.chunks);
    s.lanes = divisor(lanes);
    s.row_groups = divisor(std::min(threads / lanes, s.rows));
    s.image_groups = threads / lanes / static_cast<int>(s.row_groups.value);
    s.pixel_groups = lanes / tile.chunks;
  };
  const int unit = kUnitTerms * tile.sets, units = CeilDiv(std::min<int64_t>(tile.columns, p.out_w), unit);
  m.x.needed = (tile.columns - 1) * stride + reach_w + 1;
  side(m.x, p.x, p.in_h, p.in_w, tile.rows, 0, (units * unit - 1) * stride + reach_w + 1);
  m.g.needed = tile.columns;
  side(m.g, p.y, p.out_h, p.out_w, g_rows, m.first_g_row, units * unit);
  m.units_wide = divisor(units);
  bool odd = false;
  for (int parity = 0; parity < stride; ++parity) {
    const int first = (parity + m.first_parity) % stride, rows = CeilDiv(std::max(0, tile.rows - first), stride);
    m.unit_rows[parity] = divisor(rows);
    m.pairs[parity] = CeilDiv(tile.images * rows * units, 2);
    odd |= tile.images * rows * units % 2 != 0;
  }
  const int spare_rows = odd ? m.lead + 1 : 0;  // zeros for the last of an odd number of units
  m.x_slots = (tile.images * m.x.period + 1) * m.x.pitch * tile.chunks;
  m.stage_slots = m.x_slots + (tile.images * m.g.period + spare_rows) * m.g.pitch * tile.chunks;
  return m;
}

template <class T, int kSets, int kStride>
bool Launch(const TapProducts& m, const void* x, const void* g, void* filter, float* workspace, cudaStream_t stream) {
  const auto kernel = TapProductsKernel<T, kSets, kStride>;
  LaunchClusters(kernel, m.channel_blocks.value * m.groups.value * m.splits.value, m.chunks.value * m.walkers * 32,
                 TapProductsMemory::Bytes(m), m.one_launch ? m.splits.value : 1, stream, m, static_cast<const T*>(x),
                 static_cast<const T*>(g), filter, workspace);
  return true;
}

template <class T>
bool LaunchFor(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
               float* workspace, cudaStream_t stream) {
  const TapProducts m = Describe(p, plan);
  if (p.stride_h == 2) return Launch<T, 2, 2>(m, x, g, filter, workspace, stream);
  if (plan.tap_products.sets == 4) return Launch<T, 4, 1>(m, x, g, filter, workspace, stream);
  return Launch<T, 2, 1>(m, x, g, filter, workspace, stream);
}

}  // namespace

bool LaunchTapProducts(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
                       float* workspace, cudaStream_t stream) {
  if (p.x_dtype == Dtype::kBF16) return LaunchFor<BFloat16>(p, plan, x, g, filter, workspace, stream);
  return p.x_dtype == Dtype::kF16 && LaunchFor<Float16>(p, plan, x, g, filter, workspace, stream);
}

}  // namespace dwsconv::cuda
