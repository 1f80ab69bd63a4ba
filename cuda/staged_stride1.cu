#include "cuda/staged_launch.cuh"

namespace dwsconv::cuda {

bool LaunchStagedStride1(const PassCall& call, const StagedTile& tile) {
  return LaunchStagedPass<Pass::kStride1>(call, tile);
}

bool LaunchStaged(const PassCall& call, const StagedTile& tile) {
  switch (PassOf(call.problem, call.forward)) {
    case Pass::kStride1: return LaunchStagedStride1(call, tile);
    case Pass::kStride2: return LaunchStagedStride2(call, tile);
    case Pass::kStride2Gradient: break;
  }
  return false;
}

}  // namespace dwsconv::cuda
