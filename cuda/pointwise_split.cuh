// Pointwise convolution for small problems, on tensor cores (sm_80 and newer). Where there are few pixels and features
// and many channels, a tiled matrix product leaves most multiprocessors idle or needs a second kernel. Here the warps
// of a block divide the channels of sixteen pixels and add up in shared memory, and operands go straight from global
// memory into the registers of the lanes that multiply them.
//
// A matrix product is a sum over channels, whatever their order, so each lane takes eight neighbouring channels of a
// pixel at the places where the instruction wants others; and neighbouring features go to different products.
#ifndef JAX_DWSCONV_CUDA_POINTWISE_SPLIT_CUH_
#define JAX_DWSCONV_CUDA_POINTWISE_SPLIT_CUH_

#include <type_traits>

#include "cuda/epilogue.cuh"
#include "cuda/pointwise.h"
#include "cuda/requantize.cuh"
#include "cuda/tensor_core.cuh"

namespace dwsconv::cuda {

// What a lane multiplies in two products of a quad: 16 bytes of channels of pixels `group` and `group + 8`, and their
// rows of the kernel, kFeatures neighbouring features of each.
template <class T, int kFeatures>
struct PointwiseChunk {
  static constexpr int kLaneChannels = 16 / sizeof(T), kChannels = 4 * kLaneChannels;

  Packed<T, kLaneChannels> pixels[2];
  Packed<T, kFeatures> rows[kLaneChannels];

  __device__ __forceinline__ void Load(const PointwiseTask& m, const T* source, const T* kernel, int pixel, int feature,
                                       int channel) {
    const bool has_channel = channel < m.channels;
    const T* const row = kernel + static_cast<int64_t>(channel) * m.features + feature;
#pragma unroll
    for (int r = 0; r < kLaneChannels; ++r) {
      rows[r] = {};
      if (has_channel && feature < m.features) {
        rows[r] = *reinterpret_cast<const Packed<T, kFeatures>*>(row + r * m.features);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int p = pixel + 8 * half;
      pixels[half] = {};
      if (has_channel && p < m.pixels) {
        pixels[half] = *reinterpret_cast<const Packed<T, kLaneChannels>*>(source + int64_t{p} * m.channels + channel);
      }
    }
    if (m.gate == nullptr || !has_channel) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t image = m.pixels_per_image.Quotient(min(pixel + 8 * half, m.pixels - 1));
      float values[kLaneChannels], factors[kLaneChannels];
      pixels[half].Unpack(values);
      LoadVector(static_cast<const T*>(m.gate) + int64_t{image} * m.channels + channel, factors);
#pragma unroll
      for (int v = 0; v < kLaneChannels; ++v) values[v] *= factors[v];
      pixels[half].Pack(values);
    }
  }

  // sums[j]: of feature j of each of the eight vectors of features.
  __device__ __forceinline__ void AddTo(float (&sums)[kFeatures][4]) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = Operand(pixels[i % 2].words.at[2 * step + i / 2]);
#pragma unroll
      for (int j = 0; j < kFeatures; ++j) {
        const uint32_t b[2] = {Row(2 * step, j), Row(2 * step + 1, j)};
        MultiplyAdd<T>(a, b, sums[j]);
      }
    }
  }

 private:
  static __device__ __forceinline__ uint32_t Operand(uint32_t word) { return sizeof(T) == 4 ? ToTF32(word) : word; }

  // Feature j of the channels of word r.
  __device__ __forceinline__ uint32_t Row(int r, int j) const {
    if constexpr (sizeof(T) == 4) {
      return ToTF32(rows[r].words.at[j]);
    } else {
      return PickHalves(rows[2 * r].words.at[j / 2], rows[2 * r + 1].words.at[j / 2], j % 2 == 1);
    }
  }
};

// The same of int8, whose sums are of int32.
template <>
struct PointwiseChunk<int8_t, 4> {
  static constexpr int kLaneChannels = 16, kChannels = 4 * kLaneChannels;

  Words<4> pixels[2];
  uint32_t rows[kLaneChannels];

  __device__ __forceinline__ void Load(const PointwiseTask& m, const int8_t* source, const int8_t* kernel, int pixel,
                                       int feature, int channel) {
    const bool has_channel = channel < m.channels;
    const int8_t* const row = kernel + static_cast<int64_t>(channel) * m.features + feature;
#pragma unroll
    for (int r = 0; r < kLaneChannels; ++r) {
      rows[r] = 0;
      if (has_channel && feature < m.features) rows[r] = *reinterpret_cast<const uint32_t*>(row + r * m.features);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int p = pixel + 8 * half;
      pixels[half] = {};
      if (has_channel && p < m.pixels) {
        pixels[half] = *reinterpret_cast<const Words<4>*>(source + int64_t{p} * m.channels + channel);
      }
    }
  }

