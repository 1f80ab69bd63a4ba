#include "cuda/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
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

constexpr MarchInstance kMarchPlanesInstances[] = {
#define DWSCONV_TILE(kernel_size, columns, ahead) {kernel_size, kernel_size, {1, columns, ahead, 0}},
    DWSCONV_MARCH_PLANES_TILES(DWSCONV_TILE)
#undef DWSCONV_TILE
};

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

struct BurstInstance {
  int kernel_size;
  BurstTile tile;
};

constexpr ToeplitzTile kToeplitzBlocks[] = {
#define DWSCONV_BLOCK(kernel_size, channels) {kernel_size, channels, 0, 0},
    DWSCONV_TOEPLITZ_BLOCKS(DWSCONV_BLOCK)
#undef DWSCONV_BLOCK
};

std::string Join(std::initializer_list<int> numbers) {
  std::string text;
  for (int number : numbers) text += (text.empty() ? "" : "x") + std::to_string(number);
  return text;
}

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
// tiles over the layers of the benchmark on an H100 (see docs/performance.md).
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
  const double latency = 590 + source_rows * 970 / tile.ahead + 1.8 * instructions;
  const double halo = source_rows / (double(tile.rows) * (m.doubles ? 1 : m.stride));
  const double source_bytes = double(m.source_elements) * m.source_bytes;
  const double result_bytes = double(m.result_elements) * m.result_bytes;
  double compute, memory;
  if (p.channels_last) {
    compute = waves * std::max(1.36 * instructions * active, latency);
    memory = (source_bytes * (1 + 0.78 * (halo - 1)) + result_bytes) / (19.5 * device.multiprocessors);
  } else {  // neighbouring threads are a tile apart: that many transactions for every load and store
    const double load_words = std::max(1.0, t * (m.doubles ? 1 : m.stride) * m.source_bytes / 4.0);
    const double store_words = std::max(1.0, t * (m.doubles ? 2 : 1) * m.result_bytes / 4.0);
    const double transactions = 4 * source_rows * (1.74 * loads * load_words + 12 * results * store_words);
    compute = waves * std::max({0.66 * instructions * active, latency, transactions * active});
    memory = (source_bytes * (1 + 97 * (halo - 1)) + result_bytes) / (175.0 * device.multiprocessors);
  }
  return std::max(compute, memory) + 0.12 * std::min(compute, memory);
}

// Neither dilated nor strided by more than the instances are; those with one row or column have stride 1.
bool UsualWindow(const Problem& p) {
  const int64_t most = p.kernel_h == p.kernel_w ? 2 : 1;
  return p.stride_h == p.stride_w && p.stride_h <= most && p.dilation_h == 1 && p.dilation_w == 1;
}

