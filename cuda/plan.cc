#include "cuda/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

namespace dwsconv {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr MarchTile kMarchTiles3[] = {
#define DWSCONV_TILE(vector, columns, ahead) {vector, columns, ahead, 0},
    DWSCONV_MARCH_TILES_3(DWSCONV_TILE)};
constexpr MarchTile kMarchTiles5[] = {DWSCONV_MARCH_TILES_5(DWSCONV_TILE)};
constexpr MarchTile kMarchTiles7[] = {DWSCONV_MARCH_TILES_7(DWSCONV_TILE)};

int64_t BytesOf(Dtype dtype) { return dtype == Dtype::kF64 ? 8 : dtype == Dtype::kF32 ? 4 : 2; }

// What a kernel reads and writes: x and y for forward, the reverse for grad_input.
struct March {
  March(const Problem& p, bool forward)
      : kernel(p.kernel_h),
        stride(p.stride_h),
        doubles(!forward && stride == 2),
        source_bytes(BytesOf(forward ? p.x_dtype : p.y_dtype)),
        result_bytes(BytesOf(forward ? p.y_dtype : p.x_dtype)),
        source_elements(forward ? p.x_elements() : p.y_elements()),
        result_elements(forward ? p.y_elements() : p.x_elements()),
        rows(forward ? p.out_h : p.in_h),
        columns(forward ? p.out_w : p.in_w) {
    if (doubles) {  // rows and columns of g, see march.cuh
      rows = CeilDiv(p.pad_top + rows, 2) - p.pad_top / 2;
      columns = CeilDiv(p.pad_left + columns, 2) - p.pad_left / 2;
    }
  }

  int64_t kernel, stride;
  bool doubles;
  int64_t source_bytes, result_bytes, source_elements, result_elements;
  int64_t rows, columns;
};

// Estimated time in cycles. The form follows from what the kernel does; the constants were fitted to a sweep of all
// tiles over the layers of benchmarks/operators.py on an H100 (see docs/performance.md).
double EstimateMarch(const Problem& p, const March& m, const MarchTile& tile, const Device& device) {
  constexpr double kThreads = 128, kRegisters = 65536, kMostBlocks = 16;
  const double k = m.kernel, v = tile.vector, t = tile.columns;
  const double loads = m.doubles ? t + (m.kernel - 1) / 2 : (t - 1) * m.stride + k;
  const double results = m.doubles ? 4 * t : t / m.stride;  // stores per source row
  const double products = m.doubles ? k * k * t : k * k * t / m.stride;
  const double places = m.doubles ? 2 * (k - 2) : (m.kernel - 1) / m.stride + 1;
  const double source_rows = m.doubles ? tile.rows + (m.kernel - 1) / 2 : tile.rows * m.stride + k - m.stride;

  const double threads =
      double(p.batch) * CeilDiv(m.rows, tile.rows) * CeilDiv(m.columns, tile.columns) * (p.channels / tile.vector);
  const double blocks = std::ceil(threads / kThreads);
  const double registers =
      69 + k * k * v + places * t * v + loads * v + tile.ahead * loads * std::max(1.0, v * m.source_bytes / 4.0);
  const double resident =
      std::clamp(std::floor(kRegisters / (kThreads * std::min(registers, 255.0))), 1.0, kMostBlocks);
  double waves = std::max(1.0, blocks / (device.multiprocessors * resident));
  if (waves < 4) waves = std::ceil(waves);
  const double active = std::max(1.0, std::min(resident, blocks / device.multiprocessors));

  const bool converts = m.source_bytes == 2;
  const double per_row = products * v + loads * (6 + (converts ? 0.75 * v : 0)) + results * (4 + 0.7 * v) + 57;
  const double instructions = 760 + 2.4 * k * k * v + source_rows * per_row;
  const double issue = 1.36 * instructions * active;
  const double latency = 590 + source_rows * 970 / tile.ahead + 1.8 * instructions;
  const double compute = waves * std::max(issue, latency);

  constexpr double kBytesPerCycle = 19.5;  // of one multiprocessor
  const double halo = source_rows / (double(tile.rows) * (m.doubles ? 1 : m.stride));
  const double bytes =
      m.source_elements * m.source_bytes * (1 + 0.78 * (halo - 1)) + m.result_elements * double(m.result_bytes);
  const double memory = bytes / (kBytesPerCycle * device.multiprocessors);
  return std::max(compute, memory) + 0.12 * std::min(compute, memory);
}

bool MarchApplies(const Problem& p, bool forward) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  const bool usual_kernel = p.kernel_h == p.kernel_w && (p.kernel_h == 3 || p.kernel_h == 5 || p.kernel_h == 7);
  const bool usual_window = p.stride_h == p.stride_w && p.stride_h <= 2 && p.dilation_h == 1 && p.dilation_w == 1;
  const bool pads_fit = forward || p.stride_h == 1 || (p.pad_top >= 0 && p.pad_left >= 0);
  const bool sizes_fit = p.x.n <= kLargest && p.y.n <= kLargest && p.x_elements() <= kLargest * 2 &&
                         p.y_elements() <= kLargest * 2 &&
                         std::max(std::abs(p.pad_top), std::abs(p.pad_left)) <= 1 << 20;
  return p.channels_last && p.multiplier == 1 && usual_kernel && usual_window && pads_fit && sizes_fit;
}

}  // namespace

