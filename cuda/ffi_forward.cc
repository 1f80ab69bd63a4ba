#include "cuda/ffi_problem.h"
#include "cuda/handlers.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dwsconv::cuda {

namespace ffi = xla::ffi;

static ffi::Error ForwardImpl(cudaStream_t stream, int32_t ordinal, ffi::Dictionary attrs, ffi::AnyBuffer x,
                              ffi::AnyBuffer filter, ffi::Result<ffi::AnyBuffer> y) {
  const auto problem = DecodeProblem("forward", attrs, x, filter, *y);
  if (!problem) return problem.error();
  if (y->element_count() == 0) return ffi::Error::Success();
  const auto device = DescribeDevice(ordinal);
  if (!device) return device.error();
  const void* const source = x.untyped_data();
  void* const result = y->untyped_data();
  const PassPlan plan = PlanPass(*problem, /*forward=*/true, *device, Alignment(source, filter.untyped_data(), result), ForcedTile(attrs));
  const bool has_instance = LaunchForward(*problem, plan, source, filter.untyped_data(), result, stream);
  return FinishLaunch("forward", has_instance, stream);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(Forward, ForwardImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dwsconv::cuda