// NHWC has vectors of channels and reuses columns; in NCHW neighbouring threads have neighbouring columns, the narrower
// the tile, the fewer memory transactions.
bool SuitsLayout(const Problem& p, int vector, int columns) {
  return p.channels_last ? vector * columns >= 4 || p.kernel_w == 1 : vector == 1;
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
  return device.capability >= 80 && p.channels_last && p.multiplier == 1 && p.groups == 1 && !p.has_residual && half_types &&
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
  if (shared + 8 * tile.channels > device.most_shared_memory) return std::numeric_limits<double>::infinity();
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

template <class Visit>
void VisitMarch(const Problem& p, bool forward, const Device& device, int64_t alignment, const Visit& visit) {
  if (!MarchApplies(p, forward)) return;
  const Sizes m(p, forward);
  // The estimate ranks the tiles of these kernels. To compare it with others: in NHWC they reach about this rate.
  const double half_rate = m.doubles ? 6.5 : 8.5;  // bytes per cycle of one multiprocessor
  const double bytes = double(m.source_elements) * m.source_bytes + double(m.result_elements) * m.result_bytes;
  double least = 0;
  if (m.source_bytes == 2) least = bytes / (half_rate * device.multiprocessors);
  if (m.source_bytes == 4 && p.channels_last) least = bytes / (10.2 * device.multiprocessors);
  for (const MarchInstance& instance : kMarchInstances) {
    MarchTile tile = instance.tile;
    const int64_t widest = tile.vector * std::max({m.source_bytes, m.result_bytes, BytesOf(p.filter_dtype)});
    if (instance.kernel_h != p.kernel_h || instance.kernel_w != p.kernel_w || p.channels % tile.vector != 0 ||
        alignment % widest != 0 || !SuitsLayout(p, tile.vector, tile.columns) ||
        !HasMarchInstance(m.source_bytes == m.result_bytes, m.source_bytes == 4, static_cast<int>(m.stride),
                          instance.kernel_h, instance.kernel_w, tile.vector, tile.columns)) {
      continue;
    }
    ForStripRows(m.rows, [&](int rows) {
      tile.rows = rows;
      // The estimate goes in once more, so that tiles which the rate bounds stay in their order.
      const double cycles = EstimateMarch(p, m, tile, device);
      visit(PassPlan{PassPlan::Kernel::kMarch, false, tile, {}, {}, {}, std::max(cycles, least + 1e-3 * cycles)});
    });
  }
}

// NCHW, stride 1, as many columns in the result as in the source, the same padding on both sides.
bool MarchPlanesApply(const Problem& p, bool forward) {
  const bool same = p.kernel_h == p.kernel_w && p.in_w == p.out_w && p.pad_left == (p.kernel_w - 1) / 2;
  const bool one_type = p.x_dtype == p.y_dtype;
  return !p.channels_last && p.stride_h == 1 && p.stride_w == 1 && same && one_type && MarchApplies(p, forward);
}

// Estimated time in cycles, fitted like EstimateMarch.
double EstimateMarchPlanes(const Problem& p, const Sizes& m, const MarchTile& tile, const Device& device) {
  constexpr double kThreads = 128, kRegisters = 65536, kMostBlocks = 16;
  const double k = m.kernel_h, t = tile.columns;
  const double tiles = p.in_w / tile.columns, rows_per_warp = std::floor(32 / tiles);
  const double units = double(p.batch) * p.channels * CeilDiv(m.rows, tile.rows);
  const double blocks = std::ceil(units / rows_per_warp / 4);
  const double registers = 18 + k * k + k * t + 2 * (t + k) + tile.ahead * t * m.source_bytes / 4.0;
  const double resident =
      std::clamp(std::floor(kRegisters / (kThreads * std::min(registers, 255.0))), 1.0, kMostBlocks);
  double waves = std::max(1.0, blocks / (device.multiprocessors * resident));
  if (waves < 4) waves = std::ceil(waves);
  const double active = std::clamp(blocks / device.multiprocessors, 1.0, resident);
  const double source_rows = tile.rows + k - 1;
  const double instructions = 546 + 2.4 * k * k + source_rows * (0.615 * k * k * t + 10.5 * (k - 1) + 194);
  const double latency = 525 + source_rows * 1790 / tile.ahead + 0.65 * instructions;
  const double compute = waves * std::max(0.342 * instructions * active, latency);
  const double traffic = m.source_elements * (1 + 0.645 * (k - 1) / tile.rows) + m.result_elements;
  const double strip_kilobytes = double(tile.rows) * m.columns * m.result_bytes / 1024;
  const double tall = 1 + 0.051 * strip_kilobytes;  // measured; the reason is not known
  const double memory = traffic * m.source_bytes * tall / (15.3 * device.multiprocessors);
  return std::max(compute, memory) + 0.2 * std::min(compute, memory);
}

template <class Visit>
void VisitMarchPlanes(const Problem& p, bool forward, const Device& device, int64_t alignment, const Visit& visit) {
  if (!MarchPlanesApply(p, forward)) return;
  const Sizes m(p, forward);
  for (const MarchInstance& instance : kMarchPlanesInstances) {
    MarchTile tile = instance.tile;
    if (instance.kernel_h != p.kernel_h || p.in_w % tile.columns != 0 || p.in_w / tile.columns > 32 ||
        alignment % std::min<int64_t>(16, tile.columns * m.source_bytes) != 0) {
      continue;
    }
    ForStripRows(m.rows, [&](int rows) {
      tile.rows = rows;
      const double cycles = EstimateMarchPlanes(p, m, tile, device);
      visit(PassPlan{PassPlan::Kernel::kMarchPlanes, false, tile, {}, {}, {}, cycles});
    });
  }
}

template <class Visit>
void VisitToeplitz(const Problem& p, bool forward, const Device& device, int64_t alignment, const Visit& visit) {
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
        if (std::isfinite(cycles)) visit(PassPlan{PassPlan::Kernel::kToeplitz, false, {}, tile, {}, {}, cycles});
      });
    }
  }
}

