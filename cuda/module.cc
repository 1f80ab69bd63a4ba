#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "cuda/ffi_problem.h"
#include "cuda/handlers.h"
#include "cuda/launch.h"

namespace nb = nanobind;

namespace {

int DriverVersion() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

nb::list DeviceCapabilities() {
  nb::list capabilities;
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();  // no driver or no device is an answer here, not an error for the next call
    return capabilities;
  }
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    (void)cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    capabilities.append(nb::make_tuple(major, minor));
  }
  return capabilities;
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of jax_dwsconv.";
  m.def(
      "handlers",
      [] {
        const auto capsule = [](auto* symbol) { return nb::capsule(reinterpret_cast<void*>(symbol)); };
        nb::dict handlers;
        handlers["forward"] = capsule(dwsconv::cuda::Forward);
        handlers["fused_forward"] = capsule(dwsconv::cuda::FusedForward);
        handlers["grad_input"] = capsule(dwsconv::cuda::GradInput);
        handlers["grad_filter"] = capsule(dwsconv::cuda::GradFilter);
        handlers["pointwise"] = capsule(dwsconv::cuda::Pointwise);
        handlers["quantized_forward"] = capsule(dwsconv::cuda::QuantizedForward);
        handlers["quantized_pointwise"] = capsule(dwsconv::cuda::QuantizedPointwise);
        handlers["needs_newer_version"] = capsule(dwsconv::NeedsNewerVersion);
        return handlers;
      },
      "XLA FFI handlers by operator name.");
  m.def("driver_version", DriverVersion,
        "The newest CUDA version that the driver knows, 1000 * major + 10 * minor; 0 without.");
  m.def("device_capabilities", DeviceCapabilities, "(major, minor) of every visible device.");
  m.def("captured_calls", dwsconv::cuda::CapturedCalls,
        "How many handler calls so far were recorded into a CUDA graph.");
  m.def("last_forced_plan", dwsconv::cuda::LastForcedPlan,
        "The text of the plan that the last call with a forced tile got.");
  m.attr("toolkit_version") = CUDART_VERSION;
  m.attr("architectures") = JAX_DWSCONV_ARCHITECTURES;  // such as "80-real,80-virtual"
  m.attr("ffi_api_version") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}
