// The planner of the kernel that computes from shared memory (staged.cuh).
#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/plan_common.h"

namespace dwsconv {
namespace {

struct StagedInstance {
  int kernel_size, vector, columns, rows;
};

constexpr StagedInstance kStagedInstances[] = {
#define DWSCONV_TILE(kernel_size, vector, columns, rows) {kernel_size, vector, columns, rows},
    DWSCONV_STAGED_TILES(DWSCONV_TILE)
#undef DWSCONV_TILE
};

bool StagedApplies(const Problem& p, bool forward, const Device& device, int64_t alignment) {
  const bool one_type = p.x_dtype == p.y_dtype && p.x_dtype != Dtype::kF64;
  return device.capability >= 80 && p.channels_last && p.multiplier == 1 && p.kernel_h == p.kernel_w &&
         UsualWindow(p) && (forward || p.stride_h == 1) && one_type && IndicesFit(p) && p.filter.c == 1 &&
         p.channels * BytesOf(p.x_dtype) % 16 == 0 && alignment % 16 == 0;
}

// Estimated time in cycles; infinite where the tile does not fit the device. The form follows from what the kernel
// does; the constants were fitted to a sweep on an H100 (see docs/performance.md).
double EstimateStaged(const Problem& p, bool forward, const StagedTile& tile, const Device& device) {
  const StagedShape shape(p, tile);
  if (shape.bytes > device.most_shared_memory) return std::numeric_limits<double>::infinity();
  constexpr double kRegisters = 65536, kMostThreads = 2048, kMostBlocks = 32;
  const double k = p.kernel_h, stride = p.stride_h, v = tile.vector, bytes = BytesOf(p.x_dtype);
  const int64_t rows = forward ? p.out_h : p.in_h, columns = forward ? p.out_w : p.in_w;
  const int channels = tile.lanes * tile.vector, threads = tile.lanes * tile.across * tile.down;
  const double blocks = double(p.batch) * CeilDiv(p.channels, channels) * CeilDiv(rows, tile.rows * tile.down) *
                        CeilDiv(columns, tile.columns * tile.across);

  const double pixels = ((tile.rows - 1) * stride + k) * ((tile.columns - 1) * stride + k),
               results = tile.columns * tile.rows;
  const int pixel_chunks = static_cast<int>(channels * bytes / 16), row_chunks = pixel_chunks * shape.read_columns;
  const double copies =
      double(CeilDiv(row_chunks, threads)) * CeilDiv(shape.read_rows, std::max(1, threads / row_chunks));
  const double filter_copies = CeilDiv(p.kernel_h * p.kernel_w * pixel_chunks, threads);
  const double conversion = bytes == 2 ? 1.29 * v : 0;
  const double taps = k * k, instructions = 88 + 1.39 * taps * results * v + pixels * (1.42 + conversion) +
                                            taps * (0.55 + 0.24 * v) + results * (5.5 + 0.04 * v) + 15 * copies +
                                            59 * filter_copies;
  const double transactions = 1.67 * pixels * std::max(1.0, v * bytes / 4) + 0.74 * taps * v;

  const double warps = CeilDiv(threads, 32);
  const double registers = std::max(40.0, 12 + 1.6 * results * v + 1.2 * ((tile.columns - 1) * stride + k) * v);
  const double resident =
      std::clamp(std::floor(std::min({device.shared_memory / (shape.bytes + 1024.0), kMostThreads / (32 * warps),
                                      kRegisters / (registers * 32 * warps)})),
                 1.0, kMostBlocks);
  const double per_multiprocessor = blocks / device.multiprocessors;
  const double waves = std::max(1.0, per_multiprocessor / resident);
  const double active = std::clamp(per_multiprocessor, 1.0, resident);
  const double latency = 1260 + 24 * copies + 102 * filter_copies + 1.8 * instructions;
  const double compute =
      waves * std::max({0.27 * warps * instructions * active, warps * transactions * active, latency});

  const double source = double(forward ? p.x_elements() : p.y_elements()) * bytes,
               result = double(forward ? p.y_elements() : p.x_elements()) * bytes;
  const double halo = double(shape.read_rows) * shape.read_columns /
                      (tile.rows * tile.down * stride * tile.columns * tile.across * stride);
  const double short_pixels = 1 + 1.67 / (channels * bytes);
  const double memory =
      std::max((source * (1 + 0.145 * (halo - 1)) + result) * short_pixels / 15.4, (source * halo + result) / 19.6) /
      device.multiprocessors;
  return 2120 + std::max(compute, memory) + 0.37 * std::min(compute, memory);
}

}  // namespace

StagedShape::StagedShape(const Problem& p, const StagedTile& tile) {
  read_rows = static_cast<int>((tile.rows * tile.down - 1) * p.stride_h + p.kernel_h);
  read_columns = static_cast<int>((tile.columns * tile.across - 1) * p.stride_w + p.kernel_w);
  const int64_t element = BytesOf(p.x_dtype), channels = tile.lanes * tile.vector;
  pitch = static_cast<int>(SpreadPitch(read_columns * channels * element, channels * element, tile.rows * p.stride_h) /
                           element);
  bytes = static_cast<int>(read_rows * pitch * element + p.kernel_h * p.kernel_w * channels * 4);
}

std::vector<PassPlan> StagedCandidates(const Problem& p, bool forward, const Device& device, int64_t alignment) {
  std::vector<PassPlan> plans;
  if (!StagedApplies(p, forward, device, alignment)) return plans;
  constexpr int kFewestThreads = 64, kMostThreads = 256, kFewestBytes = 64;  // of a pixel
  static_assert(kMostThreads <= kStagedThreads);
  const int64_t rows = forward ? p.out_h : p.in_h, columns = forward ? p.out_w : p.in_w;
  for (const StagedInstance& instance : kStagedInstances) {
    if (instance.kernel_size != p.kernel_h || p.channels % instance.vector != 0) continue;
    for (int lanes : {8, 16, 32}) {
      if (lanes * instance.vector * BytesOf(p.x_dtype) < kFewestBytes) continue;
      for (int across : {1, 2, 3, 4, 5}) {
        if ((across - 1) * instance.columns >= columns) break;
        for (int down : {1, 2, 3, 4, 5, 7, 10, 14}) {
          const int threads = lanes * across * down;
          if (threads > kMostThreads || (down - 1) * instance.rows >= rows) break;
          if (threads < kFewestThreads) continue;
          const StagedTile tile{instance.vector, instance.columns, instance.rows, lanes, across, down};
          const double cycles = EstimateStaged(p, forward, tile, device);
          if (!std::isfinite(cycles)) continue;
          PassPlan plan;
          plan.kernel = PassPlan::Kernel::kStaged;
          plan.staged = tile;
          plan.cycles = cycles;
          plans.push_back(plan);
        }
      }
    }
  }
  return plans;
}

}  // namespace dwsconv
