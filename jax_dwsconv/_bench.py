"""Times the operators layer by layer, beside what else computes them: `python -m jax_dwsconv bench`.

lax and shift-and-add run in this process on the same random inputs and are compared with ours before they are timed;
PyTorch runs in a process of its own, on random inputs of its own, and is only timed. Times are medians: on a GPU of the
time that the kernels take (CUPTI), elsewhere of one call that is blocked on. Every timed call follows one with the same
operands, so what fits the cache is there. The floor of a case is what its bytes take at the copy rate, its
multiply-adds at the peak or the smallest kernel, whichever is longest. All three are measured in the same run, but for
the peak of a GPU, which is a table (and left out for one that is not in it).
"""

import csv
import datetime
import functools
import importlib.util
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import NamedTuple

import jax
from jax import lax, numpy as jnp

import jax_dwsconv
from jax_dwsconv import _native, _planning, _versions
from jax_dwsconv._bench_layers import LAYERS, MODELS, Layer, random_layers

OPERATORS = ("forward", "grad_input", "grad_filter")
PEERS = ("lax", "shift", "torch")
_LARGEST_SHIFT_KERNEL = 7  # XLA takes minutes to compile more
_FMA_PER_SECOND = {"H100": 33.4e12, "H200": 33.4e12}  # float32, measured once


class Case(NamedTuple):
    """One operator of one layer."""

    operator: str
    layer: Layer
    batch: int
    dtype: str
    layout: str


def _convolve(peer: str, case: Case, x: jax.Array, kernel: jax.Array) -> jax.Array:
    layer = case.layer
    stride, dilation = layer.stride, layer.dilation
    if peer == "ours":
        return jax_dwsconv.depthwise_conv2d(x, kernel, strides=stride, dilation=dilation, data_format=case.layout)
    if peer == "lax":
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            rhs_dilation=(dilation, dilation),
            dimension_numbers=(case.layout, "HWIO", case.layout),
            feature_group_count=layer.channels,
        )
    axes = (1, 2) if case.layout == "NHWC" else (2, 3)
    pads = [(0, 0)] * 4
    for axis, size, out, taps in zip(axes, layer.image, layer.result, layer.window, strict=True):
        total = max(0, (out - 1) * stride + (taps - 1) * dilation + 1 - size)
        pads[axis] = (total // 2, total - total // 2)
    x = jnp.pad(x, pads)
    if layer.multiplier > 1:
        x = jnp.repeat(x, layer.multiplier, axis=3 if case.layout == "NHWC" else 1)
    result = 0
    for i in range(layer.window[0]):
        for j in range(layer.window[1]):
            window = x
            for axis, first, out in zip(axes, (i * dilation, j * dilation), layer.result, strict=True):
                window = lax.slice_in_dim(window, first, first + (out - 1) * stride + 1, stride, axis)
            tap = kernel[i, j, 0] if case.layout == "NHWC" else kernel[i, j, 0][:, None, None]
            result += window.astype(jnp.float32) * tap.astype(jnp.float32)
    return result.astype(x.dtype)


def _pass(peer: str, case: Case, x: jax.Array, kernel: jax.Array) -> Callable:
    """The operator of the case as a jitted function of its two operands, without the forward pass in the gradients."""
    convolve = functools.partial(_convolve, peer, case)
    functions = {
        "forward": convolve,
        "grad_input": lambda g, kernel: jax.linear_transpose(lambda x: convolve(x, kernel), x)(g)[0],
        "grad_filter": lambda x, g: jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)(g)[0],
    }
    return jax.jit(functions[case.operator])


