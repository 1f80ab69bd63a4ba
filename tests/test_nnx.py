"""The nnx layers against flax's own, with the same parameters."""

import itertools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jax_dwsconv

nnx = pytest.importorskip("flax.nnx")
from jax_dwsconv import nnx as dwsconv_nnx  # noqa: E402

# shape of x, kernel_size, settings
CASES = {
    "2d": ((2, 9, 11, 6), (3, 3), {}),
    "2d-stride": ((2, 10, 12, 6), (5, 3), {"strides": (2, 1)}),
    "2d-valid": ((2, 9, 11, 6), (3, 5), {"padding": "VALID", "strides": None}),
    "2d-mixed-padding": ((2, 9, 11, 6), (3, 3), {"padding": [1, (0, 2)]}),
    "2d-circular": ((2, 9, 11, 6), (3, 4), {"padding": "CIRCULAR", "kernel_dilation": 2}),
    "2d-dilation": ((2, 9, 11, 6), (3, 3), {"kernel_dilation": (1, 2)}),
    "2d-input-dilation": ((2, 5, 7, 6), (3, 3), {"input_dilation": (2, 3), "padding": 1}),
    "2d-no-bias": ((2, 9, 11, 6), (3, 3), {"use_bias": False}),
    "2d-multiplier": ((2, 9, 11, 6), (3, 3), {"out_features": 12, "strides": 2}),
    "2d-no-batch": ((9, 11, 6), (3, 3), {}),
    "2d-batch-dims": ((3, 2, 9, 11, 6), (3, 3), {"strides": 2}),
    "1d": ((2, 17, 6), 4, {"padding": "SAME_LOWER"}),
    "1d-causal": ((2, 17, 6), (4,), {"padding": "CAUSAL", "kernel_dilation": 2}),
    "1d-reflect": ((17, 6), (4,), {"padding": "REFLECT", "strides": 2}),
    "1d-multiplier": ((3, 2, 17, 6), (3,), {"out_features": 12}),
}

# dtypes of x, of the computation, of the parameters
DTYPES = [
    ("float32", None, "float32"),
    ("bfloat16", None, "float32"),
    ("bfloat16", None, "bfloat16"),
    ("float32", None, "bfloat16"),
    ("int32", None, "float32"),
    ("float32", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "float32"),
    ("bfloat16", "float32", "float32"),
    ("float16", "float16", "float32"),
    ("bfloat16", "float16", "float32"),
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


def randomize(layer):
    """Makes every parameter random: flax's biases start at zero."""
    leaves, tree = jax.tree.flatten(nnx.state(layer, nnx.Param))
    nnx.update(layer, tree.unflatten([normal(leaf.shape, leaf.dtype, seed) for seed, leaf in enumerate(leaves)]))


def pair(x_shape, kernel_size, out_features=None, **settings):
    """flax's layer and ours, with the state of flax's."""
    channels = x_shape[-1]
    sizes = (channels, out_features or channels, kernel_size)
    theirs = nnx.Conv(*sizes, feature_group_count=channels, **settings, rngs=nnx.Rngs(0))
    ours = dwsconv_nnx.DepthwiseConv(*sizes, **settings, rngs=nnx.Rngs(1))
    randomize(theirs)
    nnx.update(ours, nnx.state(theirs))
    return theirs, ours


def jaxpr_of(layer, x):
    graph, state = nnx.split(layer)
    return str(jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, x))


def gradients(layer, x, weight):
    return nnx.grad(lambda layer, x: jnp.sum(layer(x) * weight), argnums=(0, 1))(layer, x)


def assert_close(actual, expected, dtype="float32"):
    rtol = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3}[jnp.dtype(dtype).name]
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def assert_same_state(actual, expected):
    actual, expected = nnx.state(actual), nnx.state(expected)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(actual), nnx.to_pure_dict(expected))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_flax(case):
    shape, kernel_size, settings = CASES[case]
    theirs, ours = pair(shape, kernel_size, **settings)
    x = normal(shape)
    assert "dwsconv_" in jaxpr_of(ours, x)
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("settings", [{}, {"use_bias": False}, {"mask": jnp.ones((3, 3, 1, 6))}])
def test_same_initial_state(settings):
    settings = {"bias_init": nnx.initializers.normal(), **settings}
    theirs = nnx.Conv(6, 6, (3, 3), feature_group_count=6, **settings, rngs=nnx.Rngs(5))
    ours = dwsconv_nnx.DepthwiseConv(6, 6, (3, 3), **settings, rngs=nnx.Rngs(5))
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("case", ["2d-stride", "2d-multiplier", "2d-input-dilation", "1d-causal"])
def test_gradients_agree_with_flax(case):
    shape, kernel_size, settings = CASES[case]
    theirs, ours = pair(shape, kernel_size, **settings)
    x = normal(shape)
    weight = normal(theirs(x).shape, seed=9)
    jax.tree.map(assert_close, gradients(ours, x, weight), gradients(theirs, x, weight))


