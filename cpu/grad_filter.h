// grad_filter: every filter tap sums x times g over all images and positions of its group.
#ifndef JAX_DWSCONV_CPU_GRAD_FILTER_H_
#define JAX_DWSCONV_CPU_GRAD_FILTER_H_

#include "cpu/filter.h"
#include "cpu/gather.h"
#include "cpu/staged_columns.h"

namespace dwsconv::cpu::DWSCONV_ISA {

constexpr int kTapsAtOnce = 8;  // tap sums of one filter row that stay in registers

// The rows of g of each group are divided into `splits` parts that are summed apart and then added in order. The number of parts
// depends on the problem alone, so the result does not depend on the number of threads.
inline int64_t Splits(const Problem& p) {
  constexpr int64_t kMost = 16, kMacsPerSplit = 1 << 18;
  const int64_t rows = p.images_per_group() * p.out_h;
  const int64_t macs = rows * p.out_w * p.out_channels() * p.kernel_h * p.kernel_w;
  return Max(1, Min(Min(rows, kMost), macs / kMacsPerSplit));
}

// Row number `row` of a group: which image and row of g, and the position in x of filter row i.
struct GroupRow {
  GroupRow(const Problem& p, int64_t group, int64_t row)
      : image(group * p.images_per_group() + row / p.out_h), out_row(row % p.out_h), first(out_row * p.stride_h - p.pad_top) {}
  int64_t image, out_row, first;
};

// ---- NHWC: lanes along the channels ------------------------------------------------------------------------------------------

// Adds sum over ow of x * g to kTaps tap sums, for the columns on which all of these taps are inside the image, then the rest
// of each tap's columns one by one.
template <class A, class X, class G, int kTaps>
DWSCONV_INLINE void SumRow(const Problem& p, const Axis& cols, int64_t tap, const X* x, const G* g, A* sums) {
  int64_t low[kTaps], high[kTaps], from = 0, to = p.out_w;
  for (int t = 0; t < kTaps; ++t) {
    cols.ValidResults(tap + t, p.in_w, p.out_w, &low[t], &high[t]);
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
void SumRowOfChannels(const Problem& p, const Axis& cols, const X* x, const G* g, A* sums) {
  constexpr int64_t kVector = kLanes<A>;
  const int64_t channels = p.out_channels();
  int64_t c = 0;
  for (; p.multiplier == 1 && c + kVector <= channels; c += kVector) {
    int64_t tap = 0;
    for (; tap + kTapsAtOnce <= p.kernel_w; tap += kTapsAtOnce) SumRow<A, X, G, kTapsAtOnce>(p, cols, tap, x + c, g + c, sums + tap * channels + c);
    switch (p.kernel_w - tap) {
      case 7: SumRow<A, X, G, 7>(p, cols, tap, x + c, g + c, sums + tap * channels + c); break;
      case 5: SumRow<A, X, G, 5>(p, cols, tap, x + c, g + c, sums + tap * channels + c); break;
      case 3: SumRow<A, X, G, 3>(p, cols, tap, x + c, g + c, sums + tap * channels + c); break;
      default:
        for (; tap < p.kernel_w; ++tap) SumRow<A, X, G, 1>(p, cols, tap, x + c, g + c, sums + tap * channels + c);
    }
  }
  for (; c < channels; ++c) {  // channel multipliers, and what is left of the channels
    for (int64_t tap = 0; tap < p.kernel_w; ++tap) {
      int64_t low, high;
      cols.ValidResults(tap, p.in_w, p.out_w, &low, &high);
      A total = 0;
      for (int64_t ow = low; ow < high; ++ow) {
        total += LoadOne<A>(g + ow * p.y.w + c) *
                 LoadOne<A>(x + (ow * p.stride_w + cols.offset(tap)) * p.x.w + c / p.multiplier);
      }
      sums[tap * channels + c] += total;
    }
  }
}

// Adds rows [first, last) of a group to sums of shape (kernel_h, kernel_w, out_channels).
template <class A, class X, class G>
void SumChannelsLast(const Problem& p, const Axis& cols, int64_t group, int64_t first, int64_t last, const X* x, const G* g, A* sums) {
  for (int64_t row = first; row < last; ++row) {
    const GroupRow at(p, group, row);
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      const int64_t in_row = at.first + i * p.dilation_h;
      if (in_row < 0 || in_row >= p.in_h) continue;
      SumRowOfChannels<A>(p, cols, x + at.image * p.x.n + in_row * p.x.h, g + at.image * p.y.n + at.out_row * p.y.h,
                          sums + i * p.kernel_w * p.out_channels());
    }
  }
}

// ---- NCHW: lanes along W -----------------------------------------------------------------------------------------------------

template <class A>
DWSCONV_INLINE A HorizontalSum(Vec<A> v) {
  A total = 0;
  for (int lane = 0; lane < kLanes<A>; ++lane) total += v[lane];
  return total;
}

// sum over ow of staged x times g, for kTaps neighbouring taps of one filter row.
template <class A, class G, int kTaps>
DWSCONV_INLINE void SumStagedRow(const Problem& p, const Axis& cols, const StagedColumns& staged, int64_t tap, const A* x, const G* g,
                                 A* sums) {
  const A* from[kTaps];
  for (int t = 0; t < kTaps; ++t) from[t] = x + staged.At(cols.offset(tap + t));
  Vec<A> total[kTaps] = {};
  int64_t ow = 0;
  for (; ow + kLanes<A> <= p.out_w; ow += kLanes<A>) {
    const Vec<A> grad = Load<A>(g + ow);
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) total[t] += grad * Load<A>(from[t] + ow);
  }
  if (ow < p.out_w) {  // x must be cut off too: an infinity beyond the end times zero would be NaN
    const Vec<A> grad = LoadPart<A>(g + ow, p.out_w - ow);
    for (int t = 0; t < kTaps; ++t) total[t] += grad * LoadPart<A>(from[t] + ow, p.out_w - ow);
  }
  for (int t = 0; t < kTaps; ++t) sums[(tap + t) * p.out_channels()] += HorizontalSum<A>(total[t]);
}

template <class A, class X, class G>
void SumChannelsFirst(const Problem& p, const Axis& cols, int64_t group, int64_t first, int64_t last, int64_t channel, const X* x,
                      const G* g, A* sums) {
  const StagedColumns staged(cols, CeilDiv(p.out_w, kLanes<A>) * kLanes<A>);
  Buffer<A> rows(p.in_h * staged.row_size());
  int64_t staged_image = -1;
  for (int64_t row = first; row < last; ++row) {
    const GroupRow at(p, group, row);
    const X* plane = x + at.image * p.x.n + channel / p.multiplier * p.x.c;
    const G* grad = g + at.image * p.y.n + channel * p.y.c + at.out_row * p.y.h;
    if (staged_image != at.image) {
      const int64_t rows_left = Min(last - row, p.out_h - at.out_row);
      const int64_t low = Max(0, at.first);
      const int64_t high = Min(p.in_h, at.first + (rows_left - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1);
      for (int64_t r = low; r < high; ++r) staged.Fill(plane + r * p.x.h, p.in_w, rows.get() + r * staged.row_size());
      staged_image = at.image;
    }
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      const int64_t in_row = at.first + i * p.dilation_h;
      if (in_row < 0 || in_row >= p.in_h) continue;
      const A* from = rows.get() + in_row * staged.row_size();
      A* to = sums + i * p.kernel_w * p.out_channels() + channel;
      int64_t tap = 0;
      for (; tap + 4 <= p.kernel_w; tap += 4) SumStagedRow<A, G, 4>(p, cols, staged, tap, from, grad, to);
      for (; tap < p.kernel_w; ++tap) SumStagedRow<A, G, 1>(p, cols, staged, tap, from, grad, to);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------------------------

template <class A, class X, class G>
void RunGradFilter(const Problem& p, const void* x_data, const void* g_data, void* result, Parallel& parallel) {
  const X* x = static_cast<const X*>(x_data);
  const G* g = static_cast<const G*>(g_data);
  const Axis cols = Axis::Forward(p.kernel_w, p.stride_w, p.dilation_w, p.pad_left, p.out_w);
  const int64_t splits = Splits(p), rows = p.images_per_group() * p.out_h, size = p.filter_elements(), per_group = size / p.groups;
  Buffer<A> partial(splits * size);
  const int64_t channels = p.channels_last ? 1 : p.out_channels();
  ParallelFor(parallel, splits * p.groups * channels, 1, [&](int64_t task) {
    const int64_t channel = task % channels, group = task / channels % p.groups, split = task / channels / p.groups;
    const int64_t first = rows * split / splits, last = rows * (split + 1) / splits;
    A* sums = partial.get() + split * size + group * per_group;
    for (int64_t i = channel; i < per_group; i += channels) sums[i] = 0;
    if (p.channels_last) {
      SumChannelsLast<A>(p, cols, group, first, last, x, g, sums);
    } else {
      SumChannelsFirst<A>(p, cols, group, first, last, channel, x, g, sums);
    }
  });
  WithStorageType<A>(p.filter_dtype, [&](auto tag) {
    auto* to = static_cast<decltype(tag)*>(result);
    ForEachFilterElement(p, [&](int64_t at, int64_t offset) {
      A total = 0;
      for (int64_t split = 0; split < splits; ++split) total += partial.get()[split * size + at];
      StoreOne<A>(to + offset, total);
    });
  });
}

inline bool GradFilter(const Problem& p, const void* x, const void* y_cotangent, void* filter_cotangent, Parallel& parallel) {
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
