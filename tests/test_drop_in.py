import functools
import inspect

import jax
import numerics
import numpy as np
import pytest
from jax import lax, numpy as jnp

import jax_dwsconv
from jax_dwsconv import FallbackWarning, UnsupportedError

NHWC = ("NHWC", "HWIO", "NHWC")
NCHW = ("NCHW", "OIHW", "NCHW")
FORWARD, GRAD_INPUT, ZEROS, LAX = "dwsconv_forward", "dwsconv_grad_input", "broadcast_in_dim", "conv_general_dilated"


# Calls of conv_general_dilated: (lhs shape, rhs shape, strides, padding, further arguments, what the trace contains).
DROP_IN = {
    "same": ((2, 9, 11, 6), (3, 3, 1, 6), (1, 1), "SAME", {"dimension_numbers": NHWC}, FORWARD),
    "same, strided": ((2, 9, 12, 6), (3, 4, 1, 6), (2, 3), "SAME", {"dimension_numbers": NHWC}, FORWARD),
    "same_lower": ((2, 9, 12, 6), (3, 4, 1, 6), (2, 3), "SAME_LOWER", {"dimension_numbers": NHWC}, FORWARD),
    "lower case": ((2, 9, 12, 6), (3, 4, 1, 6), (2, 3), "valid", {"dimension_numbers": NHWC}, FORWARD),
    "valid": ((2, 9, 12, 6), (3, 4, 1, 6), (2, 1), "VALID", {"dimension_numbers": NHWC}, FORWARD),
    "pairs": ((2, 9, 12, 6), (3, 4, 1, 6), (2, 1), [(0, 3), (-1, 2)], {"dimension_numbers": NHWC}, FORWARD),
    "arrays": (
        (2, 9, 12, 6),
        (3, 4, 1, 6),
        np.array([2, 1]),
        np.array([[0, 3], [1, 2]]),
        {"dimension_numbers": NHWC},
        FORWARD,
    ),
    "dilated": (
        (2, 9, 12, 6),
        (3, 4, 1, 6),
        (1, 2),
        "SAME",
        {"dimension_numbers": NHWC, "rhs_dilation": (2, 3)},
        FORWARD,
    ),
    "multiplier": ((2, 9, 12, 4), (3, 3, 1, 12), (1, 1), "SAME", {"dimension_numbers": NHWC}, FORWARD),
    "default numbers": ((2, 6, 9, 12), (6, 1, 3, 4), (1, 2), "SAME", {}, FORWARD),
    "NCHW": ((2, 6, 9, 12), (12, 1, 3, 4), (1, 2), "SAME", {"dimension_numbers": NCHW}, FORWARD),
    "NHWC, OIHW": (
        (2, 9, 12, 6),
        (6, 1, 3, 4),
        (1, 1),
        "SAME",
        {"dimension_numbers": ("NHWC", "OIHW", "NHWC")},
        FORWARD,
    ),
    "NCHW, HWIO": (
        (2, 6, 9, 12),
        (3, 4, 1, 6),
        (1, 1),
        "SAME",
        {"dimension_numbers": ("NCHW", "HWIO", "NCHW")},
        FORWARD,
    ),
    "HWOI": ((2, 9, 12, 6), (3, 4, 12, 1), (1, 1), "SAME", {"dimension_numbers": ("NHWC", "HWOI", "NHWC")}, FORWARD),
    "OHWI": ((2, 9, 12, 6), (6, 3, 4, 1), (1, 1), "SAME", {"dimension_numbers": ("NHWC", "OHWI", "NHWC")}, FORWARD),
    "IHWO": ((2, 9, 12, 6), (1, 3, 4, 6), (2, 1), "SAME", {"dimension_numbers": ("NHWC", "IHWO", "NHWC")}, FORWARD),
    # The letters of the kernel order strides, padding and dilations, too: width first here.
    "IWOH": (
        (2, 9, 12, 6),
        (1, 4, 6, 3),
        (2, 1),
        [(0, 3), (-1, 2)],
        {"dimension_numbers": ("NHWC", "IWOH", "NHWC"), "rhs_dilation": (1, 2)},
        FORWARD,
    ),
    "IWOH, same": (
        (2, 9, 12, 6),
        (1, 4, 6, 3),
        (2, 1),
        "SAME",
        {"dimension_numbers": ("NHWC", "IWOH", "NHWC")},
        FORWARD,
    ),
    "OIWH, transposed": (
        (2, 6, 4, 5),
        (6, 1, 4, 3),
        (1, 1),
        [(0, 3), (2, 4)],
        {"dimension_numbers": ("NCHW", "OIWH", "NCHW"), "lhs_dilation": (3, 2)},
        GRAD_INPUT,
    ),
    "tuples": (
        (2, 6, 9, 12),
        (3, 4, 1, 6),
        (1, 1),
        "SAME",
        {"dimension_numbers": lax.ConvDimensionNumbers((0, 1, 2, 3), (3, 2, 0, 1), (0, 1, 2, 3))},
        FORWARD,
    ),
    "1d": ((2, 13, 6), (4, 1, 6), (2,), "SAME", {"dimension_numbers": ("NWC", "WIO", "NWC")}, FORWARD),
    "1d, NCW": ((2, 6, 13), (12, 1, 4), (1,), [(3, 0)], {"rhs_dilation": (2,)}, FORWARD),
    "empty result": ((2, 2, 5, 6), (3, 3, 1, 6), (1, 1), "VALID", {"dimension_numbers": NHWC}, FORWARD),
    "empty batch": ((0, 4, 5, 6), (3, 3, 1, 6), (1, 1), "SAME", {"dimension_numbers": NHWC}, FORWARD),
    "empty image": ((2, 0, 5, 6), (3, 3, 1, 6), (1, 1), [(2, 2), (1, 1)], {"dimension_numbers": NHWC}, FORWARD),
    "one channel": ((2, 9, 12, 1), (3, 4, 1, 1), (1, 1), "SAME", {"dimension_numbers": NHWC}, FORWARD),
    "transposed": (
        (2, 4, 5, 6),
        (3, 4, 1, 6),
        (1, 1),
        [(2, 1), (0, 4)],
        {"dimension_numbers": NHWC, "lhs_dilation": (2, 3)},
        GRAD_INPUT,
    ),
    "transposed, cropped": (
        (2, 4, 5, 6),
        (3, 4, 1, 6),
        (1, 1),
        [(-1, 5), (4, -3)],
        {"dimension_numbers": NHWC, "lhs_dilation": (2, 3), "rhs_dilation": (2, 1)},
        GRAD_INPUT,
    ),
    "transposed, multiplier": ((2, 4, 5, 5), (8, 1, 3, 3), (1, 1), [(2, 1)] * 2, {"lhs_dilation": (1, 2)}, GRAD_INPUT),
    "transposed, 1d": ((2, 6, 5), (6, 1, 3), (1,), [(2, 2)], {"lhs_dilation": (3,)}, GRAD_INPUT),
    "transposed, empty image": (
        (2, 4, 0, 6),
        (3, 4, 1, 6),
        (1, 1),
        [(2, 1), (4, 4)],
        {"dimension_numbers": NHWC, "lhs_dilation": (2, 2)},
        GRAD_INPUT,
    ),
    "transposed, empty result": ((2, 6, 1, 3), (6, 1, 3, 4), (1, 1), [(0, 0)] * 2, {"lhs_dilation": (2, 2)}, ZEROS),
    # To lax: not depthwise, or without a kernel.
    "dense": ((2, 9, 12, 6), (3, 4, 6, 5), (1, 1), "SAME", {"dimension_numbers": NHWC, "feature_group_count": 1}, LAX),
    "dense, one channel": ((2, 9, 12, 1), (3, 4, 1, 5), (1, 1), "SAME", {"dimension_numbers": NHWC}, LAX),
    "grouped": (
        (2, 9, 12, 6),
        (3, 4, 2, 6),
        (1, 1),
        "SAME",
        {"dimension_numbers": NHWC, "feature_group_count": 3},
        LAX,
    ),
    "batch groups": (
        (6, 9, 12, 3),
        (3, 4, 3, 6),
        (1, 1),
        "SAME",
        {"dimension_numbers": NHWC, "feature_group_count": 1, "batch_group_count": 3},
        LAX,
    ),
    "3d": (
        (1, 4, 5, 6, 3),
        (2, 3, 3, 1, 3),
        (1, 1, 1),
        "SAME",
        {"dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")},
        LAX,
    ),
    "mixed layouts": (
        (2, 9, 12, 6),
        (3, 4, 1, 6),
        (1, 1),
        "SAME",
        {"dimension_numbers": ("NHWC", "HWIO", "NCHW")},
        LAX,
    ),
    "batch last": ((9, 12, 6, 2), (3, 4, 1, 6), (1, 1), "SAME", {"dimension_numbers": ("HWCN", "HWIO", "HWCN")}, LAX),
    "strided and transposed": (
        (2, 4, 5, 6),
        (6, 1, 3, 3),
        (2, 1),
        [(2, 1)] * 2,
        {"lhs_dilation": (2, 2), "dimension_numbers": ("NHWC", "OIHW", "NHWC")},
        LAX,
    ),
}


