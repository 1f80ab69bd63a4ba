// The kernel for problems that are too small to hide a latency: a thread has a small tile of the result, and all that
// it reads is in flight at once. Rows are not reused beyond the tile; what neighbours share comes from the caches.
#ifndef JAX_DWSCONV_CUDA_BURST_CUH_
#define JAX_DWSCONV_CUDA_BURST_CUH_

#include "cuda/burst.h"
#include "cuda/epilogue.cuh"
#include "cuda/filter_taps.cuh"
#include "cuda/row.cuh"
#include "cuda/tile_axis.cuh"

namespace dwsconv::cuda {

constexpr int kBurstThreads = 128;

// Zeros outside the image.
template <class X, int kVector, int kRows, int kColumns>
__device__ __forceinline__ void LoadTile(const Grid& grid, const X* pixels, int row, int column,
                                         Packed<X, kVector> (&tile)[kRows][kColumns]) {
  const int step_h = static_cast<int>(grid.step.h), step_w = static_cast<int>(grid.step.w);
  const bool inside = row >= 0 && row + kRows <= grid.h && column >= 0 && column + kColumns <= grid.w;
  if (inside) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        tile[i][j] = *reinterpret_cast<const Packed<X, kVector>*>(pixels + i * step_h + j * step_w);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      tile[i][j] = {};
      if (static_cast<unsigned>(row + i) < static_cast<unsigned>(grid.h) &&
          static_cast<unsigned>(column + j) < static_cast<unsigned>(grid.w)) {
        tile[i][j] = *reinterpret_cast<const Packed<X, kVector>*>(pixels + i * step_h + j * step_w);
      }
    }
  }
}

template <class X, class Y, Pass kPass, int kK, int kVector, int kTileColumns, int kTileRows>
__global__ void __launch_bounds__(kBurstThreads)
    BurstKernel(const __grid_constant__ Burst m, const X* __restrict__ source, const void* __restrict__ filter,
                Y* __restrict__ result) {
  using Column = TileAxis<kPass, kK, kTileColumns>;
  using Row = TileAxis<kPass, kK, kTileRows>;
  const uint32_t index = blockIdx.x * kBurstThreads + threadIdx.x;
  if (index >= m.threads) return;
  uint32_t slow = index;
  const uint32_t fast = m.fast.Take(slow);
  const int channel = static_cast<int>(m.channels_last ? fast : slow) * kVector;
  const int tile = static_cast<int>(m.channels_last ? slow : fast), strip = blockIdx.y, image = blockIdx.z;

  const int first_row = Row::FirstRead(strip, m.pad_top), first_column = Column::FirstRead(tile, m.pad_left);
  const X* const pixels = source + image * m.source.step.n + channel * m.source.step.c + first_row * m.source.step.h +
                          first_column * m.source.step.w;
  Packed<X, kVector> read[Row::kRead][Column::kRead];
  LoadTile(m.source, pixels, first_row, first_column, read);
  float taps[kK][kK][kVector];
  LoadFilter<Narrower<X, Y>>(m, image, channel, filter, taps);
  float bias[kVector];
  LoadBias(m.epilogue, channel, bias);
  ScaleTaps(m.epilogue, channel, taps);

  float sums[Row::kWritten * Column::kWritten][kVector];
  Start(bias, sums);
#pragma unroll
  for (int r = 0; r < Row::kRead; ++r) {
    float in[Column::kRead][kVector];
    Convert(read[r], in);
#pragma unroll
    for (int h = 0; h < Row::kWritten; ++h) {
      const int i = Row::Tap(r, h);
      if (i < 0 || i >= kK) continue;
#pragma unroll
      for (int c = 0; c < Column::kRead; ++c) {
#pragma unroll
        for (int w = 0; w < Column::kWritten; ++w) {
          const int j = Column::Tap(c, w);
          if (j < 0 || j >= kK) continue;
          float (&sum)[kVector] = sums[h * Column::kWritten + w];
#pragma unroll
          for (int v = 0; v < kVector; ++v) sum[v] = fmaf(in[c][v], taps[i][j][v], sum[v]);
        }
      }
    }
  }

  const int out_row = Row::FirstWritten(strip, m.pad_top), out_column = Column::FirstWritten(tile, m.pad_left);
  StoreTile<kPass, Row::kWritten, Column::kWritten>(m, image, channel, out_row, out_column, sums, result);
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_BURST_CUH_
