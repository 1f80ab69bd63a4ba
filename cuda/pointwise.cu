#include "cuda/dtypes.cuh"
#include "cuda/pointwise.cuh"

namespace dwsconv::cuda {
namespace {

template <class T, int kFeatures>
void Launch(const PointwiseCall& call) {
  PointwiseTask m{};
  m.pixels = static_cast<int>(call.images * call.pixels_per_image);
  m.channels = static_cast<int>(call.channels);
  m.features = static_cast<int>(call.features);
  m.pixels_per_image = Divisor(static_cast<uint32_t>(call.pixels_per_image));
  m.gate = call.gate;
  m.epilogue = DescribeEpilogue(call.epilogue);
  const dim3 blocks(static_cast<unsigned>(CeilDiv(m.pixels, kPointwisePixels)),
                    static_cast<unsigned>(CeilDiv(m.features, 8 * kFeatures)));
  PointwiseKernel<T, kFeatures><<<blocks, 32 * kPointwiseWarps, 0, call.stream>>>(
      m, static_cast<const T*>(call.source), static_cast<const T*>(call.kernel), static_cast<T*>(call.result));
}

// Wide tiles where they occupy most multiprocessors: they read the pixels less often.
template <class T>
void LaunchFor(const PointwiseCall& call, int multiprocessors) {
  const int64_t pixel_tiles = CeilDiv(call.images * call.pixels_per_image, kPointwisePixels);
  const bool wide = call.features % 8 == 0 && 4 * pixel_tiles * CeilDiv(call.features, 64) >= 3 * multiprocessors;
  wide ? Launch<T, 8>(call) : Launch<T, 4>(call);
}

}  // namespace

bool LaunchPointwise(const PointwiseCall& call, int multiprocessors) {
  if (call.dtype == Dtype::kBF16) {
    LaunchFor<BFloat16>(call, multiprocessors);
  } else if (call.dtype == Dtype::kF16) {
    LaunchFor<Float16>(call, multiprocessors);
  } else {
    return false;
  }
  return true;
}

}  // namespace dwsconv::cuda
