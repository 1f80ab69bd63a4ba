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
__device__ __forceinline__ void LoadTaps(const F* filter, int step_h, int step_w, float (&taps)[kH][kW][kVector]) {
#pragma unroll
  for (int i = 0; i < kH; ++i) {
#pragma unroll
    for (int j = 0; j < kW; ++j) {
      LoadVector(filter + i * step_h + j * step_w, taps[i][j]);
    }
  }
}

// F: the type of a filter that is not float. The channels of a vector must be neighbours in memory, and aligned.
template <class F, int kH, int kW, int kVector>
__device__ __forceinline__ void LoadFilter(const Correlation& c, int image, int channel, const void* filter,
                                           float (&taps)[kH][kW][kVector]) {
  const uint32_t group = c.grouped ? c.images_per_group.Quotient(image) : 0;
  const int64_t offset = c.first_tap + group * c.filter.n + channel * c.filter.c;
  const int step_h = static_cast<int>(c.filter.h), step_w = static_cast<int>(c.filter.w);
  if (std::is_same_v<F, float> || !c.filter_is_float) {
    LoadTaps(static_cast<const F*>(filter) + offset, step_h, step_w, taps);
  } else {
    LoadTaps(static_cast<const float*>(filter) + offset, step_h, step_w, taps);
  }
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_FILTER_TAPS_CUH_
