import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jax_dwsconv import _native, _planning, quantized, quantized_pointwise

# (..., channels), features: beside what the kernels divide by, 16 pixels, 32 to 512 channels, 32 features.
SHAPES = [
    ((1, 7, 7, 160), 40),
    ((2, 7, 7, 1152), 192),
    ((3, 5, 3, 264), 24),
    ((5, 1024), 1000),
    ((17, 8), 8),
    ((3, 23, 31, 24), 144),
    ((5, 40, 40, 16), 96),
    ((1, 14, 14, 528), 512),
]
CLAMP, ZERO_POINT = (-100, 117), -3


def operands(shape, features, residual=True, seed=0):
    rng = np.random.default_rng(seed)
    x, kernel = (rng.integers(-128, 128, size, np.int8) for size in (shape, (shape[-1], features)))
    spread = 128**2 / 3 * shape[-1] ** 0.5
    others = {
        "scale": (100 / spread * rng.uniform(0.5, 1.5, features)).astype(np.float32),
        "bias": rng.integers(-int(spread), int(spread), features, np.int32),
    }
    if residual:
        others["residual"] = rng.integers(-128, 128, (*shape[:-1], features), np.int8)
        others["residual_scale"] = (spread / 100 * rng.uniform(0.5, 1.5, features)).astype(np.float32)
        others["residual_zero_point"] = 5
    return x, kernel, others


def expected(x, kernel, others, x_zero_point=0):
    """The definition, in int64 and float32."""
    sums = (x.astype(np.int64) - x_zero_point) @ kernel.astype(np.int64) + others["bias"]
    if "residual" in others:
        real = others["residual"].astype(np.int32) - others["residual_zero_point"]
        sums += np.rint(real.astype(np.float32) * others["residual_scale"]).astype(np.int64)
    rounded = np.rint(sums.astype(np.float32) * others["scale"])
    return np.clip(rounded + ZERO_POINT, *CLAMP).astype(np.int8)


def run(x, kernel, others, **options):
    options = {"clamp": CLAMP, "out_zero_point": ZERO_POINT} | options
    static = {"residual_zero_point": others["residual_zero_point"]} if "residual" in others else {}
    arrays = {name: a for name, a in others.items() if name != "residual_zero_point"}

    @jax.jit
    def function(x, kernel, arrays):
        return quantized.pointwise_conv(x, kernel, **arrays, **static, **options)

    return np.asarray(function(x, kernel, arrays)), function.lower(x, kernel, arrays).as_text()


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("shape", "features"), SHAPES, ids=str)
def test_equal_to_the_definition(shape, features, residual):
    x, kernel, others = operands(shape, features, residual)
    y, text = run(x, kernel, others, x_zero_point=-7)
    np.testing.assert_array_equal(y, expected(x, kernel, others, -7))
    assert (y > CLAMP[0]).mean() > 0.5  # most results are within the limits
    if jax.default_backend() == "gpu" and features < 1000:
        assert _native.TARGETS["quantized_pointwise"] in text


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("shape", "features"), SHAPES, ids=str)
def test_every_kind_of_tile(shape, features, residual, monkeypatch):
    x, kernel, others = operands(shape, features, residual)
    y = expected(x, kernel, others)
    monkeypatch.setattr(quantized_pointwise.pointwise, "pays", lambda *_: True)
    device = _planning.visible_device() or _planning.DEVICES["h100"]
    pixels = int(np.prod(shape[:-1]))
    for plan in _planning.plan_pointwise((1, 1, pixels, shape[-1]), features, "int8", device=device)[1]:
        monkeypatch.setenv("JAX_DWSCONV_TILE", plan.text)
        np.testing.assert_array_equal(run(x, kernel, others)[0], y, err_msg=plan.text)
        assert _native.load("cuda").last_forced_plan() == plan.text


