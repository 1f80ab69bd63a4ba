// What the kernel of pointwise convolution (pointwise.cuh) takes, and its launcher.
#ifndef JAX_DWSCONV_CUDA_POINTWISE_H_
#define JAX_DWSCONV_CUDA_POINTWISE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/divisor.h"
#include "cuda/epilogue.h"
#include "cuda/problem.h"

namespace dwsconv::cuda {

// result = activation((source * gate) kernel * scale + bias + residual), of one 16-bit type.
struct PointwiseCall {
  int64_t images, pixels_per_image, channels, features;  // channels: a multiple of 8, features: of 4
  Dtype dtype;
  Epilogue epilogue;
  const void* source;  // (images, pixels_per_image, channels)
  const void* kernel;  // (channels, features)
  const void* gate;    // (images, channels), or null
  void* result;        // (images, pixels_per_image, features)
  cudaStream_t stream;
};

struct PointwiseTask {
  int pixels, channels, features;
  Divisor pixels_per_image;
  const void* gate;
  FusedEpilogue epilogue;
};

// Returns false where there is no instance. Addresses must be multiples of 16 bytes, or of 8 with features that are no
// multiple of 8.
bool LaunchPointwise(const PointwiseCall& call, int multiprocessors);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_POINTWISE_H_
