// The filter as (group, row, column, output channel) in the accumulator dtype, converted or transposed only where
// needed.
#ifndef JAX_DWSCONV_CPU_FILTER_H_
#define JAX_DWSCONV_CPU_FILTER_H_

#include "cpu/simd.h"
#include "cuda/problem.h"

namespace dwsconv::cpu::DWSCONV_ISA {

inline int64_t FilterTaps(const Problem& p) { return p.groups * p.kernel_h * p.kernel_w; }

// Where, in the filter's own order, the channels of one of the FilterTaps begin.
DWSCONV_INLINE int64_t TapOffset(const Problem& p, int64_t tap) {
  const int64_t row = tap / p.kernel_w;
  return row / p.kernel_h * p.filter.n + row % p.kernel_h * p.filter.h + tap % p.kernel_w * p.filter.w;
}

// Calls visit(T{}) with the storage type T of a dtype whose accumulator is A.
template <class A, class Visit>
DWSCONV_INLINE void WithStorageType(Dtype dtype, const Visit& visit) {
  if constexpr (sizeof(A) == sizeof(float)) {
    if (dtype == Dtype::kBF16) return visit(BFloat16{});
    if (dtype == Dtype::kF16) return visit(Float16{});
  }
  visit(A{});
}

// Channels from one tap of the packed filter to the next. Taps that are a large power of two apart would push each
// other out of the cache.
inline int64_t FilterPitch(const Problem& p) { return p.out_channels() + (p.out_channels() % 256 == 0 ? 16 : 0); }

template <class A>
class PackedFilter {
 public:
  PackedFilter(const Problem& p, const void* filter)
      : as_is_(p.filter.c == 1 && (p.filter_dtype == Dtype::kF32 || p.filter_dtype == Dtype::kF64) &&
               FilterPitch(p) == p.out_channels()),
        filter_(static_cast<const A*>(filter)),
        packed_(as_is_ ? 0 : FilterTaps(p) * FilterPitch(p)) {
    if (as_is_) return;
    WithStorageType<A>(p.filter_dtype, [&](auto tag) {
      const auto* from = static_cast<const decltype(tag)*>(filter);
      for (int64_t tap = 0; tap < FilterTaps(p); ++tap) {
        const auto* channels = from + TapOffset(p, tap);
        A* to = packed_.get() + tap * FilterPitch(p);
        if (p.filter.c == 1) {
          for (int64_t c = 0; c < p.out_channels(); ++c) to[c] = LoadOne<A>(channels + c);
        } else {
          for (int64_t c = 0; c < p.out_channels(); ++c) to[c] = LoadOne<A>(channels + c * p.filter.c);
        }
      }
    });
  }
  const A* get() const { return as_is_ ? filter_ : packed_.get(); }

 private:
  bool as_is_;
  const A* filter_;
  Buffer<A> packed_;
};

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_FILTER_H_
