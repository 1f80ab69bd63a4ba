// How the sums of taps get from threads into the filter.
#ifndef JAX_DWSCONV_CUDA_TAP_PARTS_H_
#define JAX_DWSCONV_CUDA_TAP_PARTS_H_

#include "cuda/divisor.h"
#include "cuda/plan.h"
#include "cuda/problem.h"

namespace dwsconv::cuda {

// A block has `lanes` vectors of channels, and `walkers` sums of every tap.
struct TapParts {
  Divisor lanes, lane_groups, groups, splits;
  int walkers, channels;
  bool one_launch;  // the blocks of all splits are a cluster and write the filter; else parts to the workspace
  Strides filter;
  bool filter_is_float;
};

inline TapParts DescribeParts(const Problem& p, int vector, int lanes, int walkers, const GradFilterPlan& plan) {
  const auto divisor = [](int64_t value) { return Divisor(static_cast<uint32_t>(value)); };
  return {divisor(lanes),
          divisor(CeilDiv(p.channels, vector * lanes)),
          divisor(p.groups),
          divisor(plan.splits),
          walkers,
          static_cast<int>(p.channels),
          plan.one_launch,
          p.filter,
          p.filter_dtype == Dtype::kF32};
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TAP_PARTS_H_
