#include "cuda/launch.h"

namespace dwsconv::cuda {
namespace {

__global__ void Nothing() {}

}  // namespace

int CompiledCapability() {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, Nothing) == cudaSuccess ? attributes.ptxVersion : 0;
}

}  // namespace dwsconv::cuda
