// Decodes and checks an XLA FFI call frame into a Problem. Used by the CUDA and by the CPU handlers.
#ifndef JAX_DWSCONV_CUDA_FFI_PROBLEM_H_
#define JAX_DWSCONV_CUDA_FFI_PROBLEM_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "cuda/problem.h"
#include "xla/ffi/api/ffi.h"

namespace dwsconv {

// x: (N, H, W, C) or (N, C, H, W); y likewise with C * multiplier channels; filter: (G, kh, kw, C * multiplier) ("HWO")
// or (G, C * multiplier, kh, kw) ("OHW"). Attributes, all required:
//   strides int64[2], padding int64[4] (top, bottom, left, right), dilation int64[2],
//   layout "NHWC" or "NCHW", filter_layout "HWO" or "OHW",
//   since: the version of the package that introduced this list of attributes and operands.
// One may be there besides: see ForcedTile. `further_attributes` is how many more the operator itself requires.
// With `integers` the dtypes are int8, of y perhaps int32; else floating.
// `op` names the operator in error messages. Every size that a kernel reads is checked here.
xla::ffi::ErrorOr<Problem> DecodeProblem(std::string_view op, const xla::ffi::Dictionary& attrs,
                                         const xla::ffi::AnyBuffer& x, const xla::ffi::AnyBuffer& filter,
                                         const xla::ffi::AnyBuffer& y, std::size_t further_attributes = 0,
                                         bool integers = false);

// The epilogue of an operator whose result is y, with `channels` channels. scale, bias: (channels) of float32, of
// float64 where y is; residual: like y. An operand of shape (0,) is not there. One attribute: `activation`, "none",
// "relu", "relu6", "silu", "gelu" or "hard_swish".
xla::ffi::ErrorOr<Epilogue> DecodeEpilogue(std::string_view op, int64_t channels, const xla::ffi::Dictionary& attrs,
                                           const xla::ffi::AnyBuffer& scale, const xla::ffi::AnyBuffer& bias,
                                           const xla::ffi::AnyBuffer& residual, const xla::ffi::AnyBuffer& y);

// What follows the sums of quantized_forward. scale: (C * multiplier) of float32 where y is int8, (0,) where it is
// int32; bias: (C * multiplier) of int32, or (0,). One further attribute: `quantization` int64[4], the zero points of x
// and y and the limits of y.
xla::ffi::ErrorOr<Requantization> DecodeRequantization(const Problem& p, const xla::ffi::Dictionary& attrs,
                                                       const xla::ffi::AnyBuffer& scale,
                                                       const xla::ffi::AnyBuffer& bias);

std::optional<Dtype> DtypeOf(xla::ffi::DataType type);

// The attribute `tile`, for experiments: the text of the plan to be used where it is possible (cuda/plan.h). Empty
// where there is none; the CPU handlers ignore it.
std::string_view ForcedTile(const xla::ffi::Dictionary& attrs);

// The handler of versions of an operator that this package does not have yet: fails and names the version that has
// them.
XLA_FFI_DECLARE_HANDLER_SYMBOL(NeedsNewerVersion);

}  // namespace dwsconv

#endif  // JAX_DWSCONV_CUDA_FFI_PROBLEM_H_
