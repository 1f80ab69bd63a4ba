// From a tile to the instance of the int8 kernel that has it as template arguments.
#ifndef JAX_DWSCONV_CUDA_QUANTIZED_LAUNCH_CUH_
#define JAX_DWSCONV_CUDA_QUANTIZED_LAUNCH_CUH_

#include "cuda/quantized.cuh"
#include "cuda/quantized.h"

namespace dwsconv::cuda {

template <class Y, int kH, int kW, int kS, int kTile, int kAhead>
void LaunchQuantizedKernel(const QuantizedCall& call, const QuantizedMarch& march) {
  const auto blocks = static_cast<unsigned>((march.threads + kMarchThreads - 1) / kMarchThreads);
  QuantizedKernel<Y, kH, kW, kS, kTile, kAhead><<<blocks, kMarchThreads, 0, call.stream>>>(
      march, static_cast<const int8_t*>(call.x), static_cast<const int8_t*>(call.filter), static_cast<Y*>(call.y));
}

template <int kS>
bool LaunchQuantizedTile(const QuantizedCall& call, const QuantizedMarch& march, const QuantizedTile& tile) {
#define DWSCONV_TRY(kH, kW, kTile, kAhead)                                                             \
  if constexpr (HasQuantizedInstance(kS, kH, kTile, kAhead)) {                                         \
    if (tile.kernel_h == kH && tile.kernel_w == kW && tile.columns == kTile && tile.ahead == kAhead) { \
      if (call.problem.y_dtype == Dtype::kI8) {                                                        \
        LaunchQuantizedKernel<int8_t, kH, kW, kS, kTile, kAhead>(call, march);                         \
      } else {                                                                                         \
        LaunchQuantizedKernel<int32_t, kH, kW, kS, kTile, kAhead>(call, march);                        \
      }                                                                                                \
      return true;                                                                                     \
    }                                                                                                  \
  }
  DWSCONV_QUANTIZED_TILES(DWSCONV_TRY)
#undef DWSCONV_TRY
  return false;
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_QUANTIZED_LAUNCH_CUH_
