// The planner of the kernel of grad_filter in NCHW that computes from shared memory (tap_planes.cuh).
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "cuda/plan_common.h"

namespace dwsconv {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

bool TapPlanesApply(const Problem& p, const Device& device) {
  constexpr int64_t kMostColumns = 1 << 20;
  const bool one_type = p.x_dtype == p.y_dtype && p.x_dtype != Dtype::kF64;
  const bool has_instance = p.kernel_h == p.kernel_w && (p.kernel_h == 3 || p.kernel_h == 5 || p.kernel_h == 7);
  const bool sizes_fit = p.x.n <= kMost && p.y.n <= kMost && std::max(p.in_w, p.out_w) <= kMostColumns &&
                         std::max(std::abs(p.pad_top), std::abs(p.pad_left)) <= kMostColumns;
  const bool empty = p.x_elements() == 0 || p.y_elements() == 0;
  return device.capability >= 80 && !p.channels_last && p.multiplier == 1 && has_instance && UsualWindow(p) &&
         one_type && sizes_fit && !empty;
}

// How many threads of a warp meet in a bank when they read a word each in `rows` rows.
double Conflicts(double rows, int64_t pitch_unit) { return std::max(1.0, std::ceil(rows * pitch_unit / 128)); }

// Estimated time in cycles, fitted like EstimateStaged.
double EstimateTapPlanes(const Problem& p, const TapPlanesTile& tile, bool one_launch, const Device& device) {
  constexpr double kRegisters = 65536, kMostThreads = 2048;
  const TapPlanesShape shape(p, tile);
  const double k = p.kernel_h, stride = p.stride_h, bytes = BytesOf(p.x_dtype), columns = shape.columns;
  const double pieces = double(p.images_per_group()) * CeilDiv(p.out_h, tile.rows);
  const double blocks = double(CeilDiv(p.channels, tile.planes)) * p.groups * tile.splits;

  // Of one thread and one piece.
  const auto copied = [&](const RowsShape& rows, int64_t width) {
    const int64_t row_chunks = width * static_cast<int64_t>(bytes) / rows.chunk;
    return double(CeilDiv(row_chunks, shape.threads)) *
           CeilDiv(tile.planes * rows.rows, std::max<int64_t>(1, shape.threads / row_chunks)) *
           (rows.chunk < 4 ? 2 : 1);
  };
  const double copies = copied(shape.x, p.in_w) + copied(shape.g, p.out_w);
  const double x_loads = columns * stride * bytes / 4, g_loads = columns / 2, converted = columns * (1 + stride);
  const double stretch = 1 + (p.out_w % shape.columns != 0 ? 1.49 * columns : 0) + 0.866 * columns * k +
                         (bytes == 2 ? 1.69 * converted : 0);
  const double rows = CeilDiv(tile.rows, tile.walkers), stretches = CeilDiv(p.out_w, shape.columns);
  const double instructions = rows * (64 + stretches * stretch) + 19.7 * copies;
  const double together = std::min<double>(tile.walkers, CeilDiv(32, p.kernel_h));  // rows of g that a warp reads
  const double transactions =
      rows * stretches *
      (x_loads * Conflicts((together - 1) * stride + k, std::max<int64_t>(4, shape.x.chunk)) +
       g_loads * Conflicts(together, std::max<int64_t>(2 * bytes, shape.g.chunk)) * std::max(1.0, bytes / 2));

  const double warps = CeilDiv(shape.threads, 32), registers = shape.columns * stride > 14 ? 64 : 48;
  const double resident =
      std::max(1.0, std::floor(std::min({device.shared_memory / (shape.bytes + 1024.0), kMostThreads / (32 * warps),
                                         kRegisters / (registers * 32 * warps)})));
  double waves = std::max(1.0, blocks / (device.multiprocessors * resident));
  if (waves < 3) waves = std::ceil(waves);
  const double active = std::clamp(blocks / device.multiprocessors, 1.0, resident);
  const double latency = 2790 + 6.5 * copies + 3.9 * instructions;
  const double piece = std::max({0.144 * warps * instructions * active, 1.54 * warps * transactions * active, latency});
  const double compute = waves * (std::ceil(pieces / tile.splits) * piece + 653 + 12.3 * tile.walkers * k);

  const double memory = bytes * (p.x_elements() + p.y_elements()) / (14.5 * device.multiprocessors);
  const double end = !one_launch       ? 5220 + 2.86 * tile.splits * p.filter_elements() / device.multiprocessors
                     : tile.splits > 1 ? 2830
                                       : 0;
  return 1070 + end + std::max(compute, memory) + 0.473 * std::min(compute, memory);
}

// The widest copies that rows and addresses are multiples of. Threads read in different rows, so they meet in fewest
// banks with an odd pitch; where elements are words already, narrower copies leave room for that.
RowsShape DescribeRows(int64_t rows, int64_t width, int64_t left, int64_t gap, int64_t fewest_bytes, int64_t element,
                       int alignment) {
  RowsShape shape{};
  shape.chunk = element == 4 ? 8 : 16;
  while (alignment % shape.chunk != 0 || width * element % shape.chunk != 0) shape.chunk /= 2;
  const int64_t unit = std::max<int64_t>(shape.chunk, fewest_bytes) / element;
  shape.rows = static_cast<int>(rows);
  shape.left = static_cast<int>(CeilDiv(left, unit) * unit);
  shape.pitch = static_cast<int>((CeilDiv(width + gap, unit) | 1) * unit);
  return shape;
}

}  // namespace

