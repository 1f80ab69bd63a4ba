// grad_filter: every filter tap sums x times g over all images and positions of its group.
#ifndef JAX_DWSCONV_CPU_GRAD_FILTER_H_
#define JAX_DWSCONV_CPU_GRAD_FILTER_H_

#include "cpu/axis.h"
#include "cpu/filter.h"
#include "cpu/staged_columns.h"
#include "cpu/transposed.h"

namespace dwsconv::cpu::DWSCONV_ISA {

constexpr int kTapsAtOnce = 8;  // tap sums of one filter row that stay in registers

// The rows of g are cut into pieces that are summed apart, so that no sum gets long. The pieces of each group are
// divided into parts that are added in order, and in NHWC the channels into blocks. All of that depends on the problem
// alone: the result does not depend on the threads.
template <class A>
struct Cut {
  explicit Cut(const Problem& p)
      : columns(kTermsPerSum * (p.channels_last ? 1 : kLanes<A>)),
        rows(p.channels_last ? Max(1, Min(p.out_h, kTermsPerSum / Max(1, p.out_w))) : 1),
        per_row(CeilDiv(p.out_w, columns)),
        per_image(CeilDiv(p.out_h, rows) * per_row),
        pieces(p.images_per_group() * per_image) {
    const int64_t terms = p.images_per_group() * p.out_h * p.out_w;
    parts = Max(1, Min(Min(pieces, kMostParts), terms / kTermsPerPart));
    const int64_t vectors = CeilDiv(p.out_channels(), kLanes<A>), taps = p.kernel_h * p.kernel_w;
    const int64_t large_enough = CeilDiv(terms / parts * p.out_channels() * taps, kMacsPerTask);
    const int64_t blocks = Min(CeilDiv(kTasks, parts * p.groups), Min(CeilDiv(vectors, 2), large_enough));
    channels = p.channels_last ? CeilDiv(vectors, Max(1, blocks)) * kLanes<A> : 1;
  }

  static constexpr int64_t kTermsPerSum = 128, kMostParts = 16, kTermsPerPart = 1024, kTasks = 16;
  int64_t columns, rows, per_row, per_image, pieces;  // columns and rows: of a piece
  int64_t parts;
  int64_t channels;  // of a block
};

// Rows [first_row, end_row) and columns [begin, end) of one image of g.
struct Piece {
  template <class A>
  Piece(const Problem& p, const Cut<A>& cut, int64_t group, int64_t index)
      : image(group * p.images_per_group() + index / cut.per_image),
        first_row(index % cut.per_image / cut.per_row * cut.rows),
        end_row(Min(first_row + cut.rows, p.out_h)),
        begin(index % cut.per_row * cut.columns),
        end(Min(begin + cut.columns, p.out_w)) {}

  int64_t image, first_row, end_row, begin, end;
};

// ---- NHWC: lanes along the channels ----

// The columns of the piece for which this tap is inside the image.
DWSCONV_INLINE void ValidColumns(const Problem& p, const Piece& piece, const Axis& cols, int64_t tap, int64_t* low,
                                 int64_t* high) {
  cols.ValidResults(tap, p.in_w, p.out_w, low, high);
  *low = Max(*low, piece.begin);
  *high = Max(*low, Min(*high, piece.end));
}

// Adds all but the first `skip` lanes. These are not written: they may be another task's.
template <class A>
DWSCONV_INLINE void AddToSums(Vec<A> value, int64_t skip, A* sums) {
  if (skip == 0) return Store<A>(sums, Load<A>(sums) + value);
  for (int64_t lane = skip; lane < kLanes<A>; ++lane) sums[lane] += value[lane];
}

// Adds the sum of x * g over a row of the piece to kTaps tap sums, for the columns on which all of these taps are
// inside the image, then the rest of each tap's columns one by one.
template <class A, class X, class G, int kTaps>
DWSCONV_INLINE void SumTaps(const Problem& p, const Piece& piece, const Axis& cols, int64_t tap, int64_t skip,
                            const X* x, const G* g, A* sums) {
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
    AddToSums<A>(total[t], skip, sums + t * p.out_channels());
  }
}

// How many filter rows times how many columns of g are taken at once: as many as there are registers for.
template <int kTaps, int kStep>
struct SumTile {
  static constexpr bool kManyRegisters = DWSCONV_VECTOR_BYTES == 64;
  static constexpr int kRows = kManyRegisters ? (kTaps <= 5 ? 3 : 2) : (kTaps <= 3 ? 2 : 1);
  static constexpr int kColumns = kManyRegisters ? 4 : 2;
  static constexpr int kSources = (kColumns - 1) * kStep + kTaps;  // columns of x
};

