// What the kernel of grad_filter that reads from shared memory (tap_rows.cuh) takes, and its launcher.
#ifndef JAX_DWSCONV_CUDA_TAP_ROWS_H_
#define JAX_DWSCONV_CUDA_TAP_ROWS_H_

#include <cuda_runtime_api.h>

#include "cuda/correlation.h"
#include "cuda/shared_tile.h"
#include "cuda/tap_parts.h"

namespace dwsconv::cuda {

// A block adds up pieces of g, of some rows and columns, with the part of x that they meet.
struct TapRows : TapParts {
  Grid x, g;
  SharedTile x_tile, g_tile;
  Divisor stretches, strips;  // of an image
  uint32_t pieces;            // of a group
  int rows, columns;          // of a piece
  int pad_top, pad_left;
  int64_t images_per_group;
};

// Writes the filter if the plan needs one launch, else plan.splits parts into the workspace. Returns false where there
// is no instance.
bool LaunchTapRows(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
                   float* workspace, cudaStream_t stream);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TAP_ROWS_H_
