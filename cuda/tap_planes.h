// What the kernel of grad_filter that reads channel planes from shared memory (tap_planes.cuh) takes, and its launcher.
#ifndef JAX_DWSCONV_CUDA_TAP_PLANES_H_
#define JAX_DWSCONV_CUDA_TAP_PLANES_H_

#include <cuda_runtime_api.h>

#include "cuda/correlation.h"
#include "cuda/tap_parts.h"

namespace dwsconv::cuda {

// Rows of the planes of a block, and how they are copied.
struct PlaneRows : RowsShape {
  Grid grid;
  Divisor plane_rows, row_chunks;
  uint32_t copied_rows;  // that the threads of a block copy at once
  int further_rows;      // of these, beyond whole planes
  int step, next_row;    // elements from a copied row to the next one of a thread; and across the end of a plane
};

// A block adds up pieces of g, of some rows, with the rows of x that they meet.
struct TapPlanes : TapParts {
  PlaneRows x, g;
  Divisor strips;   // of an image
  uint32_t pieces;  // of a group
  int rows;         // of a piece
  int pad_top, pad_left;
  int x_bytes;  // in shared memory
  int64_t images_per_group;
};

// Writes the filter if the plan needs one launch, else plan.splits parts into the workspace. Returns false where there
// is no instance.
bool LaunchTapPlanes(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
                     float* workspace, cudaStream_t stream);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TAP_PLANES_H_