std::optional<MarchTile> PlanMarch(const Problem& p, bool forward, const Device& device, int64_t alignment) {
  if (!MarchApplies(p, forward)) return std::nullopt;
  const March m(p, forward);
  const auto choose = [&](auto& tiles) {
    std::optional<MarchTile> best;
    double least = 0;
    for (MarchTile tile : tiles) {
      const int64_t widest = tile.vector * std::max(m.source_bytes, m.result_bytes);
      if (p.channels % tile.vector != 0 || alignment % widest != 0) continue;
      for (int64_t strips = 1, last = 0; strips <= m.rows; strips += 1 + strips / 4) {
        tile.rows = static_cast<int>(CeilDiv(m.rows, strips));
        if (tile.rows == last) continue;
        last = tile.rows;
        const double cycles = EstimateMarch(p, m, tile, device);
        if (!best || cycles < least) {
          best = tile;
          least = cycles;
        }
      }
    }
    return best;
  };
  return p.kernel_h == 3 ? choose(kMarchTiles3) : p.kernel_h == 5 ? choose(kMarchTiles5) : choose(kMarchTiles7);
}

GradFilterPlan PlanGradFilter(const Problem& p, const Device& device, int64_t max_splits) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;  // 2048 threads
  constexpr int64_t kTermsPerSum = 64;
  GradFilterPlan plan{};
  plan.piece_width = p.channels_last ? kTermsPerSum : kTermsPerSum * GradFilterPlan::kLanes;
  plan.pieces_per_row = CeilDiv(p.out_w, plan.piece_width);
  plan.pieces = p.images_per_group() * p.out_h * plan.pieces_per_row;
  plan.tap_tiles = CeilDiv(p.kernel_w, GradFilterPlan::kTapsPerThread);
  plan.channel_tiles = p.channels_last ? CeilDiv(p.out_channels(), GradFilterPlan::kLanes) : p.out_channels();
  const int64_t blocks_per_split = p.groups * p.kernel_h * plan.tap_tiles * plan.channel_tiles;
  const int64_t wanted =
      CeilDiv(device.multiprocessors * kBlocksPerMultiprocessor, std::max<int64_t>(1, blocks_per_split));
  const int64_t useful = CeilDiv(plan.pieces, GradFilterPlan::kWarps);
  plan.splits = std::max<int64_t>(1, std::min({wanted, useful, max_splits}));
  plan.blocks = plan.splits * blocks_per_split;
  return plan;
}

}  // namespace dwsconv
