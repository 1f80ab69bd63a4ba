// What the tensor-core NHWC kernels (toeplitz.cuh) take, and their launcher.
#ifndef JAX_DWSCONV_CUDA_TOEPLITZ_H_
#define JAX_DWSCONV_CUDA_TOEPLITZ_H_

#include <cuda_runtime_api.h>

#include "cuda/correlation.h"
#include "cuda/divisor.h"
#include "cuda/plan.h"
#include "cuda/problem.h"

namespace dwsconv::cuda {

// Offsets and distances named `..._chunks` are in units of 16 bytes.
struct Toeplitz {
  Divisor marchers_wide;      // of a segment
  int segments;               // of a block
  Divisor stretches, strips;  // of an image: stretches of columns, strips of rows
  uint32_t total_segments;
  int strip_rows;  // result rows, or pairs of them in the input gradient of stride 2
  Divisor channel_blocks;
  int channels;
  Divisor pixels;   // of a source row of a segment, as read,
  int span, pitch;  // as needed, and as laid out in shared memory
  int source_h, source_w, result_h, result_w;
  int source_image_chunks, source_row_chunks, result_image_chunks, result_row_chunks;
  int filter_h, filter_w, filter_c;  // distances in elements
  int kernel_h;
  Divisor kernel_w;
  int dilation_w;
  int pad_top, pad_left;
  bool mirrored;
  FusedEpilogue epilogue;
};

// Takes no residual. Returns false where there is no instance for the dtypes.
bool LaunchToeplitz(const PassCall& call, const ToeplitzTile& tile);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TOEPLITZ_H_
