#include "cuda/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>
#include <utility>

namespace dwsconv {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct MarchInstance {
  int kernel_h, kernel_w;
  MarchTile tile;
};

constexpr MarchInstance kMarchInstances[] = {
#define DWSCONV_TILE(kernel_h, kernel_w, vector, columns, ahead) {kernel_h, kernel_w, {vector, columns, ahead, 0}},
    DWSCONV_MARCH_TILES(DWSCONV_TILE)
#undef DWSCONV_TILE
};

struct TapSumsInstance {
  int kernel_h, kernel_w, ahead;
  TapSumsTile tile;
};

constexpr TapSumsInstance kTapSumsInstances[] = {
#define DWSCONV_TILE(kernel_h, kernel_w, vector, columns, ahead) {kernel_h, kernel_w, ahead, {vector, columns, 0, 0}},
    DWSCONV_TAP_SUMS_TILES(DWSCONV_TILE)
#undef DWSCONV_TILE
};

constexpr ToeplitzTile kToeplitzBlocks[] = {
#define DWSCONV_BLOCK(kernel_size, channels) {kernel_size, channels, 0, 0},
    DWSCONV_TOEPLITZ_BLOCKS(DWSCONV_BLOCK)
#undef DWSCONV_BLOCK
};

int64_t BytesOf(Dtype dtype) { return dtype == Dtype::kF64 ? 8 : dtype == Dtype::kF32 ? 4 : 2; }

// What a pass reads and writes: x and y for forward, the reverse for grad_input.
struct Sizes {
  Sizes(const Problem& p, bool forward)
      : kernel_h(p.kernel_h),
        kernel_w(p.kernel_w),
        stride(p.stride_h),
        doubles(!forward && stride == 2),
        source_bytes(BytesOf(forward ? p.x_dtype : p.y_dtype)),
        result_bytes(BytesOf(forward ? p.y_dtype : p.x_dtype)),
        source_elements(forward ? p.x_elements() : p.y_elements()),
        result_elements(forward ? p.y_elements() : p.x_elements()),
        rows(forward ? p.out_h : p.in_h),
        columns(forward ? p.out_w : p.in_w) {
    if (doubles) {  // pairs of them, in padded coordinates: see march.cuh
      rows = CeilDiv(p.pad_top + rows, 2) - p.pad_top / 2;
      columns = CeilDiv(p.pad_left + columns, 2) - p.pad_left / 2;
    }
  }

