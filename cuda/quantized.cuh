// The int8 convolution. In NHWC every thread owns four channels, one word of memory, and a few neighbouring columns,
// and marches down the rows as in march.cuh. Four neighbouring columns of a channel in one register, a quad, meet four
// taps in one dp4a; the bytes get there by permutations, which all rows of the filter share.
#ifndef JAX_DWSCONV_CUDA_QUANTIZED_CUH_
#define JAX_DWSCONV_CUDA_QUANTIZED_CUH_

#include <cstdint>
#include <type_traits>

#include "cuda/gather.cuh"
#include "cuda/march.cuh"
#include "cuda/quantized.h"
#include "cuda/rounding.cuh"

namespace dwsconv::cuda {

static_assert(kWordChannels == QuantizedTile::kVector);

__device__ __forceinline__ uint32_t InEveryByte(int value) { return (value & 0xff) * 0x01010101u; }

// Columns [first, first + kColumns) of the row at `p`; `zero` outside the image. `p` is where column `first` would be.
template <int kColumns>
__device__ __forceinline__ void LoadWords(const Grid& grid, const int8_t* p, bool row_inside, int first, bool inside,
                                          uint32_t zero, uint32_t (&words)[kColumns]) {
  const int pixel = static_cast<int>(grid.step.w);
  if (row_inside && inside) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) words[j] = *reinterpret_cast<const uint32_t*>(p + j * pixel);
    return;
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    words[j] = zero;
    if (row_inside && static_cast<unsigned>(first + j) < static_cast<unsigned>(grid.w)) {
      words[j] = *reinterpret_cast<const uint32_t*>(p + j * pixel);
    }
  }
}

// Bytes 0 and 1, or 2 and 3, of two words, alternating: two channels of two columns.
template <int kColumns>
__device__ __forceinline__ void MakePairs(const uint32_t (&words)[kColumns], uint32_t (&pairs)[kColumns / 2 + 2][2]) {
#pragma unroll
  for (int e = 0; e < kColumns / 2 + 2; ++e) {
    const uint32_t a = 2 * e < kColumns ? words[2 * e] : 0, b = 2 * e + 1 < kColumns ? words[2 * e + 1] : 0;
    pairs[e][0] = 2 * e < kColumns ? __byte_perm(a, b, 0x5140) : 0;
    pairs[e][1] = 2 * e < kColumns ? __byte_perm(a, b, 0x7362) : 0;
  }
}

// quads[u]: columns u to u + 3 of one channel. With kEvenOnly the others are not made.
template <bool kEvenOnly, int kColumns>
__device__ __forceinline__ void MakeQuads(const uint32_t (&pairs)[kColumns / 2 + 2][2], int channel,
                                          uint32_t (&quads)[kColumns + 1]) {
#pragma unroll
  for (int u = 0; u <= kColumns; u += 2) {
    quads[u] = __byte_perm(pairs[u / 2][channel / 2], pairs[u / 2 + 1][channel / 2], channel % 2 ? 0x7632 : 0x5410);
  }
  if constexpr (!kEvenOnly) {
#pragma unroll
    for (int u = 1; u <= kColumns; u += 2) {
      quads[u] = __byte_perm(quads[u - 1], u + 1 <= kColumns ? quads[u + 1] : 0, 0x6321);
    }
  }
}

// The filter of four channels: taps 4 * part to 4 * part + 3 of a row, of one channel, in every word.
template <int kH, int kW>
struct WordTaps {
  static constexpr int kParts = (kW + 3) / 4;
  uint32_t of[kH][kParts][kWordChannels];

  __device__ __forceinline__ void Load(const int8_t* filter, const QuantizedMarch& m) {
    const int step_h = static_cast<int>(m.filter.h), step_w = static_cast<int>(m.filter.w);
#pragma unroll
    for (int i = 0; i < kH; ++i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int column = 4 * part + j;
          const bool exists = column < kW && i < m.kernel_h && column < m.kernel_w;
          words[j] = exists ? *reinterpret_cast<const uint32_t*>(filter + i * step_h + column * step_w) : 0;
        }
        uint32_t pairs[4][2], quads[5];
        MakePairs(words, pairs);
#pragma unroll
        for (int c = 0; c < kWordChannels; ++c) {
          MakeQuads<true, 4>(pairs, c, quads);
          of[i][part][c] = quads[0];
        }
      }
    }
  }

  __device__ __forceinline__ int Sum(int channel) const {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kH; ++i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) sum = __dp4a(static_cast<int>(of[i][part][channel]), 0x01010101, sum);
    }
    return sum;
  }
};

