#include "cuda/plan.h"

#include <algorithm>

namespace dwsconv {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

GradFilterPlan PlanGradFilter(const Problem& p, const Device& device, int64_t max_splits) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;  // 2048 threads
  constexpr int64_t kTermsPerSum = 64;
  GradFilterPlan plan{};
  plan.piece_width = p.channels_last ? kTermsPerSum : kTermsPerSum * GradFilterPlan::kLanes;
  plan.pieces_per_row = CeilDiv(p.out_w, plan.piece_width);
  plan.pieces = p.images_per_group() * p.out_h * plan.pieces_per_row;
  plan.tap_tiles = CeilDiv(p.kernel_w, GradFilterPlan::kTapsPerThread);
  plan.channel_tiles = p.channels_last ? CeilDiv(p.out_channels(), GradFilterPlan::kLanes) : p.out_channels();
  const int64_t blocks_per_split = p.groups * p.kernel_h * plan.tap_tiles * plan.channel_tiles;
  const int64_t wanted =
      CeilDiv(device.multiprocessors * kBlocksPerMultiprocessor, std::max<int64_t>(1, blocks_per_split));
  const int64_t useful = CeilDiv(plan.pieces, GradFilterPlan::kWarps);
  plan.splits = std::max<int64_t>(1, std::min({wanted, useful, max_splits}));
  plan.blocks = plan.splits * blocks_per_split;
  return plan;
}

}  // namespace dwsconv
