// The launchers, one per operator. They know nothing of XLA.
#ifndef JAX_DWSCONV_CUDA_KERNELS_H_
#define JAX_DWSCONV_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include "cuda/plan.h"
#include "cuda/problem.h"

namespace dwsconv::cuda {

// Each enqueues its work on the stream and returns false where it has no instance for the dtypes. Buffers must not be
// empty. Launch errors are left for cudaGetLastError.
bool LaunchForward(const Problem& p, const PassPlan& plan, const void* x, const void* filter, void* y,
                   cudaStream_t stream);
bool LaunchFusedForward(const Problem& p, const PassPlan& plan, const Epilogue& epilogue, const void* x,
                        const void* filter, void* y, cudaStream_t stream);
bool LaunchGradInput(const Problem& p, const PassPlan& plan, const void* g, const void* filter, void* x,
                     cudaStream_t stream);

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
