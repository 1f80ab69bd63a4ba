// What the CUDA handlers share around a launch.
#ifndef JAX_DWSCONV_CUDA_LAUNCH_H_
#define JAX_DWSCONV_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <string_view>

#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "cuda/plan_quantized.h"
#include "xla/ffi/api/ffi.h"

namespace dwsconv::cuda {

// What the planner decided for a call, from memory if the same was asked before: planning takes longer than a launch.
struct PlanKey {
  Problem problem;
  int ordinal;
  int64_t alignment, max_splits;  // 0: not for grad_filter
  bool forward;
  std::string_view forced;
};
xla::ffi::ErrorOr<PassPlan> FindPassPlan(const PlanKey& key);
xla::ffi::ErrorOr<GradFilterPlan> FindGradFilterPlan(const PlanKey& key);
xla::ffi::ErrorOr<QuantizedPlan> FindQuantizedPlan(const PlanKey& key);

// The facts that the planner needs about the device with this ordinal, which must be the current one.
xla::ffi::ErrorOr<Device> DescribeDevice(int ordinal);

// Plans forward or grad_input for this device and launches it: what their handlers do once they know the operands. The
// result must not be empty.
xla::ffi::Error PlanAndLaunch(const char* op, int ordinal, const xla::ffi::Dictionary& attrs, const PassCall& call);

// Turns what a launcher returned, and the error of its launches, into the handler's answer. `op` names the operator.
xla::ffi::Error FinishLaunch(const char* op, bool has_instance, cudaStream_t stream);

// What __CUDA_ARCH__ / 10 was when the code was compiled that the current device runs: less than the device's own
// capability where it runs the PTX of an older one, without what is behind architecture checks. 0: unknown.
int CompiledCapability();

// Diagnostics for tests: the text of the plan that the last call with a forced tile got.
void NoteForcedPlan(std::string planned);
std::string LastForcedPlan();

// Diagnostics for tests: how many handler calls so far were recorded into a CUDA graph.
int64_t CapturedCalls();

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_LAUNCH_H_
