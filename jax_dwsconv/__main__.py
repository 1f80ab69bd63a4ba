"""Command line: `python -m jax_dwsconv info | plan | bench`."""

import argparse
import os
import pathlib
import platform
import sys
from types import ModuleType

import jax

from jax_dwsconv import _bench, _native, _planning, _versions

_DTYPES = {
    "cpu": "float32, float64, bfloat16, float16, int8",
    "cuda": "float32, bfloat16, float16, int8 (float64 goes to jax.lax)",
}
_ENVIRONMENT = ("JAX_DWSCONV_DISABLE", "JAX_DWSCONV_FALLBACK", "JAX_DWSCONV_TILE")


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


def _integers(count: int, *, repeat: bool = False):
    """Parses "1,2,3"; one number stands for `count` equal ones if `repeat`."""

    def parse(text: str) -> tuple[int, ...]:
        numbers = tuple(int(number) for number in text.split(","))
        if repeat and len(numbers) == 1:
            numbers *= count
        if len(numbers) != count or min(numbers) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {count} positive integer{'s with commas between them' if count > 1 else ''}"
            )
        return numbers

    parse.__name__ = "integers"  # argparse shows it
    return parse


def _count(text: str) -> int:
    return _integers(1)(text)[0]


def _layer(text: str) -> _bench.Layer:
    return _bench.Layer(*_integers(4)(text))


def _output(text: str) -> str:
    if not pathlib.Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text!r} does not exist")
    return text


def plan(options: argparse.Namespace) -> int:
    """Prints what the planner chooses and the best candidates, with the estimated times."""
    device = _planning.DEVICES[options.device]
    try:
        chosen, candidates = _planning.plan(
            options.operator,
            options.shape,
            options.kernel,
            options.strides,
            options.padding,
            options.dilation,
            options.layout,
            options.dtype,
            device,
        )
    except ValueError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    print(f"{options.operator} on {options.device} ({device.multiprocessors} multiprocessors): {chosen.text}")
    print("march: vector x columns x rows ahead x strip rows; march_planes: columns x strip rows;")
    print("toeplitz: channels x marchers side by side x strip rows; toeplitz_planes: pixels at once x strip rows;")
    print("tap_sums: vector x columns x strip rows x lanes x splits;")
    print("tap_rows: lanes x walkers x rows x columns x splits; tap_planes: planes x walkers x rows x splits;")
    print("tap_products: sets x chunks of 8 channels x walkers x columns x strip rows x images x splits;")
    print("staged: vector x columns x rows, of a block lanes x tiles across x down;")
    print("small_planes: columns x warps x images;")
    print("burst: vector x columns x rows; slide: vector x the axis along which it slides; lines has no choice;")
    print("quantized: columns x rows ahead x strip rows; quantized_burst: columns x rows;")
    print("gather and pieces are the general kernels.")
    estimated = sorted((c for c in candidates if c.cycles > 0), key=lambda c: c.cycles)
    if not estimated:
        print("No specialised kernel takes this problem.")
    for candidate in estimated[: options.candidates]:
        mark = "<- chosen" if candidate.text == chosen.text else ""
        print(f"{candidate.cycles:>12.0f} cycles  {candidate.text:<34} {mark}".rstrip())
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jax_dwsconv", description="Depthwise convolution for JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, native modules and supported dtypes")

    planner = commands.add_parser("plan", help="which CUDA kernel and tile a problem gets; needs no GPU")
    planner.add_argument("--shape", type=_integers(4), required=True, metavar="N,H,W,C", help="of x, in either layout")
    planner.add_argument("--kernel", type=_integers(2, repeat=True), default=(3, 3), metavar="H,W")
    planner.add_argument("--strides", type=_integers(2, repeat=True), default=(1, 1), metavar="H,W")
    planner.add_argument("--dilation", type=_integers(2, repeat=True), default=(1, 1), metavar="H,W")
    planner.add_argument("--padding", default="SAME", choices=("SAME", "VALID"))
    planner.add_argument("--operator", default="forward", choices=(*_bench.OPERATORS, "quantized_forward"))
    planner.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "int8"))
    planner.add_argument("--layout", default="NHWC", choices=("NHWC", "NCHW"))
    planner.add_argument("--device", default="h100", choices=_planning.DEVICES)
    planner.add_argument("--candidates", type=_count, default=8, help="how many of the best to print")

    bench = commands.add_parser("bench", help="times the operators beside jax.lax, shift-and-add and PyTorch")
    bench.add_argument("--batch", type=_count, nargs="+", default=[1])
    bench.add_argument("--dtype", nargs="+", default=["float32"], choices=("float32", "bfloat16", "float16"))
    bench.add_argument("--layout", nargs="+", default=["NHWC"], choices=("NHWC", "NCHW"))
    bench.add_argument("--operators", nargs="+", default=_bench.OPERATORS, choices=_bench.OPERATORS)
    layers = bench.add_mutually_exclusive_group()
    layers.add_argument("--layers", nargs="+", type=_layer, metavar="SIZE,CHANNELS,KERNEL,STRIDE")
    layers.add_argument("--models", nargs="+", default=[], choices=_bench.MODELS, help="all layers of these")
    layers.add_argument("--random", type=_count, default=0, metavar="COUNT", help="layers that no model has")
    bench.add_argument("--seed", type=int, default=0, help="of --random")
    bench.add_argument("--peers", nargs="*", default=["lax"], choices=_bench.PEERS)
    bench.add_argument("--sweep", action="store_true", help="also time the 40 most promising tiles (GPU)")
    bench.add_argument("--seconds", type=float, default=0.3, help="time for each measurement on the CPU")
    bench.add_argument(
        "--output", type=_output, help="path without suffix; .json, .csv and .png are written (and overwritten)"
    )
    bench.add_argument("--platform", choices=("cpu", "gpu"), help="instead of the default one")

    options = parser.parse_args(arguments)
    if options.command == "plan":
        return plan(options)
    if options.command == "bench":
        if options.platform:
            jax.config.update("jax_platforms", {"cpu": "cpu", "gpu": "cuda"}[options.platform])
        if options.sweep and jax.default_backend() != "gpu":
            parser.error("--sweep is for the tiles of the CUDA kernels: there is no GPU here")
        return _bench.run(options)
    info()
    return 0


if __name__ == "__main__":
    sys.exit(main())
