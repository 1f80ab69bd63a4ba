// NCHW rows copied so that every tap reads contiguous vectors.
#ifndef JAX_DWSCONV_CPU_STAGED_COLUMNS_H_
#define JAX_DWSCONV_CPU_STAGED_COLUMNS_H_

#include "cpu/axis.h"

namespace dwsconv::cpu::DWSCONV_ISA {

// A staged row holds accumulators and has the padding written out. Usually its columns are sorted by their remainder
// modulo the step of the axis, and the taps share them. Where strides or dilations are so large that most of that would
// never be read, every tap has its own copy of the columns that it reads. There is room for `results` results of every
// phase.
class StagedColumns {
 public:
  StagedColumns(const Axis& cols, int64_t results)
      : cols_(cols),
        remainders_(Min(cols.step(), cols.max_offset() - cols.min_offset() + 1)),
        pitch_((cols.max_offset() - cols.min_offset()) / cols.step() + 1 + results),
        shared_(remainders_ <= 2 * cols.taps() * results / pitch_) {
    if (!shared_) pitch_ = results;
  }

  int64_t row_size() const { return (shared_ ? remainders_ : cols_.taps()) * pitch_; }

  template <class A, class S>
  void Fill(const S* row, int64_t width, A* staged) const {
    for (int64_t part = 0; part < (shared_ ? remainders_ : cols_.taps()); ++part) {
      const int64_t first = shared_ ? part + cols_.min_offset() : cols_.offset(part);
      for (int64_t k = 0; k < pitch_; ++k) {
        const int64_t column = k * cols_.step() + first;
        staged[part * pitch_ + k] = column >= 0 && column < width ? LoadOne<A>(row + column) : A(0);
      }
    }
  }

  // Where, in a staged row, tap i of the axis finds the source of result 0.
  int64_t At(int64_t i) const {
    const int64_t from = cols_.offset(i) - cols_.min_offset();
    return shared_ ? from % cols_.step() * pitch_ + from / cols_.step() : i * pitch_;
  }

 private:
  const Axis& cols_;
  int64_t remainders_, pitch_;
  bool shared_;
};

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_STAGED_COLUMNS_H_
