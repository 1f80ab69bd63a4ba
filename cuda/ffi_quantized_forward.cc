#include "cuda/ffi_problem.h"
#include "cuda/handlers.h"
#include "cuda/launch.h"
#include "cuda/quantized.h"

namespace dwsconv::cuda {

namespace ffi = xla::ffi;

static ffi::Error QuantizedForwardImpl(cudaStream_t stream, int32_t ordinal, ffi::Dictionary attrs, ffi::AnyBuffer x,
                                       ffi::AnyBuffer filter, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                                       ffi::Result<ffi::AnyBuffer> y) {
  constexpr const char* kOp = "quantized_forward";
  const auto problem = DecodeProblem(kOp, attrs, x, filter, *y, /*further_attributes=*/1, /*integers=*/true);
  if (!problem) return problem.error();
  const auto requantization = DecodeRequantization(*problem, attrs, scale, bias);
  if (!requantization) return requantization.error();
  if (y->element_count() == 0) return ffi::Error::Success();
  const QuantizedCall call{*problem,          *requantization, x.untyped_data(), filter.untyped_data(),
                           y->untyped_data(), stream};
  const auto plan =
      FindQuantizedPlan({*problem, ordinal, Alignment(call.x, call.filter, call.y), 0, true, ForcedTile(attrs)});
  if (!plan) return plan.error();
  return FinishLaunch(kOp, LaunchQuantized(call, *plan), stream);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizedForward, QuantizedForwardImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dwsconv::cuda
