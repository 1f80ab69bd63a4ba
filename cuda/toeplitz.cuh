// The NHWC kernels of 16-bit types on tensor cores.
//
// For one channel, eight neighbouring results of a row are a product of the source pixels below them with a banded
// Toeplitz matrix that holds a filter row: y[n] = sum over p of x[p] * T[p][n], T[p][n] = w[p - n]. The rows of the
// matrix product are 16 marchers, which share the filter and are otherwise independent; they march down the rows as in
// march.cuh, and every source row is multiplied with the matrix of every filter row (row reuse). Most of T is zero, but
// the tensor cores are so much faster that the memory is what remains to wait for.
//
// A warp has four channels. The pixels of the marchers come through a ring in shared memory, filled by asynchronous
// copies, with zeros outside the image; the results leave through shared memory too, so that all transfers are whole
// sectors.
//
// Zero times infinity is NaN: an infinite pixel would spoil the results of its whole product. So results that are NaN
// are computed again, one by one.
#ifndef JAX_DWSCONV_CUDA_TOEPLITZ_CUH_
#define JAX_DWSCONV_CUDA_TOEPLITZ_CUH_

#include <cstdint>

#include "cuda/dtypes.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/packed.cuh"
#include "cuda/tensor_core.cuh"
#include "cuda/toeplitz.h"

namespace dwsconv::cuda {

constexpr int kToeplitzColumns = ToeplitzTile::kColumns, kToeplitzMarchers = 16, kToeplitzWarpChannels = 4;
constexpr int kChunk = 8;  // elements in 16 bytes

// Numbers that follow from the pass and the size of the filter. A lane of the matrix product holds the pixels t + 4 * s
// of a marcher, t its number among four lanes and s < kSlots: any order does, as long as both factors have it.
template <int kK, Pass kPass>
struct ToeplitzShape {
  static constexpr bool kGradient2 = kPass == Pass::kStride2Gradient;
  static constexpr int kStride = kPass == Pass::kStride2 ? 2 : 1;
  static constexpr int kSourceRows = kGradient2 ? 1 : 2, kResultRows = kPass == Pass::kStride2 ? 1 : 2;  // per step
  static constexpr int kStages = kGradient2 ? 4 : 3;                                                     // of the ring
  static constexpr int kMarcherPixels = kGradient2 ? 4 : kToeplitzColumns * kStride;  // from one marcher to the next
  static constexpr int kPixels = kGradient2 ? 4 + (kK - 1) / 2 : (kToeplitzColumns - 1) * kStride + kK;
  static constexpr int kSlots = (kPixels + 3) / 4;
  static constexpr int kPairs = (kSlots + 1) / 2;
  static constexpr bool kEarly = kK >= 5;     // whether the next row is loaded before this one is multiplied
  static constexpr int kLead = (kK - 1) / 2;  // steps before the first result

  // Of a strip of `rows` rows of the result, or pairs of rows in the input gradient of stride 2.
  __host__ __device__ static int Steps(int rows) { return (kPass == Pass::kStride1 ? (rows + 1) / 2 : rows) + kLead; }
  __host__ __device__ static int SourceRows(int rows) { return kGradient2 ? rows + kLead : (rows - 1) * kStride + kK; }
};

// Where the n-th column of the product is among the eight results: lane t of four has columns 2t and 2t + 1, which are
// stored like the pixels.
__device__ __forceinline__ int ResultColumn(int n) { return n / 2 + n % 2 * 4; }

// A row of pixels in shared memory, in chunks of 16 bytes. The order of the chunks varies with bits 0, 1 and kBit of
// the pixel, so that the lanes of a warp, whose pixels differ there, meet in as few banks as possible.
template <int kPitch, int kBit>
struct PixelRow {
  static constexpr int kChunks = kPitch / 16, kShift = kChunks % 8 == 0 ? 0 : kChunks % 4 == 0 ? 1 : 2;
  static_assert(kChunks % 2 == 0);

