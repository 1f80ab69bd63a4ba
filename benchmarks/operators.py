"""Times the three operators against jax.lax, layer by layer.

Both sides run in the same process on the same random inputs and are compared before they are timed. Times are medians:
on a GPU of the time that its kernels take, elsewhere of one jitted call that is blocked on.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from jax import lax, numpy as jnp

import jax_dwsconv

# Layers of MobileNetV2, EfficientNet-B0 and ConvNeXt-T: (height = width, channels, kernel, stride).
LAYERS = [
    (112, 32, 3, 1),
    (112, 96, 3, 2),
    (56, 144, 3, 1),
    (56, 144, 5, 2),
    (28, 240, 5, 1),
    (14, 512, 3, 1),
    (14, 672, 5, 1),
    (7, 1152, 5, 1),
    (56, 96, 7, 1),
    (14, 384, 7, 1),
]
OPERATORS = ("forward", "grad_input", "grad_filter")


def passes(convolve: Callable, x: jax.Array, kernel: jax.Array, g: jax.Array) -> list[tuple[Callable, tuple]]:
    """Each operator as a jitted function with its arguments; the gradients without the forward pass."""

    def grad_input(g, kernel):
        return jax.linear_transpose(lambda x: convolve(x, kernel), x)(g)[0]

    def grad_filter(x, g):
        return jax.linear_transpose(lambda kernel: convolve(x, kernel), kernel)(g)[0]

    return [(jax.jit(convolve), (x, kernel)), (jax.jit(grad_input), (g, kernel)), (jax.jit(grad_filter), (x, g))]


def median_ms(function: Callable, arguments: tuple, seconds: float) -> float:
    """Median time of a call in milliseconds, over about the given time."""
    jax.block_until_ready(function(*arguments))
    if jax.default_backend() == "gpu":
        from jax.experimental.mosaic.gpu import profiler  # noqa: PLC0415  (needs a GPU)

        return statistics.median(profiler.measure(function)(*arguments)[1] for _ in range(7))
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def disagreement(ours: jax.Array, theirs: jax.Array) -> float:
    """Largest difference relative to the largest value."""
    ours, theirs = (np.asarray(a, np.float64) for a in (ours, theirs))
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def operands(layer: tuple, batch: int, dtype) -> tuple[Callable, Callable, jax.Array, jax.Array, jax.Array]:
    """Our convolution, lax's, and random x, kernel and g for a layer."""
    size, channels, kernel_size, stride = layer
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, size, size, channels)), dtype)
    kernel = jnp.asarray(rng.normal(size=(kernel_size, kernel_size, 1, channels)), dtype)

    def ours(x, kernel):
        return jax_dwsconv.depthwise_conv2d(x, kernel, strides=stride)

    def theirs(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=channels
        )

    g = jnp.asarray(rng.normal(size=jax.eval_shape(ours, x, kernel).shape), dtype)
    return ours, theirs, x, kernel, g


def main() -> None:
    """Prints one row per layer, and the geometric means of the speed-ups."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--operators", nargs="+", default=OPERATORS, choices=OPERATORS, metavar="OPERATOR")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each measurement on the CPU")
    options = parser.parse_args()
    device = jax.devices()[0]
    cores = f", {len(os.sched_getaffinity(0))} cores" if device.platform == "cpu" else ""
    print(f"{device.device_kind}{cores}, jax {jax.__version__}, jax-dwsconv {jax_dwsconv.__version__}")
    print(f"batch {options.batch}, {options.dtype}, NHWC; ms: ours / lax / speed-up\n")
    print("| layer | " + " | ".join(options.operators) + " |\n|---|" + "---|" * len(options.operators), flush=True)
    speedups = {operator: [] for operator in options.operators}
    tolerance = 1e-4 if options.dtype == "float32" else 3e-2
    for layer in LAYERS:
        ours, theirs, *arrays = operands(layer, options.batch, jnp.dtype(options.dtype))
        cells = []
        for operator in options.operators:
            (ours_pass, arguments), (their_pass, _) = (
                passes(f, *arrays)[OPERATORS.index(operator)] for f in (ours, theirs)
            )
            with jax.default_matmul_precision("highest"):
                error = disagreement(ours_pass(*arguments), jax.jit(their_pass)(*arguments))
            if not error < tolerance:
                raise SystemExit(f"{operator} of {layer} differs from lax by {error:.1e}")
            our_ms = median_ms(ours_pass, arguments, options.seconds)
            their_ms = median_ms(their_pass, arguments, options.seconds)
            speedups[operator].append(their_ms / our_ms)
            cells.append(f"{our_ms:.3g} / {their_ms:.3g} / {their_ms / our_ms:.1f}x")
        size, channels, kernel_size, stride = layer
        print(f"| {size}x{size}x{channels} k{kernel_size} s{stride} | " + " | ".join(cells) + " |", flush=True)
    means = (f"{statistics.geometric_mean(s):.1f}x" for s in speedups.values())
    print("| geometric mean | " + " | ".join(means) + " |")


if __name__ == "__main__":
    main()
