"""Loads the native modules and registers their handlers with XLA."""

import functools
import importlib
from types import ModuleType

import jax

from jax_dwsconv import _config

# A changed attribute or operand list is a new version, so that saved exports keep loading. With every version goes the
# version of this package that introduced it.
TARGETS = {
    "forward": "jax_dwsconv.forward.v1",
    "fused_forward": "jax_dwsconv.fused_forward.v1",
    "grad_input": "jax_dwsconv.grad_input.v1",
    "grad_filter": "jax_dwsconv.grad_filter.v1",
    "pointwise": "jax_dwsconv.pointwise.v1",  # on CUDA alone
    "quantized_forward": "jax_dwsconv.quantized_forward.v1",
    "quantized_pointwise": "jax_dwsconv.quantized_pointwise.v1",  # on CUDA alone
}
SINCE = dict.fromkeys(TARGETS, "0.1.0")
# A program that was exported by a later package is answered with the version that it needs.
_FUTURE_VERSIONS = range(2, 17)
# XLA's registry spells the platform in upper case; lower case would never match, without an error.
_XLA_PLATFORMS = {"cpu": "cpu", "cuda": "CUDA"}


@functools.cache
def load(platform: str) -> ModuleType | ImportError:
    """The native module of a platform ("cpu" or "cuda"), or why it cannot be loaded."""
    try:
        return importlib.import_module(f"jax_dwsconv._{platform}")
    except ImportError as error:
        return error


def register() -> None:
    """Makes the handlers of every module that loads known to XLA. XLA looks them up when it compiles.

    Raises:
      ImportError: the CPU module, which every installation has, does not load.
    """
    if isinstance(error := load("cpu"), ImportError):
        raise ImportError(
            f"jax_dwsconv is not installed completely: {error}. If this is its source tree, install it ('pip install "
            ".') and run Python from another directory or with -P, or use 'make test' and 'make demo'."
        ) from error
    for platform, xla_platform in _XLA_PLATFORMS.items():
        module = load(platform)
        if isinstance(module, ModuleType):
            handlers = module.handlers()
            for operator, target in TARGETS.items():
                if operator in handlers:
                    jax.ffi.register_ffi_target(target, handlers[operator], platform=xla_platform)
                for version in _FUTURE_VERSIONS:
                    newer = f"jax_dwsconv.{operator}.v{version}"
                    jax.ffi.register_ffi_target(newer, handlers["needs_newer_version"], platform=xla_platform)


def why_unavailable(platform: str) -> str | None:
    """Why the kernels of a platform cannot be used here, or None where they can.

    For "cuda" the driver and every visible device are compared with what the module was compiled for. Where no device
    is visible there is nothing to compare: code may be lowered here for another machine.
    """
    module = load(platform)
    if isinstance(module, ImportError):
        return f"the native module _{platform} is not installed ({module})"
    if platform == "cuda":
        return cuda_mismatch(
            module.driver_version(),
            module.device_capabilities(),
            module.toolkit_version,
            module.architectures.split(","),
        )
    return None


def oldest_code(capabilities: list[tuple[int, int]], architectures: list[str]) -> int:
    """The architecture, as 10 * major + minor, of the oldest code that any of these devices runs; 0 without devices.

    The arguments are as for `cuda_mismatch`.
    """
    compiled = [int(architecture.split("-")[0]) for architecture in architectures]
    devices = [10 * major + minor for major, minor in capabilities]
    return min((max((code for code in compiled if code <= device), default=0) for device in devices), default=0)


def require_kernels() -> None:
    """For benchmarks, which would otherwise time lax twice.

    Raises:
      SystemExit: the default device is one that has no kernels here, or they are disabled.
    """
    reason = why_unavailable({"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend()))
    if reason := "JAX_DWSCONV_DISABLE is set" if _config.disabled() else reason:
        raise SystemExit(f"no kernels of jax_dwsconv to time: {reason}")


def cuda_mismatch(
    driver: int, capabilities: list[tuple[int, int]], toolkit: int, architectures: list[str]
) -> str | None:
    """Why machine code does not run on these devices, or None where it does.

    Args:
      driver: the newest CUDA version that the driver knows, as 1000 * major + 10 * minor; 0 without a driver.
      capabilities: (major, minor) of every visible device.
      toolkit: the CUDA version of the compiler, in the driver's notation.
      architectures: everything that was compiled, as "90-real" for machine code and "80-virtual" for PTX.
    """
    if not capabilities:
        return None
    if driver // 1000 < toolkit // 1000:
        return (
            f"the driver knows CUDA {show_cuda_version(driver)}, but the kernels were built with CUDA "
            f"{show_cuda_version(toolkit)}: update the driver, or build with CUDA {driver // 1000}"
        )
    compiled = [(kind, int(number)) for number, kind in (arch.split("-") for arch in architectures)]
    for major, minor in capabilities:
        runs_machine_code = any(
            kind == "real" and arch // 10 == major and arch % 10 <= minor for kind, arch in compiled
        )
        # The driver compiles PTX for a newer device, unless the PTX is newer than the driver.
        runs_ptx = driver >= toolkit and any(
            kind == "virtual" and arch <= 10 * major + minor for kind, arch in compiled
        )
        if not (runs_machine_code or runs_ptx):
            return (
                f"a visible GPU has compute capability {major}.{minor}, but the kernels were built for "
                f"{', '.join(architectures)}: build with JAX_DWSCONV_CUDA_ARCHITECTURES={major}{minor}"
            )
    return None


def show_cuda_version(version: int) -> str:
    """A CUDA version in NVIDIA's integer notation as "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}"
