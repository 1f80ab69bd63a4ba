#include "cuda/burst.h"
#include "cuda/gather.h"
#include "cuda/kernels.h"
#include "cuda/lines.h"
#include "cuda/march.h"
#include "cuda/march_planes.h"
#include "cuda/slide.h"
#include "cuda/small_planes.h"
#include "cuda/staged.h"
#include "cuda/toeplitz.h"
#include "cuda/toeplitz_planes.h"

namespace dwsconv::cuda {
namespace {

PassCall TurnedCall(PassCall call) {
  call.problem = Turned(call.problem);
  return call;
}

bool LaunchPlanned(const PassCall& call, const PassPlan& plan) {
  switch (plan.kernel) {
    case PassPlan::Kernel::kToeplitz: return LaunchToeplitz(call, plan.toeplitz);
    case PassPlan::Kernel::kToeplitzPlanes: return LaunchToeplitzPlanes(call, plan.toeplitz_planes);
    case PassPlan::Kernel::kSmallPlanes: return LaunchSmallPlanes(call, plan.small_planes);
    case PassPlan::Kernel::kMarch: return LaunchMarch(plan.turned ? TurnedCall(call) : call, plan.march);
    case PassPlan::Kernel::kMarchPlanes: return LaunchMarchPlanes(call, plan.march_planes);
    case PassPlan::Kernel::kStaged: return LaunchStaged(call, plan.staged);
    case PassPlan::Kernel::kBurst: return LaunchBurst(call, plan.burst);
    case PassPlan::Kernel::kSlide: return LaunchSlide(call, plan.slide);
    case PassPlan::Kernel::kLines: return LaunchLines(call);
    case PassPlan::Kernel::kGather: return false;
  }
  return false;
}

}  // namespace

bool LaunchPass(const PassCall& call, const PassPlan& plan) { return LaunchPlanned(call, plan) || LaunchGather(call); }

}  // namespace dwsconv::cuda
