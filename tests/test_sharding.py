"""Auto mode: XLA divides the operators. Expected values are in float64 or unsharded, never those of a sharded lax."""

import functools
import itertools
import random
from collections import Counter
from collections.abc import Iterator

import jax
import meshes
import numerics
import numpy as np
import pytest
from cases import OPERATORS, ROLES, Case
from jax import lax, numpy as jnp
from jax.sharding import PartitionSpec as P

import jax_dwsconv
from jax_dwsconv.partitioning import Axes, Division

MESHES = ((8,), (4, 2), (2, 2, 2))
MESH_OF_ONE_AXIS, MESH_OF_TWO_AXES, _ = MESHES
# Which of the two operands come divided; the others are whole on every device.
CARRIERS = ((True, True), (True, False), (False, True))
CASES = (
    Case(batch=8, channels=8),
    Case(batch=8, channels=8, layout="NCHW", filter_layout="OHW", strides=(2, 1)),
    Case(batch=8, channels=8, multiplier=2, filter_layout="OHW", dilation=(1, 2)),
    Case(batch=8, channels=8, multiplier=2, layout="NCHW", strides=(2, 2)),
    Case(batch=8, channels=8, size=(1, 13), kernel_size=(1, 3), padding=((0, 0), (2, 0))),
    Case(batch=8, channels=8, size=(1, 13), kernel_size=(1, 3), padding=((0, 0), (1, 1)), layout="NCHW", multiplier=2),
    Case(batch=8, channels=8, dtypes=("bfloat16",) * 3),
    Case(batch=8, channels=8, multiplier=2, layout="NCHW", dtypes=("bfloat16", "float32", "bfloat16")),
    Case(batch=8, channels=8, groups=8, filter_layout="OHW"),
    Case(batch=16, channels=8, groups=8, multiplier=2, layout="NCHW"),
)


def _divisions(mesh_shape: tuple[int, ...]) -> Iterator[tuple[Axes, Axes]]:
    """Every way to divide batch and channels by at most two axes each, in any order; other axes stay unused."""
    axes = "abc"[: len(mesh_shape)]
    choices = [p for n in (0, 1, 2) for p in itertools.permutations(axes, n)]
    return ((b, c) for b, c in itertools.product(choices, repeat=2) if not set(b) & set(c))


def _generated() -> list:
    usual = [
        (mesh, batch, channels, carriers, case)
        for case in CASES
        for mesh, batch, channels, carriers in (
            (MESH_OF_ONE_AXIS, ("a",), (), CARRIERS[0]),
            (MESH_OF_ONE_AXIS, (), ("a",), CARRIERS[0]),
            (MESH_OF_TWO_AXES, ("a",), ("b",), CARRIERS[1]),
        )
    ]
    combinations = list(itertools.product(CARRIERS, CASES))
    random.Random(0).shuffle(combinations)
    divisions = [(mesh, *division) for mesh in MESHES for division in _divisions(mesh)]
    every_division = [(*d, *c) for d, c in zip(divisions, itertools.cycle(combinations), strict=False)]
    return [pytest.param(*case, id=_id(*case)) for case in dict.fromkeys(usual + every_division)]


def _id(mesh_shape, batch, channels, carriers, case) -> str:
    mesh = "x".join(map(str, mesh_shape))
    which = {(True, True): "both", (True, False): "first", (False, True): "second"}[carriers]
    return f"{mesh}-batch={''.join(batch)}-channels={''.join(channels)}-{which}-{case}"


def _spec(case: Case, role: str, batch: Axes, channels: Axes) -> P:
    division = Division(batch, channels, case.groups > 1)
    return division.spec("kernel" if role == "filter" else "x", case.window)


def _run(mesh, case: Case, operator: str, specs) -> tuple[jax.Array, Counter[str]]:
    """Runs an operator on operands that are divided by `specs`, and checks the result."""
    a, b = case.operands(operator)
    operands = meshes.place(mesh, *zip((a, b), specs, strict=True))
    result, collectives = meshes.run(functools.partial(numerics.run, case, operator), *operands)
    numerics.check_result(case, operator, a, b, result)
    return result, collectives


