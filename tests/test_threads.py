"""Several threads and several devices use the operators at once, and get the bits that one gets alone."""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import meshes
import numerics
import numpy as np
import pytest
from cases import OPERATORS, Case
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

import jax_dwsconv

CALLS = 100
CASES = (
    Case(batch=4, size=(28, 28), channels=32),
    Case(batch=2, size=(31, 17), channels=24, multiplier=2, layout="NCHW", filter_layout="OHW", strides=(2, 1)),
)


def _at_once(*functions: Callable) -> list:
    """Calls every function many times in a thread of its own, all starting together; the results of each."""
    start = threading.Barrier(len(functions))

    def repeat(function: Callable) -> list:
        start.wait(timeout=60)
        return [np.asarray(function()) for _ in range(CALLS)]

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(repeat, functions))


def _assert_always(results: list, expected) -> None:
    for result in results:
        np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_two_threads(operator):
    calls = []
    for case in CASES:
        a, b = (jnp.asarray(x) for x in case.operands(operator))
        calls.append(functools.partial(jax.jit(functools.partial(numerics.run, case, operator)), a, b))
    alone = [np.asarray(call()) for call in calls]
    for results, expected in zip(_at_once(*calls, calls[0]), [*alone, alone[0]], strict=True):
        _assert_always(results, expected)


def test_two_threads_that_trace_and_compile():
    """Nothing is compiled yet when both threads start, and every call is traced anew."""
    x, kernel = jnp.asarray(numerics.normal(2, 9, 8, 5)), jnp.asarray(numerics.normal(3, 3, 1, 5, seed=1))

    def gradient():
        loss = jax.jit(lambda kernel: jnp.sum(jax_dwsconv.depthwise_conv2d(x, kernel, activation="silu")))
        return jax.grad(loss)(kernel)

    start = threading.Barrier(2)

    def some(_) -> list:
        start.wait(timeout=60)
        return [np.asarray(gradient()) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(some, range(2))
    _assert_always(first + second, np.asarray(gradient()))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("platform", "devices"), [("cpu", 2), pytest.param("gpu", 2, marks=pytest.mark.gpu)], ids=["cpu", "gpu"]
)
def test_two_devices(platform, devices, operator):
    devices = jax.devices(platform)[:devices]
    if len(devices) < 2:
        pytest.skip("needs 2 devices")
    case = CASES[0]
    run = jax.jit(functools.partial(numerics.run, case, operator))
    operands = [jax.device_put(case.operands(operator), device) for device in devices]
    alone = np.asarray(run(*operands[0]))
    for results in _at_once(*(functools.partial(run, *pair) for pair in operands)):
        _assert_always(results, alone)


def test_two_meshes():
    """A sum over one mesh must not wait for one over another."""
    x, g = CASES[0].operands("grad_filter")
    devices = jax.devices("cpu")
    calls = []
    for half in (devices[:4], devices[4:]):
        mesh = jax.make_mesh((4,), ("a",), (jax.sharding.AxisType.Auto,), devices=half)
        operands = meshes.place(mesh, (x, P("a")), (g, P("a")))
        calls.append(functools.partial(jax.jit(functools.partial(numerics.run, CASES[0], "grad_filter")), *operands))
    alone = np.asarray(calls[0]())
    for results in _at_once(*calls):
        _assert_always(results, alone)