@pytest.mark.parametrize(("x_dtype", "dtype", "param_dtype"), DTYPES)
def test_dtypes(x_dtype, dtype, param_dtype):
    shape = (2, 9, 11, 6)
    theirs, ours = pair(shape, (3, 3), dtype=dtype, param_dtype=param_dtype)
    x = normal(shape, x_dtype)
    actual, expected = ours(x), theirs(x)
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, expected.dtype)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("preferred", "dtype"), [("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_preferred_element_type(preferred, dtype, use_bias):
    settings = {"dtype": dtype, "preferred_element_type": jnp.dtype(preferred), "use_bias": use_bias}
    theirs, ours = pair((2, 9, 11, 6), (3, 3), **settings)
    x = normal((2, 9, 11, 6))
    actual, expected = ours(x), theirs(x)
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, "bfloat16")


@pytest.mark.parametrize("activation", ["relu6", jax.nn.silu, jnp.tanh])
def test_activation(activation):
    theirs, ours = pair((2, 9, 11, 6), (3, 3))
    ours.activation = activation
    x = normal((2, 9, 11, 6))
    function = getattr(jax.nn, activation) if isinstance(activation, str) else activation
    assert_close(ours(x), function(theirs(x)))


def test_mask():
    mask = jnp.tril(jnp.ones((3, 3)))[:, :, None, None] * jnp.ones((3, 3, 1, 6))
    theirs, ours = pair((2, 9, 11, 6), (3, 3), mask=mask)
    x = normal((2, 9, 11, 6))
    assert_close(ours(x), theirs(x))


def test_custom_promotion_is_honoured():
    def to_bfloat16(arrays, *, dtype=None, inexact=True):
        return tuple(None if array is None else array.astype(jnp.bfloat16) for array in arrays)

    theirs, ours = pair((2, 9, 11, 6), (3, 3), promote_dtype=to_bfloat16)
    x = normal((2, 9, 11, 6))
    actual, expected = ours(x), theirs(x)
    assert actual.dtype == expected.dtype == jnp.bfloat16
    assert_close(actual, expected, "bfloat16")


def test_out_sharding(monkeypatch):
    monkeypatch.setenv("JAX_DWSCONV_FALLBACK", "silent")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        theirs, ours = pair((2, 9, 11, 6), (3, 3))
        x = normal((2, 9, 11, 6))
        actual, expected = (layer(x, out_sharding=jax.P("data")) for layer in (ours, theirs))
    assert actual.sharding.spec == expected.sharding.spec
    assert_close(actual, expected)


def test_metadata():
    metadata = {"kernel_metadata": {"note": "kernel"}, "bias_metadata": {"note": "bias"}}
    layer = dwsconv_nnx.DepthwiseConv(6, 6, (3, 3), **metadata, rngs=nnx.Rngs(0))
    assert (layer.kernel.note, layer.bias.note) == ("kernel", "bias")


def test_is_a_flax_conv():
    layer = dwsconv_nnx.DepthwiseConv(6, 12, 4, rngs=nnx.Rngs(0))
    assert isinstance(layer, nnx.Conv)
    assert (layer.kernel_size, layer.feature_group_count) == ((4,), 6)


@pytest.mark.parametrize("case", ["2d-stride", "2d-multiplier", "2d-circular", "1d-causal", "2d-batch-dims"])
def test_drop_in_for_flax_conv(case):
    shape, kernel_size, settings = CASES[case]
    theirs, _ = pair(shape, kernel_size, **settings)
    settings = {"in_features": 6, "out_features": 6, "feature_group_count": 6, "kernel_size": kernel_size, **settings}
    hooked = nnx.Conv(**settings, conv_general_dilated=jax_dwsconv.conv_general_dilated, rngs=nnx.Rngs(1))
    nnx.update(hooked, nnx.state(theirs))
    x = normal(shape)
    assert "dwsconv_forward" in jaxpr_of(hooked, x)
    assert_same_state(hooked, theirs)
    assert_close(hooked(x), theirs(x))


class TwoConvs(nnx.Module):
    """What SeparableConv stands in for."""

    def __init__(
        self, in_features, out_features, kernel_size, multiplier=1, *, use_bias=True, dtype=None, rngs, **settings
    ):
        common = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
        hidden = in_features * multiplier
        self.depthwise = nnx.Conv(
            in_features, hidden, kernel_size, feature_group_count=in_features, **common, **settings
        )
        self.pointwise = nnx.Conv(hidden, out_features, (1, 1), **common)

    def __call__(self, x):
        return nnx.relu(self.pointwise(nnx.silu(self.depthwise(x))))


def separable_pair(**settings):
    activations = {"depthwise_activation": "silu", "pointwise_activation": nnx.relu}
    theirs = TwoConvs(6, 10, (3, 3), **settings, rngs=nnx.Rngs(2))
    return theirs, dwsconv_nnx.SeparableConv(6, 10, (3, 3), **settings, **activations, rngs=nnx.Rngs(2))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strides": 2, "padding": [(0, 1), (1, 1)]},
        {"multiplier": 2, "kernel_dilation": 2},
        {"use_bias": False, "padding": "VALID"},
        {"padding": "CIRCULAR", "strides": 2},
    ],
)
def test_separable_agrees_with_two_convolutions(settings):
    theirs, ours = separable_pair(**settings)
    assert_same_state(ours, theirs)
    randomize(theirs)
    nnx.update(ours, nnx.state(theirs))
    for batch in [(), (2,), (3, 2)]:
        x = normal((*batch, 10, 12, 6))
        assert "dwsconv_" in jaxpr_of(ours, x)
        assert_close(ours(x), theirs(x))
    weight = normal(theirs(x).shape, seed=9)
    jax.tree.map(assert_close, gradients(ours, x, weight), gradients(theirs, x, weight))


