// The end of a requantisation, four neighbouring channels at a time.
#ifndef JAX_DWSCONV_CUDA_ROUNDING_CUH_
#define JAX_DWSCONV_CUDA_ROUNDING_CUH_

#include <cstdint>

#include "cuda/rounding.h"

namespace dwsconv::cuda {

constexpr int kWordChannels = 4;

// clamp(round(sum * scale) + zero point), four of them in one word.
__device__ __forceinline__ uint32_t Requantized(const Rounding& r, const float (&scale)[kWordChannels],
                                                const int (&sums)[kWordChannels]) {
  constexpr float kMagic = 0x1.8p23f;  // adding it rounds to an integer in the low bits
  uint32_t bytes[kWordChannels];
#pragma unroll
  for (int c = 0; c < kWordChannels; ++c) {
    // Limited before rounding, which does not cross an integer.
    const float value = fminf(fmaxf(__fmul_rn(__int2float_rn(sums[c]), scale[c]), r.low), r.high);
    bytes[c] = __float_as_uint(__fadd_rn(value, kMagic)) + r.zero_point;
  }
  return __byte_perm(__byte_perm(bytes[0], bytes[1], 0x40), __byte_perm(bytes[2], bytes[3], 0x40), 0x5410);
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_ROUNDING_CUH_
