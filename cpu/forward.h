#ifndef JAX_DWSCONV_CPU_FORWARD_H_
#define JAX_DWSCONV_CPU_FORWARD_H_

#include "cpu/gather.h"

namespace dwsconv::cpu::DWSCONV_ISA {

inline bool RunForward(const Problem& p, const Epilogue* epilogue, const void* x, const void* filter, void* y,
                       Parallel& parallel) {
  const Axis rows = Axis::Forward(p.kernel_h, p.stride_h, p.dilation_h, p.pad_top, p.out_h);
  const Axis cols = Axis::Forward(p.kernel_w, p.stride_w, p.dilation_w, p.pad_left, p.out_w);
  const Gather g{p.batch,    p.groups,   p.in_h,     p.in_w,         p.out_h, p.out_w, p.out_channels(), p.multiplier,
                 /*fold=*/1, p.kernel_h, p.kernel_w, FilterPitch(p), p.x,     p.y,     p.channels_last,  rows,
                 cols,       epilogue,   y};
  return DispatchGather(p, g, p.x_dtype, p.y_dtype, x, filter, y, parallel);
}

inline bool Forward(const Problem& p, const void* x, const void* filter, void* y, Parallel& parallel) {
  return RunForward(p, nullptr, x, filter, y, parallel);
}

inline bool FusedForward(const Problem& p, const Epilogue& epilogue, const void* x, const void* filter, void* y,
                         Parallel& parallel) {
  return RunForward(p, epilogue.empty() ? nullptr : &epilogue, x, filter, y, parallel);
}

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_FORWARD_H_
