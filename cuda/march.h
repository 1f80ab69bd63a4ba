// What the specialised NHWC kernels (march.cuh) take, and their launcher.
#ifndef JAX_DWSCONV_CUDA_MARCH_H_
#define JAX_DWSCONV_CUDA_MARCH_H_

#include <cuda_runtime_api.h>

#include "cuda/divisor.h"
#include "cuda/plan.h"
#include "cuda/problem.h"

namespace dwsconv::cuda {

constexpr int kMarchThreads = 128;

// `source` is what is read (x, or g for grad_input), `result` what is written.
struct March {
  int64_t threads;
  Divisor lanes, lane_groups, tiles, strips;
  int strip_rows;
  int channels;
  int source_h, source_w, result_h, result_w;
  int64_t source_image, source_row, result_image, result_row;  // distances in elements
  Strides filter;
  int64_t images_per_group;  // 0: one filter for all images
  int pad_top, pad_left;
  bool filter_is_float, mirrored;
};

// What a launch needs besides the kernel.
struct MarchCall {
  March march;
  MarchTile tile;
  int kernel_size;
  Dtype source_dtype, result_dtype;
  const void *source, *filter;
  void* result;
  cudaStream_t stream;
};

// forward, else grad_input. Returns false where there is no instance for the dtypes.
bool LaunchMarch(const Problem& p, bool forward, const MarchTile& tile, const void* source, const void* filter,
                 void* result, cudaStream_t stream);

// Their kernels are in files of their own: it is most of what there is to compile.
bool LaunchMarchStride1(const MarchCall& call);
bool LaunchMarchStride2Forward(const MarchCall& call);
bool LaunchMarchStride2Gradient(const MarchCall& call);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_MARCH_H_
