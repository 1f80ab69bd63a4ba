// What the kernels of the int8 convolution (quantized.cuh, quantized_burst.cuh) take, and their launcher.
#ifndef JAX_DWSCONV_CUDA_QUANTIZED_H_
#define JAX_DWSCONV_CUDA_QUANTIZED_H_

#include <cuda_runtime_api.h>

#include "cuda/march.h"
#include "cuda/plan_quantized.h"
#include "cuda/problem.h"
#include "cuda/rounding.h"

namespace dwsconv::cuda {

struct QuantizedCall {
  Problem problem;
  Requantization requantization;
  const void* x;
  const void* filter;
  void* y;
  cudaStream_t stream;
};

struct QuantizedMarch : March {
  Requantization requantization;
  Rounding rounding;
  int kernel_h, kernel_w;  // of the filter; the instance may be larger
};

// Enqueue their work. The first returns false where there is no instance.
bool LaunchQuantized(const QuantizedCall& call, const QuantizedPlan& plan);
bool LaunchQuantizedStride1(const QuantizedCall& call, const QuantizedMarch& march, const QuantizedTile& tile);
bool LaunchQuantizedStride2(const QuantizedCall& call, const QuantizedMarch& march, const QuantizedTile& tile);
bool LaunchQuantizedBurst(const QuantizedCall& call, const QuantizedMarch& march, const QuantizedTile& tile);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_QUANTIZED_H_
