#include "cuda/march_launch.cuh"

namespace dwsconv::cuda {

// forward, and grad_input with the filter mirrored.
bool LaunchMarchStride1(const MarchCall& call) {
  const auto launch = [&](auto source, auto result) {
    using S = typename decltype(source)::type;
    using R = typename decltype(result)::type;
    return WithMarchTile(call, [&](auto h, auto w, auto vector, auto columns, auto ahead) {
      constexpr bool kHas = HasInstance<S, R, 1>(h.value, w.value, vector.value, columns.value);
      if constexpr (kHas) {
        LaunchMarchKernel(MarchKernel<S, R, h.value, w.value, 1, vector.value, columns.value, ahead.value>, call);
      }
      return kHas;
    });
  };
  return IfDtypes<float, float>(call, Dtype::kF32, Dtype::kF32, launch) ||
         IfDtypes<BFloat16, BFloat16>(call, Dtype::kBF16, Dtype::kBF16, launch) ||
         IfDtypes<BFloat16, float>(call, Dtype::kBF16, Dtype::kF32, launch) ||
         IfDtypes<float, BFloat16>(call, Dtype::kF32, Dtype::kBF16, launch) ||
         IfDtypes<Float16, Float16>(call, Dtype::kF16, Dtype::kF16, launch) ||
         IfDtypes<Float16, float>(call, Dtype::kF16, Dtype::kF32, launch) ||
         IfDtypes<float, Float16>(call, Dtype::kF32, Dtype::kF16, launch);
}

}  // namespace dwsconv::cuda
