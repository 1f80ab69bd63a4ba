// The activations that may follow a convolution, on vectors of sums.
#ifndef JAX_DWSCONV_CPU_EPILOGUE_H_
#define JAX_DWSCONV_CPU_EPILOGUE_H_

#include "cpu/simd.h"
#include "cuda/problem.h"

namespace dwsconv::cpu::DWSCONV_ISA {

// e^x for x from -87 to 88.37 with an error of about one unit in the last place; e^-87 below, infinite above. The
// polynomial on [-ln(2) / 2, ln(2) / 2] is that of expf in the Cephes library.
DWSCONV_INLINE F32 Exp(F32 x) {
  const F32 high = F32{} + 89.0f, low = F32{} - 87.0f;
  x = x > high ? high : x;  // a NaN stays
  x = x < low ? low : x;
  const F32 magic = F32{} + 0x1.8p23f;  // adding it rounds to an integer n in the low bits
  const F32 shifted = x * 0x1.715476p+0f + magic;
  const F32 n = shifted - magic;
  const F32 r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  F32 p = F32{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const F32 power = (F32)(((U32)shifted << 23) + 0x3f800000);  // 2^n, infinite for 128
  return (p * (r * r) + r + 1.0f) * power;
}

DWSCONV_INLINE Vec<double> Exp(Vec<double> x) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

// A NaN stays one, and at -infinity the smooth ones give a NaN as those of jax.nn do.
template <class A>
DWSCONV_INLINE Vec<A> Activate(Activation activation, Vec<A> x) {
  const Vec<A> zero = {}, six = zero + A(6);
  const auto relu6 = [&](Vec<A> v) {
    v = v <= zero ? zero : v;
    return v > six ? six : v;
  };
  switch (activation) {
    case Activation::kNone: return x;
    case Activation::kRelu: return x <= zero ? zero : x;
    case Activation::kRelu6: return relu6(x);
    case Activation::kSilu: return x / (A(1) + Exp(-x));
    case Activation::kGelu: {
      // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), with u = sqrt(2 / pi) * (x + 0.044715 x^3)
      const Vec<A> twice_u = x * (A(1.5957691216057308) + A(0.07135481627260025) * (x * x));
      return x / (A(1) + Exp(-twice_u));
    }
    case Activation::kHardSwish: return x * (relu6(x + A(3)) / A(6));
  }
  return x;
}

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_EPILOGUE_H_
