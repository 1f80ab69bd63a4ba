// Scale, bias, residual and activation of neighbouring results, and their store.
#ifndef JAX_DWSCONV_CUDA_EPILOGUE_CUH_
#define JAX_DWSCONV_CUDA_EPILOGUE_CUH_

#include "cuda/epilogue.h"
#include "cuda/packed.cuh"

namespace dwsconv::cuda {

__device__ __forceinline__ float Clamp(float x, float low, float high) {  // a NaN stays
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <int kCount>
__device__ __forceinline__ void Activate(const FusedEpilogue& e, float (&values)[kCount]) {
  switch (e.kind) {
    case FusedEpilogue::Kind::kClamp:
#pragma unroll
      for (float& x : values) x = Clamp(x, e.low, e.high);
      break;
    case FusedEpilogue::Kind::kSmooth:
#pragma unroll
      for (float& x : values) x = __fdividef(x, 1 + expf(-x * fmaf(e.cubic, x * x, e.linear)));
      break;
    case FusedEpilogue::Kind::kHardSwish:
#pragma unroll
      for (float& x : values) x *= Clamp(x + 3, 0, 6) * (1.0f / 6);
      break;
  }
}

// How neighbouring values lie: along the channels, or all in one.
enum class Along { kChannels, kPositions };

template <Along kAlong, int kCount>
__device__ __forceinline__ void ScaleAndShift(const FusedEpilogue& e, int channel, float (&values)[kCount]) {
  constexpr int kStep = kAlong == Along::kChannels;
  if (e.scale != nullptr) {
#pragma unroll
    for (int v = 0; v < kCount; ++v) values[v] *= e.scale[channel + v * kStep];
  }
  if (e.bias != nullptr) {
#pragma unroll
    for (int v = 0; v < kCount; ++v) values[v] += e.bias[channel + v * kStep];
  }
}

// Stores neighbouring results, of which the first belongs to `channel`, at `result` + `offset`.
template <Along kAlong, class Y, int kCount>
__device__ __forceinline__ void StoreResults(const FusedEpilogue& e, Y* result, int64_t offset, int channel,
                                             const float (&sums)[kCount]) {
  float values[kCount];
#pragma unroll
  for (int v = 0; v < kCount; ++v) values[v] = sums[v];
  if (e.present) {
    ScaleAndShift<kAlong>(e, channel, values);
    if (e.residual != nullptr) {
      const Y* residual = static_cast<const Y*>(e.residual) + offset;
      float added[kCount];
      reinterpret_cast<const Packed<Y, kCount>*>(residual)->Unpack(added);
#pragma unroll
      for (int v = 0; v < kCount; ++v) values[v] += added[v];
    }
    Activate(e, values);
  }
  Packed<Y, kCount> packed;
  packed.Pack(values);
  *reinterpret_cast<Packed<Y, kCount>*>(result + offset) = packed;
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_EPILOGUE_CUH_
