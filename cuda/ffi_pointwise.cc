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

constexpr int64_t kMostPixels = int64_t{1} << 30, kMostChannels = int64_t{1} << 20;

// x: (N, H, W, C); kernel: (C, F); scale, bias: (F) of float32; residual, y: (N, H, W, F); gate: (N, C). Of scale,
// bias, residual and gate any may be of shape (0,): not there. All others are of one type; float32 is multiplied as
// TF32. Attributes: activation, as for fused_forward, since, and where a plan is forced, tile.
static ffi::Error PointwiseImpl(cudaStream_t stream, int32_t ordinal, ffi::Dictionary attrs, ffi::AnyBuffer x,
                                ffi::AnyBuffer kernel, ffi::AnyBuffer scale, ffi::AnyBuffer bias,
                                ffi::AnyBuffer residual, ffi::AnyBuffer gate, ffi::Result<ffi::AnyBuffer> y) {
  const auto xd = x.dimensions(), kd = kernel.dimensions(), gd = gate.dimensions(), yd = y->dimensions();
  const auto invalid = [](const std::string& what) {
    return ffi::Error::InvalidArgument("jax_dwsconv.pointwise: " + what);
  };
  if (xd.size() != 4 || kd.size() != 2 || yd.size() != 4 || kd[0] != xd[3] || yd[0] != xd[0] || yd[1] != xd[1] ||
      yd[2] != xd[2] || yd[3] != kd[1]) {
    return invalid("x must be (N, H, W, C), kernel (C, F) and the result (N, H, W, F)");
  }
  const std::string_view forced = ForcedTile(attrs);
  if (attrs.size() != (forced.empty() ? 2 : 3)) return invalid("the attributes must be activation and since");
  const auto dtype = DtypeOf(x.element_type());
  for (const auto type : {kernel.element_type(), gate.element_type(), y->element_type()}) {
    if (type != x.element_type()) return invalid("x, kernel, gate and the result must be of one type");
  }
  const bool gated = gd.size() == 2 && gd[0] == xd[0] && gd[1] == xd[3];
  if (!gated && !(gd.size() == 1 && gd[0] == 0)) return invalid("gate must be (N, C) or (0,)");
  const auto epilogue = DecodeEpilogue("pointwise", yd[3], attrs, scale, bias, residual, *y);
  if (!epilogue) return epilogue.error();
  if (xd[0] * xd[1] * xd[2] > kMostPixels || xd[3] > kMostChannels || yd[3] > kMostChannels) {
    return invalid("there must be at most 2^30 pixels and 2^20 channels and features");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  if (dtype != Dtype::kF32 && dtype != Dtype::kBF16 && dtype != Dtype::kF16) {
    return FinishLaunch("pointwise", false, stream);
  }
  const auto device = DescribeDevice(ordinal);
  if (!device) return device.error();
  const PointwiseCall call{{xd[0], xd[1] * xd[2], xd[3], yd[3], *dtype, gated},
                           *epilogue,
                           {},
                           x.untyped_data(),
                           kernel.untyped_data(),
                           gated ? gate.untyped_data() : nullptr,
                           y->untyped_data(),
                           stream};
  const int64_t alignment = Alignment(call.kernel, call.result, epilogue->residual);
  const bool aligned = Alignment(call.source, call.gate) == 16;
  const PointwisePlan plan = PlanPointwise(call.problem, *device, aligned ? alignment : 0, forced);
  if (plan.kernel == PointwisePlan::Kernel::kNone) {
    return invalid(
        "needs compute capability 8.0 or newer, channels that are a multiple of 16 bytes and at least one, features of "
        "4, "
        "and buffers aligned to 16 bytes");
  }
  if (!forced.empty()) NoteForcedPlan(plan.Text());
  return FinishLaunch("pointwise", LaunchPointwise(call, plan, *device), stream);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(Pointwise, PointwiseImpl,
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