  __device__ static uint32_t Address(int pixel, int offset) {
    const int order = ((pixel & 3) >> kShift) | (((pixel >> kBit) & 1) << (2 - kShift));
    return pixel * kPitch + ((((offset >> 4) ^ order) << 4) | (offset & 15));
  }
};

// Where a segment of the block begins.
struct Segment {
  int image;  // negative where there is none
  int source_row, source_column, result_row, result_column;
  int source_chunks, result_chunks;  // the offset of the place, channel 0; may lie outside of the tensor
};

template <class S>
__device__ Segment LocateSegment(const Toeplitz& m, int segment) {
  uint32_t rest = m.channel_blocks.Quotient(blockIdx.x) * m.segments + segment;
  if (segment >= m.segments || rest >= m.total_segments) return {-1};
  const int column = m.stretches.Take(rest) * m.marchers_wide.value;
  const int strip = m.strips.Take(rest), image = rest;
  Segment s{image};
  if constexpr (S::kGradient2) {  // pairs, in padded coordinates
    const int row = m.pad_top / 2 + strip * m.strip_rows, pair = m.pad_left / 2 + column * S::kMarcherPixels;
    s.source_row = row - S::kLead, s.source_column = pair - S::kLead;
    s.result_row = 2 * row - m.pad_top, s.result_column = 2 * pair - m.pad_left;
  } else {
    const int row = strip * m.strip_rows;
    s.source_row = row * S::kStride - m.pad_top, s.source_column = column * S::kMarcherPixels - m.pad_left;
    s.result_row = row, s.result_column = column * kToeplitzColumns;
  }
  const int pixel_chunks = m.channels / kChunk;
  s.source_chunks = image * m.source_image_chunks + s.source_row * m.source_row_chunks + s.source_column * pixel_chunks;
  s.result_chunks = image * m.result_image_chunks + s.result_row * m.result_row_chunks + s.result_column * pixel_chunks;
  return s;
}

// What a thread copies of every source row: kept in shared memory, because there are no registers to spare.
struct alignas(16) CopyTask {
  int32_t source_chunks;  // for row 0 of the strip
  uint32_t target;        // in a row of the ring; ~0: no task
  int low, high;          // the rows of the strip that are in the image
};

// One result, from its definition.
template <class T, bool kGradient2>
__device__ float ResultAlone(const Toeplitz& m, const T* source, const T* filter, int64_t image, int row, int column,
                             int channel, int stride) {
  float sum = 0;
  for (int i = 0; i < m.kernel_h; ++i) {
    for (int j = 0; j < static_cast<int>(m.kernel_w.value); ++j) {
      int h = row * stride - m.pad_top + i, w = column * stride - m.pad_left + j * m.dilation_w;
      if (kGradient2) {
        h = row + m.pad_top - i, w = column + m.pad_left - j;
        if (h % 2 != 0 || w % 2 != 0) continue;
        h /= 2, w /= 2;
      }
      if (h < 0 || h >= m.source_h || w < 0 || w >= m.source_w) continue;
      const int64_t at = (image * m.source_image_chunks + static_cast<int64_t>(h) * m.source_row_chunks) * kChunk +
                         static_cast<int64_t>(w) * m.channels + channel;
      const int tap = (m.mirrored ? m.kernel_h - 1 - i : i) * m.filter_h +
                      (m.mirrored ? static_cast<int>(m.kernel_w.value) - 1 - j : j) * m.filter_w;
      sum = fmaf(ToFloat(source[at]), ToFloat(filter[tap + channel * m.filter_c]), sum);
      if (sum != sum) return sum;
    }
  }
  return sum;
}

// Computes the results again that are NaN, of this thread's four channels at two columns of two marchers. `staged`: the
// first of them in shared memory.
template <class T, class S, int kPitch>
__device__ __noinline__ void Repair(const Toeplitz& m, const Segment* segments, const T* source, const T* filter,
                                    int row, int channel, unsigned char* staged) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  if (channel >= m.channels) return;
  for (int n = 0; n < 4; ++n) {
    const int marcher = g + n / 2 * 8, segment = static_cast<int>(m.marchers_wide.Quotient(marcher));
    const Segment place = segments[segment];
    if (place.image < 0) continue;
    const int column =
        place.result_column + (marcher - segment * m.marchers_wide.value) * kToeplitzColumns + t + n % 2 * 4;
    T* const values = reinterpret_cast<T*>(staged + (n / 2 * 64 + n % 2 * 4) * kPitch);
    for (int c = 0; c < kToeplitzWarpChannels; ++c) {
      const float value = ToFloat(values[c]);
      if (value == value) continue;
      float result[1][1] = {{ResultAlone<T, S::kGradient2>(m, source, filter, place.image, place.result_row + row,
                                                           column, channel + c, S::kStride)}};
      float scale[1], bias[1];
      LoadScale(m.epilogue, channel + c, scale);
      LoadBias(m.epilogue, channel + c, bias);
      result[0][0] = fmaf(result[0][0], scale[0], bias[0]);
      Activate<T>(m.epilogue, result);
      values[c] = FromFloat<T>(result[0][0]);
    }
  }
}

