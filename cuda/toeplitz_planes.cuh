// The NCHW kernel of 16-bit types on tensor cores, for stride 1.
//
// As in toeplitz.cuh, eight neighbouring results of a row are a product of the source pixels below them with a banded
// Toeplitz matrix that holds a filter row, and the rows of the matrix product are 16 marchers, which go down the rows
// together: tiles of eight columns, of any strip of any image, but of one channel, which is the warp's. The pixels come
// some rows ahead through a ring in shared memory, in which each lane has places of its own: the instructions for
// asynchronous copies can wait for the oldest row alone, loads into registers cannot.
//
// Zero times infinity is NaN: results that are NaN are computed again, one by one.
#ifndef JAX_DWSCONV_CUDA_TOEPLITZ_PLANES_CUH_
#define JAX_DWSCONV_CUDA_TOEPLITZ_PLANES_CUH_

#include "cuda/dtypes.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/packed.cuh"
#include "cuda/tensor_core.cuh"
#include "cuda/toeplitz_planes.h"

namespace dwsconv::cuda {

constexpr int kToeplitzPlanesThreads = 128;

// Four neighbouring pixels of one of a lane's marchers, in shared memory: two words, or with odd rows the three aligned
// words that they lie in.
template <int kAccess>
struct alignas(kAccess == 1 ? 16 : 8) PixelSlot {
  uint32_t words[kAccess == 1 ? 4 : 2];
};

// Starts the copy of the pixels from `column` on, of which [0, width) exist. Neighbours outside come as zeros, or in
// odd rows as whatever they are.
template <int kAccess, class T>
__device__ __forceinline__ void CopyPixels(PixelSlot<kAccess>& slot, const T* from, int column, int width, bool row) {
  if constexpr (kAccess == 1) {
    const int odd = static_cast<int>(reinterpret_cast<uintptr_t>(from) / sizeof(T) % 2);
    column -= odd;
#pragma unroll
    for (int i = 0; i < 3; ++i, column += 2) {
      const int count = row && column >= -1 ? min(width - column, 2) : 0;  // none beyond the row: it may be the last
      CopyAsync<4>(slot.words + i, from - odd + 2 * i, max(count, 0) * static_cast<int>(sizeof(T)));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; i += kAccess) {
      const bool inside = row && static_cast<unsigned>(column + i) < static_cast<unsigned>(width);
      CopyAsync<kAccess * sizeof(T)>(slot.words + i / 2, from + i, inside ? kAccess * sizeof(T) : 0);
    }
  }
}

// One result, from its definition.
template <class T>
__device__ __noinline__ float ResultAlone(const ToeplitzPlanes& m, const T* image, const T* filter, int row,
                                          int column) {
  float sum = 0;
  for (int i = 0; i < m.kernel_h; ++i) {
    const int h = row - m.pad_top + i;
    if (h < 0 || h >= m.source.h) continue;
    for (int j = 0; j < m.kernel_w; ++j) {
      const int w = column - m.pad_left + j;
      if (w < 0 || w >= m.source.w) continue;
      sum = fmaf(ToFloat(image[h * m.source.step.h + w]), ToFloat(filter[i * m.filter.h + j * m.filter.w]), sum);
    }
  }
  return sum;
}

template <class T, int kK, int kAccess>
__global__ void __launch_bounds__(kToeplitzPlanesThreads)
    ToeplitzPlanesKernel(const __grid_constant__ ToeplitzPlanes m, const T* __restrict__ source,
                         const T* __restrict__ filter, T* __restrict__ result) {
#if __CUDA_ARCH__ >= 800
  constexpr int kColumns = ToeplitzPlanesTile::kColumns, kMarchers = ToeplitzPlanesTile::kMarchers;
  constexpr int kStore = kAccess == 1 ? 1 : 2;
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  uint32_t first_unit = blockIdx.x * (kToeplitzPlanesThreads / 32) + threadIdx.x / 32;
  if (first_unit >= m.warps) return;
  const int channel = static_cast<int>(m.channels.Take(first_unit));
  first_unit *= kMarchers;

  // Of the two marchers whose pixels and results this lane has.
  const T *images[2], *from[2];
  T* to[2];
  int first_row[2], first_column[2], source_row[2], source_column[2];
  [[maybe_unused]] uint32_t masks[2][2], shift[2];  // of odd rows
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t unit = first_unit + g + half * 8;
    const bool exists = unit < m.units;
    first_column[half] = static_cast<int>(m.tiles.Take(unit)) * kColumns;
    source_column[half] = first_column[half] - m.margin + 4 * t;
    first_column[half] += 2 * t;
    first_row[half] = static_cast<int>(m.strips.Take(unit)) * m.strip_rows;
    source_row[half] = exists ? first_row[half] - m.pad_top : m.source.h;
    if (!exists) first_row[half] = m.result.h;
    const int64_t image = exists ? unit : 0;
    images[half] = source + image * m.source.step.n + channel * m.source.step.c;
    from[half] = images[half] + source_row[half] * m.source.step.h + source_column[half];
    to[half] = result + image * m.result.step.n + channel * m.result.step.c + first_row[half] * m.result.step.h +
               first_column[half];
    if constexpr (kAccess == 1) {
      shift[half] = reinterpret_cast<uintptr_t>(from[half]) / sizeof(T) % 2 * 16;
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        const auto mask = [&](int p) {
          return static_cast<unsigned>(source_column[half] + p) < static_cast<unsigned>(m.source.w) ? 0xffffu : 0u;
        };
        masks[half][word] = mask(2 * word) | mask(2 * word + 1) << 16;
      }
    }
  }
  const int source_step = static_cast<int>(m.source.step.h), result_step = static_cast<int>(m.result.step.h);
  __shared__ PixelSlot<kAccess> ring[kRingRows][2][kToeplitzPlanesThreads];
  const int steps = m.strip_rows + kK - 1;
  const auto copy = [&](int step) {  // of the row that the from[] are at, which move on
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool row =
          step < steps && static_cast<unsigned>(source_row[half] + step) < static_cast<unsigned>(m.source.h);
      CopyPixels<kAccess>(ring[static_cast<uint32_t>(step) % kRingRows][half][threadIdx.x], from[half],
                          source_column[half], m.source.w, row);
      from[half] += source_step;
    }
    CommitCopies();
  };
  for (int step = 0; step < kRingRows - 1; ++step) copy(step);

  filter += m.first_tap + channel * m.filter.c;
  uint32_t taps[kK][2];
