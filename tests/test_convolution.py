import functools

import jax
import numerics
import numpy as np
import pytest
from jax import lax, numpy as jnp
from numerics import normal

import jax_dwsconv

NHWC = ("NHWC", "HWIO", "NHWC")


def _lax_2d(x, kernel, strides=(1, 1), padding="SAME", dilation=(1, 1), **arguments):
    """What depthwise_conv2d means, for one batch dimension and channels last."""
    return lax.conv_general_dilated(
        x, kernel, strides, padding, None, dilation, NHWC, feature_group_count=x.shape[-1], **arguments
    )


def _call_2d(x, kernel, data_format, **arguments):
    """depthwise_conv2d in either format, on operands with channels last."""
    if data_format == "NHWC":
        return jax_dwsconv.depthwise_conv2d(x, kernel, **arguments)
    y = jax_dwsconv.depthwise_conv2d(np.moveaxis(x, -1, -3), kernel, data_format=data_format, **arguments)
    return jnp.moveaxis(y, -3, -1)


# Arguments of depthwise_conv2d, and those of lax that mean the same.
ARGUMENTS_2D = {
    "defaults": ({}, {}),
    "ints": ({"strides": 2, "dilation": 3}, {"strides": (2, 2), "dilation": (3, 3)}),
    "lists": ({"strides": [2, 1], "dilation": [1, 2]}, {"strides": (2, 1), "dilation": (1, 2)}),
    "arrays": (
        {"strides": np.array([2, 1]), "padding": np.array([[1, 2], [0, 3]])},
        {"strides": (2, 1), "padding": [(1, 2), (0, 3)]},
    ),
    "numpy ints": ({"strides": np.int64(2), "padding": np.int32(1)}, {"strides": (2, 2), "padding": [(1, 1), (1, 1)]}),
    "valid": ({"padding": "VALID", "strides": (1, 2)}, {"padding": "VALID", "strides": (1, 2)}),
    "same_lower": ({"padding": "SAME_LOWER", "strides": 2}, {"padding": "SAME_LOWER", "strides": (2, 2)}),
    "lower case": ({"padding": "same"}, {"padding": "SAME"}),
    "int padding": ({"padding": 2}, {"padding": [(2, 2), (2, 2)]}),
    "padding per axis": ({"padding": (0, 2)}, {"padding": [(0, 0), (2, 2)]}),
    "pairs": ({"padding": ((1, -2), (0, 4))}, {"padding": [(1, -2), (0, 4)]}),
    "int and pair": ({"padding": (1, (0, 4))}, {"padding": [(1, 1), (0, 4)]}),
}


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("name", ARGUMENTS_2D)
def test_2d_agrees_with_lax(name, data_format):
    ours, theirs = ARGUMENTS_2D[name]
    x, kernel = normal(2, 9, 12, 5), normal(3, 4, 1, 10, seed=1)
    expected = _lax_2d(x, kernel, **theirs)
    numerics.assert_close(_call_2d(x, kernel, data_format, **ours), expected, length=kernel.size)


