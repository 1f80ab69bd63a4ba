// The kernel of grad_filter in NCHW that reads from shared memory: a block copies rows of g, of a few channels, and the
// rows of x that they meet, and a thread takes one row of the filter for one channel, like in tap_rows.cuh. Rows of x
// that do not exist are passed over; beside the columns there are zeros.
#ifndef JAX_DWSCONV_CUDA_TAP_PLANES_CUH_
#define JAX_DWSCONV_CUDA_TAP_PLANES_CUH_

#include "cuda/packed.cuh"
#include "cuda/row.cuh"
#include "cuda/tap_parts.cuh"
#include "cuda/tap_planes.h"
#include "cuda/tensor_core.cuh"

namespace dwsconv::cuda {

// Neighbouring threads copy neighbouring chunks of a row, and go down the rows. `first`: the first row in the first of
// the `planes` that exist. What is copied through registers (less than four bytes) is loaded kTogether at once.
template <int kBytes, int kTogether, class T>
__device__ __forceinline__ void CopyRows(const PlaneRows& m, const T* first, int planes, T* shared) {
  constexpr int kChunk = kBytes / sizeof(T);
  uint32_t row = threadIdx.x;
  uint32_t index = m.row_chunks.Take(row);
  if (row >= m.copied_rows) return;
  const int rows = planes * m.rows, copied_rows = m.copied_rows, step = copied_rows * m.pitch;
  for (; index < m.row_chunks.value; index += blockDim.x) {
    uint32_t plane = row;
    int h = m.plane_rows.Take(plane);
    int from = static_cast<int>(plane * m.grid.step.c + h * m.grid.step.h + index * kChunk);
    T* to = shared + m.left + row * m.pitch + index * kChunk;
#pragma unroll(kBytes < 4 ? 1 : 4)
    for (int i = row; i < rows; i += kTogether * copied_rows) {
      T values[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (i + u * copied_rows < rows) {
          if constexpr (kBytes < 4) {
            values[u] = first[from];
          } else {
            CopyAsync<kBytes>(to + u * step, first + from);
          }
        }
        from += m.step;
        h += m.further_rows;
        if (h >= m.rows) {
          h -= m.rows;
          from += m.next_row;
        }
      }
      if constexpr (kBytes < 4) {
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
          if (i + u * copied_rows < rows) to[u * step] = values[u];
        }
      }
      to += kTogether * step;
    }
  }
}

template <int kTogether, class T>
__device__ __forceinline__ void CopyRows(const PlaneRows& m, const T* first, int planes, T* shared) {
  if (m.chunk == 16) return CopyRows<16, 1>(m, first, planes, shared);
  if (m.chunk == 8) return CopyRows<8, 1>(m, first, planes, shared);
  if (m.chunk == 4) return CopyRows<4, 1>(m, first, planes, shared);
  if constexpr (sizeof(T) == 2) CopyRows<2, kTogether>(m, first, planes, shared);
}

// Elements one after the other, from any place in shared memory. Those of 16 bits come in words.
template <class T>
struct Sequence {
  const uint32_t* at;
  uint32_t last;
  int shift;

  __device__ __forceinline__ Sequence(const T* shared, int first)
      : at(reinterpret_cast<const uint32_t*>(shared) + first / 2 + 1), last(at[-1]), shift(first % 2 * 16) {}

  template <int kCount>
  __device__ __forceinline__ void Take(float (*values)[1]) {
    static_assert(kCount % 2 == 0);
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const uint32_t next = *at++;
      float pair[2];
      UnpackPair(__funnelshift_r(last, next, shift), T{}, pair);
      values[i][0] = pair[0];
      values[i + 1][0] = pair[1];
      last = next;
    }
  }
};

template <>
struct Sequence<float> {
  const float* at;

  __device__ __forceinline__ Sequence(const float* shared, int first) : at(shared + first) {}

  template <int kCount>
  __device__ __forceinline__ void Take(float (*values)[1]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i][0] = *at++;
  }
};