// Adds one source row times row i of the filter to kTile neighbouring results of one channel: to sums[b], into to[b].
template <int kS, bool kShift, int kH, int kW, int kTile, int kColumns>
__device__ __forceinline__ void AddQuads(const uint32_t (&quads)[kColumns], const WordTaps<kH, kW>& taps, int i,
                                         int channel, const int (&sums)[kTile][kWordChannels],
                                         int (&to)[kTile][kWordChannels]) {
#pragma unroll
  for (int b = 0; b < kTile; ++b) {
    int sum = sums[b][channel];
#pragma unroll
    for (int part = 0; part < WordTaps<kH, kW>::kParts; ++part) {
      const int column = b * kS + 4 * part;
      const uint32_t of = taps.of[i][part][channel];
      // An odd column of three taps: the even quad before it, with the taps moved on.
      const bool shift = kShift && column % 2 == 1;
      sum = __dp4a(static_cast<int>(quads[shift ? column - 1 : column]), static_cast<int>(shift ? of << 8 : of), sum);
    }
    to[b][channel] = sum;
  }
}

// The first `count` of some neighbouring results.
template <class Y, int kTile>
__device__ __forceinline__ void StoreSums(const Rounding& r, const float (&scale)[kWordChannels],
                                          const int (&sums)[kTile][kWordChannels], int count, int pixel, Y* y) {
  if constexpr (std::is_same_v<Y, int8_t>) {
    uint32_t words[kTile];
#pragma unroll
    for (int b = 0; b < kTile; ++b) words[b] = Requantized(r, scale, sums[b]);
#pragma unroll
    for (int b = 0; b < kTile; ++b) {
      if (b < count) *reinterpret_cast<uint32_t*>(y + b * pixel) = words[b];
    }
  } else {
#pragma unroll
    for (int b = 0; b < kTile; ++b) {
      if (b < count) *reinterpret_cast<int4*>(y + b * pixel) = {sums[b][0], sums[b][1], sums[b][2], sums[b][3]};
    }
  }
}

// What a thread needs besides the source; `start`: what the sums start from.
template <class Y, int kH, int kW>
__device__ __forceinline__ void LoadConstants(const QuantizedMarch& m, const MarchThread& t, const int8_t* filter,
                                              WordTaps<kH, kW>& taps, float (&scale)[kWordChannels],
                                              int (&start)[kWordChannels]) {
  const Requantization& r = m.requantization;
  const uint32_t group = m.grouped ? m.images_per_group.Quotient(static_cast<uint32_t>(t.image)) : 0;
  taps.Load(filter + group * m.filter.n + t.channel, m);
#pragma unroll
  for (int c = 0; c < kWordChannels; ++c) {
    scale[c] = std::is_same_v<Y, int8_t> ? r.scale[t.channel + c] : 0;
    start[c] = (r.bias ? r.bias[t.channel + c] : 0) - r.x_zero_point * taps.Sum(c);
  }
}

