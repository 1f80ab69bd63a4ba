// Pointwise convolution as a tiled matrix product on tensor cores (sm_80 and newer), with everything that precedes and
// follows it. XLA takes one kernel for the product, which writes sums in float32 where anything follows, and one or two
// for the rest; with few channels all of them are bound by memory.
//
// A block has a tile of pixels and features and goes along the channels, some chunks ahead with its copies to shared
// memory. Neighbouring features go to different products, so that the sums of a lane are those of neighbouring ones.
#ifndef JAX_DWSCONV_CUDA_POINTWISE_TILES_CUH_
#define JAX_DWSCONV_CUDA_POINTWISE_TILES_CUH_

#include <type_traits>

#include "cuda/epilogue.cuh"
#include "cuda/pointwise.h"
#include "cuda/requantize.cuh"
#include "cuda/tensor_core.cuh"

namespace dwsconv::cuda {

// The kernel's part of four products: a lane has four neighbouring features of a few channels.
template <class T>
struct KernelOperand {
  static constexpr int kLaneChannels = 2;
  Packed<T, 4> rows[4];  // the lane's channels, and those eight channels on

  // Where the features of a group begin, in bytes, and those of vector v of the sums of a quad.
  static __device__ int Place(int group) { return 8 * group; }
  static __device__ int StoredPlace(int quad, int) { return 8 * quad; }

  __device__ __forceinline__ void Load(const unsigned char* first, int pitch) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      rows[r] = *reinterpret_cast<const Packed<T, 4>*>(first + (r % 2 + r / 2 * 8) * pitch);
    }
  }
  __device__ __forceinline__ void Pick(int j, uint32_t (&b)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      b[i] = PickHalves(rows[2 * i].words.at[j / 2], rows[2 * i + 1].words.at[j / 2], j % 2 == 1);
    }
  }
};

template <>
struct KernelOperand<float> {
  static constexpr int kLaneChannels = 1;
  Words<4> rows[2];  // the lane's channel, and four channels on

  // Such that quads store neighbouring vectors.
  static __device__ int Place(int group) { return (group / 2 + group % 2 * 4) * 16; }
  static __device__ int StoredPlace(int quad, int v) { return 4 * (quad + 4 * v); }

  __device__ __forceinline__ void Load(const unsigned char* first, int pitch) {
#pragma unroll
    for (int r = 0; r < 2; ++r) rows[r] = *reinterpret_cast<const Words<4>*>(first + 4 * r * pitch);
  }
  __device__ __forceinline__ void Pick(int j, uint32_t (&b)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) b[i] = ToTF32(rows[i].at[j]);
  }
};

template <>
struct KernelOperand<int8_t> {
  static constexpr int kLaneChannels = 4;
  uint32_t rows[2][4];  // the lane's channels, and those sixteen channels on; of each feature all four

  static __device__ int Place(int group) { return 4 * group; }
  static __device__ int StoredPlace(int quad, int) { return 8 * quad; }

  __device__ __forceinline__ void Load(const unsigned char* first, int pitch) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) rows[i][r] = *reinterpret_cast<const uint32_t*>(first + (r + 16 * i) * pitch);
      TransposeBytes(rows[i]);
    }
  }
  __device__ __forceinline__ void Pick(int j, uint32_t (&b)[2]) const {
    b[0] = rows[0][j];
    b[1] = rows[1][j];
  }
};

template <class T>
__device__ __forceinline__ const auto& Parts(const PointwiseTask& m) {
  if constexpr (std::is_same_v<T, int8_t>) {
    return m.requantization;
  } else {
    return m.epilogue;
  }
}

// d += a * b.
template <class T, class Sum>
__device__ __forceinline__ void Add(const uint32_t (&a)[4], const uint32_t (&b)[2], Sum (&d)[4]) {
  if constexpr (std::is_same_v<T, int8_t>) {
    MultiplyAdd(a, b, d);
  } else {
    MultiplyAdd<T>(a, b, d);
  }
}

// The words of a source times those of a gate, rounded to T.
template <class T>
__device__ __forceinline__ uint32_t Times(uint32_t word, uint32_t gate) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(__uint_as_float(word) * __uint_as_float(gate));
  } else {
    float values[2], factors[2];
    UnpackPair(word, T{}, values);
    UnpackPair(gate, T{}, factors);
    return PackPair(values[0] * factors[0], values[1] * factors[1], T{});
  }
}

