// The general kernel behind forward and grad_input: every thread gathers the taps of one result element.
#ifndef JAX_DWSCONV_CUDA_GATHER_CUH_
#define JAX_DWSCONV_CUDA_GATHER_CUH_

#include <cstdint>

#include "cuda/dtypes.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/problem.h"

namespace dwsconv::cuda {

struct Position {
  int64_t n, h, w, c;
};

// Element `index` of an activation in memory order, so that neighbouring threads touch neighbouring addresses. Index is
// uint32_t where the activation has fewer than 2^32 elements: 64-bit division is several times slower.
template <class Index>
__device__ Position Locate(Index index, bool channels_last, int64_t height, int64_t width, int64_t channels) {
  const Index h = height, w = width, c = channels;
  Position at;
  if (channels_last) {
    at.c = index % c;
    index /= c;
  }
  at.w = index % w;
  index /= w;
  at.h = index % h;
  index /= h;
  if (!channels_last) {
    at.c = index % c;
    index /= c;
  }
  at.n = index;
  return at;
}

template <class X, class F>
__device__ float GatherForward(const Problem& p, const X* x, const F* filter, const Position& out) {
  const X* image = x + out.n * p.x.n + p.input_channel(out.c) * p.x.c;
  const F* taps = filter + p.group_of(out.n) * p.filter.n + out.c * p.filter.c;
  float sum = 0;
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t h = out.h * p.stride_h + i * p.dilation_h - p.pad_top;
    if (h < 0 || h >= p.in_h) continue;
    for (int64_t j = 0; j < p.kernel_w; ++j) {
      const int64_t w = out.w * p.stride_w + j * p.dilation_w - p.pad_left;
      if (w < 0 || w >= p.in_w) continue;
      sum = fmaf(ToFloat(image[h * p.x.h + w * p.x.w]), ToFloat(taps[i * p.filter.h + j * p.filter.w]), sum);
    }
  }
  return sum;
}

template <class Y, class F>
__device__ float GatherGradInput(const Problem& p, const Y* g, const F* filter, const Position& in) {
  const Y* image = g + in.n * p.y.n + in.c * p.multiplier * p.y.c;
  const F* taps = filter + p.group_of(in.n) * p.filter.n + in.c * p.multiplier * p.filter.c;
  float sum = 0;
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t h = in.h + p.pad_top - i * p.dilation_h;
    if (h < 0 || h % p.stride_h != 0 || h / p.stride_h >= p.out_h) continue;
    for (int64_t j = 0; j < p.kernel_w; ++j) {
      const int64_t w = in.w + p.pad_left - j * p.dilation_w;
      if (w < 0 || w % p.stride_w != 0 || w / p.stride_w >= p.out_w) continue;
      const Y* source = image + h / p.stride_h * p.y.h + w / p.stride_w * p.y.w;
      const F* tap = taps + i * p.filter.h + j * p.filter.w;
      for (int64_t m = 0; m < p.multiplier; ++m) {
        sum = fmaf(ToFloat(source[m * p.y.c]), ToFloat(tap[m * p.filter.c]), sum);
      }
    }
  }
  return sum;
}

template <bool kForward, class Index, class S, class F, class R>
__global__ void GatherKernel(const __grid_constant__ Problem p, const __grid_constant__ FusedEpilogue epilogue,
                             const S* __restrict__ source, const F* __restrict__ filter, R* __restrict__ result) {
  const Index count = kForward ? p.y_elements() : p.x_elements();
  const Index step = static_cast<Index>(gridDim.x) * blockDim.x;
  for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    if constexpr (kForward) {
      const Position at = Locate<Index>(i, p.channels_last, p.out_h, p.out_w, p.out_channels());
      const float sum[] = {GatherForward(p, source, filter, at)};
      StoreResults<Along::kChannels>(epilogue, result, i, static_cast<int>(at.c), sum);
    } else {
      const Position at = Locate<Index>(i, p.channels_last, p.in_h, p.in_w, p.channels);
      result[i] = FromFloat<R>(GatherGradInput(p, source, filter, at));
    }
    if (count - i <= step) break;  // i + step could wrap around
  }
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_GATHER_CUH_
