#include "cuda/ffi_problem.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <string>

namespace dwsconv {
namespace {

namespace ffi = xla::ffi;
using Dims = ffi::Span<const int64_t>;

constexpr std::size_t kAttributeCount = 6;  // and perhaps a tile
constexpr int64_t kMaxWindow = std::numeric_limits<int32_t>::max();

std::string Show(Dims dims) {
  std::string text = "(";
  for (std::size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + ")";
}

ffi::Unexpected<ffi::Error> Invalid(std::string_view op, const std::string& what) {
  return ffi::Unexpected<ffi::Error>(ffi::Error::InvalidArgument("jax_dwsconv." + std::string(op) + ": " + what));
}

std::string NewerVersion(const ffi::Dictionary& attrs) {
  const auto since = attrs.get<std::string_view>("since");
  if (!since) return "this program was written for another version of jax-dwsconv";
  return "this program needs jax-dwsconv " + std::string(*since) + " or newer";
}

std::optional<Activation> ActivationOf(std::string_view name) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "relu6") return Activation::kRelu6;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "hard_swish") return Activation::kHardSwish;
  return std::nullopt;
}

bool AllWithin(Dims values, int64_t low, int64_t high) {
  for (int64_t value : values) {
    if (value < low || value > high) return false;
  }
  return true;
}

int64_t OutputSize(int64_t size, int64_t pad_low, int64_t pad_high, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t room = size + pad_low + pad_high - (dilation * (kernel - 1) + 1);
  return room < 0 ? 0 : room / stride + 1;
}

Strides ActivationStrides(const Dims& dims, bool channels_last) {
  if (channels_last) return {dims[1] * dims[2] * dims[3], dims[2] * dims[3], dims[3], 1};
  return {dims[1] * dims[2] * dims[3], dims[3], 1, dims[2] * dims[3]};
}

}  // namespace

std::optional<Dtype> DtypeOf(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return Dtype::kF32;
    case ffi::F64: return Dtype::kF64;
    case ffi::BF16: return Dtype::kBF16;
    case ffi::F16: return Dtype::kF16;
    case ffi::S8: return Dtype::kI8;
    case ffi::S32: return Dtype::kI32;
    default: return std::nullopt;
  }
}

std::string_view ForcedTile(const ffi::Dictionary& attrs) {
  const auto tile = attrs.get<std::string_view>("tile");
  return tile ? *tile : std::string_view();
}

