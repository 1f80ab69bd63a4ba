// How a problem is divided among the multiprocessors. Pure functions of the problem and the device: no CUDA call.
#ifndef JAX_DWSCONV_CUDA_PLAN_H_
#define JAX_DWSCONV_CUDA_PLAN_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cuda/problem.h"

namespace dwsconv {

struct Device {
  int multiprocessors;
  int capability;          // 10 * major + minor
  int shared_memory;       // bytes of a multiprocessor
  int most_shared_memory;  // bytes that a block may have
};

// forward and grad_input of the usual kernels in NHWC (march.cuh): a thread has `vector` channels times `columns`
// columns of the result and marches down `rows` rows of them; it loads `ahead` rows before it needs them. In the input
// gradient of stride 2, columns and rows are those of g, with two of the result each.
struct MarchTile {
  int vector, columns, ahead, rows;
};

// forward and grad_input of 16-bit types in NHWC on tensor cores (toeplitz.cuh). A block has `channels` channels and 16
// marchers, each eight columns wide: `wide` of them side by side, the others in further segments, which are strips of
// `rows` rows of the result (in the input gradient of stride 2: pairs of rows) in any image. `kernel_size` is that of
// the instance, the filter may have fewer rows and columns.
struct ToeplitzTile {
  static constexpr int kColumns = 8;
  int kernel_size, channels, wide, rows;
};

// The (kernel_size, channels) that are compiled.
#define DWSCONV_TOEPLITZ_BLOCKS(M) M(3, 16) M(3, 32) M(5, 16) M(7, 16)

// The (kernel_h, kernel_w, vector, columns, ahead) that are compiled. Larger tiles reuse more, smaller ones make more
// threads. NCHW has vectors of one. Kernels of one row or column are for one spatial dimension, with stride 1.
// clang-format off
#define DWSCONV_MARCH_TILES(M) \
  M(3, 3, 2, 4, 2) M(3, 3, 2, 7, 2) M(3, 3, 4, 4, 2) M(3, 3, 1, 7, 2) M(3, 3, 1, 1, 4) \
  M(5, 5, 2, 4, 2) M(5, 5, 2, 7, 2) M(5, 5, 1, 7, 2) M(5, 5, 1, 1, 4) M(5, 5, 1, 2, 2) \
  M(7, 7, 2, 4, 2) M(7, 7, 1, 4, 2) M(7, 7, 1, 1, 2) M(7, 7, 1, 2, 2) \
  M(3, 1, 1, 1, 4) M(3, 1, 2, 1, 4) M(3, 1, 4, 1, 4) M(4, 1, 1, 1, 4) M(4, 1, 2, 1, 4) M(4, 1, 4, 1, 4) \
  M(5, 1, 1, 1, 4) M(5, 1, 2, 1, 4) M(5, 1, 4, 1, 4) \
  M(1, 3, 1, 1, 1) M(1, 3, 1, 4, 1) M(1, 4, 1, 1, 1) M(1, 4, 1, 4, 1) M(1, 5, 1, 1, 1) M(1, 5, 1, 4, 1)
// clang-format on

// Mixed types have the tiles that most layers take. Those of stride 2 that would not fit into the registers are left
// out.
constexpr bool HasMarchInstance(bool one_type, bool source_is_float, int stride, int kernel_h, int kernel_w, int vector,
                                int columns) {
  const bool usual = kernel_h == kernel_w && vector * columns >= 4;
  const bool too_large = stride == 2 && source_is_float && vector > 1 &&
                         (vector * columns == 16 || columns == 7 * (kernel_h > 3) || kernel_h == 7);
  return (one_type || usual) && (stride == 1 || kernel_h == kernel_w) && !too_large;
}

// The NCHW kernels of stride 1 (march_planes.cuh, toeplitz_planes.cuh) have this many rows of the source in shared
// memory at a time: one that is in use, the others on their way (from sm_80 on).
constexpr int kRingRows = 8;

// forward, and grad_input of stride 1, in NCHW (march_planes.cuh): a thread has `columns` columns and marches down
// `rows` rows of them.
struct MarchPlanesTile {
  int columns, rows;
};

// The (kernel size, columns) that are compiled.
#define DWSCONV_MARCH_PLANES_TILES(M) M(3, 4) M(3, 2) M(3, 8) M(5, 4) M(5, 2) M(7, 4) M(7, 2)

// forward, and grad_input of stride 1, of 16-bit types in NCHW on tensor cores (toeplitz_planes.cuh): a warp has 16
// marchers, each kColumns wide, in strips of `rows` rows of the result. It loads `access` neighbouring pixels at once
// (1: pairs of any alignment). `kernel_size` is that of the instance, the filter may have fewer rows and columns.
struct ToeplitzPlanesTile {
  static constexpr int kColumns = 8, kMarchers = 16, kPixels = 16;  // kPixels: read for kColumns results
  int kernel_size, access, rows;
};

// The (kernel_size, access) that are compiled.
// clang-format off
#define DWSCONV_TOEPLITZ_PLANES_TILES(M) M(3, 4) M(3, 2) M(3, 1) M(5, 4) M(5, 2) M(5, 1) M(7, 4) M(7, 2) M(7, 1)
// clang-format on

// How many columns before its first result a tile begins to read: at least the padding, and a multiple of `access`.
constexpr int ToeplitzPlanesMargin(int pad_left, int access) {
  return (pad_left >= 0 ? pad_left + access - 1 : pad_left) / access * access;
}

// forward and grad_input of stride 1 in NCHW where a plane is small (small_planes.cuh): a thread has `columns` columns
// of a plane, a block `warps` warps with as many planes of neighbouring channels as they hold, of `images` images.
struct SmallPlanesTile {
  int columns, warps, images;
};

constexpr int kSmallPlanesThreads = 128;  // at most

// The (kernel size, columns) that are compiled.
#define DWSCONV_SMALL_PLANES_TILES(M) M(3, 4) M(3, 7) M(5, 4) M(5, 7) M(7, 4) M(7, 7)

// What a block has of an image.
struct SmallPlanesShape {
  SmallPlanesShape(const Problem& p, const SmallPlanesTile& tile);

