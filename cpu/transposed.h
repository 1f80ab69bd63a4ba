// NCHW by way of NHWC: where there are enough channels for a vector, a task transposes some channels of an image, works
// on them with lanes along the channels, and transposes the result. A row of 14 or 7 columns would leave most lanes
// idle.
#ifndef JAX_DWSCONV_CPU_TRANSPOSED_H_
#define JAX_DWSCONV_CPU_TRANSPOSED_H_

#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cuda/problem.h"

namespace dwsconv::cpu::DWSCONV_ISA {

// Blocks of channels, none of which has less than a vector.
template <class A>
struct ChannelBlocks {
  static constexpr int64_t kBytes = 32 << 10;  // of a block, where a vector has less

  static bool Suit(const Problem& p) { return p.multiplier == 1 && p.channels >= kLanes<A>; }

  ChannelBlocks(int64_t channels, int64_t pixels)
      : channels(channels),
        size(kLanes<A> * Max(1, Min(8, kBytes / (kLanes<A> * sizeof(A) * Max(1, pixels))))),
        count(Max(1, channels / size)) {}
  int64_t first(int64_t block) const { return block * size; }
  int64_t end(int64_t block) const { return block + 1 == count ? channels : (block + 1) * size; }

  int64_t channels, size, count;
};

// to[column][row] = from[row][column]
template <class T>
void Transpose(const T* from, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t kTile = 16;
  for (int64_t first_row = 0; first_row < rows; first_row += kTile) {
    const int64_t end_row = Min(rows, first_row + kTile);
    for (int64_t first = 0; first < columns; first += kTile) {
      const int64_t end = Min(columns, first + kTile);
      for (int64_t c = first; c < end; ++c) {
        for (int64_t r = first_row; r < end_row; ++r) to[c * rows + r] = from[r * columns + c];
      }
    }
  }
}

// Tasks inside of a task.
class Serial final : public Parallel {
 public:
  void Run(int64_t count, void (*task)(void* context, int64_t i), void* context) override {
    for (int64_t i = 0; i < count; ++i) task(context, i);
  }
};

inline Strides ChannelsLastStrides(int64_t height, int64_t width, int64_t channels) {
  return {height * width * channels, width * channels, channels, 1};
}

}  // namespace dwsconv::cpu::DWSCONV_ISA

#endif  // JAX_DWSCONV_CPU_TRANSPOSED_H_
