// grad_filter: every filter tap sums x times g over all images and positions of its group.
#ifndef JAX_DWSCONV_CPU_GRAD_FILTER_H_
#define JAX_DWSCONV_CPU_GRAD_FILTER_H_

#include "cpu/filter.h"
#include "cpu/gather.h"
#include "cpu/staged_columns.h"

namespace dwsconv::cpu::DWSCONV_ISA {

constexpr int kTapsAtOnce = 8;  // tap sums of one filter row that stay in registers

// The rows of g are cut into pieces that are summed apart, so that no sum gets long. The pieces of each group are
// divided into parts that are added in order. Both depend on the problem alone: the result does not depend on the
// threads.
template <class A>
struct Cut {
  explicit Cut(const Problem& p)
      : width(kTermsPerSum * (p.channels_last ? 1 : kLanes<A>)),
        per_row(CeilDiv(p.out_w, width)),
        pieces(p.images_per_group() * p.out_h * per_row) {
    const int64_t macs = p.images_per_group() * p.out_h * p.out_w * p.out_channels() * p.kernel_h * p.kernel_w;
    parts = Max(1, Min(Min(pieces, kMostParts), macs / kMacsPerPart));
  }

  static constexpr int64_t kTermsPerSum = 128, kMostParts = 16, kMacsPerPart = 1 << 18;
  int64_t width, per_row, pieces, parts;
};

// Columns [begin, end) of one row of g.
struct Piece {
  template <class A>
  Piece(const Problem& p, const Cut<A>& cut, int64_t group, int64_t index)
      : image(group * p.images_per_group() + index / cut.per_row / p.out_h),
        out_row(index / cut.per_row % p.out_h),
        first_in_row(out_row * p.stride_h - p.pad_top),
        begin(index % cut.per_row * cut.width),
        end(Min(begin + cut.width, p.out_w)) {}

  int64_t image, out_row;
  int64_t first_in_row;  // row of x under the first filter row
  int64_t begin, end;
};

// ---- NHWC: lanes along the channels ----

// The columns of the piece for which this tap is inside the image.
DWSCONV_INLINE void ValidColumns(const Problem& p, const Piece& piece, const Axis& cols, int64_t tap, int64_t* low,
                                 int64_t* high) {
  cols.ValidResults(tap, p.in_w, p.out_w, low, high);
  *low = Max(*low, piece.begin);
  *high = Max(*low, Min(*high, piece.end));
}

// Adds the sum of x * g over the piece to kTaps tap sums, for the columns on which all of these taps are inside the
// image, then the rest of each tap's columns one by one.
template <class A, class X, class G, int kTaps>
DWSCONV_INLINE void SumTaps(const Problem& p, const Piece& piece, const Axis& cols, int64_t tap, const X* x, const G* g,
                            A* sums) {
  int64_t low[kTaps], high[kTaps], from = piece.begin, to = piece.end;
  for (int t = 0; t < kTaps; ++t) {
    ValidColumns(p, piece, cols, tap + t, &low[t], &high[t]);
    from = Max(from, low[t]);
    to = Min(to, high[t]);
  }
  to = Max(from, to);
  Vec<A> total[kTaps] = {};
  for (int64_t ow = from; ow < to; ++ow) {
    const Vec<A> grad = Load<A>(g + ow * p.y.w);
    const X* source = x + (ow * p.stride_w + cols.offset(tap)) * p.x.w;
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) total[t] += grad * Load<A>(source + t * p.dilation_w * p.x.w);
  }
  for (int t = 0; t < kTaps; ++t) {
    const auto add = [&](int64_t begin, int64_t end) {
      for (int64_t ow = begin; ow < end; ++ow) {
        total[t] += Load<A>(g + ow * p.y.w) * Load<A>(x + (ow * p.stride_w + cols.offset(tap + t)) * p.x.w);
      }
    };
    add(low[t], Min(from, high[t]));
    add(Max(to, low[t]), high[t]);
    Store<A>(sums + t * p.out_channels(), Load<A>(sums + t * p.out_channels()) + total[t]);
  }
}

