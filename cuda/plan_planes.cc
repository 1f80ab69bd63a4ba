// The planner of the NCHW kernels of stride 1 that march down the rows (march_planes.cuh, toeplitz_planes.cuh).
#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/plan_common.h"

namespace dwsconv {
namespace {

constexpr int kMarchPlanesInstances[][2] = {
#define DWSCONV_TILE(kernel_size, columns) {kernel_size, columns},
    DWSCONV_MARCH_PLANES_TILES(DWSCONV_TILE)
#undef DWSCONV_TILE
};

constexpr ToeplitzPlanesTile kToeplitzPlanesInstances[] = {
#define DWSCONV_TILE(kernel_size, access) {kernel_size, access, 0},
    DWSCONV_TOEPLITZ_PLANES_TILES(DWSCONV_TILE)
#undef DWSCONV_TILE
};

// NCHW, stride 1, as many columns in the result as in the source, the same padding on both sides.
bool MarchPlanesApply(const Problem& p, bool forward) {
  const bool same = p.kernel_h == p.kernel_w && p.in_w == p.out_w && p.pad_left == (p.kernel_w - 1) / 2;
  const bool one_type = p.x_dtype == p.y_dtype;
  return !p.channels_last && p.stride_h == 1 && p.stride_w == 1 && same && one_type && MarchApplies(p, forward);
}

// Estimated time in cycles, fitted like EstimateMarch.
double EstimateMarchPlanes(const Problem& p, const PassSizes& m, const MarchPlanesTile& tile, const Device& device) {
  constexpr double kThreads = 128, kRegisters = 65536, kMostBlocks = 16;
  const double k = m.kernel_h, t = tile.columns, bytes = m.source_bytes;
  const double rows_per_warp = std::floor(32 * t / p.in_w), warps_per_block = kThreads / 32;
  const double units = double(p.batch) * p.channels * CeilDiv(m.rows, tile.rows);
  const double blocks = std::ceil(units / rows_per_warp / warps_per_block);
  const double registers = std::min(28 + k * k + k * t + 2 * t, 255.0);
  const double shared = kRingRows * kThreads * t * bytes + 1024;
  const double resident = std::clamp(
      std::floor(std::min(kRegisters / (kThreads * registers), device.shared_memory / shared)), 1.0, kMostBlocks);
  double waves = std::max(1.0, blocks / (device.multiprocessors * resident));
  if (waves < 4) waves = std::ceil(waves);
  const double active = std::clamp(std::ceil(blocks / device.multiprocessors), 1.0, resident);
  const double source_rows = tile.rows + k - 1;
  const double instructions = 485 + 18.3 * k * k + source_rows * (2.96 * k * k * t + 8.2 * (k - 1) + 174);
  const double ahead = device.capability >= 80 ? kRingRows : 1;  // before, a row is copied through registers
  const double latency = 44 + source_rows / ahead * 424 + 0.254 * instructions;
  const double wide = t * bytes > 16 ? 1.21 : 1;  // lanes that are two transactions apart
  const double compute = wide * waves * std::max(0.241 * instructions * active, latency);
  // The larger the part of the tensor that is read at a time, the less memory delivers: strips at different heights of
  // many planes open many of its pages.
  const double megabytes =
      active * device.multiprocessors * warps_per_block * rows_per_warp * tile.rows * m.columns * bytes / 1e6;
  const double spread = 1 + 0.634 * megabytes / (megabytes + 30);
  const double traffic = m.source_elements * (1 + 0.095 * (k - 1) / tile.rows) + m.result_elements;
  const double memory = wide * spread * traffic * bytes / (20.5 * device.multiprocessors);
  return 2950 + std::max(compute, memory) + 0.482 * std::min(compute, memory);
}

template <class Visit>
void VisitMarchPlanes(const Problem& p, bool forward, const Device& device, int64_t alignment, const Visit& visit) {
  if (!MarchPlanesApply(p, forward)) return;
  const PassSizes m(p, forward);
  for (const auto& [kernel_size, columns] : kMarchPlanesInstances) {
    MarchPlanesTile tile{columns, 0};
    if (kernel_size != p.kernel_h || p.in_w % tile.columns != 0 || p.in_w / tile.columns > 32 ||
        alignment % std::min<int64_t>(16, tile.columns * m.source_bytes) != 0) {
      continue;
    }
    ForStripRows(m.rows, [&](int rows) {
      tile.rows = rows;
      const double cycles = EstimateMarchPlanes(p, m, tile, device);
      PassPlan plan = PlanFor(PassPlan::Kernel::kMarchPlanes, cycles);
      plan.march_planes = tile;
      visit(plan);
    });
  }
}

bool ToeplitzPlanesApply(const Problem& p, const Device& device, int64_t alignment) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const bool half_types =
      (p.x_dtype == Dtype::kBF16 || p.x_dtype == Dtype::kF16) && p.filter_dtype == p.x_dtype && p.y_dtype == p.x_dtype;
  const bool plain = p.stride_h == 1 && p.stride_w == 1 && p.dilation_h == 1 && p.dilation_w == 1;
  const bool sizes_fit = IndicesFit(p) && p.x_elements() < kMost && p.y_elements() < kMost;
  return device.capability >= 80 && !p.channels_last && p.multiplier == 1 && p.groups == 1 && half_types && plain &&
         sizes_fit && alignment % 4 == 0;
}

// Estimated time in cycles, fitted like EstimateMarch.
double EstimateToeplitzPlanes(const Problem& p, const PassSizes& m, const ToeplitzPlanesTile& tile,
                              const Device& device) {
  constexpr double kRegisters = 65536, kMostBlocks = 16, kThreads = 128;
  const double k = tile.kernel_size;
  const double units = double(p.batch) * CeilDiv(m.columns, ToeplitzPlanesTile::kColumns) * CeilDiv(m.rows, tile.rows);
  const double blocks = std::ceil(p.channels * std::ceil(units / ToeplitzPlanesTile::kMarchers) / (kThreads / 32));
  const double shared = kRingRows * kThreads * (tile.access == 1 ? 32 : 16) + 1024;
  const double resident = std::clamp(
      std::floor(std::min(kRegisters / (kThreads * (54 + 7.5 * k)), device.shared_memory / shared)), 1.0, kMostBlocks);
  double waves = std::max(1.0, blocks / (device.multiprocessors * resident));
  if (waves < 4) waves = std::ceil(waves);
  const double active = std::clamp(std::ceil(blocks / device.multiprocessors), 1.0, resident);
  const double source_rows = tile.rows + k - 1;
  const double copies = tile.access == 4 ? 0 : tile.access == 2 ? 1 : 4.05;
  const double instructions = 87 + source_rows * (111 + 3.2 * k + 64.9 * copies);
  const double latency = source_rows / kRingRows * 1370 + 0.856 * instructions;
  const double compute = waves * std::max(0.885 * instructions * active, latency);
  const double traffic = m.source_elements * (1 + 2.52 * (k - 1) / tile.rows) + m.result_elements;
  const double memory = traffic * m.source_bytes / (24.3 * device.multiprocessors);
  return 3320 + std::max(compute, memory) + 0.615 * std::min(compute, memory);
}

template <class Visit>
void VisitToeplitzPlanes(const Problem& p, bool forward, const Device& device, int64_t alignment, const Visit& visit) {
  if (!ToeplitzPlanesApply(p, device, alignment)) return;
  const PassSizes m(p, forward);
  const int64_t source_w = forward ? p.in_w : p.out_w, pad_left = forward ? p.pad_left : p.kernel_w - 1 - p.pad_left;
  for (const ToeplitzPlanesTile& instance : kToeplitzPlanesInstances) {
    ToeplitzPlanesTile tile = instance;
    const int64_t margin = ToeplitzPlanesMargin(static_cast<int>(pad_left), tile.access);
    const int64_t reads = margin - pad_left + ToeplitzPlanesTile::kColumns + p.kernel_w - 1;
    const int64_t together = tile.access * m.source_bytes;
    const bool smallest =
        tile.kernel_size >= p.kernel_h && (tile.kernel_size == 3 || tile.kernel_size < p.kernel_h + 2);
    const bool rows_fit = source_w % tile.access == 0 && (tile.access == 1 || m.columns % 2 == 0);
    if (!smallest || !rows_fit || reads > ToeplitzPlanesTile::kPixels ||
        alignment % std::max<int64_t>(4, together) != 0)
      continue;
    ForStripRows(m.rows, [&](int rows) {
      tile.rows = rows;
      PassPlan plan = PlanFor(PassPlan::Kernel::kToeplitzPlanes, EstimateToeplitzPlanes(p, m, tile, device));
      plan.toeplitz_planes = tile;
      visit(plan);
    });
  }
}

}  // namespace

std::vector<PassPlan> PlanesCandidates(const Problem& p, bool forward, const Device& device, int64_t alignment) {
  std::vector<PassPlan> candidates;
  const auto visit = [&](const PassPlan& plan) { candidates.push_back(plan); };
  VisitMarchPlanes(p, forward, device, alignment, visit);
  VisitToeplitzPlanes(p, forward, device, alignment, visit);
  return candidates;
}

}  // namespace dwsconv
