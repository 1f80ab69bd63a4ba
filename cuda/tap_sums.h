// What the specialised kernels of grad_filter (tap_sums.cuh) take, and their launcher.
#ifndef JAX_DWSCONV_CUDA_TAP_SUMS_H_
#define JAX_DWSCONV_CUDA_TAP_SUMS_H_

#include <cuda_runtime_api.h>

#include "cuda/correlation.h"
#include "cuda/divisor.h"
#include "cuda/plan.h"
#include "cuda/problem.h"
#include "cuda/tap_parts.h"

namespace dwsconv::cuda {

// A block has `lanes` vectors of channels and as many walkers as fit; the walkers of all the splits share the units,
// which are pieces of a strip of rows of g: `tile.columns` wide.
struct TapSums : TapParts {
  Divisor tiles, strips;  // of an image
  uint32_t units;         // of a group
  int strip_rows;
  Grid x, g;
  int pad_top, pad_left;
  int64_t images_per_group;
};

// Writes the filter if the plan needs one launch, else plan.splits parts into the workspace. Returns false where there
// is no instance. `p`: turned already if the plan is.
bool LaunchTapSums(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
                   float* workspace, cudaStream_t stream);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TAP_SUMS_H_