template <class T, int kK, int kS, int kTile>
__global__ void __launch_bounds__(kTapPlanesThreads, 1)
    TapPlanesKernel(const __grid_constant__ TapPlanes m, const T* __restrict__ x, const T* __restrict__ g,
                    void* __restrict__ filter, float* __restrict__ workspace) {
#if __CUDA_ARCH__ >= 800
  // Pairs are kept and taken: with stride 2, from a column before the first that is needed. An odd tile is a whole row.
  constexpr int kBefore = kS - 1, kKept = kK - 1, kPairs = (kTile + 1) / 2, kNew = (kTile * kS + 1) / 2 * 2;
  constexpr int kAtOnce =
      kTile == 7 ? 4 : 1;  // small planes often have rows of odd size; the others need the registers
  const int filter_row = threadIdx.x % kK;
  const int walker = threadIdx.x / kK % m.walkers, plane = threadIdx.x / kK / m.walkers;
  const TapBlock block = LocateTapBlock<1>(m);
  const int planes = min(static_cast<int>(m.lanes.value), m.channels - block.first_channel);

  extern __shared__ __align__(16) char memory[];
  T* const x_shared = reinterpret_cast<T*>(memory);
  T* const g_shared = reinterpret_cast<T*>(memory + m.x_bytes);
  for (int at = threadIdx.x * 16; at < m.x_bytes; at += blockDim.x * 16) {
    *reinterpret_cast<Words<4>*>(memory + at) = {};
  }
  float taps[kK][1] = {};
  for (uint32_t piece = block.split; piece < m.pieces; piece += m.splits.value) {
    uint32_t image_in_group = piece;
    const int g_row = m.strips.Take(image_in_group) * m.rows, g_end = min(g_row + m.rows, m.g.grid.h);
    const int64_t image = block.group * m.images_per_group + image_in_group;
    const int g_first = g_end - m.g.rows;
    const int x_first = max(0, min(g_row * kS - m.pad_top, m.x.grid.h - m.x.rows));
    __syncthreads();  // the others may still read
#pragma unroll 1
    for (int operand = 0; operand < 2; ++operand) {  // one place in the code, for that waits to be fetched
      const bool of_x = operand == 0;
      const PlaneRows& rows = of_x ? m.x : m.g;
      const Strides& step = rows.grid.step;
      CopyRows<kAtOnce>(
          rows, (of_x ? x : g) + image * step.n + block.first_channel * step.c + (of_x ? x_first : g_first) * step.h,
          planes, of_x ? x_shared : g_shared);
    }
    CommitCopies();
    WaitForCopies<0>();
    __syncthreads();
    if (plane >= planes) continue;

    for (int row = g_row + walker; row < g_end; row += m.walkers) {
      const int x_row = row * kS - m.pad_top + filter_row;
      if (static_cast<unsigned>(x_row) >= static_cast<unsigned>(m.x.grid.h)) continue;
      const T* gs = g_shared + (plane * m.g.rows + row - g_first) * m.g.pitch;
      Sequence<T> xs(x_shared, (plane * m.x.rows + x_row - x_first) * m.x.pitch + m.x.left - m.pad_left - kBefore);
      float window[kKept + kNew][1];
      xs.template Take<kKept>(window);
      for (int left = m.g.grid.w; left > 0; left -= kTile, gs += kTile) {
        float in[2 * kPairs][1];
#pragma unroll
        for (int b = 0; b < kPairs; ++b) {
          LoadVector(gs + 2 * b, reinterpret_cast<float (&)[2]>(in[2 * b]));
        }
        xs.template Take<kNew>(window + kKept);
        const auto& met = reinterpret_cast<const float (&)[kKept + kNew - kBefore][1]>(window[kBefore]);
        const auto& columns = reinterpret_cast<const float (&)[kTile][1]>(in);
        if (left >= kTile) {
          AddProducts<kS>(met, columns, kTile, taps);
        } else {  // columns that do not exist must not take part: zero times infinity
          AddProducts<kS>(met, columns, left, taps);
        }
#pragma unroll
        for (int c = 0; c < kKept; ++c) window[c][0] = window[kNew + c][0];
      }
    }
  }

  __syncthreads();
  float* const sums = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int j = 0; j < kK; ++j) StoreSums<kK * kK>(m, taps[j], walker, filter_row * kK + j, plane, sums);
  uint32_t worker = threadIdx.x;
  const int lane = m.lanes.Take(worker);
  AddParts<T, kK, kK, 1>(m, block, lane, worker, kK * m.walkers, sums, filter, workspace);
#endif
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TAP_PLANES_CUH_
