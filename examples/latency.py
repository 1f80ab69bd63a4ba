"""Percentiles of the time that a call of a model takes."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

CALLS = 200
BUDGET_S = 30.0  # for one batch size; fewer calls where the device is slow
AT_LEAST = 3  # calls
IN_FLIGHT = 10  # calls that are started back to back before the last is waited for

Model = Callable[[jax.Array], jax.Array]


class Latency(NamedTuple):
    """Seconds for one call of every sample."""

    blocked: list[float]  # the host waits for every call
    back_to_back: list[float]  # the host waits for the last of IN_FLIGHT calls; their mean


def measure(models: Mapping[str, Model], x: np.ndarray, budget_s: float = BUDGET_S) -> dict[str, Latency]:
    """Latencies of each model on x; the models take turns, so that whatever else the machine does hits them alike."""
    x = jax.device_put(x)
    for model in models.values():
        model(x).block_until_ready()
    samples = {name: Latency([], []) for name in models}
    blocked = {name: latency.blocked for name, latency in samples.items()}
    _sample(models, x, 1, CALLS, budget_s / 2, blocked)
    back_to_back = {name: latency.back_to_back for name, latency in samples.items()}
    _sample(models, x, IN_FLIGHT, CALLS // IN_FLIGHT, budget_s / 2, back_to_back)
    return samples


def _sample(
    models: Mapping[str, Model], x: jax.Array, in_flight: int, count: int, budget_s: float, into: dict[str, list[float]]
) -> None:
    deadline = time.perf_counter() + budget_s
    for index in range(count):
        for name, model in models.items():
            started = time.perf_counter()
            for _ in range(in_flight):
                y = model(x)
            y.block_until_ready()
            into[name].append((time.perf_counter() - started) / in_flight)
        if (index + 1) * in_flight >= AT_LEAST and time.perf_counter() > deadline:
            break


def table(rows: Mapping[int, Mapping[str, Latency]]) -> str:
    """Milliseconds per call by batch size and model: medians and 99th percentiles, and the number of samples."""
    width = max(len(name) for row in rows.values() for name in row)
    lines = [
        f"{'':>7}{'':<{width}}  {'every call blocked':^30}  {f'{IN_FLIGHT} calls back to back':^30}",
        f"{'batch':>5}  {'ms per call':<{width}}  " + "  ".join([f"{'p50':>10}{'p99':>10}{'samples':>10}"] * 2),
    ]
    for batch, row in rows.items():
        for name, latency in row.items():
            columns = "  ".join(map(_percentiles, latency))
            lines.append(f"{batch:>5}  {name:<{width}}  {columns}")
    return "\n".join(lines)


def _percentiles(seconds: list[float]) -> str:
    p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
    return f"{p50:10.2f}{p99:10.2f}{len(seconds):10}"
