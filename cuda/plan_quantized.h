// How an int8 convolution is divided among the multiprocessors of a GPU.
#ifndef JAX_DWSCONV_CUDA_PLAN_QUANTIZED_H_
#define JAX_DWSCONV_CUDA_PLAN_QUANTIZED_H_

#include <string>
#include <string_view>
#include <vector>

#include "cuda/plan.h"

namespace dwsconv {

// In NHWC: a thread has four channels times `columns` columns of the result and marches down `rows` rows of them; it
// loads `ahead` rows before it needs them (quantized.cuh), or all at once where `ahead` is 0 (quantized_burst.cuh).
struct QuantizedTile {
  static constexpr int kVector = 4;
  int kernel_h, kernel_w;  // of the instance, the filter may have fewer rows and columns
  int columns, ahead, rows;

  bool bursts() const { return ahead == 0; }
};

// The (kernel_h, kernel_w, columns, ahead) that are compiled. Those of one row are for one spatial dimension.
// clang-format off
#define DWSCONV_QUANTIZED_TILES(M) \
  M(3, 3, 8, 2) M(3, 3, 7, 2) M(3, 3, 4, 2) M(3, 3, 4, 4) M(3, 3, 2, 4) M(3, 3, 1, 4) \
  M(5, 5, 7, 2) M(5, 5, 4, 2) M(5, 5, 2, 2) M(5, 5, 2, 4) M(5, 5, 1, 4) \
  M(7, 7, 4, 2) M(7, 7, 2, 2) M(7, 7, 1, 4) \
  M(1, 3, 8, 1) M(1, 3, 2, 1) M(1, 5, 8, 1) M(1, 5, 2, 1)
// And the (kernel size, columns, rows) of those that load all at once.
#define DWSCONV_QUANTIZED_BURST_TILES(M) \
  M(3, 1, 2) M(3, 2, 2) M(3, 4, 2) M(5, 1, 2) M(5, 2, 2) M(5, 4, 1) M(7, 1, 2) M(7, 2, 2) M(7, 2, 1)
// clang-format on

// What does not fit into the registers is left out.
constexpr bool HasQuantizedInstance(int stride, int kernel_h, int columns, int ahead) {
  return stride == 1 || kernel_h == 1 || (ahead % 2 == 0 && columns <= 4 && kernel_h * columns <= 20);
}

struct QuantizedPlan {
  bool words = false;  // of four channels; else the general kernel
  QuantizedTile tile{};
  double cycles = 0;

  std::string Text() const;  // such as "quantized:4x2x28" or "quantized_burst:2x2"
};

// The problem as the march sees it: one spatial dimension has the same stride in both.
Problem Squared(Problem p);

// Everything that could be launched, and what is chosen; see PassCandidates and PlanPass.
std::vector<QuantizedPlan> QuantizedCandidates(const Problem& p, const Device& device, int64_t alignment);
QuantizedPlan PlanQuantized(const Problem& p, const Device& device, int64_t alignment, std::string_view forced);

}  // namespace dwsconv

#endif  // JAX_DWSCONV_CUDA_PLAN_QUANTIZED_H_
