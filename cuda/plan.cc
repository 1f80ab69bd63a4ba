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
#undef DWSCONV_TILE

constexpr ToeplitzTile kToeplitzBlocks[] = {
#define DWSCONV_BLOCK(kernel_size, channels) {kernel_size, channels, 0, 0},
    DWSCONV_TOEPLITZ_BLOCKS(DWSCONV_BLOCK)
#undef DWSCONV_BLOCK
};

int64_t BytesOf(Dtype dtype) { return dtype == Dtype::kF64 ? 8 : dtype == Dtype::kF32 ? 4 : 2; }

// What a pass reads and writes: x and y for forward, the reverse for grad_input.
struct Sizes {
  Sizes(const Problem& p, bool forward)
      : kernel(p.kernel_h),
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

  int64_t kernel, stride;
  bool doubles;
  int64_t source_bytes, result_bytes, source_elements, result_elements;
  int64_t rows, columns;
};

// Estimated time in cycles. The form follows from what the kernel does; the constants were fitted to a sweep of all
// tiles over the layers of benchmarks/operators.py on an H100 (see docs/performance.md).
double EstimateMarch(const Problem& p, const Sizes& m, const MarchTile& tile, const Device& device) {
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

void ConsiderMarch(const Problem& p, const Sizes& m, const Device& device, int64_t alignment, PassPlan& best) {
  const auto consider = [&](auto& tiles) {
    for (MarchTile tile : tiles) {
      const int64_t widest = tile.vector * std::max(m.source_bytes, m.result_bytes);
      if (p.channels % tile.vector != 0 || alignment % widest != 0) continue;
      ForStripRows(m.rows, [&](int rows) {
        tile.rows = rows;
        const double cycles = EstimateMarch(p, m, tile, device);
        if (cycles < best.cycles) {
          best.kernel = PassPlan::Kernel::kMarch;
          best.march = tile;
          best.cycles = cycles;
        }
      });
    }
  };
  p.kernel_h == 3 ? consider(kMarchTiles3) : p.kernel_h == 5 ? consider(kMarchTiles5) : consider(kMarchTiles7);
}

void ConsiderToeplitz(const Problem& p, const Sizes& m, bool forward, const Device& device, PassPlan& best) {
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

PassPlan PlanPass(const Problem& p, bool forward, const Device& device, int64_t alignment) {
  const Sizes m(p, forward);
  PassPlan best;
  best.cycles = std::numeric_limits<double>::infinity();
  if (MarchApplies(p, forward)) {
    ConsiderMarch(p, m, device, alignment, best);
    // The estimate ranks the tiles of these kernels. To compare it with others: 16-bit types reach this rate at most.
    constexpr double kBytesPerCycle = 9.8;  // of one multiprocessor
    const double bytes = double(m.source_elements) * m.source_bytes + double(m.result_elements) * m.result_bytes;
    best.cycles = std::max(best.cycles, bytes / (kBytesPerCycle * device.multiprocessors));
  }
  if (ToeplitzApplies(p, forward, device, alignment)) ConsiderToeplitz(p, m, forward, device, best);
  return best;
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
