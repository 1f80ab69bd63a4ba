// The kernel of grad_filter in NHWC that reads from shared memory: a block copies a piece of g and the part of x that
// it meets, and a thread takes one row of the filter: it goes along rows of g, with the sums of its taps and the pixels
// of x that meet them in registers. So a thread has few sums, many threads share what was copied, and a pixel comes
// from memory once.
#ifndef JAX_DWSCONV_CUDA_TAP_ROWS_CUH_
#define JAX_DWSCONV_CUDA_TAP_ROWS_CUH_

#include "cuda/packed.cuh"
#include "cuda/row.cuh"
#include "cuda/shared_tile.cuh"
#include "cuda/tap_parts.cuh"
#include "cuda/tap_rows.h"

namespace dwsconv::cuda {

template <class T, int kK, int kS>
__global__ void __launch_bounds__(kTapRowsThreads)
    TapRowsKernel(const __grid_constant__ TapRows m, const T* __restrict__ x, const T* __restrict__ g,
                  void* __restrict__ filter, float* __restrict__ workspace) {
#if __CUDA_ARCH__ >= 800
  constexpr int kVector = TapRowsTile::kVector, kTile = TapRowsTile::kColumns, kKept = kK - kS, kNew = kTile * kS;
  uint32_t rest = threadIdx.x;
  const int lane = m.lanes.Take(rest), filter_row = rest % kK, walker = rest / kK;
  const TapBlock block = LocateTapBlock<kVector>(m);
  const int pixel = m.lanes.value * kVector;
  const bool active = block.first_channel + lane * kVector < m.channels;

  extern __shared__ __align__(16) char memory[];
  T* const x_shared = reinterpret_cast<T*>(memory);
  T* const g_shared = x_shared + m.x_tile.rows * m.x_tile.pitch;
  float taps[kK][kVector] = {};
  for (uint32_t piece = block.split; piece < m.pieces; piece += m.splits.value) {
    uint32_t image_in_group = piece;
    const int g_column = m.stretches.Take(image_in_group) * m.columns, g_row = m.strips.Take(image_in_group) * m.rows;
    const int64_t image = block.group * m.images_per_group + image_in_group;
    __syncthreads();  // the others may still read
    CopyTile(m.x_tile, m.x, x + image * m.x.step.n + block.first_channel, m.channels - block.first_channel,
             g_row * kS - m.pad_top, g_column * kS - m.pad_left, x_shared);
    CopyTile(m.g_tile, m.g, g + image * m.g.step.n + block.first_channel, m.channels - block.first_channel, g_row,
             g_column, g_shared);
    CommitCopies();
    WaitForCopies<0>();
    __syncthreads();
    if (!active) continue;

    const int rows = min(m.rows, m.g.h - g_row), columns = min(m.columns, m.g.w - g_column);
    for (int row = walker; row < rows; row += m.walkers) {
      const T* gs = g_shared + row * m.g_tile.pitch + lane * kVector;
      const T* xs = x_shared + (row * kS + filter_row) * m.x_tile.pitch + lane * kVector;
      float window[kKept + kNew][kVector];
#pragma unroll
      for (int c = 0; c < kKept; ++c, xs += pixel) LoadVector(xs, window[c]);
      for (int left = columns; left > 0; left -= kTile, gs += kTile * pixel, xs += kNew * pixel) {
        float in[kTile][kVector];
#pragma unroll
        for (int b = 0; b < kTile; ++b) LoadVector(gs + b * pixel, in[b]);
#pragma unroll
        for (int c = 0; c < kNew; ++c) LoadVector(xs + c * pixel, window[kKept + c]);
        if (left >= kTile) {
          AddProducts<kS>(window, in, kTile, taps);
        } else {  // columns that do not exist must not take part: zero times infinity
          AddProducts<kS>(window, in, left, taps);
        }
#pragma unroll
        for (int c = 0; c < kKept; ++c) {
#pragma unroll
          for (int v = 0; v < kVector; ++v) window[c][v] = window[kNew + c][v];
        }
      }
    }
  }

  __syncthreads();
  float* const sums = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int j = 0; j < kK; ++j) StoreSums<kK * kK>(m, taps[j], walker, filter_row * kK + j, lane, sums);
  AddParts<T, kK, kK, kVector>(m, block, lane, rest, kK * m.walkers, sums, filter, workspace);
#endif
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TAP_ROWS_CUH_
