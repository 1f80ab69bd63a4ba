"""The linen layers against flax's own, with the same parameters."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jax_dwsconv

nn = pytest.importorskip("flax.linen")
from jax_dwsconv import linen  # noqa: E402

# shape of x, kernel_size, settings
CASES = {
    "2d": ((2, 9, 11, 6), (3, 3), {}),
    "2d-stride": ((2, 10, 12, 6), (5, 3), {"strides": (2, 1)}),
    "2d-valid": ((2, 9, 11, 6), (3, 5), {"padding": "VALID", "strides": None}),
    "2d-same-lower": ((2, 10, 12, 6), (2, 4), {"padding": "SAME_LOWER", "strides": 2}),
    "2d-int-padding": ((2, 9, 11, 6), (3, 3), {"padding": 2}),
    "2d-mixed-padding": ((2, 9, 11, 6), (3, 3), {"padding": [1, (0, 2)]}),
    "2d-circular": ((2, 9, 11, 6), (3, 4), {"padding": "CIRCULAR", "kernel_dilation": 2}),
    "2d-reflect": ((2, 9, 11, 6), (3, 4), {"padding": "REFLECT", "strides": 2}),
    "2d-dilation": ((2, 9, 11, 6), (3, 3), {"kernel_dilation": (1, 2)}),
    "2d-input-dilation": ((2, 5, 7, 6), (3, 3), {"input_dilation": (2, 3), "padding": 1}),
    "2d-input-dilation-batch-dims": ((3, 2, 5, 7, 6), (3, 3), {"input_dilation": 2, "padding": [(1, 2), 0]}),
    "2d-no-bias": ((2, 9, 11, 6), (3, 3), {"use_bias": False}),
    "2d-multiplier": ((2, 9, 11, 6), (3, 3), {"features": 12, "strides": 2}),
    "2d-no-batch": ((9, 11, 6), (3, 3), {}),
    "2d-batch-dims": ((3, 2, 9, 11, 6), (3, 3), {"strides": 2}),
    "2d-one-channel": ((2, 9, 11, 1), (3, 3), {"features": 4}),
    "1d": ((2, 17, 6), 4, {}),
    "1d-stride": ((2, 17, 6), (5,), {"strides": 3, "padding": "VALID"}),
    "1d-causal": ((2, 17, 6), (4,), {"padding": "CAUSAL", "kernel_dilation": 2}),
    "1d-input-dilation": ((17, 6), (4,), {"padding": [(5, 1)], "input_dilation": 2, "kernel_dilation": 3}),
    "1d-circular": ((2, 17, 6), (4,), {"padding": "CIRCULAR"}),
    "1d-pair": ((2, 17, 6), (4,), {"padding": [(2, 0)], "kernel_dilation": 3}),
    "1d-multiplier": ((2, 17, 6), (3,), {"features": 12}),
    "1d-no-batch": ((17, 6), (4,), {"padding": "CAUSAL"}),
    "1d-batch-dims": ((3, 2, 17, 6), (4,), {"padding": "REFLECT"}),
}

# dtypes of x, of the computation, of the parameters
DTYPES = [
    ("float32", None, "float32"),
    ("bfloat16", None, "float32"),
    ("bfloat16", None, "bfloat16"),
    ("float32", None, "bfloat16"),
    ("bfloat16", None, "float16"),
    ("int32", None, "float32"),
    ("int32", None, "bfloat16"),
    ("float32", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "float32"),
    ("bfloat16", "float32", "float32"),
    ("float16", "float16", "float32"),
    ("bfloat16", "float16", "float32"),
    ("bfloat16", "float32", "bfloat16"),
    ("int32", "bfloat16", "float32"),
]


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """A convolution that takes lax's path unasked is an error, and lax on a GPU computes in float32."""
    monkeypatch.setenv("JAX_DWSCONV_FALLBACK", "error")
    with jax.default_matmul_precision("highest"):
        yield


def normal(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * (4 if dtype == "int32" else 1), dtype)


