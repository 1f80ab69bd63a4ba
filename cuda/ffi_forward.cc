#include "cuda/ffi_problem.h"
#include "cuda/handlers.h"
#include "cuda/launch.h"

namespace dwsconv::cuda {

namespace ffi = xla::ffi;

static ffi::Error ForwardImpl(cudaStream_t stream, int32_t ordinal, ffi::Dictionary attrs, ffi::AnyBuffer x,
                              ffi::AnyBuffer filter, ffi::Result<ffi::AnyBuffer> y) {
  const auto problem = DecodeProblem("forward", attrs, x, filter, *y);
  if (!problem) return problem.error();
  if (y->element_count() == 0) return ffi::Error::Success();
  return PlanAndLaunch(
      "forward", ordinal, attrs,
      {*problem, /*forward=*/true, Epilogue{}, x.untyped_data(), filter.untyped_data(), y->untyped_data(), stream});
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
