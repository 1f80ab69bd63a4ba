// What forward and grad_input have in common for the specialised kernels: a source is correlated with a filter.
#ifndef JAX_DWSCONV_CUDA_CORRELATION_H_
#define JAX_DWSCONV_CUDA_CORRELATION_H_

#include <cuda_runtime_api.h>

#include "cuda/divisor.h"
#include "cuda/epilogue.h"
#include "cuda/kernels.h"
#include "cuda/problem.h"

namespace dwsconv::cuda {

// The input gradient of stride 1 is the forward pass with the filter mirrored.
enum class Pass { kStride1, kStride2, kStride2Gradient };

inline Pass PassOf(const Problem& p, bool forward) {
  if (p.stride_h == 1) return Pass::kStride1;
  return forward ? Pass::kStride2 : Pass::kStride2Gradient;
}

// x or y: the sizes of an image, and the distances between neighbours.
struct Grid {
  int h, w;
  Strides step;
};

Grid InputGrid(const Problem& p);   // of x
Grid OutputGrid(const Problem& p);  // of y

// `source` is what is read (x, or g for grad_input), `result` what is written.
struct Correlation {
  Grid source, result;
  Strides filter;     // between the taps in the order of the source that they meet
  int64_t first_tap;  // where the first of them is
  Divisor images_per_group;
  int pad_top, pad_left;
  bool grouped;  // else one filter for all images
  bool filter_is_float;
  FusedEpilogue epilogue;
};

Correlation DescribeCorrelation(const PassCall& call);

// Rows and columns of the result that are divided among threads. In the input gradient of stride 2 they are pairs, in
// coordinates that include the padding: there the parity of a position decides which taps it has.
struct ResultSize {
  int64_t rows, columns;
};
ResultSize DividedSize(const Correlation& c, Pass pass);

}  // namespace dwsconv::cuda

#endif  // JAX_DWSCONV_CUDA_CORRELATION_H_
