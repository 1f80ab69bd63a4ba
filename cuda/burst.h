// What the kernels for small problems (burst.cuh) take, and their launcher.
#ifndef JAX_DWSCONV_CUDA_BURST_H_
#define JAX_DWSCONV_CUDA_BURST_H_

#include <cuda_runtime_api.h>

#include "cuda/correlation.h"
#include "cuda/divisor.h"
#include "cuda/plan.h"
#include "cuda/problem.h"

namespace dwsconv::cuda {

// The grid's z is the image, its y the strip of rows; x has the vectors of channels and the tiles of columns. Those of
// them that are neighbours in memory vary fastest: vectors in NHWC, tiles in NCHW.
struct Burst : Correlation {
  Divisor fast;
  uint32_t threads;  // of a strip
  bool channels_last;
};

// Returns false where there is no instance for the dtypes.
bool LaunchBurst(const PassCall& call, const BurstTile& tile);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_BURST_H_