@functools.lru_cache(maxsize=1)
def _arrays(layer: Layer, batch: int, dtype: str, layout: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values of x, of the kernel and of the result's gradient: the same for all operators of a layer."""
    channels, out_channels = layer.channels, layer.channels * layer.multiplier
    last = layout == "NHWC"
    shapes = (
        (batch, *((*layer.image, channels) if last else (channels, *layer.image))),
        (*layer.window, 1, out_channels),
        (batch, *((*layer.result, out_channels) if last else (out_channels, *layer.result))),
    )

    @jax.jit
    def normal(keys):
        return tuple(jax.random.normal(key, s).astype(dtype) for key, s in zip(keys, shapes, strict=True))

    return normal(jax.random.split(jax.random.key(0), len(shapes)))


def _products_per_us(seconds: float) -> float:
    """The rate of multiply-adds of all cores; infinite where our module is missing."""
    module = _native.load("cpu")
    if not isinstance(module, ModuleType):
        return math.inf
    threads, rounds, rates = len(os.sched_getaffinity(0)), 200_000, []
    with ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(rates) < 5:
            start = time.perf_counter()
            products = sum(pool.map(module.multiply_add, [rounds] * threads))
            rates.append(products / (1e6 * (time.perf_counter() - start)))
    return statistics.median(rates)


def _microseconds(function: Callable, operands: tuple, seconds: float) -> float:
    jax.block_until_ready(function(*operands))
    if jax.default_backend() == "gpu":
        from jax.experimental.mosaic.gpu import profiler  # noqa: PLC0415  (needs a GPU)

        measured = profiler.measure(function)  # after a call with the same operands
        return 1e3 * statistics.median(measured(*operands)[1] for _ in range(7))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        jax.block_until_ready(function(*operands))
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


class Floor(NamedTuple):
    """What a kernel that reads and writes everything once in the device's memory cannot undercut."""

    launch_us: float
    bytes_per_us: float
    products_per_us: float

    @classmethod
    def measure(cls, seconds: float) -> "Floor":
        negate = jax.jit(jnp.negative)  # a copy would be no kernel
        small = _microseconds(negate, (jnp.zeros(1024, jnp.float32),), seconds)
        if jax.default_backend() == "gpu":
            large = jnp.zeros(2**28, jnp.float32)
            rate = 2 * large.nbytes / _microseconds(negate, (large,), seconds)
            kind = jax.devices()[0].device_kind
            products = next((rate / 1e6 for name, rate in _FMA_PER_SECOND.items() if name in kind), math.inf)
            return cls(small, rate, products)
        in_place = jax.jit(jnp.negative, donate_argnums=0)  # new memory would cost page faults
        large = in_place(jnp.zeros(2**24, jnp.float32))
        times = []
        for _ in range(9):
            start = time.perf_counter()
            large = jax.block_until_ready(in_place(large))
            times.append(1e6 * (time.perf_counter() - start))
        return cls(small, 2 * large.nbytes / statistics.median(times), _products_per_us(seconds))

    def of(self, case: Case) -> float:
        layer = case.layer
        results = layer.channels * layer.multiplier * math.prod(layer.result)
        taps = math.prod(layer.window)
        elements = case.batch * (layer.channels * math.prod(layer.image) + results)
        traffic = (elements + layer.channels * layer.multiplier * taps) * jnp.dtype(case.dtype).itemsize
        products = case.batch * results * taps
        return max(self.launch_us, traffic / self.bytes_per_us, products / self.products_per_us)


@jax.jit
def _disagreement(ours: jax.Array, theirs: jax.Array) -> jax.Array:
    """Largest difference relative to the largest value."""
    ours, theirs = (a.astype(jnp.float32) for a in (ours, theirs))
    return jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs))