def randomized(variables):
    """The same tree with every leaf random: flax's biases start at zero."""
    leaves, tree = jax.tree.flatten(variables)
    return tree.unflatten([normal(leaf.shape, leaf.dtype, seed) for seed, leaf in enumerate(leaves)])


def pair(x_shape, kernel_size, **settings):
    """flax's layer, ours, and parameters of flax's."""
    flax_settings = {"features": x_shape[-1], **settings}
    theirs = nn.Conv(kernel_size=kernel_size, feature_group_count=x_shape[-1], **flax_settings)
    ours = linen.DepthwiseConv(kernel_size=kernel_size, **settings)
    return theirs, ours, randomized(theirs.init(jax.random.key(0), jnp.ones(x_shape)))


def assert_close(actual, expected, dtype="float32"):
    rtol = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}[jnp.dtype(dtype).name]
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_flax(case):
    shape, kernel_size, settings = CASES[case]
    theirs, ours, variables = pair(shape, kernel_size, **settings)
    x = normal(shape)
    assert "dwsconv_" in str(jax.make_jaxpr(ours.apply)(variables, x))
    assert_close(ours.apply(variables, x), theirs.apply(variables, x))


@pytest.mark.parametrize("case", CASES)
def test_same_initial_parameters(case):
    shape, kernel_size, settings = CASES[case]
    theirs, ours, _ = pair(shape, kernel_size, **settings, bias_init=nn.initializers.normal())
    key, x = jax.random.key(7), normal(shape)
    jax.tree.map(np.testing.assert_array_equal, ours.init(key, x), theirs.init(key, x))


@pytest.mark.parametrize("case", ["2d-stride", "2d-multiplier", "2d-input-dilation", "1d-causal", "1d-circular"])
def test_gradients_agree_with_flax(case):
    shape, kernel_size, settings = CASES[case]
    theirs, ours, variables = pair(shape, kernel_size, **settings)
    x = normal(shape)
    weight = normal(theirs.apply(variables, x).shape, seed=9)

    def gradients(layer):
        return jax.grad(lambda v, x: jnp.sum(layer.apply(v, x) * weight), (0, 1))(variables, x)

    jax.tree.map(assert_close, gradients(ours), gradients(theirs))


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("x_dtype", "dtype", "param_dtype"), DTYPES)
def test_dtypes(x_dtype, dtype, param_dtype, use_bias):
    shape = (2, 9, 11, 6)
    theirs, ours, variables = pair(shape, (3, 3), dtype=dtype, param_dtype=param_dtype, use_bias=use_bias)
    x = normal(shape, x_dtype)
    actual, expected = ours.apply(variables, x), theirs.apply(variables, x)
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, expected.dtype)
    initial = jax.eval_shape(ours.init, jax.random.key(0), x)
    assert initial == jax.eval_shape(lambda: variables)


def test_operands_enter_uncast():
    _, ours, variables = pair((2, 8, 8, 6), (3, 3), dtype=jnp.bfloat16)
    (call,) = [
        equation
        for equation in jax.make_jaxpr(ours.apply)(variables, normal((2, 8, 8, 6), "bfloat16")).eqns
        if equation.primitive.name.startswith("dwsconv_")
    ]
    assert [v.aval.dtype for v in call.invars[:2]] == [jnp.bfloat16, jnp.float32]


def test_the_result_is_rounded_once():
    _, ours, variables = pair((2, 8, 8, 6), (3, 3), dtype=jnp.bfloat16)
    x = normal((2, 8, 8, 6), "bfloat16")
    in_float32 = np.asarray(ours.copy(dtype=jnp.float32).apply(variables, x))
    spacing = np.spacing(np.abs(in_float32)) * 2**16  # of bfloat16
    assert np.all(np.abs(np.asarray(ours.apply(variables, x), np.float32) - in_float32) <= 0.51 * spacing)


