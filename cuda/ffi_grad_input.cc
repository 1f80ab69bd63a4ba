#include "cuda/ffi_problem.h"
#include "cuda/handlers.h"
#include "cuda/launch.h"

namespace dwsconv::cuda {

namespace ffi = xla::ffi;

static ffi::Error GradInputImpl(cudaStream_t stream, int32_t ordinal, ffi::Dictionary attrs, ffi::AnyBuffer g,
                                ffi::AnyBuffer filter, ffi::Result<ffi::AnyBuffer> x) {
  const auto problem = DecodeProblem("grad_input", attrs, *x, filter, g);
  if (!problem) return problem.error();
  if (x->element_count() == 0) return ffi::Error::Success();
  return PlanAndLaunch(
      "grad_input", ordinal, attrs,
      {*problem, /*forward=*/false, Epilogue{}, g.untyped_data(), filter.untyped_data(), x->untyped_data(), stream});
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
