#!/usr/bin/env python3
"""Times whole models, their depthwise layers on jax_dwsconv and on plain lax through Flax, in one run.

A training step is forward, backward and SGD with momentum. Inference is the forward pass with BatchNorm's running
statistics, in two further forms: "folded" is ours with BatchNorm and activations in the kernels, "expert" is what one
can write without this package, BatchNorm folded, depthwise convolutions as sums of shifted products and pointwise ones
as matrix products. The time of a call is the median of calls that are blocked on, that of back-to-back calls is of ten
that are started before the last is waited for. On a GPU there is also the time that its kernels take (CUPTI). Memory is
what XLA plans for a call, operands and results included. All sides get the same parameters and images, and their
results are compared. Inference is that of photographs, EfficientNet-Lite0 with its ImageNet weights, the others with
random ones: beside the times are the share of images that get the same label as from plain Flax, and the least cosine
between the logits of the two.
"""

import argparse
import csv
import datetime
import functools
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import crops
import jax
import jax.numpy as jnp
import latency
import models
import numpy as np
import optax
import training
from flax import nnx
from jax import lax
from models import blocks, weights
from PIL import Image, ImageOps

from jax_dwsconv import _native, _versions, inference

# The first of each is ours, the second what it is compared with.
SIDES = {"inference": ("folded", "flax", "ours", "expert"), "train": ("ours", "flax")}
BATCHES = {"inference": (1, 8, 32, 128), "train": (32, 64, 128, 256)}
TOLERANCE = {"float32": 2e-2, "bfloat16": 2e-1}  # of the largest logit or of the loss; a GPU multiplies in TF32
PHOTOGRAPHS = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")
BORDER = 0.0625  # cut off on every side, as in the evaluation of EfficientNet
PRETRAINED = "efficientnet_lite0"
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
    conv = "ours" if side in ("folded", "ours") else "flax"
    if case.mode == "inference" and case.model == PRETRAINED:
        model = weights.load_pretrained(conv, case.dtype)
    else:
        model = nnx.eval_shape(lambda: models.create(case.model, conv=conv, dtype=case.dtype))
        models.fill(model)
    if case.mode == "inference":
        model.eval()
        model = {"folded": models.folded, "expert": expert}.get(side, lambda model: model)(model)
        x = jnp.asarray(np.resize(photographs(case.size), (case.batch, case.size, case.size, 3)))
        return models.compiled(model).lower(x).compile(), (x,)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(256, size=(case.batch, case.size, case.size, 3), dtype=np.uint8))
    optimizer = optax.sgd(0.1, momentum=0.9)
    step = training.train_step(model, optimizer)
    leaves, treedef = jax.tree.flatten(training.create_state(model, optimizer))

    @jax.jit
    def flat_step(leaves: list[jax.Array], *batch: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        state, metrics = step(jax.tree.unflatten(treedef, leaves), *batch)
        return metrics.loss, jax.tree.leaves(state)

    operands = (leaves, images, jnp.asarray(rng.integers(1000, size=case.batch, dtype=np.int32)))
    return flat_step.lower(*operands).compile(), operands


@functools.cache
def photographs(size: int) -> np.ndarray:
    """The centre squares of photographs inside scikit-image, (N, size, size, 3) float32 of about [-1, 1]."""
    pictures = [Image.open(crops.data_folder() / name).convert("RGB") for name in PHOTOGRAPHS]
    squares = [ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC, BORDER) for picture in pictures]
    return (np.stack(squares).astype(np.float32) - training.PIXEL_MEAN) / training.PIXEL_SCALE


def expert(model: nnx.Module) -> nnx.Module:
    """A copy that has no depthwise or pointwise convolution left, in the dtype of the computation."""
    model, _ = inference.fold(model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    for _, module in nnx.iter_graph(model):
        if isinstance(module, blocks.SqueezeExcite):
            module.by_rows = True
        if isinstance(module, nnx.Conv | nnx.Linear) and module.dtype is not None:
            for parameter in (module.kernel, module.bias):
                parameter[...] = parameter[...].astype(module.dtype)
        if isinstance(module, nnx.Conv) and module.feature_group_count > 1:
            module.conv_general_dilated = shifted_products
        elif isinstance(module, nnx.Conv) and tuple(module.kernel_size) == (1, 1):
            module.conv_general_dilated = matrix_product
    return model


def matrix_product(x: jax.Array, kernel: jax.Array, *_: Any, **__: Any) -> jax.Array:
    """A pointwise convolution."""
    return x @ kernel[0, 0]


def shifted_products(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **_: Any) -> jax.Array:
    """A depthwise convolution; XLA makes one kernel of the sum."""
    height, width = kernel.shape[:2]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], (height, width), strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1
    terms = (
        x[:, i : i + rows : strides[0], j : j + columns : strides[1]].astype(jnp.float32) * kernel[i, j, 0]
        for i in range(height)
        for j in range(width)
    )
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def call_ms(function: Callable, operands: tuple[Any, ...], seconds: float) -> float:
    """Median time of one call, in milliseconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        jax.block_until_ready(function(*operands))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def kernels_ms(function: Callable, operands: tuple[Any, ...]) -> tuple[float, float]:
    """Median over calls of what the kernels of one call take, in milliseconds: all of them, and this package's."""
    from jax.experimental.mosaic.gpu import profiler  # noqa: PLC0415  (needs a GPU)

    measured = profiler.measure(function, aggregate=False)
    calls = [measured(*operands)[1] for _ in range(3)]
    return (
        statistics.median(sum(ms for _, ms in call) for call in calls),
        statistics.median(sum(ms for name, ms in call if "dwsconv" in name) for call in calls),
    )