template <class A, class X, class G>
void SumChannels(const Problem& p, const Piece& piece, const Axis& cols, const X* x, const G* g, A* sums) {
  constexpr int64_t kVector = kLanes<A>;
  const int64_t channels = p.out_channels();
  int64_t c = 0;
  for (; p.multiplier == 1 && c + kVector <= channels; c += kVector) {
    int64_t tap = 0;
    for (; tap + kTapsAtOnce <= p.kernel_w; tap += kTapsAtOnce)
      SumTaps<A, X, G, kTapsAtOnce>(p, piece, cols, tap, x + c, g + c, sums + tap * channels + c);
    switch (p.kernel_w - tap) {
      case 7: SumTaps<A, X, G, 7>(p, piece, cols, tap, x + c, g + c, sums + tap * channels + c); break;
      case 5: SumTaps<A, X, G, 5>(p, piece, cols, tap, x + c, g + c, sums + tap * channels + c); break;
      case 3: SumTaps<A, X, G, 3>(p, piece, cols, tap, x + c, g + c, sums + tap * channels + c); break;
      default:
        for (; tap < p.kernel_w; ++tap)
          SumTaps<A, X, G, 1>(p, piece, cols, tap, x + c, g + c, sums + tap * channels + c);
    }
  }
  for (; c < channels; ++c) {  // channel multipliers, and what is left of the channels
    for (int64_t tap = 0; tap < p.kernel_w; ++tap) {
      int64_t low, high;
      ValidColumns(p, piece, cols, tap, &low, &high);
      A total = 0;
      for (int64_t ow = low; ow < high; ++ow) {
        total += LoadOne<A>(g + ow * p.y.w + c) *
                 LoadOne<A>(x + (ow * p.stride_w + cols.offset(tap)) * p.x.w + c / p.multiplier);
      }
      sums[tap * channels + c] += total;
    }
  }
}

// Adds pieces [first, last) of a group to sums of shape (kernel_h, kernel_w, out_channels).
template <class A, class X, class G>
void SumChannelsLast(const Problem& p, const Cut<A>& cut, const Axis& cols, int64_t group, int64_t first, int64_t last,
                     const X* x, const G* g, A* sums) {
  for (int64_t index = first; index < last; ++index) {
    const Piece piece(p, cut, group, index);
    const G* grad = g + piece.image * p.y.n + piece.out_row * p.y.h;
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      const int64_t in_row = piece.first_in_row + i * p.dilation_h;
      if (in_row < 0 || in_row >= p.in_h) continue;
      SumChannels<A>(p, piece, cols, x + piece.image * p.x.n + in_row * p.x.h, grad,
                     sums + i * p.kernel_w * p.out_channels());
    }
  }
}

// ---- NCHW: lanes along W ----

template <class A>
DWSCONV_INLINE A HorizontalSum(Vec<A> v) {
  A total = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) total += v[lane];
  return total;
}

// Adds the sum of staged x times g over the piece to kTaps neighbouring tap sums.
template <class A, class G, int kTaps>
DWSCONV_INLINE void SumStagedTaps(const Problem& p, const Piece& piece, const Axis& cols, const StagedColumns& staged,
                                  int64_t tap, const A* x, const G* g, A* sums) {
  const A* from[kTaps];
  for (int t = 0; t < kTaps; ++t) from[t] = x + staged.At(tap + t);
  Vec<A> total[kTaps] = {};
  int64_t ow = piece.begin;
  for (; ow + kLanes<A> <= piece.end; ow += kLanes<A>) {
    const Vec<A> grad = Load<A>(g + ow);
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) total[t] += grad * Load<A>(from[t] + ow);
  }
  if (ow < piece.end) {  // x must be cut off too: an infinity beyond the end times zero would be NaN
    const Vec<A> grad = LoadPart<A>(g + ow, piece.end - ow);
    for (int t = 0; t < kTaps; ++t) total[t] += grad * LoadPart<A>(from[t] + ow, piece.end - ow);
  }
  for (int t = 0; t < kTaps; ++t) sums[(tap + t) * p.out_channels()] += HorizontalSum<A>(total[t]);
}

