import dataclasses
import functools

import jax
import numerics
import numpy as np
import pytest
from cases import OPERATORS, Case
from jax import lax, numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.test_util import check_grads

import jax_dwsconv

CASES = (
    Case(batch=1, size=(4, 5), channels=3),
    Case(batch=1, size=(5, 6), channels=2, strides=(2, 2), layout="NCHW", filter_layout="OHW"),
    Case(batch=1, size=(6, 7), channels=2, dilation=(2, 2), padding=((2, 1), (2, 2))),
    Case(batch=2, size=(4, 5), channels=2, multiplier=3, strides=(1, 2), groups=2),
    Case(batch=1, size=(5, 4), channels=2, multiplier=2, kernel_size=(2, 3), padding=((-1, 1), (2, 0)), layout="NCHW"),
)

CONVOLUTIONS = ["dwsconv_forward", "dwsconv_grad_input", "dwsconv_grad_filter"]


def _operator(case, operator):
    return functools.partial(numerics.run, case, operator)


def _jax_operands(case, operator):
    return tuple(jnp.asarray(a) for a in case.operands(operator))


# Derivatives of the bilinear operators are polynomials of low degree: central differences do well with large steps,
# which lose few of float32's digits.
@pytest.mark.parametrize("mode", ["fwd", "rev"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_order(case, operator, mode):
    check_grads(_operator(case, operator), _jax_operands(case, operator), 2, [mode], eps=1e-2, atol=1e-2, rtol=1e-2)


def test_third_order():
    check_grads(_operator(CASES[3], "forward"), _jax_operands(CASES[3], "forward"), 3, eps=1e-2, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("layout", "activation"), [("NHWC", "silu"), ("NCHW", "gelu"), ("NHWC", jnp.tanh)])
def test_second_order_of_public_function(layout, activation):
    """In float64, which has a kernel on the CPU: differences of activations lose too much in float32."""

    def convolve(x, kernel, scale, bias):
        return jax_dwsconv.depthwise_conv2d(
            x, kernel, strides=2, scale=scale, bias=bias, activation=activation, data_format=layout
        )

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        case = Case(batch=1, size=(4, 5), channels=3, layout=layout, dtypes=("float64",) * 3)
        x, kernel = _jax_operands(case, "forward")
        scale, bias = jnp.arange(1.0, 4) / 3, jnp.arange(3.0) / 3
        check_grads(jax.jit(convolve), (x, kernel[0, :, :, None], scale, bias), 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strides", [1, 2])
def test_gradients_of_transposed_convolution(strides):
    x, kernel = _jax_operands(CASES[0], "forward")
    convolve = functools.partial(jax_dwsconv.depthwise_conv_transpose2d, strides=strides)
    check_grads(convolve, (x, kernel[0, :, :, None]), 2, eps=1e-2, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("operator", OPERATORS)
def test_jvp_and_linearize(operator):
    case = CASES[3]
    f, (a, b) = _operator(case, operator), _jax_operands(case, operator)
    da, db = jnp.cos(3 * a), jnp.sin(2 * b)
    value, tangent = jax.jvp(f, (a, b), (da, db))
    linear_value, linear = jax.linearize(f, a, b)
    length = 2 * case.reduction_length(operator)
    np.testing.assert_array_equal(value, f(a, b))
    np.testing.assert_array_equal(linear_value, value)
    numerics.assert_close(tangent, f(da, b) + f(a, db), length=length)
    numerics.assert_close(linear(da, db), tangent, length=length)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("by", [0, 1])
def test_linear_transpose(operator, by):
    """<f(v), u> = <v, f^T(u)>."""
    case = CASES[3]
    operands = list(_jax_operands(case, operator))

    def linear(v):
        return numerics.run(case, operator, *operands[:by], v, *operands[by + 1 :])

    v = operands[by]
    u = jnp.cos(jnp.arange(linear(v).size, dtype=v.dtype)).reshape(linear(v).shape)
    (transposed,) = jax.linear_transpose(linear, v)(u)
    left, right = jnp.vdot(linear(v), u), jnp.vdot(v, transposed)
    numerics.assert_close(
        left, right, length=case.reduction_length(operator), magnitude=jnp.vdot(abs(linear(v)), abs(u))
    )


def test_hessian_vector_product():
    """Forward over reverse against reverse over reverse, of a function that is quartic in both arguments."""
    case = CASES[0]
    args = _jax_operands(case, "forward")
    tangents = tuple(jnp.cos(a) for a in args)

    def f(x, kernel):
        return jnp.sum(jnp.tanh(numerics.run(case, "forward", x, kernel)) ** 2)

    gradient = jax.grad(f, (0, 1))
    _, forward_over_reverse = jax.jvp(gradient, args, tangents)

    def directional(*args):
        return sum(jnp.vdot(a, t) for a, t in zip(gradient(*args), tangents, strict=True))

    for a, b in zip(forward_over_reverse, jax.grad(directional, (0, 1))(*args), strict=True):
        assert jnp.abs(a).max() > 0
        numerics.assert_close(a, b, length=10_000)


# Residuals kept by policies, and recomputed convolutions.
POLICIES = {
    "none": None,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("y"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoint(policy):
    case = CASES[1]
    x, kernel = _jax_operands(case, "forward")

    def layer(x, kernel):
        y = checkpoint_name(jnp.sin(numerics.run(case, "forward", x, kernel)), "y")
        return jnp.sum(jnp.sin(y))

    kept = jax.checkpoint(layer, policy=POLICIES[policy])
    for a, b in zip(jax.grad(kept, (0, 1))(x, kernel), jax.grad(layer, (0, 1))(x, kernel), strict=True):
        numerics.assert_close(a, b, length=1000)
    recomputed = numerics.primitives_in(jax.grad(kept), x, kernel)["dwsconv_forward"]
    assert recomputed == (1 if policy == "everything" else 2)


def _loss_over_layers(loop):
    def loss(x, kernels):
        return jnp.sum(loop(x, kernels) ** 2)

    return loss


def _scanned(x, kernels):
    def layer(x, kernel):
        return jax_dwsconv.depthwise_conv2d(x, kernel, activation="silu"), None

    return lax.scan(layer, x, kernels)[0]


def _unrolled(x, kernels):
    for kernel in kernels:
        x = jax_dwsconv.depthwise_conv2d(x, kernel, activation="silu")
    return x


def test_scan_over_layers():
    x = _jax_operands(Case(channels=5), "forward")[0]
    kernels = jax.random.normal(jax.random.key(0), (4, 3, 3, 1, 5)) / 3
    scanned, unrolled = (jax.grad(_loss_over_layers(loop), (0, 1))(x, kernels) for loop in (_scanned, _unrolled))
    for a, b in zip(scanned, unrolled, strict=True):
        numerics.assert_close(a, b, length=1000)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16")])
def test_cotangents_have_their_operands_dtypes(dtypes):
    """Inside scan a cotangent is added to another one of the same operand: a wider one asserts."""
    x, kernels = jnp.ones((2, 6, 7, 5), dtypes[0]), jnp.ones((3, 3, 3, 1, 5), dtypes[1]) / 9

    def layer(carry, kernel):
        x, total = carry
        y = jax_dwsconv.depthwise_conv2d(x, kernel, preferred_element_type=x.dtype)
        return (x + y * x, total + jnp.sum(x.astype(jnp.float32))), None

    def loss(x, kernels):
        (x, total), _ = lax.scan(layer, (x, jnp.float32(0)), kernels)
        return jnp.sum(x.astype(jnp.float32)) + total

    gradients = jax.grad(loss, (0, 1))(x, kernels)
    assert tuple(g.dtype for g in gradients) == (x.dtype, kernels.dtype)
    assert all(jnp.isfinite(g).all() and (g != 0).all() for g in gradients)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32", "bfloat16"), ("float16", "float16", "float32")], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_first_and_second_order_of_mixed_dtypes(operator, dtypes):
    """Every cotangent has the dtype of its operand, and the value that float32 gives."""
    case = dataclasses.replace(CASES[3], dtypes=dtypes)
    args = _jax_operands(case, operator)
    wide = dataclasses.replace(case, dtypes=("float32",) * 3)
    wide_args = tuple(a.astype(jnp.float32) for a in args)

    def first(case):
        return jax.grad(lambda a, b: jnp.sum(numerics.run(case, operator, a, b).astype(jnp.float32)), (0, 1))

    def second(case):
        return jax.grad(lambda a, b: sum(jnp.sum(g.astype(jnp.float32)) for g in first(case)(a, b)), (0, 1))

    for order in (first, second):
        for got, expected, a in zip(order(case)(*args), order(wide)(*wide_args), args, strict=True):
            assert got.dtype == a.dtype
            numerics.assert_close(got, expected, length=1000, dtype=min(dtypes, key=lambda d: -jnp.finfo(d).eps))


def test_while_loop():
    x, kernel = _jax_operands(Case(channels=5), "forward")
    kernel = kernel[0, :, :, None] / 3

    def repeat(x, kernel):
        return lax.fori_loop(0, jnp.int32(3), lambda _, x: jax_dwsconv.depthwise_conv2d(x, kernel), x)

    def unrolled(x, kernel):
        return _unrolled_linear(x, kernel, 3)

    numerics.assert_close(jax.jit(repeat)(x, kernel), unrolled(x, kernel), length=27)
    args, tangents = (x, kernel), (x, kernel)
    for a, b in zip(jax.jvp(repeat, args, tangents), jax.jvp(unrolled, args, tangents), strict=True):
        numerics.assert_close(a, b, length=100)


def _unrolled_linear(x, kernel, times):
    for _ in range(times):
        x = jax_dwsconv.depthwise_conv2d(x, kernel)
    return x


@pytest.mark.parametrize("dtypes", [("float32", "float32", "float32"), ("bfloat16", "float32", "bfloat16")])
@pytest.mark.parametrize("operator", OPERATORS)
def test_eval_shape(operator, dtypes):
    case = Case(multiplier=2, strides=(2, 1), groups=2, dtypes=dtypes, layout="NCHW")
    a, b = _jax_operands(case, operator)
    shape = jax.eval_shape(_operator(case, operator), a, b)
    result = numerics.run(case, operator, a, b)
    assert (shape.shape, shape.dtype) == (result.shape, result.dtype)


@pytest.mark.parametrize(
    ("argnums", "expected"),
    [
        (0, {"dwsconv_grad_input": 1, "dwsconv_grad_filter": 0}),
        (1, {"dwsconv_grad_input": 0, "dwsconv_grad_filter": 1}),
        ((0, 1), {"dwsconv_grad_input": 1, "dwsconv_grad_filter": 1}),
    ],
)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_only_wanted_gradients_are_computed(argnums, expected, activation):
    x, kernel = _jax_operands(Case(), "forward")

    def loss(x, kernel):
        return jnp.sum(jax_dwsconv.depthwise_conv2d(x, kernel, activation=activation))

    counts = numerics.primitives_in(jax.grad(loss, argnums), x, kernel[0, :, :, None])
    assert {name: counts[name] for name in expected} == expected
    assert counts["dwsconv_forward"] <= 1
    assert counts["conv_general_dilated"] == 0


def test_jvp_by_one_argument_convolves_no_zeros():
    x, kernel = _jax_operands(Case(), "forward")
    counts = numerics.primitives_in(
        lambda x: jax.jvp(lambda x: numerics.run(Case(), "forward", x, kernel), (x,), (x,)), x
    )
    assert sum(counts[name] for name in CONVOLUTIONS) == 2
