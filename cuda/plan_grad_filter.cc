// The planner of grad_filter.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "cuda/plan_common.h"

namespace dwsconv {
namespace {

struct TapSumsInstance {
  int kernel_h, kernel_w, ahead;
  TapSumsTile tile;
};

constexpr TapSumsInstance kTapSumsInstances[] = {
#define DWSCONV_TILE(kernel_h, kernel_w, vector, columns, ahead) \
  {kernel_h, kernel_w, ahead, {vector, columns, 0, 0, 0}},
    DWSCONV_TAP_SUMS_TILES(DWSCONV_TILE)
#undef DWSCONV_TILE
};

GradFilterPieces CutIntoPieces(const Problem& p, const Device& device, int64_t max_splits) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;  // 2048 threads
  constexpr int64_t kTermsPerSum = 64;
  GradFilterPieces plan{};
  plan.piece_width = p.channels_last ? kTermsPerSum : kTermsPerSum * GradFilterPieces::kLanes;
  plan.pieces_per_row = CeilDiv(p.out_w, plan.piece_width);
  plan.pieces = p.images_per_group() * p.out_h * plan.pieces_per_row;
  plan.tap_tiles = CeilDiv(p.kernel_w, GradFilterPieces::kTapsPerThread);
  plan.channel_tiles = p.channels_last ? CeilDiv(p.out_channels(), GradFilterPieces::kLanes) : p.out_channels();
  const int64_t blocks_per_split = p.groups * p.kernel_h * plan.tap_tiles * plan.channel_tiles;
  const int64_t wanted =
      CeilDiv(device.multiprocessors * kBlocksPerMultiprocessor, std::max<int64_t>(1, blocks_per_split));
  const int64_t useful = CeilDiv(plan.pieces, GradFilterPieces::kWarps);
  plan.splits = std::max<int64_t>(1, std::min({wanted, useful, max_splits}));
  plan.blocks = plan.splits * blocks_per_split;
  return plan;
}

bool TapSumsApply(const Problem& p) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const bool sizes_fit = p.x_elements() <= kMost * 2 && p.y_elements() <= kMost * 2 &&
                         std::max(std::abs(p.pad_top), std::abs(p.pad_left)) <= 1 << 20;
  const bool empty = p.x_elements() == 0 || p.y_elements() == 0;
  return p.multiplier == 1 && UsualWindow(p) && sizes_fit && p.x_dtype == p.y_dtype && !empty;
}

// Estimated time in cycles, fitted like EstimateMarch.
double EstimateTapSums(const Problem& p, const TapSumsInstance& instance, const TapSumsTile& tile, bool one_launch,
                       const Device& device) {
  constexpr double kThreads = 128, kRegisters = 65536, kMostBlocks = 16;
  const double kh = p.kernel_h, kw = p.kernel_w, s = p.stride_h, v = tile.vector, t = tile.columns;
  const double bytes_each = BytesOf(p.x_dtype);
  const double vectors = p.channels / tile.vector, lanes = tile.lanes, walkers = 128 / tile.lanes;
  const double units = double(p.images_per_group()) * CeilDiv(p.out_h, tile.rows) * CeilDiv(p.out_w, tile.columns);
  const double per_walker = std::ceil(units / (tile.splits * walkers));
  const double x_rows = (tile.rows - 1) * s + kh, rows = std::floor((kh - 1) / s) + 1;
  const double columns = (t - 1) * s + kw;

  const double registers = 60 + kh * kw * v + rows * t * v + columns * v +
                           (instance.ahead * columns + instance.ahead / s * t) * std::max(1.0, v * bytes_each / 4);
  const double resident =
      std::clamp(std::floor(kRegisters / (kThreads * std::min(registers, 255.0))), 1.0, kMostBlocks);
  const double blocks = vectors / lanes * p.groups * tile.splits;
  double waves = std::max(1.0, blocks / (device.multiprocessors * resident));
  if (waves < 3) waves = std::ceil(waves);
  const double active = std::clamp(blocks / device.multiprocessors, 1.0, resident);

  const double loads = columns + t / s;
  const double instructions = 2.39 * kh * kw / s * t * v + (bytes_each == 2 ? 0.59 * loads * v : 0) + 16;
  const double issue = 1.12 * per_walker * (100 + x_rows * instructions) * active;
  const double latency = per_walker * (332 + x_rows * (365 / instance.ahead + 1.75 * instructions));
  const double compute = waves * (std::max(issue, latency) + 18 * std::max(kh * kw, walkers) * v);
  const double halo = x_rows / (tile.rows * s);
  const double sectors = p.channels_last ? std::max(1.0, 32 / (lanes * v * bytes_each)) : 1;  // read over what is used
  const double memory = sectors * bytes_each * (p.x_elements() * (1 + 0.155 * (halo - 1)) + p.y_elements()) /
                        (12.45 * device.multiprocessors);
  // To compare it with other kernels: 16-bit types take longer than the part of the form that ranks their tiles.
  const double march = (bytes_each == 2 ? 1.12 : 1) * (std::max(compute, memory) + 0.37 * std::min(compute, memory));
  if (one_launch) return (tile.splits > 1 ? 5800 : 4000) + 1.4 * march;
  return 8561 + march + 0.72 * tile.splits * p.filter_elements() / device.multiprocessors;
}