// Adds x * g of `count` columns of g and kRows rows of x (null: outside the image) to the tap sums. The columns of x,
// from `first`, are loaded once and serve all taps; outside the image they are zero.
template <class A, class X, class G, int kTaps, int kStep, bool kInside, class T = SumTile<kTaps, kStep>>
DWSCONV_INLINE void AddColumns(const Problem& p, const X* const (&x)[T::kRows], int64_t first, const G* g,
                               int64_t count, Vec<A> (&sums)[T::kRows][kTaps]) {
  Vec<A> grad[T::kColumns];
#pragma GCC unroll 8
  for (int t = 0; t < T::kColumns; ++t) grad[t] = kInside || t < count ? Load<A>(g + t * p.y.w) : Vec<A>{};
#pragma GCC unroll 8
  for (int r = 0; r < T::kRows; ++r) {
    if (x[r] == nullptr) continue;
    Vec<A> in[T::kSources];
#pragma GCC unroll 32
    for (int u = 0; u < T::kSources; ++u) {
      const bool inside = kInside || static_cast<uint64_t>(first + u) < static_cast<uint64_t>(p.in_w);
      in[u] = inside ? Load<A>(x[r] + (first + u) * p.x.w) : Vec<A>{};
    }
#pragma GCC unroll 8
    for (int t = 0; t < T::kColumns; ++t) {
      if (!kInside && t >= count) continue;  // zero times an infinity that is there would be NaN
#pragma GCC unroll 8
      for (int j = 0; j < kTaps; ++j) sums[r][j] += grad[t] * in[t * kStep + j];
    }
  }
}

// Adds the sums over a piece, for all filter rows and one vector of channels, to `to`; but not those of its first
// `skip` channels. x and g begin at the image and the channel.
template <class A, class X, class G, int kTaps, int kStep>
void SumTiles(const Problem& p, const Piece& piece, bool prefetch, int64_t skip, const X* x, const G* g, A* to) {
  using T = SumTile<kTaps, kStep>;
  const int64_t rows_ahead = piece.end_row - piece.first_row;
  for (int64_t i = 0; i < p.kernel_h; i += T::kRows) {
    Vec<A> sums[T::kRows][kTaps] = {};
    for (int64_t row = piece.first_row; row < piece.end_row; ++row) {
      const X* rows[T::kRows];
      for (int64_t r = 0; r < T::kRows; ++r) {
        const int64_t in_row = row * p.stride_h - p.pad_top + (i + r) * p.dilation_h;
        rows[r] = i + r < p.kernel_h && in_row >= 0 && in_row < p.in_h ? x + in_row * p.x.h : nullptr;
      }
      const int64_t last_row = row * p.stride_h - p.pad_top + (p.kernel_h - 1) * p.dilation_h;
      for (int64_t ow = piece.begin; ow < piece.end; ow += T::kColumns) {
        const int64_t first = ow * kStep - p.pad_left;
        if (prefetch && i == 0) {  // what the next piece reads for the first time
          for (int64_t r = 0; r < p.stride_h; ++r) {
#pragma GCC unroll 8
            for (int t = 0; t < T::kColumns * kStep; ++t) {
              Prefetch<false>(x, (last_row + rows_ahead * p.stride_h - r) * p.x.h + (ow * kStep + t) * p.x.w);
            }
          }
#pragma GCC unroll 8
          for (int t = 0; t < T::kColumns; ++t) Prefetch<false>(g, (row + rows_ahead) * p.y.h + (ow + t) * p.y.w);
        }
        const G* grad = g + row * p.y.h + ow * p.y.w;
        if (kInsideApart<X> && first >= 0 && first + T::kSources <= p.in_w && ow + T::kColumns <= piece.end) {
          AddColumns<A, X, G, kTaps, kStep, true>(p, rows, first, grad, T::kColumns, sums);
        } else {
          AddColumns<A, X, G, kTaps, kStep, false>(p, rows, first, grad, piece.end - ow, sums);
        }
      }
    }
    for (int64_t r = 0; r < T::kRows && i + r < p.kernel_h; ++r) {
#pragma GCC unroll 8
      for (int j = 0; j < kTaps; ++j) AddToSums<A>(sums[r][j], skip, to + ((i + r) * kTaps + j) * p.out_channels());
    }
  }
}

// The same where there is no tile.
template <class A, class X, class G>
void SumRows(const Problem& p, const Piece& piece, const Axis& cols, int64_t skip, const X* x, const G* g, A* to) {
  for (int64_t row = piece.first_row; row < piece.end_row; ++row) {
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      const int64_t in_row = row * p.stride_h - p.pad_top + i * p.dilation_h;
      if (in_row < 0 || in_row >= p.in_h) continue;
      const X* source = x + in_row * p.x.h;
      const G* grad = g + row * p.y.h;
      A* sums = to + i * p.kernel_w * p.out_channels();
      int64_t tap = 0;
      const auto sum = [&](auto count) {
        SumTaps<A, X, G, count.value>(p, piece, cols, tap, skip, source, grad, sums + tap * p.out_channels());
        tap += count.value;
      };
      while (tap + kTapsAtOnce <= p.kernel_w) sum(Constant<kTapsAtOnce>{});
      while (tap + 3 <= p.kernel_w) sum(Constant<3>{});
      while (tap < p.kernel_w) sum(Constant<1>{});
    }
  }
}

