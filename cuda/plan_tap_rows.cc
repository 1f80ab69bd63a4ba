// The planner of the kernel of grad_filter that computes from shared memory (tap_rows.cuh).
#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/plan_common.h"

namespace dwsconv {
namespace {

bool TapRowsApply(const Problem& p, const Device& device, int64_t alignment) {
  const bool one_type = p.x_dtype == p.y_dtype && p.x_dtype != Dtype::kF64;
  const bool has_instance = p.kernel_h == p.kernel_w && (p.kernel_h == 3 || p.kernel_h == 5 || p.kernel_h == 7);
  const bool empty = p.x_elements() == 0 || p.y_elements() == 0;
  return device.capability >= 80 && p.channels_last && p.multiplier == 1 && has_instance && UsualWindow(p) &&
         one_type && IndicesFit(p) && !empty && p.channels * BytesOf(p.x_dtype) % 16 == 0 && alignment % 16 == 0;
}

// What was fitted, for a size of dtype.
struct TapRowsCosts {
  double product, load, row, copy, transaction;                                                // instructions
  double latency, copy_latency, bytes_per_cycle_of_copy, chain, issue, end_block, end_walker;  // of a piece, of a block
  double halo, short_pixels, bytes_per_cycle, bytes_per_cycle_of_cache;
  double start, cluster, cluster_warp, second_launch, per_part, overlap;
};
constexpr TapRowsCosts kTapRows32{1,    0.847,  9.2,  24.6, 1.01, 1310, 1,    104, 1.93, 0.248, 2370,
                                  9.25, 0.0389, 11.3, 15,   21.2, 1030, 1540, 123, 3270, 0.74,  0.52};
constexpr TapRowsCosts kTapRows16{1.08, 0.8,    36,   6.9, 1.32, 1500, 1,    66.7, 3.09, 0.38, 1000,
                                  1,    0.0466, 10.3, 15,  16.9, 2800, 1060, 96.6, 2980, 0.5,  0.617};

// Estimated time in cycles; infinite where a cluster does not fit the device. Fitted like EstimateStaged.
double EstimateTapRows(const Problem& p, const TapRowsTile& tile, bool one_launch, const Device& device) {
  constexpr double kRegisters = 65536, kMostThreads = 2048, kColumns = TapRowsTile::kColumns;
  const TapRowsShape shape(p, tile);
  const TapRowsCosts& cost = BytesOf(p.x_dtype) == 2 ? kTapRows16 : kTapRows32;
  const double k = p.kernel_h, stride = p.stride_h, bytes = BytesOf(p.x_dtype);
  const int channels = tile.lanes * tile.kVector;
  const double pieces = double(p.images_per_group()) * CeilDiv(p.out_h, tile.rows) * CeilDiv(p.out_w, tile.columns);
  const double blocks = double(CeilDiv(p.channels, channels)) * p.groups * tile.splits;

  // Of one thread and one piece.
  const auto copied = [&](int64_t rows, int64_t columns) {
    const int64_t row_chunks = static_cast<int64_t>(channels * bytes / 16) * columns;
    return double(CeilDiv(row_chunks, shape.threads)) * CeilDiv(rows, std::max<int64_t>(1, shape.threads / row_chunks));
  };
  const double copies = copied(shape.x_rows, shape.x_columns) + copied(tile.rows, tile.columns);
  const double loads = kColumns * (1 + stride);
  const double stretches = CeilDiv(tile.columns, tile.kColumns);
  const double row = cost.row + stretches * (cost.product * kColumns * tile.kVector * k + cost.load * loads);
  const double mean_rows = double(tile.rows) / tile.walkers;
  const double instructions = mean_rows * row + cost.copy * copies,
               most_instructions = std::ceil(mean_rows) * row + cost.copy * copies;
  const double transactions =
      cost.transaction * mean_rows * stretches * loads * std::max(1.0, tile.kVector * bytes / 4);

  const double warps = CeilDiv(shape.threads, 32), registers = 49 + 4.5 * k;
  const double resident =
      std::max(1.0, std::floor(std::min({device.shared_memory / (shape.bytes + 1024.0), kMostThreads / (32 * warps),
                                         kRegisters / (registers * 32 * warps)})));
  constexpr double kMostRegisters = kRegisters / kTapRowsThreads;  // the estimate is no bound
  const double certain =
      std::floor(std::min(device.shared_memory / (shape.bytes + 1024.0), kRegisters / (kMostRegisters * 32 * warps)));
  if (one_launch && !ClusterFits(tile.splits, certain)) return std::numeric_limits<double>::infinity();
  // A cluster stays within a group of 16 to 18 multiprocessors, which it may not fill.
  const double usable = one_launch && tile.splits > 1 ? 0.95 : 1;
  double waves = std::max(1.0, blocks / (device.multiprocessors * resident * usable));
  if (waves < 3) waves = std::ceil(waves);
  const double active = std::clamp(std::ceil(blocks / device.multiprocessors), 1.0, resident);
  const double x_pixels = double(shape.x_rows) * shape.x_columns, g_pixels = double(tile.rows) * tile.columns;
  const double own = warps * std::max(cost.issue * instructions, transactions);  // alone on a multiprocessor
  const double latency = cost.latency + cost.copy_latency * copies +
                         (x_pixels + g_pixels) * channels * bytes / cost.bytes_per_cycle_of_copy +
                         std::max(cost.chain * most_instructions, own);
  const double piece = std::max(own * active, latency);
  const double compute =
      waves * (std::ceil(pieces / tile.splits) * piece + cost.end_block + cost.end_walker * tile.walkers * k);

  const double x_bytes = double(p.x_elements()) * bytes, g_bytes = double(p.y_elements()) * bytes;
  const double halo = x_pixels / (g_pixels * stride * stride),
               short_pixels = 1 + cost.short_pixels / (channels * bytes);
  const double memory =
      std::max((x_bytes * (1 + cost.halo * (halo - 1)) + g_bytes) * short_pixels / cost.bytes_per_cycle,
               (x_bytes * halo + g_bytes) / cost.bytes_per_cycle_of_cache) /
      device.multiprocessors;
  const double end =
      !one_launch ? cost.second_launch + cost.per_part * tile.splits * p.filter_elements() / device.multiprocessors
      : tile.splits > 1 ? cost.cluster + cost.cluster_warp * warps
                        : 0;
  return cost.start + end + std::max(compute, memory) + cost.overlap * std::min(compute, memory);
}

}  // namespace

TapRowsShape::TapRowsShape(const Problem& p, const TapRowsTile& tile) {
  const int taps = static_cast<int>(p.kernel_h * p.kernel_w), channels = tile.lanes * tile.kVector;
  const int stride = static_cast<int>(p.stride_w);
  const int whole = static_cast<int>(CeilDiv(tile.columns, tile.kColumns)) * tile.kColumns;
  threads = tile.lanes * tile.walkers * static_cast<int>(p.kernel_h);
  x_rows = static_cast<int>((tile.rows - 1) * p.stride_h + p.kernel_h);
  x_columns = static_cast<int>((tile.columns - 1) * stride + p.kernel_w);
  const int64_t element = BytesOf(p.x_dtype), pixel = channels * element;  // a thread reads whole stretches
  x_pitch = static_cast<int>(SpreadPitch((whole * stride + p.kernel_w - stride) * pixel, pixel, 1) / element);
  g_pitch = whole * channels;
  const int64_t copied = (x_rows * x_pitch + tile.rows * g_pitch) * element,
                sums = int64_t{4} * tile.walkers * taps * channels;
  bytes = static_cast<int>(std::max(copied, sums));
}

std::vector<GradFilterPlan> TapRowsCandidates(const Problem& p, const Device& device, int64_t alignment,
                                              int64_t max_splits) {
  std::vector<GradFilterPlan> plans;
  if (!TapRowsApply(p, device, alignment)) return plans;
  constexpr int kFewestThreads = 96, kMostThreads = 448, kFewestBytes = 32;  // of a pixel
  static_assert(kMostThreads <= kTapRowsThreads);
  const auto visit = [&](TapRowsTile tile, int64_t splits, bool one_launch) {
    tile.splits = static_cast<int>(splits);
    GradFilterPlan plan;
    plan.kernel = GradFilterPlan::Kernel::kTapRows;
    plan.splits = splits;
    plan.tap_rows = tile;
    plan.one_launch = one_launch;
    plan.cycles = EstimateTapRows(p, tile, one_launch, device);
    if (std::isfinite(plan.cycles)) plans.push_back(plan);
  };
  const auto visit_splits = [&](const TapRowsTile& tile) {
    if (TapRowsShape(p, tile).bytes > device.most_shared_memory) return;
    const int64_t pieces = p.images_per_group() * CeilDiv(p.out_h, tile.rows) * CeilDiv(p.out_w, tile.columns);
    const int64_t most_splits = std::min(pieces, max_splits);
    const int64_t others = CeilDiv(p.channels, tile.lanes * tile.kVector) * p.groups;
    for (int64_t splits : {1, 2, 4, 8, 16}) {
      if (splits <= most_splits && OneLaunch(splits, others, device)) visit(tile, splits, true);
    }
    int64_t last = 0;
    for (int64_t blocks : {1, 2, 3, 4, 6}) {  // for every multiprocessor
      const int64_t splits = std::min(std::max<int64_t>(1, blocks * device.multiprocessors / others), most_splits);
      if (splits != last && !OneLaunch(splits, others, device)) visit(tile, splits, false);
      last = splits;
    }
  };
  for (int lanes : {4, 8, 16, 32}) {
    if (lanes * TapRowsTile::kVector * BytesOf(p.x_dtype) < kFewestBytes) continue;
    for (int walkers : {1, 2, 3, 4, 5, 7, 8, 14}) {
      const int64_t threads = lanes * walkers * p.kernel_h;
      if (threads < kFewestThreads || threads > kMostThreads) continue;
      for (int64_t stretches = 1, last_columns = 0; stretches <= 64; stretches *= 2) {
        const int64_t columns = CeilDiv(p.out_w, stretches);
        if (columns == last_columns || (stretches > 1 && columns < 2 * TapRowsTile::kColumns)) break;
        last_columns = columns;
        if (columns > 128) continue;
        int64_t last_rows = 0;
        for (int64_t strips = 1; strips <= p.out_h; strips += 1 + strips / 3) {
          const int64_t rows = CeilDiv(p.out_h, strips);
          if (rows < walkers && strips > 1) break;
          if (rows != last_rows && rows <= 64) {
            visit_splits({lanes, walkers, static_cast<int>(rows), static_cast<int>(columns), 1});
          }
          last_rows = rows;
        }
      }
    }
  }
  return plans;
}

}  // namespace dwsconv
