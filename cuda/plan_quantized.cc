#include "cuda/plan_quantized.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/plan_common.h"

namespace dwsconv {
namespace {

constexpr QuantizedTile kInstances[] = {
#define DWSCONV_TILE(kernel_h, kernel_w, columns, ahead) {kernel_h, kernel_w, columns, ahead, 0},
    DWSCONV_QUANTIZED_TILES(DWSCONV_TILE)
#undef DWSCONV_TILE
};

constexpr QuantizedTile kBursts[] = {
#define DWSCONV_TILE(kernel_size, columns, rows) {kernel_size, kernel_size, columns, 0, rows},
    DWSCONV_QUANTIZED_BURST_TILES(DWSCONV_TILE)
#undef DWSCONV_TILE
};

bool OneDimension(const Problem& p) { return p.in_h == 1 && p.out_h == 1 && p.kernel_h == 1 && p.pad_top == 0; }

bool Applies(const Problem& p, int64_t alignment) {
  const bool window_fits = p.stride_h == p.stride_w && p.stride_h <= 2 && p.dilation_h == 1 && p.dilation_w == 1;
  return p.channels_last && p.multiplier == 1 && p.channels % QuantizedTile::kVector == 0 && p.filter.c == 1 &&
         window_fits && IndicesFit(p) && alignment % (QuantizedTile::kVector * BytesOf(p.y_dtype)) == 0;
}

// The smallest instance that holds the filter: its (kernel_h, kernel_w).
bool Suits(const Problem& p, const QuantizedTile& tile) {
  if (p.kernel_h > tile.kernel_h || p.kernel_w > tile.kernel_w) return false;
  if (tile.kernel_h == 1 && p.stride_h == 2 && !OneDimension(p)) return false;
  return std::none_of(std::begin(kInstances), std::end(kInstances), [&](const QuantizedTile& other) {
    const bool holds = p.kernel_h <= other.kernel_h && p.kernel_w <= other.kernel_w;
    const bool usable = other.kernel_h > 1 || p.stride_h == 1 || OneDimension(p);
    return holds && usable && other.kernel_h * other.kernel_w < tile.kernel_h * tile.kernel_w;
  });
}

// Estimated time in cycles. The forms are those of EstimateMarch and EstimateBurst; the constants were fitted to a
// sweep on an H100 (see docs/performance.md).
double Estimate(const Problem& p, const QuantizedTile& tile, const Device& device) {
  constexpr double kThreads = 128, kRegisters = 65536, kMostBlocks = 16, kV = QuantizedTile::kVector;
  const double kh = tile.kernel_h, kw = tile.kernel_w, t = tile.columns, s = p.stride_h;
  const double parts = std::ceil(kw / 4), loads = (t - 1) * s + kw;
  const double source_rows = tile.bursts() ? (tile.rows - 1) * s + kh : tile.rows * s + kh - s;
  const bool shifts = tile.kernel_w == 3 && p.stride_h == 1;

  const double threads = double(p.batch) * CeilDiv(p.out_h, tile.rows) * CeilDiv(p.out_w, tile.columns) *
                         (p.channels / QuantizedTile::kVector);
  const double blocks = std::ceil(threads / kThreads);
  const double held_rows = tile.bursts() ? source_rows : tile.ahead + 1;
  const double held_results = tile.bursts() ? tile.rows : (kh - 1) / s + 1;
  const double registers = 40 + kh * parts * kV * (shifts ? 2 : 1) + held_results * t * kV + held_rows * loads;
  const double resident =
      std::clamp(std::floor(kRegisters / (kThreads * std::min(registers, 255.0))), 1.0, kMostBlocks);
  double waves = std::max(1.0, blocks / (device.multiprocessors * resident));
  if (waves < 4) waves = std::ceil(waves);
  const double active = std::clamp(blocks / device.multiprocessors, 1.0, resident);

  const double quads = kV * (shifts || s == 2 ? 0.5 : 1) * loads;
  const double products = kh * parts * kV * t;  // of one row of results
  double instructions, latency;
  if (tile.bursts()) {
    instructions =
        251 + 34.6 * kh * parts + source_rows * (2.07 * loads + 2.77 * quads) + tile.rows * (0.79 * products + 4 * t);
    latency = 590 + 1.53 * instructions;
  } else {
    instructions = 34.6 * kh * parts + source_rows * (122 + 4.1 * loads + 2.77 * quads + (0.79 * products + 4 * t) / s);
    latency = 970 + source_rows * 530 / tile.ahead + 1.53 * instructions;
  }
  const double compute = waves * std::max(0.89 * instructions * active, latency);
  const double halo = source_rows / (tile.rows * s);
  const double bytes = double(p.x_elements()) * (1 + (tile.bursts() ? 0.22 : 2.3) * (halo - 1)) +
                       double(p.y_elements()) * BytesOf(p.y_dtype);
  const double memory = bytes / (16.7 * device.multiprocessors);
  return 1980 + std::max(compute, memory) + 0.58 * std::min(compute, memory);
}

template <class Visit>
void VisitTiles(const Problem& problem, const Device& device, int64_t alignment, const Visit& visit) {
  const Problem p = Squared(problem);
  if (!Applies(p, alignment)) return;
  const auto visit_if_it_fits = [&](const QuantizedTile& tile) {
    const double threads = double(p.batch) * CeilDiv(p.out_h, tile.rows) * CeilDiv(p.out_w, tile.columns) *
                           (p.channels / QuantizedTile::kVector);
    if (threads <= std::numeric_limits<int32_t>::max()) visit(QuantizedPlan{true, tile, Estimate(p, tile, device)});
  };
  for (QuantizedTile tile : kInstances) {
    if (!Suits(p, tile) || !HasQuantizedInstance(static_cast<int>(p.stride_h), tile.kernel_h, tile.columns, tile.ahead))
      continue;
    ForStripRows(p.out_h, [&](int rows) {
      tile.rows = rows;
      visit_if_it_fits(tile);
    });
  }
  for (const QuantizedTile& tile : kBursts) {
    if (Suits(p, tile)) visit_if_it_fits(tile);
  }
}

}  // namespace

std::string QuantizedPlan::Text() const {
  if (!words) return "gather";
  return tile.bursts() ? "quantized_burst:" + Join({tile.columns, tile.rows})
                       : "quantized:" + Join({tile.columns, tile.ahead, tile.rows});
}

Problem Squared(Problem p) {
  if (OneDimension(p)) p.stride_h = p.stride_w;
  if (p.kernel_h == 1) p.dilation_h = 1;
  if (p.kernel_w == 1) p.dilation_w = 1;
  return p;
}

std::vector<QuantizedPlan> QuantizedCandidates(const Problem& p, const Device& device, int64_t alignment) {
  return Candidates(QuantizedPlan{}, [&](const auto& visit) { VisitTiles(p, device, alignment, visit); });
}

QuantizedPlan PlanQuantized(const Problem& p, const Device& device, int64_t alignment, std::string_view forced) {
  return Choose(forced, QuantizedPlan{}, [&](const auto& visit) { VisitTiles(p, device, alignment, visit); });
}

}  // namespace dwsconv
