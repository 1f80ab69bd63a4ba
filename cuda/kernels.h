// The launchers, one per operator. They know nothing of XLA.
#ifndef JAX_DWSCONV_CUDA_KERNELS_H_
#define JAX_DWSCONV_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/plan.h"
#include "cuda/problem.h"

namespace dwsconv::cuda {

// forward with what follows it, else grad_input.
struct PassCall {
  Problem problem;
  bool forward;
  Epilogue epilogue;
  const void* source;  // x, or g
  const void* filter;
  void* result;  // y, or the gradient by x
  cudaStream_t stream;
};

// The launchers enqueue their work on the stream and return false where there is no instance for the dtypes. Buffers
// must not be empty. Launch errors are left for cudaGetLastError.
bool LaunchPass(const PassCall& call, const PassPlan& plan);

// The largest power of two, up to 16, of which all addresses are multiples. Null is one of everything.
template <class... Pointers>
int64_t Alignment(Pointers... addresses) {
  const uintptr_t bits = (uintptr_t{16} | ... | reinterpret_cast<uintptr_t>(addresses));
  return static_cast<int64_t>(bits & (~bits + 1));
}

// workspace holds plan.splits * p.filter_elements() floats and need not be initialised.
bool LaunchGradFilter(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
                      float* workspace, cudaStream_t stream);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_KERNELS_H_