template <class Visit>
void VisitTapSums(const Problem& p, const Device& device, int64_t alignment, int64_t max_splits, const Visit& visit) {
  if (!TapSumsApply(p)) return;
  for (const TapSumsInstance& instance : kTapSumsInstances) {
    TapSumsTile tile = instance.tile;
    if (instance.kernel_h != p.kernel_h || instance.kernel_w != p.kernel_w || p.channels % tile.vector != 0 ||
        alignment % (tile.vector * BytesOf(p.x_dtype)) != 0 || !SuitsLayout(p, tile.vector, tile.columns)) {
      continue;
    }
    const int64_t vectors = p.channels / tile.vector;
    const auto visit_splits = [&](int64_t splits, bool one_launch) {
      tile.splits = static_cast<int>(splits);
      GradFilterPlan plan;
      plan.kernel = GradFilterPlan::Kernel::kTapSums;
      plan.splits = splits;
      plan.tap_sums = tile;
      plan.one_launch = one_launch;
      plan.cycles = EstimateTapSums(p, instance, tile, one_launch, device);
      visit(plan);
    };
    for (const int64_t most_lanes : {32, 8, 4}) {
      const int64_t lanes = ChannelLanes(p, tile.vector, most_lanes), walkers = 128 / lanes;
      if (lanes == tile.lanes) continue;
      tile.lanes = static_cast<int>(lanes);
      ForStripRows(p.out_h, [&](int rows) {
        tile.rows = rows;
        const int64_t units = p.images_per_group() * CeilDiv(p.out_h, rows) * CeilDiv(p.out_w, tile.columns);
        const int64_t most_splits = std::min(CeilDiv(units, walkers), max_splits);
        const int64_t others = vectors / lanes * p.groups;
        for (int64_t splits : {1, 2, 4, 8, 16}) {
          if (splits <= most_splits && OneLaunch(splits, others, device)) visit_splits(splits, true);
        }
        if (most_lanes < 32) return;
        for (int64_t blocks : {1, 2, 3, 4, 6, 8, 12, 16}) {  // for every multiprocessor
          const int64_t splits = std::min(std::max<int64_t>(1, blocks * device.multiprocessors / others), most_splits);
          if (!OneLaunch(splits, others, device)) visit_splits(splits, false);
        }
      });
    }
  }
}

bool TapProductsApply(const Problem& p, const Device& device, int64_t alignment) {
  const bool half_types = (p.x_dtype == Dtype::kBF16 || p.x_dtype == Dtype::kF16) && p.y_dtype == p.x_dtype;
  const bool empty = p.x_elements() == 0 || p.y_elements() == 0;
  return device.capability >= 80 && p.channels_last && p.multiplier == 1 && half_types && IndicesFit(p) && !empty &&
         p.stride_h == p.stride_w && (p.stride_h == 1 || (p.stride_h == 2 && p.dilation_h == 1)) &&
         p.channels % 8 == 0 && alignment % 16 == 0;
}

// The most sets that leave room for the filter, of those that are compiled; 0 for none.
int TapProductsSets(const Problem& p) {
  const int64_t reach_h = CeilDiv(p.kernel_h, p.stride_h), reach_w = (p.kernel_w - 1) * p.dilation_w;
  for (int sets : {4, 2}) {
    if (sets == 4 && p.stride_h == 2) continue;
    const int64_t offset = sets == 4 ? 5 : p.stride_w;  // of the last set
    if (reach_h <= 16 / sets && reach_w + offset <= 7) return sets;
  }
  return 0;
}

