#include "cpu/ffi_handler.h"
#include "cpu/handlers.h"

namespace dwsconv::cpu {

namespace ffi = xla::ffi;

static ffi::Error GradFilterImpl(ffi::ThreadPool pool, ffi::Dictionary attrs, ffi::AnyBuffer x, ffi::AnyBuffer g,
                                 ffi::Result<ffi::AnyBuffer> filter) {
  return RunKernel("grad_filter", BestKernels().grad_filter, pool, attrs, /*x=*/x, /*filter=*/*filter, /*y=*/g, x, g,
                   *filter);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    GradFilter, GradFilterImpl,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attrs().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());

}  // namespace dwsconv::cpu
