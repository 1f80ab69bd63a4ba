#include "cuda/correlation.h"

namespace dwsconv::cuda {

Grid InputGrid(const Problem& p) { return {static_cast<int>(p.in_h), static_cast<int>(p.in_w), p.x}; }

Grid OutputGrid(const Problem& p) { return {static_cast<int>(p.out_h), static_cast<int>(p.out_w), p.y}; }

Correlation DescribeCorrelation(const PassCall& call) {
  const Problem& p = call.problem;
  const bool forward = call.forward;
  Correlation c{};
  c.source = forward ? InputGrid(p) : OutputGrid(p);
  c.result = forward ? OutputGrid(p) : InputGrid(p);
  c.filter = p.filter;
  c.grouped = p.groups > 1;
  c.images_per_group = Divisor(static_cast<uint32_t>(p.images_per_group()));
  c.filter_is_float = p.filter_dtype == Dtype::kF32;
  c.pad_top = static_cast<int>(p.pad_top);
  c.pad_left = static_cast<int>(p.pad_left);
  if (PassOf(p, forward) == Pass::kStride1 && !forward) {  // mirrored
    c.pad_top = static_cast<int>(p.kernel_h - 1 - p.pad_top);
    c.pad_left = static_cast<int>(p.kernel_w - 1 - p.pad_left);
    c.first_tap = (p.kernel_h - 1) * p.filter.h + (p.kernel_w - 1) * p.filter.w;
    c.filter.h = -p.filter.h;
    c.filter.w = -p.filter.w;
  }
  c.epilogue = DescribeEpilogue(call.epilogue);
  return c;
}

ResultSize DividedSize(const Correlation& c, Pass pass) {
  if (pass != Pass::kStride2Gradient) return {c.result.h, c.result.w};
  return {(c.pad_top + c.result.h + 1) / 2 - c.pad_top / 2, (c.pad_left + c.result.w + 1) / 2 - c.pad_left / 2};
}

}  // namespace dwsconv::cuda
