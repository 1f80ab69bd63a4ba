// One plain struct that describes a depthwise convolution. The planner, the CUDA kernels and the CPU kernels all take
// it.
#ifndef JAX_DWSCONV_CUDA_PROBLEM_H_
#define JAX_DWSCONV_CUDA_PROBLEM_H_

#include <cstdint>

#ifdef __CUDACC__
#define DWSCONV_HOST_DEVICE __host__ __device__
#else
#define DWSCONV_HOST_DEVICE
#endif

namespace dwsconv {

enum class Dtype : uint8_t { kF32, kF64, kBF16, kF16, kI8, kI32 };

// Distance, in elements, between neighbours along each axis.
struct Strides {
  int64_t n, h, w, c;
};

// y[n, oh, ow, o] = sum over i, j of x[n, oh * stride_h + i * dilation_h - pad_top, ow * stride_w + j * dilation_w -
// pad_left, o / multiplier] * filter[n / (batch / groups), i, j, o]. The three operators differ only in which of x,
// filter and y they compute, so all of them are described by these fields, always named from the forward convolution's
// point of view.
struct Problem {
  int64_t batch;         // images in all groups together
  int64_t groups;        // image n uses filter n / (batch / groups)
  int64_t in_h, in_w;    // spatial size of x
  int64_t out_h, out_w;  // spatial size of y
  int64_t channels;      // of x
  int64_t multiplier;    // y has channels * multiplier channels
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t dilation_h, dilation_w;
  int64_t pad_top, pad_left;  // negative crops; the far pads follow from the sizes
  bool channels_last;         // x and y are NHWC, else NCHW

  Strides x, y;    // element strides of the activations
  Strides filter;  // n: group, h, w: tap, c: output channel. Serves HWIO and OIHW order without a transpose.

  Dtype x_dtype, filter_dtype, y_dtype;
  bool has_residual;  // see Epilogue

  DWSCONV_HOST_DEVICE int64_t out_channels() const { return channels * multiplier; }
  DWSCONV_HOST_DEVICE int64_t images_per_group() const { return batch / groups; }
  DWSCONV_HOST_DEVICE int64_t filter_elements() const { return groups * kernel_h * kernel_w * out_channels(); }
  DWSCONV_HOST_DEVICE int64_t x_elements() const { return batch * in_h * in_w * channels; }
  DWSCONV_HOST_DEVICE int64_t y_elements() const { return batch * out_h * out_w * out_channels(); }

  // Without a division in the usual case.
  DWSCONV_HOST_DEVICE int64_t group_of(int64_t image) const { return groups == 1 ? 0 : image / images_per_group(); }
  DWSCONV_HOST_DEVICE int64_t input_channel(int64_t out_channel) const {
    return multiplier == 1 ? out_channel : out_channel / multiplier;
  }
};

enum class Activation : uint8_t { kNone, kRelu, kRelu6, kSilu, kGelu, kHardSwish };

// What follows the sums of forward: y = activation(sum * scale + bias + residual), rounded once. Null: not there.
struct Epilogue {
  const void* scale = nullptr;                // (out_channels) of float, or of double where y is double
  const void* bias = nullptr;                 // the same
  const void* residual = nullptr;             // like y, of y's dtype
  Activation activation = Activation::kNone;  // kGelu is the tanh form

  bool empty() const { return !scale && !bias && !residual && activation == Activation::kNone; }
};

// What follows the int32 sums of x times the filter in quantized_forward, where x reads as its zero point outside the
// image: with s = sum - x_zero_point * sum of the filter + bias, y = s, or with a scale
// y = clamp(round(float(s) * scale) + out_zero_point, low, high), ties to even. int32 arithmetic wraps around.
struct Requantization {
  const float* scale = nullptr;   // (out_channels), null: y is int32
  const int32_t* bias = nullptr;  // (out_channels), null: not there
  int32_t x_zero_point = 0, out_zero_point = 0;
  int32_t low = -128, high = 127;
};

}  // namespace dwsconv

#endif  // JAX_DWSCONV_CUDA_PROBLEM_H_
