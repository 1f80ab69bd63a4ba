// The kernel of grad_filter for 16-bit types in NHWC on tensor cores.
//
// For one channel and one row of x, the sums of all taps are a matrix product over the pixels of the row: a row of the
// first factor is a row of g, one for every filter row; the columns of the second are the row of x, shifted by 0 to 7
// pixels. Filters have fewer rows than the 16 of the product, so kSets pixel offsets of g lie below each other, and
// the tap j of the set with offset d is in the column d * stride + j. All sums of eight channels stay in the
// registers of a warp.
//
// A block copies tiles of x and g into shared memory, 8 channels (16 bytes) to a slot; rows of zeros before and after g
// stand for the rows of g that are not there. Its walkers share the rows of x; with stride 2, those with an even number
// have the even rows of x, which meet even filter rows only.
//
// Zero times infinity is NaN, and here zeros that nobody asked for meet pixels of x. So sums that are NaN are computed
// again, one by one.
#ifndef JAX_DWSCONV_CUDA_TAP_PRODUCTS_CUH_
#define JAX_DWSCONV_CUDA_TAP_PRODUCTS_CUH_

#include <cooperative_groups.h>

#include "cuda/dtypes.cuh"
#include "cuda/tap_products.h"
#include "cuda/tensor_core.cuh"

