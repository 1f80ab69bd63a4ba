// The specialised kernel of grad_filter: a thread owns a vector of channels and marches down the rows of a few
// neighbouring columns. It holds all the tap sums of its channels in registers, and the rows of g that the present row
// of x meets; so x and g are read once. The threads of a block that share their channels add up at the end.
#ifndef JAX_DWSCONV_CUDA_TAP_SUMS_CUH_
#define JAX_DWSCONV_CUDA_TAP_SUMS_CUH_

#include <cooperative_groups.h>

#include "cuda/dtypes.cuh"
#include "cuda/packed.cuh"
#include "cuda/row.cuh"
#include "cuda/tap_sums.h"

namespace dwsconv::cuda {

constexpr int kTapSumsThreads = 128;

// Adds the products of a row of x with one row of g, of which the first `count` columns exist. (The others must not
// take part: zero times infinity.)
template <int kS, int kK, int kVector, int kTile, int kColumns>
__device__ __forceinline__ void AddProducts(const float (&in)[kColumns][kVector], const float (&g)[kTile][kVector],
                                            int count, float (&taps)[kK][kVector]) {
#pragma unroll
  for (int b = 0; b < kTile; ++b) {
    if (b >= count) break;
#pragma unroll
    for (int j = 0; j < kK; ++j) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) taps[j][v] = fmaf(in[b * kS + j][v], g[b][v], taps[j][v]);
    }
  }
}

template <class T, int kH, int kW, int kS, int kVector, int kTile, int kAhead>
__global__ void __launch_bounds__(kTapSumsThreads)
    TapSumsKernel(const __grid_constant__ TapSums m, const T* __restrict__ x, const T* __restrict__ g,
                  void* __restrict__ filter, float* __restrict__ workspace) {
  static_assert(kAhead % kS == 0);
  constexpr int kColumns = (kTile - 1) * kS + kW, kRows = (kH - 1) / kS + 1;
  uint32_t walker = threadIdx.x;
  const uint32_t lane = m.lanes.Take(walker);
  uint32_t rest_of_block = blockIdx.x, split = 0;
  if (m.one_launch) split = m.splits.Take(rest_of_block);  // the blocks of a cluster are neighbours
  const uint32_t first_vector = m.lane_groups.Take(rest_of_block) * m.lanes.value;
  const uint32_t group = m.groups.Take(rest_of_block);
  if (!m.one_launch) split = rest_of_block;
  const int channel = (first_vector + lane) * kVector;

  float taps[kH][kW][kVector] = {};
  for (uint32_t unit = split * m.walkers + walker; unit < m.units; unit += m.splits.value * m.walkers) {
    uint32_t rest = unit;
    const int tile = m.tiles.Take(rest), strip = m.strips.Take(rest);
    const int64_t image = group * m.images_per_group + rest;
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
  const int width = m.lanes.value * kVector, taps_width = kH * kW * width;
  if (walker < static_cast<uint32_t>(m.walkers)) {
#pragma unroll
    for (int i = 0; i < kH; ++i) {
#pragma unroll
      for (int j = 0; j < kW; ++j) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          sums[walker * taps_width + (i * kW + j) * width + v * m.lanes.value + lane] = taps[i][j][v];
        }
      }
    }
  }
  __syncthreads();
  const int64_t channels = static_cast<int64_t>(m.lane_groups.value) * width;
  const auto write = [&](int tap, int at_channel, float sum) {
    const int64_t at = group * m.filter.n + tap / kW * m.filter.h + tap % kW * m.filter.w + at_channel * m.filter.c;
    if (m.filter_is_float) {
      static_cast<float*>(filter)[at] = sum;
    } else {
      static_cast<T*>(filter)[at] = FromFloat<T>(sum);
    }
  };
  float* const part = workspace + (static_cast<int64_t>(split) * m.groups.value + group) * kH * kW * channels;
  for (int tap = walker; tap < kH * kW; tap += m.walkers) {
    if (walker >= static_cast<uint32_t>(m.walkers)) break;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float* const own = sums + tap * width + v * m.lanes.value + lane;
      float sum = own[0];
      for (int other = 1; other < m.walkers; ++other) sum += own[other * taps_width];
      if (!m.one_launch) {
        part[tap * channels + channel + v] = sum;
      } else if (m.splits.value == 1) {
        write(tap, channel + v, sum);
      } else {
        own[0] = sum;
      }
    }
  }
#if __CUDA_ARCH__ >= 900
  if (m.one_launch && m.splits.value > 1) {
    const auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    for (int index = split * blockDim.x + threadIdx.x; index < taps_width; index += m.splits.value * blockDim.x) {
      float sum = 0;
      for (unsigned other = 0; other < m.splits.value; ++other) sum += cluster.map_shared_rank(sums, other)[index];
      uint32_t rest = index;
      const int in_vectors = m.lanes.Take(rest);
      write(rest / kVector, (first_vector + in_vectors) * kVector + rest % kVector, sum);
    }
    cluster.sync();  // the others may still read
  }
#endif
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TAP_SUMS_CUH_
