#include "cuda/quantized_launch.cuh"

namespace dwsconv::cuda {

bool LaunchQuantizedStride2(const QuantizedCall& call, const QuantizedMarch& march, const QuantizedTile& tile) {
  return LaunchQuantizedTile<2>(call, march, tile);
}

}  // namespace dwsconv::cuda