constexpr BurstInstance kBurstInstances[] = {
#define DWSCONV_TILE(kernel_size, vector, columns, rows) {kernel_size, {vector, columns, rows}},
    DWSCONV_BURST_TILES(DWSCONV_TILE)
#undef DWSCONV_TILE
};

bool BurstApplies(const Problem& p, bool forward) {
  constexpr int64_t kMostBlocks = 65535;  // in y and z of a grid
  const bool sizes_fit = p.batch <= kMostBlocks && std::max(p.in_h, p.out_h) <= kMostBlocks;
  return p.kernel_h == p.kernel_w && sizes_fit && MarchApplies(p, forward);
}

// What was fitted for a layout.
struct BurstCosts {
  double start, first_load, instructions, per_product, per_load, per_conversion, per_tap, per_store;
  double chain, issue, load_words, store_words, halo, bytes_per_cycle, overlap;
};
constexpr BurstCosts kBurstNhwc{1094, 348, 53, 0.86, 7.7, 4.4, 5.9, 2.9, 2.57, 1.29, 2.5, 3.6, 0.24, 13.9, 0.21};
constexpr BurstCosts kBurstNchw{2093, 156, 66, 6.9, 14.3, 1.3, 3.0, 4.6, 1.41, 0.67, 2.4, 5.7, 0.05, 18.0, 0.08};

// Estimated time in cycles, fitted like EstimateMarch.
double EstimateBurst(const Problem& p, const Sizes& m, const BurstTile& tile, const Device& device) {
  constexpr double kThreads = 128, kRegisters = 65536, kMostBlocks = 16;
  const BurstCosts& cost = p.channels_last ? kBurstNhwc : kBurstNchw;
  const double k = m.kernel_h, v = tile.vector, taps = k * k;
  const auto read = [&](int size) { return m.doubles ? size + (k - 1) / 2 : (size - 1) * m.stride + k; };
  const double loads = read(tile.rows) * read(tile.columns);
  const double stores = (m.doubles ? 4 : 1) * tile.rows * tile.columns;
  const double products = taps * tile.rows * tile.columns * v;
  const double per_strip = std::ceil(double(p.channels / tile.vector) * CeilDiv(m.columns, tile.columns) / kThreads);
  const double blocks = double(p.batch) * CeilDiv(m.rows, tile.rows) * per_strip;
  const double registers = 30 + loads * std::max(1.0, v * m.source_bytes / 4.0) + taps * v + stores * v;
  const double resident =
      std::clamp(std::floor(kRegisters / (kThreads * std::min(registers, 255.0))), 1.0, kMostBlocks);
  double waves = std::max(1.0, blocks / (device.multiprocessors * resident));
  if (waves < 4) waves = std::ceil(waves);
  const double active = std::clamp(blocks / device.multiprocessors, 1.0, resident);

  const double conversion = m.source_bytes == 2 ? cost.per_conversion * v : 0;
  const double instructions = cost.instructions + cost.per_product * products + loads * (cost.per_load + conversion) +
                              taps * (cost.per_tap + 0.5 * v) + stores * (cost.per_store + 0.7 * v);
  const double latency = cost.first_load + cost.chain * instructions;
  const auto words = [&](double elements, int64_t bytes) { return std::max(1.0, elements * bytes / 4.0); };
  double transactions;
  if (p.channels_last) {
    transactions = (loads + taps) * words(v, m.source_bytes) * cost.load_words + stores * cost.store_words;
  } else {  // neighbouring threads are a tile apart
    transactions = loads * words(tile.columns * (m.doubles ? 1 : m.stride), m.source_bytes) * cost.load_words +
                   stores * words(tile.columns * (m.doubles ? 2 : 1), m.result_bytes) * cost.store_words + taps;
  }
  const double compute = waves * std::max({cost.issue * instructions * active, latency, 4 * transactions * active});
  const double halo = read(tile.rows) / (tile.rows * (m.doubles ? 1.0 : m.stride));
  const double bytes = double(m.source_elements) * m.source_bytes * (1 + cost.halo * (halo - 1)) +
                       double(m.result_elements) * m.result_bytes;
  const double memory = bytes / (cost.bytes_per_cycle * device.multiprocessors);
  return cost.start + std::max(compute, memory) + cost.overlap * std::min(compute, memory);
}

