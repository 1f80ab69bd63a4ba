#include "cuda/ffi_problem.h"
#include "cuda/handlers.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dwsconv::cuda {

namespace ffi = xla::ffi;

static ffi::Error GradInputImpl(cudaStream_t stream, int32_t ordinal, ffi::Dictionary attrs, ffi::AnyBuffer g,
                                ffi::AnyBuffer filter, ffi::Result<ffi::AnyBuffer> x) {
  const auto problem = DecodeProblem("grad_input", attrs, *x, filter, g);
  if (!problem) return problem.error();
  if (x->element_count() == 0) return ffi::Error::Success();
  const auto device = DescribeDevice(ordinal);
  if (!device) return device.error();
  const void* const source = g.untyped_data();
  void* const result = x->untyped_data();
  const PassPlan plan = PlanPass(*problem, /*forward=*/false, *device, Alignment(source, filter.untyped_data(), result), ForcedTile(attrs));
  const bool has_instance = LaunchGradInput(*problem, plan, source, filter.untyped_data(), result, stream);
  return FinishLaunch("grad_input", has_instance, stream);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(GradInput, GradInputImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dwsconv::cuda
