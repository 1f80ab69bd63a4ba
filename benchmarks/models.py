#!/usr/bin/env python3
"""Times whole models, their depthwise layers on jax_dwsconv and on plain lax through Flax, in one run.

Inference is the forward pass with BatchNorm's running statistics; a training step is forward, backward and SGD with
momentum. The time of a call is the median of calls that are blocked on, on inputs and a state that are on the device
already. On a GPU there is also the time that its kernels take (CUPTI). Both sides get the same parameters and images,
and their results are compared.
"""

import argparse
import csv
import datetime
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
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

from jax_dwsconv import _versions

SIDES = ("ours", "flax")
BATCHES = {"inference": (1, 8, 32, 128), "train": (32, 64, 128, 256)}
TOLERANCE = {"float32": 2e-2, "bfloat16": 2e-1}  # of the largest logit or of the loss; a GPU multiplies in TF32
FIELDS = ("model", "mode", "batch", "dtype", "size")


class Case(NamedTuple):
    """One line of the table."""

    model: str
    mode: str
    batch: int
    dtype: str
    size: int


def compiled(case: Case, side: str) -> tuple[Callable, tuple[Any, ...]]:
    """A compiled function and its operands; its first result is the logits or the loss."""
    model = nnx.eval_shape(lambda: models.create(case.model, conv=side, dtype=case.dtype))
    models.fill(model)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(256, size=(case.batch, case.size, case.size, 3), dtype=np.uint8))
    if case.mode == "inference":
        model.eval()
        forward = models.compiled(model)
        operands = (*forward.args, images.astype(jnp.float32) / 128 - 1)
        return forward.func.lower(*operands).compile(), operands
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = training.train_step(model, optimizer)
    leaves, treedef = jax.tree.flatten(training.create_state(model, optimizer))

    @jax.jit
    def flat_step(leaves: list[jax.Array], *batch: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        state, metrics = step(jax.tree.unflatten(treedef, leaves), *batch)
        return metrics.loss, jax.tree.leaves(state)

    operands = (leaves, images, jnp.asarray(rng.integers(1000, size=case.batch, dtype=np.int32)))
    return flat_step.lower(*operands).compile(), operands


def call_ms(function: Callable, operands: tuple[Any, ...], seconds: float) -> float:
    """Median time of one call, in milliseconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        jax.block_until_ready(function(*operands))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def kernels_ms(function: Callable, operands: tuple[Any, ...]) -> float:
    """Median over calls of what the kernels of one call take, in milliseconds."""
    from jax.experimental.mosaic.gpu import profiler  # noqa: PLC0415  (needs a GPU)

    measured = profiler.measure(function)
    return statistics.median(measured(*operands)[1] for _ in range(3))


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """One line of the table. Raises SystemExit where the two sides disagree."""
    row: dict[str, Any] = case._asdict()
    sides, results = {}, {}
    for side in SIDES:
        start = time.perf_counter()
        function, operands = sides[side] = compiled(case, side)
        row[f"{side}_compile_s"] = time.perf_counter() - start
        result = function(*operands)
        results[side] = np.asarray(result[0] if case.mode == "train" else result, np.float32)
    row["difference"] = float(np.abs(results["ours"] - results["flax"]).max() / np.abs(results["flax"]).max())
    if not row["difference"] < TOLERANCE[case.dtype]:
        raise SystemExit(f"{case}: ours and flax differ by {row['difference']:.1e}")
    for side, (function, operands) in sides.items():
        row[f"{side}_ms"] = call_ms(function, operands, seconds)
        if jax.default_backend() == "gpu":
            row[f"{side}_kernels_ms"] = kernels_ms(function, operands)
    return row


def speedup(row: dict[str, Any], kind: str) -> float:
    """Of a time, "ms" or "kernels_ms"."""
    return row[f"flax_{kind}"] / row[f"ours_{kind}"]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-ups of calls, and on a GPU of kernels, as bars: a panel for each mode and dtype, a group for each model."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (optional)
    except ImportError:
        print("no chart: matplotlib is not installed (pip install 'jax-dwsconv[bench]')", file=sys.stderr)
        return
    kinds = [kind for kind in ("ms", "kernels_ms") if f"ours_{kind}" in rows[0]]
    panels = list(dict.fromkeys((row["mode"], row["dtype"], kind) for row in rows for kind in kinds))
    figure = Figure(figsize=(9, 2.6 * len(panels)), layout="constrained")
    for axis, (mode, dtype, kind) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        shown = [row for row in rows if (row["mode"], row["dtype"]) == (mode, dtype)]
        names, batches = (list(dict.fromkeys(row[field] for row in shown)) for field in ("model", "batch"))
        width = 0.8 / len(batches)
        for number, batch in enumerate(batches):
            found = {row["model"]: speedup(row, kind) for row in shown if row["batch"] == batch}
            places = [names.index(name) + width * (number - (len(batches) - 1) / 2) for name in found]
            bars = axis.bar(places, list(found.values()), 0.95 * width, label=f"batch {batch}")
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(names)), names)
        axis.margins(y=0.15)
        axis.set_ylabel("speed-up")
        what = "kernel time" if kind == "kernels_ms" else "time of a call"
        axis.set_title(f"{mode}, {dtype}: {what}, flax / ours", fontsize=9)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def write(rows: list[dict[str, Any]], environment: dict[str, str], output: Path) -> None:
    """The rows so far, as JSON and CSV."""
    text = json.dumps({"environment": environment, "rows": rows}, indent=1)
    output.with_suffix(".json").write_text(text + "\n")
    with output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def run(options: argparse.Namespace) -> None:
    """Measures what the command line asks for, prints a table and writes the files."""
    environment = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "jax-dwsconv": _versions.PACKAGE,
        "date": datetime.date.today().isoformat(),
    }
    print(", ".join(f"{k} {v}" for k, v in environment.items()) + "\n")
    kinds = ("ms", "kernels_ms") if jax.default_backend() == "gpu" else ("ms",)
    columns = [name for kind in kinds for name in (f"ours_{kind}", f"flax_{kind}", "speed-up")]
    print(f"| {' | '.join((*FIELDS, *columns))} |\n|{'---|' * (len(FIELDS) + len(columns))}", flush=True)
    cases = [
        Case(model, mode, batch, dtype, options.size)
        for model in options.models
        for dtype in options.dtype
        for mode in options.modes
        for batch in options.batch or BATCHES[mode]
    ]
    rows: list[dict[str, Any]] = []
    end = time.perf_counter() + options.limit_seconds
    for number, case in enumerate(cases):
        if time.perf_counter() > end:
            print(f"stopped after {options.limit_seconds:g} s: {len(cases) - number} not measured", file=sys.stderr)
            break
        try:
            row = measure(case, options.seconds)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{case}: out of memory", file=sys.stderr)
            continue
        rows.append(row)
        cells = [
            f"{row[f'{side}_{kind}']:.3f}" if side else f"{speedup(row, kind):.2f}"
            for kind in kinds
            for side in (*SIDES, "")
        ]
        print(f"| {' | '.join((*map(str, case), *cells))} |", flush=True)
        if options.output is not None:
            write(rows, environment, options.output)
    if rows and options.output is not None:
        plot(rows, options.output.with_suffix(".png"))
    for mode, dtype in dict.fromkeys((row["mode"], row["dtype"]) for row in rows):
        shown = [row for row in rows if (row["mode"], row["dtype"]) == (mode, dtype)]
        means = {kind: statistics.geometric_mean(speedup(row, kind) for row in shown) for kind in kinds}
        print(
            f"\n{mode} {dtype}, geometric mean of {len(shown)}: " + ", ".join(f"{k} {v:.2f}x" for k, v in means.items())
        )


def positive(kind: type, text: str) -> Any:
    """A number above 0, for argparse."""
    value = kind(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="models.py", description=__doc__.partition("\n")[0])
    count, duration = functools.partial(positive, int), functools.partial(positive, float)
    count.__name__, duration.__name__ = "whole number", "number"  # in messages
    add = parser.add_argument
    add(
        "--models",
        nargs="+",
        choices=tuple(models.MODELS),
        default=tuple(models.MODELS),
        metavar="MODEL",
        help=", ".join(models.MODELS),
    )
    add("--modes", nargs="+", choices=tuple(BATCHES), default=tuple(BATCHES), metavar="MODE", help="inference, train")
    add(
        "--batch", nargs="+", type=count, metavar="N", help="default: 1 8 32 128 for inference, 32 64 128 256 for train"
    )
    add(
        "--dtype",
        nargs="+",
        choices=tuple(TOLERANCE),
        default=["bfloat16"],
        metavar="DTYPE",
        help="bfloat16 (default), float32",
    )
    add("--size", type=count, default=224, metavar="PIXELS", help="of the images (default: %(default)s)")
    add("--seconds", type=duration, default=1.0, metavar="S", help="of timing each function (default: %(default)s)")
    add("--limit-seconds", type=duration, default=math.inf, metavar="S", help="start no new configuration after that")
    add("--output", type=Path, metavar="STEM", help="write STEM.json, STEM.csv and STEM.png")
    options = parser.parse_args(arguments)
    if options.size < 32:
        parser.error(f"--size must be at least 32, got {options.size}")
    if options.output is not None and not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: there is no folder {options.output.parent}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    run(parse_arguments(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
