// The kernel for windows of any size, dilation, stride and multiplier (but see SlideApplies in plan_passes.cc). A
// thread has a vector of channels of a few results whose windows are shifted by one position of the source each, so
// what it loads serves all of them: column reuse in NHWC, row reuse in NCHW, where neighbouring threads have
// neighbouring columns.
#ifndef JAX_DWSCONV_CUDA_SLIDE_CUH_
#define JAX_DWSCONV_CUDA_SLIDE_CUH_

#include "cuda/epilogue.cuh"
#include "cuda/row.cuh"
#include "cuda/slide.h"

namespace dwsconv::cuda {

constexpr int kSlideThreads = 128;

// Taps tap, tap + tap_step, ... (`count` of them) meet the source at read, read + read_step, ...
struct TapRun {
  int read, read_step, tap, tap_step, count;
};

// All taps of the result at `at`.
__device__ __forceinline__ TapRun WholeRun(const SlideAxis& a, bool gradient, int at) {
  if (!gradient) return {at * a.stride - a.pad, a.dilation, 0, 1, a.kernel};
  const int padded = at + a.pad;
  if (a.stride == 1) return {padded, -a.dilation, 0, 1, a.kernel};
  const int first = padded % a.stride;  // the first tap that some source position has on this result
  return {padded / a.stride, -1, first, a.stride, first < a.kernel ? (a.kernel - 1 - first) / a.stride + 1 : 0};
}

// A strided window is taken apart into runs, `stride` of them, so that in each of them the next result reads one
// read_step further on.
__device__ __forceinline__ TapRun SlidingRun(const SlideAxis& a, bool gradient, int at, int run) {
  const TapRun r = WholeRun(a, gradient, at);
  if (!gradient && a.stride > 1) return {r.read + run, a.stride, run, a.stride, (a.kernel - 1 - run) / a.stride + 1};
  if (!gradient) return r;
  const int last = r.count - 1;  // in ascending order of the source
  return {r.read + last * r.read_step, -r.read_step, r.tap + last * r.tap_step, -r.tap_step, r.count};
}

// Adds the taps of a run to kTile results, kTile taps at a time, so that their loads are in flight together.
template <class S, class F, int kVector, int kTile>
__device__ __forceinline__ void AddRun(const SlideAxis& a, const TapRun& run, const S* source, const F* filter,
                                       float (&sums)[kTile][kVector]) {
  const auto load = [&](int at) {
    const int position = run.read + at * run.read_step;
    Packed<S, kVector> loaded{};
    if (static_cast<unsigned>(position) < static_cast<unsigned>(a.source)) {
      loaded = *reinterpret_cast<const Packed<S, kVector>*>(source + position * a.source_step);
    }
    return loaded;
  };
  const F* tap = filter + run.tap * a.filter_step;
  const int64_t tap_step = run.tap_step * a.filter_step;
  Packed<S, kVector> read[2 * kTile - 1];
#pragma unroll
  for (int q = 0; q < kTile - 1; ++q) read[q] = load(q);
  for (int begin = 0; begin < run.count; begin += kTile) {
    Packed<F, kVector> factors[kTile]{};
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      read[kTile - 1 + u] = {};
      if (begin + u < run.count) {
        read[kTile - 1 + u] = load(begin + u + kTile - 1);
        factors[u] = *reinterpret_cast<const Packed<F, kVector>*>(tap);
      }
      tap += tap_step;
    }
    float in[2 * kTile - 1][kVector];
    Convert(read, in);
#pragma unroll
    for (int u = 0; u < kTile; ++u) {
      if (begin + u >= run.count) break;
      float factor[kVector];
      factors[u].Unpack(factor);
#pragma unroll
      for (int q = 0; q < kTile; ++q) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) sums[q][v] = fmaf(in[u + q][v], factor[v], sums[q][v]);
      }
    }
#pragma unroll
    for (int q = 0; q < kTile - 1; ++q) read[q] = read[kTile + q];
  }
}

template <class S, class F, class R, int kVector, int kTile>
__global__ void __launch_bounds__(kSlideThreads)
    SlideKernel(const __grid_constant__ Slide m, const S* __restrict__ source, const F* __restrict__ filter,
                R* __restrict__ result) {
  uint32_t rest = blockIdx.x * kSlideThreads + threadIdx.x;
  if (rest >= m.threads) return;
  const int fast = static_cast<int>(m.fast.Take(rest)), tile = static_cast<int>(m.tiles.Take(rest));
  const int slow = static_cast<int>(m.slow.Take(rest)), phase = static_cast<int>(rest);
  const int channel = (m.channels_last ? fast : slow) * kVector, fixed = m.channels_last ? slow : fast;
  const int first = phase + tile * kTile * m.phases;
  const TapRun lines = WholeRun(m.fixed, m.gradient, fixed);
  const int runs = m.gradient ? 1 : min(m.slide.stride, m.slide.kernel);

  // The gradient of an input channel is a sum over all the output channels that read it.
  const int shares = m.gradient ? m.multiplier : 1;
  const int of_source = m.gradient ? channel * m.multiplier : channel / m.multiplier;
  const int of_filter = m.gradient ? of_source : channel;

  for (int64_t image = blockIdx.y; image < m.images; image += gridDim.y) {
    const S* pixels = source + image * m.source_n + of_source * m.source_c;
    const F* taps = filter + of_filter * m.filter_c;
    if (m.images_per_group != 0) taps += image / m.images_per_group * m.filter_n;
    float sums[kTile][kVector] = {};
    for (int share = 0; share < shares; ++share, pixels += m.source_c, taps += m.filter_c) {
      for (int i = 0; i < lines.count; ++i) {
        const int line = lines.read + i * lines.read_step;
        if (static_cast<unsigned>(line) >= static_cast<unsigned>(m.fixed.source)) continue;
        const S* from = pixels + line * m.fixed.source_step;
        const F* line_taps = taps + (lines.tap + i * lines.tap_step) * m.fixed.filter_step;
        for (int run = 0; run < runs; ++run) {
          AddRun(m.slide, SlidingRun(m.slide, m.gradient, first, run), from, line_taps, sums);
        }
      }
    }
    float scale[kVector], bias[kVector];
    LoadScale(m.epilogue, channel, scale);
    LoadBias(m.epilogue, channel, bias);
    const int64_t out = image * m.result_n + channel * m.result_c + fixed * m.fixed.result_step;
#pragma unroll
    for (int q = 0; q < kTile; ++q) {
#pragma unroll
      for (int v = 0; v < kVector; ++v) sums[q][v] = fmaf(sums[q][v], scale[v], bias[v]);
    }
    const auto exists = [&](int q) { return first + q * m.phases < m.slide.result; };
    const auto offset = [&](int q) { return out + (first + q * m.phases) * m.slide.result_step; };
    Finish<R>(m.epilogue, exists, offset, sums);
#pragma unroll
    for (int q = 0; q < kTile; ++q) {
      if (exists(q)) StoreVector(result + offset(q), sums[q]);
    }
  }
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_SLIDE_CUH_
