// What the two planners share: that of forward and grad_input (plan_passes.cc) and that of grad_filter
// (plan_grad_filter.cc).
#ifndef JAX_DWSCONV_CUDA_PLAN_COMMON_H_
#define JAX_DWSCONV_CUDA_PLAN_COMMON_H_

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/divisor.h"
#include "cuda/plan.h"

namespace dwsconv {

inline int64_t BytesOf(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64: return 8;
    case Dtype::kF32:
    case Dtype::kI32: return 4;
    case Dtype::kBF16:
    case Dtype::kF16: return 2;
    case Dtype::kI8: return 1;
  }
  return 0;
}

// The numbers with an x between them.
std::string Join(std::initializer_list<int> numbers);

// Neither dilated nor strided by more than the instances are; those with one row or column have stride 1.
bool UsualWindow(const Problem& p);

// NHWC has vectors of channels and reuses columns; in NCHW neighbouring threads have neighbouring columns, the narrower
// the tile, the fewer memory transactions.
bool SuitsLayout(const Problem& p, int vector, int columns);

// Whether 32 bits hold the indices in an image and in the filter, and all elements with a factor of two.
bool IndicesFit(const Problem& p);

// What a pass reads and writes: x and y for forward, the reverse for grad_input.
struct PassSizes {
  PassSizes(const Problem& p, bool forward)
      : kernel_h(p.kernel_h),
        kernel_w(p.kernel_w),
        stride(p.stride_h),
        doubles(!forward && stride == 2),
        source_bytes(BytesOf(forward ? p.x_dtype : p.y_dtype)),
        result_bytes(BytesOf(forward ? p.y_dtype : p.x_dtype)),
        source_elements(forward ? p.x_elements() : p.y_elements()),
        result_elements(forward ? p.y_elements() : p.x_elements()),
        rows(forward ? p.out_h : p.in_h),
        columns(forward ? p.out_w : p.in_w) {
    if (doubles) {  // pairs of them, in padded coordinates: see march.cuh
      rows = CeilDiv(p.pad_top + rows, 2) - p.pad_top / 2;
      columns = CeilDiv(p.pad_left + columns, 2) - p.pad_left / 2;
    }
  }

  int64_t kernel_h, kernel_w, stride;
  bool doubles;
  int64_t source_bytes, result_bytes, source_elements, result_elements;
  int64_t rows, columns;
};

// Whether the kernels that march down the rows could take the problem, whatever their tiles.
bool MarchApplies(const Problem& p, bool forward);

PassPlan PlanFor(PassPlan::Kernel kernel, double cycles);

// Calls visit(rows) for the heights of strips worth trying: from the whole result down to one row.
template <class Visit>
void ForStripRows(int64_t rows, const Visit& visit) {
  int last = 0;
  for (int64_t strips = 1; strips <= rows; strips += 1 + strips / 4) {
    const int strip_rows = static_cast<int>(CeilDiv(rows, strips));
    if (strip_rows != last) visit(strip_rows);
    last = strip_rows;
  }
}

// The plans of one kernel of forward and grad_input, for PassCandidates (plan_staged.cc, plan_planes.cc,
// plan_small_planes.cc).
std::vector<PassPlan> StagedCandidates(const Problem& p, bool forward, const Device& device, int64_t alignment);
std::vector<PassPlan> PlanesCandidates(const Problem& p, bool forward, const Device& device, int64_t alignment);
std::vector<PassPlan> SmallPlanesCandidates(const Problem& p, const Device& device, int64_t alignment);

// The same for GradFilterCandidates (plan_tap_rows.cc, plan_tap_planes.cc).
std::vector<GradFilterPlan> TapRowsCandidates(const Problem& p, const Device& device, int64_t alignment,
                                              int64_t max_splits);
std::vector<GradFilterPlan> TapPlanesCandidates(const Problem& p, const Device& device, int64_t alignment,
                                                int64_t max_splits);

// Whether the blocks of all splits can be a cluster, whose size is portable up to eight; `others`: blocks of one split.
// Sixteen are for whole GPUs of data centres, and gain where there is a multiprocessor for each block.
inline bool OneLaunch(int64_t splits, int64_t others, const Device& device) {
  const bool takes_sixteen = device.shared_memory >= 200 * 1024 && device.multiprocessors >= 100;
  return splits == 1 || (device.capability >= 90 &&
                         (splits <= 8 || (splits == 16 && takes_sixteen && splits * others <= device.multiprocessors)));
}

// Where two blocks fit a multiprocessor, a cluster of sixteen needs no more of them than a portable one can have.
inline bool ClusterFits(int64_t splits, double resident_blocks) { return splits <= 8 || resident_blocks >= 2; }

// Bytes from row to row in shared memory, so that threads of a warp which read `together` bytes each in different rows,
// `step` rows apart, meet in no bank: an odd multiple of these bytes, where that can be had.
inline int64_t SpreadPitch(int64_t row, int64_t together, int64_t step) {
  if (together >= 128) return row;
  for (int64_t pitch = row; pitch < row + 128; pitch += 16) {
    if (step * pitch % (2 * together) == together) return pitch;
  }
  return row;
}

// All that is visited, and in the end `otherwise`, which takes everything.
template <class Plan, class VisitAll>
std::vector<Plan> Candidates(const Plan& otherwise, const VisitAll& visit_all) {
  std::vector<Plan> candidates;
  visit_all([&](const Plan& plan) { candidates.push_back(plan); });
  candidates.push_back(otherwise);
  return candidates;
}

// The one with the text `forced`, else the one with the least estimate, else `otherwise`.
template <class Plan, class VisitAll>
Plan Choose(std::string_view forced, const Plan& otherwise, const VisitAll& visit_all) {
  Plan best = otherwise, wanted = otherwise;
  bool has_best = false, has_wanted = !forced.empty() && forced == otherwise.Text();
  visit_all([&](const Plan& plan) {
    if (!has_best || plan.cycles < best.cycles) best = plan;
    has_best = true;
    if (!forced.empty() && plan.Text() == forced) {
      wanted = plan;
      has_wanted = true;
    }
  });
  return has_wanted ? wanted : best;
}

}  // namespace dwsconv

#endif  // JAX_DWSCONV_CUDA_PLAN_COMMON_H_
