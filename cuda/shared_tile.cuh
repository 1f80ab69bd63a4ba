// The copy of a piece of an image to shared memory, past the registers, with zeros around the image.
#ifndef JAX_DWSCONV_CUDA_SHARED_TILE_CUH_
#define JAX_DWSCONV_CUDA_SHARED_TILE_CUH_

#include "cuda/correlation.h"
#include "cuda/shared_tile.h"
#include "cuda/tensor_core.cuh"

namespace dwsconv::cuda {

// `image`: its pixel (0, 0) in the block's first channel, of which `channels` exist. Neighbouring threads copy
// neighbouring chunks of a row, and go down the rows.
template <class T>
__device__ __forceinline__ void CopyTile(const SharedTile& tile, const Grid& grid, const T* image, int channels,
                                         int first_row, int first_column, T* shared) {
  constexpr int kChunk = 16 / sizeof(T);
  const int64_t step_h = grid.step.h;
  const int step_w = static_cast<int>(grid.step.w);
  uint32_t row = threadIdx.x;
  uint32_t index = tile.row_chunks.Take(row);
  if (row >= tile.copied_rows) return;
  for (; index < tile.row_chunks.value; index += blockDim.x) {
    uint32_t column = index;
    const int channel = tile.pixel_chunks.Take(column) * kChunk;
    const int w = first_column + column;
    const bool inside = static_cast<unsigned>(w) < static_cast<unsigned>(grid.w) && channel < channels;
    int h = first_row + row;
    const T* from = image + channel + h * step_h + w * step_w;
    uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared + row * tile.pitch)) + index * 16;
#pragma unroll 4
    for (int i = row; i < tile.rows; i += tile.copied_rows) {
      const bool valid = inside && static_cast<unsigned>(h) < static_cast<unsigned>(grid.h);
      CopyAsync16(to, valid ? from : image, valid, true);
      h += tile.copied_rows;
      from += tile.copied_rows * step_h;
      to += tile.copied_rows * tile.pitch * static_cast<uint32_t>(sizeof(T));
    }
  }
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_SHARED_TILE_CUH_
