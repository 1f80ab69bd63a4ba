// What the tensor-core NCHW kernel (toeplitz_planes.cuh) takes, and its launcher.
#ifndef JAX_DWSCONV_CUDA_TOEPLITZ_PLANES_H_
#define JAX_DWSCONV_CUDA_TOEPLITZ_PLANES_H_

#include "cuda/correlation.h"
#include "cuda/divisor.h"
#include "cuda/plan.h"

namespace dwsconv::cuda {

struct ToeplitzPlanes : Correlation {
  int kernel_h, kernel_w;
  int margin;             // columns from the first that a tile reads to the first of its results
  Divisor tiles, strips;  // of an image
  Divisor channels;
  uint32_t units;  // of a channel: tiles of strips of images
  uint32_t warps;
  int strip_rows;
};

// Returns false where there is no instance.
bool LaunchToeplitzPlanes(const PassCall& call, const ToeplitzPlanesTile& tile);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TOEPLITZ_PLANES_H_
