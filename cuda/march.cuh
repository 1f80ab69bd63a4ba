// The specialised kernels for all dtypes: every thread owns a vector of channels and a few neighbouring columns and
// marches down the rows. A row is read once, one row ahead of its use, and added into all the results that it reaches
// (row reuse); a column feeds all the taps of the row from registers (column reuse).
#ifndef JAX_DWSCONV_CUDA_MARCH_CUH_
#define JAX_DWSCONV_CUDA_MARCH_CUH_

#include <type_traits>

#include "cuda/dtypes.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/filter_taps.cuh"
#include "cuda/march.h"
#include "cuda/row.cuh"

namespace dwsconv::cuda {

struct MarchThread {
  int channel, tile, strip;
  int64_t image;
  bool active;
};

// Lanes of a block run over `lanes` vectors of channels, then over tiles, so that the columns which two tiles share are
// read by threads of one block.
template <int kVector>
__device__ MarchThread LocateThread(const March& m) {
  int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  MarchThread t;
  t.active = index < m.threads;
  uint32_t rest = static_cast<uint32_t>(index);
  const uint32_t lane = m.lanes.Take(rest);
  t.tile = m.tiles.Take(rest);
  const uint32_t group = m.lane_groups.Take(rest);
  t.strip = m.strips.Take(rest);
  t.image = rest;
  t.channel = (group * m.lanes.value + lane) * kVector;
  return t;
}

// Adds one source row times one filter row to kTile neighbouring results.
template <int kS, int kK, int kVector, int kTile, int kColumns>
__device__ __forceinline__ void AddTaps(const float (&in)[kColumns][kVector], const float (&taps)[kK][kVector],
                                        float (&sums)[kTile][kVector]) {
#pragma unroll
  for (int j = 0; j < kK; ++j) {
#pragma unroll
    for (int b = 0; b < kTile; ++b) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[b][v] = fmaf(in[b * kS + j][v], taps[j][v], sums[b][v]);
    }
  }
}

template <int kTile, int kVector>
__device__ __forceinline__ void Clear(float (&sums)[kTile][kVector]) {
#pragma unroll
  for (int b = 0; b < kTile; ++b) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) sums[b][v] = 0;
  }
}

// Stride kS, kTile result columns per thread, kAhead rows loaded before they are used. The input gradient of stride 1
// is the same with the filter mirrored.
//
// sums[s] belongs to the result whose taps of the first s * kS rows are added. With every row the sums move on by a
// place, and the compiler lets the addition do the moving: so the loop needs no unrolling over the places, and its code
// stays small enough for the instruction cache.
template <class X, class Y, int kH, int kW, int kS, int kVector, int kTile, int kAhead>
__global__ void __launch_bounds__(kMarchThreads)
    MarchKernel(const __grid_constant__ March m, const X* __restrict__ source, const void* __restrict__ filter,
                Y* __restrict__ result) {
  static_assert(kS == 1 || (kS == 2 && kH % 2 == 1 && kAhead % 2 == 0));
  constexpr int kColumns = (kTile - 1) * kS + kW;
  constexpr int kLast = (kH - 1) / kS;  // the place of the sums that are complete after the row
  const MarchThread t = LocateThread<kVector>(m);
  if (!t.active) return;

  const int first_out = t.strip * m.strip_rows, last_out = min(first_out + m.strip_rows, m.result.h);
  const int first_column = t.tile * kTile * kS - m.pad_left;
  const bool inside = first_column >= 0 && first_column + kColumns <= m.source.w;
  const X* image = source + t.image * m.source.step.n + t.channel * m.source.step.c;
  Y* out = result + t.image * m.result.step.n + first_out * m.result.step.h + t.tile * kTile * m.result.step.w +
           t.channel * m.result.step.c;
  const int pixel = static_cast<int>(m.result.step.w);
  const int columns_left = m.result.w - t.tile * kTile;

  Packed<X, kVector> ahead[kAhead][kColumns];
  const int begin = first_out * kS - m.pad_top, end = (last_out - 1) * kS - m.pad_top + kH;
#pragma unroll
  for (int a = 0; a < kAhead; ++a) LoadRow(m.source, image, begin + a, first_column, inside, ahead[a]);
  float taps[kH][kW][kVector];
  LoadFilter<Narrower<X, Y>>(m, t.image, t.channel, filter, taps);
  ScaleTaps(m.epilogue, t.channel, taps);
  float bias[kVector];
  LoadBias(m.epilogue, t.channel, bias);

  float sums[kLast + 1][kTile][kVector] = {};
  Start(bias, sums[0]);
  for (int row = begin; row < end;) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u, ++row) {
      if (row >= end) break;
      float in[kColumns][kVector];
      Convert(ahead[u], in);
      if (row + kAhead < end) LoadRow(m.source, image, row + kAhead, first_column, inside, ahead[u]);
      if (kS == 1 || u % 2 == 0) {  // rows that complete a result
        AddTaps<kS>(in, taps[kH - 1], sums[kLast]);
        if (row - begin >= kH - 1) {
          Finish<Y>(
              m.epilogue, [&](int b) { return b < columns_left; }, [&](int b) { return out - result + b * pixel; },
              sums[kLast]);
#pragma unroll
          for (int b = 0; b < kTile; ++b) {
            if (b < columns_left) StoreVector(out + b * pixel, sums[kLast][b]);
          }
          out += m.result.step.h;
        }
      }
      if constexpr (kS == 1) {
#pragma unroll
        for (int i = kLast - 1; i >= 0; --i) {
          Copy(sums[i], sums[i + 1]);
          AddTaps<kS>(in, taps[i], sums[i + 1]);
        }
        Start(bias, sums[0]);
      } else if (u % 2 == 0) {
#pragma unroll
        for (int i = 0; i < kLast; ++i) AddTaps<kS>(in, taps[2 * i], sums[i]);
      } else {
#pragma unroll
        for (int i = kLast - 1; i >= 0; --i) {
          Copy(sums[i], sums[i + 1]);
          AddTaps<kS>(in, taps[2 * i + 1], sums[i + 1]);
        }
        Start(bias, sums[0]);
      }
    }
  }
}

