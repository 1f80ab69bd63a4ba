// A tile of results: which pixels it reads along an axis, and its store.
#ifndef JAX_DWSCONV_CUDA_TILE_AXIS_CUH_
#define JAX_DWSCONV_CUDA_TILE_AXIS_CUH_

#include "cuda/correlation.h"
#include "cuda/epilogue.cuh"

namespace dwsconv::cuda {

// How many neighbouring positions along one axis a tile reads and writes. kTile: positions of the result, in the input
// gradient of stride 2 pairs of them (see DividedSize).
template <Pass kPass, int kTaps, int kTile>
struct TileAxis {
  static constexpr bool kPairs = kPass == Pass::kStride2Gradient;
  static constexpr int kStride = kPass == Pass::kStride2 ? 2 : 1, kHalo = (kTaps - 1) / 2;
  static constexpr int kRead = kPairs ? kTile + kHalo : (kTile - 1) * kStride + kTaps;
  static constexpr int kWritten = kPairs ? 2 * kTile : kTile;

  // The tap that leads from a position that is read to one that is written; outside [0, kTaps) for none.
  static __device__ constexpr int Tap(int read, int written) {
    return kPairs ? written - 2 * (read - kHalo) : read - written * kStride;
  }
  static __device__ int FirstRead(int tile, int pad) {
    return kPairs ? pad / 2 + tile * kTile - kHalo : tile * kTile * kStride - pad;
  }
  static __device__ int FirstWritten(int tile, int pad) {
    return kPairs ? (pad / 2 + tile * kTile) * 2 - pad : tile * kTile;
  }
};

// Finishes and stores the results from (row, column) on that are inside the image.
template <Pass kPass, int kRows, int kColumns, class Y, int kVector>
__device__ __forceinline__ void StoreTile(const Correlation& m, int image, int channel, int row, int column,
                                          float (&sums)[kRows * kColumns][kVector], Y* result) {
  const int step_h = static_cast<int>(m.result.step.h), step_w = static_cast<int>(m.result.step.w);
  const int64_t out =
      image * m.result.step.n + channel * m.result.step.c + row * m.result.step.h + column * m.result.step.w;
  const auto exists = [&](int b) {
    return static_cast<unsigned>(row + b / kColumns) < static_cast<unsigned>(m.result.h) &&
           static_cast<unsigned>(column + b % kColumns) < static_cast<unsigned>(m.result.w);
  };
  const auto offset = [&](int b) { return b / kColumns * step_h + b % kColumns * step_w; };
  if (kPass != Pass::kStride2Gradient) {
    Finish<Y>(m.epilogue, exists, [&](int b) { return out + offset(b); }, sums);
  }
#pragma unroll
  for (int b = 0; b < kRows * kColumns; ++b) {
    if (exists(b)) StoreVector(result + out + offset(b), sums[b]);
  }
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TILE_AXIS_CUH_
