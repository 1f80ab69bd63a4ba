#include "cuda/ffi_problem.h"
#include "cuda/handlers.h"
#include "cuda/launch.h"

namespace dwsconv::cuda {

namespace ffi = xla::ffi;

static ffi::Error FusedForwardImpl(cudaStream_t stream, int32_t ordinal, ffi::Dictionary attrs, ffi::AnyBuffer x,
                                   ffi::AnyBuffer filter, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                                   ffi::AnyBuffer residual, ffi::Result<ffi::AnyBuffer> y) {
  auto problem = DecodeProblem("fused_forward", attrs, x, filter, *y, /*further_attributes=*/1);
  if (!problem) return problem.error();
  const auto epilogue = DecodeEpilogue("fused_forward", problem->out_channels(), attrs, scale, bias, residual, *y);
  if (!epilogue) return epilogue.error();
  if (y->element_count() == 0) return ffi::Error::Success();
  problem->has_residual = epilogue->residual != nullptr;
  return PlanAndLaunch(
      "fused_forward", ordinal, attrs,
      {*problem, /*forward=*/true, *epilogue, x.untyped_data(), filter.untyped_data(), y->untyped_data(), stream});
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(FusedForward, FusedForwardImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dwsconv::cuda
