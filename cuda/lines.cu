#include <type_traits>

#include "cuda/lines.cuh"

namespace dwsconv::cuda {
namespace {

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls visit(Constant<i>) where i, between kFirst and kLast, is the value.
template <int kFirst, int kLast, class Visit>
void WithConstant(int value, const Visit& visit) {
  if (value == kFirst) {
    visit(Constant<kFirst>{});
  } else if constexpr (kFirst < kLast) {
    WithConstant<kFirst + 1, kLast>(value, visit);
  }
}

template <class T>
bool LaunchFor(const PassCall& call) {
  constexpr int kTile = kLinesBytes / static_cast<int>(sizeof(T));
  const Problem& p = call.problem;
  Lines m{DescribeCorrelation(call)};
  const auto tiles = static_cast<uint32_t>(m.result.w / kTile);
  m.tiles = Divisor(tiles);
  m.channels = Divisor(static_cast<uint32_t>(p.channels));
  m.threads = static_cast<uint32_t>(p.batch * p.channels * tiles);
  const int shift = ((-m.pad_left) % kTile + kTile) % kTile;
  m.first_vector = (-m.pad_left - shift) / kTile;
  const unsigned blocks = (m.threads + kLinesThreads - 1) / kLinesThreads;
  WithConstant<kLinesFewestTaps, kLinesMostTaps>(static_cast<int>(p.kernel_w), [&](auto taps) {
    WithConstant<0, kTile - 1>(shift, [&](auto shift) {
      LinesKernel<T, taps.value, shift.value><<<blocks, kLinesThreads, 0, call.stream>>>(
          m, static_cast<const T*>(call.source), call.filter, static_cast<T*>(call.result));
    });
  });
  return true;
}

}  // namespace

bool LaunchLines(const PassCall& call) {
  return WithDtype(call.problem.x_dtype, [&](auto type) { return LaunchFor<typename decltype(type)::type>(call); });
}

}  // namespace dwsconv::cuda
