// Division of indices by a number that is known at launch: a multiplication instead of some 25 instructions.
#ifndef JAX_DWSCONV_CUDA_DIVISOR_H_
#define JAX_DWSCONV_CUDA_DIVISOR_H_

#include <cstdint>

#include "cuda/problem.h"

namespace dwsconv {

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// For dividends below 2^31. See Granlund and Montgomery, "Division by invariant integers using multiplication" (1994).
struct Divisor {
  uint32_t value, multiplier, shift;

  Divisor() = default;
  explicit Divisor(uint32_t divisor) : value(divisor), shift(0) {
    while ((uint64_t{1} << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - divisor) << 32) / divisor + 1);
  }

  DWSCONV_HOST_DEVICE uint32_t Quotient(uint32_t dividend) const {
#ifdef __CUDA_ARCH__
    const uint32_t high = __umulhi(dividend, multiplier);
#else
    const uint32_t high = static_cast<uint32_t>(uint64_t{dividend} * multiplier >> 32);
#endif
    return (high + dividend) >> shift;
  }

  // Returns the remainder and leaves the quotient in `index`: takes the innermost coordinate off an index.
  DWSCONV_HOST_DEVICE uint32_t Take(uint32_t& index) const {
    const uint32_t dividend = index;
    index = Quotient(dividend);
    return dividend - index * value;
  }
};

}  // namespace dwsconv

#endif  // JAX_DWSCONV_CUDA_DIVISOR_H_
