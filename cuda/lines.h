// What the kernel for one spatial dimension in NCW (lines.cuh) takes, and its launcher.
#ifndef JAX_DWSCONV_CUDA_LINES_H_
#define JAX_DWSCONV_CUDA_LINES_H_

#include <cuda_runtime_api.h>

#include "cuda/correlation.h"
#include "cuda/divisor.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace dwsconv::cuda {

// A line is a channel of an image; neighbouring threads have neighbouring tiles of a line.
struct Lines : Correlation {
  Divisor tiles, channels;
  uint32_t threads;
  int first_vector;  // of the source, for the first tile; negative before the line
};

// Returns false where there is no instance for the dtypes.
bool LaunchLines(const PassCall& call);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_LINES_H_
