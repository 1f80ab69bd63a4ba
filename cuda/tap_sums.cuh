// The specialised kernel of grad_filter: a thread owns a vector of channels and marches down the rows of a few
// neighbouring columns. It holds all the tap sums of its channels in registers, and the rows of g that the present row
// of x meets; so x and g are read once. The threads of a block that share their channels add up at the end.
#ifndef JAX_DWSCONV_CUDA_TAP_SUMS_CUH_
#define JAX_DWSCONV_CUDA_TAP_SUMS_CUH_

#include "cuda/dtypes.cuh"
#include "cuda/packed.cuh"
#include "cuda/row.cuh"
#include "cuda/tap_parts.cuh"
#include "cuda/tap_sums.h"

namespace dwsconv::cuda {

constexpr int kTapSumsThreads = 128;

template <class T, int kH, int kW, int kS, int kVector, int kTile, int kAhead>
__global__ void __launch_bounds__(kTapSumsThreads)
    TapSumsKernel(const __grid_constant__ TapSums m, const T* __restrict__ x, const T* __restrict__ g,
                  void* __restrict__ filter, float* __restrict__ workspace) {
  static_assert(kAhead % kS == 0);
  constexpr int kColumns = (kTile - 1) * kS + kW, kRows = (kH - 1) / kS + 1;
  uint32_t walker = threadIdx.x;
  const uint32_t lane = m.lanes.Take(walker);
  const TapBlock block = LocateTapBlock<kVector>(m);
  const uint32_t split = block.split;
  const int channel = block.first_channel + lane * kVector;

  float taps[kH][kW][kVector] = {};
  for (uint32_t unit = split * m.walkers + walker; unit < m.units; unit += m.splits.value * m.walkers) {
    uint32_t rest = unit;
    const int tile = m.tiles.Take(rest), strip = m.strips.Take(rest);
    const int64_t image = block.group * m.images_per_group + rest;
    const int first_g = strip * m.strip_rows, g_rows = min(m.strip_rows, m.g.h - first_g);
    const int first_x = first_g * kS - m.pad_top, x_rows = (g_rows - 1) * kS + kH;
    const int g_column = tile * kTile, x_column = g_column * kS - m.pad_left, count = min(kTile, m.g.w - g_column);
    const bool inside = x_column >= 0 && x_column + kColumns <= m.x.w;
    const T* const x_image = x + image * m.x.step.n + channel * m.x.step.c;
    const T* const g_image = g + image * m.g.step.n + channel * m.g.step.c;

    Packed<T, kVector> x_ahead[kAhead][kColumns], g_ahead[kAhead / kS][kTile];
    const auto load = [&](int row, int u) {
      LoadRow(m.x, x_image, first_x + row, x_column, inside, x_ahead[u]);
      if (u % kS == 0) {
        LoadRow(m.g, g_image, row < x_rows && row / kS < g_rows ? first_g + row / kS : -1, g_column, count == kTile,
                g_ahead[u / kS]);
      }
    };
#pragma unroll
    for (int u = 0; u < kAhead; ++u) load(u, u);

    float rows[kRows][kTile][kVector];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int b = 0; b < kTile; ++b) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) rows[i][b][v] = 0;
      }
    }
    for (int row = 0; row < x_rows;) {
#pragma unroll
      for (int u = 0; u < kAhead; ++u, ++row) {
        if (row >= x_rows) break;
        float in[kColumns][kVector];
        Convert(x_ahead[u], in);
        if (u % kS == 0) {
#pragma unroll
          for (int i = kRows - 1; i > 0; --i) Copy(rows[i - 1], rows[i]);
          Convert(g_ahead[u / kS], rows[0]);
        }
        if (row + kAhead < x_rows) load(row + kAhead, u);
        // rows[i] is the row of g that meets this row of x in tap row u % kS + i * kS.
        if (row >= kH - 1 && row / kS < g_rows && count == kTile) {
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            if (u % kS + i * kS < kH) AddProducts<kS>(in, rows[i], kTile, taps[u % kS + i * kS]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
            const int g_row = row / kS - i;
            if (u % kS + i * kS < kH && g_row >= 0 && g_row < g_rows) {
              AddProducts<kS>(in, rows[i], count, taps[u % kS + i * kS]);
            }
          }
        }
      }
    }
  }

  extern __shared__ float sums[];  // by walker, tap, channel of the block
  if (walker < static_cast<uint32_t>(m.walkers)) {
#pragma unroll
    for (int i = 0; i < kH; ++i) {
#pragma unroll
      for (int j = 0; j < kW; ++j) StoreSums<kH * kW>(m, taps[i][j], walker, i * kW + j, lane, sums);
    }
  }
  const int worker = walker < static_cast<uint32_t>(m.walkers) ? walker : kH * kW;
  AddParts<T, kH, kW, kVector>(m, block, lane, worker, m.walkers, sums, filter, workspace);
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TAP_SUMS_CUH_
