// The engine behind forward and grad_input: every result element gathers its taps.
#ifndef JAX_DWSCONV_CPU_GATHER_H_
#define JAX_DWSCONV_CPU_GATHER_H_

#include "cpu/axis.h"
#include "cpu/epilogue.h"
#include "cpu/filter.h"
#include "cpu/parallel.h"
#include "cpu/staged_columns.h"
#include "cpu/transposed.h"
#include "cuda/problem.h"

namespace dwsconv::cpu::DWSCONV_ISA {

constexpr int64_t kCachedBytes = 8 << 20;  // what is larger than this comes from memory
constexpr int64_t kMacsPerTask = 1 << 17;  // below this a task costs less than handing it to another thread

// result[c] sums, over f < fold, filter[c * fold + f] times source[(c * fold + f) / spread]. A convolution spreads each
// source channel over `multiplier` results; its input gradient folds them back.
struct Gather {
  int64_t images, groups;
  int64_t source_h, source_w, result_h, result_w;
  int64_t result_channels, spread, fold;
  int64_t kernel_h, kernel_w, filter_pitch;
  Strides source, result;
  bool channels_last;
  const Axis &rows, &cols;
  const Epilogue* epilogue = nullptr;  // of a convolution, for the results that begin at y
  const void* y = nullptr;

  int64_t filter_channels() const { return result_channels * fold; }
  int64_t macs_per_row() const {
    return result_w * filter_channels() * kernel_h * kernel_w / (rows.phases() * cols.phases()) + 1;
  }
};

// Some result rows of one phase: which source rows they read, in ascending order, and with which filter rows.
template <class A, class S>
class RowTaps {
 public:
  static constexpr int kMost = 4;  // result rows

  RowTaps(const Gather& g, int64_t row, int64_t rows, const S* plane, int64_t row_pitch, const A* filter)
      : rows_(rows), sources_(g.kernel_h * rows) {
    const int64_t phase = row % g.rows.phases(), q = row / g.rows.phases() * g.rows.step();
    for (int64_t i = g.rows.begin(phase); i < g.rows.end(phase); ++i) {
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t source_row = q + r * g.rows.step() + g.rows.offset(i);
        if (source_row < 0 || source_row >= g.source_h) continue;
        At(plane + source_row * row_pitch)->filter[r] = filter + g.rows.tap(i) * g.kernel_w * g.filter_pitch;
      }
    }
  }
  int64_t rows() const { return rows_; }
  int64_t count() const { return count_; }
  const S* source(int64_t i) const { return sources_.get()[i].row; }
  // The filter row that result row r multiplies with source row i, or null.
  const A* filter(int64_t i, int r = 0) const { return sources_.get()[i].filter[r]; }

 private:
  struct Source {
    const S* row;
    const A* filter[kMost];
  };
  Source* At(const S* row) {
    Source* sources = sources_.get();
    int64_t place = count_;
    while (place > 0 && sources[place - 1].row >= row) --place;
    if (place == count_ || sources[place].row != row) {
      for (int64_t i = count_++; i > place; --i) sources[i] = sources[i - 1];
      sources[place] = {row, {}};
    }
    return sources + place;
  }

  int64_t rows_, count_ = 0;
  Buffer<Source> sources_;
};

// ---- What follows the sums ----

// Results of a channel, next to one another in memory.
template <class A, class R>
__attribute__((noinline)) void StoreFinishedRow(const Gather& g, const A* sums, int64_t count, int64_t c, R* result) {
  constexpr int64_t kVector = kLanes<A>;
  const Epilogue& e = *g.epilogue;
  const A scale = e.scale ? static_cast<const A*>(e.scale)[c] : A(1);
  const A bias = e.bias ? static_cast<const A*>(e.bias)[c] : A(0);
  const R* residual = e.residual ? static_cast<const R*>(e.residual) + (result - static_cast<const R*>(g.y)) : nullptr;
  int64_t q = 0;
  for (; q + kVector <= count; q += kVector) {
    Vec<A> value = Load<A>(sums + q) * scale + bias;
    if (residual) value += Load<A>(residual + q);
    Store<A>(result + q, Activate<A>(e.activation, value));
  }
  if (q == count) return;
  Vec<A> value = LoadPart<A>(sums + q, count - q) * scale + bias;
  if (residual) value += LoadPart<A>(residual + q, count - q);
  StorePart<A>(result + q, Activate<A>(e.activation, value), count - q);
}

