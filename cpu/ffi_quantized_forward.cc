#include "cpu/ffi_handler.h"
#include "cpu/handlers.h"

namespace dwsconv::cpu {

namespace ffi = xla::ffi;

static ffi::Error QuantizedForwardImpl(ffi::ThreadPool pool, ffi::Dictionary attrs, ffi::AnyBuffer x,
                                       ffi::AnyBuffer filter, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                                       ffi::Result<ffi::AnyBuffer> y) {
  const auto problem =
      DecodeProblem("quantized_forward", attrs, x, filter, *y, /*further_attributes=*/1, /*integers=*/true);
  if (!problem) return problem.error();
  const auto requantization = DecodeRequantization(*problem, attrs, scale, bias);
  if (!requantization) return requantization.error();
  if (y->element_count() == 0) return ffi::Error::Success();
  PoolParallel parallel(pool);
  const bool has_instance = BestKernels().quantized_forward(*problem, *requantization, x.untyped_data(),
                                                            filter.untyped_data(), y->untyped_data(), parallel);
  return has_instance ? ffi::Error::Success() : NoInstance("quantized_forward");
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizedForward, QuantizedForwardImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attrs()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace dwsconv::cpu
