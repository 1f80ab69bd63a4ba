#include <limits>
#include <string>

#include "cuda/ffi_problem.h"
#include "cuda/handlers.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/pointwise.h"

namespace dwsconv::cuda {

namespace ffi = xla::ffi;

// x: (N, H, W, C); kernel: (C, F); scale, bias: (F) of float32; residual, y: (N, H, W, F); gate: (N, C). Of scale,
// bias, residual and gate any may be of shape (0,): not there. All others are of one 16-bit type. Attributes:
// activation, as for fused_forward, and since.
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
  if (attrs.size() != 2) return invalid("the attributes must be activation and since");
  const auto dtype = DtypeOf(x.element_type());
  for (const auto type : {kernel.element_type(), gate.element_type(), y->element_type()}) {
    if (type != x.element_type()) return invalid("x, kernel, gate and the result must be of one type");
  }
  const bool gated = gd.size() == 2 && gd[0] == xd[0] && gd[1] == xd[3];
  if (!gated && !(gd.size() == 1 && gd[0] == 0)) return invalid("gate must be (N, C) or (0,)");
  const auto epilogue = DecodeEpilogue("pointwise", yd[3], attrs, scale, bias, residual, *y);
  if (!epilogue) return epilogue.error();
  if (xd[3] % 8 != 0 || yd[3] % 4 != 0 || xd[0] * xd[1] * xd[2] > std::numeric_limits<int32_t>::max() - 16 ||
      CeilDiv(yd[3], 32) > 65535) {
    return invalid("the channels must be a multiple of 8 and the features of 4, with fewer than 2^31 pixels");
  }
  if (y->element_count() == 0) return ffi::Error::Success();
  const auto device = DescribeDevice(ordinal);
  if (!device) return device.error();
  if (device->capability < 80) return invalid("needs code for compute capability 8.0 or newer");
  const void* const factors = gated ? gate.untyped_data() : nullptr;
  const int64_t of_features = Alignment(kernel.untyped_data(), y->untyped_data(), epilogue->residual);
  if (Alignment(x.untyped_data(), factors) < 16 || of_features < (yd[3] % 8 == 0 ? 16 : 8)) {
    return invalid("the buffers must be aligned to 16 bytes, those of features to 8 where they are no multiple of 8");
  }
  const bool launched =
      dtype && LaunchPointwise({xd[0], xd[1] * xd[2], xd[3], yd[3], *dtype, *epilogue, x.untyped_data(),
                                kernel.untyped_data(), factors, y->untyped_data(), stream},
                               device->multiprocessors);
  return FinishLaunch("pointwise", launched, stream);
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
