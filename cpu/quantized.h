// The int8 convolution. Its sums are exact, so their order is free: rows of taps are taken in pairs, which the integer
// multiply-add of pairs (pmaddwd; with VNNI vpdpwssd, which also adds them up) sums at once.
#ifndef JAX_DWSCONV_CPU_QUANTIZED_H_
#define JAX_DWSCONV_CPU_QUANTIZED_H_

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cuda/problem.h"

namespace dwsconv::cpu::DWSCONV_ISA {

constexpr int64_t kLane = kLanes<int32_t>;
using I8 = VectorOf<int8_t, kLane>::type;
using I16 = VectorOf<int16_t, kLane>::type;
using Pairs = U32;  // two int16 in every lane

DWSCONV_INLINE uint32_t MakePair(int32_t low, int32_t high) {
  return static_cast<uint32_t>(low & 0xffff) | static_cast<uint32_t>(high) << 16;
}

// Adds the two products of every lane.
DWSCONV_INLINE U32 AddProducts(U32 sum, Pairs a, Pairs b) {
#if defined(__AVX512VNNI__)
  return (U32)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (U32)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (U32)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sum + (U32)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const I32 low_a = (I32)(a << 16) >> 16, low_b = (I32)(b << 16) >> 16;
  return sum + (U32)(low_a * low_b) + (U32)(((I32)a >> 16) * ((I32)b >> 16));
#endif
}

// Between int8 and int32 in one instruction each; GCC takes many, the fewest where it goes by way of int16.
DWSCONV_INLINE I32 Widen(I8 bytes) {
#if defined(__AVX512BW__)
  return (I32)_mm512_cvtepi8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
  int64_t low;
  std::memcpy(&low, &bytes, sizeof(low));
  return (I32)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(low));
#else
  return __builtin_convertvector(__builtin_convertvector(bytes, I16), I32);
#endif
}

DWSCONV_INLINE I8 Narrow(I32 values) {
#if defined(__AVX512BW__)
  return (I8)_mm512_cvtepi32_epi8((__m512i)values);
#else
  return __builtin_convertvector(__builtin_convertvector(values, I16), I8);
#endif
}

DWSCONV_INLINE U32 LoadWords(const uint32_t* p) {
  U32 words;
  std::memcpy(&words, p, sizeof(words));
  return words;
}

// The filter in pairs of rows, as (group, pair of rows, column, output channel), and what the sums start from: the bias
// and what the zero point of x adds. Channels are padded to whole vectors.
class QuantizedFilter {
 public:
  QuantizedFilter(const Problem& p, const Requantization& r, const int8_t* filter)
      : channels_(CeilDiv(p.out_channels(), kLane) * kLane),
        row_pairs_(CeilDiv(p.kernel_h, 2)),
        group_size_(row_pairs_ * p.kernel_w * channels_),
        weights_(p.groups * group_size_),
        start_(p.groups * channels_) {
    for (int64_t g = 0; g < p.groups; ++g) {
      const int8_t* taps = filter + g * p.filter.n;
      uint32_t *weights = weights_.get() + g * group_size_, *start = start_.get() + g * channels_;
      for (int64_t c = 0; c < channels_; ++c) start[c] = c < p.out_channels() && r.bias ? r.bias[c] : 0;
      for (int64_t i = 0; i < p.kernel_h; i += 2) {
        for (int64_t j = 0; j < p.kernel_w; ++j, weights += channels_) {
          const int8_t* low = taps + i * p.filter.h + j * p.filter.w;
          const int8_t* high = i + 1 < p.kernel_h ? low + p.filter.h : nullptr;
          for (int64_t c = 0; c < p.out_channels(); ++c) {
            const int32_t first = low[c * p.filter.c], second = high ? high[c * p.filter.c] : 0;
            weights[c] = MakePair(first, second);
            start[c] -= static_cast<uint32_t>(r.x_zero_point * (first + second));
          }
          for (int64_t c = p.out_channels(); c < channels_; ++c) weights[c] = 0;
        }
      }
    }
  }
  int64_t channels() const { return channels_; }
  int64_t row_pairs() const { return row_pairs_; }
  const uint32_t* weights(int64_t group) const { return weights_.get() + group * group_size_; }
  const uint32_t* start(int64_t group) const { return start_.get() + group * channels_; }

