#include "cuda/staged_launch.cuh"

namespace dwsconv::cuda {

bool LaunchStagedStride2(const PassCall& call, const StagedTile& tile) {
  return LaunchStagedPass<Pass::kStride2>(call, tile);
}

}  // namespace dwsconv::cuda