// Vectors of channels, of results that are `pitch` elements apart.
template <class A, class R>
__attribute__((noinline)) void StoreFinishedColumns(const Gather& g, const Vec<A>* sums, int64_t count, int64_t pitch,
                                                    int64_t c, R* result) {
  const Epilogue& e = *g.epilogue;
  const Vec<A> scale = e.scale ? Load<A>(static_cast<const A*>(e.scale) + c) : Vec<A>{} + A(1);
  const Vec<A> bias = e.bias ? Load<A>(static_cast<const A*>(e.bias) + c) : Vec<A>{};
  const R* residual = e.residual ? static_cast<const R*>(e.residual) + (result - static_cast<const R*>(g.y)) : nullptr;
  for (int64_t t = 0; t < count; ++t) {
    Vec<A> value = sums[t] * scale + bias;
    if (residual) value += Load<A>(residual + t * pitch);
    Store<A>(result + t * pitch, Activate<A>(e.activation, value));
  }
}

// The first `count` sums, those of neighbouring columns of one phase, go to result[c] and so on.
template <class A, class R, int kColumns>
DWSCONV_INLINE void StoreColumns(const Gather& g, const Vec<A> (&sum)[kColumns], int64_t count, int64_t c, R* result) {
  const int64_t pitch = g.cols.phases() * g.result.w;
  if (g.epilogue) {
    Vec<A> copy[kColumns];  // the sums themselves stay in registers
#pragma GCC unroll 16
    for (int t = 0; t < kColumns; ++t) copy[t] = sum[t];
    StoreFinishedColumns<A>(g, copy, count, pitch, c, result + c);
    return;
  }
#pragma GCC unroll 16
  for (int t = 0; t < kColumns; ++t) {
    if (t < count) Store<A>(result + t * pitch + c, sum[t]);
  }
}

// ---- NHWC: lanes along the channels ----

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

// ---- NCHW: lanes along W ----

