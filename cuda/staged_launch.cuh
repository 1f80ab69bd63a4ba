// From a tile to the instance of the kernel that has it as template arguments.
#ifndef JAX_DWSCONV_CUDA_STAGED_LAUNCH_CUH_
#define JAX_DWSCONV_CUDA_STAGED_LAUNCH_CUH_

#include "cuda/dtypes.cuh"
#include "cuda/dynamic_memory.h"
#include "cuda/staged.cuh"

namespace dwsconv::cuda {

template <class X, Pass kPass, int kK, int kVector, int kColumns, int kRows>
void LaunchStagedKernel(const PassCall& call, const StagedTile& tile) {
  const Problem& p = call.problem;
  const StagedShape shape(p, tile);
  Staged m{DescribeCorrelation(call)};
  const auto [rows, columns] = DividedSize(m, kPass);
  const auto divisor = [](int64_t value) { return Divisor(static_cast<uint32_t>(value)); };
  m.channels = static_cast<int>(p.channels);
  m.lanes = divisor(tile.lanes);
  m.tiles_down = divisor(tile.down);
  m.tiles_across = tile.across;
  m.channel_blocks = divisor(CeilDiv(p.channels, tile.lanes * kVector));
  m.column_blocks = divisor(CeilDiv(columns, kColumns * tile.across));
  m.row_blocks = divisor(CeilDiv(rows, kRows * tile.down));
  const auto threads = static_cast<unsigned>(tile.lanes * tile.across * tile.down);
  m.read = DescribeTile(shape.read_rows, shape.read_columns, shape.pitch, tile.lanes * kVector * sizeof(X), threads);
  const auto blocks =
      static_cast<unsigned>(p.batch * m.row_blocks.value * m.column_blocks.value * m.channel_blocks.value);
  const auto kernel = StagedKernel<X, kPass, kK, kVector, kColumns, kRows>;
  AllowDynamicMemory(kernel, shape.bytes);
  kernel<<<blocks, threads, shape.bytes, call.stream>>>(m, static_cast<const X*>(call.source), call.filter,
                                                        static_cast<X*>(call.result));
}

template <class X, Pass kPass>
bool LaunchStagedTile(const PassCall& call, const StagedTile& tile) {
#define DWSCONV_TRY(kK, kVector, kColumns, kRows)                                                                \
  if (call.problem.kernel_h == kK && tile.vector == kVector && tile.columns == kColumns && tile.rows == kRows) { \
    LaunchStagedKernel<X, kPass, kK, kVector, kColumns, kRows>(call, tile);                                      \
    return true;                                                                                                 \
  }
  DWSCONV_STAGED_TILES(DWSCONV_TRY)
#undef DWSCONV_TRY
  return false;
}

template <Pass kPass>
bool LaunchStagedPass(const PassCall& call, const StagedTile& tile) {
  return WithDtype(call.problem.x_dtype,
                   [&](auto type) { return LaunchStagedTile<typename decltype(type)::type, kPass>(call, tile); });
}

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_STAGED_LAUNCH_CUH_