template <class Visit>
void VisitBurst(const Problem& p, bool forward, const Device& device, int64_t alignment, const Visit& visit) {
  if (!BurstApplies(p, forward)) return;
  const Sizes m(p, forward);
  const int64_t widest = std::max({m.source_bytes, m.result_bytes, BytesOf(p.filter_dtype)});
  for (const BurstInstance& instance : kBurstInstances) {
    const BurstTile& tile = instance.tile;
    if (instance.kernel_size != p.kernel_h || p.channels % tile.vector != 0 || alignment % (tile.vector * widest) != 0 ||
        (!p.channels_last && tile.vector != 1) ||
        !HasBurstInstance(m.source_bytes == m.result_bytes, tile.vector, tile.columns, tile.rows)) {
      continue;
    }
    const double cycles = EstimateBurst(p, m, tile, device);
    visit(PassPlan{PassPlan::Kernel::kBurst, false, {}, {}, tile, {}, cycles});
  }
}

bool SlideApplies(const Problem& p, bool forward) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const bool strided = p.stride_h > 1 || p.stride_w > 1, dilated = p.dilation_h > 1 || p.dilation_w > 1;
  const bool pads_fit = forward || !strided || (p.pad_top >= 0 && p.pad_left >= 0);
  const auto fits = [&](int64_t size, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad) {
    return std::abs(pad) <= 1 << 24 && size <= 1 << 24 && kernel * dilation <= 1 << 24 && stride <= 1 << 24;
  };
  const int64_t result = forward ? p.y_elements() : p.x_elements();
  const int64_t sixteen = 16;  // no tile has more threads than that many for each result
  return !(strided && dilated) && pads_fit && result / p.batch <= kMost / sixteen &&
         fits(std::max(p.in_h, p.out_h), p.kernel_h, p.stride_h, p.dilation_h, p.pad_top) &&
         fits(std::max(p.in_w, p.out_w), p.kernel_w, p.stride_w, p.dilation_w, p.pad_left) &&
         p.out_h * p.stride_h <= kMost / 2 && p.out_w * p.stride_w <= kMost / 2;
}

// Estimated time in cycles, fitted like EstimateMarch.
double EstimateSlide(const Problem& p, bool forward, const SlideTile& tile, const Device& device) {
  constexpr double kThreads = 128, kRegisters = 65536, kMostBlocks = 16, kResults = SlideTile::kResults;
  const Sizes m(p, forward);
  const bool height = tile.along_height;
  const auto choose = [&](int64_t h, int64_t w) { return height ? h : w; };
  const int64_t along = forward ? choose(p.out_h, p.out_w) : choose(p.in_h, p.in_w);
  const int64_t across = forward ? choose(p.out_w, p.out_h) : choose(p.in_w, p.in_h);
  const int64_t stride = choose(p.stride_h, p.stride_w), phases = SlidePhases(stride, choose(p.dilation_h, p.dilation_w), forward);
  int64_t taps = choose(p.kernel_h, p.kernel_w), lines = choose(p.kernel_w, p.kernel_h), runs = 1;
  if (forward) {
    runs = std::min(stride, taps);
  } else {
    taps = CeilDiv(taps, stride);
    lines = CeilDiv(lines, choose(p.stride_w, p.stride_h)) * p.multiplier;
  }
  const double groups = lines * runs * CeilDiv(CeilDiv(taps, runs), SlideTile::kResults);
  const double v = tile.vector, vectors = double(forward ? p.out_channels() : p.channels) / v;
  const double threads = double(p.batch) * vectors * across * phases * CeilDiv(CeilDiv(along, phases), SlideTile::kResults);
  const double blocks = std::ceil(threads / kThreads);
  const double registers = tile.vector == 1 ? 62 : tile.vector == 2 ? 70 : 100;
  const double resident = std::clamp(std::floor(kRegisters / (kThreads * registers)), 1.0, kMostBlocks);
  double waves = std::max(1.0, blocks / (device.multiprocessors * resident));
  if (waves < 4) waves = std::ceil(waves);
  const double active = std::clamp(blocks / device.multiprocessors, 1.0, resident);

  const double loads = groups * kResults + lines * runs * (kResults - 1);
  const double conversion = m.source_bytes == 2 ? 0.25 * v : 0;
  const double instructions = 94 + 95.0 * lines * runs + loads * (8.3 + conversion) +
                              groups * kResults * (12.6 + conversion) + 0.85 * kResults * lines * taps * v;
  const double latency = 4.34 * instructions + 192 * groups;
  const double words = std::max(1.0, v * m.source_bytes / 4.0);
  const bool apart = !p.channels_last && !height;  // neighbouring threads are a tile apart
  const double each = apart ? std::max(1.0, kResults * (forward ? stride : 1) * m.source_bytes / 4) * 0.245 : 1;
  const double transactions = 1.65 * (loads * words * each + groups * kResults * words);
  const double compute = waves * std::max({1.2 * instructions * active, latency, 4 * transactions * active});
  const double bytes = double(m.source_elements) * m.source_bytes + double(m.result_elements) * m.result_bytes;
  const double memory = bytes / (11.5 * device.multiprocessors) * (apart ? 3.5 : 1);
  return 2820 + std::max(compute, memory) + 0.67 * std::min(compute, memory);
}