def _call(name):
    """Operands, and the function of `convolve` that makes the call."""
    lhs_shape, rhs_shape, strides, padding, further, path = DROP_IN[name]
    numbers = lax.conv_dimension_numbers(lhs_shape, rhs_shape, further.get("dimension_numbers"))
    further = {"feature_group_count": lhs_shape[numbers.lhs_spec[1]], **further}

    def call(convolve, lhs, rhs, **more):
        return convolve(lhs, rhs, strides, padding, **further, **more)

    return numerics.normal(*lhs_shape), numerics.normal(*rhs_shape, seed=1), call, path


@pytest.mark.parametrize("name", DROP_IN)
def test_drop_in_agrees_with_lax(name):
    lhs, rhs, call, path = _call(name)
    ours = functools.partial(call, jax_dwsconv.conv_general_dilated)
    expected = call(lax.conv_general_dilated, lhs, rhs)
    result = ours(lhs, rhs)
    assert result.dtype == expected.dtype
    numerics.assert_close(result, expected, length=rhs.size)
    found = numerics.primitives_in(ours, lhs, rhs)
    assert {p for p in found if p.startswith("dwsconv") or p == LAX} <= {path}
    assert found[path] > 0


@pytest.mark.parametrize("name", ["same, strided", "NCHW", "transposed", "1d"])
@pytest.mark.parametrize(
    ("dtype", "preferred"),
    [("bfloat16", None), ("float16", None), ("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32")],
)
def test_drop_in_dtypes(name, dtype, preferred):
    lhs, rhs, call, path = _call(name)
    lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    ours = functools.partial(call, jax_dwsconv.conv_general_dilated, preferred_element_type=preferred)
    result = ours(lhs, rhs)
    assert (
        result.dtype
        == jax.eval_shape(
            functools.partial(call, lax.conv_general_dilated, preferred_element_type=preferred), lhs, rhs
        ).dtype
    )
    expected = call(lax.conv_general_dilated, lhs.astype(np.float32), rhs.astype(np.float32))
    numerics.assert_close(result, expected, length=rhs.size)
    assert numerics.primitives_in(ours, lhs, rhs)[path] == 1


