// What the specialised kernels (march.cuh) take, and their launcher.
#ifndef JAX_DWSCONV_CUDA_MARCH_H_
#define JAX_DWSCONV_CUDA_MARCH_H_

#include <cuda_runtime_api.h>

#include "cuda/correlation.h"
#include "cuda/divisor.h"
#include "cuda/plan.h"
#include "cuda/problem.h"

namespace dwsconv::cuda {

constexpr int kMarchThreads = 128;

struct March : Correlation {
  int64_t threads;
  Divisor lanes, lane_groups, tiles, strips;
  int strip_rows;
};

// What a launch needs besides the kernel.
struct MarchCall {
  const PassCall& pass;
  March march;
  MarchTile tile;
};

March DescribeMarch(const PassCall& call, const MarchTile& tile);

// Returns false where there is no instance for the dtypes.
bool LaunchMarch(const PassCall& call, const MarchTile& tile);

// Their kernels are in files of their own: it is most of what there is to compile.
bool LaunchMarchStride1(const MarchCall& call);
bool LaunchMarchStride2Forward(const MarchCall& call);
bool LaunchMarchStride2Gradient(const MarchCall& call);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_MARCH_H_
