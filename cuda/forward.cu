#include "cuda/gather.cuh"
#include "cuda/kernels.h"
#include "cuda/march.h"

namespace dwsconv::cuda {

bool LaunchForward(const Problem& p, const Device& device, const void* x, const void* filter, void* y,
                   cudaStream_t stream) {
  if (const auto tile = PlanMarch(p, /*forward=*/true, device, Alignment(x, y))) {
    if (LaunchMarch(p, /*forward=*/true, *tile, x, filter, y, stream)) return true;
  }
  return WithDtypes(p, [&](auto x_type, auto filter_type, auto y_type) {
    LaunchGather<true, typename decltype(x_type)::type, typename decltype(filter_type)::type,
                 typename decltype(y_type)::type>(p, x, filter, y, stream);
  });
}

}  // namespace dwsconv::cuda
