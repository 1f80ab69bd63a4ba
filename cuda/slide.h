// What the kernel for other windows (slide.cuh) takes, and its launcher.
#ifndef JAX_DWSCONV_CUDA_SLIDE_H_
#define JAX_DWSCONV_CUDA_SLIDE_H_

#include <cuda_runtime_api.h>

#include "cuda/divisor.h"
#include "cuda/epilogue.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "cuda/problem.h"

namespace dwsconv::cuda {

// How results, source and taps lie along one of the spatial axes.
struct SlideAxis {
  int source, result;  // sizes
  int64_t source_step, result_step, filter_step;
  int kernel, stride, dilation, pad;
};

// The results of a thread lie along one axis, at one position of the other, `fixed` one. Along the sliding axis the
// results fall into `phases`; the windows of neighbours of a phase are one step of the source apart.
struct Slide {
  SlideAxis slide, fixed;
  Divisor fast, tiles, slow;  // fast, slow: vectors of channels and fixed positions, in NCHW the reverse
  int phases;
  uint32_t threads;  // of an image
  bool channels_last, gradient;
  int multiplier;
  int64_t images;
  int64_t source_n, source_c, result_n, result_c, filter_n, filter_c;
  int64_t images_per_group;  // 0: one filter for all images
  FusedEpilogue epilogue;
};

// Returns false where there is no instance for the dtypes.
bool LaunchSlide(const PassCall& call, const SlideTile& tile);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_SLIDE_H_
