// The marching kernel for NCHW and stride 1: the lanes of a warp are neighbouring tiles of a row, so a tile comes with
// one load, and the columns that it shares with its neighbours come from their lanes (column reuse). Rows come through
// a ring in shared memory, in which each lane has places of its own: asynchronous copies can be waited for one by one,
// as loads into registers cannot. Otherwise as in march.cuh.
#ifndef JAX_DWSCONV_CUDA_MARCH_PLANES_CUH_
#define JAX_DWSCONV_CUDA_MARCH_PLANES_CUH_

#include "cuda/march.cuh"
#include "cuda/march_planes.h"
#include "cuda/tensor_core.cuh"

namespace dwsconv::cuda {

// kTile + kK - 1 columns, of which this lane has the middle ones. `tile` of `tiles` in the row; zeros outside.
template <int kK, int kTile>
__device__ __forceinline__ void ShareColumns(const float (&own)[kTile], int tile, int tiles,
                                             float (&in)[kTile + kK - 1][1]) {
#pragma unroll
  for (int j = 0; j < kTile + kK - 1; ++j) {
    const int column = j - (kK - 1) / 2;
    const int distance = column >= 0 ? column / kTile : -((kTile - 1 - column) / kTile);
    const float mine = own[column - distance * kTile];
    if (distance == 0) {
      in[j][0] = mine;
    } else {
      const float theirs =
          distance < 0 ? __shfl_up_sync(0xffffffff, mine, -distance) : __shfl_down_sync(0xffffffff, mine, distance);
      in[j][0] = static_cast<unsigned>(tile + distance) < static_cast<unsigned>(tiles) ? theirs : 0;
    }
  }
}

// A few neighbouring elements to shared memory, or zeros.
template <class T, int kCount>
__device__ __forceinline__ void CopyPacked(Packed<T, kCount>& to, const T* from, bool valid) {
  constexpr int kBytes = kCount * static_cast<int>(sizeof(T)), kEach = kBytes < 16 ? kBytes : 16;
#pragma unroll
  for (int i = 0; i < kBytes; i += kEach) {
    CopyAsync<kEach>(reinterpret_cast<char*>(&to) + i, from + i / sizeof(T), valid ? kEach : 0);
  }
}

template <class T, int kK, int kTile>
__global__ void __launch_bounds__(kMarchThreads)
    MarchPlanesKernel(const __grid_constant__ MarchPlanes m, const T* __restrict__ source,
                      const void* __restrict__ filter, T* __restrict__ result) {
  constexpr int kColumns = kTile + kK - 1;
  uint32_t row_of_warp = threadIdx.x % 32;
  const int tile = static_cast<int>(m.tiles.Take(row_of_warp)), tiles = static_cast<int>(m.tiles.value);
  const uint32_t warp = (blockIdx.x * kMarchThreads + threadIdx.x) / 32;
  uint32_t unit = warp * m.rows_per_warp + row_of_warp;
  const bool active = row_of_warp < m.rows_per_warp && unit < m.units;
  if (!active) unit = 0;  // takes part in the exchange of columns, loads and stores nothing
  MarchThread t;
  t.channel = static_cast<int>(m.channels.Take(unit));
  t.strip = static_cast<int>(m.march.strips.Take(unit));
  t.image = unit;

  const int first_out = t.strip * m.march.strip_rows;
  const int last_out = min(first_out + m.march.strip_rows, m.march.result.h);
  const int begin = first_out - m.march.pad_top, end = last_out - m.march.pad_top + kK - 1;
  const int steps = m.march.strip_rows + kK - 1;  // the same for all lanes
  const T* from = source + t.image * m.march.source.step.n + t.channel * m.march.source.step.c +
                  begin * m.march.source.step.h + tile * kTile;
  T* out = result + t.image * m.march.result.step.n + t.channel * m.march.result.step.c +
           first_out * m.march.result.step.h + tile * kTile;

  __shared__ Packed<T, kTile> ring[kRingRows][kMarchThreads];  // each lane has places of its own
  const auto copy = [&](int step) {
    const int row = begin + step;
    const bool valid = active && row < end && static_cast<unsigned>(row) < static_cast<unsigned>(m.march.source.h);
    CopyPacked(ring[static_cast<uint32_t>(step) % kRingRows][threadIdx.x], from, valid);
    from += m.march.source.step.h;
    CommitCopies();
  };
  for (int step = 0; step < kRingRows - 1; ++step) copy(step);
  float taps[kK][kK][1];
  LoadFilter<T>(m.march, t.image, t.channel, filter, taps);
  ScaleTaps(m.march.epilogue, t.channel, taps);
  float bias[1];
  LoadBias(m.march.epilogue, t.channel, bias);

  float sums[kK][kTile][1] = {};
  Start(bias, sums[0]);
  for (int step = 0; step < steps; ++step) {
    copy(step + kRingRows - 1);  // to where the last row was
    WaitForCopies<kRingRows - 1>();
    float own[kTile], in[kColumns][1];
    ring[static_cast<uint32_t>(step) % kRingRows][threadIdx.x].Unpack(own);
    ShareColumns<kK>(own, tile, tiles, in);
    AddTaps<1>(in, taps[kK - 1], sums[kK - 1]);
    if (step >= kK - 1) {
      if (active && begin + step < end) {
        float done[1][kTile];
#pragma unroll
        for (int b = 0; b < kTile; ++b) done[0][b] = sums[kK - 1][b][0];
        Finish<T>(m.march.epilogue, [](int) { return true; }, [&](int) { return out - result; }, done);
        StoreVector(out, done[0]);
      }
      out += m.march.result.step.h;
    }
#pragma unroll
    for (int i = kK - 2; i >= 0; --i) {
      Copy(sums[i], sums[i + 1]);
      AddTaps<1>(in, taps[i], sums[i + 1]);
    }
    Start(bias, sums[0]);
  }
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_MARCH_PLANES_CUH_