namespace dwsconv::cuda {

constexpr int kTapProductsThreads = 512, kTapProductsStages = 2;  // threads: at most
constexpr int kSlotChannels = 8, kSlotBytes = 16, kUnitTerms = 4;

// Which pixels of a unit the four lanes have that share a row or column of a product.
enum class Lanes { kNear, kFar, kPaired };  // 0 2 4 6, 0 4 8 12 or 0 2 8 10

template <Lanes kLanes>
__device__ __forceinline__ int PixelOf(int term_lane) {
  if (kLanes == Lanes::kPaired) return (term_lane & 1) * 2 + (term_lane & 2) * 4;
  return term_lane * (kLanes == Lanes::kNear ? 2 : 4);
}

// Where a chunk of a pixel is in its row. The order varies so that lanes which read together, with the pixels above and
// their neighbours, meet in no bank; but the 32 bytes of a sector stay together.
template <Lanes kLanes>
__device__ __forceinline__ int SlotOf(int pixel, int chunk, int chunks) {
  constexpr int kLow = kLanes == Lanes::kFar ? 2 : 1, kHigh = kLanes == Lanes::kNear ? 2 : 3;
  const int low = (pixel >> kLow) & 1, high = (pixel >> kHigh) & 1;
  const int order = chunks == 4   ? low | high << 1
                    : chunks == 2 ? high
                                  : (kLanes == Lanes::kPaired ? high << 2
                                     : kLanes == Lanes::kFar  ? high << 1
                                                              : 0);
  return (pixel * chunks + chunk) ^ order;
}

// Where a tile begins: its first image, row of x and column of g.
struct TapProductsPlace {
  int image, images, x_row, g_column;
};

__device__ __forceinline__ TapProductsPlace LocateTile(const TapProducts& m, uint32_t group, uint32_t tile) {
  TapProductsPlace place;
  place.g_column = m.stretches.Take(tile) * m.stretch_columns;
  place.x_row = m.strips.Take(tile) * m.x.rows;
  const int first = tile * m.images;
  place.images = min(m.images, m.images_per_group - first);
  place.image = group * m.images_per_group + first;
  return place;
}

// The sum of one tap over the tiles of a split, from its definition.
template <class T>
__device__ __noinline__ float TapAlone(const TapProducts& m, const T* x, const T* g, uint32_t group, uint32_t split,
                                       int i, int j, int channel) {
  float sum = 0;
  for (uint32_t tile = split; tile < m.tiles; tile += m.splits.value) {
    const TapProductsPlace place = LocateTile(m, group, tile);
    for (int n = place.image; n < place.image + place.images; ++n) {
      for (int x_row = place.x_row; x_row < min(place.x_row + m.x.rows, m.x.h); ++x_row) {
        const int up = x_row + m.pad_top - i * m.dilation_h, h = up / m.stride;
        if (up < 0 || up % m.stride != 0 || h >= m.g.h) continue;
        const T* const xs = x + n * m.x.image_step + static_cast<int64_t>(x_row) * m.x.row_step + channel;
        const T* const gs = g + n * m.g.image_step + static_cast<int64_t>(h) * m.g.row_step + channel;
        for (int w = place.g_column; w < min(place.g_column + m.stretch_columns, m.g.w); ++w) {
          const int x_column = w * m.stride + j * static_cast<int>(m.dilation_w.value) - m.pad_left;
          if (x_column < 0 || x_column >= m.x.w) continue;
          sum = fmaf(ToFloat(xs[static_cast<int64_t>(x_column) * m.channels]),
                     ToFloat(gs[static_cast<int64_t>(w) * m.channels]), sum);
        }
        if (sum != sum) return sum;
      }
    }
  }
  return sum;
}

// Shared memory, in slots: the stages, and behind them the table of units, which is read a little beyond its end. The
// sums take the place of the stages.
struct TapProductsMemory {
  __host__ __device__ static int Bytes(const TapProducts& m) {
    const int sums = (m.walkers + 1) * m.kernel_h * static_cast<int>(m.kernel_w.value) *
                     static_cast<int>(m.chunks.value) * kSlotChannels * 4;
    const int stages =
        kTapProductsStages * m.stage_slots * kSlotBytes + (m.pairs[0] + m.pairs[1] + m.walkers) * kSlotBytes;
    return sums > stages ? sums : stages;
  }
};

template <class T, int kSets, int kStride>
__global__ void __launch_bounds__(kTapProductsThreads, 1)
    TapProductsKernel(const __grid_constant__ TapProducts m, const T* __restrict__ x, const T* __restrict__ g,
                      void* __restrict__ filter, float* __restrict__ workspace) {
#if __CUDA_ARCH__ >= 800
  constexpr int kRows = 16 / kSets, kUnit = kUnitTerms * kSets;  // pixels of g in a unit
  constexpr Lanes kGLanes = kSets == 4 ? Lanes::kPaired : Lanes::kNear;
  constexpr Lanes kXLanes = kStride == 2 ? Lanes::kFar : kGLanes;
  const int lane = threadIdx.x % 32, row_lane = lane / 4, term_lane = lane % 4;
  uint32_t walker = threadIdx.x / 32;
  const int chunk = m.chunks.Take(walker), parity = kStride == 2 ? walker % 2 : 0;
  const int chunks = m.chunks.value;

  // Blocks of a cluster are neighbours; else neighbours have neighbouring channels.
  uint32_t rest = blockIdx.x, split = 0;
  if (m.one_launch) split = m.splits.Take(rest);
  const int first_channel = m.channel_blocks.Take(rest) * chunks * kSlotChannels;
  const uint32_t group = m.groups.Take(rest);
  if (!m.one_launch) split = rest;

  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t shared_address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  int4* const table = reinterpret_cast<int4*>(shared + kTapProductsStages * m.stage_slots * kSlotBytes);

  // Copies a tile of x or g: the threads of a row have neighbouring chunks, then neighbouring pixels.
  const auto copy = [&](auto lanes, const TapProductsSide& side, const T* from, int first_slot,
                        const TapProductsPlace& place, int first_row, int first_column) {
    uint32_t first_image = threadIdx.x;
    uint32_t first_pixel = side.lanes.Take(first_image);
    const int first = side.row_groups.Take(first_image), copied_chunk = m.chunks.Take(first_pixel);
    const int channel = first_channel + copied_chunk * kSlotChannels, row_groups = side.row_groups.value;
    const uint32_t to = shared_address + first_slot * kSlotBytes, row_bytes = side.pitch * chunks * kSlotBytes;
    if (static_cast<int>(first_image) >= side.image_groups) return;
    for (int pixel = side.begin + first_pixel; pixel < side.end; pixel += side.pixel_groups) {
      const int column = first_column + pixel;
      const bool exists = pixel < side.needed && column >= 0 && column < side.w && channel < m.channels;
      for (int image = first_image; image < m.images; image += side.image_groups) {
        const unsigned rows = exists && image < place.images ? side.h : 0;
        const T* source = from + (place.image + image) * side.image_step +
                          static_cast<int64_t>(first_row + first) * side.row_step + column * m.channels + channel;
        uint32_t target = to + (image * side.period + side.skipped_rows + first) * row_bytes +
                          SlotOf<decltype(lanes)::value>(pixel, copied_chunk, chunks) * kSlotBytes;
#pragma unroll 1
        for (int row = first; row < side.rows; row += row_groups) {
          CopyAsync16(target, source, static_cast<unsigned>(first_row + row) < rows, true);
          source += static_cast<int64_t>(row_groups) * side.row_step;
          target += row_groups * row_bytes;
        }
      }
    }
  };
  const auto copy_tile = [&](uint32_t tile, int stage) {
    if (tile < m.tiles) {
      const TapProductsPlace place = LocateTile(m, group, tile);
      copy(std::integral_constant<Lanes, kXLanes>{}, m.x, x, stage * m.stage_slots, place, place.x_row,
           place.g_column * kStride - m.pad_left);
      copy(std::integral_constant<Lanes, kGLanes>{}, m.g, g, stage * m.stage_slots + m.x_slots, place,
           place.x_row / kStride + m.first_g_row + m.g.skipped_rows, place.g_column);
    }
    CommitCopies();
  };

  // Where nothing is copied, there are zeros.
  for (int slot = threadIdx.x; slot < kTapProductsStages * m.stage_slots; slot += blockDim.x) {
    reinterpret_cast<uint4*>(shared)[slot] = {};
  }
  // What this lane reads, relative to a unit: also of the set that is another eight rows below in the product. Lanes
  // whose filter row does not exist read nothing of g.
  constexpr int kNextSet = kSets == 4 ? 4 : 1;
  const int g_row = row_lane % kRows * m.dilation_h, g_pixel = PixelOf<kGLanes>(term_lane) + row_lane / kRows;
  const bool reads_g = g_row <= m.lead;
  const int g_slot = SlotOf<kGLanes>(g_pixel, chunk, chunks);
  const uint32_t x_lane =
      shared_address + SlotOf<kXLanes>(PixelOf<kXLanes>(term_lane) + row_lane, chunk, chunks) * kSlotBytes;
  const uint32_t g_lane = shared_address + (g_slot - g_row * m.g.pitch * chunks) * kSlotBytes;
  const int next_set = (SlotOf<kGLanes>(g_pixel + kNextSet, chunk, chunks) - g_slot) * kSlotBytes;

  const int4* const own_pairs = table + parity * m.pairs[0];

  float totals[kSlotChannels][4] = {};
  __syncthreads();
  int stage = 0;
  for (uint32_t next = split; next < m.tiles + m.splits.value; next += m.splits.value, stage ^= 1) {
    copy_tile(next, stage);
    if (next == split) {
      // The units: where in a stage x and g begin. The last of an odd number meets zeros.
#pragma unroll 1
      for (int of = 0; of < kStride; ++of) {
        const int first = (of + m.first_parity) % kStride,
                  units = m.images * m.unit_rows[of].value * m.units_wide.value;
        for (int index = threadIdx.x; index < 2 * m.pairs[of]; index += blockDim.x) {
          uint32_t image = index < units ? index : 0;
          const int unit = m.units_wide.Take(image), row = first + m.unit_rows[of].Take(image) * kStride;
          const int x_pixel = (image * m.x.period + row) * m.x.pitch + unit * kUnit * kStride;
          const int row_of_g =
              (index < units ? image : m.images) * m.g.period + m.lead + (row + m.first_parity) / kStride;
          reinterpret_cast<int2*>(table + of * m.pairs[0])[index] = {
              x_pixel * chunks * kSlotBytes, (m.x_slots + (row_of_g * m.g.pitch + unit * kUnit) * chunks) * kSlotBytes};
        }
      }
      continue;
    }
    WaitForCopies<1>();
    __syncthreads();
    float sums[kSlotChannels][4] = {};
    const int begin = (stage ^ 1) * m.stage_slots * kSlotBytes;
    int4 ahead = own_pairs[walker / kStride];
#pragma unroll 1
    for (int pair = walker / kStride; pair < m.pairs[parity]; pair += m.walkers / kStride) {
      const int4 units = ahead;
      ahead = own_pairs[pair + m.walkers / kStride];
      const Words<4> x0 = LoadShared16(x_lane + begin + units.x, true),
                     x1 = LoadShared16(x_lane + begin + units.z, true);
      const Words<4> g00 = LoadShared16(g_lane + begin + units.y, reads_g);
      const Words<4> g10 = LoadShared16(g_lane + begin + units.w, reads_g);
      const Words<4> g01 = LoadShared16(g_lane + begin + units.y + next_set, reads_g);
      const Words<4> g11 = LoadShared16(g_lane + begin + units.w + next_set, reads_g);
#pragma unroll
      for (int c = 0; c < kSlotChannels; ++c) {
        MultiplyHalf<T>(PickHalves(g00.at[c / 2], g10.at[c / 2], c % 2),
                        PickHalves(g01.at[c / 2], g11.at[c / 2], c % 2), PickHalves(x0.at[c / 2], x1.at[c / 2], c % 2),
                        sums[c], sums[c]);
      }
    }
    // Sums of sums, so that none gets long.
#pragma unroll
    for (int c = 0; c < kSlotChannels; ++c) {
#pragma unroll
      for (int v = 0; v < 4; ++v) totals[c][v] += sums[c][v];
    }
    __syncthreads();
  }
  WaitForCopies<0>();
  __syncthreads();

  // The sets of a tap add up; then the walkers, through shared memory: by walker, tap, channel of the block.
  float* const parts = reinterpret_cast<float*>(shared);
  const int width = chunks * kSlotChannels, taps = m.kernel_h * m.kernel_w.value;
  const int i = row_lane % kRows * kStride + parity;
  float* to[2];  // for the shifts 2 * term_lane and the next one; null: no tap
#pragma unroll
  for (int v = 0; v < 2; ++v) {
    const int shift = 2 * term_lane + v, j = m.dilation_w.Quotient(shift);
    const bool exists = row_lane < kRows && i < m.kernel_h && j < static_cast<int>(m.kernel_w.value) &&
                        j * static_cast<int>(m.dilation_w.value) == shift;
    const int tap = static_cast<int>(walker) * taps + i * m.kernel_w.value + j;
    to[v] = exists ? parts + tap * width + chunk * kSlotChannels : nullptr;
  }
#pragma unroll
  for (int c = 0; c < kSlotChannels; ++c) {
    float (&own)[4] = totals[c];
    float even, odd;
    if constexpr (kSets == 2 && kStride == 1) {
      even = own[0] + own[3];
      odd = own[1] + __shfl_down_sync(0xffffffff, own[2], 1);
    } else {
      constexpr int kDistance = kNextSet * kStride / 2;
      even = own[0] + __shfl_down_sync(0xffffffff, own[2], kDistance);
      odd = own[1] + __shfl_down_sync(0xffffffff, own[3], kDistance);
    }
    if constexpr (kSets == 4) {
      const float next_even = __shfl_down_sync(0xffffffff, odd, 16), next_odd = __shfl_down_sync(0xffffffff, even, 17);
      even += next_even;
      odd += next_odd;
    }
    if (to[0] != nullptr) to[0][c] = even;
    if (to[1] != nullptr) to[1][c] = odd;
  }
  __syncthreads();
  const int count = taps * width;
  float* const block_sums = parts + m.walkers * count;
  const int64_t part_size = static_cast<int64_t>(taps) * m.channels;
  const auto write = [&](int tap, int channel, float sum) {
    if (channel >= m.channels) return;
    const int row = m.kernel_w.Quotient(tap), column = tap - row * m.kernel_w.value;
    const int64_t at = group * m.filter.n + row * m.filter.h + column * m.filter.w + channel * m.filter.c;
    if (m.filter_is_float) {
      static_cast<float*>(filter)[at] = sum;
    } else {
      static_cast<T*>(filter)[at] = FromFloat<T>(sum);
    }
  };
  for (int index = threadIdx.x; index < count; index += blockDim.x) {
    uint32_t tap = index / kSlotChannels;
    const int channel = first_channel + m.chunks.Take(tap) * kSlotChannels + index % kSlotChannels;
    const int tap_row = m.kernel_w.Quotient(tap);
    float sum = 0;
    for (int other = tap_row % kStride; other < m.walkers; other += kStride) sum += parts[other * count + index];
    if (sum != sum && channel < m.channels) {
      sum = TapAlone(m, x, g, group, split, tap_row, tap - tap_row * m.kernel_w.value, channel);
    }
    if (m.one_launch && m.splits.value > 1) {
      block_sums[index] = sum;
    } else if (m.one_launch) {
      write(tap, channel, sum);
    } else if (channel < m.channels) {
      workspace[(static_cast<int64_t>(split) * m.groups.value + group) * part_size + tap * m.channels + channel] = sum;
    }
  }
#if __CUDA_ARCH__ >= 900
  if (m.one_launch && m.splits.value > 1) {
    const auto cluster = cooperative_groups::this_cluster();
    cluster.sync();
    for (int index = split * blockDim.x + threadIdx.x; index < count; index += m.splits.value * blockDim.x) {
      float sum = 0;
      for (unsigned other = 0; other < m.splits.value; ++other)
        sum += cluster.map_shared_rank(block_sums, other)[index];
      uint32_t tap = index / kSlotChannels;
      const int channel = first_channel + m.chunks.Take(tap) * kSlotChannels + index % kSlotChannels;
      write(tap, channel, sum);
    }
    cluster.sync();  // the others may still read
  }
#endif
#endif
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_TAP_PRODUCTS_CUH_
