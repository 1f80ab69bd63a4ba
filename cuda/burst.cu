#include <type_traits>

#include "cuda/burst.cuh"
#include "cuda/dtypes.cuh"

namespace dwsconv::cuda {
namespace {

template <class X, class Y, Pass kPass, int kK, int kVector, int kColumns, int kRows>
void Launch(const PassCall& call) {
  const Problem& p = call.problem;
  Burst m{DescribeCorrelation(call)};
  const auto [rows, columns] = DividedSize(m, kPass);
  const auto vectors = static_cast<uint32_t>(p.channels / kVector);
  const auto tiles = static_cast<uint32_t>(CeilDiv(columns, kColumns));
  m.channels_last = p.channels_last;
  m.fast = Divisor(p.channels_last ? vectors : tiles);
  m.threads = vectors * tiles;
  const dim3 blocks((m.threads + kBurstThreads - 1) / kBurstThreads, static_cast<unsigned>(CeilDiv(rows, kRows)),
                    static_cast<unsigned>(p.batch));
  BurstKernel<X, Y, kPass, kK, kVector, kColumns, kRows><<<blocks, kBurstThreads, 0, call.stream>>>(
      m, static_cast<const X*>(call.source), call.filter, static_cast<Y*>(call.result));
}

template <class X, class Y, Pass kPass>
bool LaunchTile(const PassCall& call, const BurstTile& tile) {
#define DWSCONV_TRY(kK, kVector, kColumns, kRows)                                               \
  {                                                                                             \
    constexpr BurstTile kTile{kVector, kColumns, kRows};                                        \
    if constexpr (HasBurstInstance(std::is_same_v<X, Y>, kPass == Pass::kStride2, kK, kTile)) { \
      if (call.problem.kernel_h == kK && tile == kTile) {                                       \
        Launch<X, Y, kPass, kK, kVector, kColumns, kRows>(call);                                \
        return true;                                                                            \
      }                                                                                         \
    }                                                                                           \
  }
  DWSCONV_BURST_TILES(DWSCONV_TRY)
#undef DWSCONV_TRY
  return false;
}

template <class X, class Y>
bool LaunchFor(const PassCall& call, const BurstTile& tile) {
  switch (PassOf(call.problem, call.forward)) {
    case Pass::kStride1: return LaunchTile<X, Y, Pass::kStride1>(call, tile);
    case Pass::kStride2:  // of two types, x is the narrower one
      if constexpr (sizeof(X) <= sizeof(Y)) return LaunchTile<X, Y, Pass::kStride2>(call, tile);
      break;
    case Pass::kStride2Gradient:
      if constexpr (sizeof(X) >= sizeof(Y)) return LaunchTile<X, Y, Pass::kStride2Gradient>(call, tile);
      break;
  }
  return false;
}

}  // namespace

bool LaunchBurst(const PassCall& call, const BurstTile& tile) {
  const Problem& p = call.problem;
  const Dtype from = call.forward ? p.x_dtype : p.y_dtype, to = call.forward ? p.y_dtype : p.x_dtype;
  const auto is = [&](Dtype x, Dtype y) { return from == x && to == y; };
  if (is(Dtype::kF32, Dtype::kF32)) return LaunchFor<float, float>(call, tile);
  if (is(Dtype::kBF16, Dtype::kBF16)) return LaunchFor<BFloat16, BFloat16>(call, tile);
  if (is(Dtype::kF16, Dtype::kF16)) return LaunchFor<Float16, Float16>(call, tile);
  if (is(Dtype::kBF16, Dtype::kF32)) return LaunchFor<BFloat16, float>(call, tile);
  if (is(Dtype::kF16, Dtype::kF32)) return LaunchFor<Float16, float>(call, tile);
  if (is(Dtype::kF32, Dtype::kBF16)) return LaunchFor<float, BFloat16>(call, tile);
  return is(Dtype::kF32, Dtype::kF16) && LaunchFor<float, Float16>(call, tile);
}

}  // namespace dwsconv::cuda