def memory_mib(function: Any) -> float:
    """What a compiled function needs at most: operands, results and what XLA plans in between, in MiB."""
    needs = function.memory_analysis()
    total = needs.argument_size_in_bytes + needs.output_size_in_bytes + needs.temp_size_in_bytes
    return (total - needs.alias_size_in_bytes) / 2**20


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """One line of the table. Raises SystemExit where the two sides disagree."""
    row: dict[str, Any] = case._asdict()
    sides, results = {}, {}
    for side in SIDES[case.mode]:
        start = time.perf_counter()
        function, operands = sides[side] = compiled(case, side)
        row[f"{side}_compile_s"] = time.perf_counter() - start
        result = function(*operands)
        results[side] = np.asarray(result[0] if case.mode == "train" else result, np.float32)
    for side in SIDES[case.mode]:
        difference = float(np.abs(results[side] - results["flax"]).max() / np.abs(results["flax"]).max())
        row[f"{side}_difference"] = difference
        if not difference < TOLERANCE[case.dtype]:
            raise SystemExit(f"{case}: {side} and flax differ by {difference:.1e}")
        if case.mode == "inference":
            row[f"{side}_same_labels"], row[f"{side}_cosine"] = likeness(results[side], results["flax"])
    if case.mode == "inference":
        (x,) = operands
        samples = latency.measure({side: function for side, (function, _) in sides.items()}, x, budget_s=4 * seconds)
        for side, (blocked, back_to_back) in samples.items():
            row[f"{side}_ms"] = 1e3 * statistics.median(blocked)
            row[f"{side}_back_to_back_ms"] = 1e3 * statistics.median(back_to_back)
    for side, (function, operands) in sides.items():
        row[f"{side}_memory_mib"] = memory_mib(function)
        if case.mode == "train":
            row[f"{side}_ms"] = call_ms(function, operands, seconds)
        if jax.default_backend() == "gpu":
            row[f"{side}_kernels_ms"], row[f"{side}_own_kernels_ms"] = kernels_ms(function, operands)
    return row


def depthwise_shares(row: dict[str, Any]) -> tuple[float, float]:
    """The share of depthwise convolutions in the kernel time of plain Flax, and in that of "ours".

    Only these layers differ between the two: the other kernels of "ours" stand for those of plain Flax, which XLA may
    fuse a little differently.
    """
    others = row["ours_kernels_ms"] - row["ours_own_kernels_ms"]
    return 1 - others / row["flax_kernels_ms"], row["ours_own_kernels_ms"] / row["ours_kernels_ms"]


