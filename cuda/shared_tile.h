// A piece of an image that a block has in shared memory (shared_tile.cuh).
#ifndef JAX_DWSCONV_CUDA_SHARED_TILE_H_
#define JAX_DWSCONV_CUDA_SHARED_TILE_H_

#include <algorithm>

#include "cuda/divisor.h"

namespace dwsconv::cuda {

struct SharedTile {
  int rows, pitch;       // pitch: elements from row to row
  Divisor row_chunks;    // of 16 bytes, in a row
  Divisor pixel_chunks;  // and in the channels of a block
  uint32_t copied_rows;  // that the threads of a block copy at once
};

inline SharedTile DescribeTile(int rows, int columns, int pitch, int pixel_bytes, int threads) {
  const int pixel_chunks = pixel_bytes / 16, row_chunks = columns * pixel_chunks;
  return {rows, pitch, Divisor(static_cast<uint32_t>(row_chunks)), Divisor(static_cast<uint32_t>(pixel_chunks)),
          static_cast<uint32_t>(std::max(1, threads / row_chunks))};
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_SHARED_TILE_H_