class _Torch:
    """PyTorch in a process of its own: two libraries cannot listen to CUPTI at once, nor share all cores."""

    def __init__(self, seconds: float):
        self._process = None
        if importlib.util.find_spec("torch") is None:
            print("no times of PyTorch: it is not installed", file=sys.stderr)
            return
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        script = pathlib.Path(__file__).with_name("_bench_torch.py")
        self._process = subprocess.Popen(
            [sys.executable, script, device, str(seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def microseconds(self, case: Case) -> float | None:
        """Measures one case right now, so that the other contestants see the same machine."""
        if self._process is None:
            return None
        self._process.stdin.write(json.dumps({**case._asdict(), "layer": case.layer._asdict()}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            print("PyTorch could not be measured: see above", file=sys.stderr)
            self._process = None
            return None
        return json.loads(answer)

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()


def _with_tile(tile: str, measure: Callable) -> float:
    os.environ["JAX_DWSCONV_TILE"] = tile
    try:
        return measure()
    finally:
        del os.environ["JAX_DWSCONV_TILE"]


def _sweep(case: Case, operands, x, kernel, seconds: float) -> tuple[str, float]:
    """The best of the most promising tiles, and its time."""
    layer = case.layer
    if layer.multiplier > 1:
        return "", math.nan  # one kernel has it, with nothing to choose
    device = _planning.visible_device()
    if device is None:
        raise SystemExit(f"the planner's table has no {jax.devices()[0].device_kind}: add it to _planning.DEVICES")
    _, candidates = _planning.plan(
        case.operator,
        (case.batch, *layer.image, layer.channels),
        layer.window,
        (layer.stride,) * 2,
        dilation=(layer.dilation,) * 2,
        layout=case.layout,
        dtype=case.dtype,
        device=device,
    )
    promising = sorted((c for c in candidates if c.cycles > 0), key=lambda c: c.cycles)[:40]

    def measure():
        return _microseconds(_pass("ours", case, x, kernel), operands, seconds)

    times = {candidate.text: _with_tile(candidate.text, measure) for candidate in promising}
    best = min(times, key=times.get)
    return best, times[best]


def _measure(case: Case, peers: list[str], floor: Floor, sweep: bool, seconds: float) -> dict:
    x, kernel, g = _arrays(case.layer, case.batch, case.dtype, case.layout)
    operands = {"forward": (x, kernel), "grad_input": (g, kernel), "grad_filter": (x, g)}[case.operator]
    ours = _pass("ours", case, x, kernel)
    row = {**case._asdict(), "layer": str(case.layer), "floor_us": floor.of(case)}
    row["ours_us"] = _microseconds(ours, operands, seconds)
    for peer in peers:
        if peer == "torch" or (peer == "shift" and max(case.layer.window) > _LARGEST_SHIFT_KERNEL):
            continue
        theirs = _pass(peer, case, x, kernel)
        with jax.default_matmul_precision("highest" if case.dtype == "float32" else None):  # else no other to compile
            error = float(_disagreement(ours(*operands), theirs(*operands)))
        if not error < (1e-4 if case.dtype == "float32" else 3e-2):
            raise SystemExit(f"{case} differs from {peer} by {error:.1e}")
        row[f"{peer}_us"] = _microseconds(theirs, operands, seconds)
    if sweep:
        row["best_tile"], row["best_us"] = _sweep(case, operands, x, kernel, seconds)
    return row


def _geometric_means(rows: list[dict], columns: list[str]) -> Iterator[str]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["operator"], row["dtype"], row["layout"], row["batch"]), []).append(row)
    for key, group in groups.items():
        ratios = {"ours / floor": [r["ours_us"] / r["floor_us"] for r in group]}
        for column in columns:
            ratios[f"{column[:-3]} / ours"] = [r[column] / r["ours_us"] for r in group if r.get(column)]
        shown = ", ".join(f"{k} {statistics.geometric_mean(v):.2f}" for k, v in ratios.items() if v)
        yield f"{' '.join(map(str, key[:3]))} batch {key[3]} ({len(group)} layers): {shown}"


def _slower(rows: list[dict], columns: list[str]) -> Iterator[str]:
    """The cases in which a peer is faster by more than 3 % and more than 0.1 us."""
    for row in rows:
        peer, best = min(((c, row[c]) for c in columns if row.get(c)), key=lambda pair: pair[1], default=(None, None))
        if peer is not None and row["ours_us"] > best + max(0.03 * best, 0.1):
            case = " ".join(str(row[name]) for name in ("operator", "layer", "batch", "dtype", "layout"))
            yield f"slower than {peer[:-3]}: {case}, {row['ours_us']:.2f} us against {best:.2f}"


def _plot(rows: list[dict], path: pathlib.Path) -> None:
    try:
        from matplotlib import pyplot  # noqa: PLC0415  (optional)
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'jax-dwsconv[bench]')", file=sys.stderr)
        return
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["layout"], row["batch"]), []).append(row)
    figure, axes = pyplot.subplots(len(groups), 1, figsize=(9, 2.6 * len(groups)), squeeze=False, layout="constrained")
    for axis, (key, group) in zip(axes[:, 0], groups.items(), strict=True):
        layers = list(dict.fromkeys(row["layer"] for row in group))
        for shift, operator in enumerate(OPERATORS):
            found = {r["layer"]: r["ours_us"] / r["floor_us"] for r in group if r["operator"] == operator}
            positions = [layers.index(layer) + 0.27 * (shift - 1) for layer in found]
            axis.bar(positions, list(found.values()), 0.25, label=operator)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(layers)), layers, rotation=25, ha="right", fontsize=8)
        axis.set_ylabel("time / floor")
        axis.set_title(f"{key[0]}, {key[1]}, batch {key[2]}", fontsize=9)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _environment() -> dict:
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "jax-dwsconv": _versions.PACKAGE,
        "date": datetime.date.today().isoformat(),
    }


