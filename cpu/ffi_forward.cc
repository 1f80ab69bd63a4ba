#include "cpu/ffi_handler.h"
#include "cpu/handlers.h"

namespace dwsconv::cpu {

namespace ffi = xla::ffi;

static ffi::Error ForwardImpl(ffi::ThreadPool pool, ffi::Dictionary attrs, ffi::AnyBuffer x, ffi::AnyBuffer filter,
                              ffi::Result<ffi::AnyBuffer> y) {
  return RunKernel("forward", BestKernels().forward, pool, attrs, /*x=*/x, /*filter=*/filter, /*y=*/*y, x, filter, *y);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Forward, ForwardImpl,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attrs().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());

}  // namespace dwsconv::cpu
