// From the values in a MarchCall to the instance of the kernel that has them as template arguments.
#ifndef JAX_DWSCONV_CUDA_MARCH_LAUNCH_CUH_
#define JAX_DWSCONV_CUDA_MARCH_LAUNCH_CUH_

#include "cuda/dtypes.cuh"
#include "cuda/march.cuh"
#include "cuda/march.h"

namespace dwsconv::cuda {

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

// Calls visit(Int<kernel size>, Int<vector>, Int<columns>, Int<ahead>) for the tile of the call.
template <class Visit>
bool WithMarchTile(const MarchCall& call, const Visit& visit) {
#define DWSCONV_TRY(kVector, kColumns, kAhead)                                                     \
  if (call.tile.vector == kVector && call.tile.columns == kColumns && call.tile.ahead == kAhead) { \
    visit(kernel_size, Int<kVector>{}, Int<kColumns>{}, Int<kAhead>{});                            \
    return true;                                                                                   \
  }
  if (call.kernel_size == 3) {
    constexpr Int<3> kernel_size;
    DWSCONV_MARCH_TILES_3(DWSCONV_TRY)
  } else if (call.kernel_size == 5) {
    constexpr Int<5> kernel_size;
    DWSCONV_MARCH_TILES_5(DWSCONV_TRY)
  } else if (call.kernel_size == 7) {
    constexpr Int<7> kernel_size;
    DWSCONV_MARCH_TILES_7(DWSCONV_TRY)
  }
#undef DWSCONV_TRY
  return false;
}

template <class S, class R>
void LaunchMarchKernel(void (*kernel)(March, const S*, const void*, R*), const MarchCall& call) {
  const auto blocks = static_cast<unsigned>((call.march.threads + kMarchThreads - 1) / kMarchThreads);
  kernel<<<blocks, kMarchThreads, 0, call.stream>>>(call.march, static_cast<const S*>(call.source), call.filter,
                                                    static_cast<R*>(call.result));
}

// Calls launch(Type<source>, Type<result>) where the dtypes of the call are these.
template <class S, class R, class Launch>
bool IfDtypes(const MarchCall& call, Dtype source, Dtype result, const Launch& launch) {
  return call.source_dtype == source && call.result_dtype == result && launch(Type<S>{}, Type<R>{});
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_MARCH_LAUNCH_CUH_