def run(options) -> int:
    """Measures what the parsed command line asks for, prints a table and writes the files. Returns the exit code."""
    _native.require_kernels()
    peers = list(options.peers)
    of_models = [layer for model in options.models for layer in MODELS[model]]
    sampled = random_layers(options.random, options.seed)
    layers = list(dict.fromkeys(options.layers or of_models or sampled or LAYERS))
    environment = _environment()
    print(", ".join(f"{k} {v}" for k, v in environment.items()))
    floor = Floor.measure(options.seconds)
    limits = [f"{floor.launch_us:.2f} us for a copy of 4 KiB", f"{floor.bytes_per_us / 1e3:.0f} GB/s"]
    if math.isfinite(floor.products_per_us):
        limits.append(f"{floor.products_per_us / 1e3:.0f}e9 products per second")
    print(f"floor: {', '.join(limits)}\n")
    columns = [f"{peer}_us" for peer in peers] + (["best_us"] if options.sweep else [])
    names = ["floor_us", "ours_us", *columns, *(["best_tile"] if options.sweep else [])]
    print(
        f"| operator | layer | batch | dtype | layout | {' | '.join(names)} |\n|{'---|' * (5 + len(names))}", flush=True
    )
    cases = [
        Case(operator, layer, batch, dtype, layout)
        for batch in options.batch
        for dtype in options.dtype
        for layout in options.layout
        for layer in layers
        for operator in options.operators
    ]
    torch = _Torch(options.seconds) if "torch" in peers else None
    rows: list[dict] = []

    def write() -> None:
        if options.output is None:
            return
        path = pathlib.Path(options.output)
        text = json.dumps({"environment": environment, "floor": floor._asdict(), "rows": rows}, indent=1)
        path.with_suffix(".json").write_text(text + "\n")
        with path.with_suffix(".csv").open("w", newline="") as file:
            fields = ["operator", "layer", "batch", "dtype", "layout", *names]
            writer = csv.DictWriter(file, fields, extrasaction="ignore")
            writer.writeheader()
            writer.writerows({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows)

    for number, case in enumerate(cases):
        if sys.stderr.isatty():
            print(f"\r{number + 1} of {len(cases)}: {case.operator} {case.layer} ", end="", file=sys.stderr)
        row = _measure(case, peers, floor, options.sweep, options.seconds)
        if torch:
            row["torch_us"] = torch.microseconds(case)
        rows.append(row)
        cells = [row.get(name) for name in names]
        shown = [f"{cell:.2f}" if isinstance(cell, float) else str(cell or "-") for cell in cells]
        print(f"| {case.operator} | {case.layer} | {case.batch} | {case.dtype} | {case.layout} | {' | '.join(shown)} |")
        sys.stdout.flush()
        write()
    if torch:
        torch.close()
    print()
    of_peers = [c for c in columns if c != "best_us"]
    for line in (*_geometric_means(rows, of_peers), *_slower(rows, of_peers)):
        print(line)
    if options.sweep:
        regrets = [row["ours_us"] / row["best_us"] for row in rows if row["best_tile"]]
        print(f"planner / best tile: {statistics.geometric_mean(regrets):.3f} on average, {max(regrets):.3f} at worst")
    if options.output is not None:
        _plot(rows, pathlib.Path(options.output).with_suffix(".png"))
    return 0
