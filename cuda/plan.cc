#include "cuda/plan.h"

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <utility>

#include "cuda/plan_common.h"

namespace dwsconv {

std::string Join(std::initializer_list<int> numbers) {
  std::string text;
  for (int number : numbers) text += (text.empty() ? "" : "x") + std::to_string(number);
  return text;
}

bool UsualWindow(const Problem& p) {
  const int64_t most = p.kernel_h == p.kernel_w ? 2 : 1;
  return p.stride_h == p.stride_w && p.stride_h <= most && p.dilation_h == 1 && p.dilation_w == 1;
}

bool IndicesFit(const Problem& p) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max(), kMostPadding = 1 << 20;
  return p.filter_elements() <= kMost && p.x.n <= kMost && p.y.n <= kMost && p.x_elements() <= 2 * kMost &&
         p.y_elements() <= 2 * kMost && std::max(std::abs(p.pad_top), std::abs(p.pad_left)) <= kMostPadding;
}

bool SuitsLayout(const Problem& p, int vector, int columns) {
  return p.channels_last ? vector * columns >= 4 || p.kernel_w == 1 : vector == 1;
}

int64_t ChannelLanes(const Problem& p, int64_t vector, int64_t most) {
  if (!p.channels_last) return 1;
  const int64_t vectors = p.channels / vector;
  int64_t lanes = std::min<int64_t>(vectors, most);
  while (vectors % lanes != 0) --lanes;
  return lanes;
}

bool CanTurn(const Problem& p) {
  return p.channels_last && p.in_h == 1 && p.out_h == 1 && p.kernel_h == 1 && p.pad_top == 0 && p.stride_w == 1;
}

Problem Turned(Problem p) {
  std::swap(p.in_h, p.in_w);
  std::swap(p.out_h, p.out_w);
  std::swap(p.kernel_h, p.kernel_w);
  p.stride_h = p.stride_w;  // the other axis has only one position
  p.dilation_h = std::exchange(p.dilation_w, 1);
  std::swap(p.pad_top, p.pad_left);
  std::swap(p.x.h, p.x.w);
  std::swap(p.y.h, p.y.w);
  std::swap(p.filter.h, p.filter.w);
  return p;
}

}  // namespace dwsconv
