"""int8: every result equals an int64 reference exactly."""

import functools
import zlib
from typing import NamedTuple

import cases
import jax
import meshes
import numerics
import numpy as np
import pytest
from cases import Case
from jax import numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

import jax_dwsconv
from jax_dwsconv import _native, _planning, quantized, quantized_primitive
from jax_dwsconv.quantized_primitive import MOST_TAPS, Quantization


class Operands(NamedTuple):
    x: np.ndarray
    kernel: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


def _operands(case: Case) -> tuple[Operands, Quantization]:
    """int8 over the whole range, scales of which many give ties, and all kinds of zero points and limits."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    shapes, channels = case.shapes(), case.out_channels
    x, kernel = (rng.integers(-128, 128, shapes[role], dtype=np.int8) for role in ("input", "filter"))
    scale = 2.0 ** -rng.integers(5, 13, channels) * rng.choice((1, 0.7), channels)
    bias = rng.integers(-3000, 3000, channels, dtype=np.int32) << rng.choice((0, 16), channels)
    x_zero_point, out_zero_point = rng.choice((-128, -3, 0, 127), 2)
    low, high = sorted(rng.choice((-128, -100, out_zero_point, 90, 127), 2, replace=False))
    return Operands(x, kernel, scale.astype(np.float32), bias), Quantization(
        *map(int, (x_zero_point, out_zero_point, low, high))
    )


def _sums(case: Case, o: Operands, x_zero_point: int) -> np.ndarray:
    """In int64; the float64 of the reference holds these integers exactly."""
    y = numerics.reference(case, "forward", o.x.astype(np.int64) - x_zero_point, o.kernel.astype(np.int64))
    return y.astype(np.int64) + o.bias.reshape(case.window.activation_shape(1, (1, 1), -1))


def _requantized(sums: np.ndarray, scale: np.ndarray, q: Quantization) -> np.ndarray:
    return np.clip(np.rint(sums.astype(np.float32) * scale).astype(np.int64) + q.out_zero_point, q.low, q.high)


def _expected(case: Case, o: Operands, q: Quantization) -> np.ndarray:
    return _requantized(_sums(case, o, q.x_zero_point), o.scale.reshape(case.window.activation_shape(1, (1, 1), -1)), q)


def _run(case: Case, q: Quantization, x, kernel, scale, bias) -> jax.Array:
    operands = (None if a is None else jnp.asarray(a) for a in (x, kernel, scale, bias))
    return quantized_primitive.quantized_forward(*operands, window=case.window, quantization=q)


def _assert_equal(actual, expected, dtype) -> None:
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual, expected)


def _check(case: Case) -> None:
    o, q = _operands(case)
    raw = _run(case, Quantization(q.x_zero_point), o.x, o.kernel, None, o.bias)
    _assert_equal(raw, _sums(case, o, q.x_zero_point), np.int32)
    _assert_equal(_run(case, q, *o), _expected(case, o, q), np.int8)


@pytest.mark.parametrize("case", cases.grid(), ids=str)
def test_grid(case):
    _check(case)


@pytest.mark.parametrize("case", cases.usual(), ids=str)
def test_usual(case):
    _check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.random_cases(300, seed=2), ids=str)
def test_random(case):
    _check(case)


TILED = [
    Case(size=(11, 19), channels=40),
    Case(size=(12, 21), channels=36, strides=(2, 2), padding=((0, 1), (1, 1))),
    Case(batch=3, size=(9, 15), channels=32, kernel_size=(5, 5), padding=((2, 2), (-1, 5)), groups=3),
    Case(size=(14, 9), channels=12, kernel_size=(5, 4), strides=(2, 2), padding=((1, 2), (9, 2))),
    Case(size=(9, 16), channels=8, kernel_size=(7, 7), padding=((3, 3), (3, 3))),
    Case(size=(12, 12), channels=8, kernel_size=(7, 7), strides=(2, 2), padding=((2, 3), (2, 3))),
    Case(size=(1, 37), channels=8, kernel_size=(1, 4), padding=((0, 0), (3, 0))),
]


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="there the tiles are chosen")
@pytest.mark.parametrize("case", TILED, ids=str)
def test_every_kind_of_tile(case, monkeypatch):
    """The planner takes the best; here the others show that they are right, too."""
    device = _planning.visible_device()
    if device is None:
        pytest.skip("the planner's table does not have this GPU")
    shape = (case.batch, *case.size, case.channels)
    _, candidates = _planning.plan(
        "quantized_forward", shape, case.kernel_size, case.strides, case.padding, dtype="int8", device=device
    )
    texts = [candidate.text for candidate in candidates]
    kinds = {text.rpartition("x")[0] if text.startswith("quantized:") else text: text for text in texts}
    assert {text.partition(":")[0] for text in kinds.values()} >= {"quantized", "gather"}
    for tile in kinds.values():
        monkeypatch.setenv("JAX_DWSCONV_TILE", tile)
        jax.clear_caches()
        _check(case)
        assert _native.load("cuda").last_forced_plan() == tile


@pytest.mark.parametrize("case", cases.grid()[::6], ids=str)
def test_shifted_products(case, monkeypatch):
    monkeypatch.setenv("JAX_DWSCONV_DISABLE", "1")
    _check(case)


@pytest.mark.parametrize("channels", [1, 4, 64])
def test_every_tie_and_zero_point(channels):
    """All of int8 times 0.5, 1.5 and 2.5: every second product is a tie, and most saturate."""
    x = np.arange(-128, 128, dtype=np.int8)[:, None].repeat(channels, 1)
    kernel, scale = np.ones((1, 1, channels), np.int8), np.resize(np.float32([0.5, 1.5, 2.5]), channels)
    product = x * scale
    for zero_point in range(-128, 128, 5):
        y = quantized.depthwise_conv1d(x, kernel, scale=scale, out_zero_point=zero_point)
        _assert_equal(y, np.clip(np.round(product) + zero_point, -128, 127), np.int8)


def test_large_biases():
    """Sums beyond 2**24 are rounded when they become float32."""
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (40, 64), dtype=np.int8)
    kernel, bias = np.ones((1, 1, 64), np.int8), rng.integers(-(2**30), 2**30, 64, dtype=np.int32)
    scale = np.float32(100) / np.abs(bias)
    y = quantized.depthwise_conv1d(x, kernel, scale=scale, bias=bias, x_zero_point=7)
    _assert_equal(y, _requantized(x.astype(np.int64) - 7 + bias, scale, Quantization()), np.int8)


@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("x_zero_point", [-128, 127])
def test_largest_sums(x_zero_point, channels):
    """The most taps that are taken, all at their limits."""
    x = np.full((MOST_TAPS, channels), -1 - x_zero_point, np.int8)
    kernel = np.full((MOST_TAPS, 1, channels), -128, np.int8)
    y = quantized.depthwise_conv1d(x, kernel, padding="VALID", x_zero_point=x_zero_point)
    expected = (-1 - 2 * x_zero_point) * -128 * MOST_TAPS
    assert abs(expected) < 2**30
    _assert_equal(y, np.full((1, channels), expected), np.int32)
    with pytest.raises(ValueError, match=r"32769 taps.*not to overflow for at most 32768"):
        jax.eval_shape(quantized.depthwise_conv1d, x, jnp.ones((MOST_TAPS + 1, 1, channels), jnp.int8))


CASES = (
    Case(batch=8, channels=8),
    Case(batch=8, channels=8, layout="NCHW", strides=(2, 1)),
    Case(batch=8, channels=8, multiplier=2, padding=((2, 0), (0, 3))),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_public_functions(case):
    o, q = _operands(case)
    keywords = {"strides": case.strides, "padding": case.padding, "data_format": case.layout}
    follow = {"scale": o.scale, "bias": o.bias, "clamp": q[2:], "out_zero_point": q.out_zero_point}
    convolve = functools.partial(
        quantized.depthwise_conv2d, o.x, o.kernel[0][:, :, None], x_zero_point=q.x_zero_point, **keywords
    )
    _assert_equal(convolve(**follow), _expected(case, o, q), np.int8)
    _assert_equal(convolve(bias=o.bias), _sums(case, o, q.x_zero_point), np.int32)


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_separable(data_format):
    case = Case(batch=2, channels=8, layout=data_format)
    o, q = _operands(case)
    rng = np.random.default_rng(0)
    pointwise, bias = rng.integers(-128, 128, (8, 5), dtype=np.int8), rng.integers(-999, 999, 5, dtype=np.int32)
    scale = np.float32([0.01, 0.02, 0.005, 0.5, 0.003])
    separable = functools.partial(
        quantized.separable_conv2d,
        o.x,
        o.kernel[0][:, :, None],
        pointwise,
        depthwise_scale=o.scale,
        depthwise_bias=o.bias,
        depthwise_clamp=q[2:],
        pointwise_bias=bias,
        x_zero_point=q.x_zero_point,
        depthwise_zero_point=q.out_zero_point,
        data_format=data_format,
    )
    between = np.moveaxis(_expected(case, o, q) - q.out_zero_point, case.window.channel_axis, -1)
    sums = between @ pointwise.astype(np.int64) + bias
    requantized = _requantized(sums, scale, Quantization(0, 9, -20, 120))
    last = functools.partial(np.moveaxis, source=case.window.channel_axis, destination=-1)
    _assert_equal(last(separable()), sums, np.int32)
    _assert_equal(
        last(separable(pointwise_scale=scale, pointwise_clamp=(-20, 120), out_zero_point=9)), requantized, np.int8
    )


def test_quantize_and_back():
    x = np.float32([-100, -1.5, -0.5, 0, 0.5, 1.5, 2.5, 100])
    q = quantized.quantize(x, 1.0, 3)
    _assert_equal(q, [-97, 1, 3, 3, 3, 5, 5, 103], np.int8)
    np.testing.assert_array_equal(quantized.dequantize(q, 0.5, 3), np.float32([-50, -1, 0, 0, 0, 1, 1, 50]))


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [(-1, 4.1, 0.02, -78), (0, 5.1, 0.02, -128), (-5.1, 0, 0.02, 127), (2, 5.1, 0.02, -128), (0, 0, 1, -128)],
)
def test_scale_and_zero_point(low, high, scale, zero_point):
    found = quantized.scale_and_zero_point(low, high)
    assert found == (pytest.approx(scale), zero_point)
    for end in (min(low, 0), max(high, 0)):
        back = quantized.dequantize(quantized.quantize(jnp.float32(end), *found), *found)
        np.testing.assert_allclose(back, end, atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(1, 0), (float("nan"), 1), (0, float("inf"))])
def test_scale_and_zero_point_errors(low, high):
    with pytest.raises(ValueError, match="low and high must be finite, with low <= high"):
        quantized.scale_and_zero_point(low, high)


def test_quantize_kernel():
    kernel = np.float32([[1, 0, -1e-30, 3], [-2, 0, 1e-30, 0.5]])
    kernel8, scale = quantized.quantize_kernel(kernel)
    _assert_equal(kernel8, [[64, 0, -127, 127], [-127, 0, 127, 21]], np.int8)
    np.testing.assert_allclose(scale, np.float32([2 / 127, 1, 1e-30 / 127, 3 / 127]))
    kernel8, scale = quantized.quantize_kernel(kernel, np.float32([0, 0, 0.1, 1]))
    _assert_equal(kernel8, [[64, 0, 0, 3], [-127, 0, 0, 0]], np.int8)
    np.testing.assert_allclose(scale, np.float32([2 / 127, 1, 0.1, 1]))
    with pytest.raises(TypeError, match="kernel must have a floating dtype"):
        quantized.quantize_kernel(kernel8)


@pytest.mark.parametrize("channel_axis", [-1, 1])
def test_requantize(channel_axis):
    """As the convolutions do it with the sums that they would have returned."""
    case = Case(batch=2, channels=8, layout="NHWC" if channel_axis == -1 else "NCHW")
    o, q = _operands(case)
    sums = _run(case, Quantization(q.x_zero_point), o.x, o.kernel, None, None)
    y = quantized.requantize(
        sums, o.scale, bias=o.bias, clamp=q[2:], out_zero_point=q.out_zero_point, channel_axis=channel_axis
    )
    _assert_equal(y, _run(case, q, *o), np.int8)


def test_requantize_errors():
    with pytest.raises(TypeError, match="sums must have dtype int32, got int8"):
        quantized.requantize(jnp.zeros(3, jnp.int8), 1.0)
    with pytest.raises(TypeError, match="scale must be an array"):
        quantized.requantize(jnp.zeros(3, jnp.int32), None)
    with pytest.raises(ValueError, match=r"scale must have shape \(3,\)"):
        quantized.requantize(jnp.zeros(3, jnp.int32), jnp.ones(2))


# The drop-in ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disable", ["0", "1"])
@pytest.mark.parametrize("case", [*CASES, Case(size=(1, 13), kernel_size=(1, 3), channels=4)], ids=str)
def test_drop_in(case, disable, monkeypatch):
    monkeypatch.setenv("JAX_DWSCONV_DISABLE", disable)
    o, _ = _operands(case)
    kernel = o.kernel[0][:, :, None] if case.filter_layout == "HWO" else o.kernel[0][:, None]
    y = jax_dwsconv.conv_general_dilated(
        o.x,
        kernel,
        case.strides,
        case.padding,
        dimension_numbers=(case.layout, "HWIO", case.layout),
        feature_group_count=case.channels,
        preferred_element_type=jnp.int32,
    )
    _assert_equal(y, _sums(case, o._replace(bias=np.zeros_like(o.bias)), 0), np.int32)


def test_drop_in_leaves_other_integers_to_lax(monkeypatch):
    monkeypatch.setenv("JAX_DWSCONV_FALLBACK", "error")
    x, kernel = jnp.ones((1, 5, 5, 2), jnp.int8), jnp.ones((3, 3, 1, 2), jnp.int8)
    convolve = functools.partial(
        jax_dwsconv.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    )
    with pytest.raises(jax_dwsconv.UnsupportedError, match="int8 with preferred_element_type=int32"):
        convolve(x, kernel, (1, 1), "SAME")
    with pytest.raises(jax_dwsconv.UnsupportedError, match="int8 with lhs_dilation"):
        convolve(x, kernel, (1, 1), [(1, 1)] * 2, (2, 2), preferred_element_type=jnp.int32)


# What JAX does with it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowering(platform):
    o, q = _operands(CASES[0])
    text = jax.jit(functools.partial(_run, CASES[0], q)).trace(*o).lower(lowering_platforms=(platform,)).as_text()
    assert (_native.TARGETS["quantized_forward"] in text) == (platform != "tpu")


@pytest.mark.parametrize(
    "axes", [(0, None, None, None), (None, 0, None, None), (0, 0, None, None), (1, 2, 0, 0)], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_vmap(case, axes):
    o, q = _operands(case)
    several = [_operands(case)[0], Operands(*(np.flip(a) for a in o)), Operands(*(a // 2 for a in o))]
    stacked = [
        a if axis is None else np.stack([each[i] for each in several], axis)
        for i, (a, axis) in enumerate(zip(o, axes, strict=True))
    ]
    result = jax.vmap(functools.partial(_run, case, q), axes)(*stacked)
    for i, each in enumerate(several):
        own = Operands(*(a if axis is None else b for a, b, axis in zip(o, each, axes, strict=True)))
        _assert_equal(result[i], _expected(case, own._replace(scale=own.scale.astype(np.float32)), q), np.int8)


@pytest.mark.parametrize(("batch", "channels"), [("a", None), (None, "a"), ("a", "b")])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sharding(case, axis_type, batch, channels):
    """Without a collective, and equal."""
    o, q = _operands(case)
    mesh = meshes.make(4, 2, axis_type=axis_type)
    spec = P(*case.window.activation_shape(batch, (None, None), channels))
    specs = (spec, P(None, None, None, channels), P(channels), P(channels))
    with jax.set_mesh(mesh):
        operands = meshes.place(mesh, *zip(o, specs, strict=True))
        result, collectives = meshes.run(functools.partial(_run, case, q), *operands)
    assert not collectives
    assert meshes.is_divided(result, spec, mesh)
    _assert_equal(result, _expected(case, o, q), np.int8)


def test_export_with_any_batch_size():
    pytest.importorskip("flatbuffers")
    o, q = _operands(CASES[0])
    shape = jax.export.symbolic_shape("b, 7, 9, 8")
    shapes = (jax.ShapeDtypeStruct(shape, np.int8), *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in o[1:]))
    function = jax.jit(functools.partial(_run, CASES[0], q))
    checks = jax_dwsconv.disabled_export_checks()
    written = jax.export.export(function, disabled_checks=checks)(*shapes).serialize()
    restored = jax.export.deserialize(written)
    _assert_equal(restored.call(*o), _expected(CASES[0], o, q), np.int8)
    _assert_equal(restored.call(o.x[:3], *o[1:]), _expected(CASES[0], o, q)[:3], np.int8)


def test_no_derivative():
    o, _ = _operands(CASES[0])

    def loss(scale):
        y = quantized.depthwise_conv2d(o.x, o.kernel[0][:, :, None], scale=scale)
        return jnp.sum(quantized.dequantize(y, scale))

    with pytest.raises(NotImplementedError, match=r"quantisation-aware training.*depthwise_conv2d"):
        jax.grad(loss)(o.scale)


X, KERNEL = np.ones((2, 5, 5, 6), np.int8), np.ones((3, 3, 1, 6), np.int8)
BAD = [
    ({"x": X.astype(np.float32)}, TypeError, "x must have dtype int8, got float32.*quantize"),
    ({"kernel": KERNEL.astype(np.uint8)}, TypeError, "kernel must have dtype int8, got uint8"),
    ({"kernel": KERNEL[..., :5]}, ValueError, "kernel.*multiple of the 6 channels"),
    ({"scale": np.ones(5, np.float32)}, ValueError, r"scale must have shape \(6,\)"),
    ({"scale": np.ones(6, int)}, TypeError, "scale must have a floating dtype"),
    ({"bias": np.ones(6, np.float32)}, TypeError, "bias must have dtype int32"),
    ({"bias": np.ones((1, 6), np.int32)}, ValueError, r"bias must have shape \(6,\)"),
    ({"x_zero_point": 128}, ValueError, "x_zero_point .*-128 to 127"),
    ({"out_zero_point": -129, "scale": 1.0}, ValueError, "out_zero_point"),
    ({"x_zero_point": 0.5}, TypeError, "x_zero_point must be made of integers"),
    ({"clamp": (5, 4), "scale": 1.0}, ValueError, "clamp .*low <= high"),
    ({"clamp": (0, 1, 2), "scale": 1.0}, ValueError, "clamp must be"),
    ({"clamp": (0, 300), "scale": 1.0}, ValueError, "clamp .*-128 to 127"),
    ({"clamp": (0, 127)}, ValueError, "clamp are for an int8 result"),
    ({"out_zero_point": 1}, ValueError, "out_zero_point and clamp"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_errors(changed, error, message):
    with pytest.raises(error, match=message):
        quantized.depthwise_conv2d(**{"x": X, "kernel": KERNEL, **changed})


def test_pointwise_errors():
    with pytest.raises(ValueError, match=r"kernel must have shape \(6, F\)"):
        quantized.pointwise_conv(X, KERNEL)
    wide = jax.ShapeDtypeStruct((1, MOST_TAPS + 1), jnp.int8), jax.ShapeDtypeStruct((MOST_TAPS + 1, 2), jnp.int8)
    with pytest.raises(ValueError, match=r"more than 32768 channels.*overflow"):
        jax.eval_shape(quantized.pointwise_conv, *wide)


def test_a_call_of_the_handler_is_checked():
    call = functools.partial(
        jax.ffi.ffi_call(_native.TARGETS["quantized_forward"], jax.ShapeDtypeStruct(X.shape, np.int8)),
        strides=np.ones(2, np.int64),
        padding=np.ones(4, np.int64),
        dilation=np.ones(2, np.int64),
        layout="NHWC",
        filter_layout="HWO",
        since="0.1.0",
    )
    x, kernel = jnp.asarray(X), jnp.asarray(KERNEL).reshape(1, 3, 3, 6)
    scale, none = jnp.ones(6), jnp.zeros(0, jnp.int32)
    limits = np.asarray((0, 0, -128, 127))
    assert call(x, kernel, scale, none, quantization=limits)[0, 2, 2, 0] == 9
    for operands, numbers, message in (
        ((x, kernel, scale[:5], none), limits, "scale .* must have shape"),
        ((x, kernel, scale[:0], none), limits, "scale .* must have shape"),
        ((x, kernel, scale, jnp.ones(5, jnp.int32)), limits, "scale .* must have shape"),
        ((x, kernel, scale, none), limits * 2, "from -128 to 127"),
        ((x.astype(jnp.float32), kernel, scale, none), limits, "must be int8"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(call(*operands, quantization=numbers))
