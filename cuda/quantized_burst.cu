#include "cuda/quantized_burst.cuh"

namespace dwsconv::cuda {
namespace {

template <class Y, int kK, int kS, int kTile, int kRows>
void Launch(const QuantizedCall& call, const QuantizedMarch& march) {
  const auto blocks = static_cast<unsigned>((march.threads + kMarchThreads - 1) / kMarchThreads);
  QuantizedBurstKernel<Y, kK, kS, kTile, kRows><<<blocks, kMarchThreads, 0, call.stream>>>(
      march, static_cast<const int8_t*>(call.x), static_cast<const int8_t*>(call.filter), static_cast<Y*>(call.y));
}

template <class Y>
bool LaunchTile(const QuantizedCall& call, const QuantizedMarch& march, const QuantizedTile& tile) {
#define DWSCONV_TRY(kK, kTile, kRows)                                         \
  if (tile.kernel_h == kK && tile.columns == kTile && tile.rows == kRows) {   \
    call.problem.stride_w == 1 ? Launch<Y, kK, 1, kTile, kRows>(call, march)  \
                               : Launch<Y, kK, 2, kTile, kRows>(call, march); \
    return true;                                                              \
  }
  DWSCONV_QUANTIZED_BURST_TILES(DWSCONV_TRY)
#undef DWSCONV_TRY
  return false;
}

}  // namespace

bool LaunchQuantizedBurst(const QuantizedCall& call, const QuantizedMarch& march, const QuantizedTile& tile) {
  return call.problem.y_dtype == Dtype::kI8 ? LaunchTile<int8_t>(call, march, tile)
                                            : LaunchTile<int32_t>(call, march, tile);
}

}  // namespace dwsconv::cuda