def test_causal_padding_makes_no_copy():
    _, ours, variables = pair((2, 17, 6), 4, padding="CAUSAL")
    jaxpr = str(jax.make_jaxpr(ours.apply)(variables, normal((2, 17, 6))))
    assert "pad[" not in jaxpr and "concatenate[" not in jaxpr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["relu6", "gelu", jax.nn.silu, jnp.tanh])
@pytest.mark.parametrize("settings", [{}, {"input_dilation": 2, "padding": 1}])
def test_activation(activation, dtype, settings):
    shape = (2, 9, 11, 6)
    theirs, ours, variables = pair(shape, (3, 3), dtype=dtype, **settings)
    x = normal(shape)
    function = getattr(jax.nn, activation) if isinstance(activation, str) else activation
    actual = ours.copy(activation=activation).apply(variables, x)
    assert actual.dtype == jnp.dtype(dtype)
    assert_close(actual, function(theirs.apply(variables, x)), dtype)


def test_mask():
    mask = np.tril(np.ones((3, 3)))[:, :, None, None] * np.ones((3, 3, 1, 6))
    theirs, ours, variables = pair((2, 9, 11, 6), (3, 3), mask=mask)
    x = normal((2, 9, 11, 6))
    assert_close(ours.apply(variables, x), theirs.apply(variables, x))


def test_custom_promotion_is_honoured():
    def to_bfloat16(*arrays, dtype=None, inexact=True):
        return [None if array is None else array.astype(jnp.bfloat16) for array in arrays]

    theirs, ours, variables = pair((2, 9, 11, 6), (3, 3), promote_dtype=to_bfloat16)
    x = normal((2, 9, 11, 6))
    actual, expected = ours.apply(variables, x), theirs.apply(variables, x)
    assert actual.dtype == expected.dtype == jnp.bfloat16
    assert_close(actual, expected, "bfloat16")


def test_complex_input_goes_to_lax(monkeypatch):
    monkeypatch.setenv("JAX_DWSCONV_FALLBACK", "silent")
    theirs, ours, variables = pair((2, 9, 11, 6), (3, 3))
    x = normal((2, 9, 11, 6)) + 1j * normal((2, 9, 11, 6), seed=1)
    actual, expected = ours.apply(variables, x), theirs.apply(variables, x)
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_partitioning_metadata():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, "model"))
    x = normal((2, 9, 11, 6))
    theirs, ours, _ = pair(x.shape, (3, 3), kernel_init=init)
    specs = [nn.get_partition_spec(layer.init(jax.random.key(0), x)) for layer in (theirs, ours)]
    assert specs[0] == specs[1]


@pytest.mark.parametrize("case", ["2d-stride", "2d-multiplier", "2d-circular", "1d-causal", "2d-batch-dims"])
def test_drop_in_for_flax_conv(case):
    shape, kernel_size, settings = CASES[case]
    theirs, _, variables = pair(shape, kernel_size, **settings)
    hooked = theirs.copy(conv_general_dilated_cls=lambda: jax_dwsconv.conv_general_dilated)
    x = normal(shape)
    assert "dwsconv_forward" in str(jax.make_jaxpr(hooked.apply)(variables, x))
    assert_close(hooked.apply(variables, x), theirs.apply(variables, x))


class TwoConvs(nn.Module):
    """What SeparableConv stands in for."""

    features: int
    kernel_size: tuple
    multiplier: int = 1
    use_bias: bool = True
    dtype: str | None = None
    settings: tuple = ()

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, use_bias=self.use_bias, dtype=self.dtype)
        channels = x.shape[-1]
        x = conv(
            channels * self.multiplier,
            self.kernel_size,
            feature_group_count=channels,
            name="depthwise",
            **dict(self.settings),
        )(x)
        return nn.relu(conv(self.features, (1, 1), name="pointwise")(nn.silu(x)))


SEPARABLE_CASES = {
    "plain": ({}, {}),
    "stride": ({}, {"strides": 2, "padding": [(0, 1), (1, 1)]}),
    "multiplier": ({"multiplier": 2}, {"kernel_dilation": 2}),
    "no-bias": ({"use_bias": False}, {"padding": "VALID"}),
    "circular": ({}, {"padding": "CIRCULAR", "strides": 2}),
}


