// What the NCHW kernel for small planes (small_planes.cuh) takes, and its launcher.
#ifndef JAX_DWSCONV_CUDA_SMALL_PLANES_H_
#define JAX_DWSCONV_CUDA_SMALL_PLANES_H_

#include "cuda/correlation.h"
#include "cuda/divisor.h"
#include "cuda/plan.h"

namespace dwsconv::cuda {

struct SmallPlanes : Correlation {
  int batch, channels;
  Divisor tiles;  // of a row
  int planes_per_warp, planes;
  Divisor channel_groups;
  int images;
  int plane_bytes, buffer_bytes;
  int chunk;  // bytes that are copied at once
};

// Takes no residual. Returns false where there is no instance.
bool LaunchSmallPlanes(const PassCall& call, const SmallPlanesTile& tile);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_SMALL_PLANES_H_
