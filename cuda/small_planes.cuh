// The NCHW kernel for small planes, stride 1 and results of the source's size. The planes of neighbouring channels are
// one piece of memory whatever their size, so a block copies those of an image to shared memory as whole words, while
// it computes the image before. A thread marches down a few columns of a plane, as in march.cuh, and leaves each row of
// results where a row of the source was that nobody needs any more; so the results go back as one piece, too.
#ifndef JAX_DWSCONV_CUDA_SMALL_PLANES_CUH_
#define JAX_DWSCONV_CUDA_SMALL_PLANES_CUH_

#include "cuda/epilogue.cuh"
#include "cuda/filter_taps.cuh"
#include "cuda/packed.cuh"
#include "cuda/row.cuh"
#include "cuda/small_planes.h"
#include "cuda/tensor_core.cuh"

namespace dwsconv::cuda {

// Calls function(index) for the elements of type Word in `bytes` that are this thread's.
template <class Word, class Function>
__device__ __forceinline__ void ForEachWord(int bytes, const Function& function) {
#pragma unroll 4
  for (int i = threadIdx.x; i < bytes / static_cast<int>(sizeof(Word)); i += blockDim.x) function(i);
}

template <class Function>
__device__ __forceinline__ void WithChunk(int chunk, const Function& function) {
  if (chunk == 16) return function(Words<4>{});
  if (chunk == 8) return function(Words<2>{});
  function(Words<1>{});
}

__device__ __forceinline__ void CopyToShared(const void* from, char* to, int bytes, int chunk) {
  WithChunk(chunk, [&](auto word) {
    using Word = decltype(word);
    ForEachWord<Word>(bytes, [&](int i) {
      CopyAsync<sizeof(Word)>(reinterpret_cast<Word*>(to) + i, static_cast<const Word*>(from) + i);
    });
  });
  CommitCopies();
}

__device__ __forceinline__ void CopyFromShared(const char* from, void* to, int bytes, int chunk) {
  WithChunk(chunk, [&](auto word) {
    using Word = decltype(word);
    ForEachWord<Word>(bytes, [&](int i) { static_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(from)[i]; });
  });
}

// As in march.cuh; with kOne, a tile is a whole row, and what lies beside it is left out.
template <bool kOne, int kK, int kTile>
__device__ __forceinline__ void AddRow(const float (&in)[kTile + kK - 1], const float (&taps)[kK][1],
                                       float (&sums)[kTile][1]) {
  constexpr int kPad = (kK - 1) / 2;
#pragma unroll
  for (int j = 0; j < kK; ++j) {
#pragma unroll
    for (int b = 0; b < kTile; ++b) {
      if (kOne && (b + j < kPad || b + j >= kPad + kTile)) continue;
      sums[b][0] = fmaf(in[b + j], taps[j][0], sums[b][0]);
    }
  }
}

template <class T, int kK, int kTile, bool kOne>
__global__ void __launch_bounds__(kSmallPlanesThreads)
    SmallPlanesKernel(const __grid_constant__ SmallPlanes m, const T* __restrict__ source,
                      const void* __restrict__ filter, T* __restrict__ result) {
  constexpr int kPad = (kK - 1) / 2, kColumns = kTile + kK - 1;
  uint32_t plane = threadIdx.x % 32, first_image = blockIdx.x;
  const int tile = static_cast<int>(m.tiles.Take(plane));
  bool active = plane < static_cast<uint32_t>(m.planes_per_warp);
  plane += threadIdx.x / 32 * m.planes_per_warp;
  const int first_channel = static_cast<int>(m.channel_groups.Take(first_image)) * m.planes;
  const int planes = min(m.planes, m.channels - first_channel), bytes = planes * m.plane_bytes;
  active = active && static_cast<int>(plane) < planes;
  if (!active) plane = 0;  // takes part in the waiting alone
  first_image *= m.images;
  const int images = min(m.images, m.batch - static_cast<int>(first_image));
  source += first_image * m.source.step.n + first_channel * m.source.step.c;
  result += first_image * m.result.step.n + first_channel * m.result.step.c;

  extern __shared__ __align__(16) char memory[];
  CopyToShared(source, memory, bytes, m.chunk);
  const int channel = first_channel + static_cast<int>(plane);
  float taps[kK][kK][1], bias[1];
  LoadFilter<T>(m, 0, channel, filter, taps);
  ScaleTaps(m.epilogue, channel, taps);
  LoadBias(m.epilogue, channel, bias);

  const int height = m.source.h, width = m.source.w, first_column = tile * kTile;
  for (int image = 0; image < images; ++image) {
    char* const buffer = memory + image % 2 * m.buffer_bytes;
    WaitForCopies<0>();
    __syncthreads();  // the planes are here, and those before them have left
    source += m.source.step.n;
    if (image + 1 < images) CopyToShared(source, memory + (image + 1) % 2 * m.buffer_bytes, bytes, m.chunk);

    T* const first = reinterpret_cast<T*>(buffer) + plane * height * width + first_column;
    const auto store = [&](int row, float (&sums)[kTile][1]) {
      Finish<T>(m.epilogue, [](int) { return true; }, [](int) { return 0; }, sums);
      if (!active) return;
#pragma unroll
      for (int b = 0; b < kTile; ++b) {
        if (first_column + b < width) first[row * width + b] = FromFloat<T>(sums[b][0]);
      }
    };
    float sums[kK][kTile][1];
#pragma unroll
    for (int i = 0; i < kK; ++i) Start(bias, sums[i]);
#pragma unroll 1
    for (int row = 0; row < height; ++row) {
      float in[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const bool beside = kOne && (j < kPad || j >= kPad + kTile);
        in[j] = 0;
        if (!beside && active && static_cast<unsigned>(first_column + j - kPad) < static_cast<unsigned>(width)) {
          in[j] = ToFloat(first[row * width + j - kPad]);
        }
      }
      AddRow<kOne>(in, taps[kK - 1], sums[kK - 1]);
      if (row >= kPad) store(row - kPad, sums[kK - 1]);
#pragma unroll
      for (int i = kK - 2; i >= 0; --i) {
        Copy(sums[i], sums[i + 1]);
        AddRow<kOne>(in, taps[i], sums[i + 1]);
      }
      Start(bias, sums[0]);
      if constexpr (!kOne) __syncwarp();  // the neighbours have read the row that is overwritten next
    }
#pragma unroll
    for (int i = 0; i < kPad; ++i) {
      if (height - kPad + i >= 0) store(height - kPad + i, sums[kK - 1 - i]);
    }
    __syncthreads();
    CopyFromShared(buffer, result, bytes, m.chunk);
    result += m.result.step.n;
  }
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_SMALL_PLANES_CUH_