def test_drop_in_gradients():
    lhs, rhs, call, _ = _call("HWOI")

    def loss(convolve, lhs, rhs):
        return jnp.sum(jnp.sin(call(convolve, lhs, rhs)))

    ours, theirs = (
        jax.grad(functools.partial(loss, f), (0, 1))(lhs, rhs)
        for f in (jax_dwsconv.conv_general_dilated, lax.conv_general_dilated)
    )
    for a, b in zip(ours, theirs, strict=True):
        numerics.assert_close(a, b, length=1000)


def test_drop_in_takes_numpy_arrays_in_double_precision():
    """They are float32 to JAX without x64, which must not look like operands of different dtypes."""
    x, kernel = np.ones((1, 5, 5, 4)), jnp.ones((3, 3, 1, 4))

    def convolve(kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax_dwsconv.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=4
        )

    assert numerics.primitives_in(convolve, kernel)["dwsconv_forward"] == 1
    assert convolve(kernel).dtype == jnp.float32


def test_drop_in_has_the_signature_of_lax():
    ours, theirs = (
        inspect.signature(f).parameters for f in (jax_dwsconv.conv_general_dilated, lax.conv_general_dilated)
    )
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default)


# What lax refuses, the drop-in refuses. Each entry changes a valid call.
REFUSED = {
    "int padding per axis": {"padding": [1, 1]},
    "int padding": {"padding": 1},
    "too few pairs": {"padding": [(1, 1)]},
    "triples": {"padding": [(1, 1, 1), (1, 1, 1)]},
    "unknown padding": {"padding": "CAUSAL"},
    "int strides": {"window_strides": 2},
    "too many strides": {"window_strides": (1, 1, 1)},
    "zero stride": {"window_strides": (0, 1)},
    "zero dilation": {"rhs_dilation": (0, 1)},
    "negative input dilation": {"lhs_dilation": (-1, 1)},
    "string padding of a transposed one": {"lhs_dilation": (2, 2)},
    "different dtypes": {"rhs": numerics.normal(3, 3, 1, 6).astype("bfloat16")},
    "narrow result": {"preferred_element_type": jnp.bfloat16},
    "integer result": {"preferred_element_type": jnp.int32},
    "unknown precision": {"precision": "garbage"},
    "channels do not divide": {"rhs": numerics.normal(3, 3, 1, 7)},
    "no channels": {"lhs": numerics.normal(2, 9, 11, 0), "feature_group_count": 0},
    "no taps": {"rhs": numerics.normal(0, 3, 1, 6)},
    "unknown numbers": {"dimension_numbers": ("NHWC", "HWIO", "NHWX")},
    "a list": {"lhs": [[[[1.0] * 6]]]},
}
REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError)  # what lax raises
VALID_CALL = {
    "lhs": numerics.normal(2, 9, 11, 6),
    "rhs": numerics.normal(3, 3, 1, 6),
    "window_strides": (1, 1),
    "padding": "SAME",
    "dimension_numbers": NHWC,
    "feature_group_count": 6,
}


