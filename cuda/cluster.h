// The launch of kernels whose neighbouring blocks work together (sm_90 and newer).
#ifndef JAX_DWSCONV_CUDA_CLUSTER_H_
#define JAX_DWSCONV_CUDA_CLUSTER_H_

#include <cuda_runtime.h>

#include <utility>

#include "cuda/dynamic_memory.h"

namespace dwsconv::cuda {

// `cluster`: blocks in a cluster; 1 for none.
template <class Kernel, class... Arguments>
void LaunchClusters(Kernel kernel, unsigned blocks, unsigned threads, int shared, unsigned cluster, cudaStream_t stream,
                    Arguments&&... arguments) {
  AllowDynamicMemory(kernel, shared);
  if (cluster > 8) cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_CLUSTER_H_