  int tiles;  // of a row
  int planes_per_warp, planes;
  int plane_bytes, buffer_bytes;
  int bytes;  // of shared memory
};

// How many bytes can be copied at once; fewer than four where the kernel does not apply.
int SmallPlanesChunk(const Problem& p, const SmallPlanesShape& shape, int64_t alignment);

// forward and grad_input of small problems (burst.cuh): a thread has `vector` channels of a tile of `columns` times
// `rows` results (in the input gradient of stride 2: pairs of rows and columns), and loads all that it needs at once.
struct BurstTile {
  int vector, columns, rows;

  friend bool operator==(const BurstTile& a, const BurstTile& b) {
    return a.vector == b.vector && a.columns == b.columns && a.rows == b.rows;
  }
};

// The (kernel size, vector, columns, rows) that are compiled. NCHW has vectors of one.
// clang-format off
#define DWSCONV_BURST_TILES(M) \
  M(3, 2, 4, 2) M(3, 4, 2, 2) M(3, 1, 2, 2) M(3, 1, 1, 4) \
  M(5, 2, 4, 2) M(5, 2, 2, 2) M(5, 1, 2, 2) M(5, 1, 1, 4) \
  M(7, 1, 4, 4) M(7, 1, 4, 2) M(7, 1, 1, 4)
// clang-format on

// Mixed types have the tile that most layers take. The largest does not fit into the registers with stride 2.
constexpr bool HasBurstInstance(bool one_type, bool strided, int kernel_size, const BurstTile& tile) {
  const bool usual = tile.vector * tile.columns * tile.rows == 16 && tile.columns == 4;
  return (one_type || usual) && !(strided && kernel_size == 7 && tile.columns * tile.rows == 16);
}

// forward, and grad_input of stride 1, in NHWC from shared memory (staged.cuh): a thread has `vector` channels of a
// tile of `columns` times `rows` results, a block `lanes` such vectors of channels and `across` times `down` tiles.
struct StagedTile {
  int vector, columns, rows, lanes, across, down;
};

constexpr int kStagedThreads = 512;  // at most

// The (kernel size, vector, columns, rows) that are compiled.
// clang-format off
#define DWSCONV_STAGED_TILES(M) \
  M(3, 2, 4, 2) M(3, 2, 7, 1) M(3, 2, 7, 2) \
  M(5, 2, 4, 1) M(5, 2, 7, 1) M(5, 2, 7, 2) M(5, 1, 7, 1) \
  M(7, 2, 4, 2) M(7, 2, 7, 1) M(7, 1, 7, 1) M(7, 1, 7, 2)
// clang-format on

// How the source of a block lies in shared memory.
struct StagedShape {
  StagedShape(const Problem& p, const StagedTile& tile);

