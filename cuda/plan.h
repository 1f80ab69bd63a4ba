// How a problem is divided among the multiprocessors. Pure functions of the problem and the device: no CUDA call.
#ifndef JAX_DWSCONV_CUDA_PLAN_H_
#define JAX_DWSCONV_CUDA_PLAN_H_

#include <cstdint>

#include "cuda/problem.h"

namespace dwsconv {

struct Device {
  int multiprocessors;
};

// grad_filter: the rows of g are cut into pieces. A block of kWarps warps sums kTapsPerThread neighbouring taps of one
// filter row over a part of the pieces, each piece apart so that no sum gets long; a second kernel adds the parts in
// order.
struct GradFilterPlan {
  static constexpr int kTapsPerThread = 4;
  static constexpr int kWarps = 8;
  static constexpr int kLanes = 32;

  int64_t piece_width;  // columns of g in a piece; the last one of a row may have fewer
  int64_t pieces_per_row;
  int64_t pieces;         // of all rows of a group
  int64_t splits;         // parts into which these are divided
  int64_t tap_tiles;      // kernel_w / kTapsPerThread, rounded up
  int64_t channel_tiles;  // NHWC: of kLanes output channels, NCHW: of one
  int64_t blocks;
};

// max_splits: for how many parts the workspace has room.
GradFilterPlan PlanGradFilter(const Problem& p, const Device& device, int64_t max_splits);

}  // namespace dwsconv

#endif  // JAX_DWSCONV_CUDA_PLAN_H_
