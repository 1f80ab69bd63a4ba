// What the CPU handlers share.
#ifndef JAX_DWSCONV_CPU_FFI_HANDLER_H_
#define JAX_DWSCONV_CPU_FFI_HANDLER_H_

#include <string>

#include "cpu/huge_pages.h"
#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "cuda/ffi_problem.h"

namespace dwsconv::cpu {

using Kernel = bool (*)(const Problem&, const void*, const void*, void*, Parallel&);

inline xla::ffi::Error NoInstance(const char* op) {
  return xla::ffi::Error::InvalidArgument("jax_dwsconv." + std::string(op) +
                                          ": no CPU kernel for this combination of dtypes");
}

// Decodes the operator whose input, filter and output are these buffers, and runs it on its operands a and b.
inline xla::ffi::Error RunKernel(const char* op, Kernel kernel, xla::ffi::ThreadPool pool,
                                 const xla::ffi::Dictionary& attrs, const xla::ffi::AnyBuffer& x,
                                 const xla::ffi::AnyBuffer& filter, const xla::ffi::AnyBuffer& y,
                                 const xla::ffi::AnyBuffer& a, const xla::ffi::AnyBuffer& b,
                                 xla::ffi::AnyBuffer& result) {
  const auto problem = DecodeProblem(op, attrs, x, filter, y);
  if (!problem) return problem.error();
  if (result.element_count() == 0) return xla::ffi::Error::Success();
  PreferHugePages(result.untyped_data(), result.size_bytes());
  PoolParallel parallel(pool);
  const bool has_instance = kernel(*problem, a.untyped_data(), b.untyped_data(), result.untyped_data(), parallel);
  return has_instance ? xla::ffi::Error::Success() : NoInstance(op);
}

}  // namespace dwsconv::cpu

#endif  // JAX_DWSCONV_CPU_FFI_HANDLER_H_