  int read_rows, read_columns;
  int pitch;  // elements from row to row
  int bytes;  // with the taps, in float32
};

// forward and grad_input of nearly every window (slide.cuh): a thread has `vector`
// channels of kResults results along the height, else along the width.
struct SlideTile {
  static constexpr int kResults = 4;
  int vector;
  bool along_height;
};

// Along an axis, how many interleaved sequences of results there are in which the window moves on by one step of the
// source from one result to the next.
constexpr int64_t SlidePhases(int64_t stride, int64_t dilation, int64_t results, bool forward) {
  const int64_t phases = stride == 1 ? dilation : forward ? 1 : stride;
  return phases < results ? phases : results;
}

// forward and grad_input of one spatial dimension in NCW with stride 1 (lines.cuh): a thread has as many results
// as fit into this many bytes.
constexpr int kLinesBytes = 16;
constexpr int kLinesFewestTaps = 2, kLinesMostTaps = 7;

// Which kernel computes forward or grad_input, how it is divided, and how many cycles that should take.
struct PassPlan {
  enum class Kernel {
    kGather,  // takes everything and has no estimate
    kMarch,
    kMarchPlanes,
    kToeplitz,
    kToeplitzPlanes,
    kSmallPlanes,
    kStaged,
    kBurst,
    kSlide,
    kLines
  };
  Kernel kernel = Kernel::kGather;
  bool turned = false;  // the kernel is for Turned(problem)
  MarchTile march{};
  MarchPlanesTile march_planes{};
  ToeplitzTile toeplitz{};
  ToeplitzPlanesTile toeplitz_planes{};
  SmallPlanesTile small_planes{};
  StagedTile staged{};
  BurstTile burst{};
  SlideTile slide{};
  double cycles = 0;

  std::string Text() const;  // such as "march:2x4x2x28"
};

// How many neighbouring threads have neighbouring vectors of channels. NHWC: the most that divide the
// vectors evenly, so that none is idle. NCHW: one, neighbouring threads have neighbouring columns.
int64_t ChannelLanes(const Problem& p, int64_t vector, int64_t most = 32);

// Whether the problem has one spatial dimension, the width, in NHWC; and the same problem with that as its height,
// which is what a march goes along.
bool CanTurn(const Problem& p);
Problem Turned(Problem p);

// Everything that could be launched for forward, else grad_input. `alignment` is what the addresses of all
// operands and of the result are multiples of, in bytes.
std::vector<PassPlan> PassCandidates(const Problem& p, bool forward, const Device& device, int64_t alignment);

// The candidate with the text `forced`; where there is none, the one with the least estimate.
PassPlan PlanPass(const Problem& p, bool forward, const Device& device, int64_t alignment, std::string_view forced);

// The specialised kernel of grad_filter (tap_sums.cuh): a thread has `vector` channels and `columns` columns of g in
// strips of `rows` rows; `lanes` neighbouring threads have neighbouring channels. The sums come out in `splits` parts.
struct TapSumsTile {
  int vector, columns, rows, lanes, splits;
};

// The (kernel_h, kernel_w, vector, columns, rows ahead) that are compiled, like those of the march.
// clang-format off
#define DWSCONV_TAP_SUMS_TILES(M) \
  M(3, 3, 1, 4, 4) M(3, 3, 2, 4, 4) M(3, 3, 2, 7, 2) M(3, 3, 1, 1, 4) \
  M(5, 5, 1, 4, 2) M(5, 5, 2, 2, 2) M(5, 5, 2, 4, 2) M(5, 5, 1, 1, 4) \
  M(7, 7, 1, 4, 2) M(7, 7, 2, 2, 2) M(7, 7, 1, 1, 2) \
  M(3, 1, 1, 1, 4) M(3, 1, 2, 1, 4) M(4, 1, 1, 1, 4) M(4, 1, 2, 1, 4) M(5, 1, 1, 1, 4) M(5, 1, 2, 1, 4) \
  M(1, 3, 1, 1, 1) M(1, 3, 1, 4, 1) M(1, 4, 1, 1, 1) M(1, 4, 1, 4, 1) M(1, 5, 1, 1, 1) M(1, 5, 1, 4, 1)
// clang-format on

// grad_filter of 3x3, 5x5 and 7x7 in NHWC from shared memory (tap_rows.cuh): a thread has kVector channels of one row
// of the filter; a block `lanes` such vectors and as many walkers, which go along rows of g, kColumns at once. It adds
// up pieces of `rows` times `columns` of g; the sums come out in `splits` parts.
struct TapRowsTile {
  static constexpr int kVector = 2, kColumns = 7;
  int lanes, walkers, rows, columns, splits;
};

constexpr int kTapRowsThreads = 512;  // at most

// How x and g of a block lie in shared memory.
struct TapRowsShape {
  TapRowsShape(const Problem& p, const TapRowsTile& tile);

