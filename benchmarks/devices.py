#!/usr/bin/env python3
"""Times several devices against one of them, in one run: a large image divided by height, and data-parallel training.

Training has the same number of images for every device. BatchNorm takes its statistics of all images, which costs an
all-reduce in both directions for every layer that has one, or of each device's own. Results are compared with those of
one device before anything is timed; of training that is the loss, with the same images for every device, so that it is
that of one of them up to rounding and dropout.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import training
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

import jax_dwsconv
from jax_dwsconv import _native

START = time.perf_counter()
ROUNDS = 7
LOSS_TOLERANCE = 0.1


class Contestant(NamedTuple):
    """A function that is called again and again.

    Attributes:
      name: of the line.
      devices: how many there are.
      call: takes the operands.
      operands: of the next call.
      trains: whether the first result is the first operand of the next call, the second one has the loss.
    """

    name: str
    devices: int
    call: Callable
    operands: tuple[Any, ...]
    trains: bool

    def after(self, result: Any) -> "Contestant":
        """With the operands of the next call."""
        return self._replace(operands=(result[0], *self.operands[1:])) if self.trains else self


def mesh_of(devices: int) -> Mesh:
    """The first devices, on one axis."""
    return jax.make_mesh((devices,), ("d",), (AxisType.Auto,), devices=jax.devices()[:devices])


# --- One large image ------------------------------------------------------------------------------------------------


def forward(x, kernel, g):
    """The convolution."""
    return jax_dwsconv.depthwise_conv2d(x, kernel)


def gradients(x, kernel, g):
    """Its two gradients."""
    return jax.vjp(jax_dwsconv.depthwise_conv2d, x, kernel)[1](g)


PASSES = {function.__name__: function for function in (forward, gradients)}


def image_pass(function: Callable, devices: int, options: argparse.Namespace) -> Contestant:
    """A compiled pass over an image that is divided by height."""
    mesh, image = mesh_of(devices), (1, *options.image)
    kernel = (options.kernel, options.kernel, 1, options.image[2])
    operands = []
    for number, (shape, spec) in enumerate(((image, P(None, "d")), (kernel, P()), (image, P(None, "d")))):
        make = functools.partial(jax.random.normal, shape=shape, dtype=options.dtype)
        x = jax.jit(make, out_shardings=NamedSharding(mesh, spec))(jax.random.key(number))
        operands.append(x / options.kernel if shape == kernel else x)  # results as large as x
    name = f"{'x'.join(map(str, options.image))}, kernel {options.kernel}, {function.__name__}"
    compiled = jax.jit(function, keep_unused=True).lower(*operands).compile()
    return Contestant(name, devices, compiled, tuple(operands), trains=False)


def check_images(contestants: list[Contestant], options: argparse.Namespace) -> None:
    """Raises SystemExit where the results are not the same up to rounding."""
    results = [jax.tree.leaves(contestant.call(*contestant.operands)) for contestant in contestants]
    for one, several in zip(*results, strict=True):
        difference, largest = map(float, compare(one, jax.device_put(several, one.sharding)))
        name = f"{contestants[0].name}, result {one.shape}"
        print(f"{name}: differs by {difference:.3g} at most, largest value {largest:.3g}", flush=True)
        rounding = float(jnp.finfo(one.dtype).eps) + float(jnp.finfo(jnp.float32).eps) * math.prod(options.image) ** 0.5
        if not difference <= rounding * largest:
            raise SystemExit(f"{name}: the results are not the same")


@jax.jit
def compare(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest difference and the largest value."""
    return jnp.abs(a.astype(jnp.float32) - b).max(), jnp.abs(a).max().astype(jnp.float32)


# --- Training -------------------------------------------------------------------------------------------------------


def training_step(name: str, devices: int, own_statistics: bool, options: argparse.Namespace) -> Contestant:
    """A compiled training step and its operands."""
    model = nnx.eval_shape(lambda: models.create(name, dtype=options.dtype))
    models.fill(model)
    optimizer, mesh, rng = optax.sgd(1e-3, momentum=0.9), mesh_of(devices), np.random.default_rng(0)
    state = jax.device_put(training.create_state(model, optimizer), NamedSharding(mesh, P()))
    images = rng.integers(256, size=(options.batch, options.size, options.size, 3), dtype=np.uint8)
    labels = rng.integers(1000, size=options.batch, dtype=np.int32)
    batch = [np.concatenate([part] * devices) for part in (images, labels)]
    operands = (state, *jax.device_put(batch, NamedSharding(mesh, P("d"))))
    step = training.train_step(model, optimizer, axis="d" if own_statistics else None)
    if own_statistics:
        specs = (P(), P("d"), P("d"))
        step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    kind = "own statistics" if own_statistics else "statistics of all"
    compiled = jax.jit(step, donate_argnums=0).lower(*operands).compile()
    report_time(f"{name}, {devices} devices, {kind}: compiled")
    return Contestant(f"{name} training, {kind}", devices, compiled, operands, trains=True)