@pytest.mark.parametrize(("mesh_shape", "batch", "channels", "carriers", "case"), _generated())
@pytest.mark.parametrize("operator", OPERATORS)
def test_batch_and_channels(operator, mesh_shape, batch, channels, carriers, case):
    mesh = meshes.make(*mesh_shape)
    *roles, result_role = ROLES[operator]
    specs = [
        _spec(case, role, batch, channels) if carries else P() for role, carries in zip(roles, carriers, strict=True)
    ]
    has_batch = [
        carries and (role != "filter" or case.groups > 1) for role, carries in zip(roles, carriers, strict=True)
    ]
    divided_batch = batch if any(has_batch) else ()

    result, collectives = _run(mesh, case, operator, specs)

    adds_up = operator == "grad_filter" and case.groups == 1 and divided_batch
    assert collectives == ({"all-reduce": 1} if adds_up else {})
    assert meshes.is_divided(result, _spec(case, result_role, divided_batch, channels), mesh)


@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.parametrize("operator", OPERATORS)
def test_any_single_dimension(operator, operand, dimension):
    """Of either operand: taps are gathered."""
    case = Case(batch=4, size=(8, 8), channels=4, kernel_size=(4, 2), padding=((2, 1), (1, 0)), groups=4)
    specs = [P(), P()]
    specs[operand] = P(*[None] * dimension, "b")
    result, _ = _run(meshes.make(4, 2), case, operator, specs)
    is_tap = ROLES[operator][operand] == "filter" and dimension in (1, 2)
    adds_up = operator == "grad_filter" and dimension in (1, 2)
    assert result.sharding.is_fully_replicated == (is_tap or adds_up)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("case", "specs"),
    [
        # 12 output channels divide by 4, the 6 of the input do not.
        (Case(channels=6, multiplier=2), {"filter": P(None, None, None, "a"), "output": P(None, None, None, "a")}),
        # 8 images divide by 4, the 2 filters do not.
        (Case(batch=8, groups=2, layout="NCHW"), {"input": P("a"), "output": P("a")}),
    ],
    ids=["channels", "filters"],
)
def test_what_does_not_divide_evenly(case, specs, operator):
    _run(meshes.make(4, 2), case, operator, [specs.get(role, P()) for role in ROLES[operator][:2]])


@pytest.mark.parametrize("operator", OPERATORS)
def test_operands_that_disagree(operator):
    case = Case(batch=8, channels=8)
    roles = ROLES[operator]
    specs = _spec(case, roles[0], ("a",), ("b",)), _spec(case, roles[1], ("b",), ("a",))
    _run(meshes.make(4, 2), case, operator, specs)


def test_filter_gradient_where_lax_is_wrong():
    """Batch over one axis of two: lax (jax 0.10 to 0.12, on the CPU) gives a multiple of the gradient."""
    case, mesh = Case(batch=8, channels=8), meshes.make(4, 2)
    x, g = case.operands("grad_filter")
    kernel = np.zeros((*case.kernel_size, 1, case.channels), np.float32)

    def filter_gradient(x, kernel, g):
        return jax.vjp(functools.partial(jax_dwsconv.depthwise_conv2d, x), kernel)[1](g)[0]

    unsharded = filter_gradient(x, kernel, g)
    for axis in mesh.axis_names:
        operands = meshes.place(mesh, (x, P(axis)), (kernel, P()), (g, P(axis)))
        sharded, collectives = meshes.run(filter_gradient, *operands)
        numerics.assert_close(sharded, unsharded, length=case.reduction_length("grad_filter"))
        assert collectives == {"all-reduce": 1}


def _pullback(f, cotangent, *args):
    """The value and all gradients, without a sum over the result, which would be a collective of its own."""
    value, vjp = jax.vjp(f, *args)
    return value, vjp(cotangent)


def _assert_same(sharded, unsharded, length=200):
    jax.tree.map(functools.partial(numerics.assert_close, length=length), sharded, unsharded)


@pytest.mark.parametrize("per_example", [False, True], ids=["shared", "per_example"])
def test_vmap_over_a_divided_axis(per_example):
    mesh = meshes.make(8)
    x, g = numerics.normal(8, 2, 5, 6, 4), numerics.normal(8, 2, 5, 6, 4, seed=1)
    kernel = numerics.normal(*((8,) if per_example else ()), 3, 3, 1, 4, seed=2)
    f = jax.vmap(jax_dwsconv.depthwise_conv2d, (0, 0 if per_example else None))
    operands = meshes.place(mesh, (x, P("a")), (kernel, P("a") if per_example else P()), (g, P("a")))

    value, collectives = meshes.run(f, *operands[:2])
    assert collectives == {}
    _assert_same(value, f(x, kernel))

    def gradients(x, kernel, g):
        return _pullback(f, g, x, kernel)

    result, collectives = meshes.run(gradients, *operands)
    assert collectives == ({} if per_example else {"all-reduce": 1})
    _assert_same(result, gradients(x, kernel, g))


