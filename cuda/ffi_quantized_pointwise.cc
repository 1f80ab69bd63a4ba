#include <cstdint>
#include <string>
#include <string_view>

#include "cuda/ffi_problem.h"
#include "cuda/handlers.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pointwise.h"

namespace dwsconv::cuda {

namespace ffi = xla::ffi;

constexpr int64_t kMostPixels = int64_t{1} << 30, kMostFeatures = int64_t{1} << 20;
constexpr int64_t kMostChannels = int64_t{1} << 15;  // for which no sum overflows

// x: (M, C); kernel: (C, F); residual: (M, F) or (0,): not there; y: (M, F); all of int8. scale: (F) of float32; bias:
// (F) or (0,) of int32; residual_scale: (F) of float32, or (0,) without a residual. Attributes: quantization, the zero
// points of residual and result and the limits, since, and where a plan is forced, tile.
static ffi::Error QuantizedPointwiseImpl(cudaStream_t stream, int32_t ordinal, ffi::Dictionary attrs, ffi::AnyBuffer x,
                                         ffi::AnyBuffer kernel, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                                         ffi::AnyBuffer residual, ffi::AnyBuffer residual_scale,
                                         ffi::Result<ffi::AnyBuffer> y) {
  const auto invalid = [](const std::string& what) {
    return ffi::Error::InvalidArgument("jax_dwsconv.quantized_pointwise: " + what);
  };
  const auto xd = x.dimensions(), kd = kernel.dimensions(), yd = y->dimensions();
  if (xd.size() != 2 || kd.size() != 2 || yd.size() != 2 || kd[0] != xd[1] || yd[0] != xd[0] || yd[1] != kd[1]) {
    return invalid("x must be (M, C), kernel (C, F) and the result (M, F)");
  }
  const std::string_view forced = ForcedTile(attrs);
  const auto numbers = attrs.get<ffi::Span<const int64_t>>("quantization");
  if (!numbers || numbers->size() != 4 || attrs.size() != (forced.empty() ? 2 : 3)) {
    return invalid("the attributes must be quantization, four integers, and since");
  }
  for (const int64_t number : *numbers) {
    if (number < -128 || number > 127) return invalid("quantization must be made of integers from -128 to 127");
  }
  for (const auto type : {x.element_type(), kernel.element_type(), residual.element_type(), y->element_type()}) {
    if (type != ffi::S8) return invalid("x, kernel, residual and the result must be of int8");
  }
  const auto is_vector = [&](const ffi::AnyBuffer& vector, ffi::DataType type, bool there) {
    const auto dims = vector.dimensions();
    return vector.element_type() == type && dims.size() == 1 && dims[0] == (there ? yd[1] : 0);
  };
  const auto rd = residual.dimensions();
  const bool adds = rd.size() == 2, has_bias = bias.element_count() != 0;
  if (adds ? rd[0] != yd[0] || rd[1] != yd[1] : rd.size() != 1 || rd[0] != 0) {
    return invalid("residual must be (M, F) or (0,)");
  }
  if (!is_vector(scale, ffi::F32, true) || !is_vector(bias, ffi::S32, has_bias) ||
      !is_vector(residual_scale, ffi::F32, adds)) {
    return invalid("scale and residual_scale must be (F) of float32, bias (F) or (0,) of int32");
  }
  if (xd[0] > kMostPixels || xd[1] > kMostChannels || yd[1] > kMostFeatures) {
    return invalid("there must be at most 2^30 pixels, 2^15 channels and 2^20 features");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  const auto device = DescribeDevice(ordinal);
  if (!device) return device.error();

  Requantization rounding;
  rounding.out_zero_point = static_cast<int32_t>((*numbers)[1]);
  rounding.low = static_cast<int32_t>((*numbers)[2]);
  rounding.high = static_cast<int32_t>((*numbers)[3]);
  PointwiseCall call{};
  call.problem = {1, xd[0], xd[1], yd[1], Dtype::kI8, false};
  call.requantization.scale = static_cast<const float*>(scale.untyped_data());
  if (has_bias) call.requantization.bias = static_cast<const int32_t*>(bias.untyped_data());
  if (adds) {
    call.requantization.residual = static_cast<const int8_t*>(residual.untyped_data());
    call.requantization.residual_scale = static_cast<const float*>(residual_scale.untyped_data());
  }
  call.requantization.residual_zero_point = static_cast<int>((*numbers)[0]);
  call.requantization.rounding = Rounding(rounding);
  call.source = x.untyped_data();
  call.kernel = kernel.untyped_data();
  call.result = y->untyped_data();
  call.stream = stream;
  const int64_t alignment = Alignment(call.kernel, call.result, call.requantization.residual);
  const PointwisePlan plan = PlanPointwise(call.problem, *device, Alignment(call.source) == 16 ? alignment : 0, forced);
  if (plan.kernel == PointwisePlan::Kernel::kNone) {
    return invalid(
        "needs compute capability 8.0 or newer, channels and features that are multiples of 8 (or of 16 and 4) and at "
        "least one, and buffers aligned to 16 bytes");
  }
  if (!forced.empty()) NoteForcedPlan(plan.Text());
  return FinishLaunch("quantized_pointwise", LaunchPointwise(call, plan, *device), stream);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(QuantizedPointwise, QuantizedPointwiseImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attrs()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace dwsconv::cuda
