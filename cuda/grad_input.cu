#include "cuda/gather.cuh"
#include "cuda/kernels.h"
#include "cuda/march.h"

namespace dwsconv::cuda {

bool LaunchGradInput(const Problem& p, const Device& device, const void* g, const void* filter, void* x,
                     cudaStream_t stream) {
  if (const auto tile = PlanMarch(p, /*forward=*/false, device, Alignment(g, x))) {
    if (LaunchMarch(p, /*forward=*/false, *tile, g, filter, x, stream)) return true;
  }
  return WithDtypes(p, [&](auto x_type, auto filter_type, auto y_type) {
    LaunchGather<false, typename decltype(y_type)::type, typename decltype(filter_type)::type,
                 typename decltype(x_type)::type>(p, g, filter, x, stream);
  });
}

}  // namespace dwsconv::cuda
