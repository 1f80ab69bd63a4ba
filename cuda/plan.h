// How a problem is divided among the multiprocessors. Pure functions of the problem and the device: no CUDA call.
#ifndef JAX_DWSCONV_CUDA_PLAN_H_
#define JAX_DWSCONV_CUDA_PLAN_H_

#include <cstdint>

#include "cuda/problem.h"

namespace dwsconv {

struct Device {
  int multiprocessors;
  int capability;          // 10 * major + minor
  int shared_memory;       // bytes of a multiprocessor
  int most_shared_memory;  // bytes that a block may have
};

// forward and grad_input of the usual kernels in NHWC (march.cuh): a thread has `vector` channels times `columns`
// columns of the result and marches down `rows` rows of them; it loads `ahead` rows before it needs them. In the input
// gradient of stride 2, columns and rows are those of g, with two of the result each.
struct MarchTile {
  int vector, columns, ahead, rows;
};

// forward and grad_input of 16-bit types in NHWC on tensor cores (toeplitz.cuh). A block has `channels` channels and 16
// marchers, each eight columns wide: `wide` of them side by side, the others in further segments, which are strips of
// `rows` rows of the result (in the input gradient of stride 2: pairs of rows) in any image. `kernel_size` is that of
// the instance, the filter may have fewer rows and columns.
struct ToeplitzTile {
  static constexpr int kColumns = 8;
  int kernel_size, channels, wide, rows;
};

// The (kernel_size, channels) that are compiled.
#define DWSCONV_TOEPLITZ_BLOCKS(M) M(3, 16) M(3, 32) M(5, 16) M(7, 16)

// The (vector, columns, ahead) that are compiled, by kernel size. Larger tiles reuse more, smaller ones make more
// threads.
#define DWSCONV_MARCH_TILES_3(M) M(1, 4, 4) M(1, 7, 2) M(2, 4, 2) M(2, 4, 4) M(2, 7, 2) M(4, 2, 2) M(4, 4, 2)
#define DWSCONV_MARCH_TILES_5(M) M(1, 4, 2) M(1, 4, 4) M(1, 7, 2) M(2, 2, 2) M(2, 4, 2) M(2, 7, 2)
#define DWSCONV_MARCH_TILES_7(M) M(1, 4, 2) M(1, 7, 2) M(2, 2, 2) M(2, 4, 2)

// Which kernel computes forward or grad_input, how it is divided, and how many cycles that should take.
struct PassPlan {
  enum class Kernel { kGather, kMarch, kToeplitz };  // gather.cuh takes everything and has no estimate
  Kernel kernel = Kernel::kGather;
  MarchTile march{};
  ToeplitzTile toeplitz{};
  double cycles = 0;
};

// For forward, else grad_input. `alignment` is what the addresses of source and result are multiples of, in bytes.
PassPlan PlanPass(const Problem& p, bool forward, const Device& device, int64_t alignment);

// grad_filter: the rows of g are cut into pieces. A block of kWarps warps sums kTapsPerThread neighbouring taps of one
// filter row over a part of the pieces, each piece apart so that no sum gets long; a second kernel adds the parts in
// order.
struct GradFilterPlan {
  static constexpr int kTapsPerThread = 4;
  static constexpr int kWarps = 8;
  static constexpr int kLanes = 32;

  int64_t piece_width;  // columns of g in a piece; the last one of a row may have fewer
  int64_t pieces_per_row;
  int64_t pieces;         // of all rows of a group
  int64_t splits;         // parts into which these are divided
  int64_t tap_tiles;      // kernel_w / kTapsPerThread, rounded up
  int64_t channel_tiles;  // NHWC: of kLanes output channels, NCHW: of one
  int64_t blocks;
};

// max_splits: for how many parts the workspace has room.
GradFilterPlan PlanGradFilter(const Problem& p, const Device& device, int64_t max_splits);

}  // namespace dwsconv

#endif  // JAX_DWSCONV_CUDA_PLAN_H_
