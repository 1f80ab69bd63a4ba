// The kernel of forward and grad_input in NHWC that reads from shared memory: a block copies all the pixels that its
// results need at once and past the registers, with zeros around the image, and computes from there. So a pixel comes
// once and with one latency, however many results it reaches, and the loop has neither borders nor addresses to mind.
#ifndef JAX_DWSCONV_CUDA_STAGED_CUH_
#define JAX_DWSCONV_CUDA_STAGED_CUH_

#include <type_traits>

#include "cuda/epilogue.cuh"
#include "cuda/row.cuh"
#include "cuda/shared_tile.cuh"
#include "cuda/staged.h"
#include "cuda/tile_axis.cuh"

namespace dwsconv::cuda {

// Copies the part of the filter that a block needs, in float32 and scaled: taps[row][column][channel].
template <class F, int kK, int kChunk>
__device__ __forceinline__ void CopyFilter(const Staged& m, const F* filter, int channel, float* taps) {
  constexpr int kAtOnce = 2;
  const uint32_t total = kK * kK * m.read.pixel_chunks.value;
  const auto locate = [&](uint32_t index, int& tap) {  // returns the channel within the block
    const int within = m.read.pixel_chunks.Take(index) * kChunk;
    tap = index;
    return within;
  };
  for (uint32_t first = threadIdx.x; first < total; first += kAtOnce * blockDim.x) {
    Packed<F, kChunk> read[kAtOnce];
    int tap;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int within = locate(first + i * blockDim.x, tap);
      if (tap >= kK * kK || channel + within >= m.channels) continue;
      const int row = tap / kK, column = tap - row * kK;
      read[i] = *reinterpret_cast<const Packed<F, kChunk>*>(filter + row * static_cast<int>(m.filter.h) +
                                                            column * static_cast<int>(m.filter.w) + channel + within);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int within = locate(first + i * blockDim.x, tap);
      if (tap >= kK * kK || channel + within >= m.channels) continue;
      float values[kChunk];
      read[i].Unpack(values);
      if (m.epilogue.scale != nullptr) {
        float scale[kChunk];
        LoadScale(m.epilogue, channel + within, scale);
#pragma unroll
        for (int v = 0; v < kChunk; ++v) values[v] *= scale[v];
      }
      StoreVector(taps + (tap * m.read.pixel_chunks.value) * kChunk + within, values);
    }
  }
}

// Of a multiprocessor; where the compiler would rather spill for more. 0 leaves it to the compiler.
#if __CUDA_ARCH__ >= 800
template <class X, int kK, int kVector, int kTileRows>
constexpr int kStagedBlocks = sizeof(X) == 2 && kK == 7 && kVector == 1 && kTileRows == 1 ? 3 : 0;
#else
template <class X, int kK, int kVector, int kTileRows>
constexpr int kStagedBlocks = 0;
#endif

template <class X, Pass kPass, int kK, int kVector, int kTileColumns, int kTileRows>
__global__ void __launch_bounds__(kStagedThreads, kStagedBlocks<X, kK, kVector, kTileRows>)
    StagedKernel(const __grid_constant__ Staged m, const X* __restrict__ source, const void* __restrict__ filter,
                 X* __restrict__ result) {
#if __CUDA_ARCH__ >= 800
  using Column = TileAxis<kPass, kK, kTileColumns>;
  using Row = TileAxis<kPass, kK, kTileRows>;
  constexpr int kStep = Column::kStride, kChunk = 16 / sizeof(X);
  extern __shared__ __align__(16) char memory[];
  const int block_channels = m.lanes.value * kVector;
  uint32_t rest = blockIdx.x;
  const int first_channel = m.channel_blocks.Take(rest) * block_channels;
  const int first_tile = m.column_blocks.Take(rest) * m.tiles_across;
  const int first_strip = m.row_blocks.Take(rest) * static_cast<int>(m.tiles_down.value);
  const int image = rest;

  X* const pixels = reinterpret_cast<X*>(memory);
  CopyTile(m.read, m.source, source + image * m.source.step.n + first_channel, m.channels - first_channel,
           Row::FirstRead(first_strip, m.pad_top), Column::FirstRead(first_tile, m.pad_left), pixels);
  CommitCopies();
  float* const taps = reinterpret_cast<float*>(pixels + m.read.rows * m.read.pitch);
  const int64_t first_tap = m.first_tap + (m.grouped ? m.images_per_group.Quotient(image) : 0) * m.filter.n;
  if (std::is_same_v<X, float> || !m.filter_is_float) {
    CopyFilter<X, kK, kChunk>(m, static_cast<const X*>(filter) + first_tap, first_channel, taps);
  } else {
    CopyFilter<float, kK, kChunk>(m, static_cast<const float*>(filter) + first_tap, first_channel, taps);
  }

  uint32_t across = threadIdx.x;
  const int lane = m.lanes.Take(across), down = m.tiles_down.Take(across);
  const int channel = first_channel + lane * kVector;
  const bool active = channel < m.channels;
  float bias[kVector];
  if (active) LoadBias(m.epilogue, channel, bias);
  WaitForCopies<0>();
  __syncthreads();
  if (!active) return;

  const X* const tile = pixels + down * kTileRows * kStep * m.read.pitch +
                        static_cast<int>(across) * kTileColumns * kStep * block_channels + lane * kVector;
  float sums[Row::kWritten * Column::kWritten][kVector];
  Start(bias, sums);
#pragma unroll
  for (int r = 0; r < Row::kRead; ++r) {
    Packed<X, kVector> read[Column::kRead];
#pragma unroll
    for (int c = 0; c < Column::kRead; ++c) {
      read[c] = *reinterpret_cast<const Packed<X, kVector>*>(tile + r * m.read.pitch + c * block_channels);
    }
    float in[Column::kRead][kVector];
    Convert(read, in);
#pragma unroll
    for (int h = 0; h < Row::kWritten; ++h) {
      const int i = Row::Tap(r, h);
      if (i < 0 || i >= kK) continue;
#pragma unroll
      for (int j = 0; j < kK; ++j) {
        float tap[kVector];
        LoadVector(taps + (i * kK + j) * block_channels + lane * kVector, tap);
#pragma unroll
        for (int w = 0; w < Column::kWritten; ++w) {
#pragma unroll
          for (int c = 0; c < Column::kRead; ++c) {
            if (Column::Tap(c, w) != j) continue;
            float (&sum)[kVector] = sums[h * Column::kWritten + w];
#pragma unroll
            for (int v = 0; v < kVector; ++v) sum[v] = fmaf(in[c][v], tap[v], sum[v]);
          }
        }
      }
    }
  }

  const int out_row = Row::FirstWritten(first_strip + down, m.pad_top),
            out_column = Column::FirstWritten(first_tile + across, m.pad_left);
  StoreTile<kPass, Row::kWritten, Column::kWritten>(m, image, channel, out_row, out_column, sums, result);
#endif
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_STAGED_CUH_