template <class Y, int kH, int kW, int kS, int kTile, int kAhead>
__global__ void __launch_bounds__(kMarchThreads)
    QuantizedKernel(const __grid_constant__ QuantizedMarch m, const int8_t* __restrict__ source,
                    const int8_t* __restrict__ filter, Y* __restrict__ result) {
  constexpr int kColumns = (kTile - 1) * kS + kW, kLast = (kH - 1) / kS;
  // Which quads there are: for stride 2 the even ones; three taps at an odd column fit into the one before it.
  constexpr bool kShift = kW == 3 && kS == 1, kEvenOnly = kShift || kS == 2;
  static_assert(kH == 1 || kS == 1 || (kS == 2 && kH % 2 == 1 && kAhead % 2 == 0));
  const MarchThread t = LocateThread<kWordChannels>(m);
  if (!t.active) return;

  const int first_out = t.strip * m.strip_rows, last_out = min(first_out + m.strip_rows, m.result.h);
  const int first_column = t.tile * kTile * kS - m.pad_left;
  const bool inside = first_column >= 0 && first_column + kColumns <= m.source.w;
  const int begin = first_out * kS - m.pad_top, end = (last_out - 1) * kS - m.pad_top + kH;
  const int8_t* next =
      source + t.image * m.source.step.n + t.channel + begin * m.source.step.h + first_column * m.source.step.w;
  const uint32_t zero = InEveryByte(m.requantization.x_zero_point);
  uint32_t ahead[kAhead][kColumns];
  const int last_row = min(end, m.source.h);
  const auto load = [&](int row, uint32_t (&words)[kColumns]) {
    const bool row_inside = row >= 0 && row < last_row;
    LoadWords(m.source, next, row_inside, first_column, inside, zero, words);
    next += m.source.step.h;
  };
#pragma unroll
  for (int a = 0; a < kAhead; ++a) load(begin + a, ahead[a]);

  WordTaps<kH, kW> taps;
  float scale[kWordChannels];
  int start[kWordChannels];
  LoadConstants<Y>(m, t, filter, taps, scale, start);

  Y* out =
      result + t.image * m.result.step.n + first_out * m.result.step.h + t.tile * kTile * m.result.step.w + t.channel;
  const int pixel = static_cast<int>(m.result.step.w), columns_left = m.result.w - t.tile * kTile;

  // As in march.cuh: sums[s] belongs to the result whose taps of the first s * kS rows are added.
  int sums[kLast + 1][kTile][kWordChannels];
  const auto restart = [&](int (&of)[kTile][kWordChannels]) {
#pragma unroll
    for (int b = 0; b < kTile; ++b) {
#pragma unroll
      for (int c = 0; c < kWordChannels; ++c) of[b][c] = start[c];
    }
  };
#pragma unroll
  for (int i = 0; i <= kLast; ++i) restart(sums[i]);

  for (int row = begin; row < end;) {
#pragma unroll
    for (int u = 0; u < kAhead; ++u, ++row) {
      if (row >= end) break;
      uint32_t pairs[kColumns / 2 + 2][2];
      MakePairs(ahead[u], pairs);
      load(row + kAhead, ahead[u]);
      const bool completes = kS == 1 || u % 2 == 0;
      int complete[kTile][kWordChannels];
#pragma unroll
      for (int c = 0; c < kWordChannels; ++c) {
        uint32_t quads[kColumns + 1];
        MakeQuads<kEvenOnly, kColumns>(pairs, c, quads);
        const auto add = [&](int i, const auto& from, auto& to) { AddQuads<kS, kShift>(quads, taps, i, c, from, to); };
        if (completes) add(kH - 1, sums[kLast], complete);
        if constexpr (kS == 1) {
#pragma unroll
          for (int i = kLast - 1; i >= 0; --i) add(i, sums[i], sums[i + 1]);
        } else if (u % 2 == 0) {
#pragma unroll
          for (int i = 0; i < kLast; ++i) add(2 * i, sums[i], sums[i]);
        } else {
#pragma unroll
          for (int i = kLast - 1; i >= 0; --i) add(2 * i + 1, sums[i], sums[i + 1]);
        }
      }
      if (kS == 1 || u % 2 == 1) restart(sums[0]);
      if (completes && row - begin >= kH - 1) {
        StoreSums(m.rounding, scale, complete, columns_left, pixel, out);
        out += m.result.step.h;
      }
    }
  }
}

// The general kernel: one result element for every thread.
template <class Index, class Y>
__global__ void QuantizedGatherKernel(const __grid_constant__ Problem p, const __grid_constant__ Requantization r,
                                      const __grid_constant__ Rounding rounding, const int8_t* __restrict__ x,
                                      const int8_t* __restrict__ filter, Y* __restrict__ y) {
  const Index count = p.y_elements(), step = static_cast<Index>(gridDim.x) * blockDim.x;
  for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const Position at = Locate<Index>(i, p.channels_last, p.out_h, p.out_w, p.out_channels());
    const int8_t* image = x + at.n * p.x.n + p.input_channel(at.c) * p.x.c;
    const int8_t* taps = filter + p.group_of(at.n) * p.filter.n + at.c * p.filter.c;
    int sum = r.bias ? r.bias[at.c] : 0;
    for (int64_t a = 0; a < p.kernel_h; ++a) {
      const int64_t h = at.h * p.stride_h + a * p.dilation_h - p.pad_top;
      if (h < 0 || h >= p.in_h) continue;
      for (int64_t b = 0; b < p.kernel_w; ++b) {
        const int64_t w = at.w * p.stride_w + b * p.dilation_w - p.pad_left;
        if (w < 0 || w >= p.in_w) continue;
        sum += (image[h * p.x.h + w * p.x.w] - r.x_zero_point) * taps[a * p.filter.h + b * p.filter.w];
      }
    }
    if constexpr (std::is_same_v<Y, int8_t>) {
      const float scale[kWordChannels] = {r.scale[at.c]};
      const int sums[kWordChannels] = {sum};
      y[i] = static_cast<int8_t>(Requantized(rounding, scale, sums) & 0xff);
    } else {
      y[i] = sum;
    }
    if (count - i <= step) break;  // i + step could wrap around
  }
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_QUANTIZED_CUH_