def test_ties_and_limits():
    """All sums of small integers times one half: every second is a tie."""
    x = np.arange(-128, 128, dtype=np.int8).reshape(-1, 1) * np.eye(1, 16, dtype=np.int8)
    kernel = np.ones((16, 8), np.int8)
    scale = np.full(8, 0.5, np.float32)
    for zero_point in (-128, -1, 0, 127):
        y = np.asarray(
            jax.jit(functools.partial(quantized.pointwise_conv, out_zero_point=zero_point))(x, kernel, scale=scale)
        )
        definition = np.clip(np.rint(x[:, :1].astype(np.float32) * 0.5) + zero_point, -128, 127)
        np.testing.assert_array_equal(y, np.broadcast_to(definition, y.shape))


def test_channels_first():
    x, kernel, others = operands((2, 3, 4, 16), 8)
    y = expected(x, kernel, others)
    others["residual"] = np.moveaxis(others["residual"], -1, 1)
    result, _ = run(np.moveaxis(x, -1, 1), kernel, others, channel_axis=1)
    np.testing.assert_array_equal(np.moveaxis(result, 1, -1), y)


@pytest.mark.parametrize("mapped", ["x", "x+residual", "kernel", "x+scale"])
def test_vmap(mapped):
    mapped = mapped.split("+")
    several = []
    for seed in range(3):
        x, kernel, others = operands((4, 16), 8, seed=seed)
        several.append({"x": x, "kernel": kernel} | others)
    zero_point = several[0].pop("residual_zero_point")
    names = tuple(several[0])
    given = {n: np.stack([e[n] for e in several]) if n in mapped else several[0][n] for n in names}

    def function(given):
        options = {"clamp": CLAMP, "out_zero_point": ZERO_POINT, "residual_zero_point": zero_point}
        return quantized.pointwise_conv(**given, **options)

    y = jax.vmap(function, ({n: 0 if n in mapped else None for n in names},))(given)
    for i, each in enumerate(several):
        one = {n: each[n] if n in mapped else several[0][n] for n in names} | {"residual_zero_point": zero_point}
        np.testing.assert_array_equal(np.asarray(y[i]), expected(one.pop("x"), one.pop("kernel"), one))


@pytest.mark.parametrize("sizes", [(4, 0, 8), (4, 16, 0), (0, 16, 8)], ids=str)
def test_nothing(sizes):
    pixels, channels, features = sizes
    x, kernel, others = np.zeros((pixels, channels), np.int8), np.zeros((channels, features), np.int8), {}
    others["scale"], others["bias"] = np.ones(features, np.float32), np.full(features, 7, np.int32)
    others |= {"residual": np.ones((pixels, features), np.int8), "residual_scale": np.ones(features, np.float32)}
    y = jax.jit(quantized.pointwise_conv)(x, kernel, **others)
    np.testing.assert_array_equal(np.asarray(y), np.full((pixels, features), 8, np.int8))


def test_vmap_over_nothing():
    _, kernel, others = operands((4, 16), 8, residual=False)
    y = jax.vmap(lambda x: quantized.pointwise_conv(x, kernel, **others))(np.zeros((0, 4, 16), np.int8))
    assert y.shape == (0, 4, 8)


@pytest.mark.parametrize("axis", [0, 1])
def test_no_derivative(axis):
    x, kernel, others = operands((16, 16), 8, residual=False)

    def function(scale):
        return quantized.pointwise_conv(x, kernel, scale=scale, channel_axis=axis).astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="no derivative"):
        jax.grad(function)(jnp.asarray(others["scale"]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual_scale": None}, ValueError, "residual and residual_scale need each other"),
        ({"residual": np.zeros((4, 7), np.int8)}, ValueError, "residual must have the shape of the result"),
        ({"residual": np.zeros((4, 8), np.float32)}, TypeError, "residual"),
        ({"residual_scale": np.ones(7)}, ValueError, "residual_scale"),
        ({"residual_zero_point": 128}, ValueError, "residual_zero_point"),
    ],
)
def test_errors(change, error, message):
    x, kernel, others = operands((4, 16), 8)
    with pytest.raises(error, match=message):
        quantized.pointwise_conv(x, kernel, **(others | change))
