// What the NCHW kernel of stride 1 (march_planes.cuh) takes, and its launcher.
#ifndef JAX_DWSCONV_CUDA_MARCH_PLANES_H_
#define JAX_DWSCONV_CUDA_MARCH_PLANES_H_

#include <cuda_runtime_api.h>

#include "cuda/march.h"
#include "cuda/plan.h"
#include "cuda/problem.h"

namespace dwsconv::cuda {

// A warp has as many whole rows of tiles as fit, each of another unit: a strip of a channel of an image.
struct MarchPlanes {
  March march;
  Divisor tiles, channels;
  uint32_t rows_per_warp, units;
};

// Returns false where there is no instance for the dtypes.
bool LaunchMarchPlanes(const PassCall& call, const MarchPlanesTile& tile);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_MARCH_PLANES_H_