// Estimated time in cycles; infinite where the tile does not fit the device. Fitted like EstimateMarch.
double EstimateTapProducts(const Problem& p, const TapProductsTile& tile, bool one_launch, const Device& device) {
  constexpr double kRegisters = 65536, kRegistersPerThread = 120, kMostBlocks = 16;
  const double s = p.stride_h, unit = 4 * tile.sets, chunks = tile.chunks, walkers = tile.walkers, rows = tile.rows;
  const double reach_h = (p.kernel_h - 1) * p.dilation_h, reach_w = (p.kernel_w - 1) * p.dilation_w;
  const double taps = double(p.kernel_h) * p.kernel_w, threads = 32 * chunks * walkers;
  const double stretches = CeilDiv(p.out_w, tile.columns), strips = CeilDiv(p.in_h, tile.rows);
  const double units = std::ceil(std::min<double>(tile.columns, p.out_w) / unit);
  const double lead = std::floor(reach_h / s), g_rows = lead + std::floor(rows / s) + 1;
  const double x_width = (units * unit - 1) * s + reach_w + 1, g_width = units * unit;
  const double pairs = s * std::ceil(tile.images * rows * units / 2 / s), turns = std::ceil(pairs / walkers);

  const auto pitch = [](double width) { return std::ceil(width / 8) * 8 + 1; };
  const double stage =
      chunks * ((tile.images * rows + 1) * pitch(x_width) + (tile.images * g_rows + lead + 1) * pitch(g_width));
  const double table = pairs + s + walkers;
  const double shared = 16 * std::max(2 * stage + table, 2 * (walkers + 1) * taps * chunks);
  if (shared > device.most_shared_memory) return std::numeric_limits<double>::infinity();

  const double copies =
      tile.images * chunks *
      (rows * (stretches == 1 ? p.in_w : x_width) +
       (strips == 1 ? std::min<double>(g_rows, p.out_h) : g_rows) * (stretches == 1 ? p.out_w : g_width));
  const double resident = std::clamp(
      std::floor(std::min(kRegisters / (kRegistersPerThread * threads), device.shared_memory / (shared + 1024))), 1.0,
      kMostBlocks);
  if (one_launch && !ClusterFits(tile.splits, resident)) return std::numeric_limits<double>::infinity();
  const double blocks = std::ceil(p.channels / (8 * chunks)) * p.groups * tile.splits;
  double waves = std::max(1.0, blocks / (device.multiprocessors * resident));
  if (waves < 3) waves = std::ceil(waves);
  const double active = std::clamp(std::ceil(blocks / device.multiprocessors), 1.0, resident);
  const double tiles = std::ceil(CeilDiv(p.images_per_group(), tile.images) * strips * stretches / tile.splits);

  const double own_copies = copies / threads;
  const double issue = (393 + 78 * turns + 30 * own_copies) * chunks * walkers / 4;  // of one block
  const double latency = 929 + 188 * turns + 50 * own_copies + 0.2 * issue;
  const double shared_cycles = 29 * chunks * pairs + 0.54 * copies * (tile.chunks == 1 ? 1.84 : 1);
  const double compute = (one_launch && tile.splits > 1 ? 1.18 : 1) * waves *
                         (tiles * std::max(latency, std::max(issue, shared_cycles) * active) + 2580 +
                          2 * walkers * taps + 26 * stage / threads);
  const double memory = 2.0 * (p.x_elements() + p.y_elements()) / (19.3 * device.multiprocessors);
  const double parts = one_launch ? (tile.splits > 1 ? 2010 : 0)
                                  : 3130 + 1.83 * tile.splits * p.filter_elements() / device.multiprocessors;
  return 2640 + parts + std::max(compute, memory) + 0.46 * std::min(compute, memory);
}

