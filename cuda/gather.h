// The launcher of the kernel that takes everything (gather.cuh).
#ifndef JAX_DWSCONV_CUDA_GATHER_H_
#define JAX_DWSCONV_CUDA_GATHER_H_

#include "cuda/kernels.h"

namespace dwsconv::cuda {

// Returns false where there is no instance for the dtypes.
bool LaunchGather(const PassCall& call);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_GATHER_H_
