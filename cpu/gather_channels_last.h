// NHWC: lanes along the channels.
#ifndef JAX_DWSCONV_CPU_GATHER_CHANNELS_LAST_H_
#define JAX_DWSCONV_CPU_GATHER_CHANNELS_LAST_H_

#include "cpu/gather_shared.h"
#include "cpu/parallel.h"

namespace dwsconv::cpu::DWSCONV_ISA {

// kColumns neighbouring results of one phase times one vector of channels, all taps inside the image.
template <class A, class S, class R, int kColumns>
DWSCONV_INLINE void InteriorTile(const Gather& g, const RowTaps<A, S>& taps, int64_t phase, int64_t q, int64_t c,
                                 R* result) {
  const int64_t column = g.cols.step() * g.source.w, start = q * column + c;
  Vec<A> sum[kColumns] = {};
  for (int64_t i = 0; i < taps.count(); ++i) {
    const S* source = taps.source(i) + start;
    const A* filter = taps.filter(i) + c;
    for (int64_t j = g.cols.begin(phase); j < g.cols.end(phase); ++j) {
      const Vec<A> weight = Load<A>(filter + g.cols.tap(j) * g.filter_pitch);
      const S* p = source + g.cols.offset(j) * g.source.w;
#pragma GCC unroll 16
      for (int t = 0; t < kColumns; ++t) sum[t] += weight * Load<A>(p + t * column);
    }
  }
  StoreColumns<A>(g, sum, kColumns, c, result);
}

// The same for one result at the border, where some taps fall outside.
template <class A, class S, class R>
void BorderTile(const Gather& g, const RowTaps<A, S>& taps, int64_t phase, int64_t q, int64_t c, R* result) {
  Vec<A> sum[1] = {};
  for (int64_t j = g.cols.begin(phase); j < g.cols.end(phase); ++j) {
    const int64_t column = q * g.cols.step() + g.cols.offset(j);
    if (column < 0 || column >= g.source_w) continue;
    for (int64_t i = 0; i < taps.count(); ++i) {
      sum[0] += Load<A>(taps.filter(i) + g.cols.tap(j) * g.filter_pitch + c) *
                Load<A>(taps.source(i) + column * g.source.w + c);
    }
  }
  StoreColumns<A>(g, sum, 1, c, result);
}

// The taps of one phase along the width, where they read neighbouring source columns: in the order of these.
class NeighbouringTaps {
 public:
  static constexpr int kMost = 7;

  NeighbouringTaps(const Gather& g, int64_t phase) : count_(g.cols.end(phase) - g.cols.begin(phase)) {
    if (count_ < 1 || count_ > kMost) return;
    const int64_t begin = g.cols.begin(phase), a = g.cols.offset(begin), b = g.cols.offset(begin + count_ - 1);
    first_ = Min(a, b);
    for (int64_t j = begin; j < begin + count_; ++j) {
      const int64_t place = g.cols.offset(j) - first_;
      if (place < 0 || place >= count_) return;  // dilated
      weights_[place] = g.cols.tap(j) * g.filter_pitch;
    }
    neighbours_ = count_ == 1 || Max(a, b) - first_ == count_ - 1;
  }
  bool AreNeighbours() const { return neighbours_; }
  int64_t count() const { return count_; }
  int64_t first() const { return first_; }                 // offset of the first column
  int64_t weight(int64_t j) const { return weights_[j]; }  // where its filter column is

