// The filter of a vector of channels, in registers.
#ifndef JAX_DWSCONV_CUDA_FILTER_TAPS_CUH_
#define JAX_DWSCONV_CUDA_FILTER_TAPS_CUH_

#include <type_traits>

#include "cuda/correlation.h"
#include "cuda/packed.cuh"

namespace dwsconv::cuda {

// The 16-bit type among the two, if there is one: a filter that is not float has it.
template <class X, class Y>
using Narrower = std::conditional_t<(sizeof(X) < sizeof(Y)), X, Y>;

// `filter` is that of the first tap in the order in which they are used.
template <class F, int kH, int kW, int kVector>
__device__ __forceinline__ void LoadTaps(const F* filter, int step_h, int step_w, int step_c,
                                         float (&taps)[kH][kW][kVector]) {
  const F* row = filter;
#pragma unroll
  for (int i = 0; i < kH; ++i, row += step_h) {
    const F* tap = row;
#pragma unroll
    for (int j = 0; j < kW; ++j, tap += step_w) {
      if (kVector == 1 || step_c == 1) {
        reinterpret_cast<const Packed<F, kVector>*>(tap)->Unpack(taps[i][j]);
      } else {
#pragma unroll
        for (int v = 0; v < kVector; ++v) taps[i][j][v] = ToFloat(tap[v * step_c]);
      }
    }
  }
}

// F: the type of a filter that is not float. Vectors of channels that are neighbours in memory must be aligned.
template <class F, int kH, int kW, int kVector>
__device__ __forceinline__ void LoadFilter(const Correlation& c, int64_t image, int channel, const void* filter,
                                           float (&taps)[kH][kW][kVector]) {
  int64_t offset = channel * c.filter.c;
  if (c.images_per_group != 0) offset += image / c.images_per_group * c.filter.n;
  int step_h = static_cast<int>(c.filter.h), step_w = static_cast<int>(c.filter.w);
  if (c.mirrored) {
    offset += (kH - 1) * c.filter.h + (kW - 1) * c.filter.w;
    step_h = -step_h;
    step_w = -step_w;
  }
  const int step_c = static_cast<int>(c.filter.c);
  if (c.filter_is_float) {
    LoadTaps(static_cast<const float*>(filter) + offset, step_h, step_w, step_c, taps);
  } else if constexpr (!std::is_same_v<F, float>) {
    LoadTaps(static_cast<const F*>(filter) + offset, step_h, step_w, step_c, taps);
  }
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_FILTER_TAPS_CUH_
