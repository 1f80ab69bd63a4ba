// The kernel for one spatial dimension in NCW with stride 1: a thread has as many neighbouring results as one memory
// access holds, and reads the two or three aligned vectors that their windows lie in. What neighbours share comes from
// the first cache.
#ifndef JAX_DWSCONV_CUDA_LINES_CUH_
#define JAX_DWSCONV_CUDA_LINES_CUH_

#include "cuda/epilogue.cuh"
#include "cuda/filter_taps.cuh"
#include "cuda/lines.h"
#include "cuda/row.cuh"

namespace dwsconv::cuda {

constexpr int kLinesThreads = 256;

// kShift: where in the first of the vectors the window of the first result begins.
template <class T, int kTaps, int kShift>
__global__ void __launch_bounds__(kLinesThreads)
    LinesKernel(const __grid_constant__ Lines m, const T* __restrict__ source, const void* __restrict__ filter,
                T* __restrict__ result) {
  constexpr int kTile = kLinesBytes / static_cast<int>(sizeof(T)), kVectors = (kShift + kTile + kTaps - 2) / kTile + 1;
  uint32_t line = blockIdx.x * kLinesThreads + threadIdx.x;
  if (line >= m.threads) return;
  const int tile = static_cast<int>(m.tiles.Take(line));
  uint32_t image = line;
  const int channel = static_cast<int>(m.channels.Take(image));

  const T* const from = source + static_cast<int64_t>(line) * m.source.w;
  const int first = tile + m.first_vector, source_vectors = m.source.w / kTile;
  Packed<T, kTile> read[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    read[i] = {};
    if (static_cast<unsigned>(first + i) < static_cast<unsigned>(source_vectors)) {
      read[i] = *reinterpret_cast<const Packed<T, kTile>*>(from + (first + i) * kTile);
    }
  }
  float taps[1][kTaps][1], bias[1];
  LoadFilter<T>(m, static_cast<int>(image), channel, filter, taps);
  LoadBias(m.epilogue, channel, bias);
  ScaleTaps(m.epilogue, channel, taps);

  float in[kVectors][kTile], sums[1][kTile];
  Convert(read, in);
#pragma unroll
  for (float& sum : sums[0]) sum = bias[0];
#pragma unroll
  for (int j = 0; j < kTaps; ++j) {
#pragma unroll
    for (int b = 0; b < kTile; ++b) {
      const int at = kShift + b + j;
      sums[0][b] = fmaf(in[at / kTile][at % kTile], taps[0][j][0], sums[0][b]);
    }
  }
  const int64_t offset = static_cast<int64_t>(line) * m.result.w + tile * kTile;
  Finish<T>(m.epilogue, [](int) { return true; }, [&](int) { return offset; }, sums);
  StoreVector(result + offset, sums[0]);
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_LINES_CUH_
