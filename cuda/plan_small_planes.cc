// The planner of the NCHW kernel for small planes (small_planes.cuh).
#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/plan_common.h"

namespace dwsconv {
namespace {

bool SmallPlanesApply(const Problem& p, const Device& device) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const bool square = p.kernel_h == p.kernel_w && p.stride_h == 1 && p.stride_w == 1 && UsualWindow(p);
  const bool same = p.in_h == p.out_h && p.in_w == p.out_w && p.pad_top == (p.kernel_h - 1) / 2 &&
                    p.pad_left == (p.kernel_w - 1) / 2 && p.kernel_h % 2 == 1;
  const bool one_type = p.x_dtype == p.y_dtype && p.x_dtype != Dtype::kF64;
  const bool sizes_fit = p.batch <= kMost && IndicesFit(p);
  // Before 8.0 the copies would not run beside the computation.
  return device.capability >= 80 && !p.channels_last && p.multiplier == 1 && p.groups == 1 && !p.has_residual &&
         square && same && one_type && sizes_fit;
}

// How many different words of one bank of shared memory the lanes of a warp meet in when all take the same step.
int BankConflicts(const Problem& p, const SmallPlanesTile& tile, const SmallPlanesShape& shape) {
  constexpr int kLanes = 32, kBanks = 32;
  int64_t words[kLanes];
  int found = 0, most = 1, of_bank[kBanks] = {};
  for (int lane = 0; lane < shape.planes_per_warp * shape.tiles; ++lane) {
    const int64_t element = lane / shape.tiles * p.in_h * p.in_w + lane % shape.tiles * tile.columns;
    const int64_t word = element * BytesOf(p.x_dtype) / 4;
    if (std::find(words, words + found, word) != words + found) continue;
    words[found++] = word;
    most = std::max(most, ++of_bank[word % kBanks]);
  }
  return most;
}

// Estimated time in cycles, fitted like EstimateMarch.
double EstimateSmallPlanes(const Problem& p, const SmallPlanesTile& tile, const SmallPlanesShape& shape, int chunk,
                           const Device& device) {
  constexpr double kRegisters = 65536, kMostBlocks = 32, kMostWarps = 64;
  const double k = p.kernel_h, t = tile.columns, warps = tile.warps, rows = p.in_h;
  const double registers = std::min(30 + k * k + k * t + t, 255.0);
  const double resident = std::clamp(std::floor(std::min({kRegisters / (32 * warps * registers), kMostWarps / warps,
                                                          device.shared_memory / (shape.bytes + 1024.0)})),
                                     1.0, kMostBlocks);
  const double blocks = double(CeilDiv(p.channels, shape.planes)) * CeilDiv(p.batch, tile.images);
  double waves = std::max(1.0, blocks / (device.multiprocessors * resident));
  if (waves < 4) waves = std::ceil(waves);
  const double active = std::clamp(std::ceil(blocks / device.multiprocessors), 1.0, resident);

  const double products = k * k * t * (shape.tiles == 1 ? 0.75 : 1);
  const double converts = BytesOf(p.x_dtype) == 2 ? 1.3 : 1;
  const double instructions = rows * (0.906 * products + 2.93 * (t + k) * converts + 50.2);
  const double copies = double(shape.planes) * shape.plane_bytes / chunk / (32 * warps);  // of a thread
  const double issue = instructions * warps / 4;
  const double shared = 0.807 * BankConflicts(p, tile, shape) * rows * (2 * t + k) * warps;
  const double latency = 306 + 1.68 * instructions + 38 * copies;
  const double images = std::min<double>(tile.images, p.batch);
  const double compute = waves * images * std::max(latency, std::max(issue, shared) * active);
  const double memory = 2.0 * p.x_elements() * BytesOf(p.x_dtype) / (14.2 * device.multiprocessors);
  return 2900 + std::max(compute, memory) + 0.542 * std::min(compute, memory);
}

}  // namespace

SmallPlanesShape::SmallPlanesShape(const Problem& p, const SmallPlanesTile& tile) {
  tiles = static_cast<int>(CeilDiv(p.in_w, tile.columns));
  planes_per_warp = 32 / tiles;
  planes = planes_per_warp * tile.warps;
  plane_bytes = static_cast<int>(p.in_h * p.in_w * BytesOf(p.x_dtype));
  buffer_bytes = static_cast<int>(CeilDiv(planes * plane_bytes, 16) * 16);
  bytes = (std::min<int64_t>(tile.images, p.batch) > 1 ? 2 : 1) * buffer_bytes;
}

int SmallPlanesChunk(const Problem& p, const SmallPlanesShape& shape, int64_t alignment) {
  const int64_t bits = alignment | (shape.planes * int64_t{shape.plane_bytes}) | (p.channels * shape.plane_bytes);
  return static_cast<int>(std::min<int64_t>(16, bits & -bits));
}

std::vector<PassPlan> SmallPlanesCandidates(const Problem& p, const Device& device, int64_t alignment) {
  std::vector<PassPlan> candidates;
  constexpr int64_t kMostBytes = 112 * 1024;  // of an image's part: two blocks of one, or one of two
  constexpr int kColumns[][2] = {
#define DWSCONV_TILE(kernel_size, columns) {kernel_size, columns},
      DWSCONV_SMALL_PLANES_TILES(DWSCONV_TILE)
#undef DWSCONV_TILE
  };
  if (!SmallPlanesApply(p, device)) return candidates;
  for (const auto& [kernel_size, columns] : kColumns) {
    if (kernel_size != p.kernel_h || CeilDiv(p.in_w, columns) > 32 ||
        p.in_h * p.in_w * BytesOf(p.x_dtype) > kMostBytes) {
      continue;
    }
    for (int warps = 1; warps <= kSmallPlanesThreads / 32; warps *= 2) {
      for (int images = 1; images < 2 * p.batch && images <= 64; images *= 2) {
        PassPlan plan;
        plan.kernel = PassPlan::Kernel::kSmallPlanes;
        plan.small_planes = {columns, warps, images};
        const SmallPlanesShape shape(p, plan.small_planes);
        const bool too_many = warps > 1 && shape.planes >= 2 * p.channels;
        if (too_many || int64_t{shape.planes} * shape.plane_bytes > kMostBytes ||
            shape.bytes > device.most_shared_memory) {
          continue;
        }
        const int chunk = SmallPlanesChunk(p, shape, alignment);
        if (chunk < 4) continue;
        plan.cycles = EstimateSmallPlanes(p, plan.small_planes, shape, chunk, device);
        candidates.push_back(plan);
      }
    }
  }
  return candidates;
}

}  // namespace dwsconv
