// The CPU kernels, compiled once per instruction set and chosen at run time.
#ifndef JAX_DWSCONV_CPU_KERNELS_H_
#define JAX_DWSCONV_CPU_KERNELS_H_

#include "cpu/parallel.h"
#include "cuda/problem.h"

namespace dwsconv::cpu {

using QuantizedKernel = bool (*)(const Problem&, const Requantization&, const void* x, const void* filter, void* y,
                                 Parallel&);

// Each operator takes its operands and the result in the order of its name's definition (see
// jax_dwsconv/primitives.py) and returns false where it has no instance for the dtypes. Results do not depend on the
// number of threads.
struct Kernels {
  const char* isa;
  bool (*forward)(const Problem&, const void* x, const void* filter, void* y, Parallel&);
  bool (*fused_forward)(const Problem&, const Epilogue&, const void* x, const void* filter, void* y, Parallel&);
  bool (*grad_input)(const Problem&, const void* y_cotangent, const void* filter, void* x_cotangent, Parallel&);
  bool (*grad_filter)(const Problem&, const void* x, const void* y_cotangent, void* filter_cotangent, Parallel&);
  QuantizedKernel quantized_forward;
  int64_t (*multiply_add)(int64_t rounds, float* value);
};

// The sets that this processor can run, the fastest first, and a null pointer.
const Kernels* const* UsableKernels();

// The fastest set that this processor can run.
const Kernels& BestKernels();

}  // namespace dwsconv::cpu

#endif  // JAX_DWSCONV_CPU_KERNELS_H_