  int64_t kernel_h, kernel_w, stride;
  bool doubles;
  int64_t source_bytes, result_bytes, source_elements, result_elements;
  int64_t rows, columns;
};

// Estimated time in cycles. The form follows from what the kernel does; the constants were fitted to a sweep of all
// tiles over the layers of benchmarks/operators.py on an H100 (see docs/performance.md).
double EstimateMarch(const Problem& p, const Sizes& m, const MarchTile& tile, const Device& device) {
  constexpr double kThreads = 128, kRegisters = 65536, kMostBlocks = 16;
  const double kh = m.kernel_h, kw = m.kernel_w, v = tile.vector, t = tile.columns;
  const double loads = m.doubles ? t + (m.kernel_w - 1) / 2 : (t - 1) * m.stride + kw;
  const double results = m.doubles ? 4 * t : t / m.stride;  // stores per source row
  const double products = m.doubles ? kh * kw * t : kh * kw * t / m.stride;
  const double places = m.doubles ? 2 * (kh - 2) : (m.kernel_h - 1) / m.stride + 1;
  const double source_rows = m.doubles ? tile.rows + (m.kernel_h - 1) / 2 : tile.rows * m.stride + kh - m.stride;

  const double threads =
      double(p.batch) * CeilDiv(m.rows, tile.rows) * CeilDiv(m.columns, tile.columns) * (p.channels / tile.vector);
  const double blocks = std::ceil(threads / kThreads);
  const double registers =
      69 + kh * kw * v + places * t * v + loads * v + tile.ahead * loads * std::max(1.0, v * m.source_bytes / 4.0);
  const double resident =
      std::clamp(std::floor(kRegisters / (kThreads * std::min(registers, 255.0))), 1.0, kMostBlocks);
  double waves = std::max(1.0, blocks / (device.multiprocessors * resident));
  if (waves < 4) waves = std::ceil(waves);
  const double active = std::max(1.0, std::min(resident, blocks / device.multiprocessors));

  const bool converts = m.source_bytes == 2;
  const double per_row = products * v + loads * (6 + (converts ? 0.75 * v : 0)) + results * (4 + 0.7 * v) + 57;
  const double instructions = 760 + 2.4 * kh * kw * v + source_rows * per_row;
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

// Neither dilated nor strided by more than the instances are; those with one row or column have stride 1.
bool UsualWindow(const Problem& p) {
  const int64_t most = p.kernel_h == p.kernel_w ? 2 : 1;
  return p.stride_h == p.stride_w && p.stride_h <= most && p.dilation_h == 1 && p.dilation_w == 1;
}

bool MarchApplies(const Problem& p, bool forward) {
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  const bool pads_fit = forward || p.stride_h == 1 || (p.pad_top >= 0 && p.pad_left >= 0);
  const bool sizes_fit = p.x.n <= kLargest && p.y.n <= kLargest && p.x_elements() <= kLargest * 2 &&
                         p.y_elements() <= kLargest * 2 &&
                         std::max(std::abs(p.pad_top), std::abs(p.pad_left)) <= 1 << 20;
  return p.multiplier == 1 && UsualWindow(p) && pads_fit && sizes_fit;
}

// The smallest kernel size with an instance of toeplitz.cuh that holds the filter; 0 for none.
int ToeplitzKernelSize(const Problem& p, bool forward) {
  const bool doubles = !forward && p.stride_h == 2;
  for (int size : {3, 5, 7}) {
    const int64_t slots = p.stride_w == 2 ? (14 + size + 3) / 4 : (7 + size + 3) / 4;
    const int64_t needed = (ToeplitzTile::kColumns - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
    const bool columns_fit = doubles ? p.kernel_w <= size : needed <= 4 * slots;
    if (p.kernel_h <= size && columns_fit) return size;
  }
  return 0;
}

bool ToeplitzApplies(const Problem& p, bool forward, const Device& device, int64_t alignment) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const bool half_types =
      (p.x_dtype == Dtype::kBF16 || p.x_dtype == Dtype::kF16) && p.filter_dtype == p.x_dtype && p.y_dtype == p.x_dtype;
  const bool usual_window = p.stride_h == p.stride_w && p.stride_h <= 2 && p.dilation_h == 1 &&
                            (p.dilation_w == 1 || forward || p.stride_h == 1);
  const bool pads_fit = forward || p.stride_h == 1 || (p.pad_top >= 0 && p.pad_left >= 0);
  const bool sizes_fit = p.x_elements() < 4 * kMost && p.y_elements() < 4 * kMost && p.filter_elements() < kMost &&
                         std::max(std::abs(p.pad_top), std::abs(p.pad_left)) <= 1 << 20;
  return device.capability >= 80 && p.channels_last && p.multiplier == 1 && p.groups == 1 && half_types &&
         usual_window && pads_fit && sizes_fit && p.channels % 8 == 0 && alignment % 16 == 0 &&
         ToeplitzKernelSize(p, forward) != 0;
}

// Estimated time in cycles; infinite where the tile does not fit the device. Fitted like EstimateMarch.
double EstimateToeplitz(const Problem& p, const Sizes& m, const ToeplitzTile& tile, const Device& device) {
  constexpr double kRegisters = 65536, kMarchers = 16, kColumns = ToeplitzTile::kColumns;
  const double k = tile.kernel_size, lead = (k - 1) / 2;
  const bool stride_2 = m.stride == 2 && !m.doubles;
  const double marcher_pixels = m.doubles ? 4 : kColumns * m.stride;
  const double pixels = m.doubles ? 4 + lead : (kColumns - 1) * m.stride + k;
  const double slots = std::ceil(pixels / 4), pairs = std::ceil(slots / 2);
  const double source_rows = m.doubles ? 1 : 2, result_rows = stride_2 ? 1 : 2;  // per step
  const double steps = (m.doubles || stride_2 ? tile.rows : CeilDiv(tile.rows, 2)) + lead;

  const double segments = std::floor(kMarchers / tile.wide);
  const double columns = m.doubles ? 2 * m.columns : m.columns;
  const double all_segments =
      double(p.batch) * CeilDiv(m.rows, tile.rows) * std::ceil(columns / (kColumns * tile.wide));
  const double blocks = std::ceil(all_segments / segments) * CeilDiv(p.channels, tile.channels);
  const double threads = tile.channels * 8;
  const double row_pixels = (tile.wide - 1) * marcher_pixels + 4 * slots;
  const double loads = std::ceil(segments * row_pixels * tile.channels / 8 / threads);
  double units = std::ceil(row_pixels / marcher_pixels);
  if (tile.wide == 1 && std::fmod(units, 2) == 0) ++units;

  const double pixel_bytes = 2 * tile.channels;
  const double shared = (m.doubles ? 4 : 3) * source_rows * segments * units * marcher_pixels * pixel_bytes +
                        2 * result_rows * kMarchers * kColumns * pixel_bytes + std::ceil(loads / 2) * 2 * threads * 16 +
                        kMarchers * 28 + k * k * pixel_bytes;
  if (shared > device.most_shared_memory) return std::numeric_limits<double>::infinity();
  const double registers = m.doubles ? 56 + 20 * k : k == 3 ? 128 : stride_2 ? 67 + 21.5 * k : 55 + 27 * k;
  const double resident = std::clamp(
      std::floor(std::min(kRegisters / (registers * threads), device.shared_memory / (shared + 1024))), 1.0, 16.0);

  const double products = k * 4 * source_rows * (pairs == 1 ? 0.5 : pairs == 2 ? 1 : 1.5);
  const double per_multiprocessor = blocks / device.multiprocessors;
  double waves = std::max(1.0, per_multiprocessor / resident);
  if (waves < 3) waves = std::ceil(waves);
  const double active = std::max(1.0, std::min(resident, per_multiprocessor)) * tile.channels / 16;
  const double latency = 435 + 12.8 * products + 23.8 * loads * source_rows;
  const double issue = (73 * (source_rows + result_rows) + 4.14 * products + 58 * loads * source_rows) * active;
  const double compute = waves * (722 + steps * std::max(latency, issue));

  constexpr double kBytesPerCycle = 15.6;  // of one multiprocessor
  const double source_per_strip = m.doubles ? tile.rows + lead : tile.rows * m.stride + k - m.stride;
  const double halo = source_per_strip / (tile.rows * (m.doubles ? 1.0 : m.stride)) *
                      ((tile.wide - 1) * marcher_pixels + pixels) / (tile.wide * marcher_pixels);
  const double bytes = 2.0 * (m.source_elements * (1 + 0.446 * (halo - 1)) + m.result_elements);
  const double memory = bytes / (kBytesPerCycle * device.multiprocessors) * (tile.channels == 16 ? 1.14 : 1);
  return 3650 + std::max(compute, memory) + 0.48 * std::min(compute, memory);
}

// Calls visit(rows) for the heights of strips worth trying: from the whole result down to one row.
template <class Visit>
void ForStripRows(int64_t rows, const Visit& visit) {
  int last = 0;
  for (int64_t strips = 1; strips <= rows; strips += 1 + strips / 4) {
    const int strip_rows = static_cast<int>(CeilDiv(rows, strips));
    if (strip_rows != last) visit(strip_rows);
    last = strip_rows;
  }
}

void ConsiderMarch(const Problem& p, bool forward, const Device& device, int64_t alignment, PassPlan& best) {
  if (!MarchApplies(p, forward)) return;
  const Sizes m(p, forward);
  // The estimate ranks the tiles of these kernels. To compare it with others: 16-bit types reach this rate at most.
  constexpr double kBytesPerCycle = 9.8;  // of one multiprocessor
  const double bytes = double(m.source_elements) * m.source_bytes + double(m.result_elements) * m.result_bytes;
  const double least = bytes / (kBytesPerCycle * device.multiprocessors);
  PassPlan found;
  found.cycles = std::numeric_limits<double>::infinity();
  for (const MarchInstance& instance : kMarchInstances) {
    MarchTile tile = instance.tile;
    const int64_t widest = tile.vector * std::max(m.source_bytes, m.result_bytes);
    if (instance.kernel_h != p.kernel_h || instance.kernel_w != p.kernel_w || p.channels % tile.vector != 0 ||
        alignment % widest != 0 || (!p.channels_last && tile.vector > 1) ||
        (m.source_bytes != m.result_bytes && (p.kernel_h != p.kernel_w || tile.vector * tile.columns < 4))) {
      continue;
    }
    ForStripRows(m.rows, [&](int rows) {
      tile.rows = rows;
      const double cycles = EstimateMarch(p, m, tile, device);
      if (cycles >= found.cycles) return;
      found.kernel = PassPlan::Kernel::kMarch;
      found.march = tile;
      found.cycles = cycles;
    });
  }
  found.cycles = std::max(found.cycles, least);
  if (found.cycles < best.cycles) best = found;
}

void ConsiderToeplitz(const Problem& p, bool forward, const Device& device, int64_t alignment, PassPlan& best) {
  if (!ToeplitzApplies(p, forward, device, alignment)) return;
  const Sizes m(p, forward);
  const int64_t wide_most = CeilDiv(m.doubles ? 2 * m.columns : m.columns, ToeplitzTile::kColumns);
  const int size = ToeplitzKernelSize(p, forward);
  for (const ToeplitzTile& block : kToeplitzBlocks) {
    if (block.kernel_size != size) continue;
    for (int wide : {1, 2, 3, 4, 5, 7, 8, 14, 16}) {
      if (wide > std::max<int64_t>(1, wide_most)) break;
      ForStripRows(std::min<int64_t>(m.rows, 1 << 14), [&](int rows) {
        const ToeplitzTile tile{size, block.channels, wide, rows};
        const double cycles = EstimateToeplitz(p, m, tile, device);
        if (cycles < best.cycles) {
          best.kernel = PassPlan::Kernel::kToeplitz;
          best.toeplitz = tile;
          best.cycles = cycles;
        }
      });
    }
  }
}

}  // namespace

int64_t ChannelLanes(const Problem& p, int64_t vector) {
  if (!p.channels_last) return 1;
  const int64_t vectors = p.channels / vector;
  int64_t lanes = std::min<int64_t>(vectors, 32);
  while (vectors % lanes != 0) --lanes;
  return lanes;
}

bool CanTurn(const Problem& p) {
  return p.channels_last && p.in_h == 1 && p.out_h == 1 && p.kernel_h == 1 && p.pad_top == 0 && p.stride_w == 1;
}

Problem Turned(Problem p) {
  std::swap(p.in_h, p.in_w);
  std::swap(p.out_h, p.out_w);
  std::swap(p.kernel_h, p.kernel_w);
  p.stride_h = p.stride_w;  // the other axis has only one position
  p.dilation_h = std::exchange(p.dilation_w, 1);
  std::swap(p.pad_top, p.pad_left);
  std::swap(p.x.h, p.x.w);
  std::swap(p.y.h, p.y.w);
  std::swap(p.filter.h, p.filter.w);
  return p;
}

PassPlan PlanPass(const Problem& p, bool forward, const Device& device, int64_t alignment) {
  PassPlan best;
  best.cycles = std::numeric_limits<double>::infinity();
  ConsiderMarch(p, forward, device, alignment, best);
  ConsiderToeplitz(p, forward, device, alignment, best);
  if (CanTurn(p)) {
    PassPlan turned;
    turned.cycles = best.cycles;
    ConsiderMarch(Turned(p), forward, device, alignment, turned);
    if (turned.cycles < best.cycles) {
      best = turned;
      best.turned = true;
    }
  }
  return best;
}

namespace {

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
double EstimateTapSums(const Problem& p, const TapSumsInstance& instance, const TapSumsTile& tile,
                       const Device& device) {
  constexpr double kThreads = 128, kRegisters = 65536, kMostBlocks = 16;
  const double kh = p.kernel_h, kw = p.kernel_w, s = p.stride_h, v = tile.vector, t = tile.columns;
  const double bytes_each = BytesOf(p.x_dtype);
  const double vectors = p.channels / tile.vector, lanes = ChannelLanes(p, tile.vector), walkers = 128 / int(lanes);
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
  const double compute = waves * (std::max(issue, latency) + 4.5 * kh * kw * v * walkers);
  const double halo = x_rows / (tile.rows * s);
  const double memory =
      bytes_each * (p.x_elements() * (1 + 0.155 * (halo - 1)) + p.y_elements()) / (12.45 * device.multiprocessors);
  const double parts = 0.2 * tile.splits / 8 + 0.18 * tile.splits * p.filter_elements() * 4.0 / device.multiprocessors;
  return 8561 + std::max(compute, memory) + 0.37 * std::min(compute, memory) + parts;
}

// The best tile, if there is any.
std::optional<TapSumsTile> PlanTapSums(const Problem& p, const Device& device, int64_t alignment, int64_t max_splits) {
  if (!TapSumsApply(p)) return std::nullopt;
  std::optional<TapSumsTile> best;
  double least = 0;
  for (const TapSumsInstance& instance : kTapSumsInstances) {
    TapSumsTile tile = instance.tile;
    if (instance.kernel_h != p.kernel_h || instance.kernel_w != p.kernel_w || p.channels % tile.vector != 0 ||
        alignment % (tile.vector * BytesOf(p.x_dtype)) != 0 || (!p.channels_last && tile.vector > 1)) {
      continue;
    }
    const int64_t lanes = ChannelLanes(p, tile.vector), walkers = 128 / lanes;
    const int64_t blocks_per_split = p.channels / tile.vector / lanes * p.groups;
    ForStripRows(p.out_h, [&](int rows) {
      tile.rows = rows;
      const int64_t units = p.images_per_group() * CeilDiv(p.out_h, rows) * CeilDiv(p.out_w, tile.columns);
      for (int64_t blocks : {1, 2, 3, 4, 6, 8, 12, 16}) {  // for every multiprocessor
        const int64_t splits = std::min({std::max<int64_t>(1, blocks * device.multiprocessors / blocks_per_split),
                                         CeilDiv(units, walkers), max_splits});
        tile.splits = static_cast<int>(splits);
        const double cycles = EstimateTapSums(p, instance, tile, device);
        if (best && cycles >= least) continue;
        best = tile;
        least = cycles;
      }
    });
  }
  return best;
}

}  // namespace

GradFilterPlan PlanGradFilter(const Problem& p, const Device& device, int64_t alignment, int64_t max_splits) {
  GradFilterPlan plan;
  auto tile = PlanTapSums(p, device, alignment, max_splits);
  if (!tile && CanTurn(p)) {
    tile = PlanTapSums(Turned(p), device, alignment, max_splits);
    plan.turned = tile.has_value();
  }
  if (tile) {
    plan.kernel = GradFilterPlan::Kernel::kTapSums;
    plan.tap_sums = *tile;
    plan.splits = tile->splits;
  } else {
    plan.pieces = CutIntoPieces(p, device, max_splits);
    plan.splits = plan.pieces.splits;
  }
  return plan;
}

}  // namespace dwsconv