ffi::ErrorOr<Problem> DecodeProblem(std::string_view op, const ffi::Dictionary& attrs, const ffi::AnyBuffer& x,
                                    const ffi::AnyBuffer& filter, const ffi::AnyBuffer& y,
                                    std::size_t further_attributes, bool integers) {
  const auto strides = attrs.get<Dims>("strides");
  const auto padding = attrs.get<Dims>("padding");
  const auto dilation = attrs.get<Dims>("dilation");
  const auto layout = attrs.get<std::string_view>("layout");
  const auto filter_layout = attrs.get<std::string_view>("filter_layout");
  if (!strides || !padding || !dilation || !layout || !filter_layout ||
      attrs.size() != kAttributeCount + further_attributes + (ForcedTile(attrs).empty() ? 0 : 1)) {
    return Invalid(op, "the attributes must be strides, padding, dilation, layout, filter_layout and since; " +
                           NewerVersion(attrs));
  }
  if (strides->size() != 2 || padding->size() != 4 || dilation->size() != 2 || !AllWithin(*strides, 1, kMaxWindow) ||
      !AllWithin(*padding, -kMaxWindow, kMaxWindow) || !AllWithin(*dilation, 1, kMaxWindow)) {
    return Invalid(op, "strides and dilation need two values of at least 1, padding four, all below 2^31");
  }
  const bool channels_last = *layout == "NHWC";
  const bool tap_major = *filter_layout == "HWO";
  if (!channels_last && *layout != "NCHW") return Invalid(op, "layout must be NHWC or NCHW");
  if (!tap_major && *filter_layout != "OHW") return Invalid(op, "filter_layout must be HWO or OHW");

  const Dims xd = x.dimensions(), fd = filter.dimensions(), yd = y.dimensions();
  const std::string shapes = "input " + Show(xd) + ", filter " + Show(fd) + ", output " + Show(yd);
  if (xd.size() != 4 || fd.size() != 4 || yd.size() != 4)
    return Invalid(op, "all operands must have rank 4: " + shapes);
  const auto x_dtype = DtypeOf(x.element_type()), filter_dtype = DtypeOf(filter.element_type()),
             y_dtype = DtypeOf(y.element_type());
  const auto is_integer = [](Dtype dtype) { return dtype == Dtype::kI8 || dtype == Dtype::kI32; };
  if (integers) {
    if (x_dtype != Dtype::kI8 || filter_dtype != Dtype::kI8 || !y_dtype || !is_integer(*y_dtype)) {
      return Invalid(op, "input and filter must be int8, the output int8 or int32");
    }
  } else if (!x_dtype || !filter_dtype || !y_dtype || is_integer(*x_dtype) || is_integer(*filter_dtype) ||
             is_integer(*y_dtype)) {
    return Invalid(op, "dtypes must be float32, float64, bfloat16 or float16");
  }

  const int h = channels_last ? 1 : 2, w = h + 1, c = channels_last ? 3 : 1;
  Problem p{};
  p.batch = xd[0];
  p.groups = fd[0];
  p.in_h = xd[h];
  p.in_w = xd[w];
  p.out_h = yd[h];
  p.out_w = yd[w];
  p.channels = xd[c];
  p.multiplier = xd[c] > 0 ? yd[c] / xd[c] : 1;
  p.kernel_h = tap_major ? fd[1] : fd[2];
  p.kernel_w = tap_major ? fd[2] : fd[3];
  p.stride_h = (*strides)[0];
  p.stride_w = (*strides)[1];
  p.dilation_h = (*dilation)[0];
  p.dilation_w = (*dilation)[1];
  p.pad_top = (*padding)[0];
  p.pad_left = (*padding)[2];
  p.channels_last = channels_last;
  p.x = ActivationStrides(xd, channels_last);
  p.y = ActivationStrides(yd, channels_last);
  const int64_t per_group = fd[1] * fd[2] * fd[3];
  p.filter = tap_major ? Strides{per_group, fd[2] * fd[3], fd[3], 1} : Strides{per_group, fd[3], 1, fd[2] * fd[3]};
  p.x_dtype = *x_dtype;
  p.filter_dtype = *filter_dtype;
  p.y_dtype = *y_dtype;

  const int64_t filter_channels = tap_major ? fd[3] : fd[1];
  const bool sizes_agree =
      yd[0] == p.batch && yd[c] == p.out_channels() && filter_channels == p.out_channels() && p.kernel_h >= 1 &&
      p.kernel_w >= 1 && p.kernel_h <= kMaxWindow && p.kernel_w <= kMaxWindow && p.groups >= 1 &&
      p.batch % p.groups == 0 &&
      p.out_h == OutputSize(p.in_h, (*padding)[0], (*padding)[1], p.kernel_h, p.stride_h, p.dilation_h) &&
      p.out_w == OutputSize(p.in_w, (*padding)[2], (*padding)[3], p.kernel_w, p.stride_w, p.dilation_w);
  if (!sizes_agree) return Invalid(op, "the sizes do not describe one convolution: " + shapes);
  return p;
}

