// The epilogue as the kernels take it.
#ifndef JAX_DWSCONV_CUDA_EPILOGUE_H_
#define JAX_DWSCONV_CUDA_EPILOGUE_H_

#include "cuda/problem.h"

namespace dwsconv::cuda {

// relu and relu6 clamp to [low, high].
struct FusedEpilogue {
  enum class Kind : uint8_t { kNone, kClamp, kSilu, kGelu, kHardSwish };
  bool present;
  bool follows;  // whether there is anything besides scale and bias
  Kind kind;
  float low, high;
  const float *scale, *bias;
  const void* residual;
};

FusedEpilogue DescribeEpilogue(const Epilogue& epilogue);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_EPILOGUE_H_
