#include "cpu/ffi_handler.h"
#include "cpu/handlers.h"

namespace dwsconv::cpu {

namespace ffi = xla::ffi;

static ffi::Error FusedForwardImpl(ffi::ThreadPool pool, ffi::Dictionary attrs, ffi::AnyBuffer x, ffi::AnyBuffer filter,
                                   ffi::AnyBuffer scale, ffi::AnyBuffer bias, ffi::AnyBuffer residual,
                                   ffi::Result<ffi::AnyBuffer> y) {
  const auto problem = DecodeProblem("fused_forward", attrs, x, filter, *y, /*further_attributes=*/1);
  if (!problem) return problem.error();
  const auto epilogue = DecodeEpilogue("fused_forward", problem->out_channels(), attrs, scale, bias, residual, *y);
  if (!epilogue) return epilogue.error();
  if (y->element_count() == 0) return ffi::Error::Success();
  PreferHugePages(y->untyped_data(), y->size_bytes());
  PoolParallel parallel(pool);
  const bool has_instance = BestKernels().fused_forward(*problem, *epilogue, x.untyped_data(), filter.untyped_data(),
                                                        y->untyped_data(), parallel);
  return has_instance ? ffi::Error::Success() : NoInstance("fused_forward");
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(FusedForward, FusedForwardImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attrs()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace dwsconv::cpu
