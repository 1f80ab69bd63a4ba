// What the kernels of pointwise convolution (pointwise_split.cuh, pointwise_tiles.cuh) take, and their launchers.
#ifndef JAX_DWSCONV_CUDA_POINTWISE_H_
#define JAX_DWSCONV_CUDA_POINTWISE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/divisor.h"
#include "cuda/epilogue.h"
#include "cuda/plan_pointwise.h"
#include "cuda/problem.h"
#include "cuda/rounding.h"

namespace dwsconv::cuda {

// result = clamp(round((source kernel + bias + round((residual - zero point) * its scale)) * scale) + zero point),
// source, kernel, residual and result of int8. The sum in the inner brackets is of int32, what is multiplied of
// float32.
struct PointwiseRequantization {
  const float* scale;
  const int32_t* bias;     // or null
  const int8_t* residual;  // (pixels, features), or null
  const float* residual_scale;
  int residual_zero_point;
  Rounding rounding;
};

// result = activation((source * gate) kernel * scale + bias + residual), all of one type.
struct PointwiseCall {
  PointwiseProblem problem;
  Epilogue epilogue;                       // of floating types
  PointwiseRequantization requantization;  // of int8
  const void* source;                      // (images, pixels_per_image, channels)
  const void* kernel;                      // (channels, features)
  const void* gate;                        // (images, channels), or null
  void* result;                            // (images, pixels_per_image, features)
  cudaStream_t stream;
};

struct PointwiseTask {
  int pixels, channels, features, images;
  Divisor pixels_per_image;
  const void* gate;
  FusedEpilogue epilogue;                  // of floating types
  PointwiseRequantization requantization;  // of int8
  // Of PointwiseShape.
  Divisor feature_tiles;
  int pixel_tiles, gates, kernel_chunks;
};

// What both kernels have of the task.
PointwiseTask DescribePointwise(const PointwiseCall& call);

// Return false where there is no instance.
bool LaunchPointwise(const PointwiseCall& call, const PointwisePlan& plan, const Device& device);
bool LaunchPointwiseTile(const PointwiseCall& call, const PointwiseTile& tile, const PointwiseShape& shape);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_POINTWISE_H_