 private:
  int64_t channels_, row_pairs_, group_size_;
  Buffer<uint32_t> weights_, start_;
};

template <int kCount>
struct Columns {
  static constexpr int value = kCount;
};

// A part of some rows of results: `count` of each from column `first`, for the output channels [channel, end).
struct QuantizedBlock {
  static constexpr int64_t kChannels = 64;
  int64_t image, row, rows, first, count, channel, end;
};

// The source of a block, with the padding written out, in pairs of rows: (pair, position, channel). Usually the
// positions are neighbouring columns, which the taps share; where strides or dilations are so large that most would not
// be read, every tap has its own. Pairs stay while later rows of results can still read them.
class StagedPairs {
 public:
  StagedPairs(const Problem& p, const QuantizedBlock& block, const int8_t* x, int32_t zero_point)
      : p_(p),
        block_(block),
        x_(x),
        zero_point_(zero_point),
        shared_(Columns(p, block.count) <= p.kernel_w * block.count),
        ring_(p.dilation_h == 1 ? p.kernel_h + 1 : CeilDiv(p.kernel_h, 2)),
        positions_(shared_ ? Columns(p, block.count) : p.kernel_w * block.count),
        pitch_(CeilDiv(block.end - block.channel, kLane) * kLane),
        pairs_(ring_ * positions_ * pitch_),
        rows_(ring_) {
    for (int64_t i = 0; i < ring_; ++i) rows_.get()[i] = kNoRow;
  }