def likeness(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The share of rows of logits with the same label, and the least cosine between the rows."""
    cosines = np.sum(a * b, axis=-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return float(np.mean(a.argmax(-1) == b.argmax(-1))), float(cosines.min())


def kinds_of(mode: str) -> tuple[str, ...]:
    """The times that are measured."""
    back_to_back = ("back_to_back_ms",) if mode == "inference" else ()
    return ("ms", *back_to_back, *(("kernels_ms",) if jax.default_backend() == "gpu" else ()))


def speedup(row: dict[str, Any], kind: str, over: str = "flax") -> float:
    """Of our best form over another side, in one of `kinds_of`."""
    return row[f"{over}_{kind}"] / row[f"{SIDES[row['mode']][0]}_{kind}"]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-ups of calls, and on a GPU of kernels, as bars: a panel for each mode and dtype, a group for each model."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (optional)
    except ImportError:
        print("no chart: matplotlib is not installed (pip install 'jax-dwsconv[bench]')", file=sys.stderr)
        return
    panels = list(dict.fromkeys((row["mode"], row["dtype"], kind) for row in rows for kind in kinds_of(row["mode"])))
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
        what = {"ms": "blocked call", "back_to_back_ms": "back-to-back calls", "kernels_ms": "kernel time"}[kind]
        axis.set_title(f"{mode}, {dtype}: {what}, flax / {SIDES[mode][0]}", fontsize=9)
        axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)


PAPER = """\
The paper (Lu, Zhang, Wang; IEEE TPDS 33(1), 2022) reports for an RTX 2080 Ti, over cuDNN: training of MobileNet 9.7 %
and of EfficientNet 7.3 % less time, inference 12.2 % and 11.6 % less."""


def report(rows: list[dict[str, Any]], environment: dict[str, str], command: str) -> str:
    """The rows as a Markdown document, with the paper's numbers."""
    described = ", ".join(f"{k} {v}" for k, v in environment.items())
    lines = ["# Whole models", "", f"{described}:", "", f"    {command}", ""]
    lines += ["Milliseconds and MiB; the same parameters and images on both sides.", "", PAPER]
    for mode, dtype in dict.fromkeys((row["mode"], row["dtype"]) for row in rows):
        first = SIDES[mode][0]
        shown = [row for row in rows if (row["mode"], row["dtype"]) == (mode, dtype)]
        columns = []
        for kind in kinds_of(mode):
            name = {"ms": "call", "back_to_back_ms": "back to back", "kernels_ms": "kernels"}[kind]
            columns += [f"{name}, flax", f"{name}, {first}", "less time"]
        shares = "flax_kernels_ms" in shown[0]
        columns += ["depthwise, flax", "depthwise, ours"] if shares else []
        columns += ["memory, flax", f"memory, {first}"]
        lines += ["", f"## {mode}, {dtype}", "", f"| model | size | batch | {' | '.join(columns)} |"]
        lines += [f"|{'---|' * (3 + len(columns))}"]
        for row in shown:
            cells = []
            for kind in kinds_of(mode):
                plain, ours = row[f"flax_{kind}"], row[f"{first}_{kind}"]
                cells += [f"{plain:.3f}", f"{ours:.3f}", f"{1 - ours / plain:.1%}"]
            cells += [f"{share:.1%}" for share in depthwise_shares(row)] if shares else []
            cells += [f"{row[f'{side}_memory_mib']:.0f}" for side in ("flax", first)]
            lines.append(f"| {row['model']} | {row['size']} | {row['batch']} | {' | '.join(cells)} |")
    if any("flax_kernels_ms" in row for row in rows):
        lines += [
            "",
            '"depthwise": the share of depthwise convolutions in the kernel time, before and after these layers',
        ]
        lines += ["alone are replaced (BatchNorm not folded)."]
    return "\n".join(lines) + "\n"


def write(rows: list[dict[str, Any]], environment: dict[str, str], output: Path) -> None:
    """The rows so far, as JSON and CSV."""
    text = json.dumps({"environment": environment, "rows": rows}, indent=1)
    output.with_suffix(".json").write_text(text + "\n")
    with output.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
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
    print(", ".join(f"{k} {v}" for k, v in environment.items()) + "\n", flush=True)
    cases = [  # all models for one batch size, then for the next one, as far as the time allows
        Case(model, mode, batch, dtype, options.size)
        for mode in options.modes
        for dtype in options.dtype
        for batch in options.batch or BATCHES[mode]
        for model in options.models
    ]
    shown = None
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
        kinds, sides = kinds_of(case.mode), SIDES[case.mode]
        if case.mode != shown:
            shown = case.mode
            columns = [f"{side}_{kind}" for kind in kinds for side in sides]
            likenesses = [f"{sides[0]}_same_labels", f"{sides[0]}_cosine"] if case.mode == "inference" else []
            columns += likenesses
            print(f"\n| {' | '.join((*FIELDS, *columns))} |\n|{'---|' * (len(FIELDS) + len(columns))}")
        cells = [f"{row[column]:.{4 if column in likenesses else 3}f}" for column in columns]
        print(f"| {' | '.join((*map(str, case), *cells))} |", flush=True)
        if options.output is not None:
            write(rows, environment, options.output)
            options.output.with_suffix(".md").write_text(report(rows, environment, options.command))
    if rows and options.output is not None:
        plot(rows, options.output.with_suffix(".png"))
    for mode, dtype, batch in dict.fromkeys((row["mode"], row["dtype"], row["batch"]) for row in rows):
        shown = [row for row in rows if (row["mode"], row["dtype"], row["batch"]) == (mode, dtype, batch)]
        first, *others = SIDES[mode]
        for other in others:
            means = {k: statistics.geometric_mean(speedup(row, k, other) for row in shown) for k in kinds_of(mode)}
            text = ", ".join(f"{kind} {mean:.2f}x" for kind, mean in means.items())
            print(f"\n{mode} {dtype} batch {batch}, {other} / {first}, geometric mean of {len(shown)}: {text}", end="")
        print()


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
    add("--output", type=Path, metavar="STEM", help="write STEM.json, STEM.csv, STEM.md and STEM.png")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    options.command = shlex.join(["python", "benchmarks/models.py", *words])
    if options.size < 32:
        parser.error(f"--size must be at least 32, got {options.size}")
    if options.output is not None and not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: there is no folder {options.output.parent}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = parse_arguments(arguments)
    _native.require_kernels()
    run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