// Blocks with neighbouring indices have neighbouring tiles of features, so they read the same pixels, and go from tile
// to tile of pixels. Copies run on across tiles; where all chunks of the kernel fit, they are copied once.
template <class T, int kRowTiles, int kDown, int kAcross, int kSteps, int kStages, bool kGated>
__global__ void __launch_bounds__(PointwiseTile{kRowTiles, kDown, kAcross, kSteps, kStages}.threads(),
                                  PointwiseTile{kRowTiles, kDown, kAcross, kSteps, kStages}.resident_blocks())
    PointwiseTilesKernel(const __grid_constant__ PointwiseTask m, const T* __restrict__ source,
                         const T* __restrict__ kernel, T* __restrict__ result) {
#if __CUDA_ARCH__ >= 800
  constexpr PointwiseTile kTile{kRowTiles, kDown, kAcross, kSteps, kStages};
  constexpr int kSize = sizeof(T), kPiece = PointwiseTile::piece_bytes(kSize), kVector = kPiece / kSize;
  constexpr int kStepChannels = 32 / kSize;
  constexpr bool kIntegers = std::is_same_v<T, int8_t>;
  using Sum = std::conditional_t<kIntegers, int, float>;
  constexpr int kThreads = kTile.threads(), kPixels = kTile.pixels(), kChannels = kTile.channels(kSize);
  constexpr int kSourcePitch = kTile.source_pitch(), kKernelPitch = kTile.kernel_pitch(kSize);
  constexpr int kSourceBytes = kTile.source_bytes(0), kKernelBytes = kTile.kernel_bytes(kSize);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int warp_row = warp / kAcross * 16 * kRowTiles, warp_across = warp % kAcross;
  uint32_t first_tile = blockIdx.x;
  const int first_feature = m.feature_tiles.Take(first_tile) * kTile.features();
  const int tile_step = gridDim.x / m.feature_tiles.value;

  extern __shared__ __align__(16) unsigned char shared[];
  const int source_bytes = kTile.source_bytes(kGated ? m.gates : 0), ring_bytes = kStages * source_bytes;
  const int kernel_end = ring_bytes + m.kernel_chunks * kKernelBytes;
  const bool keeps_kernel = m.kernel_chunks * kChannels >= m.channels;
  auto* const scales = reinterpret_cast<float*>(shared + kernel_end);
  auto* const biases = reinterpret_cast<Sum*>(scales + kTile.features());
  struct Place {  // of a chunk in shared memory
    int source, kernel;
  };
  const auto advance = [&](Place& place) {
    place.source += source_bytes;
    if (place.source == ring_bytes) place.source = 0;
    place.kernel += kKernelBytes;
    if (place.kernel == kernel_end) place.kernel = ring_bytes;
  };

  // What this thread copies of every chunk: pieces of pixels, and of rows of the kernel.
  constexpr int kPieces = 32 * kSteps / kPiece, kSourceRows = kThreads / kPieces;
  constexpr int kKernelPieces = PointwiseTile::kFeatures / kVector, kKernelRows = kThreads / kKernelPieces;
  static_assert(kPixels % kSourceRows == 0 || kPixels < kSourceRows);
  static_assert(kChannels % kKernelRows == 0 || kKernelRows % kChannels == 0);
  const int source_row = threadIdx.x / kPieces, source_channel = threadIdx.x % kPieces * kVector;
  const int source_to = source_row * kSourcePitch + source_channel * kSize;
  const int kernel_row = threadIdx.x / kKernelPieces, kernel_channel = kernel_row % kChannels;
  const int kernel_feature =
      first_feature + kernel_row / kChannels * PointwiseTile::kFeatures + threadIdx.x % kKernelPieces * kVector;
  const int kernel_to = kernel_row * kKernelPitch + threadIdx.x % kKernelPieces * kPiece;
  const T* const first_kernel = kernel + static_cast<int64_t>(kernel_channel) * m.features + kernel_feature;
  const T *next_pixels, *next_kernel;
  int tile_to = first_tile, rows_left, channels_left;
  Place to{0, ring_bytes};
  const auto aim = [&] {
    const int row = tile_to * kPixels + source_row;
    rows_left = m.pixels - row;
    channels_left = m.channels;
    next_pixels = source + static_cast<int64_t>(row) * m.channels + source_channel;
    next_kernel = first_kernel;
  };
  const auto copy = [&] {
#pragma unroll
    for (int row = 0; row < kPixels; row += kSourceRows) {
      if (kPixels < kSourceRows && source_row >= kPixels) break;
      CopyAsync<kPiece>(shared + to.source + source_to + row * kSourcePitch,
                        next_pixels + static_cast<int64_t>(row) * m.channels,
                        row < rows_left && source_channel < channels_left ? kPiece : 0);
    }
    if (!keeps_kernel || tile_to == first_tile) {
#pragma unroll
      for (int row = 0; row < kAcross * kChannels; row += kKernelRows) {
        if (kAcross * kChannels < row + kKernelRows && kernel_row + row >= kAcross * kChannels) break;
        const int channel = row % kChannels, feature = row / kChannels * PointwiseTile::kFeatures;
        CopyAsync<kPiece>(
            shared + to.kernel + kernel_to + row * kKernelPitch,
            next_kernel + (static_cast<int64_t>(channel) * m.features + feature),
            kernel_channel + channel < channels_left && kernel_feature + feature < m.features ? kPiece : 0);
      }
      next_kernel += static_cast<int64_t>(kChannels) * m.features;
    }
    if constexpr (kGated) {
      const int channel = m.channels - channels_left + source_channel;
      const int first_image = m.pixels_per_image.Quotient(tile_to * kPixels);
      for (int image = source_row; image < m.gates; image += kSourceRows) {
        CopyAsync<kPiece>(
            shared + to.source + kSourceBytes + image * kSourcePitch + source_channel * kSize,
            static_cast<const T*>(m.gate) + static_cast<int64_t>(first_image + image) * m.channels + channel,
            source_channel < channels_left && first_image + image < m.images ? kPiece : 0);
      }
    }
    advance(to);
    next_pixels += kChannels;
    channels_left -= kChannels;
    if (channels_left <= 0) {
      tile_to += tile_step;
      aim();
    }
  };
  aim();
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (tile_to < m.pixel_tiles) copy();
    CommitCopies();
  }
  const auto* const scale = Parts<T>(m).scale;
  const auto* const bias = Parts<T>(m).bias;
  for (int i = threadIdx.x; i < kTile.features(); i += kThreads) {
    const int feature = first_feature + i;
    const bool exists = feature < m.features;
    scales[i] = exists && scale != nullptr ? scale[feature] : 1;
    biases[i] = exists && bias != nullptr ? bias[feature] : 0;
  }

  const int pixels_from = (warp_row + lane % 16) * kSourcePitch + lane / 16 * 16;
  using Operand = KernelOperand<T>;
  const int kernel_from =
      warp_across * kChannels * kKernelPitch + Operand::Place(group) + quad * Operand::kLaneChannels * kKernelPitch;
  Place from{0, ring_bytes};
  for (int tile = first_tile; tile < m.pixel_tiles; tile += tile_step) {
    const int pixel = tile * kPixels + warp_row + group;  // and every eighth after it
    int gate_from[kRowTiles][2];
    if constexpr (kGated) {
      const int first_image = m.pixels_per_image.Quotient(tile * kPixels);
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const int image = m.pixels_per_image.Quotient(min(pixel + 8 * i, m.pixels - 1));
        gate_from[i / 2][i % 2] = kSourceBytes + (image - first_image) * kSourcePitch + quad * 4;
      }
    }
    Sum sums[kRowTiles][4][4] = {};
    for (int channel = 0; channel < m.channels; channel += kChannels) {
      WaitForCopies<kStages - 2>();
      __syncthreads();
      if (tile_to < m.pixel_tiles) copy();
      CommitCopies();
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step > 0 && step % 2 == 0 && channel + step * kStepChannels >= m.channels) break;
        uint32_t pixels[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          LoadMatrices(shared + from.source + pixels_from + 16 * i * kSourcePitch + step * 32, pixels[i]);
          if constexpr (kGated) {
#pragma unroll
            for (int word = 0; word < 4; ++word) {
              const unsigned char* const gate =
                  shared + from.source + gate_from[i][word % 2] + step * 32 + word / 2 * 16;
              pixels[i][word] = Times<T>(pixels[i][word], *reinterpret_cast<const uint32_t*>(gate));
            }
          }
          if constexpr (kSize == 4) {
#pragma unroll
            for (uint32_t& word : pixels[i]) word = ToTF32(word);
          }
        }
        Operand features;
        features.Load(shared + from.kernel + kernel_from + step * kStepChannels * kKernelPitch, kKernelPitch);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t b[2];
          features.Pick(j, b);
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) Add<T>(pixels[i], b, sums[i][j]);
        }
      }
      advance(from);
    }

#pragma unroll
    for (int v = 0; v < 8 / kVector; ++v) {
      const int place = warp_across * PointwiseTile::kFeatures + Operand::StoredPlace(quad, v);  // in the block
      if (first_feature + place >= m.features) break;
      Sum values[2 * kRowTiles][kVector];
#pragma unroll
      for (int u = 0; u < kVector; ++u) {
        const int feature = v * kVector + u;
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
          const Sum sum = sums[i / 2][feature % 4][i % 2 * 2 + feature / 4];
          values[i][u] = kIntegers ? sum + biases[place + u] : fmaf(sum, scales[place + u], biases[place + u]);
        }
      }
      const auto exists = [&](int i) { return pixel + 8 * i < m.pixels; };
      const auto offset = [&](int i) {
        return static_cast<int64_t>(pixel + 8 * i) * m.features + first_feature + place;
      };
      if constexpr (kIntegers) {
        StoreRequantized(m.requantization, scales + place, first_feature + place, exists, offset, values, result);
      } else {
        Finish<T>(m.epilogue, exists, offset, values);
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i) {
          if (exists(i)) StoreVector(result + offset(i), values[i]);
        }
      }
    }
  }
#endif
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_POINTWISE_TILES_CUH_