@pytest.mark.parametrize(("strides", "dilation"), [(1, 1), (2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", "SAME_LOWER", "CAUSAL", 2, ((4, -1),), (3,)], ids=str)
@pytest.mark.parametrize("data_format", ["NWC", "NCW"])
def test_1d_agrees_with_lax(data_format, padding, strides, dilation):
    x, kernel = normal(3, 17, 5), normal(4, 1, 10, seed=1)
    pairs = {"CAUSAL": ((3 * dilation, 0),), 2: ((2, 2),), (3,): ((3, 3),)}.get(padding, padding)
    expected = lax.conv_general_dilated(
        x, kernel, (strides,), pairs, None, (dilation,), ("NWC", "WIO", "NWC"), feature_group_count=5
    )
    convolve = functools.partial(
        jax_dwsconv.depthwise_conv1d, strides=strides, padding=padding, dilation=dilation, data_format=data_format
    )
    y = convolve(x, kernel) if data_format == "NWC" else convolve(x.swapaxes(1, 2), kernel).swapaxes(1, 2)
    numerics.assert_close(y, expected, length=4)


def test_causal_sees_no_future():
    x, kernel = normal(1, 20, 3), normal(4, 1, 3, seed=1)
    later = x.copy()
    later[:, 11:] += 1
    y, y_later = (jax_dwsconv.depthwise_conv1d(x, kernel, padding="CAUSAL", dilation=2) for x in (x, later))
    np.testing.assert_array_equal(y[:, :11], y_later[:, :11])
    assert (y[:, 11] != y_later[:, 11]).all()


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_any_batch_dimensions(batch, data_format):
    x, kernel = normal(*batch, 5, 7, 3), normal(3, 3, 1, 6, seed=1)
    y = _call_2d(x, kernel, data_format, strides=2)
    expected = _lax_2d(x.reshape(int(np.prod(batch)), 5, 7, 3), kernel, (2, 2)).reshape(*batch, 3, 4, 6)
    numerics.assert_close(y, expected, length=9)


@pytest.mark.parametrize(
    ("x", "kernel", "shape"),
    [
        ((2, 5, 7, 0), (3, 3, 1, 0), (2, 5, 7, 0)),
        ((2, 0, 7, 3), (3, 3, 1, 6), (2, 0, 7, 6)),
        ((0, 5, 7, 3), (3, 3, 1, 3), (0, 5, 7, 3)),
        ((3, 0, 5, 7, 3), (3, 3, 1, 3), (3, 0, 5, 7, 3)),
    ],
)
def test_empty(x, kernel, shape):
    x, kernel = jnp.zeros(x), jnp.ones(kernel)
    convolve = functools.partial(jax_dwsconv.depthwise_conv2d, bias=jnp.ones(()), activation="gelu")
    assert convolve(x, kernel).shape == shape
    gradients = jax.grad(lambda *args: convolve(*args).sum(), (0, 1))(x, kernel)
    assert [g.shape for g in gradients] == [x.shape, kernel.shape]
    np.testing.assert_array_equal(gradients[1], 0)


@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float16"), ("float16", "float16")]
)
def test_result_has_the_promoted_dtype(dtypes):
    x, kernel = normal(2, 5, 7, 3, dtype=dtypes[0]), normal(3, 3, 1, 3, dtype=dtypes[1])
    y = jax_dwsconv.depthwise_conv2d(x, kernel)
    assert y.dtype == jnp.promote_types(*dtypes)
    numerics.assert_close(y, _lax_2d(x.astype(np.float32), kernel.astype(np.float32)), length=9)


# Scale, bias, activation --------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "hard_swish": jax.nn.hard_swish,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_epilogue_is_rounded_once(activation, data_format, dtype):
    x, kernel = 3 * normal(2, 5, 7, 5, dtype=dtype), normal(3, 3, 1, 10, dtype=dtype, seed=1)
    scale, bias = normal(10, seed=2), normal(10, seed=3)
    convolve = functools.partial(_call_2d, x, kernel, data_format, scale=scale, bias=bias)
    y = convolve(activation=activation)
    assert y.dtype == dtype

    def expect(sign):
        sums = _lax_2d(x.astype(np.float32), kernel.astype(np.float32))
        return ACTIVATIONS.get(activation, lambda y: y)(sums * scale + bias) * sign

    numerics.assert_close(y, expect(1), length=50)
    with pytest.raises(AssertionError):
        numerics.assert_close(y, expect(1.01), length=50)
    if activation:
        np.testing.assert_array_equal(convolve(activation=ACTIVATIONS[activation]), y)


@pytest.mark.parametrize("arguments", [{"scale": 2.0}, {"bias": np.float32(-1)}, {"scale": 2, "bias": 1}])
def test_scalar_scale_and_bias(arguments):
    x, kernel = normal(2, 5, 7, 3), normal(3, 3, 1, 3, seed=1)
    arguments = {name: jnp.asarray(value, jnp.float32) for name, value in arguments.items()}
    expected = _lax_2d(x, kernel) * arguments.get("scale", 1) + arguments.get("bias", 0)
    numerics.assert_close(jax_dwsconv.depthwise_conv2d(x, kernel, **arguments), expected, length=20)


def test_other_activations_see_the_rounded_result():
    x, kernel = normal(2, 5, 7, 3, dtype="bfloat16"), normal(3, 3, 1, 3, dtype="bfloat16", seed=1)
    seen = []

    def activation(y):
        seen.append(y.dtype)
        return jnp.tanh(y)

    y = jax_dwsconv.depthwise_conv2d(x, kernel, activation=activation)
    assert seen == [jnp.bfloat16]
    np.testing.assert_array_equal(y, jnp.tanh(jax_dwsconv.depthwise_conv2d(x, kernel)))


@pytest.mark.parametrize("activation", ["silu", jnp.tanh])
def test_value_and_grad_has_the_value_of_the_plain_call(activation):
    x, kernel = normal(2, 5, 7, 3, dtype="bfloat16"), normal(3, 3, 1, 3, dtype="bfloat16", seed=1)

    def convolve(x):
        y = jax_dwsconv.depthwise_conv2d(x, kernel, bias=jnp.ones(3), activation=activation)
        return y.astype(jnp.float32).sum(), y

    (_, y), _ = jax.value_and_grad(convolve, has_aux=True)(x)
    np.testing.assert_array_equal(y, convolve(x)[1])


# Transposed and separable -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["SAME", "VALID", "same", 1, ((2, 1), (0, 3))], ids=str)
@pytest.mark.parametrize(
    ("strides", "dilation"), [((1, 1), (1, 1)), ((2, 3), (1, 1)), ((3, 2), (2, 1)), ((5, 1), (1, 2))]
)
@pytest.mark.parametrize(("kernel_size", "data_format"), [((3, 4), "NHWC"), ((2, 1), "NCHW"), ((5, 3), "NCHW")])
def test_transpose_agrees_with_lax(kernel_size, data_format, strides, dilation, padding):
    """lax.conv_transpose knows no groups: a dense kernel that is zero off the diagonal."""
    x, kernel = normal(2, 5, 6, 3), normal(*kernel_size, 1, 6, seed=1)
    dense = np.zeros((*kernel_size, 3, 6), np.float32)
    for out in range(6):
        dense[..., out // 2, out] = kernel[..., 0, out]
    pairs = ((1, 1), (1, 1)) if padding == 1 else padding
    expected = lax.conv_transpose(
        x, dense, strides, pairs.upper() if isinstance(pairs, str) else pairs, dilation, dimension_numbers=NHWC
    )
    convolve = functools.partial(
        jax_dwsconv.depthwise_conv_transpose2d,
        strides=strides,
        padding=padding,
        dilation=dilation,
        data_format=data_format,
    )
    y = convolve(x, kernel) if data_format == "NHWC" else jnp.moveaxis(convolve(np.moveaxis(x, -1, 1), kernel), 1, -1)
    numerics.assert_close(y, expected, length=kernel.size)


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("flat", [False, True])
def test_separable_agrees_with_two_convolutions(data_format, batch, flat):
    x, depthwise, pointwise = normal(*batch, 7, 9, 4), normal(3, 3, 1, 8, seed=1), normal(1, 1, 8, 5, seed=2)
    vectors = [normal(n, seed=3 + i) for i, n in enumerate((8, 8, 5, 5))]
    channels_first = data_format == "NCHW"
    y = jax_dwsconv.separable_conv2d(
        np.moveaxis(x, -1, -3) if channels_first else x,
        depthwise,
        pointwise[0, 0] if flat else pointwise,
        strides=2,
        depthwise_scale=vectors[0],
        depthwise_bias=vectors[1],
        depthwise_activation="relu6",
        pointwise_scale=vectors[2],
        pointwise_bias=vectors[3],
        pointwise_activation=jnp.tanh,
        data_format=data_format,
    )
    middle = jax.nn.relu6(_lax_2d(x.reshape(-1, 7, 9, 4), depthwise, (2, 2)) * vectors[0] + vectors[1])
    expected = jnp.tanh(
        lax.conv_general_dilated(middle, pointwise, (1, 1), "SAME", dimension_numbers=NHWC) * vectors[2] + vectors[3]
    )
    y = jnp.moveaxis(y, -3, -1) if channels_first else y
    numerics.assert_close(y, expected.reshape(*batch, 4, 5, 5), length=1000)


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_separable_with_gate_and_residual(dtype, batch, data_format):
    to_format = (lambda a: np.moveaxis(a, -1, -3)) if data_format == "NCHW" else (lambda a: a)
    x, depthwise, pointwise = normal(*batch, 7, 9, 4), normal(3, 3, 1, 8, seed=1), normal(8, 5, seed=2)
    gate, residual = normal(*batch, 8, seed=3), normal(*batch, 4, 5, 5, seed=4)
    x, depthwise, pointwise, gate, residual = (a.astype(dtype) for a in (x, depthwise, pointwise, gate, residual))
    operands = to_format(x), depthwise, pointwise
    y = jax_dwsconv.separable_conv2d(
        *operands,
        strides=2,
        depthwise_activation="silu",
        pointwise_gate=gate,
        pointwise_residual=to_format(residual),
        pointwise_activation="relu",
        data_format=data_format,
    )
    assert y.dtype == dtype
    middle = np.asarray(jax_dwsconv.depthwise_conv2d(x, depthwise, strides=2, activation="silu"), np.float64)
    gated = (middle * gate[..., None, None, :].astype(np.float64)).astype(dtype).astype(np.float64)
    expected = np.maximum(gated @ pointwise.astype(np.float64) + residual.astype(np.float64), 0)
    # One of the bfloat16 values in the middle may be rounded the other way.
    bound = 2 * float(jnp.finfo(dtype).eps) * np.abs(expected).max()
    assert np.abs(np.asarray(y, np.float64) - to_format(expected)).max() <= bound


@pytest.mark.parametrize(
    ("dtypes", "preferred"), [(("bfloat16",) * 3, None), (("bfloat16", "float32", "float32"), "bfloat16")]
)
def test_separable_dtypes(dtypes, preferred):
    shapes = ((2, 7, 9, 4), (3, 3, 1, 4), (4, 5))
    operands = [
        normal(*shape, dtype=dtype, seed=i) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    y = jax_dwsconv.separable_conv2d(*operands, preferred_element_type=preferred)
    assert y.dtype == jnp.bfloat16
    x, depthwise, pointwise = (a.astype(np.float32) for a in operands)
    middle = _lax_2d(x, depthwise).astype(jnp.bfloat16).astype(jnp.float32)
    expected = jnp.dot(middle, pointwise.astype("bfloat16").astype(np.float32))
    # One of the bfloat16 values in the middle may be rounded the other way.
    assert jnp.abs(y - expected).max() <= 2**-7 * jnp.abs(expected).max()


# Lowering -----------------------------------------------------------------------------------------------------------


def _all_three(x, kernel):
    return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(jax_dwsconv.depthwise_conv2d(x, kernel))), (0, 1))(x, kernel)


TARGETS = [f"jax_dwsconv.{operator}.v1" for operator in ("forward", "grad_input", "grad_filter")]


@pytest.mark.parametrize("platform", ["cpu", "tpu", "rocm"])
def test_lowering(platform):
    """On this machine, for others too."""
    traced = jax.jit(_all_three).trace(normal(2, 7, 9, 5), normal(3, 3, 1, 5))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert [target in text for target in TARGETS] == [platform == "cpu"] * 3
    assert ("stablehlo.convolution" in text) == (platform != "cpu")


def test_compiled_ahead_of_time():
    x, kernel = normal(2, 7, 9, 5), normal(3, 3, 1, 5)
    compiled = jax.jit(_all_three).lower(x, kernel).compile()
    for a, b in zip(compiled(x, kernel), _all_three(x, kernel), strict=True):
        numerics.assert_close(a, b, length=1000)


def test_float64_without_x64_is_float32():
    x, kernel = normal(2, 7, 9, 5, dtype=np.float64), normal(3, 3, 1, 5, dtype=np.float64)
    assert jax_dwsconv.depthwise_conv2d(x, kernel).dtype == jnp.float32


def test_an_activation_without_a_name_sees_the_result_in_its_final_shape():
    x, kernel = normal(5, 2, 8, 8, 4), normal(3, 3, 1, 4, seed=1)
    y = jax_dwsconv.depthwise_conv2d(x, kernel)
    normalised = jax_dwsconv.depthwise_conv2d(x, kernel, activation=lambda y: jax.nn.softmax(y, axis=0))
    np.testing.assert_allclose(normalised, jax.nn.softmax(y, axis=0), rtol=1e-6)
    with pytest.raises(ValueError, match="activation must return an array of the shape"):
        jax_dwsconv.depthwise_conv2d(x, kernel, activation=lambda y: y.mean())
