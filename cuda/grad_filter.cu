#include <algorithm>
#include <limits>

#include "cuda/dtypes.cuh"
#include "cuda/kernels.h"
#include "cuda/tap_planes.h"
#include "cuda/tap_products.h"
#include "cuda/tap_rows.h"
#include "cuda/tap_sums.h"

namespace dwsconv::cuda {
namespace {

constexpr int kTaps = GradFilterPieces::kTapsPerThread;
constexpr int kWarps = GradFilterPieces::kWarps;
constexpr int kLanes = GradFilterPieces::kLanes;

// Which tap sums a block computes, over which rows of g.
struct Block {
  int64_t split, group, tap_row, first_tap, channel_tile;
};

__device__ Block LocateBlock(const Problem& p, const GradFilterPieces& plan, int64_t index) {
  Block b;
  b.channel_tile = index % plan.channel_tiles;
  index /= plan.channel_tiles;
  b.first_tap = index % plan.tap_tiles * kTaps;
  index /= plan.tap_tiles;
  b.tap_row = index % p.kernel_h;
  index /= p.kernel_h;
  b.group = index % p.groups;
  b.split = index / p.groups;
  return b;
}

// Adds one piece of a row of g times a row of x to the tap sums of this thread's channel. NHWC: a lane is a channel and
// walks the whole piece. NCHW: the lanes share one channel and divide the piece.
template <bool kChannelsLast, class X, class Y>
__device__ void SumPiece(const Problem& p, const X* x_row, const Y* g_row, int64_t begin, int64_t end,
                         int64_t first_tap, int lane, float (&totals)[kTaps]) {
  float sums[kTaps] = {};
  for (int64_t ow = begin + (kChannelsLast ? 0 : lane); ow < end; ow += kChannelsLast ? 1 : kLanes) {
    const float g = ToFloat(g_row[ow * p.y.w]);
#pragma unroll
    for (int t = 0; t < kTaps; ++t) {
      const int64_t w = ow * p.stride_w + (first_tap + t) * p.dilation_w - p.pad_left;
      if (w >= 0 && w < p.in_w && first_tap + t < p.kernel_w) sums[t] = fmaf(g, ToFloat(x_row[w * p.x.w]), sums[t]);
    }
  }
#pragma unroll
  for (int t = 0; t < kTaps; ++t) totals[t] += sums[t];
}

// Adds the sums of all threads that share a channel, in a fixed order. Thread `lane` of warp 0 has them for its channel
// in NHWC, thread 0 for the block's only channel in NCHW.
template <bool kChannelsLast>
__device__ void ReduceBlock(float (&sums)[kTaps], int lane, int warp) {
  __shared__ float shared[kWarps][kTaps][kLanes];
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    if constexpr (!kChannelsLast) {
      for (int offset = kLanes / 2; offset > 0; offset /= 2) sums[t] += __shfl_down_sync(0xffffffff, sums[t], offset);
    }
    shared[warp][t][lane] = sums[t];
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTaps; ++t) {
    for (int other = 1; other < kWarps; ++other) sums[t] += shared[other][t][lane];
  }
  __syncthreads();
}

template <bool kChannelsLast, class X, class Y>
__global__ void __launch_bounds__(kLanes* kWarps)
    PartialSumsKernel(const __grid_constant__ Problem p, const __grid_constant__ GradFilterPieces plan,
                      const X* __restrict__ x, const Y* __restrict__ g, float* __restrict__ workspace) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  for (int64_t index = blockIdx.x; index < plan.blocks; index += gridDim.x) {
    const Block b = LocateBlock(p, plan, index);
    const int64_t channel = kChannelsLast ? b.channel_tile * kLanes + lane : b.channel_tile;
    const bool active = channel < p.out_channels();
    const int64_t last = plan.pieces * (b.split + 1) / plan.splits;
    float sums[kTaps] = {};
    for (int64_t piece = plan.pieces * b.split / plan.splits + warp; active && piece < last; piece += kWarps) {
      const int64_t row = piece / plan.pieces_per_row, begin = piece % plan.pieces_per_row * plan.piece_width;
      const int64_t n = b.group * p.images_per_group() + row / p.out_h, oh = row % p.out_h;
      const int64_t h = oh * p.stride_h + b.tap_row * p.dilation_h - p.pad_top;
      if (h < 0 || h >= p.in_h) continue;
      SumPiece<kChannelsLast>(p, x + n * p.x.n + h * p.x.h + p.input_channel(channel) * p.x.c,
                              g + n * p.y.n + oh * p.y.h + channel * p.y.c, begin,
                              min(begin + plan.piece_width, p.out_w), b.first_tap, lane, sums);
    }
    ReduceBlock<kChannelsLast>(sums, lane, warp);
    if (warp == 0 && active && (kChannelsLast || lane == 0)) {
      const int64_t row = ((b.split * p.groups + b.group) * p.kernel_h + b.tap_row) * p.kernel_w;
#pragma unroll
      for (int t = 0; t < kTaps; ++t) {
        if (b.first_tap + t < p.kernel_w) workspace[(row + b.first_tap + t) * p.out_channels() + channel] = sums[t];
      }
    }
  }
}