// How many blocks should fit on a multiprocessor as far as registers go.
constexpr int ToeplitzBlocks(int kernel_size, int channels) { return (kernel_size == 3 ? 64 : 32) / channels; }

// The shared memory of a block: where its parts begin, in bytes.
template <int kK, Pass kPass, int kBlock>
struct ToeplitzMemory {
  using S = ToeplitzShape<kK, kPass>;
  static constexpr int kThreads = kBlock / kToeplitzWarpChannels * 32;
  static constexpr int kPitch = kBlock * 2;  // bytes per pixel
  static constexpr int kResultRow = kToeplitzMarchers * kToeplitzColumns * kPitch;

  int row, results, tasks, segments, scale_and_bias, taps, end;

  __host__ __device__ explicit ToeplitzMemory(const Toeplitz& m) {
    row = m.segments * m.pitch * kPitch;
    results = S::kStages * S::kSourceRows * row;
    tasks = results + 2 * S::kResultRows * kResultRow;
    segments = tasks + (Loads(m) + 1) / 2 * 2 * kThreads * static_cast<int>(sizeof(CopyTask));
    scale_and_bias = segments + kToeplitzMarchers * static_cast<int>(sizeof(Segment));
    taps = scale_and_bias + 2 * kBlock * static_cast<int>(sizeof(float));
    end = taps + m.kernel_h * static_cast<int>(m.kernel_w.value) * kPitch;
  }
  __host__ __device__ static int Loads(const Toeplitz& m) {
    return (m.segments * static_cast<int>(m.pixels.value) * (kPitch / 16) + kThreads - 1) / kThreads;
  }
};