TapPlanesShape::TapPlanesShape(const Problem& p, const TapPlanesTile& tile) {
  const int64_t element = BytesOf(p.x_dtype), k = p.kernel_w, stride = p.stride_w;
  threads = tile.planes * tile.walkers * static_cast<int>(k);
  columns = p.out_w <= 7 ? 7 : 14;
  const int64_t whole = CeilDiv(p.out_w, columns) * columns;
  const int64_t before = std::max<int64_t>(0, p.pad_left + stride - 1);
  const int64_t after = (p.out_w - 1) * stride + k - p.pad_left - p.in_w;
  x = DescribeRows(std::min((tile.rows - 1) * stride + k, p.in_h), p.in_w, before,
                   std::max({int64_t{0}, p.pad_left, after}), 4, element, tile.alignment);
  g = DescribeRows(tile.rows, p.out_w, 0, 0, 2 * element, element, tile.alignment);

  // A thread reads whole stretches, and a pair more.
  const int64_t read = x.left - p.pad_left + whole * stride + k + 3;
  const int64_t x_last = (int64_t{tile.planes} * x.rows - 1) * x.pitch,
                g_last = (int64_t{tile.planes} * g.rows - 1) * g.pitch;
  const int64_t x_size = CeilDiv((x_last + std::max(x.left + p.in_w, read)) * element, 16) * 16;
  const int64_t copied = x_size + (g_last + whole + 1) * element;
  const int64_t sums = int64_t{4} * tile.walkers * tile.planes * k * k;
  x_bytes = static_cast<int>(std::min(x_size, kMost));
  bytes = static_cast<int>(std::min(std::max(copied, sums), kMost));
}

std::vector<GradFilterPlan> TapPlanesCandidates(const Problem& p, const Device& device, int64_t alignment,
                                                int64_t max_splits) {
  std::vector<GradFilterPlan> plans;
  if (!TapPlanesApply(p, device)) return plans;
  constexpr int kFewestThreads = 96;
  const auto visit = [&](TapPlanesTile tile, int64_t splits, bool one_launch) {
    tile.splits = static_cast<int>(splits);
    GradFilterPlan plan;
    plan.kernel = GradFilterPlan::Kernel::kTapPlanes;
    plan.splits = splits;
    plan.tap_planes = tile;
    plan.one_launch = one_launch;
    plan.cycles = EstimateTapPlanes(p, tile, one_launch, device);
    plans.push_back(plan);
  };
  const auto visit_splits = [&](const TapPlanesTile& tile) {
    const int64_t pieces = p.images_per_group() * CeilDiv(p.out_h, tile.rows);
    if (pieces > kMost || TapPlanesShape(p, tile).bytes > device.most_shared_memory) return;
    const int64_t most_splits = std::min(pieces, max_splits);
    const int64_t others = CeilDiv(p.channels, tile.planes) * p.groups;
    for (int64_t splits : {1, 2, 4, 8}) {
      if (splits <= most_splits && OneLaunch(splits, others, device)) visit(tile, splits, true);
    }
    int64_t last = 0;
    for (int64_t blocks : {1, 2, 3, 4, 6}) {  // for every multiprocessor
      const int64_t splits = std::min(std::max<int64_t>(1, blocks * device.multiprocessors / others), most_splits);
      // Never a cluster of sixteen: not tried.
      if (splits != last && (splits > 8 || !OneLaunch(splits, others, device))) visit(tile, splits, false);
      last = splits;
    }
  };
  for (int planes : {1, 2, 4, 8, 16, 32}) {
    if (planes >= 2 * p.channels) break;
    for (int walkers : {1, 2, 4, 7, 8, 14, 16, 28}) {
      const int64_t threads = planes * walkers * p.kernel_h;
      if (threads < kFewestThreads || threads > kTapPlanesThreads) continue;
      int64_t last_rows = 0;
      for (int64_t strips = 1; strips <= p.out_h; strips += 1 + strips / 3) {
        const int64_t rows = CeilDiv(p.out_h, strips);
        if (rows < walkers) break;
        if (rows != last_rows) visit_splits({planes, walkers, static_cast<int>(rows), 1, static_cast<int>(alignment)});
        last_rows = rows;
      }
    }
  }
  return plans;
}

}  // namespace dwsconv