// One channel, for channel multipliers and for fewer channels than lanes.
template <class A, class X, class G>
void SumOneChannel(const Problem& p, const Piece& piece, const Axis& cols, const X* x, const G* g, A* to) {
  for (int64_t tap = 0; tap < p.kernel_h * p.kernel_w; ++tap) {
    int64_t low, high;
    ValidColumns(p, piece, cols, tap % p.kernel_w, &low, &high);
    for (int64_t row = piece.first_row; row < piece.end_row; ++row) {
      const int64_t in_row = row * p.stride_h - p.pad_top + tap / p.kernel_w * p.dilation_h;
      if (in_row < 0 || in_row >= p.in_h) continue;
      A total = 0;
      for (int64_t ow = low; ow < high; ++ow) {
        total += LoadOne<A>(g + row * p.y.h + ow * p.y.w) *
                 LoadOne<A>(x + in_row * p.x.h + (ow * p.stride_w + cols.offset(tap % p.kernel_w)) * p.x.w);
      }
      to[tap * p.out_channels()] += total;
    }
  }
}

// Adds pieces [first, last) of a group to the sums of a block of channels; sums has shape (kernel_h, kernel_w,
// out_channels).
template <class A, class X, class G>
void SumChannelsLast(const Problem& p, const Cut<A>& cut, const Axis& cols, int64_t group, int64_t first, int64_t last,
                     int64_t first_channel, const X* x, const G* g, A* sums) {
  constexpr int64_t kVector = kLanes<A>;
  const int64_t channels = p.out_channels(), end = Min(channels, first_channel + cut.channels);
  const bool prefetch = p.x_elements() * sizeof(X) + p.y_elements() * sizeof(G) > kCachedBytes;
  const int64_t tile = p.dilation_w == 1 ? p.kernel_w * 10 + p.stride_w : 0;
  for (int64_t index = first; index < last; ++index) {
    const Piece piece(p, cut, group, index);
    const X* image = x + piece.image * p.x.n;
    const G* grad = g + piece.image * p.y.n;
    if (p.multiplier > 1 || channels < kVector) {
      for (int64_t c = first_channel; c < end; ++c) {
        SumOneChannel<A>(p, piece, cols, image + c / p.multiplier, grad + c, sums + c);
      }
      continue;
    }
    for (int64_t c = first_channel; c < end; c += kVector) {
      const int64_t start = Min(c, channels - kVector);  // the last vector overlaps its neighbour
      const auto sum = [&](auto taps, auto step) {
        SumTiles<A, X, G, taps.value, step.value>(p, piece, prefetch, c - start, image + start, grad + start,
                                                  sums + start);
      };
      switch (tile) {
        case 31: sum(Constant<3>{}, Constant<1>{}); break;
        case 51: sum(Constant<5>{}, Constant<1>{}); break;
        case 71: sum(Constant<7>{}, Constant<1>{}); break;
        case 32: sum(Constant<3>{}, Constant<2>{}); break;
        case 52: sum(Constant<5>{}, Constant<2>{}); break;
        case 72: sum(Constant<7>{}, Constant<2>{}); break;
        default: SumRows<A>(p, piece, cols, c - start, image + start, grad + start, sums + start);
      }
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
    const G* grad = g + piece.image * p.y.n + channel * p.y.c + piece.first_row * p.y.h;
    const int64_t first_in_row = piece.first_row * p.stride_h - p.pad_top;
    if (piece.image != staged_image) staged_rows = 0;
    staged_image = piece.image;
    const int64_t end_row = Min(p.in_h, first_in_row + (p.kernel_h - 1) * p.dilation_h + 1);
    for (staged_rows = Max(staged_rows, first_in_row); staged_rows < end_row; ++staged_rows) {
      staged.Fill(plane + staged_rows * p.x.h, p.in_w, rows.get() + staged_rows * staged.row_size());
    }
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      const int64_t in_row = first_in_row + i * p.dilation_h;
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
void RunTransposedGradFilter(const Problem& p, const X* x, const G* g, void* result, Parallel& parallel);

template <class A, class X, class G>
void RunGradFilter(const Problem& p, const void* x_data, const void* g_data, void* result, Parallel& parallel) {
  if (!p.channels_last && ChannelBlocks<A>::Suit(p)) {
    return RunTransposedGradFilter<A>(p, static_cast<const X*>(x_data), static_cast<const G*>(g_data), result,
                                      parallel);
  }
  const X* x = static_cast<const X*>(x_data);
  const G* g = static_cast<const G*>(g_data);
  const Axis cols = Axis::Forward(p.kernel_w, p.stride_w, p.dilation_w, p.pad_left, p.out_w);
  const Cut<A> cut(p);
  const int64_t size = p.filter_elements(), per_group = size / p.groups, channels = p.out_channels();
  Buffer<A> partial(cut.parts * size);
  const int64_t blocks = CeilDiv(channels, cut.channels);
  const int64_t macs = p.batch * p.out_h * p.out_w * channels * p.kernel_h * p.kernel_w;
  const int64_t tasks = cut.parts * p.groups * blocks;
  ParallelFor(parallel, tasks, CeilDiv(kMacsPerTask, macs / tasks + 1), [&](int64_t task) {
    const int64_t block = task % blocks, group = task / blocks % p.groups, part = task / blocks / p.groups;
    const int64_t first = cut.pieces * part / cut.parts, last = cut.pieces * (part + 1) / cut.parts;
    const int64_t channel = block * cut.channels, end = Min(channels, channel + cut.channels);
    A* sums = partial.get() + part * size + group * per_group;
    for (int64_t tap = 0; tap < p.kernel_h * p.kernel_w; ++tap) {
      for (int64_t c = channel; c < end; ++c) sums[tap * channels + c] = 0;
    }
    if (p.channels_last) {
      SumChannelsLast<A>(p, cut, cols, group, first, last, channel, x, g, sums);
    } else {
      SumChannelsFirst<A>(p, cut, cols, group, first, last, channel, x, g, sums);
    }
  });
  WithStorageType<A>(p.filter_dtype, [&](auto tag) {
    auto* to = static_cast<decltype(tag)*>(result);
    ParallelFor(parallel, FilterTaps(p), CeilDiv(kMacsPerTask, cut.parts * channels), [&](int64_t tap) {
      A* total = partial.get() + tap * channels;
      for (int64_t part = 1; part < cut.parts; ++part) {
        for (int64_t c = 0; c < channels; ++c) total[c] += total[part * size + c];
      }
      for (int64_t c = 0; c < channels; ++c) StoreOne<A>(to + TapOffset(p, tap) + c * p.filter.c, total[c]);
    });
  });
}

// By way of NHWC: a task has some channels of one group, and adds up its images in order.
template <class A, class X, class G>
void RunTransposedGradFilter(const Problem& p, const X* x, const G* g, void* result, Parallel& parallel) {
  const int64_t x_pixels = p.in_h * p.in_w, g_pixels = p.out_h * p.out_w, taps = p.kernel_h * p.kernel_w;
  const ChannelBlocks<A> blocks(p.channels, Max(x_pixels, g_pixels));
  const int64_t macs = p.images_per_group() * g_pixels * blocks.size * taps + 1;
  ParallelFor(parallel, p.groups * blocks.count, CeilDiv(kMacsPerTask, macs), [&](int64_t task) {
    const int64_t group = task / blocks.count, first = blocks.first(task % blocks.count);
    const int64_t channels = blocks.end(task % blocks.count) - first;
    Problem local = p;
    local.batch = local.groups = 1;
    local.channels = channels;
    local.channels_last = true;
    local.x = ChannelsLastStrides(p.in_h, p.in_w, channels);
    local.y = ChannelsLastStrides(p.out_h, p.out_w, channels);
    local.filter = ChannelsLastStrides(p.kernel_h, p.kernel_w, channels);
    local.filter_dtype = sizeof(A) == sizeof(float) ? Dtype::kF32 : Dtype::kF64;
    Buffer<X> local_x(channels * x_pixels);
    Buffer<G> local_g(channels * g_pixels);
    Buffer<A> sums(taps * channels), total(taps * channels);
    for (int64_t i = 0; i < taps * channels; ++i) total.get()[i] = 0;
    Serial serial;
    for (int64_t image = group * p.images_per_group(); image < (group + 1) * p.images_per_group(); ++image) {
      Transpose(x + image * p.x.n + first * p.x.c, channels, x_pixels, local_x.get());
      Transpose(g + image * p.y.n + first * p.y.c, channels, g_pixels, local_g.get());
      RunGradFilter<A, X, G>(local, local_x.get(), local_g.get(), sums.get(), serial);
      for (int64_t i = 0; i < taps * channels; ++i) total.get()[i] += sums.get()[i];
    }
    WithStorageType<A>(p.filter_dtype, [&](auto tag) {
      auto* to = static_cast<decltype(tag)*>(result) + first * p.filter.c;
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t c = 0; c < channels; ++c) {
          StoreOne<A>(to + TapOffset(p, group * taps + tap) + c * p.filter.c, total.get()[tap * channels + c]);
        }
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
