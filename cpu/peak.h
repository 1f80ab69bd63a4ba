// What the processor can do at most, for the floor of the benchmarks.
#ifndef JAX_DWSCONV_CPU_PEAK_H_
#define JAX_DWSCONV_CPU_PEAK_H_

#include "cpu/simd.h"

namespace dwsconv::cpu::DWSCONV_ISA {

// Multiplies and adds in registers and returns how many products that were. `value` is a factor, and then a result that
// nobody needs but the compiler.
inline int64_t MultiplyAdd(int64_t rounds, float* value) {
  constexpr int kChains = 12;  // more than a multiply-add takes cycles, fewer than there are registers
  F32 sums[kChains];
  const F32 factor = F32{} + *value;
  for (int i = 0; i < kChains; ++i) sums[i] = F32{} + float(i);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * factor + factor;
  }
  F32 total = {};
  for (int i = 0; i < kChains; ++i) total += sums[i];
  *value = total[0];
  return rounds * kChains * kLanes<float>;
}

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_PEAK_H_