template <class Visit>
void VisitSlide(const Problem& p, bool forward, const Device& device, int64_t alignment, const Visit& visit) {
  if (!SlideApplies(p, forward)) return;
  const Sizes m(p, forward);
  const int64_t widest = std::max({m.source_bytes, m.result_bytes, BytesOf(p.filter_dtype)});
  for (int vector : {1, 2, 4}) {
    const bool vectors_fit = p.channels_last && p.multiplier == 1 && p.filter.c == 1 && p.channels % vector == 0 &&
                             alignment % (vector * widest) == 0;
    if (vector > 1 && !vectors_fit) break;
    for (bool along_height : {false, true}) {
      const SlideTile tile{vector, along_height};
      const double cycles = EstimateSlide(p, forward, tile, device);
      visit(PassPlan{PassPlan::Kernel::kSlide, false, {}, {}, {}, tile, cycles});
    }
  }
}

template <class Visit>
void VisitPasses(const Problem& p, bool forward, const Device& device, int64_t alignment, const Visit& visit) {
  VisitMarch(p, forward, device, alignment, visit);
  VisitMarchPlanes(p, forward, device, alignment, visit);
  VisitToeplitz(p, forward, device, alignment, visit);
  VisitBurst(p, forward, device, alignment, visit);
  VisitSlide(p, forward, device, alignment, visit);
  if (CanTurn(p)) {
    VisitMarch(Turned(p), forward, device, alignment, [&](PassPlan plan) {
      plan.turned = true;
      visit(plan);
    });
  }
}

}  // namespace