template <class Visit>
void VisitTapProducts(const Problem& p, const Device& device, int64_t alignment, int64_t max_splits,
                      const Visit& visit) {
  if (!TapProductsApply(p, device, alignment)) return;
  GradFilterPlan plan;
  plan.kernel = GradFilterPlan::Kernel::kTapProducts;
  TapProductsTile& tile = plan.tap_products;
  tile.sets = TapProductsSets(p);
  if (tile.sets == 0) return;
  const int64_t all_chunks = p.channels / 8;
  const auto visit_splits = [&](int64_t splits, bool one_launch) {
    plan.splits = splits;
    tile.splits = static_cast<int>(splits);
    plan.one_launch = one_launch;
    plan.cycles = EstimateTapProducts(p, tile, one_launch, device);
    if (std::isfinite(plan.cycles)) visit(plan);
  };
  const auto visit_tile = [&](int rows, int images) {
    tile.rows = rows;
    tile.images = images;
    const int64_t tiles =
        CeilDiv(p.images_per_group(), images) * CeilDiv(p.in_h, rows) * CeilDiv(p.out_w, tile.columns);
    const int64_t most_splits = std::min(tiles, max_splits);
    const int64_t blocks_per_split = CeilDiv(all_chunks, tile.chunks) * p.groups;
    int64_t last = 0;
    for (int64_t splits : {1, 2, 4, 8, 16}) {
      if (splits <= most_splits && OneLaunch(splits, blocks_per_split, device)) visit_splits(splits, true);
    }
    for (int64_t blocks : {1, 2, 3, 4, 6}) {  // for every multiprocessor
      const int64_t splits =
          std::min(std::max<int64_t>(1, blocks * device.multiprocessors / blocks_per_split), most_splits);
      if (splits != last && !OneLaunch(splits, blocks_per_split, device)) visit_splits(splits, false);
      last = splits;
    }
  };
  for (int chunks : {1, 2, 4}) {
    if (chunks > all_chunks || 8 * CeilDiv(all_chunks, chunks) * chunks > 9 * all_chunks) continue;
    tile.chunks = chunks;
    for (int walkers = p.stride_h; chunks * walkers <= 16; walkers *= 2) {
      if (chunks * walkers < 4) continue;
      tile.walkers = walkers;
      const int64_t unit = 4 * tile.sets;
      int last_columns = 0;
      for (int64_t stretches = 1; stretches <= 1024; stretches *= 2) {
        const int64_t columns = CeilDiv(CeilDiv(p.out_w, stretches), unit) * unit;
        if (columns == last_columns || (columns < 32 && stretches > 1)) break;
        if (columns > 256) continue;
        last_columns = tile.columns = static_cast<int>(columns);
        for (int64_t strips = 1, last_rows = 0; strips < 2 * p.in_h; strips *= 2) {
          int64_t rows = CeilDiv(p.in_h, strips);
          if (strips > 1) rows = CeilDiv(rows, p.stride_h) * p.stride_h;  // a strip begins with an even row
          if (rows != last_rows && rows <= 128) visit_tile(static_cast<int>(rows), 1);
          last_rows = rows;
        }
        if (p.in_h > 128 || stretches > 1) continue;
        for (int images = 2; images <= std::min<int64_t>(16, p.images_per_group()); images *= 2) {
          visit_tile(static_cast<int>(p.in_h), images);
        }
      }
    }
  }
}

template <class Visit>
void VisitGradFilters(const Problem& p, const Device& device, int64_t alignment, int64_t max_splits,
                      const Visit& visit) {
  VisitTapSums(p, device, alignment, max_splits, visit);
  for (const GradFilterPlan& plan : TapRowsCandidates(p, device, alignment, max_splits)) visit(plan);
  for (const GradFilterPlan& plan : TapPlanesCandidates(p, device, alignment, max_splits)) visit(plan);
  VisitTapProducts(p, device, alignment, max_splits, visit);
  if (CanTurn(p)) {
    VisitTapSums(Turned(p), device, alignment, max_splits, [&](GradFilterPlan plan) {
      plan.turned = true;
      visit(plan);
    });
  }
}

GradFilterPlan General(const Problem& p, const Device& device, int64_t max_splits) {
  GradFilterPlan plan;
  plan.pieces = CutIntoPieces(p, device, max_splits);
  plan.splits = plan.pieces.splits;
  return plan;
}

}  // namespace

std::string GradFilterPlan::Text() const {
  switch (kernel) {
    case Kernel::kTapSums:
      return "tap_sums:" + Join({tap_sums.vector, tap_sums.columns, tap_sums.rows, tap_sums.lanes, tap_sums.splits});
    case Kernel::kTapRows: {
      const TapRowsTile& t = tap_rows;
      return "tap_rows:" + Join({t.lanes, t.walkers, t.rows, t.columns, t.splits});
    }
    case Kernel::kTapPlanes: {
      const TapPlanesTile& t = tap_planes;
      return "tap_planes:" + Join({t.planes, t.walkers, t.rows, t.splits});
    }
    case Kernel::kTapProducts: {
      const TapProductsTile& t = tap_products;
      return "tap_products:" + Join({t.sets, t.chunks, t.walkers, t.columns, t.rows, t.images, t.splits});
    }
    case Kernel::kPieces: break;
  }
  return "pieces:" + std::to_string(splits);
}

std::vector<GradFilterPlan> GradFilterCandidates(const Problem& p, const Device& device, int64_t alignment,
                                                 int64_t max_splits) {
  return Candidates(General(p, device, max_splits),
                    [&](const auto& visit) { VisitGradFilters(p, device, alignment, max_splits, visit); });
}

GradFilterPlan PlanGradFilter(const Problem& p, const Device& device, int64_t alignment, int64_t max_splits,
                              std::string_view forced) {
  return Choose(forced, General(p, device, max_splits),
                [&](const auto& visit) { VisitGradFilters(p, device, alignment, max_splits, visit); });
}

}  // namespace dwsconv
