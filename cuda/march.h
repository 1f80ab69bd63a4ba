// What the specialised NHWC kernels (march.cuh) take, and their launcher.
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
  March march;
  MarchTile tile;
  int kernel_h, kernel_w;
  Dtype source_dtype, result_dtype;
  const void *source, *filter;
  void* result;
  cudaStream_t stream;
};

// What the tile makes of the problem: forward, else grad_input.
March DescribeMarch(const Problem& p, const MarchTile& tile, bool forward);

// forward, else grad_input. Returns false where there is no instance for the dtypes.
bool LaunchMarch(const Problem& p, bool forward, const MarchTile& tile, const void* source, const void* filter,
                 void* result, cudaStream_t stream);

// Their kernels are in files of their own: it is most of what there is to compile.
bool LaunchMarchStride1(const MarchCall& call);
bool LaunchMarchStride2Forward(const MarchCall& call);
bool LaunchMarchStride2Gradient(const MarchCall& call);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_MARCH_H_