  static int64_t Columns(const Problem& p, int64_t count) {
    return (count - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
  }
  int64_t step() const { return (shared_ ? p_.stride_w : 1) * pitch_; }
  int64_t tap(int64_t j) const { return (shared_ ? j * p_.dilation_w : j * block_.count) * pitch_; }

  // The source rows of taps 2 * i and 2 * i + 1 for a row of results.
  const uint32_t* Get(int64_t result_row, int64_t i) {
    const int64_t row = result_row * p_.stride_h - p_.pad_top + 2 * i * p_.dilation_h;
    const int64_t at = p_.dilation_h == 1 ? (row + p_.pad_top) % ring_ : i;
    uint32_t* pairs = pairs_.get() + at * positions_ * pitch_;
    if (rows_.get()[at] != row) Fill(row, pairs);
    rows_.get()[at] = row;
    return pairs;
  }

 private:
  static constexpr int64_t kNoRow = INT64_MIN;

  void Fill(int64_t row, uint32_t* to) const {
    const int8_t *low = Row(row), *high = Row(row + p_.dilation_h);
    const int64_t left = block_.first * p_.stride_w - p_.pad_left;
    for (int64_t position = 0; position < positions_; ++position, to += pitch_) {
      const int64_t of_tap =
          shared_ ? position : position % block_.count * p_.stride_w + position / block_.count * p_.dilation_w;
      const int64_t column = left + of_tap;
      const bool inside = column >= 0 && column < p_.in_w;
      const int64_t offset = inside ? column * p_.x.w : 0;
      FillPixel(inside && low ? low + offset : nullptr, inside && high ? high + offset : nullptr, to);
    }
  }

  const int8_t* Row(int64_t row) const {
    return row >= 0 && row < p_.in_h ? x_ + block_.image * p_.x.n + row * p_.x.h : nullptr;
  }

  DWSCONV_INLINE void FillPixel(const int8_t* low, const int8_t* high, uint32_t* to) const {
    int64_t c = block_.channel;
    if (p_.x.c == 1 && p_.multiplier == 1) {
      for (; c + kLane <= block_.end; c += kLane) {
        const U32 pair = ((U32)LoadBytes(low, c) & 0xffff) | (U32)LoadBytes(high, c) << 16;
        std::memcpy(to + (c - block_.channel), &pair, sizeof(pair));
      }
    }
    for (; c < block_.end; ++c) {
      const int64_t offset = p_.input_channel(c) * p_.x.c;
      to[c - block_.channel] = MakePair(low ? low[offset] : zero_point_, high ? high[offset] : zero_point_);
    }
    for (; c < block_.channel + pitch_; ++c) to[c - block_.channel] = 0;
  }

  DWSCONV_INLINE I32 LoadBytes(const int8_t* pixel, int64_t c) const {
    if (!pixel) return I32{} + zero_point_;
    I8 bytes;
    std::memcpy(&bytes, pixel + c, sizeof(bytes));
    return Widen(bytes);
  }

  const Problem& p_;
  const QuantizedBlock& block_;
  const int8_t* x_;
  int32_t zero_point_;
  bool shared_;
  int64_t ring_, positions_, pitch_;
  Buffer<uint32_t> pairs_;
  Buffer<int64_t> rows_;
};

// The sums of kLane output channels from channel c, of which `count` exist, become results.
DWSCONV_INLINE void StoreSums(const Requantization& r, U32 sums, int64_t c, int64_t count, int64_t pitch,
                              int32_t* result) {
  for (int64_t lane = 0; lane < count; ++lane) result[lane * pitch] = static_cast<int32_t>(sums[lane]);
}

DWSCONV_INLINE void StoreSums(const Requantization& r, U32 sums, int64_t c, int64_t count, int64_t pitch,
                              int8_t* result) {
  const F32 scale = count == kLane ? Load<float>(r.scale + c) : LoadPart<float>(r.scale + c, count);
  const F32 low = F32{} + static_cast<float>(r.low - r.out_zero_point);
  const F32 high = F32{} + static_cast<float>(r.high - r.out_zero_point);
  F32 value = __builtin_convertvector((I32)sums, F32) * scale;
  value = value < low ? low : value;  // before rounding, which does not cross an integer
  value = value > high ? high : value;
  const F32 magic = F32{} + 0x1.8p23f;  // adding it rounds to an integer in the low bits
  const I32 rounded = (I32)(value + magic) - (I32)magic + r.out_zero_point;
  const I8 bytes = Narrow(rounded);
  if (count == kLane && pitch == 1) {
    std::memcpy(result, &bytes, sizeof(bytes));
  } else {
    for (int64_t lane = 0; lane < count; ++lane) result[lane * pitch] = bytes[lane];
  }
}

// kColumns neighbouring results from column q, in registers over all taps.
template <int kColumns, class R>
DWSCONV_INLINE void QuantizedTile(const Problem& p, const Requantization& r, const QuantizedFilter& filter,
                                  const StagedPairs& staged, const uint32_t* const* sources, int64_t offset,
                                  int64_t group, int64_t c, R* result) {
  U32 sums[kColumns];
#pragma GCC unroll 8
  for (int t = 0; t < kColumns; ++t) sums[t] = LoadWords(filter.start(group) + c);
  const int64_t step = staged.step();
  const uint32_t* weights = filter.weights(group) + c;
  for (int64_t i = 0; i < filter.row_pairs(); ++i) {
    for (int64_t j = 0; j < p.kernel_w; ++j, weights += filter.channels()) {
      const Pairs weight = LoadWords(weights);
      const uint32_t* from = sources[i] + offset + staged.tap(j);
#pragma GCC unroll 8
      for (int t = 0; t < kColumns; ++t) sums[t] = AddProducts(sums[t], weight, LoadWords(from + t * step));
    }
  }
  const int64_t count = Min(kLane, p.out_channels() - c);
#pragma GCC unroll 8
  for (int t = 0; t < kColumns; ++t) StoreSums(r, sums[t], c, count, p.y.c, result + t * p.y.w);
}

template <class R>
void RunQuantizedBlock(const Problem& p, const Requantization& r, const QuantizedFilter& filter, const int8_t* x,
                       const QuantizedBlock& block, R* y) {
  StagedPairs staged(p, block, x, r.x_zero_point);
  Buffer<const uint32_t*> sources(filter.row_pairs());
  const int64_t group = p.group_of(block.image);
  for (int64_t row = block.row; row < block.row + block.rows; ++row) {
    for (int64_t i = 0; i < filter.row_pairs(); ++i) sources.get()[i] = staged.Get(row, i);
    R* results = y + block.image * p.y.n + row * p.y.h + block.first * p.y.w;
    for (int64_t c = block.channel; c < block.end; c += kLane) {
      const auto tile = [&](auto columns, int64_t q) {
        QuantizedTile<columns.value>(p, r, filter, staged, sources.get(), q * staged.step() + c - block.channel, group,
                                     c, results + q * p.y.w + c * p.y.c);
        return q + columns.value;
      };
      int64_t q = 0;
      while (q + 8 <= block.count) q = tile(Columns<8>{}, q);
      if (q + 4 <= block.count) q = tile(Columns<4>{}, q);
      while (q < block.count) q = tile(Columns<1>{}, q);
    }
  }
}

template <class R>
void RunQuantized(const Problem& p, const Requantization& r, const int8_t* x, const int8_t* taps, R* y,
                  Parallel& parallel) {
  constexpr int64_t kStagedWords = 1 << 14, kMostRows = 32, kProductsPerTask = 1 << 18;
  const QuantizedFilter filter(p, r, taps);
  const int64_t channel_blocks = CeilDiv(p.out_channels(), QuantizedBlock::kChannels);
  const int64_t positions = kStagedWords / ((p.kernel_h + 1) * QuantizedBlock::kChannels);
  const int64_t most = Max(8, positions / Min(p.stride_w, p.kernel_w));
  const int64_t column_blocks = CeilDiv(p.out_w, most), columns = CeilDiv(p.out_w, column_blocks);
  const int64_t products = columns * Min(p.out_channels(), QuantizedBlock::kChannels) * p.kernel_h * p.kernel_w;
  const int64_t strips = CeilDiv(p.out_h, kMostRows), rows = CeilDiv(p.out_h, strips);
  const int64_t blocks = p.batch * strips * column_blocks * channel_blocks;
  ParallelFor(parallel, blocks, CeilDiv(kProductsPerTask, products * rows), [&](int64_t task) {
    QuantizedBlock block;
    block.channel = task % channel_blocks * QuantizedBlock::kChannels;
    block.end = Min(p.out_channels(), block.channel + QuantizedBlock::kChannels);
    task /= channel_blocks;
    block.first = task % column_blocks * columns;
    block.count = Min(columns, p.out_w - block.first);
    task /= column_blocks;
    block.row = task % strips * rows;
    block.rows = Min(rows, p.out_h - block.row);
    block.image = task / strips;
    if (block.count > 0) RunQuantizedBlock(p, r, filter, x, block, y);
  });
}

inline bool QuantizedForward(const Problem& p, const Requantization& r, const void* x, const void* filter, void* y,
                             Parallel& parallel) {
  if (p.x_dtype != Dtype::kI8 || p.filter_dtype != Dtype::kI8) return false;
  const auto run = [&](auto* result) {
    RunQuantized(p, r, static_cast<const int8_t*>(x), static_cast<const int8_t*>(filter), result, parallel);
    return true;
  };
  if (p.y_dtype == Dtype::kI8 && r.scale) return run(static_cast<int8_t*>(y));
  return p.y_dtype == Dtype::kI32 && !r.scale && run(static_cast<int32_t*>(y));
}

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_QUANTIZED_H_