// Adds pieces [first, last) of a group to the sums of one output channel.
template <class A, class X, class G>
void SumChannelsFirst(const Problem& p, const Cut<A>& cut, const Axis& cols, int64_t group, int64_t first, int64_t last,
                      int64_t channel, const X* x, const G* g, A* sums) {
  const StagedColumns staged(cols, CeilDiv(p.out_w, kLanes<A>) * kLanes<A>);
  Buffer<A> rows(p.in_h * staged.row_size());
  int64_t staged_image = -1, staged_rows = 0;
  for (int64_t index = first; index < last; ++index) {
    const Piece piece(p, cut, group, index);
    const X* plane = x + piece.image * p.x.n + channel / p.multiplier * p.x.c;
    const G* grad = g + piece.image * p.y.n + channel * p.y.c + piece.out_row * p.y.h;
    if (piece.image != staged_image) staged_rows = 0;
    staged_image = piece.image;
    const int64_t end_row = Min(p.in_h, piece.first_in_row + (p.kernel_h - 1) * p.dilation_h + 1);
    for (staged_rows = Max(staged_rows, piece.first_in_row); staged_rows < end_row; ++staged_rows) {
      staged.Fill(plane + staged_rows * p.x.h, p.in_w, rows.get() + staged_rows * staged.row_size());
    }
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      const int64_t in_row = piece.first_in_row + i * p.dilation_h;
      if (in_row < 0 || in_row >= p.in_h) continue;
      const A* from = rows.get() + in_row * staged.row_size();
      A* to = sums + i * p.kernel_w * p.out_channels() + channel;
      int64_t tap = 0;
      for (; tap + 4 <= p.kernel_w; tap += 4) SumStagedTaps<A, G, 4>(p, piece, cols, staged, tap, from, grad, to);
      for (; tap < p.kernel_w; ++tap) SumStagedTaps<A, G, 1>(p, piece, cols, staged, tap, from, grad, to);
    }
  }
}

// ---- Both ----

template <class A, class X, class G>
void RunGradFilter(const Problem& p, const void* x_data, const void* g_data, void* result, Parallel& parallel) {
  const X* x = static_cast<const X*>(x_data);
  const G* g = static_cast<const G*>(g_data);
  const Axis cols = Axis::Forward(p.kernel_w, p.stride_w, p.dilation_w, p.pad_left, p.out_w);
  const Cut<A> cut(p);
  const int64_t size = p.filter_elements(), per_group = size / p.groups;
  Buffer<A> partial(cut.parts * size);
  const int64_t channels = p.channels_last ? 1 : p.out_channels();
  ParallelFor(parallel, cut.parts * p.groups * channels, 1, [&](int64_t task) {
    const int64_t channel = task % channels, group = task / channels % p.groups, part = task / channels / p.groups;
    const int64_t first = cut.pieces * part / cut.parts, last = cut.pieces * (part + 1) / cut.parts;
    A* sums = partial.get() + part * size + group * per_group;
    for (int64_t i = channel; i < per_group; i += channels) sums[i] = 0;
    if (p.channels_last) {
      SumChannelsLast<A>(p, cut, cols, group, first, last, x, g, sums);
    } else {
      SumChannelsFirst<A>(p, cut, cols, group, first, last, channel, x, g, sums);
    }
  });
  WithStorageType<A>(p.filter_dtype, [&](auto tag) {
    auto* to = static_cast<decltype(tag)*>(result);
    ForEachTap(p, [&](int64_t tap, int64_t offset) {
      for (int64_t c = 0; c < p.out_channels(); ++c) {
        A total = 0;
        for (int64_t part = 0; part < cut.parts; ++part)
          total += partial.get()[part * size + tap * p.out_channels() + c];
        StoreOne<A>(to + offset + c * p.filter.c, total);
      }
    });
  });
}

inline bool GradFilter(const Problem& p, const void* x, const void* y_cotangent, void* filter_cotangent,
                       Parallel& parallel) {
  const auto is = [&](Dtype xs, Dtype ys) { return p.x_dtype == xs && p.y_dtype == ys; };
  const auto run = [&](auto instance) {
    instance(p, x, y_cotangent, filter_cotangent, parallel);
    return true;
  };
  if ((p.x_dtype == Dtype::kF64) != (p.filter_dtype == Dtype::kF64)) return false;
  if (is(Dtype::kF32, Dtype::kF32)) return run(RunGradFilter<float, float, float>);
  if (is(Dtype::kBF16, Dtype::kBF16)) return run(RunGradFilter<float, BFloat16, BFloat16>);
  if (is(Dtype::kBF16, Dtype::kF32)) return run(RunGradFilter<float, BFloat16, float>);
  if (is(Dtype::kF16, Dtype::kF16)) return run(RunGradFilter<float, Float16, Float16>);
  if (is(Dtype::kF16, Dtype::kF32)) return run(RunGradFilter<float, Float16, float>);
  if (is(Dtype::kF64, Dtype::kF64)) return run(RunGradFilter<double, double, double>);
  return false;
}

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_GRAD_FILTER_H_