def separable_pair(options, settings):
    theirs = TwoConvs(10, (3, 3), **options, settings=tuple(settings.items()))
    activations = {"depthwise_activation": "silu", "pointwise_activation": nn.relu}
    return theirs, linen.SeparableConv(10, (3, 3), **options, **settings, **activations)


@pytest.mark.parametrize("case", SEPARABLE_CASES)
@pytest.mark.parametrize("batch", [(), (2,), (3, 2)])
def test_separable_agrees_with_two_convolutions(case, batch):
    theirs, ours = separable_pair(*SEPARABLE_CASES[case])
    key, x = jax.random.key(3), normal((*batch, 10, 12, 6))
    variables = theirs.init(key, x)
    jax.tree.map(np.testing.assert_array_equal, ours.init(key, x), variables)
    variables = randomized(variables)
    assert "dwsconv_" in str(jax.make_jaxpr(ours.apply)(variables, x))
    assert_close(ours.apply(variables, x), theirs.apply(variables, x))


@pytest.mark.parametrize(("x_dtype", "dtype"), [("bfloat16", None), ("float32", "bfloat16"), ("int32", None)])
def test_separable_dtypes(x_dtype, dtype):
    theirs, ours = separable_pair({"dtype": dtype}, {})
    x = normal((2, 10, 12, 6), x_dtype)
    variables = randomized(theirs.init(jax.random.key(3), x))
    actual, expected = ours.apply(variables, x), theirs.apply(variables, x)
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, expected.dtype)


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"kernel_size": (3, 3, 3)}, (2, 5, 5, 5, 6), r"kernel_size .* one or two ints, got \(3, 3, 3\)"),
        ({}, (2, 5, 5, 6), "kernel_size .* got None"),
        (
            {"kernel_size": (3, 3), "features": 7},
            (2, 5, 5, 6),
            "multiple of its input features, got 7 output .* 6 input",
        ),
        ({"kernel_size": (3, 3), "mask": np.ones((3, 3))}, (2, 5, 5, 6), r"mask .* \(3, 3, 1, 6\), got \(3, 3\)"),
        ({"kernel_size": (3, 3), "padding": "CAUSAL"}, (2, 5, 5, 6), "CAUSAL"),
        ({"kernel_size": (3, 3), "input_dilation": 2}, (2, 5, 5, 6), r"padding='SAME' and input_dilation=\(2, 2\)"),
        ({"kernel_size": (3, 3), "padding": "NONE"}, (2, 5, 5, 6), "'NONE' is unknown"),
        ({"kernel_size": (3, 3), "strides": (1, 2, 3)}, (2, 5, 5, 6), "strides"),
        ({"kernel_size": (3, 3), "activation": "swoosh"}, (2, 5, 5, 6), "'swoosh' is unknown"),
        ({"kernel_size": (3, 3)}, (5, 6), r"at least 3 dimensions.* \(5, 6\)"),
        ({"kernel_size": 3}, (), "input features"),
    ],
)
def test_errors(settings, shape, message):
    with pytest.raises(ValueError, match=message):
        linen.DepthwiseConv(**settings).init(jax.random.key(0), jnp.ones(shape))


@pytest.mark.parametrize("kernel_size", [3, (3,), (3, 3, 3)])
def test_separable_needs_two_dimensions(kernel_size):
    with pytest.raises(ValueError, match="kernel_size must be a sequence of two ints"):
        linen.SeparableConv(8, kernel_size).init(jax.random.key(0), jnp.ones((2, 5, 5, 6)))


def test_another_number_of_channels_than_the_parameters():
    _, ours, variables = pair((2, 9, 11, 6), (3, 3))
    with pytest.raises(Exception, match="shape"):
        ours.apply(variables, normal((2, 9, 11, 12)))
