// What the kernel for images in shared memory (staged.cuh) takes, and its launcher.
#ifndef JAX_DWSCONV_CUDA_STAGED_H_
#define JAX_DWSCONV_CUDA_STAGED_H_

#include "cuda/correlation.h"
#include "cuda/divisor.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"
#include "cuda/shared_tile.h"

namespace dwsconv::cuda {

struct Staged : Correlation {
  int channels;
  Divisor lanes;       // vectors of channels of a block
  Divisor tiles_down;  // and its tiles
  int tiles_across;
  Divisor channel_blocks, column_blocks, row_blocks;
  SharedTile read;  // of the source
};

// Returns false where there is no instance. The others are its parts, each in a file of its own.
bool LaunchStaged(const PassCall& call, const StagedTile& tile);
bool LaunchStagedStride1(const PassCall& call, const StagedTile& tile);
bool LaunchStagedStride2(const PassCall& call, const StagedTile& tile);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_STAGED_H_