@pytest.mark.parametrize("name", REFUSED)
def test_drop_in_refuses_what_lax_refuses(name):
    call = {**VALID_CALL, **REFUSED[name]}
    with pytest.raises(REFUSALS):
        jax.block_until_ready(lax.conv_general_dilated(**call))
    jax_dwsconv.conv_general_dilated(**VALID_CALL)
    with pytest.raises(REFUSALS):
        jax.block_until_ready(jax_dwsconv.conv_general_dilated(**call))


# Switches -----------------------------------------------------------------------------------------------------------

# lax computes both; the package has no kernel for either.
WITHOUT_KERNEL = ["3d", "strided and transposed", "mixed layouts"]


@pytest.mark.parametrize("name", WITHOUT_KERNEL)
def test_fallback_modes(name, monkeypatch):
    lhs, rhs, call, _ = _call(name)
    convolve = functools.partial(call, jax_dwsconv.conv_general_dilated)
    monkeypatch.setenv("JAX_DWSCONV_FALLBACK", "error")
    with pytest.raises(UnsupportedError, match="support"):
        convolve(lhs, rhs)
    monkeypatch.setenv("JAX_DWSCONV_FALLBACK", "warn")
    with pytest.warns(FallbackWarning, match="falls back to jax.lax"):
        convolve(lhs, rhs)
    monkeypatch.setenv("JAX_DWSCONV_FALLBACK", "garbage")
    with pytest.raises(ValueError, match=r"silent.*warn.*error"):
        convolve(lhs, rhs)
    monkeypatch.setenv("JAX_DWSCONV_FALLBACK", "silent")
    convolve(lhs, rhs)


@pytest.mark.parametrize("name", ["same", "transposed", "dense", "grouped", "batch groups"])
def test_fallback_error_leaves_the_rest_alone(name, monkeypatch):
    """What has a kernel, and what is no depthwise convolution."""
    monkeypatch.setenv("JAX_DWSCONV_FALLBACK", "error")
    lhs, rhs, call, _ = _call(name)
    call(jax_dwsconv.conv_general_dilated, lhs, rhs)


def test_disable(monkeypatch):
    monkeypatch.setenv("JAX_DWSCONV_DISABLE", "1")
    x, kernel = numerics.normal(2, 7, 9, 5), numerics.normal(3, 3, 1, 10)

    def everything(x, kernel):
        y = jax_dwsconv.depthwise_conv2d(x, kernel, activation="relu") + jax_dwsconv.depthwise_conv_transpose2d(
            x, kernel
        )
        one = jax_dwsconv.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=5)
        return jnp.sum(y * one)

    disabled = jax.value_and_grad(everything, (0, 1))
    found = numerics.primitives_in(disabled, x, kernel)
    assert found["conv_general_dilated"] >= 5
    assert not any(name.startswith("dwsconv") for name in found)
    value, gradients = disabled(x, kernel)
    monkeypatch.setenv("JAX_DWSCONV_DISABLE", "0")
    enabled = jax.value_and_grad(functools.partial(everything), (0, 1))  # not a trace that jit remembers
    assert numerics.primitives_in(enabled, x, kernel)["dwsconv_forward"] > 0
    for a, b in zip(jax.tree.leaves(enabled(x, kernel)), jax.tree.leaves((value, gradients)), strict=True):
        numerics.assert_close(a, b, length=10_000)
