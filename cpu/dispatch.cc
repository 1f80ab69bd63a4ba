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
namespace avx512vnni {
extern const QuantizedKernel kQuantizedForward;
}
#endif

const Kernels* const* UsableKernels() {
  static const Kernels* usable[5] = {};
  static const bool found = [] {
    const Kernels** next = usable;
#ifdef JAX_DWSCONV_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      if (__builtin_cpu_supports("avx512vnni")) {
        static Kernels vnni = avx512::kKernels;
        vnni.isa = "avx512vnni";
        vnni.quantized_forward = avx512vnni::kQuantizedForward;
        *next++ = &vnni;
      }
      *next++ = &avx512::kKernels;
    }
    // Every processor with AVX2 has F16C too.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) *next++ = &avx2::kKernels;
#endif
    *next++ = &portable::kKernels;
    return true;
  }();
  static_cast<void>(found);
  return usable;
}

const Kernels& BestKernels() { return *UsableKernels()[0]; }

}  // namespace dwsconv::cpu
