// What the tensor-core kernel of grad_filter (tap_products.cuh) takes, and its launcher.
#ifndef JAX_DWSCONV_CUDA_TAP_PRODUCTS_H_
#define JAX_DWSCONV_CUDA_TAP_PRODUCTS_H_

#include <cuda_runtime_api.h>

#include "cuda/divisor.h"
#include "cuda/plan.h"
#include "cuda/problem.h"

namespace dwsconv::cuda {

// x or g: the sizes of an image, its distances in elements, and how a tile of it lies in shared memory.
struct TapProductsSide {
  int h, w, row_step;
  int64_t image_step;
  int rows, skipped_rows;  // of an image in a tile: those copied, and before them those that are always zero
  int begin, end, needed;  // pixels of a row that are copied, those from `needed` on as zeros
  int period, pitch;       // rows from one image to the next, pixels from one row to the next
  Divisor lanes;           // threads that copy one row
  Divisor row_groups;      // rows and images that are copied side by side
  int image_groups;
  int pixel_groups;  // pixels of a row that are copied side by side
};

struct TapProducts {
  Divisor chunks;  // of 8 channels, in a block
  int walkers;     // warps of a chunk
  Divisor channel_blocks, splits, groups;
  bool one_launch;  // the blocks of all splits are a cluster and write the filter; else parts to the workspace
  Divisor stretches, strips;
  uint32_t tiles;  // of a group
  int images, stretch_columns;
  int images_per_group;
  TapProductsSide x, g;
  int pad_top, pad_left;
  int lead;                       // rows of g above the lowest one that a row of x meets
  int first_g_row, first_parity;  // of the first tile
  int channels;
  int kernel_h, stride, dilation_h;
  Divisor kernel_w, dilation_w;
  Divisor units_wide, unit_rows[2];  // unit_rows, pairs: of even and odd rows of x with stride 2
  int pairs[2];
  int x_slots, stage_slots;  // of 16 bytes
  Strides filter;
  bool filter_is_float;
};

// Writes the filter if the plan needs one launch, else plan.splits parts into the workspace. Returns false where there
// is no instance.
bool LaunchTapProducts(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
                       float* workspace, cudaStream_t stream);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TAP_PRODUCTS_H_
