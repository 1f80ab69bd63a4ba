#include "cuda/burst.h"
#include "cuda/gather.cuh"
#include "cuda/kernels.h"
#include "cuda/march.h"
#include "cuda/march_planes.h"
#include "cuda/slide.h"
#include "cuda/toeplitz.h"

namespace dwsconv::cuda {

bool LaunchGradInput(const Problem& p, const PassPlan& plan, const void* g, const void* filter, void* x,
                     cudaStream_t stream) {
  switch (plan.kernel) {
    case PassPlan::Kernel::kToeplitz:
      if (LaunchToeplitz(p, /*forward=*/false, plan.toeplitz, g, filter, x, stream)) return true;
      break;
    case PassPlan::Kernel::kMarch:
      if (LaunchMarch(plan.turned ? Turned(p) : p, /*forward=*/false, plan.march, g, filter, x, stream)) return true;
      break;
    case PassPlan::Kernel::kMarchPlanes:
      if (LaunchMarchPlanes(p, /*forward=*/false, plan.march, g, filter, x, stream)) return true;
      break;
    case PassPlan::Kernel::kBurst:
      if (LaunchBurst(p, /*forward=*/false, plan.burst, g, filter, x, stream)) return true;
      break;
    case PassPlan::Kernel::kSlide:
      if (LaunchSlide(p, /*forward=*/false, plan.slide, g, filter, x, stream)) return true;
      break;
    case PassPlan::Kernel::kGather: break;
  }
  return WithDtypes(p, [&](auto x_type, auto filter_type, auto y_type) {
    LaunchGather<false, typename decltype(y_type)::type, typename decltype(filter_type)::type,
                 typename decltype(x_type)::type>(p, g, filter, x, stream);
  });
}

}  // namespace dwsconv::cuda
