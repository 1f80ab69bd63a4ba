// NCHW by way of NHWC: where there are enough channels for a vector, a task transposes some channels of an image, works
// on them with lanes along the channels, and transposes the result. A row of 14 or 7 columns would leave most lanes
// idle.
#ifndef JAX_DWSCONV_CPU_TRANSPOSED_H_
#define JAX_DWSCONV_CPU_TRANSPOSED_H_

#include <type_traits>

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

#if DWSCONV_VECTOR_BYTES > 16
// to[j][i] = from[i][j] for 8 rows and columns, whose rows are `from_pitch` and `to_pitch` elements apart.
DWSCONV_INLINE void TransposeSquare(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
  __m256 a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(from + i * from_pitch);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_pitch, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_pitch, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}
#endif

// to[column][row] = from[row][column]
template <class T>
void Transpose(const T* from, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t kTile = 16;  // a cache line of floats
  for (int64_t first_row = 0; first_row < rows; first_row += kTile) {
    const int64_t end_row = Min(rows, first_row + kTile);
    for (int64_t first = 0; first < columns; first += kTile) {
      const int64_t end = Min(columns, first + kTile);
#if DWSCONV_VECTOR_BYTES > 16
      if constexpr (std::is_same_v<T, float>) {
        if (end_row - first_row == kTile && end - first == kTile) {
          for (int64_t c = first; c < end; c += 8) {
            for (int64_t r = first_row; r < end_row; r += 8) {
              TransposeSquare(from + r * columns + c, columns, to + c * rows + r, rows);
            }
          }
          continue;
        }
      }
#endif
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