// kVectors vectors of results, kept in registers over all taps of one source plane.
template <class A, int kVectors>
DWSCONV_INLINE void StripTile(const Gather& g, const RowTaps<A, A>& taps, const StagedColumns& staged, int64_t phase,
                              int64_t q, A* sum) {
  constexpr int kVector = kLanes<A>;
  Vec<A> total[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) total[v] = Load<A>(sum + q + v * kVector);
  for (int64_t i = 0; i < taps.count(); ++i) {
    for (int64_t j = g.cols.begin(phase); j < g.cols.end(phase); ++j) {
      const A weight = taps.filter(i)[g.cols.tap(j) * g.filter_pitch];
      const A* from = taps.source(i) + staged.At(j) + q;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[v] += weight * Load<A>(from + v * kVector);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) Store<A>(sum + q + v * kVector, total[v]);
}

// A strip of result rows of one plane.
template <class A, class S, class R>
void GatherStrip(const Gather& g, const S* image, const A* filter, int64_t channel, int64_t first, int64_t last,
                 R* plane) {
  constexpr int64_t kVector = kLanes<A>;
  const int64_t phases = g.cols.phases(), padded = CeilDiv(g.cols.results(0), kVector) * kVector;
  Buffer<A> sums((last - first) * phases * padded);
  for (int64_t i = 0; i < (last - first) * phases * padded; ++i) sums.get()[i] = 0;

  int64_t low, high;
  g.rows.SourceRange(first, last, g.source_h, &low, &high);
  const bool reads = high > low && g.cols.taps() > 0;
  const StagedColumns staged(g.cols, padded);
  Buffer<A> rows(reads ? (high - low) * staged.row_size() : 0);
  for (int64_t f = channel * g.fold; reads && f < (channel + 1) * g.fold; ++f) {
    const S* source = image + f / g.spread * g.source.c;
    for (int64_t row = low; row < high; ++row) {
      staged.Fill(source + row * g.source.h, g.source_w, rows.get() + (row - low) * staged.row_size());
    }
    for (int64_t row = first; row < last; ++row) {
      const RowTaps<A, A> taps(g, row, 1, rows.get() - low * staged.row_size(), staged.row_size(), filter + f);
      for (int64_t phase = 0; phase < phases; ++phase) {
        A* sum = sums.get() + ((row - first) * phases + phase) * padded;
        int64_t q = 0;
        for (; q + 4 * kVector <= padded; q += 4 * kVector) StripTile<A, 4>(g, taps, staged, phase, q, sum);
        for (; q < padded; q += kVector) StripTile<A, 1>(g, taps, staged, phase, q, sum);
      }
    }
  }
  for (int64_t row = first; row < last; ++row) {
    for (int64_t phase = 0; phase < phases; ++phase) {
      const A* sum = sums.get() + ((row - first) * phases + phase) * padded;
      R* to = plane + row * g.result.h + phase;
      if (g.epilogue) {
        StoreFinishedRow<A>(g, sum, g.cols.results(phase), channel, to);  // a convolution has one phase
        continue;
      }
      for (int64_t q = 0; q < g.cols.results(phase); ++q) StoreOne<A>(to + q * phases, sum[q]);
    }
  }
}

template <class A, class S, class R>
void GatherChannelsFirst(const Gather& g, const S* source, const A* filter, R* result, Parallel& parallel) {
  const int64_t per_group = g.images / g.groups, filter_size = g.kernel_h * g.kernel_w * g.filter_pitch;
  const int64_t strip = Min(g.result_h, Max(8, CeilDiv(kMacsPerTask * g.result_channels, g.macs_per_row())));
  const int64_t strips = CeilDiv(g.result_h, strip), strip_macs = strip * g.macs_per_row() / g.result_channels + 1;
  ParallelFor(parallel, g.images * g.result_channels * strips, CeilDiv(kMacsPerTask, strip_macs), [&](int64_t task) {
    const int64_t first = task % strips * strip, plane = task / strips;
    const int64_t channel = plane % g.result_channels, image = plane / g.result_channels;
    GatherStrip<A>(g, source + image * g.source.n, filter + image / per_group * filter_size, channel, first,
                   Min(g.result_h, first + strip), result + image * g.result.n + channel * g.result.c);
  });
}

// The same by way of NHWC; without a residual.
template <class A, class S, class R>
void GatherTransposed(const Gather& g, const S* source, const A* filter, R* result, Parallel& parallel) {
  const int64_t per_group = g.images / g.groups, filter_size = g.kernel_h * g.kernel_w * g.filter_pitch;
  const int64_t source_pixels = g.source_h * g.source_w, result_pixels = g.result_h * g.result_w;
  const ChannelBlocks<A> blocks(g.result_channels, Max(source_pixels, result_pixels));
  const int64_t macs = g.result_h * g.macs_per_row() / blocks.count + 1;
  ParallelFor(parallel, g.images * blocks.count, CeilDiv(kMacsPerTask, macs), [&](int64_t task) {
    const int64_t image = task / blocks.count, first = blocks.first(task % blocks.count);
    const int64_t channels = blocks.end(task % blocks.count) - first;
    Buffer<S> from(channels * source_pixels);
    Buffer<R> to(channels * result_pixels);
    Gather local = g;
    local.images = local.groups = 1;
    local.result_channels = channels;
    local.source = ChannelsLastStrides(g.source_h, g.source_w, channels);
    local.result = ChannelsLastStrides(g.result_h, g.result_w, channels);
    local.channels_last = true;
    Epilogue epilogue;
    if (g.epilogue) {
      epilogue = *g.epilogue;
      if (epilogue.scale) epilogue.scale = static_cast<const A*>(epilogue.scale) + first;
      if (epilogue.bias) epilogue.bias = static_cast<const A*>(epilogue.bias) + first;
      local.epilogue = &epilogue;
    }
    Serial serial;
    Transpose(source + image * g.source.n + first * g.source.c, channels, source_pixels, from.get());
    GatherChannelsLast<A>(local, from.get(), filter + image / per_group * filter_size + first, to.get(), serial);
    Transpose(to.get(), result_pixels, channels, result + image * g.result.n + first * g.result.c);
  });
}

template <class A, class S, class R>
void RunGather(const Problem& p, const Gather& g, const void* source, const void* filter, void* result,
               Parallel& parallel) {
  const PackedFilter<A> packed(p, filter);
  const S* from = static_cast<const S*>(source);
  R* to = static_cast<R*>(result);
  if (g.channels_last) {
    GatherChannelsLast<A>(g, from, packed.get(), to, parallel);
  } else if (ChannelBlocks<A>::Suit(p) && !(g.epilogue && g.epilogue->residual)) {
    GatherTransposed<A>(g, from, packed.get(), to, parallel);
  } else {
    GatherChannelsFirst<A>(g, from, packed.get(), to, parallel);
  }
}

// Calls RunGather for the dtypes of source and result, where there is an instance.
inline bool DispatchGather(const Problem& p, const Gather& g, Dtype source_dtype, Dtype result_dtype,
                           const void* source, const void* filter, void* result, Parallel& parallel) {
  const auto is = [&](Dtype s, Dtype r) { return source_dtype == s && result_dtype == r; };
  const auto run = [&](auto instance) {
    instance(p, g, source, filter, result, parallel);
    return true;
  };
  if ((source_dtype == Dtype::kF64) != (p.filter_dtype == Dtype::kF64)) return false;
  if (is(Dtype::kF32, Dtype::kF32)) return run(RunGather<float, float, float>);
  if (is(Dtype::kBF16, Dtype::kBF16)) return run(RunGather<float, BFloat16, BFloat16>);
  if (is(Dtype::kBF16, Dtype::kF32)) return run(RunGather<float, BFloat16, float>);
  if (is(Dtype::kF32, Dtype::kBF16)) return run(RunGather<float, float, BFloat16>);
  if (is(Dtype::kF16, Dtype::kF16)) return run(RunGather<float, Float16, Float16>);
  if (is(Dtype::kF16, Dtype::kF32)) return run(RunGather<float, Float16, float>);
  if (is(Dtype::kF32, Dtype::kF16)) return run(RunGather<float, float, Float16>);
  if (is(Dtype::kF64, Dtype::kF64)) return run(RunGather<double, double, double>);
  return false;
}

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_GATHER_H_