template <class T, int kK, Pass kPass, int kBlock>
__global__ void __launch_bounds__(kBlock / kToeplitzWarpChannels * 32, ToeplitzBlocks(kK, kBlock))
    ToeplitzKernel(const __grid_constant__ Toeplitz m, const T* __restrict__ source, const T* __restrict__ filter,
                   T* __restrict__ result) {
#if __CUDA_ARCH__ >= 800
  using S = ToeplitzShape<kK, kPass>;
  using Memory = ToeplitzMemory<kK, kPass, kBlock>;
  constexpr int kChannels = kToeplitzWarpChannels, kThreads = Memory::kThreads;
  constexpr int kChunks = kBlock / kChunk;  // per pixel
  constexpr int kStores = kToeplitzMarchers * kToeplitzColumns * kChunks / kThreads, kStorePixels = kThreads / kChunks;
  using Ring = PixelRow<Memory::kPitch, S::kMarcherPixels == 16 ? 4 : 3>;
  using Staged = PixelRow<Memory::kPitch, 3>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  uint32_t channel_block = blockIdx.x;
  const int first_channel = m.channel_blocks.Take(channel_block) * kBlock, channel = first_channel + warp * kChannels;
  const Memory memory(m);
  extern __shared__ __align__(128) unsigned char shared[];
  CopyTask* const tasks = reinterpret_cast<CopyTask*>(shared + memory.tasks);
  Segment* const segments = reinterpret_cast<Segment*>(shared + memory.segments);
  T* const taps_shared = reinterpret_cast<T*>(shared + memory.taps);
  const int steps = S::Steps(m.strip_rows), source_rows = S::SourceRows(m.strip_rows), loads = Memory::Loads(m);

  // The taps of the block's channels.
#pragma unroll 1
  for (int index = threadIdx.x; index < m.kernel_h * static_cast<int>(m.kernel_w.value) * (kBlock / kChannels);
       index += kThreads) {
    const int from_channel = first_channel + index % (kBlock / kChannels) * kChannels,
              tap = index / (kBlock / kChannels);
    const int i = m.kernel_w.Quotient(tap), j = tap - i * m.kernel_w.value;
    if (from_channel >= m.channels) continue;
    const T* const from = filter + (i * m.filter_h + j * m.filter_w + from_channel * m.filter_c);
    T* const to = taps_shared + index * kChannels;
    if (m.filter_c == 1) {
      CopyAsync<8>(to, from);
    } else {
      for (int c = 0; c < kChannels; ++c) to[c] = from[c * m.filter_c];
    }
  }
  CommitCopies();
  if (threadIdx.x < kToeplitzMarchers) {
    segments[threadIdx.x] = LocateSegment<S>(m, threadIdx.x);
  }
  float* const block_scale = reinterpret_cast<float*>(shared + memory.scale_and_bias);
  if (!S::kGradient2 && m.epilogue.present && threadIdx.x < kBlock) {
    float scale[1] = {}, bias[1] = {};
    if (first_channel + static_cast<int>(threadIdx.x) < m.channels) {
      LoadScale(m.epilogue, first_channel + threadIdx.x, scale);
      LoadBias(m.epilogue, first_channel + threadIdx.x, bias);
    }
    block_scale[threadIdx.x] = scale[0];
    block_scale[kBlock + threadIdx.x] = bias[0];
  }
  const float4* const scale_and_bias = reinterpret_cast<const float4*>(block_scale) + warp;
  __syncthreads();

  // The copies of this thread.
  for (int k = 0; k < (loads + 1) / 2 * 2; ++k) {
    const int index = threadIdx.x + k * kThreads, chunk = index % kChunks;
    const int segment = static_cast<int>(m.pixels.Quotient(index / kChunks)),
              pixel = index / kChunks - segment * m.pixels.value;
    CopyTask task{0, ~0u, 0, 0};
    if (segment < m.segments) {
      const Segment place = segments[segment];
      const bool exists = place.image >= 0 && pixel < m.span &&
                          static_cast<unsigned>(place.source_column + pixel) < static_cast<unsigned>(m.source_w) &&
                          first_channel + chunk * kChunk < m.channels;
      task.source_chunks = place.source_chunks + (pixel * m.channels + first_channel) / kChunk + chunk;
      task.target = Ring::Address(segment * m.pitch + pixel, chunk * 16);
      task.low = -place.source_row;
      task.high = exists ? min(m.source_h - place.source_row, source_rows) : -1 << 30;
    }
    tasks[k * kThreads + threadIdx.x] = task;
  }
  const uint32_t ring = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const auto copy_step = [&](int step, int stage) {
    if (step < steps) {
#pragma unroll 1
      for (int k = 0; k < loads; k += 2) {
        const CopyTask pair[2] = {tasks[k * kThreads + threadIdx.x], tasks[(k + 1) * kThreads + threadIdx.x]};
#pragma unroll
        for (const CopyTask& task : pair) {
#pragma unroll
          for (int u = 0; u < S::kSourceRows; ++u) {
            const int row = step * S::kSourceRows + u;
            const bool inside = row >= task.low && row < task.high;
            const int chunks = inside ? task.source_chunks + row * m.source_row_chunks : 0;
            CopyAsync16(ring + (stage * S::kSourceRows + u) * memory.row + task.target,
                        reinterpret_cast<const uint4*>(source) + chunks, inside, task.target != ~0u);
          }
        }
      }
    }
    CommitCopies();
  };
  for (int step = 0; step < S::kStages - 1; ++step) copy_step(step, step);

  // The results that this thread stores.
  const int store_pixel = threadIdx.x / kChunks, store_chunk = threadIdx.x % kChunks;
  const uint32_t store_from = memory.results + Staged::Address(store_pixel, store_chunk * 16);
  int store_chunks[kStores], store_low[kStores], store_high[kStores];
#pragma unroll
  for (int k = 0; k < kStores; ++k) {
    const int pixel = store_pixel + k * kStorePixels,
              segment = static_cast<int>(m.marchers_wide.Quotient(pixel / kToeplitzColumns));
    const Segment place = segments[segment];
    const int column = pixel - segment * m.marchers_wide.value * kToeplitzColumns;
    const bool exists = place.image >= 0 &&
                        static_cast<unsigned>(place.result_column + column) < static_cast<unsigned>(m.result_w) &&
                        first_channel + store_chunk * kChunk < m.channels;
    store_low[k] = -place.result_row;  // above 0 in the input gradient of stride 2 only
    store_high[k] = exists ? min(m.result_h - place.result_row, m.strip_rows * (S::kGradient2 ? 2 : 1)) : -1 << 30;
    store_chunks[k] = place.result_chunks + (column * m.channels + first_channel) / kChunk + store_chunk;
  }
  const auto store_step = [&](int step) {  // counted from the first step with results
#pragma unroll
    for (int u = 0; u < S::kResultRows; ++u) {
      const int row = step * S::kResultRows + u;
      const unsigned char* const from =
          shared + store_from + (((step + S::kLead) & 1) * S::kResultRows + u) * Memory::kResultRow;
#pragma unroll
      for (int k = 0; k < kStores; ++k) {
        if ((S::kGradient2 && row < store_low[k]) || row >= store_high[k]) continue;
        reinterpret_cast<uint4*>(result)[store_chunks[k] + row * m.result_row_chunks] =
            *reinterpret_cast<const uint4*>(from + k * kStorePixels * Memory::kPitch);
      }
    }
  };

  // The pixels that this thread reads: the order of chunks is the same for kGroup slots.
  constexpr int kGroup = S::kGradient2 ? 1 : S::kMarcherPixels / 4;
  uint32_t pixels[2][2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int marcher = g + half * 8;
    if (marcher >= m.segments * m.marchers_wide.value) marcher = 0;
    const int segment = static_cast<int>(m.marchers_wide.Quotient(marcher));
    const int first = segment * m.pitch + (marcher - segment * m.marchers_wide.value) * S::kMarcherPixels + t;
#pragma unroll
    for (int o = 0; o < 2; ++o) pixels[half][o] = Ring::Address(first + o * 4 * kGroup, warp * kChannels * sizeof(T));
  }
  const uint32_t stage_to = memory.results + Staged::Address(g * kToeplitzColumns + t, warp * kChannels * sizeof(T));

  // The Toeplitz matrices of this warp's channels.
  WaitForCopies<S::kStages - 1>();
  __syncthreads();
  uint32_t taps[kK][kChannels][S::kPairs];
  {
    const T* const own = taps_shared + warp * kChannels;
    const int column = ResultColumn(g);
    int columns[S::kSlots];  // of the filter, for every slot; negative: none
#pragma unroll
    for (int s = 0; s < S::kSlots; ++s) {
      const int pixel = t + 4 * s;
      int j = S::kGradient2 ? column + 2 * S::kLead - 2 * pixel : pixel - column * S::kStride;
      if (!S::kGradient2 && m.dilation_w > 1) j = j % m.dilation_w == 0 ? j / m.dilation_w : -1;
      if (j >= static_cast<int>(m.kernel_w.value) || channel >= m.channels) j = -1;
      columns[s] = j < 0 ? -1 : m.mirrored ? static_cast<int>(m.kernel_w.value) - 1 - j : j;
    }
#pragma unroll
    for (int i = 0; i < kK; ++i) {
      Words<2> slots[2 * S::kPairs] = {};
      const int row = (m.mirrored ? m.kernel_h - 1 - i : i) * static_cast<int>(m.kernel_w.value);
#pragma unroll
      for (int s = 0; s < S::kSlots; ++s) {
        const bool valid = columns[s] >= 0 && i < m.kernel_h;
        const Words<2> word = *reinterpret_cast<const Words<2>*>(own + (valid ? row + columns[s] : 0) * kBlock);
        slots[s] = {{valid ? word.at[0] : 0, valid ? word.at[1] : 0}};
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
#pragma unroll
        for (int q = 0; q < S::kPairs; ++q) {
          taps[i][c][q] = PickHalves(slots[2 * q].at[c / 2], slots[2 * q + 1].at[c / 2], c % 2);
        }
      }
    }
  }

  constexpr int kPlaces = S::kGradient2 ? kK - 2 : (kK - 1) / S::kStride;
  float sums[kPlaces][kChannels][4] = {};
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    WaitForCopies<S::kStages - 2>();
    __syncthreads();
    Words<2> slots[2][2 * S::kPairs] = {};
    const auto load = [&](int u) {
      const unsigned char* const row = shared + (stage * S::kSourceRows + u) * memory.row;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int s = 0; s < S::kSlots; ++s) {
          slots[half][s] =
              *reinterpret_cast<const Words<2>*>(row + pixels[half][s / kGroup] + s % kGroup * 4 * Memory::kPitch);
        }
      }
    };
    load(0);
    copy_step(step + S::kStages - 1, stage == 0 ? S::kStages - 1 : stage - 1);
    if (step > S::kLead) store_step(step - S::kLead - 1);

    // Stages row u of the results of this step.
    const auto finish = [&](int u, const float (&done)[kChannels][4]) {
      const int result_step = step - S::kLead;
      unsigned char* const to = shared + stage_to + ((step & 1) * S::kResultRows + u) * Memory::kResultRow;
      float total = 0, values[4][kChannels];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) values[n][c] = done[c][n];
        total += (values[n][0] + values[n][1]) + (values[n][2] + values[n][3]);
      }
      if (!S::kGradient2 && m.epilogue.present) {
        const float4 scale = scale_and_bias[0], bias = scale_and_bias[kBlock / kChannels];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          values[n][0] = fmaf(values[n][0], scale.x, bias.x);
          values[n][1] = fmaf(values[n][1], scale.y, bias.y);
          values[n][2] = fmaf(values[n][2], scale.z, bias.z);
          values[n][3] = fmaf(values[n][3], scale.w, bias.w);
        }
        Activate<T>(m.epilogue, values);
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        Packed<T, kChannels> packed;
        packed.Pack(values[n]);
        *reinterpret_cast<Packed<T, kChannels>*>(to + (n / 2 * 64 + n % 2 * 4) * Memory::kPitch) = packed;
      }
      if (total != total && result_step >= 0) {
        Repair<T, S, Memory::kPitch>(m, segments, source, filter, result_step * S::kResultRows + u, channel, to);
      }
    };
