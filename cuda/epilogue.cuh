// Scale, bias, residual and activation of results, and their store.
#ifndef JAX_DWSCONV_CUDA_EPILOGUE_CUH_
#define JAX_DWSCONV_CUDA_EPILOGUE_CUH_

#include "cuda/epilogue.h"
#include "cuda/packed.cuh"

namespace dwsconv::cuda {

__device__ __forceinline__ float Clamp(float x, float low, float high) {  // a NaN stays
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(low));
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(high));
  return x;
#else
  x = x < low ? low : x;
  return x > high ? high : x;
#endif
}

// x / (1 + e^-t). For results of 16 bits the faster exponential function is exact enough.
template <class Y>
__device__ __forceinline__ float TimesSigmoid(float x, float t) {
  return __fdividef(x, 1 + (sizeof(Y) == 2 ? __expf(-t) : expf(-t)));
}

// Y: what the results are rounded to.
template <class Y, int kTile, int kVector>
__device__ __forceinline__ void Activate(const FusedEpilogue& e, float (&values)[kTile][kVector]) {
  const auto each = [&](const auto& function) {
#pragma unroll
    for (int b = 0; b < kTile; ++b) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) values[b][v] = function(values[b][v]);
    }
  };
  switch (e.kind) {
    case FusedEpilogue::Kind::kNone: break;
    case FusedEpilogue::Kind::kClamp: each([&](float x) { return Clamp(x, e.low, e.high); }); break;
    case FusedEpilogue::Kind::kSilu: each([](float x) { return TimesSigmoid<Y>(x, x); }); break;
    case FusedEpilogue::Kind::kGelu:
      // (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), with u = sqrt(2 / pi) * (x + 0.044715 x^3)
      each([](float x) { return TimesSigmoid<Y>(x, x * fmaf(0.07135481627260025f, x * x, 1.5957691216057308f)); });
      break;
    case FusedEpilogue::Kind::kHardSwish: each([](float x) { return x * (Clamp(x + 3, 0, 6) * (1.0f / 6)); }); break;
  }
}

// Scale and bias of kCount neighbouring channels.
template <int kCount>
__device__ __forceinline__ void LoadScale(const FusedEpilogue& e, int channel, float (&scale)[kCount]) {
#pragma unroll
  for (int v = 0; v < kCount; ++v) scale[v] = e.scale == nullptr ? 1 : e.scale[channel + v];
}
template <int kCount>
__device__ __forceinline__ void LoadBias(const FusedEpilogue& e, int channel, float (&bias)[kCount]) {
#pragma unroll
  for (float& b : bias) b = 0;
  if (e.bias == nullptr) return;
#pragma unroll
  for (int v = 0; v < kCount; ++v) bias[v] = e.bias[channel + v];
}

// The taps take in the scale, and the sums start at the bias: so the loop over the taps does what they ask for.
template <int kH, int kW, int kVector>
__device__ __forceinline__ void ScaleTaps(const FusedEpilogue& e, int channel, float (&taps)[kH][kW][kVector]) {
  if (e.scale == nullptr) return;
  float scale[kVector];
  LoadScale(e, channel, scale);
#pragma unroll
  for (int i = 0; i < kH; ++i) {
#pragma unroll
    for (int j = 0; j < kW; ++j) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) taps[i][j][v] *= scale[v];
    }
  }
}
template <int kTile, int kVector>
__device__ __forceinline__ void Start(const float (&bias)[kVector], float (&sums)[kTile][kVector]) {
#pragma unroll
  for (int b = 0; b < kTile; ++b) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) sums[b][v] = bias[v];
  }
}

// Residual and activation of kTile neighbouring vectors, of which `exists(b)` tells whether the result has vector b, at
// `offset(b)` from its beginning.
template <class Y, int kTile, int kVector, class Exists, class Offset>
__device__ __forceinline__ void Finish(const FusedEpilogue& e, const Exists& exists, const Offset& offset,
                                       float (&values)[kTile][kVector]) {
  if (!e.follows) return;
  if (e.residual != nullptr) {
#pragma unroll
    for (int b = 0; b < kTile; ++b) {
      if (!exists(b)) continue;
      float added[kVector];
      LoadVector(static_cast<const Y*>(e.residual) + offset(b), added);
#pragma unroll
      for (int v = 0; v < kVector; ++v) values[b][v] += added[v];
    }
  }
  Activate<Y>(e, values);
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_EPILOGUE_CUH_
