// The CUDA handlers: one XLA FFI symbol per operator.
#ifndef JAX_DWSCONV_CUDA_HANDLERS_H_
#define JAX_DWSCONV_CUDA_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

namespace dwsconv::cuda {

XLA_FFI_DECLARE_HANDLER_SYMBOL(Forward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(FusedForward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(GradInput);
XLA_FFI_DECLARE_HANDLER_SYMBOL(GradFilter);
XLA_FFI_DECLARE_HANDLER_SYMBOL(Pointwise);
XLA_FFI_DECLARE_HANDLER_SYMBOL(QuantizedForward);
XLA_FFI_DECLARE_HANDLER_SYMBOL(QuantizedPointwise);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_HANDLERS_H_
