"""Command line: `python -m jax_dwsconv info`."""

import argparse
import os
import platform
import sys
from types import ModuleType

import jax

from jax_dwsconv import _native, _versions

_DTYPES = {
    "cpu": "float32, float64, bfloat16, float16",
    "cuda": "float32, bfloat16, float16 (float64 goes to jax.lax)",
}
_ENVIRONMENT = ("JAX_DWSCONV_DISABLE", "JAX_DWSCONV_FALLBACK")


def _module_line(name: str) -> str:
    module = _native.load(name)
    if not isinstance(module, ModuleType):
        return f"not loaded: {_native.why_unavailable(name)}; convolutions on this platform go to jax.lax"
    if name == "cpu":
        return f"loaded, {module.isa()} kernels"
    toolkit, targets = _native.show_cuda_version(module.toolkit_version), module.architectures.replace(",", ", ")
    built = f"built with CUDA {toolkit} for {targets}"
    if reason := _native.why_unavailable(name):
        return f"loaded, {built}, but not used: {reason}; convolutions go to jax.lax"
    driver = module.driver_version()
    found = f"driver for CUDA {_native.show_cuda_version(driver)}" if driver else "no driver here"
    return f"loaded, {built}, {found}"


def _devices() -> list[str]:
    try:
        return [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()]
    except RuntimeError as error:
        return [f"none: {error}"]


def info() -> None:
    """Prints versions, devices, the native modules (or why they are missing) and the dtypes they support."""
    rows = [
        ("jax-dwsconv", _versions.PACKAGE),
        ("jax, jaxlib", f"{jax.__version__}, {jax.lib.__version__}"),
        ("Python", f"{platform.python_version()} on {platform.machine()}"),
        *(("device", device) for device in _devices()),
    ]
    for name in ("cpu", "cuda"):
        rows += [(f"{name} module", _module_line(name)), (f"{name} dtypes", _DTYPES[name])]
    rows.append(("other platforms", "every convolution goes to jax.lax"))
    rows += [(name, os.environ[name]) for name in _ENVIRONMENT if name in os.environ]
    for label, value in rows:
        print(f"{label:>16}  {value}")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jax_dwsconv", description="Depthwise convolution for JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, native modules and supported dtypes")
    parser.parse_args(arguments)
    info()
    return 0


if __name__ == "__main__":
    sys.exit(main())
