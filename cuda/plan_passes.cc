// The planner of forward and grad_input.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>

#include "cuda/plan_common.h"

namespace dwsconv {
namespace {

struct MarchInstance {
  int kernel_h, kernel_w;
  MarchTile tile;
};

constexpr MarchInstance kMarchInstances[] = {
#define DWSCONV_TILE(kernel_h, kernel_w, vector, columns, ahead) {kernel_h, kernel_w, {vector, columns, ahead, 0}},
    DWSCONV_MARCH_TILES(DWSCONV_TILE)
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

// Estimated time in cycles. The form follows from what the kernel does; the constants were fitted to a sweep of all
// tiles over the layers of the benchmark on an H100 (see docs/performance.md).
double EstimateMarch(const Problem& p, const PassSizes& m, const MarchTile& tile, const Device& device) {
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

// A vector of channels comes with one load.
bool FilterSuits(const Problem& p, int vector) { return vector == 1 || p.filter.c == 1; }

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
  return device.capability >= 80 && p.channels_last && p.multiplier == 1 && p.groups == 1 && !p.has_residual &&
         half_types && usual_window && pads_fit && sizes_fit && p.channels % 8 == 0 && alignment % 16 == 0 &&
         ToeplitzKernelSize(p, forward) != 0;
}

// Estimated time in cycles; infinite where the tile does not fit the device. Fitted like EstimateMarch.
double EstimateToeplitz(const Problem& p, const PassSizes& m, const ToeplitzTile& tile, const Device& device) {
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
  const double straddled = p.channels % 16 == 0 ? 1 : 1.3;  // sectors of memory that two blocks share
  const double memory =
      bytes / (kBytesPerCycle * device.multiprocessors) * (tile.channels == 16 ? 1.14 : 1) * straddled;
  return 3650 + std::max(compute, memory) + 0.48 * std::min(compute, memory);
}

template <class Visit>
void VisitMarch(const Problem& p, bool forward, const Device& device, int64_t alignment, const Visit& visit) {
  if (!MarchApplies(p, forward)) return;
  const PassSizes m(p, forward);
  // The estimate ranks the tiles of these kernels. To compare it with others: in NHWC they reach about this rate.
  const double half_rate = m.doubles ? 6.5 : 8.5;  // bytes per cycle of one multiprocessor
  const double bytes = double(m.source_elements) * m.source_bytes + double(m.result_elements) * m.result_bytes;
  double least = 0;
  if (m.source_bytes == 2) least = bytes / (half_rate * device.multiprocessors);
  if (m.source_bytes == 4 && p.channels_last) least = bytes / (9.5 * device.multiprocessors);
  for (const MarchInstance& instance : kMarchInstances) {
    MarchTile tile = instance.tile;
    const int64_t widest = tile.vector * std::max({m.source_bytes, m.result_bytes, BytesOf(p.filter_dtype)});
    if (instance.kernel_h != p.kernel_h || instance.kernel_w != p.kernel_w || p.channels % tile.vector != 0 ||
        alignment % widest != 0 || !SuitsLayout(p, tile.vector, tile.columns) || !FilterSuits(p, tile.vector) ||
        !HasMarchInstance(m.source_bytes == m.result_bytes, m.source_bytes == 4, static_cast<int>(m.stride),
                          instance.kernel_h, instance.kernel_w, tile.vector, tile.columns)) {
      continue;
    }
    const int64_t threads_of_row = p.batch * CeilDiv(m.columns, tile.columns) * (p.channels / tile.vector);
    ForStripRows(m.rows, [&](int rows) {
      if (CeilDiv(m.rows, rows) > std::numeric_limits<int32_t>::max() / threads_of_row) return;
      tile.rows = rows;
      // The estimate goes in once more, so that tiles which the rate bounds stay in their order.
      const double cycles = EstimateMarch(p, m, tile, device);
      PassPlan plan = PlanFor(PassPlan::Kernel::kMarch, std::max(cycles, least + 1e-3 * cycles));
      plan.march = tile;
      visit(plan);
    });
  }
}

template <class Visit>
void VisitToeplitz(const Problem& p, bool forward, const Device& device, int64_t alignment, const Visit& visit) {
  if (!ToeplitzApplies(p, forward, device, alignment)) return;
  const PassSizes m(p, forward);
  const int64_t wide_most = CeilDiv(m.doubles ? 2 * m.columns : m.columns, ToeplitzTile::kColumns);
  const int size = ToeplitzKernelSize(p, forward);
  for (const ToeplitzTile& block : kToeplitzBlocks) {
    if (block.kernel_size != size) continue;
    for (int wide : {1, 2, 3, 4, 5, 7, 8, 14, 16}) {
      if (wide > std::max<int64_t>(1, wide_most)) break;
      ForStripRows(std::min<int64_t>(m.rows, 1 << 14), [&](int rows) {
        const ToeplitzTile tile{size, block.channels, wide, rows};
        const double cycles = EstimateToeplitz(p, m, tile, device);
        if (!std::isfinite(cycles)) return;
        PassPlan plan = PlanFor(PassPlan::Kernel::kToeplitz, cycles);
        plan.toeplitz = tile;
        visit(plan);
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
  constexpr int64_t kMostBlocks = 65535;                                   // in y and z of a grid
  constexpr int64_t kMostStep = std::numeric_limits<int32_t>::max() / 16;  // offsets in a tile are 32 bits wide
  const bool sizes_fit = p.batch <= kMostBlocks && std::max(p.in_h, p.out_h) <= kMostBlocks &&
                         std::max({p.x.h, p.y.h, p.filter.h}) <= kMostStep;
  return p.kernel_h == p.kernel_w && sizes_fit && MarchApplies(p, forward);
}

// What was fitted for a layout.
struct BurstCosts {
  double start, first_load, instructions, per_product, per_load, per_conversion, per_tap, per_store;
  double chain, issue, load_words, store_words, halo, bytes_per_cycle, overlap;
};
constexpr BurstCosts kBurstNhwc{1356, 165, 56, 0.91, 7.8, 0.97, 17, 1.1, 2.57, 1.17, 2.26, 3.7, 0.2, 15.9, 0.21};
constexpr BurstCosts kBurstNchw{2620, 295, 1, 6.84, 18.5, 2.1, 0.73, 1.8, 1.26, 0.741, 3.42, 0, 0.81, 30, 0.05};
constexpr BurstCosts kBurstNchwStrided{1826, 67, 49, 7.45, 14.3, 2.1, 0.73, 4.8, 1.46, 0.65, 2.33, 5.6, 0.81, 30, 0.05};

// Estimated time in cycles, fitted like EstimateMarch.
double EstimateBurst(const Problem& p, const PassSizes& m, const BurstTile& tile, const Device& device) {
  constexpr double kThreads = 128, kRegisters = 65536, kMostBlocks = 16;
  const BurstCosts& cost = p.channels_last ? kBurstNhwc : m.stride == 1 ? kBurstNchw : kBurstNchwStrided;
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
  const double apart = p.channels_last && !m.doubles && m.stride == 2 && k >= 5 ? 1.2 : 1;  // little of a row is shared
  const double compute =
      apart * waves * std::max({cost.issue * instructions * active, latency, 4 * transactions * active});
  const double halo = read(tile.rows) / (tile.rows * (m.doubles ? 1.0 : m.stride));
  const double bytes = double(m.source_elements) * m.source_bytes * (1 + cost.halo * (halo - 1)) +
                       double(m.result_elements) * m.result_bytes;
  const double memory = bytes / (cost.bytes_per_cycle * device.multiprocessors);
  return cost.start + std::max(compute, memory) + cost.overlap * std::min(compute, memory);
}

template <class Visit>
void VisitBurst(const Problem& p, bool forward, const Device& device, int64_t alignment, const Visit& visit) {
  if (!BurstApplies(p, forward)) return;
  const PassSizes m(p, forward);
  const int64_t widest = std::max({m.source_bytes, m.result_bytes, BytesOf(p.filter_dtype)});
  for (const BurstInstance& instance : kBurstInstances) {
    const BurstTile& tile = instance.tile;
    if (instance.kernel_size != p.kernel_h || p.channels % tile.vector != 0 ||
        alignment % (tile.vector * widest) != 0 || (!p.channels_last && tile.vector != 1) ||
        !FilterSuits(p, tile.vector) ||
        !HasBurstInstance(m.source_bytes == m.result_bytes, forward && m.stride == 2, instance.kernel_size, tile)) {
      continue;
    }
    const double cycles = EstimateBurst(p, m, tile, device);
    PassPlan plan = PlanFor(PassPlan::Kernel::kBurst, cycles);
    plan.burst = tile;
    visit(plan);
  }
}

// Along the axis on which it slides, and in gradients along the other one, a window must not be strided and dilated.
bool SlideApplies(const Problem& p, bool forward, bool along_height) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max(), kMostSize = 1 << 24;
  const auto plain = [](int64_t kernel, int64_t stride, int64_t dilation) {
    return kernel == 1 || stride == 1 || dilation == 1;
  };
  const bool plain_h = plain(p.kernel_h, p.stride_h, p.dilation_h),
             plain_w = plain(p.kernel_w, p.stride_w, p.dilation_w);
  const bool window_fits = forward ? (along_height ? plain_h : plain_w) : plain_h && plain_w;
  const bool strided = p.stride_h > 1 || p.stride_w > 1;
  const bool pads_fit = forward || !strided || (p.pad_top >= 0 && p.pad_left >= 0);
  const auto fits = [&](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad) {
    return std::max({in, out * stride, kernel * dilation, std::abs(pad)}) <= kMostSize;
  };
  // Its threads number at most five for each result: phases that hold one result have three idle places.
  const int64_t results_of_image = (forward ? p.y_elements() : p.x_elements()) / p.batch;
  return window_fits && pads_fit && results_of_image <= kMost / 5 &&
         fits(p.in_h, p.out_h, p.kernel_h, p.stride_h, p.dilation_h, p.pad_top) &&
         fits(p.in_w, p.out_w, p.kernel_w, p.stride_w, p.dilation_w, p.pad_left);
}

// Estimated time in cycles, fitted like EstimateMarch.
double EstimateSlide(const Problem& p, bool forward, const SlideTile& tile, const Device& device) {
  constexpr double kThreads = 128, kRegisters = 65536, kMostBlocks = 16, kResults = SlideTile::kResults;
  const PassSizes m(p, forward);
  const bool height = tile.along_height;
  const auto choose = [&](int64_t h, int64_t w) { return height ? h : w; };
  const int64_t along = forward ? choose(p.out_h, p.out_w) : choose(p.in_h, p.in_w);
  const int64_t across = forward ? choose(p.out_w, p.out_h) : choose(p.in_w, p.in_h);
  const int64_t stride = choose(p.stride_h, p.stride_w),
                phases = SlidePhases(stride, choose(p.dilation_h, p.dilation_w), along, forward);
  int64_t taps = choose(p.kernel_h, p.kernel_w), lines = choose(p.kernel_w, p.kernel_h), runs = 1;
  if (forward) {
    runs = std::min(stride, taps);
  } else {
    taps = CeilDiv(taps, stride);
    lines = CeilDiv(lines, choose(p.stride_w, p.stride_h)) * p.multiplier;
  }
  const double groups = lines * runs * CeilDiv(CeilDiv(taps, runs), SlideTile::kResults);
  const double v = tile.vector, vectors = double(forward ? p.out_channels() : p.channels) / v;
  const double threads =
      double(p.batch) * vectors * across * phases * CeilDiv(CeilDiv(along, phases), SlideTile::kResults);
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
  const PassSizes m(p, forward);
  const int64_t widest = std::max({m.source_bytes, m.result_bytes, BytesOf(p.filter_dtype)});
  for (int vector : {1, 2, 4}) {
    const bool vectors_fit = p.channels_last && p.multiplier == 1 && p.filter.c == 1 && p.channels % vector == 0 &&
                             alignment % (vector * widest) == 0;
    if (vector > 1 && !vectors_fit) break;
    for (bool along_height : {false, true}) {
      if (!SlideApplies(p, forward, along_height)) continue;
      const SlideTile tile{vector, along_height};
      const double cycles = EstimateSlide(p, forward, tile, device);
      PassPlan plan = PlanFor(PassPlan::Kernel::kSlide, cycles);
      plan.slide = tile;
      visit(plan);
    }
  }
}

bool LinesApply(const Problem& p, bool forward, int64_t alignment) {
  const int64_t tile = kLinesBytes / BytesOf(p.x_dtype);
  const bool one_dimension = p.in_h == 1 && p.out_h == 1 && p.kernel_h == 1 && p.pad_top == 0;
  const bool one_type = p.x_dtype == p.y_dtype && p.x_dtype != Dtype::kF64;
  return !p.channels_last && one_dimension && one_type && p.kernel_w >= kLinesFewestTaps &&
         p.kernel_w <= kLinesMostTaps && p.stride_w == 1 && p.in_w % tile == 0 && p.out_w % tile == 0 &&
         alignment % kLinesBytes == 0 && MarchApplies(p, forward);
}

template <class Visit>
void VisitLines(const Problem& p, bool forward, const Device& device, int64_t alignment, const Visit& visit) {
  if (!LinesApply(p, forward, alignment)) return;
  const PassSizes m(p, forward);
  const double bytes = double(m.source_elements) * m.source_bytes + double(m.result_elements) * m.result_bytes;
  // A launch and two latencies, then memory.
  visit(PlanFor(PassPlan::Kernel::kLines, 3000 + bytes / (14.0 * device.multiprocessors)));
}

template <class Visit>
void VisitPasses(const Problem& p, bool forward, const Device& device, int64_t alignment, const Visit& visit) {
  VisitMarch(p, forward, device, alignment, visit);
  VisitToeplitz(p, forward, device, alignment, visit);
  VisitBurst(p, forward, device, alignment, visit);
  for (const PassPlan& plan : StagedCandidates(p, forward, device, alignment)) visit(plan);
  for (const PassPlan& plan : PlanesCandidates(p, forward, device, alignment)) visit(plan);
  for (const PassPlan& plan : SmallPlanesCandidates(p, device, alignment)) visit(plan);
  VisitSlide(p, forward, device, alignment, visit);
  VisitLines(p, forward, device, alignment, visit);
  if (CanTurn(p)) {
    VisitMarch(Turned(p), forward, device, alignment, [&](PassPlan plan) {
      plan.turned = true;
      visit(plan);
    });
  }
}

}  // namespace

bool MarchApplies(const Problem& p, bool forward) {
  const bool pads_fit = forward || p.stride_h == 1 || (p.pad_top >= 0 && p.pad_left >= 0);
  return p.multiplier == 1 && UsualWindow(p) && pads_fit && IndicesFit(p);
}

PassPlan PlanFor(PassPlan::Kernel kernel, double cycles) {
  PassPlan plan;
  plan.kernel = kernel;
  plan.cycles = cycles;
  return plan;
}

std::string PassPlan::Text() const {
  switch (kernel) {
    case Kernel::kMarch: return "march:" + Join({march.vector, march.columns, march.ahead, march.rows});
    case Kernel::kMarchPlanes: return "march_planes:" + Join({march_planes.columns, march_planes.rows});
    case Kernel::kToeplitz: return "toeplitz:" + Join({toeplitz.channels, toeplitz.wide, toeplitz.rows});
    case Kernel::kToeplitzPlanes: {
      const ToeplitzPlanesTile& t = toeplitz_planes;
      return "toeplitz_planes:" + Join({t.access, t.rows});
    }
    case Kernel::kSmallPlanes:
      return "small_planes:" + Join({small_planes.columns, small_planes.warps, small_planes.images});
    case Kernel::kStaged: {
      const StagedTile& t = staged;
      return "staged:" + Join({t.vector, t.columns, t.rows, t.lanes, t.across, t.down});
    }
    case Kernel::kBurst: return "burst:" + Join({burst.vector, burst.columns, burst.rows});
    case Kernel::kSlide: return "slide:" + Join({slide.vector}) + (slide.along_height ? "xheight" : "xwidth");
    case Kernel::kLines: return "lines";
    case Kernel::kGather: break;
  }
  return "gather";
}

std::vector<PassPlan> PassCandidates(const Problem& p, bool forward, const Device& device, int64_t alignment) {
  return Candidates(PassPlan{}, [&](const auto& visit) { VisitPasses(p, forward, device, alignment, visit); });
}

PassPlan PlanPass(const Problem& p, bool forward, const Device& device, int64_t alignment, std::string_view forced) {
  return Choose(forced, PassPlan{}, [&](const auto& visit) { VisitPasses(p, forward, device, alignment, visit); });
}

}  // namespace dwsconv
