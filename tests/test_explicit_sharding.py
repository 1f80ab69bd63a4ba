"""Explicit mode: shardings are part of the types."""

import functools

import jax
import meshes
import numerics
import numpy as np
import pytest
from cases import OPERATORS, ROLES, Case
from jax import lax, numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

import jax_dwsconv
from jax_dwsconv.partitioning import Division

X, KERNEL, Y = numerics.normal(8, 6, 5, 8), numerics.normal(3, 3, 1, 16, seed=1), numerics.normal(8, 6, 5, 16, seed=2)
EVERY_DIVISION = [
    ((8,), ("a",), ()),
    ((8,), (), ("a",)),
    ((4, 2), ("a",), ()),
    ((4, 2), ("a",), ("b",)),
    ((4, 2), ("b",), ("a",)),
    ((4, 2), ("a", "b"), ()),
    ((4, 2), (), ("b", "a")),
    ((2, 2, 2), ("c", "a"), ("b",)),
]


@pytest.fixture
def explicit_mesh():
    mesh = meshes.make(4, 2, axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh):
        yield mesh


def _gradients(x, kernel, g):
    return jax.vjp(functools.partial(jax_dwsconv.depthwise_conv2d), x, kernel)[1](g)


def _assert_same(sharded, unsharded, length=8 * 6 * 5):
    jax.tree.map(functools.partial(numerics.assert_close, length=length), sharded, unsharded)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("mesh_shape", "batch", "channels"), EVERY_DIVISION, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=8, channels=8),
        Case(batch=8, channels=8, multiplier=2, layout="NCHW", filter_layout="OHW", strides=(2, 1)),
        Case(batch=16, channels=8, groups=8, dtypes=("bfloat16", "float32", "bfloat16")),
    ],
    ids=str,
)
def test_operators(case, mesh_shape, batch, channels, operator):
    """The result has the sharding that its type says; only sums over the batch need a collective."""
    division = Division(batch, channels, case.groups > 1)
    roles = ("kernel" if role == "filter" else "x" for role in ROLES[operator])
    *operand_specs, result_spec = (division.spec(role, case.window) for role in roles)
    mesh = meshes.make(*mesh_shape, axis_type=AxisType.Explicit)
    a, b = case.operands(operator)
    with jax.set_mesh(mesh):
        operands = meshes.place(mesh, *zip((a, b), operand_specs, strict=True))
        result, collectives = meshes.run(functools.partial(numerics.run, case, operator), *operands)
    numerics.check_result(case, operator, a, b, result)
    assert jax.typeof(result).sharding.spec == result_spec
    assert meshes.is_divided(result, result_spec, mesh)
    adds_up = operator == "grad_filter" and batch and case.groups == 1
    assert collectives == ({"all-reduce": 1} if adds_up else {})


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("x_spec", "kernel_spec", "y_spec"),
    [
        (P("a"), P(), P("a", None, None, None)),
        (P(("a", "b")), P(), P(("a", "b"), None, None, None)),
        (P(None, None, None, "b"), P(None, None, None, "b"), P(None, None, None, "b")),
        (P("a"), P(None, None, None, "b"), P("a", None, None, "b")),
        (P(None, None, None, "b"), P(), P(None, None, None, "b")),
        (P(), P(None, None, None, "b"), P(None, None, None, "b")),
    ],
    ids=str,
)
def test_types_and_gradients(explicit_mesh, x_spec, kernel_spec, y_spec, jit):
    x, kernel, g = meshes.place(explicit_mesh, (X, x_spec), (KERNEL, kernel_spec), (Y, y_spec))
    wrap = jax.jit if jit else lambda f: f
    y = wrap(jax_dwsconv.depthwise_conv2d)(x, kernel)
    assert jax.typeof(y).sharding.spec == y_spec
    dx, dkernel = wrap(_gradients)(x, kernel, g)
    assert jax.typeof(dx).sharding == jax.typeof(x).sharding
    assert jax.typeof(dkernel).sharding == jax.typeof(kernel).sharding
    _assert_same((y, dx, dkernel), _unsharded(X, KERNEL, Y))


def _unsharded(x, kernel, g):
    with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):
        return jax_dwsconv.depthwise_conv2d(x, kernel), *_gradients(x, kernel, g)


@pytest.mark.parametrize("per_example", [False, True], ids=["shared", "per_example"])
def test_vmap_over_a_divided_axis(explicit_mesh, per_example):
    x = numerics.normal(8, 2, 6, 5, 8)
    kernel = np.stack([KERNEL] * 8) if per_example else KERNEL
    f = jax.jit(jax.vmap(jax_dwsconv.depthwise_conv2d, (0, 0 if per_example else None)))
    operands = meshes.place(explicit_mesh, (x, P("a")), (kernel, P("a") if per_example else P()))
    y = f(*operands)
    assert jax.typeof(y).sharding.spec[0] == "a"
    _assert_same(y, jax_dwsconv.depthwise_conv2d(x, KERNEL))


def test_second_derivative_and_scan(explicit_mesh):
    kernels = np.stack([KERNEL[..., :8], KERNEL[..., 8:]]) / 3

    def loss(kernels, x):
        def layer(x, kernel):
            return jnp.tanh(jax_dwsconv.depthwise_conv2d(x, kernel)), None

        return jnp.sum(lax.scan(layer, x, kernels)[0] ** 2)

    def hessian_vector(kernels, x):
        return jax.jvp(lambda k: jax.grad(loss)(k, x), (kernels,), (kernels,))[1]

    sharded = jax.jit(hessian_vector)(*meshes.place(explicit_mesh, (kernels, P()), (X, P("a"))))
    with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):
        _assert_same(sharded, hessian_vector(kernels, X), length=10_000)


@pytest.mark.parametrize(
    ("x_spec", "kernel_spec", "message"),
    [
        (P(), P("a"), r"dimension 1 of kernel .*'a'.*use jax\.sharding\.reshard"),
        (P(None, None, None, "a"), P(None, "b"), r"dimension 2 of kernel .*use jax\.sharding\.reshard"),
        (
            P(None, None, None, "a"),
            P(None, None, None, "b"),
            r"channels of x and kernel .*'a'.*'b'.*jax\.sharding\.reshard",
        ),
    ],
)
def test_refused(explicit_mesh, x_spec, kernel_spec, message):
    x, kernel = numerics.normal(8, 8, 4, 8), numerics.normal(4, 4, 1, 8)
    operands = meshes.place(explicit_mesh, (x, x_spec), (kernel, kernel_spec))
    with pytest.raises(ValueError, match=message):
        jax.jit(jax_dwsconv.depthwise_conv2d)(*operands)


def test_what_the_error_advises_works(explicit_mesh):
    x, kernel = numerics.normal(8, 8, 4, 8), numerics.normal(4, 4, 1, 8)

    def convolve(x, kernel):
        return jax_dwsconv.depthwise_conv2d(x, jax.sharding.reshard(kernel, P()))

    y = jax.jit(convolve)(*meshes.place(explicit_mesh, (x, P("a")), (kernel, P("b"))))
    assert jax.typeof(y).sharding.spec == P("a", None, None, None)
    numerics.assert_close(y, _unsharded(x, kernel, y)[0], length=16)
