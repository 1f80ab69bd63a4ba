// Conversions between storage types and float accumulators, and the table of compiled dtype combinations.
#ifndef JAX_DWSCONV_CUDA_DTYPES_CUH_
#define JAX_DWSCONV_CUDA_DTYPES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/problem.h"

namespace dwsconv::cuda {

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ inline float ToFloat(float v) { return v; }
__device__ inline float ToFloat(BFloat16 v) { return __bfloat162float(v); }
__device__ inline float ToFloat(Float16 v) { return __half2float(v); }

template <class T>
__device__ T FromFloat(float v);
template <>
__device__ inline float FromFloat<float>(float v) {
  return v;
}
template <>
__device__ inline BFloat16 FromFloat<BFloat16>(float v) {
  return __float2bfloat16(v);
}
template <>
__device__ inline Float16 FromFloat<Float16>(float v) {
  return __float2half(v);
}

// Stands for a type in the arguments of a generic lambda.
template <class T>
struct Type {
  using type = T;
};

// Calls visit(Type<T>) with the storage type of activations and returns what it returns; false for another.
template <class Visit>
bool WithDtype(Dtype dtype, const Visit& visit) {
  switch (dtype) {
    case Dtype::kF32: return visit(Type<float>{});
    case Dtype::kBF16: return visit(Type<BFloat16>{});
    case Dtype::kF16: return visit(Type<Float16>{});
    default: return false;
  }
}

// Calls visit(Type<X>, Type<F>, Type<Y>) with the storage types of input, filter and output and returns true, where
// this combination is compiled: the input in float, bfloat16 or float16, filter and output as the input or in float.
template <class Visit>
bool WithDtypes(const Problem& p, const Visit& visit) {
  const auto with_input = [&](Dtype input, auto x) {
    using X = decltype(x);
    if (p.x_dtype != input) return false;
    const auto with_filter = [&](auto filter) {
      if (p.y_dtype == input) {
        visit(x, filter, X{});
      } else if (p.y_dtype == Dtype::kF32) {
        visit(x, filter, Type<float>{});
      } else {
        return false;
      }
      return true;
    };
    if (p.filter_dtype == input) return with_filter(X{});
    return p.filter_dtype == Dtype::kF32 && with_filter(Type<float>{});
  };
  return with_input(Dtype::kF32, Type<float>{}) || with_input(Dtype::kBF16, Type<BFloat16>{}) ||
         with_input(Dtype::kF16, Type<Float16>{});
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_DTYPES_CUH_
