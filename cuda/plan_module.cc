// The planner for Python: to look at its choices and to test them, on any machine.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/plan.h"
#include "cuda/plan_pointwise.h"
#include "cuda/plan_quantized.h"

namespace nb = nanobind;

namespace dwsconv {
namespace {

using Pair = std::array<int64_t, 2>;
using Four = std::array<int64_t, 4>;
using Candidates = std::vector<std::pair<std::string, double>>;  // (text, estimated cycles)

constexpr int64_t kAlignment = 16;  // what XLA's buffers have, and more

int64_t OutputSize(int64_t size, int64_t pads, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t room = size + pads - dilation * (kernel - 1) - 1;
  return room < 0 ? 0 : room / stride + 1;
}

Dtype DtypeNamed(const std::string& name) {
  if (name == "float32") return Dtype::kF32;
  if (name == "bfloat16") return Dtype::kBF16;
  if (name == "float16") return Dtype::kF16;
  if (name == "int8") return Dtype::kI8;
  throw std::invalid_argument("dtype must be float32, bfloat16, float16 or int8, not " + name);
}

Strides Packed(const Four& shape, bool channels_last) {  // (N, H, W, C)
  const auto [n, h, w, c] = shape;
  if (channels_last) return {h * w * c, w * c, c, 1};
  return {h * w * c, w, 1, h * w};
}

// shape: (N, H, W, C) in either layout; padding: top, bottom, left, right.
Problem MakeProblem(Four shape, Pair kernel, Pair strides, Four padding, Pair dilation, const std::string& layout,
                    const std::string& dtype) {
  if (layout != "NHWC" && layout != "NCHW") throw std::invalid_argument("layout must be NHWC or NCHW, not " + layout);
  Problem p{};
  p.batch = shape[0];
  p.groups = 1;
  p.in_h = shape[1];
  p.in_w = shape[2];
  p.channels = shape[3];
  p.multiplier = 1;
  p.kernel_h = kernel[0];
  p.kernel_w = kernel[1];
  p.stride_h = strides[0];
  p.stride_w = strides[1];
  p.dilation_h = dilation[0];
  p.dilation_w = dilation[1];
  p.pad_top = padding[0];
  p.pad_left = padding[2];
  p.out_h = OutputSize(p.in_h, padding[0] + padding[1], p.kernel_h, p.stride_h, p.dilation_h);
  p.out_w = OutputSize(p.in_w, padding[2] + padding[3], p.kernel_w, p.stride_w, p.dilation_w);
  p.channels_last = layout == "NHWC";
  p.x = Packed(shape, p.channels_last);
  p.y = Packed({p.batch, p.out_h, p.out_w, p.channels}, p.channels_last);
  p.filter = {p.kernel_h * p.kernel_w * p.channels, p.kernel_w * p.channels, p.channels, 1};
  p.x_dtype = p.filter_dtype = p.y_dtype = DtypeNamed(dtype);
  return p;
}

Device MakeDevice(const Four& facts) {
  return {static_cast<int>(facts[0]), static_cast<int>(facts[1]), static_cast<int>(facts[2]),
          static_cast<int>(facts[3])};
}

template <class Plans>
Candidates Show(const Plans& plans) {
  Candidates shown;
  for (const auto& plan : plans) shown.emplace_back(plan.Text(), plan.cycles);
  return shown;
}

// Every candidate with its estimate in cycles (0: none), and the chosen one first.
Candidates Plan(const std::string& op, Four shape, Pair kernel, Pair strides, Four padding, Pair dilation,
                const std::string& layout, const std::string& dtype, Four device, int64_t max_splits) {
  const Problem p = MakeProblem(shape, kernel, strides, padding, dilation, layout, dtype);
  const Device facts = MakeDevice(device);
  if (p.x_elements() <= 0 || p.y_elements() <= 0) throw std::invalid_argument("input and output must not be empty");
  Candidates found;
  if ((p.x_dtype == Dtype::kI8) != (op == "quantized_forward")) {
    throw std::invalid_argument("quantized_forward, and nothing else, is for int8");
  }
  if (op == "quantized_forward") {
    found = Show(std::vector{PlanQuantized(p, facts, kAlignment, "")});
    for (auto& candidate : Show(QuantizedCandidates(p, facts, kAlignment))) found.push_back(candidate);
  } else if (op == "grad_filter") {
    found = Show(std::vector{PlanGradFilter(p, facts, kAlignment, max_splits, "")});
    for (auto& candidate : Show(GradFilterCandidates(p, facts, kAlignment, max_splits))) found.push_back(candidate);
  } else if (op == "forward" || op == "grad_input") {
    found = Show(std::vector{PlanPass(p, op == "forward", facts, kAlignment, "")});
    for (auto& candidate : Show(PassCandidates(p, op == "forward", facts, kAlignment))) found.push_back(candidate);
  } else {
    throw std::invalid_argument("operator must be forward, grad_input, grad_filter or quantized_forward, not " + op);
  }
  return found;
}

// The same for a pointwise convolution of x, (N, H, W, C), to `features`; nothing where no kernel takes it.
Candidates PlanPointwiseConvolution(const Four& shape, int64_t features, const std::string& dtype, bool gated,
                                    const Four& device) {
  const PointwiseProblem p{shape[0], shape[1] * shape[2], shape[3], features, DtypeNamed(dtype), gated};
  if (p.pixels() <= 0 || p.channels <= 0 || features <= 0) throw std::invalid_argument("nothing may be empty");
  const Device facts = MakeDevice(device);
  const PointwisePlan chosen = PlanPointwise(p, facts, kAlignment, "");
  if (chosen.kernel == PointwisePlan::Kernel::kNone) return {};
  Candidates found = Show(std::vector{chosen});
  for (auto& candidate : Show(PointwiseCandidates(p, facts, kAlignment))) found.push_back(candidate);
  return found;
}

}  // namespace
}  // namespace dwsconv

NB_MODULE(_plan, m) {
  m.doc() = "The planner of the CUDA kernels. Needs no GPU.";
  m.def("plan", dwsconv::Plan, nb::arg("operator"), nb::arg("shape"), nb::arg("kernel_size"), nb::arg("strides"),
        nb::arg("padding"), nb::arg("dilation"), nb::arg("layout"), nb::arg("dtype"), nb::arg("device"),
        nb::arg("max_splits"),
        "The chosen plan, then all candidates, as (text, estimated cycles). device: multiprocessors, capability, bytes "
        "of "
        "shared memory of a multiprocessor and of a block.");
  m.def("plan_pointwise", dwsconv::PlanPointwiseConvolution, nb::arg("shape"), nb::arg("features"), nb::arg("dtype"),
        nb::arg("gated"), nb::arg("device"), "The same for a pointwise convolution; empty where no kernel takes it.");
}
