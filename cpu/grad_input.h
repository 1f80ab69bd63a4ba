#ifndef JAX_DWSCONV_CPU_GRAD_INPUT_H_
#define JAX_DWSCONV_CPU_GRAD_INPUT_H_

#include "cpu/gather.h"

namespace dwsconv::cpu::DWSCONV_ISA {

inline bool GradInput(const Problem& p, const void* y_cotangent, const void* filter, void* x_cotangent,
                      Parallel& parallel) {
  const Axis rows = Axis::Transposed(p.kernel_h, p.stride_h, p.dilation_h, p.pad_top, p.in_h);
  const Axis cols = Axis::Transposed(p.kernel_w, p.stride_w, p.dilation_w, p.pad_left, p.in_w);
  const Gather g{p.batch,    p.groups,     p.out_h,         p.out_w,    p.in_h,     p.in_w,
                 p.channels, /*spread=*/1, p.multiplier,    p.kernel_h, p.kernel_w, FilterPitch(p),
                 p.y,        p.x,          p.channels_last, rows,       cols};
  return DispatchGather(p, g, p.y_dtype, p.x_dtype, y_cotangent, filter, x_cotangent, parallel);
}

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_GRAD_INPUT_H_