int64_t ChannelLanes(const Problem& p, int64_t vector, int64_t most) {
  if (!p.channels_last) return 1;
  const int64_t vectors = p.channels / vector;
  int64_t lanes = std::min<int64_t>(vectors, most);
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

std::string PassPlan::Text() const {
  switch (kernel) {
    case Kernel::kMarch: return "march:" + Join({march.vector, march.columns, march.ahead, march.rows});
    case Kernel::kMarchPlanes: return "march_planes:" + Join({march.columns, march.ahead, march.rows});
    case Kernel::kToeplitz: return "toeplitz:" + Join({toeplitz.channels, toeplitz.wide, toeplitz.rows});
    case Kernel::kBurst: return "burst:" + Join({burst.vector, burst.columns, burst.rows});
    case Kernel::kSlide: return "slide:" + Join({slide.vector}) + (slide.along_height ? "xheight" : "xwidth");
    case Kernel::kGather: break;
  }
  return "gather";
}

std::string GradFilterPlan::Text() const {
  switch (kernel) {
    case Kernel::kTapSums:
      return "tap_sums:" + Join({tap_sums.vector, tap_sums.columns, tap_sums.rows, tap_sums.lanes, tap_sums.splits});
    case Kernel::kTapProducts: {
      const TapProductsTile& t = tap_products;
      return "tap_products:" + Join({t.sets, t.chunks, t.walkers, t.columns, t.rows, t.images, t.splits});
    }
    case Kernel::kPieces: break;
  }
  return "pieces:" + std::to_string(splits);
}

std::vector<PassPlan> PassCandidates(const Problem& p, bool forward, const Device& device, int64_t alignment) {
  std::vector<PassPlan> candidates;
  VisitPasses(p, forward, device, alignment, [&](const PassPlan& plan) { candidates.push_back(plan); });
  candidates.push_back({PassPlan::Kernel::kGather});
  return candidates;
}

PassPlan PlanPass(const Problem& p, bool forward, const Device& device, int64_t alignment, std::string_view forced) {
  PassPlan best, wanted;
  bool has_best = false, has_wanted = forced == best.Text();
  VisitPasses(p, forward, device, alignment, [&](const PassPlan& plan) {
    if (!has_best || plan.cycles < best.cycles) best = plan;
    has_best = true;
    if (!forced.empty() && plan.Text() == forced) {
      wanted = plan;
      has_wanted = true;
    }
  });
  return has_wanted ? wanted : best;
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

// Whether the blocks of all splits can be a cluster, whose size is portable up to eight.
bool OneLaunch(int64_t splits, const Device& device) { return splits == 1 || (splits <= 8 && device.capability >= 90); }

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
        for (int64_t splits : {1, 2, 4, 8}) {
          if (splits <= most_splits && OneLaunch(splits, device)) visit_splits(splits, true);
        }
        if (most_lanes < 32) return;
        for (int64_t blocks : {1, 2, 3, 4, 6, 8, 12, 16}) {  // for every multiprocessor
          const int64_t splits = std::min(
              std::max<int64_t>(1, blocks * device.multiprocessors / (vectors / lanes * p.groups)), most_splits);
          if (!OneLaunch(splits, device)) visit_splits(splits, false);
        }
      });
    }
  }
}

bool TapProductsApply(const Problem& p, const Device& device, int64_t alignment) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const bool half_types = (p.x_dtype == Dtype::kBF16 || p.x_dtype == Dtype::kF16) && p.y_dtype == p.x_dtype;
  const bool sizes_fit = p.x.n <= kMost && p.y.n <= kMost && p.x_elements() <= kMost * 2 &&
                         p.y_elements() <= kMost * 2 && std::max(std::abs(p.pad_top), std::abs(p.pad_left)) <= 1 << 20;
  const bool empty = p.x_elements() == 0 || p.y_elements() == 0;
  return device.capability >= 80 && p.channels_last && p.multiplier == 1 && half_types && sizes_fit && !empty &&
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
    for (int64_t splits : {1, 2, 4, 8}) {
      if (splits <= most_splits && OneLaunch(splits, device)) visit_splits(splits, true);
    }
    for (int64_t blocks : {1, 2, 3, 4, 6}) {  // for every multiprocessor
      const int64_t splits =
          std::min(std::max<int64_t>(1, blocks * device.multiprocessors / blocks_per_split), most_splits);
      if (splits != last && !OneLaunch(splits, device)) visit_splits(splits, false);
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

std::vector<GradFilterPlan> GradFilterCandidates(const Problem& p, const Device& device, int64_t alignment,
                                                 int64_t max_splits) {
  std::vector<GradFilterPlan> candidates;
  VisitGradFilters(p, device, alignment, max_splits, [&](const GradFilterPlan& plan) { candidates.push_back(plan); });
  candidates.push_back(General(p, device, max_splits));
  return candidates;
}

GradFilterPlan PlanGradFilter(const Problem& p, const Device& device, int64_t alignment, int64_t max_splits,
                              std::string_view forced) {
  GradFilterPlan best = General(p, device, max_splits), wanted = best;
  bool has_best = false, has_wanted = forced == best.Text();
  VisitGradFilters(p, device, alignment, max_splits, [&](const GradFilterPlan& plan) {
    if (!has_best || plan.cycles < best.cycles) best = plan;
    has_best = true;
    if (!forced.empty() && plan.Text() == forced) {
      wanted = plan;
      has_wanted = true;
    }
  });
  return has_wanted ? wanted : best;
}

}  // namespace dwsconv
