// The engine behind forward and grad_input: every result element gathers its taps.
#ifndef JAX_DWSCONV_CPU_GATHER_H_
#define JAX_DWSCONV_CPU_GATHER_H_

#include "cpu/filter.h"
#include "cpu/gather_channels_first.h"
#include "cpu/gather_channels_last.h"

namespace dwsconv::cpu::DWSCONV_ISA {

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
