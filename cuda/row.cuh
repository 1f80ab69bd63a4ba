// What the kernels do with a row of pixels.
#ifndef JAX_DWSCONV_CUDA_ROW_CUH_
#define JAX_DWSCONV_CUDA_ROW_CUH_

#include "cuda/correlation.h"
#include "cuda/packed.cuh"

namespace dwsconv::cuda {

// Columns [first, first + kColumns) of one row; zeros outside the image.
template <class X, int kVector, int kColumns>
__device__ __forceinline__ void LoadRow(const Grid& grid, const X* image, int row, int first, bool inside,
                                        Packed<X, kVector> (&columns)[kColumns]) {
  const bool row_inside = static_cast<unsigned>(row) < static_cast<unsigned>(grid.h);
  const X* p = image + row * grid.step.h + first * grid.step.w;
  const int pixel = static_cast<int>(grid.step.w);
  if (row_inside && inside) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      columns[j] = *reinterpret_cast<const Packed<X, kVector>*>(p + j * pixel);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    if (row_inside && static_cast<unsigned>(first + j) < static_cast<unsigned>(grid.w)) {
      columns[j] = *reinterpret_cast<const Packed<X, kVector>*>(p + j * pixel);
    } else {
      columns[j] = {};
    }
  }
}

template <class X, int kVector, int kColumns>
__device__ __forceinline__ void Convert(const Packed<X, kVector> (&columns)[kColumns], float (&in)[kColumns][kVector]) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) columns[j].Unpack(in[j]);
}

template <int kTile, int kVector>
__device__ __forceinline__ void Copy(const float (&from)[kTile][kVector], float (&to)[kTile][kVector]) {
#pragma unroll
  for (int b = 0; b < kTile; ++b) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) to[b][v] = from[b][v];
  }
}

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

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_ROW_CUH_