 private:
  int64_t count_, first_ = 0, weights_[kMost];
  bool neighbours_ = false;
};

// Results of kRows rows and kColumns columns, as many as there are registers for. With few taps memory is the limit,
// and higher tiles read it less often.
template <int kTaps, int kStep>
struct Tile {
  static constexpr bool kManyRegisters = DWSCONV_VECTOR_BYTES == 64, kHigh = kTaps <= 3 || kStep > 1;
  static constexpr int kRows = kManyRegisters ? (kHigh ? 4 : 2) : (kTaps + kStep <= 4 ? 2 : 1);
  static constexpr int kColumns = kManyRegisters && !kHigh ? 8 : 4;
  static constexpr int kSources = (kColumns - 1) * kStep + kTaps;  // columns
};

// The results of a tile times one vector of channels; those in the first `count` columns exist. The source columns of a
// row are loaded once and serve all taps and all result rows; outside the image they are zero.
template <class A, class S, class R, int kTaps, int kStep, bool kInside>
DWSCONV_INLINE void ReusingTile(const Gather& g, const RowTaps<A, S>& taps, const NeighbouringTaps& columns,
                                int64_t first, int64_t c, int64_t count, R* result) {
  using T = Tile<kTaps, kStep>;
  Vec<A> sum[T::kRows][T::kColumns] = {};
  for (int64_t i = 0; i < taps.count(); ++i) {
    const S* source = taps.source(i) + first * g.source.w + c;
    Vec<A> in[T::kSources];
#pragma GCC unroll 32
    for (int u = 0; u < T::kSources; ++u) {
      const bool inside = kInside || static_cast<uint64_t>(first + u) < static_cast<uint64_t>(g.source_w);
      in[u] = inside ? Load<A>(source + u * g.source.w) : Vec<A>{};
    }
#pragma GCC unroll 4
    for (int r = 0; r < T::kRows; ++r) {
      const A* filter = taps.filter(i, r);
      if (filter == nullptr) continue;
#pragma GCC unroll 8
      for (int j = 0; j < kTaps; ++j) {
        const Vec<A> weight = Load<A>(filter + columns.weight(j) + c);
#pragma GCC unroll 8
        for (int t = 0; t < T::kColumns; ++t) sum[r][t] += weight * in[t * kStep + j];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < T::kRows; ++r) {
    if (r < taps.rows()) StoreColumns<A>(g, sum[r], count, c, result + r * g.rows.phases() * g.result.h);
  }
}

// Brings into the cache what the tile below this one reads for the first time, and what it writes. A row of tiles is
// far too long a jump for the processor's own prefetching.
template <class A, class S, class R, int kTaps, int kStep>
DWSCONV_INLINE void PrefetchTileBelow(const Gather& g, const RowTaps<A, S>& taps, int64_t q, int64_t c,
                                      const R* result) {
  using T = Tile<kTaps, kStep>;
  if (taps.count() == 0) return;
  const S* source = taps.source(taps.count() - 1);
  for (int64_t r = 1; r <= taps.rows() * g.rows.step(); ++r) {
#pragma GCC unroll 16
    for (int t = 0; t < T::kColumns * kStep; ++t) {
      Prefetch<false>(source, r * g.source.h + (q * kStep + t) * g.source.w + c);
    }
  }
  for (int64_t r = taps.rows(); r < 2 * taps.rows(); ++r) {
#pragma GCC unroll 16
    for (int t = 0; t < T::kColumns; ++t) {
      Prefetch<true>(result, r * g.rows.phases() * g.result.h + t * g.cols.phases() * g.result.w + c);
    }
  }
}

template <class A, class S, class R, int kTaps, int kStep>
void ReusingRows(const Gather& g, const RowTaps<A, S>& taps, const NeighbouringTaps& columns, int64_t results, R* row) {
  using T = Tile<kTaps, kStep>;
  constexpr int64_t kVector = kLanes<A>;
  const int64_t channels = g.result_channels;
  const bool prefetch = g.images * (g.source.n * sizeof(S) + g.result.n * sizeof(R)) > kCachedBytes;
  for (int64_t q = 0; q < results; q += T::kColumns) {
    R* result = row + q * g.cols.phases() * g.result.w;
    const int64_t first = q * kStep + columns.first(), count = Min(T::kColumns, results - q);
    const bool inside = first >= 0 && first + T::kSources <= g.source_w;
    for (int64_t c = 0; c < channels; c += kVector) {
      const int64_t start = Min(c, channels - kVector);  // the last vector overlaps its neighbour
      if (prefetch) PrefetchTileBelow<A, S, R, kTaps, kStep>(g, taps, q, start, result);
      if (kInsideApart<S> && inside) {
        ReusingTile<A, S, R, kTaps, kStep, true>(g, taps, columns, first, start, count, result);
      } else {
        ReusingTile<A, S, R, kTaps, kStep, false>(g, taps, columns, first, start, count, result);
      }
    }
  }
}

// Calls visit(taps, step), both as constants, and returns true where there is a tile for them.
template <class Visit>
DWSCONV_INLINE bool WithTile(int64_t taps, int64_t step, const Visit& visit) {
  const auto call = [&](auto taps_constant, auto step_constant) {
    visit(taps_constant, step_constant);
    return true;
  };
  switch (taps * 10 + step) {
    case 11: return call(Constant<1>{}, Constant<1>{});
    case 21: return call(Constant<2>{}, Constant<1>{});
    case 31: return call(Constant<3>{}, Constant<1>{});
    case 41: return call(Constant<4>{}, Constant<1>{});
    case 51: return call(Constant<5>{}, Constant<1>{});
    case 71: return call(Constant<7>{}, Constant<1>{});
    case 32: return call(Constant<3>{}, Constant<2>{});
    case 52: return call(Constant<5>{}, Constant<2>{});
    case 72: return call(Constant<7>{}, Constant<2>{});
    default: return false;
  }
}

// How many rows of one phase are computed at once: as many as the tiles of every phase along the width have.
inline int64_t RowsAtOnce(const Gather& g, bool vectors) {
  int64_t rows = vectors ? Min(RowTaps<float, float>::kMost, g.rows.results(0)) : 1;
  for (int64_t phase = 0; phase < g.cols.phases() && rows > 1; ++phase) {
    const NeighbouringTaps columns(g, phase);
    const bool found = columns.AreNeighbours() && WithTile(columns.count(), g.cols.step(), [&](auto taps, auto step) {
                         rows = Min(rows, Tile<taps.value, step.value>::kRows);
                       });
    if (!found) rows = 1;
  }
  return rows;
}

// Returns false where there is no tile.
template <class A, class S, class R>
bool TryReusingRows(const Gather& g, const RowTaps<A, S>& taps, int64_t phase, R* row) {
  const NeighbouringTaps columns(g, phase);
  return columns.AreNeighbours() && WithTile(columns.count(), g.cols.step(), [&](auto count, auto step) {
           ReusingRows<A, S, R, count.value, step.value>(g, taps, columns, g.cols.results(phase), row);
         });
}

// One result element, for channel multipliers and for fewer channels than lanes.
template <class A, class S, class R>
void OneElement(const Gather& g, const RowTaps<A, S>& taps, int64_t phase, int64_t q, int64_t c, R* result) {
  A sum = 0;
  for (int64_t j = g.cols.begin(phase); j < g.cols.end(phase); ++j) {
    const int64_t column = q * g.cols.step() + g.cols.offset(j);
    if (column < 0 || column >= g.source_w) continue;
    for (int64_t i = 0; i < taps.count(); ++i) {
      for (int64_t f = c * g.fold; f < (c + 1) * g.fold; ++f) {
        sum += taps.filter(i)[g.cols.tap(j) * g.filter_pitch + f] *
               LoadOne<A>(taps.source(i) + column * g.source.w + f / g.spread);
      }
    }
  }
  if (g.epilogue) {
    StoreFinishedRow<A>(g, &sum, 1, c, result + c);
  } else {
    StoreOne<A>(result + c, sum);
  }
}

// The rows of `taps`, which are more than one only where there are tiles for every phase.
template <class A, class S, class R>
void GatherRows(const Gather& g, const RowTaps<A, S>& taps, bool vectors, R* row) {
  constexpr int kColumns = 8;
  constexpr int64_t kVector = kLanes<A>;
  const int64_t channels = g.result_channels;
  for (int64_t phase = 0; phase < g.cols.phases(); ++phase) {
    const int64_t count = g.cols.results(phase);
    if (vectors && TryReusingRows<A>(g, taps, phase, row + phase * g.result.w)) continue;
    int64_t low = 0, high = count;
    for (int64_t j = g.cols.begin(phase); j < g.cols.end(phase); ++j) {
      int64_t from, to;
      g.cols.ValidResults(j, g.source_w, count, &from, &to);
      low = Max(low, from);
      high = Min(high, to);
    }
    for (int64_t q = 0; q < count;) {
      R* result = row + (q * g.cols.phases() + phase) * g.result.w;
      const bool tile = vectors && q >= low && q + kColumns <= high;
      if (!vectors) {
        for (int64_t c = 0; c < channels; ++c) OneElement<A>(g, taps, phase, q, c, result);
      } else {
        for (int64_t c = 0; c < channels; c += kVector) {
          const int64_t start = Min(c, channels - kVector);  // the last vector overlaps its neighbour
          if (tile) {
            InteriorTile<A, S, R, kColumns>(g, taps, phase, q, start, result);
          } else if (q >= low && q < high) {
            InteriorTile<A, S, R, 1>(g, taps, phase, q, start, result);
          } else {
            BorderTile<A>(g, taps, phase, q, start, result);
          }
        }
      }
      q += tile ? kColumns : 1;
    }
  }
}

template <class A, class S, class R>
void GatherChannelsLast(const Gather& g, const S* source, const A* filter, R* result, Parallel& parallel) {
  const int64_t per_group = g.images / g.groups, filter_size = g.kernel_h * g.kernel_w * g.filter_pitch;
  const bool vectors = g.spread == 1 && g.fold == 1 && g.result_channels >= kLanes<A>;
  const int64_t rows = RowsAtOnce(g, vectors), phases = g.rows.phases(), strips = CeilDiv(g.rows.results(0), rows);
  ParallelFor(parallel, g.images * strips, CeilDiv(kMacsPerTask, g.macs_per_row() * rows * phases), [&](int64_t task) {
    const int64_t image = task / strips, first = task % strips * rows;
    for (int64_t phase = 0; phase < phases; ++phase) {
      const int64_t row = first * phases + phase, count = Min(rows, g.rows.results(phase) - first);
      if (count < 1) continue;
      const RowTaps<A, S> taps(g, row, count, source + image * g.source.n, g.source.h,
                               filter + image / per_group * filter_size);
      GatherRows<A>(g, taps, vectors, result + image * g.result.n + row * g.result.h);
    }
  });
}

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_GATHER_CHANNELS_LAST_H_