// Adds one source row times one filter row to twice as many results as there are source columns of the tile.
template <int kK, int kVector, int kTile, int kColumns>
__device__ __forceinline__ void AddTapsStride2(const float (&in)[kColumns][kVector], const float (&taps)[kK][kVector],
                                               float (&sums)[2 * kTile][kVector]) {
#pragma unroll
  for (int w = 0; w < 2 * kTile; ++w) {
#pragma unroll
    for (int j = w % 2; j < kK; j += 2) {
      const int column = (w - j + kK - 1) / 2;  // source column (w - j) / 2 of the tile
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[w][v] = fmaf(in[column][v], taps[j][v], sums[w][v]);
    }
  }
}

// The input gradient of stride 2. Result position p lies at p + pad = 2 * o + i for source position o and tap i, so in
// these padded coordinates the parity of a result decides which taps it has, statically. kTile source columns and twice
// as many result columns per thread. With every source row two rows of sums are complete, and the others move on by two
// places.
template <class X, class Y, int kK, int kVector, int kTile, int kAhead>
__global__ void __launch_bounds__(kMarchThreads)
    MarchStride2GradientKernel(const __grid_constant__ March m, const X* __restrict__ source,
                               const void* __restrict__ filter, Y* __restrict__ result) {
  static_assert(kK % 2 == 1);
  constexpr int kHalo = (kK - 1) / 2, kColumns = kTile + kHalo, kWide = 2 * kTile;
  const MarchThread t = LocateThread<kVector>(m);
  if (!t.active) return;

  const int first_pair = m.pad_top / 2 + t.strip * m.strip_rows;  // pairs of result rows, in padded coordinates
  const int end = min(first_pair + m.strip_rows, (m.pad_top + m.result.h + 1) / 2);
  const int first_out_column = (m.pad_left / 2 + t.tile * kTile) * 2 - m.pad_left;
  const int first_column = m.pad_left / 2 + t.tile * kTile - kHalo;
  const bool inside = first_column >= 0 && first_column + kColumns <= m.source.w;
  const X* image = source + t.image * m.source.step.n + t.channel * m.source.step.c;
  Y* out = result + t.image * m.result.step.n + first_out_column * m.result.step.w + t.channel * m.result.step.c;
  const int pixel = static_cast<int>(m.result.step.w);

  Packed<X, kVector> ahead[kAhead][kColumns];
  const int begin = first_pair - kHalo;
#pragma unroll
  for (int a = 0; a < kAhead; ++a) LoadRow(m.source, image, begin + a, first_column, inside, ahead[a]);
  float taps[kK][kK][kVector];
  LoadFilter<Narrower<X, Y>>(m, t.image, t.channel, filter, taps);

  float sums[kK][kWide][kVector] = {};  // the last two are always zero
  for (int row = begin; row < end;) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u, ++row) {
      if (row >= end) break;
      float in[kColumns][kVector];
      Convert(ahead[u], in);
      if (row + kAhead < end) LoadRow(m.source, image, row + kAhead, first_column, inside, ahead[u]);
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        AddTapsStride2<kK, kVector, kTile>(in, taps[parity], sums[parity]);
        const int out_row = 2 * row + parity - m.pad_top;
        if (row >= first_pair && static_cast<unsigned>(out_row) < static_cast<unsigned>(m.result.h)) {
#pragma unroll
          for (int w = 0; w < kWide; ++w) {
            if (static_cast<unsigned>(first_out_column + w) < static_cast<unsigned>(m.result.w)) {
              StoreVector(out + out_row * m.result.step.h + w * pixel, sums[parity][w]);
            }
          }
        }
      }
#pragma unroll
      for (int i = 2; i < kK; ++i) {
        Copy(sums[i], sums[i - 2]);
        AddTapsStride2<kK, kVector, kTile>(in, taps[i], sums[i - 2]);
      }
      Clear(sums[kK - 2]);
      Clear(sums[kK - 1]);
    }
  }
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_MARCH_CUH_
