// The int8 kernel for problems that are too small to hide a latency: as quantized.cuh, but a thread has a small tile of
// the result, and all that it reads is in flight at once.
#ifndef JAX_DWSCONV_CUDA_QUANTIZED_BURST_CUH_
#define JAX_DWSCONV_CUDA_QUANTIZED_BURST_CUH_

#include "cuda/quantized.cuh"

namespace dwsconv::cuda {

// `zero` outside the image. `p` is where the pixel (row, column) would be.
template <int kRows, int kColumns>
__device__ __forceinline__ void LoadWordTile(const Grid& grid, const int8_t* p, int row, int column, uint32_t zero,
                                             uint32_t (&words)[kRows][kColumns]) {
  const int pixel = static_cast<int>(grid.step.w);
  if (row >= 0 && row + kRows <= grid.h && column >= 0 && column + kColumns <= grid.w) {
#pragma unroll
    for (int i = 0; i < kRows; ++i, p += grid.step.h) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) words[i][j] = *reinterpret_cast<const uint32_t*>(p + j * pixel);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i, p += grid.step.h) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      words[i][j] = zero;
      if (static_cast<unsigned>(row + i) < static_cast<unsigned>(grid.h) &&
          static_cast<unsigned>(column + j) < static_cast<unsigned>(grid.w)) {
        words[i][j] = *reinterpret_cast<const uint32_t*>(p + j * pixel);
      }
    }
  }
}

template <class Y, int kK, int kS, int kTile, int kRows>
__global__ void __launch_bounds__(kMarchThreads)
    QuantizedBurstKernel(const __grid_constant__ QuantizedMarch m, const int8_t* __restrict__ source,
                         const int8_t* __restrict__ filter, Y* __restrict__ result) {
  constexpr int kColumns = (kTile - 1) * kS + kK, kRead = (kRows - 1) * kS + kK;
  constexpr bool kShift = kK == 3 && kS == 1, kEvenOnly = kShift || kS == 2;
  const MarchThread t = LocateThread<kWordChannels>(m);
  if (!t.active) return;

  const int first_out = t.strip * kRows, row = first_out * kS - m.pad_top;
  const int column = t.tile * kTile * kS - m.pad_left;
  uint32_t words[kRead][kColumns];
  LoadWordTile(m.source,
               source + t.image * m.source.step.n + t.channel + row * m.source.step.h + column * m.source.step.w, row,
               column, InEveryByte(m.requantization.x_zero_point), words);
  WordTaps<kK, kK> taps;
  float scale[kWordChannels];
  int start[kWordChannels];
  LoadConstants<Y>(m, t, filter, taps, scale, start);

  int sums[kRows][kTile][kWordChannels];
#pragma unroll
  for (int h = 0; h < kRows; ++h) {
#pragma unroll
    for (int b = 0; b < kTile; ++b) {
#pragma unroll
      for (int c = 0; c < kWordChannels; ++c) sums[h][b][c] = start[c];
    }
  }
#pragma unroll
  for (int r = 0; r < kRead; ++r) {
    uint32_t pairs[kColumns / 2 + 2][2];
    MakePairs(words[r], pairs);
#pragma unroll
    for (int c = 0; c < kWordChannels; ++c) {
      uint32_t quads[kColumns + 1];
      MakeQuads<kEvenOnly, kColumns>(pairs, c, quads);
#pragma unroll
      for (int h = 0; h < kRows; ++h) {
        const int i = r - h * kS;
        if (i >= 0 && i < kK) AddQuads<kS, kShift>(quads, taps, i, c, sums[h], sums[h]);
      }
    }
  }

  Y* out =
      result + t.image * m.result.step.n + first_out * m.result.step.h + t.tile * kTile * m.result.step.w + t.channel;
  const int pixel = static_cast<int>(m.result.step.w), columns_left = m.result.w - t.tile * kTile;
#pragma unroll
  for (int h = 0; h < kRows; ++h) {
    if (first_out + h < m.result.h) {
      StoreSums(m.rounding, scale, sums[h], columns_left, pixel, out + h * m.result.step.h);
    }
  }
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_QUANTIZED_BURST_CUH_