  __device__ __forceinline__ void AddTo(int (&sums)[4][4]) const {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t a[4], b[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = pixels[i % 2].at[2 * step + i / 2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int c = 0; c < 4; ++c) b[half][c] = rows[8 * step + 4 * half + c];
        TransposeBytes(b[half]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t both[2] = {b[0][j], b[1][j]};
        MultiplyAdd(a, both, sums[j]);
      }
    }
  }
};

// The grid's x is the tile of sixteen pixels, its y the tile of 8 * kFeatures features.
template <class T, int kFeatures>
__global__ void __launch_bounds__(32 * PointwiseSplit::kWarps)
    PointwiseSplitKernel(const __grid_constant__ PointwiseTask m, const T* __restrict__ source,
                         const T* __restrict__ kernel, T* __restrict__ result) {
#if __CUDA_ARCH__ >= 800
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int first_pixel = blockIdx.x * PointwiseSplit::kPixels, first_feature = blockIdx.y * 8 * kFeatures;

  using Chunk = PointwiseChunk<T, kFeatures>;
  constexpr int kWarps = PointwiseSplit::kWarps, kStep = kWarps * Chunk::kChannels;
  using Sum = std::conditional_t<std::is_same_v<T, int8_t>, int, float>;
  Sum sums[kFeatures][4] = {};
  Chunk chunks[2];  // one is loaded while the other is multiplied
  int channel = warp * Chunk::kChannels + quad * Chunk::kLaneChannels;
  const auto load = [&](int which) {
    chunks[which].Load(m, source, kernel, first_pixel + group, first_feature + group * kFeatures, channel);
    channel += kStep;
  };
  const int steps = (m.channels - warp * Chunk::kChannels + kStep - 1) / kStep;
  if (steps > 0) load(0);
  for (int step = 0; step < steps; step += 2) {
    if (step + 1 < steps) load(1);
    chunks[0].AddTo(sums);
    if (step + 1 >= steps) break;
    if (step + 2 < steps) load(0);
    chunks[1].AddTo(sums);
  }

  // Of each of its two pixels a lane has two neighbouring vectors of kFeatures features. Every warp adds up half of one
  // of these four.
  constexpr int kHalf = kFeatures / 2;
  struct alignas(kHalf * sizeof(Sum)) Part {
    Sum at[kHalf];
  };
  __shared__ Part parts[kWarps][kWarps][32];
#pragma unroll
  for (int part = 0; part < kWarps; ++part) {
    Part values;
#pragma unroll
    for (int v = 0; v < kHalf; ++v) values.at[v] = sums[part % 2 * kHalf + v][part / 2];
    parts[warp][part][lane] = values;
  }
  __syncthreads();
  Sum values[1][kHalf] = {};
#pragma unroll
  for (int other = 0; other < kWarps; ++other) {  // always in this order
    const Part part = parts[other][warp][lane];
#pragma unroll
    for (int v = 0; v < kHalf; ++v) values[0][v] += part.at[v];
  }
  const int vector = warp / 2, pixel = first_pixel + group + vector / 2 * 8;
  const int feature = first_feature + (2 * quad + vector % 2) * kFeatures + warp % 2 * kHalf;
  if (pixel >= m.pixels || feature >= m.features) return;
  const int64_t out = int64_t{pixel} * m.features + feature;
  const auto exists = [](int) { return true; };
  const auto offset = [&](int) { return out; };
  if constexpr (std::is_same_v<T, int8_t>) {
    const PointwiseRequantization& r = m.requantization;
#pragma unroll
    for (int v = 0; v < kHalf; ++v) values[0][v] += r.bias == nullptr ? 0 : r.bias[feature + v];
    StoreRequantized(r, r.scale + feature, feature, exists, offset, values, result);
  } else {
    float scale[kHalf], bias[kHalf];
    LoadScale(m.epilogue, feature, scale);
    LoadBias(m.epilogue, feature, bias);
#pragma unroll
    for (int v = 0; v < kHalf; ++v) values[0][v] = fmaf(values[0][v], scale[v], bias[v]);
    Finish<T>(m.epilogue, exists, offset, values);
    StoreVector(result + out, values[0]);
  }
#endif
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_POINTWISE_SPLIT_CUH_
