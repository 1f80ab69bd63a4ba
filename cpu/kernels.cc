// Compiled once per instruction set, with DWSCONV_ISA (the namespace) and DWSCONV_VECTOR_BYTES set by the build.
#include "cpu/kernels.h"

#include "cpu/forward.h"
#include "cpu/grad_filter.h"
#include "cpu/grad_input.h"
#include "cpu/peak.h"
#include "cpu/quantized.h"

#define DWSCONV_STRING(name) #name
#define DWSCONV_NAME(name) DWSCONV_STRING(name)

namespace dwsconv::cpu::DWSCONV_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {DWSCONV_NAME(DWSCONV_ISA), Forward,    FusedForward, GradInput, GradFilter,
                          QuantizedForward,          MultiplyAdd};

}  // namespace dwsconv::cpu::DWSCONV_ISA
