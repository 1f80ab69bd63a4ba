// Adds the sums of the threads of a block, and those of the blocks of a cluster, in a fixed order.
#ifndef JAX_DWSCONV_CUDA_TAP_PARTS_CUH_
#define JAX_DWSCONV_CUDA_TAP_PARTS_CUH_

#include <cooperative_groups.h>

#include "cuda/dtypes.cuh"
#include "cuda/tap_parts.h"

namespace dwsconv::cuda {

struct TapBlock {
  uint32_t group, split;
  int first_channel;
};

// The blocks of a cluster are neighbours.
template <int kVector>
__device__ __forceinline__ TapBlock LocateTapBlock(const TapParts& m) {
  uint32_t rest = blockIdx.x;
  TapBlock block{};
  if (m.one_launch) block.split = m.splits.Take(rest);
  block.first_channel = m.lane_groups.Take(rest) * m.lanes.value * kVector;
  block.group = m.groups.Take(rest);
  if (!m.one_launch) block.split = rest;
  return block;
}

// `sums`, in shared memory: by walker, tap, channel of the block.
template <int kTaps, int kVector>
__device__ __forceinline__ void StoreSums(const TapParts& m, const float (&values)[kVector], int walker, int tap,
                                          int lane, float* sums) {
  const int width = m.lanes.value * kVector;
#pragma unroll
  for (int v = 0; v < kVector; ++v) sums[(walker * kTaps + tap) * width + v * m.lanes.value + lane] = values[v];
}

// Thread `worker` of the `workers` that have this lane adds every so many taps.
template <class T, int kH, int kW, int kVector>
__device__ __forceinline__ void AddParts(const TapParts& m, const TapBlock& block, int lane, int worker, int workers,
                                         float* sums, void* filter, float* workspace) {
  const int width = m.lanes.value * kVector, taps_width = kH * kW * width;
  __syncthreads();
  const auto write = [&](int tap, int channel, float sum) {
    const int64_t at = block.group * m.filter.n + tap / kW * m.filter.h + tap % kW * m.filter.w + channel * m.filter.c;
    if (m.filter_is_float) {
      static_cast<float*>(filter)[at] = sum;
    } else {
      static_cast<T*>(filter)[at] = FromFloat<T>(sum);
    }
  };
  float* const part =
      workspace + (static_cast<int64_t>(block.split) * m.groups.value + block.group) * kH * kW * m.channels;
  const int channel = block.first_channel + lane * kVector;
  for (int tap = worker; tap < kH * kW; tap += workers) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      float* const own = sums + tap * width + v * m.lanes.value + lane;
      float sum = own[0];
      for (int other = 1; other < m.walkers; ++other) sum += own[other * taps_width];
      if (m.one_launch && m.splits.value > 1) {
        own[0] = sum;
      } else if (channel < m.channels) {
        if (m.one_launch) {
          write(tap, channel + v, sum);
        } else {
          part[static_cast<int64_t>(tap) * m.channels + channel + v] = sum;
        }
      }
    }
  }
#if __CUDA_ARCH__ >= 900
  if (m.one_launch && m.splits.value > 1) {
    const auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    for (int index = block.split * blockDim.x + threadIdx.x; index < taps_width; index += m.splits.value * blockDim.x) {
      float sum = 0;
      for (unsigned other = 0; other < m.splits.value; ++other) sum += cluster.map_shared_rank(sums, other)[index];
      uint32_t rest = index;
      const int in_vectors = m.lanes.Take(rest);
      const int at = block.first_channel + in_vectors * kVector + rest % kVector;
      if (at < m.channels) write(rest / kVector, at, sum);
    }
    cluster.sync();  // the others may still read
  }
#endif
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TAP_PARTS_CUH_