#pragma unroll
    for (int u = 0; u < S::kSourceRows; ++u) {
      uint32_t in[kChannels][S::kPairs][2];
      if (!S::kEarly && u > 0) load(u);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
#pragma unroll
          for (int q = 0; q < S::kPairs; ++q) {
            in[c][q][half] = PickHalves(slots[half][2 * q].at[c / 2], slots[half][2 * q + 1].at[c / 2], c % 2);
          }
        }
      }
      if (S::kEarly && u + 1 < S::kSourceRows) load(u + 1);
      float done[S::kGradient2 ? 2 : 1][kChannels][4];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if constexpr (S::kGradient2) {
          Multiply<T>(in[c], taps[0][c], sums[0][c], done[0][c]);
          if constexpr (kPlaces > 1) {
            Multiply<T>(in[c], taps[1][c], sums[1][c], done[1][c]);
          } else {
            MultiplyFirst<T>(in[c], taps[1][c], done[1][c]);
          }
#pragma unroll
          for (int i = 2; i < kPlaces; ++i) Multiply<T>(in[c], taps[i][c], sums[i][c], sums[i - 2][c]);
#pragma unroll
          for (int i = kPlaces < 2 ? 2 : kPlaces; i < kK; ++i) MultiplyFirst<T>(in[c], taps[i][c], sums[i - 2][c]);
        } else if (S::kStride == 1 || u == 0) {  // a row that completes results
          Multiply<T>(in[c], taps[kK - 1][c], sums[kPlaces - 1][c], done[0][c]);
#pragma unroll
          for (int i = kPlaces - 1; i > 0; --i) Multiply<T>(in[c], taps[i * S::kStride][c], sums[i - 1][c], sums[i][c]);
          MultiplyFirst<T>(in[c], taps[0][c], sums[0][c]);
        } else {
#pragma unroll
          for (int i = 0; i < kPlaces; ++i) Multiply<T>(in[c], taps[2 * i + 1][c], sums[i][c], sums[i][c]);
        }
      }
      if constexpr (S::kGradient2) {
        finish(0, done[0]);
        finish(1, done[1]);
      } else if (u < S::kResultRows) {
        finish(u, done[0]);
      }
    }
    stage = stage + 1 == S::kStages ? 0 : stage + 1;
  }
  __syncthreads();
  store_step(steps - S::kLead - 1);
#endif
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TOEPLITZ_CUH_
