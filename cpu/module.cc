#include <nanobind/nanobind.h>

#include "cpu/handlers.h"
#include "cpu/kernels.h"
#include "cuda/ffi_problem.h"

namespace nb = nanobind;

NB_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of jax_dwsconv.";
  m.def(
      "handlers",
      [] {
        const auto capsule = [](auto* symbol) { return nb::capsule(reinterpret_cast<void*>(symbol)); };
        nb::dict handlers;
        handlers["forward"] = capsule(dwsconv::cpu::Forward);
        handlers["fused_forward"] = capsule(dwsconv::cpu::FusedForward);
        handlers["grad_input"] = capsule(dwsconv::cpu::GradInput);
        handlers["grad_filter"] = capsule(dwsconv::cpu::GradFilter);
        handlers["quantized_forward"] = capsule(dwsconv::cpu::QuantizedForward);
        handlers["needs_newer_version"] = capsule(dwsconv::NeedsNewerVersion);
        return handlers;
      },
      "XLA FFI handlers by operator name.");
  m.def(
      "isa", [] { return dwsconv::cpu::BestKernels().isa; },
      "The instruction set that the kernels use on this machine.");
  m.def(
      "multiply_add",
      [](int64_t rounds) {
        const nb::gil_scoped_release release;
        float value = 0.5f;
        return dwsconv::cpu::BestKernels().multiply_add(rounds, &value);
      },
      "Keeps the multiply-add units busy and returns how many products they computed.");
  m.attr("ffi_api_version") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}
