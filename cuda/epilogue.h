// The epilogue as the kernels take it.
#ifndef JAX_DWSCONV_CUDA_EPILOGUE_H_
#define JAX_DWSCONV_CUDA_EPILOGUE_H_

#include "cuda/problem.h"

namespace dwsconv::cuda {

// Activations of a kind differ in their constants.
struct FusedEpilogue {
  enum class Kind : uint8_t {
    kClamp,      // to [low, high]
    kSmooth,     // x / (1 + exp(-x * (linear + cubic * x^2)))
    kHardSwish,  // x * clamp(x + 3, 0, 6) / 6
  };
  bool present;
  Kind kind;
  float low, high, linear, cubic;
  const float *scale, *bias;
  const void* residual;
};

FusedEpilogue DescribeEpilogue(const Epilogue& epilogue);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_EPILOGUE_H_
