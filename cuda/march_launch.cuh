// From the values in a MarchCall to the instance of the kernel that has them as template arguments.
#ifndef JAX_DWSCONV_CUDA_MARCH_LAUNCH_CUH_
#define JAX_DWSCONV_CUDA_MARCH_LAUNCH_CUH_

#include <type_traits>

#include "cuda/dtypes.cuh"
#include "cuda/march.cuh"
#include "cuda/march.h"

namespace dwsconv::cuda {

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

// Calls visit(Int<kernel_h>, Int<kernel_w>, Int<vector>, Int<columns>, Int<ahead>) for the tile of the call; it returns
// whether it has such an instance.
template <class Visit>
bool WithMarchTile(const MarchCall& call, const Visit& visit) {
  const Problem& p = call.pass.problem;
#define DWSCONV_TRY(kH, kW, kVector, kColumns, kAhead)                                                        \
  if (p.kernel_h == kH && p.kernel_w == kW && call.tile.vector == kVector && call.tile.columns == kColumns && \
      call.tile.ahead == kAhead) {                                                                            \
    return visit(Int<kH>{}, Int<kW>{}, Int<kVector>{}, Int<kColumns>{}, Int<kAhead>{});                       \
  }
  DWSCONV_MARCH_TILES(DWSCONV_TRY)
#undef DWSCONV_TRY
  return false;
}

template <class S, class R, int kStride>
constexpr bool HasInstance(int kernel_h, int kernel_w, int vector, int columns) {
  return HasMarchInstance(std::is_same_v<S, R>, std::is_same_v<S, float>, kStride, kernel_h, kernel_w, vector, columns);
}

template <class S, class R>
void LaunchMarchKernel(void (*kernel)(March, const S*, const void*, R*), const MarchCall& call) {
  const auto blocks = static_cast<unsigned>((call.march.threads + kMarchThreads - 1) / kMarchThreads);
  const PassCall& pass = call.pass;
  kernel<<<blocks, kMarchThreads, 0, pass.stream>>>(call.march, static_cast<const S*>(pass.source), pass.filter,
                                                    static_cast<R*>(pass.result));
}

// Calls launch(Type<source>, Type<result>) where the dtypes of the call are these.
template <class S, class R, class Launch>
bool IfDtypes(const MarchCall& call, Dtype source, Dtype result, const Launch& launch) {
  const Problem& p = call.pass.problem;
  const bool forward = call.pass.forward;
  return source == (forward ? p.x_dtype : p.y_dtype) && result == (forward ? p.y_dtype : p.x_dtype) &&
         launch(Type<S>{}, Type<R>{});
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_MARCH_LAUNCH_CUH_
