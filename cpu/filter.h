// The filter as (group, row, column, output channel) in the accumulator dtype, converted or transposed only where
// needed.
#ifndef JAX_DWSCONV_CPU_FILTER_H_
#define JAX_DWSCONV_CPU_FILTER_H_

#include "cpu/simd.h"
#include "cuda/problem.h"

namespace dwsconv::cpu::DWSCONV_ISA {

// Calls visit(position in packed order, element offset in the filter's own order) for every tap.
template <class Visit>
DWSCONV_INLINE void ForEachTap(const Problem& p, const Visit& visit) {
  int64_t tap = 0;
  for (int64_t g = 0; g < p.groups; ++g) {
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      for (int64_t j = 0; j < p.kernel_w; ++j) visit(tap++, g * p.filter.n + i * p.filter.h + j * p.filter.w);
    }
  }
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
        packed_(as_is_ ? 0 : p.filter_elements() / p.out_channels() * FilterPitch(p)) {
    if (as_is_) return;
    WithStorageType<A>(p.filter_dtype, [&](auto tag) {
      const auto* from = static_cast<const decltype(tag)*>(filter);
      ForEachTap(p, [&](int64_t tap, int64_t offset) {
        A* to = packed_.get() + tap * FilterPitch(p);
        if (p.filter.c == 1) {
          for (int64_t c = 0; c < p.out_channels(); ++c) to[c] = LoadOne<A>(from + offset + c);
        } else {
          for (int64_t c = 0; c < p.out_channels(); ++c) to[c] = LoadOne<A>(from + offset + c * p.filter.c);
        }
      });
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
