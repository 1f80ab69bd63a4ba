#include <algorithm>
#include <type_traits>

#include "cuda/dynamic_memory.h"
#include "cuda/toeplitz.cuh"

namespace dwsconv::cuda {
namespace {

template <int kK, Pass kPass>
Toeplitz Describe(const PassCall& call, const ToeplitzTile& tile) {
  const Problem& p = call.problem;
  const bool forward = call.forward;
  using S = ToeplitzShape<kK, kPass>;
  Toeplitz m{};
  m.source_h = static_cast<int>(forward ? p.in_h : p.out_h);
  m.source_w = static_cast<int>(forward ? p.in_w : p.out_w);
  m.result_h = static_cast<int>(forward ? p.out_h : p.in_h);
  m.result_w = static_cast<int>(forward ? p.out_w : p.in_w);
  m.source_image_chunks = static_cast<int>((forward ? p.x.n : p.y.n) / kChunk);
  m.source_row_chunks = static_cast<int>((forward ? p.x.h : p.y.h) / kChunk);
  m.result_image_chunks = static_cast<int>((forward ? p.y.n : p.x.n) / kChunk);
  m.result_row_chunks = static_cast<int>((forward ? p.y.h : p.x.h) / kChunk);
  m.channels = static_cast<int>(p.channels);
  m.filter_h = static_cast<int>(p.filter.h);
  m.filter_w = static_cast<int>(p.filter.w);
  m.filter_c = static_cast<int>(p.filter.c);
  m.kernel_h = static_cast<int>(p.kernel_h);
  m.kernel_w = Divisor(static_cast<uint32_t>(p.kernel_w));
  m.dilation_w = static_cast<int>(p.dilation_w);
  m.mirrored = !forward && !S::kGradient2;
  m.pad_top = static_cast<int>(m.mirrored ? p.kernel_h - 1 - p.pad_top : p.pad_top);
  m.pad_left = static_cast<int>(m.mirrored ? (p.kernel_w - 1) * p.dilation_w - p.pad_left : p.pad_left);

  m.epilogue = DescribeEpilogue(call.epilogue);

  int64_t rows = m.result_h, columns = m.result_w;
  if (S::kGradient2) {  // pairs of rows and whole pairs of columns, in padded coordinates
    rows = CeilDiv(m.pad_top + rows, 2) - m.pad_top / 2;
    columns += m.pad_left % 2;
  }
  m.marchers_wide = Divisor(static_cast<uint32_t>(tile.wide));
  m.segments = kToeplitzMarchers / tile.wide;
  m.stretches = Divisor(static_cast<uint32_t>(CeilDiv(columns, kToeplitzColumns * tile.wide)));
  m.strip_rows = tile.rows;
  m.strips = Divisor(static_cast<uint32_t>(CeilDiv(rows, tile.rows)));
  m.total_segments = static_cast<uint32_t>(p.batch * m.strips.value * m.stretches.value);
  m.channel_blocks = Divisor(static_cast<uint32_t>(CeilDiv(p.channels, tile.channels)));
  const int others = (tile.wide - 1) * S::kMarcherPixels, pixels = others + 4 * S::kSlots;
  const int needed = S::kGradient2
                         ? S::kPixels
                         : (kToeplitzColumns - 1) * S::kStride + static_cast<int>((p.kernel_w - 1) * p.dilation_w) + 1;
  m.pixels = Divisor(static_cast<uint32_t>(pixels));
  m.span = others + needed;
  int units = static_cast<int>(CeilDiv(pixels, S::kMarcherPixels));
  if (tile.wide == 1 && units % 2 == 0) ++units;  // neighbours in different banks
  m.pitch = units * S::kMarcherPixels;
  return m;
}

template <class T, int kK, Pass kPass, int kBlock>
void Launch(const PassCall& call, const ToeplitzTile& tile) {
  using Memory = ToeplitzMemory<kK, kPass, kBlock>;
  const Toeplitz m = Describe<kK, kPass>(call, tile);
  const int shared = Memory(m).end;
  const auto kernel = ToeplitzKernel<T, kK, kPass, kBlock>;
  AllowDynamicMemory(kernel, shared);
  const auto blocks = static_cast<unsigned>(CeilDiv(m.total_segments, m.segments) * m.channel_blocks.value);
  kernel<<<blocks, Memory::kThreads, shared, call.stream>>>(
      m, static_cast<const T*>(call.source), static_cast<const T*>(call.filter), static_cast<T*>(call.result));
}

template <class T, Pass kPass>
bool LaunchBlock(const PassCall& call, const ToeplitzTile& tile) {
#define DWSCONV_TRY(kK, kBlock)                            \
  if (tile.kernel_size == kK && tile.channels == kBlock) { \
    Launch<T, kK, kPass, kBlock>(call, tile);              \
    return true;                                           \
  }
  DWSCONV_TOEPLITZ_BLOCKS(DWSCONV_TRY)
#undef DWSCONV_TRY
  return false;
}

template <class T>
bool LaunchFor(const PassCall& call, const ToeplitzTile& tile) {
  switch (PassOf(call.problem, call.forward)) {
    case Pass::kStride1: return LaunchBlock<T, Pass::kStride1>(call, tile);
    case Pass::kStride2: return LaunchBlock<T, Pass::kStride2>(call, tile);
    case Pass::kStride2Gradient: return LaunchBlock<T, Pass::kStride2Gradient>(call, tile);
  }
  return false;
}

}  // namespace

bool LaunchToeplitz(const PassCall& call, const ToeplitzTile& tile) {
  if (call.problem.x_dtype == Dtype::kBF16) return LaunchFor<BFloat16>(call, tile);
  return call.problem.x_dtype == Dtype::kF16 && LaunchFor<Float16>(call, tile);
}

}  // namespace dwsconv::cuda
