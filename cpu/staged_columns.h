// NCHW rows copied so that every tap reads contiguous vectors.
#ifndef JAX_DWSCONV_CPU_STAGED_COLUMNS_H_
#define JAX_DWSCONV_CPU_STAGED_COLUMNS_H_

#include "cpu/axis.h"

namespace dwsconv::cpu::DWSCONV_ISA {

// A staged row holds accumulators, has the padding written out, and has its columns sorted by their remainder modulo the step of
// the axis. There is room for `results` results of every phase.
class StagedColumns {
 public:
  StagedColumns(const Axis& cols, int64_t results)
      : step_(cols.step()), shift_(cols.min_offset()), pitch_((cols.max_offset() - shift_) / step_ + 1 + results) {}

  int64_t row_size() const { return step_ * pitch_; }

  template <class A, class S>
  void Fill(const S* row, int64_t width, A* staged) const {
    for (int64_t phase = 0; phase < step_; ++phase) {
      for (int64_t k = 0; k < pitch_; ++k) {
        const int64_t column = k * step_ + phase + shift_;
        staged[phase * pitch_ + k] = column >= 0 && column < width ? LoadOne<A>(row + column) : A(0);
      }
    }
  }

  // Where, in a staged row, the tap with this offset finds the source of result 0.
  int64_t At(int64_t offset) const { return (offset - shift_) % step_ * pitch_ + (offset - shift_) / step_; }

 private:
  int64_t step_, shift_, pitch_;
};

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_STAGED_COLUMNS_H_
