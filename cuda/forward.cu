#include "cuda/burst.h"
#include "cuda/gather.cuh"
#include "cuda/kernels.h"
#include "cuda/march.h"
#include "cuda/march_planes.h"
#include "cuda/slide.h"
#include "cuda/toeplitz.h"

namespace dwsconv::cuda {

bool LaunchForward(const Problem& p, const PassPlan& plan, const void* x, const void* filter, void* y,
                   cudaStream_t stream) {
  switch (plan.kernel) {
    case PassPlan::Kernel::kToeplitz:
      if (LaunchToeplitz(p, /*forward=*/true, plan.toeplitz, x, filter, y, stream)) return true;
      break;
    case PassPlan::Kernel::kMarch:
      if (LaunchMarch(plan.turned ? Turned(p) : p, /*forward=*/true, plan.march, x, filter, y, stream)) return true;
      break;
    case PassPlan::Kernel::kMarchPlanes:
      if (LaunchMarchPlanes(p, /*forward=*/true, plan.march, x, filter, y, stream)) return true;
      break;
    case PassPlan::Kernel::kBurst:
      if (LaunchBurst(p, /*forward=*/true, plan.burst, x, filter, y, stream)) return true;
      break;
    case PassPlan::Kernel::kSlide:
      if (LaunchSlide(p, /*forward=*/true, plan.slide, x, filter, y, stream)) return true;
      break;
    case PassPlan::Kernel::kGather: break;
  }
  return WithDtypes(p, [&](auto x_type, auto filter_type, auto y_type) {
    LaunchGather<true, typename decltype(x_type)::type, typename decltype(filter_type)::type,
                 typename decltype(y_type)::type>(p, x, filter, y, stream);
  });
}

}  // namespace dwsconv::cuda
