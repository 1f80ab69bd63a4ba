// The int8 convolution. Its sums are exact, so their order is free: rows of taps are taken in pairs, which the integer
// multiply-add of pairs (pmaddwd) sums at once.
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
using Pairs = U32;  // two int16 in every lane

DWSCONV_INLINE uint32_t MakePair(int32_t low, int32_t high) {
  return static_cast<uint32_t>(low & 0xffff) | static_cast<uint32_t>(high) << 16;
}

// Adds the two products of every lane.
DWSCONV_INLINE U32 AddProducts(U32 sum, Pairs a, Pairs b) {
#if defined(__AVX512BW__)
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
      for (int64_t c = 0; c < channels_; ++c) {
        const bool exists = c < p.out_channels();
        const int8_t* taps = filter + g * p.filter.n + c * p.filter.c;
        int32_t total = 0;
        for (int64_t i = 0; i < 2 * row_pairs_; i += 2) {
          for (int64_t j = 0; j < p.kernel_w; ++j) {
            const int32_t low = exists ? taps[i * p.filter.h + j * p.filter.w] : 0;
            const int32_t high = exists && i + 1 < p.kernel_h ? taps[(i + 1) * p.filter.h + j * p.filter.w] : 0;
            weights_.get()[g * group_size_ + (i / 2 * p.kernel_w + j) * channels_ + c] = MakePair(low, high);
            total += low + high;
          }
        }
        const uint32_t bias = exists && r.bias ? static_cast<uint32_t>(r.bias[c]) : 0;
        start_.get()[g * channels_ + c] = bias - static_cast<uint32_t>(r.x_zero_point * total);
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

// A part of one row of results: `count` of them from column `first`, for the output channels [channel, end).
struct QuantizedBlock {
  static constexpr int64_t kChannels = 64;
  int64_t image, row, first, count, channel, end;
};

// The source of a block with the padding written out, in pairs of rows: (pair of rows, position, channel). Usually the
// positions are neighbouring columns, which the taps share; where strides or dilations are so large that most would not
// be read, every tap has its own.
class StagedPairs {
 public:
  StagedPairs(const Problem& p, const QuantizedBlock& block)
      : p_(p),
        block_(block),
        shared_(Columns(p, block.count) <= p.kernel_w * block.count),
        positions_(shared_ ? Columns(p, block.count) : p.kernel_w * block.count),
        pitch_(CeilDiv(block.end - block.channel, kLane) * kLane),
        pairs_(CeilDiv(p.kernel_h, 2) * positions_ * pitch_) {}

  static int64_t Columns(const Problem& p, int64_t count) {
    return (count - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
  }
  int64_t pitch() const { return pitch_; }
  int64_t row_size() const { return positions_ * pitch_; }
  int64_t step() const { return (shared_ ? p_.stride_w : 1) * pitch_; }
  int64_t tap(int64_t j) const { return (shared_ ? j * p_.dilation_w : j * block_.count) * pitch_; }
  const uint32_t* get() const { return pairs_.get(); }

  void Fill(const int8_t* x, int32_t zero_point) {
    const int64_t top = block_.row * p_.stride_h - p_.pad_top, left = block_.first * p_.stride_w - p_.pad_left;
    uint32_t* to = pairs_.get();
    for (int64_t i = 0; i < p_.kernel_h; i += 2) {
      const int8_t* low = Row(x, top + i * p_.dilation_h);
      const int8_t* high = i + 1 < p_.kernel_h ? Row(x, top + (i + 1) * p_.dilation_h) : nullptr;
      for (int64_t position = 0; position < positions_; ++position, to += pitch_) {
        const int64_t column = left + (shared_ ? position
                                               : position % block_.count * p_.stride_w +
                                                     position / block_.count * p_.dilation_w);
        const bool inside = column >= 0 && column < p_.in_w;
        const int64_t offset = inside ? column * p_.x.w : 0;
        FillPixel(inside && low ? low + offset : nullptr, inside && high ? high + offset : nullptr, zero_point, to);
      }
    }
  }

 private:
  const int8_t* Row(const int8_t* x, int64_t row) const {
    return row >= 0 && row < p_.in_h ? x + block_.image * p_.x.n + row * p_.x.h : nullptr;
  }

  void FillPixel(const int8_t* low, const int8_t* high, int32_t zero_point, uint32_t* to) const {
    int64_t c = block_.channel;
    if (p_.x.c == 1 && p_.multiplier == 1) {
      for (; c + kLane <= block_.end; c += kLane) {
        const U32 pair = ((U32)LoadBytes(low, c, zero_point) & 0xffff) | (U32)LoadBytes(high, c, zero_point) << 16;
        std::memcpy(to + (c - block_.channel), &pair, sizeof(pair));
      }
    }
    for (; c < block_.end; ++c) {
      const int64_t offset = p_.input_channel(c) * p_.x.c;
      to[c - block_.channel] = MakePair(low ? low[offset] : zero_point, high ? high[offset] : zero_point);
    }
    for (; c < block_.channel + pitch_; ++c) to[c - block_.channel] = 0;
  }

  static DWSCONV_INLINE I32 LoadBytes(const int8_t* pixel, int64_t c, int32_t zero_point) {
    if (!pixel) return I32{} + zero_point;
    I8 bytes;
    std::memcpy(&bytes, pixel + c, sizeof(bytes));
    return __builtin_convertvector(bytes, I32);
  }

  const Problem& p_;
  const QuantizedBlock& block_;
  bool shared_;
  int64_t positions_, pitch_;
  Buffer<uint32_t> pairs_;
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
  const I8 bytes = __builtin_convertvector(rounded, I8);
  if (count == kLane && pitch == 1) {
    std::memcpy(result, &bytes, sizeof(bytes));
  } else {
    for (int64_t lane = 0; lane < count; ++lane) result[lane * pitch] = bytes[lane];
  }
}

// kColumns neighbouring results, in registers over all taps.
template <int kColumns, class R>
DWSCONV_INLINE void QuantizedTile(const Problem& p, const Requantization& r, const QuantizedFilter& filter,
                                  const StagedPairs& staged, const uint32_t* source, const uint32_t* weights,
                                  const uint32_t* start, int64_t c, R* result) {
  U32 sums[kColumns];
#pragma GCC unroll 8
  for (int t = 0; t < kColumns; ++t) sums[t] = LoadWords(start + c);
  const int64_t step = staged.step();
  for (int64_t i = 0; i < filter.row_pairs(); ++i) {
    for (int64_t j = 0; j < p.kernel_w; ++j) {
      const Pairs weight = LoadWords(weights + (i * p.kernel_w + j) * filter.channels() + c);
      const uint32_t* from = source + i * staged.row_size() + staged.tap(j);
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
  StagedPairs staged(p, block);
  staged.Fill(x, r.x_zero_point);
  const int64_t group = p.group_of(block.image);
  R* row = y + block.image * p.y.n + block.row * p.y.h + block.first * p.y.w;
  for (int64_t c = block.channel; c < block.end; c += kLane) {
    const uint32_t* source = staged.get() + (c - block.channel);
    const auto tile = [&](auto columns, int64_t q) {
      QuantizedTile<columns.value>(p, r, filter, staged, source + q * staged.step(), filter.weights(group),
                                   filter.start(group), c, row + q * p.y.w + c * p.y.c);
      return q + columns.value;
    };
    int64_t q = 0;
    while (q + 8 <= block.count) q = tile(Columns<8>{}, q);
    if (q + 4 <= block.count) q = tile(Columns<4>{}, q);
    while (q < block.count) q = tile(Columns<1>{}, q);
  }
}

template <class R>
void RunQuantized(const Problem& p, const Requantization& r, const int8_t* x, const int8_t* taps, R* y,
                  Parallel& parallel) {
  constexpr int64_t kStagedPairs = 1 << 14, kProductsPerTask = 1 << 18;
  const QuantizedFilter filter(p, r, taps);
  const int64_t channel_blocks = CeilDiv(p.out_channels(), QuantizedBlock::kChannels);
  const int64_t positions = Max(1, kStagedPairs / (filter.row_pairs() * QuantizedBlock::kChannels));
  const int64_t most = Max(8, positions / Min(p.stride_w, p.kernel_w));
  const int64_t column_blocks = CeilDiv(p.out_w, most), columns = CeilDiv(p.out_w, column_blocks);
  const int64_t products = columns * Min(p.out_channels(), QuantizedBlock::kChannels) * p.kernel_h * p.kernel_w;
  const int64_t blocks = p.batch * p.out_h * column_blocks * channel_blocks;
  ParallelFor(parallel, blocks, CeilDiv(kProductsPerTask, products), [&](int64_t task) {
    QuantizedBlock block;
    block.channel = task % channel_blocks * QuantizedBlock::kChannels;
    block.end = Min(p.out_channels(), block.channel + QuantizedBlock::kChannels);
    task /= channel_blocks;
    block.first = task % column_blocks * columns;
    block.count = Min(columns, p.out_w - block.first);
    task /= column_blocks;
    block.row = task % p.out_h;
    block.image = task / p.out_h;
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