@pytest.mark.parametrize("mapped_kernel", [False, True])
def test_vmap_around_a_divided_batch(mapped_kernel):
    """The mapped axis is folded into the batch, in front of the divided part: gathered, but right."""
    x, kernel = numerics.normal(3, 8, 5, 6, 4), numerics.normal(*([3] if mapped_kernel else []), 3, 3, 1, 4, seed=1)
    f = jax.vmap(jax_dwsconv.depthwise_conv2d, (0, 0 if mapped_kernel else None))
    result, _ = meshes.run(f, *meshes.place(meshes.make(8), (x, P(None, "a")), (kernel, P())))
    _assert_same(result, f(x, kernel))


def test_gradients_of_every_example():
    """vmap of a gradient: a filter gradient for each example, nothing to add up."""
    x, g, kernel = numerics.normal(8, 5, 6, 4), numerics.normal(8, 5, 6, 4, seed=1), numerics.normal(3, 3, 1, 4, seed=2)

    def gradients(x, kernel, g):
        return jax.vmap(lambda x, g: _pullback(jax_dwsconv.depthwise_conv2d, g, x, kernel)[1])(x, g)

    operands = meshes.place(meshes.make(8), (x, P("a")), (kernel, P()), (g, P("a")))
    result, collectives = meshes.run(gradients, *operands)
    assert collectives == {}
    _assert_same(result, gradients(x, kernel, g))


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpoint"])
def test_scan_over_layers(checkpoint):
    def layer(x, kernel):
        return jnp.tanh(jax_dwsconv.depthwise_conv2d(x, kernel)), None

    def layers(x, kernels):
        return lax.scan(jax.checkpoint(layer) if checkpoint else layer, x, kernels)[0]

    def gradients(x, kernels, g):
        return _pullback(layers, g, x, kernels)

    x, g = numerics.normal(8, 6, 5, 4), numerics.normal(8, 6, 5, 4, seed=1)
    kernels = numerics.normal(3, 3, 3, 1, 4, seed=2) / 3
    operands = meshes.place(
        meshes.make(4, 2), (x, P("a", None, None, "b")), (kernels, P()), (g, P("a", None, None, "b"))
    )
    assert meshes.run(layers, *operands[:2])[1] == {}
    result, collectives = meshes.run(gradients, *operands)
    assert collectives["all-reduce"] == 1  # in the body of the loop
    _assert_same(result, gradients(x, kernels, g), length=1000)


def _train_step(parameters, x, target):
    def loss(parameters, x):
        y = jax_dwsconv.separable_conv2d(
            x, *parameters, depthwise_activation="silu", depthwise_bias=jnp.ones(16), padding="SAME", strides=2
        )
        return jnp.mean((y - target) ** 2)

    value, gradients = jax.value_and_grad(loss)(parameters, x)
    return value, jax.tree.map(lambda p, g: p - 0.1 * g, parameters, gradients)


@pytest.mark.parametrize(
    ("platform", "devices"), [("cpu", 8), pytest.param("gpu", 2, marks=pytest.mark.gpu)], ids=["cpu", "gpu"]
)
def test_train_step_of_a_separable_block(platform, devices):
    if len(jax.devices(platform)) < devices:
        pytest.skip(f"needs {devices} devices")
    mesh = meshes.make(devices, platform=platform)
    x, target = numerics.normal(16, 14, 14, 16), numerics.normal(16, 7, 7, 24, seed=1)
    parameters = numerics.normal(3, 3, 1, 16, seed=2), numerics.normal(1, 1, 16, 24, seed=3)
    one = jax.devices(platform)[0]
    unsharded = jax.jit(_train_step)(*jax.device_put((parameters, x, target), one))
    sharded_parameters = meshes.place(mesh, *((p, P()) for p in parameters))
    sharded, collectives = meshes.run(
        _train_step, tuple(sharded_parameters), *meshes.place(mesh, (x, P("a")), (target, P("a")))
    )
    assert set(collectives) == {"all-reduce"}
    _assert_same(sharded, unsharded, length=16 * 7 * 7)