constexpr int kAddWidth = 32, kAddWarps = 8;

// Adds the parts and writes the filter in its own order and dtype. Warp w adds the parts w, w + kAddWarps, ... of the
// elements of its lanes; then the first warp adds the warps' sums.
template <class F>
__global__ void __launch_bounds__(kAddWidth* kAddWarps)
    AddPartsKernel(const __grid_constant__ Problem p, int splits, const float* __restrict__ workspace,
                   F* __restrict__ filter) {
  __shared__ float shared[kAddWarps][kAddWidth];
  const int lane = threadIdx.x % kAddWidth, warp = threadIdx.x / kAddWidth;
  const int64_t count = p.filter_elements();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kAddWidth; first < count;
       first += static_cast<int64_t>(gridDim.x) * kAddWidth) {
    const int64_t i = first + lane;
    float sum = 0;
    if (i < count) {
#pragma unroll 8
      for (int split = warp; split < splits; split += kAddWarps) sum += workspace[split * count + i];
    }
    shared[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && i < count) {
      for (int other = 1; other < kAddWarps; ++other) sum += shared[other][lane];
      int64_t rest = i;
      const int64_t channel = rest % p.out_channels();
      rest /= p.out_channels();
      const int64_t column = rest % p.kernel_w;
      rest /= p.kernel_w;
      filter[rest / p.kernel_h * p.filter.n + rest % p.kernel_h * p.filter.h + column * p.filter.w +
             channel * p.filter.c] = FromFloat<F>(sum);
    }
    __syncthreads();
  }
}

unsigned GridSize(int64_t blocks) {
  return static_cast<unsigned>(std::min<int64_t>(blocks, std::numeric_limits<int32_t>::max()));
}

}  // namespace

bool LaunchGradFilter(const Problem& p, const GradFilterPlan& plan, const void* x, const void* g, void* filter,
                      float* workspace, cudaStream_t stream) {
  bool has_instance = true;
  const bool has_types = WithDtypes(p, [&](auto x_type, auto filter_type, auto y_type) {
    using X = typename decltype(x_type)::type;
    using F = typename decltype(filter_type)::type;
    using Y = typename decltype(y_type)::type;
    if (plan.kernel == GradFilterPlan::Kernel::kTapSums) {
      has_instance = LaunchTapSums(plan.turned ? Turned(p) : p, plan, x, g, filter, workspace, stream);
    } else if (plan.kernel == GradFilterPlan::Kernel::kTapRows) {
      has_instance = LaunchTapRows(p, plan, x, g, filter, workspace, stream);
    } else if (plan.kernel == GradFilterPlan::Kernel::kTapPlanes) {
      has_instance = LaunchTapPlanes(p, plan, x, g, filter, workspace, stream);
    } else if (plan.kernel == GradFilterPlan::Kernel::kTapProducts) {
      has_instance = LaunchTapProducts(p, plan, x, g, filter, workspace, stream);
    } else {
      const auto partial_sums = p.channels_last ? PartialSumsKernel<true, X, Y> : PartialSumsKernel<false, X, Y>;
      partial_sums<<<GridSize(plan.pieces.blocks), kLanes * kWarps, 0, stream>>>(
          p, plan.pieces, static_cast<const X*>(x), static_cast<const Y*>(g), workspace);
    }
    if (plan.one_launch || !has_instance) return;
    AddPartsKernel<F>
        <<<GridSize((p.filter_elements() + kAddWidth - 1) / kAddWidth), kAddWidth * kAddWarps, 0, stream>>>(
            p, static_cast<int>(plan.splits), workspace, static_cast<F*>(filter));
  });
  return has_types && has_instance;
}

}  // namespace dwsconv::cuda
