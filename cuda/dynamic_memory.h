// Dynamic shared memory beyond what every kernel may have.
#ifndef JAX_DWSCONV_CUDA_DYNAMIC_MEMORY_H_
#define JAX_DWSCONV_CUDA_DYNAMIC_MEMORY_H_

#include <cuda_runtime_api.h>

namespace dwsconv::cuda {

// Before a launch with `bytes` of it: allows the kernel all that the current device has. The limit belongs to the
// kernel and not to a launch, so a limit of `bytes` could be in the way of a launch from another thread that needs
// more. For kernels without static shared memory.
template <class Kernel>
void AllowDynamicMemory(Kernel kernel, int bytes) {
  if (bytes <= 48 * 1024) return;
  int device = 0, most = bytes;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_DYNAMIC_MEMORY_H_
