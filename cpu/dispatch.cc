#include "cpu/kernels.h"

namespace dwsconv::cpu {

namespace portable {
extern const Kernels kKernels;
}
#ifdef JAX_DWSCONV_X86
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

const Kernels& BestKernels() {
#ifdef JAX_DWSCONV_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512::kKernels;
  }
  // Every processor with AVX2 has F16C too.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kKernels;
#endif
  return portable::kKernels;
}

}  // namespace dwsconv::cpu