  int threads;
  int x_rows, x_columns, x_pitch, g_pitch;  // pitch: elements from row to row
  int bytes;
};

// The same in NCHW (tap_planes.cuh): a thread has one row of the filter for one of `planes` channels and one of the
// `walkers` of this channel, which go along rows of g, several columns at once. A block adds up pieces of `rows` rows
// of g; the sums come out in `splits` parts.
struct TapPlanesTile {
  int planes, walkers, rows, splits;
  int alignment;  // of x and g, in bytes
};

constexpr int kTapPlanesThreads = 512;  // at most

// How the rows of an image lie in shared memory.
struct RowsShape {
  int chunk;  // bytes that are copied at once
  int rows;   // of a channel; all of them exist
  int left;   // elements before the first row
  int pitch;  // elements from row to row
};

// How x and g of a block lie in shared memory: x with zeros between its rows.
struct TapPlanesShape {
  TapPlanesShape(const Problem& p, const TapPlanesTile& tile);

  int threads, columns;  // that a thread takes at once
  RowsShape x, g;
  int x_bytes, bytes;
};

// grad_filter of 16-bit types in NHWC on tensor cores (tap_products.cuh). A block has `chunks` times 8 channels with
// `walkers` warps each; a tile is a stretch of `columns` columns of `rows` rows of g in `images` images. The filter's
// rows and columns that fit depend on `sets`.
struct TapProductsTile {
  int sets, chunks, walkers, columns, rows, images, splits;
};

// The general kernel of grad_filter: the rows of g are cut into pieces. A block of kWarps warps sums kTapsPerThread
// neighbouring taps of one filter row over a part of the pieces, each piece apart so that no sum gets long.
struct GradFilterPieces {
  static constexpr int kTapsPerThread = 4;
  static constexpr int kWarps = 8;
  static constexpr int kLanes = 32;

  int64_t piece_width;  // columns of g in a piece; the last one of a row may have fewer
  int64_t pieces_per_row;
  int64_t pieces;         // of all rows of a group
  int64_t splits;         // parts into which these are divided
  int64_t tap_tiles;      // kernel_w / kTapsPerThread, rounded up
  int64_t channel_tiles;  // NHWC: of kLanes output channels, NCHW: of one
  int64_t blocks;
};

// The sums come in `splits` parts. Either the blocks of a cluster add them, or a second kernel does, both in order.
struct GradFilterPlan {
  enum class Kernel { kPieces, kTapSums, kTapRows, kTapPlanes, kTapProducts };
  Kernel kernel = Kernel::kPieces;
  bool turned = false;
  int64_t splits = 1;
  GradFilterPieces pieces{};
  TapSumsTile tap_sums{};
  TapRowsTile tap_rows{};
  TapPlanesTile tap_planes{};
  TapProductsTile tap_products{};
  bool one_launch = false;
  double cycles = 0;

  std::string Text() const;
};

// The same for grad_filter. max_splits: for how many parts the workspace has room. `alignment`: of x and g.
std::vector<GradFilterPlan> GradFilterCandidates(const Problem& p, const Device& device, int64_t alignment,
                                                 int64_t max_splits);
GradFilterPlan PlanGradFilter(const Problem& p, const Device& device, int64_t alignment, int64_t max_splits,
                              std::string_view forced);

}  // namespace dwsconv

#endif  // JAX_DWSCONV_CUDA_PLAN_H_