#pragma unroll
  for (int i = 0; i < kK; ++i) {
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      float pair[2];
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int j = 4 * t + 2 * word + p - (m.margin - m.pad_left) - g;
        const bool exists = i < m.kernel_h && static_cast<unsigned>(j) < static_cast<unsigned>(m.kernel_w);
        pair[p] = exists ? ToFloat(filter[i * static_cast<int>(m.filter.h) + j * static_cast<int>(m.filter.w)]) : 0;
      }
      taps[i][word] = PackPair(pair[0], pair[1], T{});
    }
  }
  float scale[1], bias[1];
  LoadScale(m.epilogue, channel, scale);
  LoadBias(m.epilogue, channel, bias);

  float sums[kK - 1][4] = {};
  for (int step = 0; step < steps; ++step) {
    copy(step + kRingRows - 1);  // to where the last row was
    WaitForCopies<kRingRows - 1>();
    uint32_t in[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const PixelSlot<kAccess> slot = ring[static_cast<uint32_t>(step) % kRingRows][half][threadIdx.x];
      if constexpr (kAccess == 1) {
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          in[half][word] = __funnelshift_r(slot.words[word], slot.words[word + 1], shift[half]) & masks[half][word];
        }
        shift[half] ^= source_step % 2 * 16;
      } else {
        in[half][0] = slot.words[0];
        in[half][1] = slot.words[1];
      }
    }
    const auto multiply = [&](const uint32_t (&b)[2], const float (&c)[4], float (&d)[4]) {
      MultiplyWhole<T>(in[0][0], in[1][0], in[0][1], in[1][1], b[0], b[1], c, d);
    };
    float done[4];
    multiply(taps[kK - 1], sums[kK - 2], done);
#pragma unroll
    for (int i = kK - 2; i > 0; --i) multiply(taps[i], sums[i - 1], sums[i]);
    constexpr float kZero[4] = {};
    multiply(taps[0], kZero, sums[0]);
    const int row = step - (kK - 1);
    if (row < 0) continue;

    const auto exists = [&](int n) {  // results of which element n is one
      return first_row[n / 2] + row < m.result.h && first_column[n / 2] + n % 2 < m.result.w;
    };
    const float total = done[0] + done[1] + done[2] + done[3];
    if (total != total) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        if (done[n] == done[n] || !exists(n)) continue;
        done[n] = ResultAlone(m, images[n / 2], filter, first_row[n / 2] + row, first_column[n / 2] + n % 2);
      }
    }
    float values[4 / kStore][kStore];
#pragma unroll
    for (int n = 0; n < 4; ++n) values[n / kStore][n % kStore] = fmaf(done[n], scale[0], bias[0]);
    const auto place = [&](int b) { return to[b * kStore / 2] + b * kStore % 2; };
    const auto whole = [&](int b) { return exists(b * kStore); };
    Finish<T>(m.epilogue, whole, [&](int b) { return place(b) - result; }, values);
#pragma unroll
    for (int b = 0; b < 4 / kStore; ++b) {
      if (whole(b)) StoreVector(place(b), values[b]);
    }
#pragma unroll
    for (T*& row_of_results : to) row_of_results += result_step;
  }
#endif
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TOEPLITZ_PLANES_CUH_
