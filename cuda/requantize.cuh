// What follows the int32 sums of a pointwise convolution.
#ifndef JAX_DWSCONV_CUDA_REQUANTIZE_CUH_
#define JAX_DWSCONV_CUDA_REQUANTIZE_CUH_

#include "cuda/packed.cuh"
#include "cuda/pointwise.h"
#include "cuda/rounding.cuh"

namespace dwsconv::cuda {

// Residual, scale and rounding of `kCount` neighbouring features, whose scales are at `scale`, of kTile pixels; as
// Finish in epilogue.cuh.
template <int kTile, int kCount, class Exists, class Offset>
__device__ __forceinline__ void StoreRequantized(const PointwiseRequantization& r, const float* scale, int feature,
                                                 const Exists& exists, const Offset& offset, int (&sums)[kTile][kCount],
                                                 int8_t* result) {
  if (r.residual != nullptr) {
    float residual_scale[kCount];
#pragma unroll
    for (int v = 0; v < kCount; ++v) residual_scale[v] = r.residual_scale[feature + v];
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (!exists(i)) continue;
      int8_t added[kCount];
#pragma unroll
      for (int v = 0; v < kCount; v += 2) {
        *reinterpret_cast<uint16_t*>(added + v) = *reinterpret_cast<const uint16_t*>(r.residual + offset(i) + v);
      }
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        const float value = __int2float_rn(added[v] - r.residual_zero_point);
        sums[i][v] += __float2int_rn(__fmul_rn(value, residual_scale[v]));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    if (!exists(i)) continue;
    if constexpr (kCount == 2) {
      const float both[kWordChannels] = {scale[0], scale[1]};
      const int four[kWordChannels] = {sums[i][0], sums[i][1]};
      *reinterpret_cast<uint16_t*>(result + offset(i)) = static_cast<uint16_t>(Requantized(r.rounding, both, four));
    } else {
      Words<kCount / 4> words;
#pragma unroll
      for (int w = 0; w < kCount / 4; ++w) {
        float scales[kWordChannels];
        int four[kWordChannels];
#pragma unroll
        for (int c = 0; c < kWordChannels; ++c) {
          scales[c] = scale[4 * w + c];
          four[c] = sums[i][4 * w + c];
        }
        words.at[w] = Requantized(r.rounding, scales, four);
      }
      *reinterpret_cast<Words<kCount / 4>*>(result + offset(i)) = words;
    }
  }
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_REQUANTIZE_CUH_
