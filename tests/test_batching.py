import functools
import itertools

import jax
import numerics
import numpy as np
import pytest
from cases import LAYOUTS, OPERATORS, Case
from jax import numpy as jnp

import jax_dwsconv

SIZE = 4  # of a mapped axis
CASES = (
    Case(channels=5, strides=(1, 2)),
    Case(channels=3, multiplier=2, layout="NCHW", filter_layout="OHW"),
    Case(channels=3, batch=4, groups=2, dilation=(2, 1), filter_layout="OHW"),
)
# Where the mapped axis is in each of the two operands and in the result.
AXES = [(0, None, 0), (None, 0, 0), (0, 0, 0), (2, 1, 1), (None, 4, 3), (3, None, 4), (-1, -2, 2)]


def _stack(operand: np.ndarray, axis: int | None, size: int = SIZE) -> np.ndarray:
    """Different operands along a new axis."""
    return (
        operand if axis is None else np.stack([np.roll(operand, i) * np.float32(1 + i / 8) for i in range(size)], axis)
    )


def _loop(f, in_axes, out_axes, *args):
    """What vmap means."""
    size = next(a.shape[axis] for a, axis in zip(args, in_axes, strict=True) if axis is not None)
    results = [
        f(*(a if axis is None else a[_at(i, axis, a.ndim)] for a, axis in zip(args, in_axes, strict=True)))
        for i in range(size)
    ]
    return jnp.stack(results, out_axes)


def _at(i: int, axis: int, ndim: int) -> tuple:
    return (slice(None),) * (axis % ndim) + (i,)


def _assert_same(a, b, length=100):
    assert a.dtype == b.dtype
    numerics.assert_close(a, b, length=length)


@pytest.mark.parametrize("axes", AXES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_operators(case, operator, axes):
    *in_axes, out_axes = axes
    f = functools.partial(numerics.run, case, operator)
    args = [_stack(a, axis) for a, axis in zip(case.operands(operator), in_axes, strict=True)]
    _assert_same(jax.vmap(f, in_axes, out_axes)(*args), _loop(f, in_axes, out_axes, *args))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("outer", "inner"), [((0, 0), (0, None)), ((0, None), (None, 0)), ((None, 1), (1, 0)), ((0, 0), (0, 0))]
)
def test_nested(operator, outer, inner):
    case = CASES[0]
    f = functools.partial(numerics.run, case, operator)
    args = []
    for a, in_outer, in_inner in zip(case.operands(operator), outer, inner, strict=True):
        args.append(_stack(_stack(a, in_inner, 2), in_outer, 3))
    result = jax.vmap(jax.vmap(f, inner), outer)(*args)
    _assert_same(result, _loop(lambda *a: _loop(f, inner, 0, *a), outer, 0, *args))


@pytest.mark.parametrize("operator", OPERATORS)
def test_mapped_over_nothing(operator):
    a, b = CASES[0].operands(operator)
    f = functools.partial(numerics.run, CASES[0], operator)
    result = jax.vmap(f, (0, None))(jnp.zeros((0, *a.shape)), jnp.asarray(b))
    assert result.shape == (0, *f(jnp.asarray(a), jnp.asarray(b)).shape)


PUBLIC = {
    "conv1d": lambda x, k: jax_dwsconv.depthwise_conv1d(x[0], k[0], strides=2, padding="CAUSAL"),
    "conv2d": lambda x, k: jax_dwsconv.depthwise_conv2d(x, k, strides=2, bias=k[0, 0, 0], activation="silu"),
    "conv2d NCHW": lambda x, k: jax_dwsconv.depthwise_conv2d(
        x.mT, k, data_format="NCHW", scale=k[0, 0, 0], activation=jnp.tanh
    ),
    "transpose": lambda x, k: jax_dwsconv.depthwise_conv_transpose2d(x, k, strides=2),
    "separable": lambda x, k: jax_dwsconv.separable_conv2d(x, k, k[0, 0, 0, :, None], depthwise_activation="relu"),
    "lax": lambda x, k: jax_dwsconv.conv_general_dilated(
        x[None], k, (1, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=5
    ),
    "lax transposed": lambda x, k: jax_dwsconv.conv_general_dilated(
        x[None], k, (1, 1), [(1, 1), (2, 0)], (2, 2), dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=5
    ),
}


@pytest.mark.parametrize("axes", [(0, None, 0), (None, 1, 1), (2, 0, -1), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions(name, axes):
    *in_axes, out_axes = axes
    operands = Case(batch=1, channels=5, size=(5, 5)).operands("forward")
    args = [_stack(a, axis) for a, axis in zip((operands[0][0], operands[1][0, :, :, None]), in_axes, strict=True)]
    result = jax.vmap(PUBLIC[name], in_axes, out_axes)(*args)
    _assert_same(result, _loop(PUBLIC[name], in_axes, out_axes, *args), length=1000)


def _loss(data_format, x, kernel):
    y = jax_dwsconv.depthwise_conv2d(x, kernel, strides=2, data_format=data_format)
    return jnp.sum(jnp.sin(y))


@pytest.mark.parametrize(("x_axis", "kernel_axis"), [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_grad_of_vmap(layout, x_axis, kernel_axis):
    case = Case(channels=5, layout=layout)
    x, kernel = case.operands("forward")
    args = _stack(x, x_axis), _stack(kernel[0, :, :, None], kernel_axis)
    loss = functools.partial(_loss, layout)

    def mapped(*args):
        return jnp.sum(jax.vmap(loss, (x_axis, kernel_axis))(*args))

    def looped(*args):
        return jnp.sum(_loop(loss, (x_axis, kernel_axis), 0, *args))

    for a, b in zip(jax.grad(mapped, (0, 1))(*args), jax.grad(looped, (0, 1))(*args), strict=True):
        _assert_same(a, b, length=1000)


@pytest.mark.parametrize(("x_axis", "kernel_axis"), [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_of_grad(layout, x_axis, kernel_axis):
    x, kernel = Case(channels=5, layout=layout).operands("forward")
    args = _stack(x, x_axis), _stack(kernel[0, :, :, None], kernel_axis)
    for argnum in (0, 1):
        gradient = jax.grad(functools.partial(_loss, layout), argnum)
        result = jax.vmap(gradient, (x_axis, kernel_axis))(*args)
        _assert_same(result, _loop(gradient, (x_axis, kernel_axis), 0, *args), length=1000)


@pytest.mark.parametrize(("layout", "batched"), list(itertools.product(LAYOUTS, [False, True])))
def test_per_example_gradients_move_no_activations(layout, batched):
    """They are one grad_filter with as many groups as examples."""
    x, kernel = Case(batch=6, channels=5, layout=layout).operands("forward")
    x, kernel = jnp.asarray(x[:, None] if batched else x), jnp.asarray(kernel[0, :, :, None])
    gradients = jax.vmap(jax.grad(functools.partial(_loss, layout), 1), (0, None))

    equations = list(numerics.equations(jax.make_jaxpr(gradients)(x, kernel).jaxpr))
    convolutions = [e for e in equations if e.primitive.name.startswith("dwsconv_")]
    assert [e.primitive.name for e in convolutions] == ["dwsconv_forward", "dwsconv_grad_filter"]
    assert convolutions[1].params["groups"] == 6
    moved = [e.primitive.name for e in equations if e.primitive.name in ("transpose", "gather", "concatenate", "copy")]
    assert moved == []

    expected = _loop(jax.grad(functools.partial(_loss, layout), 1), (0, None), 0, x, kernel)
    _assert_same(gradients(x, kernel), expected)
