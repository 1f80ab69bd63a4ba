// The end of a requantisation.
#ifndef JAX_DWSCONV_CUDA_ROUNDING_H_
#define JAX_DWSCONV_CUDA_ROUNDING_H_

#include "cuda/problem.h"

namespace dwsconv::cuda {

// The limits of what is rounded, and what is added then.
struct Rounding {
  Rounding() = default;
  explicit Rounding(const Requantization& r)
      : low(static_cast<float>(r.low - r.out_zero_point)),
        high(static_cast<float>(r.high - r.out_zero_point)),
        zero_point(r.out_zero_point) {}

  float low, high;
  int zero_point;
};

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_ROUNDING_H_