@pytest.mark.parametrize(("x_dtype", "dtype"), [("bfloat16", None), ("float32", "bfloat16"), ("int32", None)])
def test_separable_dtypes(x_dtype, dtype):
    theirs, ours = separable_pair(dtype=dtype)
    x = normal((2, 10, 12, 6), x_dtype)
    actual, expected = ours(x), theirs(x)
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, expected.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_reduces_the_loss(dtype):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = dwsconv_nnx.DepthwiseConv(4, 8, (3, 3), dtype=dtype, activation="silu", rngs=rngs)
            self.second = dwsconv_nnx.SeparableConv(
                8, 5, (3, 3), strides=2, dtype=dtype, depthwise_activation="relu6", rngs=rngs
            )

        def __call__(self, x):
            return self.second(self.first(x)).mean((1, 2), dtype=jnp.float32)

    x, target = normal((8, 8, 8, 4)), normal((8, 5), seed=1)

    @nnx.jit
    def step(model):
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(x) - target) ** 2))(model)
        state = jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), gradient)
        nnx.update(model, state)
        return loss

    model = Model(nnx.Rngs(0))
    losses = [step(model) for _ in range(4)]
    assert all(after < before for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((6, 6, (3, 3, 3)), {}, r"kernel_size .* one or two ints, got \(3, 3, 3\)"),
        ((6, 6, (0, 3)), {}, "kernel_size"),
        ((6, 7, (3, 3)), {}, "multiple of its input features, got 7 output features and 6 input"),
        ((6, 3, (3, 3)), {}, "multiple of its input features"),
    ],
)
def test_errors_of_the_constructor(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        dwsconv_nnx.DepthwiseConv(*arguments, **settings, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({}, (2, 5, 5, 12), r"of size 6 .* \(2, 5, 5, 12\)"),
        ({}, (5, 6), r"at least 3 dimensions.* \(5, 6\)"),
        ({"mask": jnp.ones((3, 3))}, (2, 5, 5, 6), r"mask .* \(3, 3, 1, 12\), got \(3, 3\)"),
        ({"padding": "CAUSAL"}, (2, 5, 5, 6), "CAUSAL"),
        ({"input_dilation": 2}, (2, 5, 5, 6), r"padding='SAME' and input_dilation=\(2, 2\)"),
        ({"activation": "swoosh"}, (2, 5, 5, 6), "'swoosh' is unknown"),
    ],
)
def test_errors_of_the_call(settings, shape, message):
    layer = dwsconv_nnx.DepthwiseConv(6, 12, (3, 3), **settings, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones(shape))


def test_separable_errors():
    with pytest.raises(ValueError, match="kernel_size must be a sequence of two ints"):
        dwsconv_nnx.SeparableConv(6, 8, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="of size 6"):
        dwsconv_nnx.SeparableConv(6, 8, (3, 3), rngs=nnx.Rngs(0))(jnp.ones((2, 5, 5, 12)))