def training_steps(options: argparse.Namespace) -> list[list[Contestant]]:
    """The steps of every model, compiled at the same time; those of one device first, which try the kernels out."""

    def compiled(*kinds: tuple[int, bool]) -> list[list[Contestant]]:
        futures = [[pool.submit(training_step, name, *kind, options) for kind in kinds] for name in options.models]
        return [[future.result() for future in each] for each in futures]

    with ThreadPoolExecutor() as pool:
        one = compiled((1, False))
        several = compiled((options.devices, False), (options.devices, True))
    return [a + b for a, b in zip(one, several, strict=True)]


def check_losses(contestants: list[Contestant]) -> list[Contestant]:
    """The contestants after one step. Raises SystemExit where the losses differ."""
    results = [jax.block_until_ready(contestant.call(*contestant.operands)) for contestant in contestants]
    losses = [float(metrics.loss) for _, metrics in results]
    print(f"{contestants[0].name}: losses {', '.join(f'{loss:.4f}' for loss in losses)}", flush=True)
    if not all(abs(loss - losses[0]) <= LOSS_TOLERANCE * abs(losses[0]) for loss in losses):
        raise SystemExit(f"{contestants[0].name}: the losses are not the same")
    return [contestant.after(result) for contestant, result in zip(contestants, results, strict=True)]


# --- Times ----------------------------------------------------------------------------------------------------------


def timed(contestant: Contestant, calls: int) -> tuple[float, Contestant]:
    """Mean time of a call, in seconds, and the contestant after them. Raises SystemExit where training has diverged."""
    jax.block_until_ready(contestant.operands)
    start = time.perf_counter()
    for _ in range(calls):
        result = contestant.call(*contestant.operands)
        contestant = contestant.after(result)
        if jax.default_backend() == "cpu":  # where XLA's collectives can lock one another out
            jax.block_until_ready(result)
    jax.block_until_ready(result)
    mean = (time.perf_counter() - start) / calls
    if contestant.trains and not math.isfinite(result[1].loss):
        raise SystemExit(f"{contestant.name}: the loss is {result[1].loss}")
    return mean, contestant


def measure(contestants: list[Contestant], seconds: float) -> list[float]:
    """The median time of a call of each, in rounds that take turns."""
    times, contestants = zip(*(timed(contestant, 2) for contestant in contestants), strict=True)
    calls = [max(2, math.ceil(seconds / ROUNDS / each)) for each in times]
    rounds = []
    for _ in range(ROUNDS):
        times, contestants = zip(*map(timed, contestants, calls), strict=True)
        rounds.append(times)
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def run(options: argparse.Namespace) -> None:
    """Checks, measures and prints a table."""
    print(f"{options.devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}, {options.dtype}\n", flush=True)
    rows = []

    def add_row(name: str, one: str, several: str, speedup: float) -> None:
        rows.append(f"| {name} | {one} | {several} | {speedup:.2f}x |")
        report_time(rows[-1])  # the rest may take long

    for function in options.passes:
        contestants = [image_pass(PASSES[function], devices, options) for devices in (1, options.devices)]
        report_time(f"{contestants[0].name} compiled")
        check_images(contestants, options)
        one, several = measure(contestants, options.seconds)
        add_row(contestants[0].name, f"{1e3 * one:.3f} ms", f"{1e3 * several:.3f} ms", one / several)
    for steps in training_steps(options):
        contestants = check_losses(steps)
        one, *several = measure(contestants, options.seconds)
        for contestant, each in zip(contestants[1:], several, strict=True):
            rates = options.batch / one, options.batch * contestant.devices / each
            add_row(contestant.name, *(f"{rate:,.0f} images/s" for rate in rates), rates[1] / rates[0])
    print(f"\n| | 1 device | {options.devices} devices | speed-up |\n|---|---|---|---|", *rows, sep="\n")


def report_time(event: str) -> None:
    """Prints when something was done, in seconds since the start."""
    print(f"{time.perf_counter() - START:.0f} s: {event}", flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="devices.py",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, some = parser.add_argument, ["mobilenet_v2", "efficientnet_b0"]
    add("--devices", type=int, default=jax.device_count(), metavar="N", help="how many, at least 2")
    add("--models", nargs="*", choices=tuple(models.MODELS), default=some, metavar="MODEL", help="to train")
    add("--batch", type=int, default=128, metavar="N", help="images for every device")
    add("--size", type=int, default=224, metavar="PIXELS", help="of these images")
    add("--image", nargs=3, type=int, default=[2048, 2048, 256], metavar="N", help="height, width, channels")
    add("--passes", nargs="*", choices=tuple(PASSES), default=list(PASSES), help="over the large image")
    add("--kernel", type=int, default=7, metavar="N", help="of the large image's convolution")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="to compute in")
    add("--seconds", type=float, default=2.0, metavar="S", help="of timing each function")
    options = parser.parse_args(arguments)
    if not 2 <= options.devices <= jax.device_count():
        parser.error(f"--devices must be from 2 to {jax.device_count()}, which jax sees, got {options.devices}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = parse_arguments(arguments)
    _native.require_kernels()
    run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