ffi::ErrorOr<Epilogue> DecodeEpilogue(std::string_view op, int64_t channels, const ffi::Dictionary& attrs,
                                      const ffi::AnyBuffer& scale, const ffi::AnyBuffer& bias,
                                      const ffi::AnyBuffer& residual, const ffi::AnyBuffer& y) {
  const auto name = attrs.get<std::string_view>("activation");
  const auto activation = name ? ActivationOf(*name) : std::nullopt;
  if (!activation) {
    return Invalid(op, "activation must be one of none, relu, relu6, silu, gelu, hard_swish; " + NewerVersion(attrs));
  }
  const auto accumulator = y.element_type() == ffi::F64 ? ffi::F64 : ffi::F32;
  for (const auto* vector : {&scale, &bias}) {
    const Dims dims = vector->dimensions();
    if (dims.size() != 1 || (dims[0] != 0 && dims[0] != channels) || vector->element_type() != accumulator) {
      return Invalid(op, "scale and bias must be float32, or float64 where the output is, of shape (0,) or (" +
                             std::to_string(channels) + ",); got " + Show(dims));
    }
  }
  const Dims rd = residual.dimensions(), yd = y.dimensions();
  const bool like_y = std::equal(rd.begin(), rd.end(), yd.begin(), yd.end());
  if (!(like_y || (rd.size() == 1 && rd[0] == 0)) || residual.element_type() != y.element_type()) {
    return Invalid(op,
                   "residual must have the output's dtype and its shape " + Show(yd) + ", or (0,); got " + Show(rd));
  }
  const auto data = [](const ffi::AnyBuffer& buffer) {
    return buffer.element_count() == 0 ? nullptr : buffer.untyped_data();
  };
  return Epilogue{data(scale), data(bias), data(residual), *activation};
}

ffi::ErrorOr<Requantization> DecodeRequantization(const Problem& p, const ffi::Dictionary& attrs,
                                                  const ffi::AnyBuffer& scale, const ffi::AnyBuffer& bias) {
  constexpr std::string_view kOp = "quantized_forward";
  constexpr int64_t kMostTaps = 1 << 15;  // for which no sum overflows
  const auto numbers = attrs.get<Dims>("quantization");
  if (!numbers || numbers->size() != 4 || !AllWithin(*numbers, -128, 127)) {
    return Invalid(kOp, "quantization must be four integers from -128 to 127; " + NewerVersion(attrs));
  }
  if (p.kernel_h * p.kernel_w > kMostTaps) return Invalid(kOp, "the filter has too many taps");
  const auto fits = [&](const ffi::AnyBuffer& vector, ffi::DataType type, bool required, bool allowed) {
    const Dims dims = vector.dimensions();
    if (dims.size() != 1 || vector.element_type() != type) return false;
    return (allowed && dims[0] == p.out_channels()) || (!required && dims[0] == 0);
  };
  const bool requantizes = p.y_dtype == Dtype::kI8;
  if (!fits(scale, ffi::F32, requantizes, requantizes) || !fits(bias, ffi::S32, false, true)) {
    return Invalid(kOp, "scale (float32, for an int8 output) and bias (int32) must have shape (0,) or (" +
                            std::to_string(p.out_channels()) + ",); got " + Show(scale.dimensions()) + " and " +
                            Show(bias.dimensions()));
  }
  Requantization r;
  if (requantizes) r.scale = static_cast<const float*>(scale.untyped_data());
  if (bias.element_count() != 0) r.bias = static_cast<const int32_t*>(bias.untyped_data());
  r.x_zero_point = static_cast<int32_t>((*numbers)[0]);
  r.out_zero_point = static_cast<int32_t>((*numbers)[1]);
  r.low = static_cast<int32_t>((*numbers)[2]);
  r.high = static_cast<int32_t>((*numbers)[3]);
  return r;
}

static ffi::Error NeedsNewerVersionImpl(ffi::Dictionary attrs, ffi::RemainingArgs, ffi::RemainingRets) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "jax_dwsconv: " + NewerVersion(attrs));
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(NeedsNewerVersion, NeedsNewerVersionImpl,
                              ffi::Ffi::Bind().Attrs().RemainingArgs().RemainingRets());

}  // namespace dwsconv
