// What both layouts of gather.h share: the problem, the taps of a row, and what follows the sums.
#ifndef JAX_DWSCONV_CPU_GATHER_SHARED_H_
#define JAX_DWSCONV_CPU_GATHER_SHARED_H_

#include "cpu/axis.h"
#include "cpu/epilogue.h"
#include "cuda/problem.h"

namespace dwsconv::cpu::DWSCONV_ISA {

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

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_GATHER_SHARED_H_
