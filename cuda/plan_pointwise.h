// How a pointwise convolution is divided among the multiprocessors of a GPU.
#ifndef JAX_DWSCONV_CUDA_PLAN_POINTWISE_H_
#define JAX_DWSCONV_CUDA_PLAN_POINTWISE_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/plan.h"

namespace dwsconv {

struct PointwiseProblem {
  int64_t images, pixels_per_image, channels, features;
  Dtype dtype;  // of all operands; int8 without a gate
  bool gated;

  int64_t pixels() const { return images * pixels_per_image; }
};

// For few pixels and features and many channels (pointwise_split.cuh): a block has kPixels pixels and eight times
// `features` features, and its kWarps warps divide the channels.
struct PointwiseSplit {
  static constexpr int kWarps = 8, kPixels = 16;
  int features;  // 4 or 8, with int8 4
};

// A tiled matrix product (pointwise_tiles.cuh): a block has `down` times `across` warps, each with 16 * row_tiles
// pixels and kFeatures features. It goes along the channels in chunks of `steps` products, of which `stages` are in
// shared memory, and from tile to tile of pixels. Where all chunks of the kernel fit, too, they stay.
struct PointwiseTile {
  static constexpr int kFeatures = 32;
  int row_tiles, down, across, steps, stages;

  DWSCONV_HOST_DEVICE constexpr int threads() const { return 32 * down * across; }
  DWSCONV_HOST_DEVICE constexpr int pixels() const { return 16 * row_tiles * down; }
  DWSCONV_HOST_DEVICE constexpr int features() const { return kFeatures * across; }
  DWSCONV_HOST_DEVICE constexpr int channels(int element_bytes) const {
    return 32 * steps / element_bytes;
  }  // of a chunk

  // What is copied at once: with int8, too, the channels and features of networks are multiples of it.
  static DWSCONV_HOST_DEVICE constexpr int piece_bytes(int element_bytes) { return element_bytes == 1 ? 8 : 16; }

  // In shared memory: bytes from row to row, which keep rows apart in its banks, and of a chunk with the gates of as
  // many images.
  DWSCONV_HOST_DEVICE constexpr int source_pitch() const { return 32 * steps + 16; }
  static DWSCONV_HOST_DEVICE constexpr int kernel_pitch(int element_bytes) { return kFeatures * element_bytes + 16; }
  DWSCONV_HOST_DEVICE constexpr int source_bytes(int gates) const { return (pixels() + gates) * source_pitch(); }
  DWSCONV_HOST_DEVICE constexpr int kernel_bytes(int element_bytes) const {
    return across * channels(element_bytes) * kernel_pitch(element_bytes);
  }
  // So many blocks fit the registers of a multiprocessor.
  DWSCONV_HOST_DEVICE constexpr int resident_blocks() const {
    return 65536 / ((row_tiles == 1 ? 72 : row_tiles == 2 ? 80 : 168) * threads());
  }
};

// The (row tiles, down, across, steps, stages) that are compiled.
#define DWSCONV_POINTWISE_TILES(M) M(1, 4, 1, 4, 3) M(1, 4, 1, 2, 2) M(4, 2, 2, 4, 2) M(2, 8, 1, 2, 2) M(2, 8, 1, 4, 3)

// How a problem is divided into such tiles.
struct PointwiseShape {
  PointwiseShape(const PointwiseProblem& p, const PointwiseTile& tile, const Device& device);

  int64_t pixel_tiles, feature_tiles;
  int gates;          // of how many images a tile has pixels; 0 without a gate
  int kernel_chunks;  // in shared memory: all, or as many as there are stages
  int bytes;          // of shared memory, with scale and bias
  int64_t down;       // blocks that share the tiles of pixels
};

struct PointwisePlan {
  enum class Kernel { kNone, kSplit, kTiles };
  Kernel kernel = Kernel::kNone;
  PointwiseSplit split{};
  PointwiseTile tile{};
  double cycles = 0;

  std::string Text() const;  // such as "pointwise_split:4" or "pointwise_tiles:1x4x1x4x3"
};

// Everything that could be launched, and the one with the text `forced`, else that with the least estimate; see
// PassCandidates. `alignment`: of all operands, in bytes. Of kind kNone where nothing takes the problem.
std::vector<PointwisePlan> PointwiseCandidates(const PointwiseProblem& p, const Device& device, int64_t alignment);
PointwisePlan PlanPointwise(const PointwiseProblem& p, const Device& device, int64_t alignment,
                            std::string_view forced);

}  // namespace dwsconv

#endif  // JAX_DWSCONV_CUDA_PLAN_POINTWISE_H_
