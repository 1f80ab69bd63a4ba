#include "cpu/ffi_handler.h"
#include "cpu/handlers.h"

namespace dwsconv::cpu {

namespace ffi = xla::ffi;

static ffi::Error GradInputImpl(ffi::ThreadPool pool, ffi::Dictionary attrs, ffi::AnyBuffer g, ffi::AnyBuffer filter,
                                ffi::Result<ffi::AnyBuffer> x) {
  return RunKernel("grad_input", BestKernels().grad_input, pool, attrs, /*x=*/*x, /*filter=*/filter, /*y=*/g, g, filter,
                   *x);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    GradInput, GradInputImpl,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attrs().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());

}  // namespace dwsconv::cpu
