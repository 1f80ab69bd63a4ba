// The taps of a convolution along one axis, seen from the side that is computed.
#ifndef JAX_DWSCONV_CPU_AXIS_H_
#define JAX_DWSCONV_CPU_AXIS_H_

#include "cpu/simd.h"

namespace dwsconv::cpu::DWSCONV_ISA {

// Result position p + q * phases gathers source positions q * step + offset over the taps of phase p. A convolution has
// one phase and step = stride; its input gradient has `stride` phases, between which the taps are divided, and step 1.
class Axis {
 public:
  static Axis Forward(int64_t kernel, int64_t stride, int64_t dilation, int64_t pad, int64_t size) {
    Axis axis(kernel, /*phases=*/1, /*step=*/stride, size);
    for (int64_t k = 0; k < kernel; ++k) axis.Push(k, k * dilation - pad);
    axis.begin_.get()[1] = kernel;
    return axis;
  }

  static Axis Transposed(int64_t kernel, int64_t stride, int64_t dilation, int64_t pad, int64_t size) {
    Axis axis(kernel, /*phases=*/Max(1, Min(stride, size)), /*step=*/1, size);
    for (int64_t p = 0; p < axis.phases_; ++p) {
      for (int64_t k = 0; k < kernel; ++k) {
        const int64_t reach = p + pad - k * dilation;
        if (reach % stride == 0) axis.Push(k, reach / stride);
      }
      axis.begin_.get()[p + 1] = axis.count_;
    }
    return axis;
  }

  int64_t phases() const { return phases_; }
  int64_t step() const { return step_; }
  int64_t begin(int64_t phase) const { return begin_.get()[phase]; }
  int64_t end(int64_t phase) const { return begin_.get()[phase + 1]; }
  int64_t tap(int64_t i) const { return tap_.get()[i]; }
  int64_t offset(int64_t i) const { return offset_.get()[i]; }
  int64_t results(int64_t phase) const { return phase < size_ ? CeilDiv(size_ - phase, phases_) : 0; }

  int64_t taps() const { return count_; }

  // The smallest and the largest offset of all taps; 0 where there are none.
  int64_t min_offset() const { return low_; }
  int64_t max_offset() const { return high_; }

  // The source positions [*low, *high) inside [0, source) that results [first, last) may read.
  void SourceRange(int64_t first, int64_t last, int64_t source, int64_t* low, int64_t* high) const {
    *low = Max(0, first / phases_ * step_ + low_);
    *high = count_ ? Min(source, (last - 1) / phases_ * step_ + high_ + 1) : 0;
  }

  // The q in [*low, *high) for which tap i reads inside a source of the given size.
  void ValidResults(int64_t i, int64_t source, int64_t count, int64_t* low, int64_t* high) const {
    *low = Min(count, offset(i) >= 0 ? 0 : CeilDiv(-offset(i), step_));
    *high = Max(*low, Min(count, offset(i) >= source ? 0 : (source - 1 - offset(i)) / step_ + 1));
  }

 private:
  Axis(int64_t kernel, int64_t phases, int64_t step, int64_t size)
      : phases_(phases), step_(step), size_(size), begin_(phases + 1), tap_(kernel), offset_(kernel) {
    begin_.get()[0] = 0;
  }
  void Push(int64_t tap, int64_t offset) {
    low_ = count_ ? Min(low_, offset) : offset;
    high_ = count_ ? Max(high_, offset) : offset;
    tap_.get()[count_] = tap;
    offset_.get()[count_++] = offset;
  }

  int64_t phases_, step_, size_, count_ = 0, low_ = 0, high_ = 0;
  Buffer<int64_t> begin_, tap_, offset_;
};

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_AXIS_H_
