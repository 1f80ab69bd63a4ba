#include "cuda/plan_pointwise.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "cuda/plan_common.h"

namespace dwsconv {
namespace {

constexpr int kReserved = 1024;            // bytes of shared memory that every block takes besides
constexpr int kMostKeptBytes = 64 * 1024;  // of a block that keeps the kernel

// Cycles, fitted to a sweep on one H100 (docs/performance.md): a chunk, the same chunk of every further block of the
// multiprocessor and a step of it; and a byte of source, kernel and result.
struct TileCosts {
  double chunk, further_chunk, further_step, byte;
};
struct Costs {
  double launch;
  TileCosts tiles[5];  // in the order of DWSCONV_POINTWISE_TILES
};
constexpr Costs kCosts16 = {3515,
                            {{819, 213, 24, 1.16e-3},
                             {571, 35, 77, 1.08e-3},
                             {1643, 480, 61, 0.82e-3},
                             {1149, 388, 36, 0.81e-3},
                             {1844, 57, 29, 0.85e-3}}};
constexpr Costs kCosts32 = {3664,
                            {{824, 142, 44, 0.76e-3},
                             {574, 113, 39, 0.78e-3},
                             {1725, 521, 119, 0.65e-3},
                             {1214, 425, 42, 0.71e-3},
                             {2074, 1455, 0, 0.60e-3}}};

constexpr double kGateCost = 1.25;  // times as long

double TileCycles(const PointwiseProblem& p, const PointwiseTile& tile, const PointwiseShape& shape, int number,
                  const Device& device) {
  const int element = static_cast<int>(BytesOf(p.dtype));
  const Costs& costs = element == 4 ? kCosts32 : kCosts16;
  const TileCosts& cost = costs.tiles[number];
  const double chunks = static_cast<double>(CeilDiv(p.channels, tile.channels(element)));
  const double steps = static_cast<double>(CeilDiv(p.channels * element, 32));
  const double rounds = static_cast<double>(CeilDiv(shape.pixel_tiles, shape.down));
  const double blocks = static_cast<double>(CeilDiv(shape.down * shape.feature_tiles, device.multiprocessors));
  const double further = (blocks - 1) * (cost.further_chunk * chunks + cost.further_step * steps);
  const double tiles = rounds * (cost.chunk * chunks + further) * (p.gated ? kGateCost : 1);
  const double bytes = static_cast<double>(element) *
                       static_cast<double>(p.pixels() * (p.channels + p.features) + p.channels * p.features);
  return costs.launch + std::hypot(tiles, bytes * cost.byte);
}

double SplitCycles(const PointwiseProblem& p, int features, const Device& device) {
  const int64_t tiles = CeilDiv(p.pixels(), PointwiseSplit::kPixels) * CeilDiv(p.features, 8 * features);
  const double blocks = static_cast<double>(CeilDiv(tiles, device.multiprocessors));
  const double steps = static_cast<double>(CeilDiv(p.channels * BytesOf(p.dtype), 64 * PointwiseSplit::kWarps));
  const double latency = p.gated ? 812 : 365;
  return features == 4 ? 1995 + steps * latency + blocks * (661 + 594 * steps)
                       : 1995 + steps * latency + blocks * (890 + 1550 * steps);
}

template <class Visit>
void ForEachPlan(const PointwiseProblem& p, const Device& device, int64_t alignment, const Visit& visit) {
  const int64_t element = BytesOf(p.dtype);
  const bool has_kernels =
      p.dtype == Dtype::kF32 || p.dtype == Dtype::kBF16 || p.dtype == Dtype::kF16 || (element == 1 && !p.gated);
  if (device.capability < 80 || !has_kernels || p.channels == 0) return;
  for (const int features : {4, 8}) {
    if (p.channels * element % 16 != 0 || p.features % features != 0 || (element == 1 && features != 4) ||
        alignment < std::min<int64_t>(16, features * element))
      continue;
    PointwisePlan plan;
    plan.kernel = PointwisePlan::Kernel::kSplit;
    plan.split = {features};
    plan.cycles = SplitCycles(p, features, device);
    visit(plan);
  }
  const int64_t piece = PointwiseTile::piece_bytes(static_cast<int>(element));
  if (p.channels * element % piece != 0 || p.features * element % piece != 0 || alignment < piece) return;
  int number = 0;
#define DWSCONV_VISIT(...) PointwiseTile{__VA_ARGS__},
  for (const PointwiseTile& tile : {DWSCONV_POINTWISE_TILES(DWSCONV_VISIT)}) {
#undef DWSCONV_VISIT
    const PointwiseShape shape(p, tile, device);
    if (shape.bytes <= device.most_shared_memory) {
      PointwisePlan plan;
      plan.kernel = PointwisePlan::Kernel::kTiles;
      plan.tile = tile;
      plan.cycles = TileCycles(p, tile, shape, number, device);
      visit(plan);
    }
    ++number;
  }
}

}  // namespace

PointwiseShape::PointwiseShape(const PointwiseProblem& p, const PointwiseTile& tile, const Device& device)
    : pixel_tiles(CeilDiv(p.pixels(), tile.pixels())), feature_tiles(CeilDiv(p.features, tile.features())) {
  const int element = static_cast<int>(BytesOf(p.dtype));
  const int64_t images = std::min<int64_t>(p.images, (tile.pixels() - 1) / p.pixels_per_image + 2);
  gates = p.gated ? static_cast<int>(images) : 0;
  const auto bytes_with = [&](int64_t chunks) {
    return tile.stages * tile.source_bytes(gates) + chunks * tile.kernel_bytes(element) +
           2 * tile.features() * static_cast<int64_t>(sizeof(float));
  };
  const int64_t chunks = CeilDiv(p.channels, tile.channels(element));
  const bool keeps = chunks <= tile.stages || bytes_with(chunks) <= std::min(kMostKeptBytes, device.most_shared_memory);
  kernel_chunks = keeps ? static_cast<int>(chunks) : tile.stages;
  bytes = static_cast<int>(bytes_with(kernel_chunks));
  const int64_t resident = std::clamp(device.shared_memory / (bytes + kReserved), 1, tile.resident_blocks());
  down = std::clamp<int64_t>(resident * device.multiprocessors / feature_tiles, 1, pixel_tiles);
}

std::string PointwisePlan::Text() const {
  switch (kernel) {
    case Kernel::kNone: break;
    case Kernel::kSplit: return "pointwise_split:" + Join({split.features});
    case Kernel::kTiles:
      return "pointwise_tiles:" + Join({tile.row_tiles, tile.down, tile.across, tile.steps, tile.stages});
  }
  return "none";
}

std::vector<PointwisePlan> PointwiseCandidates(const PointwiseProblem& p, const Device& device, int64_t alignment) {
  std::vector<PointwisePlan> candidates;
  ForEachPlan(p, device, alignment, [&](const PointwisePlan& plan) { candidates.push_back(plan); });
  return candidates;
}

PointwisePlan PlanPointwise(const PointwiseProblem& p, const Device& device, int64_t alignment,
                            std::string_view forced) {
  return Choose(forced, PointwisePlan(), [&](const auto& visit) { ForEachPlan(p, device, alignment, visit); });
}

}  // namespace dwsconv
