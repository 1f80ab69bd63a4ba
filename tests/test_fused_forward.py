"""The convolution with scale, bias, residual and activation in its kernel, and its rules."""

import dataclasses
import functools
import itertools

import cases
import jax
import meshes
import numerics
import numpy as np
import pytest
from cases import LAYOUTS, Case
from jax import numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from jax.test_util import check_grads

import jax_dwsconv
from jax_dwsconv import _native, primitives, reference
from jax_dwsconv.partitioning import Division

PARTS = ("scale", "bias", "residual")
SUBSETS = [subset for n in range(4) for subset in itertools.combinations(PARTS, n)]
ACTIVATIONS = (None, "relu", "relu6", "silu", "gelu", "hard_swish")
SMOOTH = ("silu", "gelu")
# Every subset with every activation, in an order in which neighbours differ in both.
COMBINATIONS = [(SUBSETS[-1 - i % 8], ACTIVATIONS[(i + i // 24) % 6]) for i in range(48)]


def _activate(name, z):
    """In NumPy and float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return {
            None: lambda: z,
            "relu": lambda: np.maximum(z, 0),
            "relu6": lambda: np.clip(z, 0, 6),
            "silu": lambda: z / (1 + np.exp(-z)),
            "gelu": lambda: z / (1 + np.exp(-_twice_gelu_argument(z))),
            "hard_swish": lambda: z * (np.clip(z + 3, 0, 6) / 6),
        }[name]()


def _twice_gelu_argument(z):
    return 2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)


def _others(case: Case, parts=PARTS) -> dict[str, np.ndarray]:
    """Operands besides x and kernel."""
    out_dtype = case.dtypes[2]
    wide = np.promote_types(out_dtype, "float32") if out_dtype != "bfloat16" else "float32"
    operands = {
        "scale": numerics.normal(case.out_channels, dtype=wide, seed=11),
        "bias": numerics.normal(case.out_channels, dtype=wide, seed=12),
        "residual": numerics.normal(*case.shapes()["output"], dtype=out_dtype, seed=13),
    }
    return {part: operands[part] for part in parts}


def _run(case: Case, x, kernel, others: dict, activation):
    following = (others.get(part) for part in PARTS)
    return primitives.fused_forward(
        *map(jnp.asarray, (x, kernel)),
        *(a if a is None else jnp.asarray(a) for a in following),
        activation=activation,
        **case.parameters("forward"),
    )


def _composed(case: Case, x, kernel, others: dict, activation):
    """The same with the plain convolution, rounded once."""
    window, out_dtype = case.window, case.parameters("forward")["out_dtype"]
    return reference.fused_forward(
        x,
        kernel,
        *others.values(),
        parts=tuple(others),
        window=window,
        activation=activation,
        out_dtype=out_dtype,
        convolve=primitives.forward,
    )


def _check(case: Case, parts=PARTS, activation=None):
    x, kernel = case.operands("forward")
    others = _others(case, parts)
    check_result(case, x, kernel, others, activation, _run(case, x, kernel, others, activation))


def check_result(case: Case, x, kernel, others, activation, y):
    """Compares with float64. What follows the sums adds roundings of their magnitude, a smooth activation some more."""
    assert y.dtype == case.parameters("forward")["out_dtype"]
    shape = case.window.activation_shape(1, (1, 1), -1)
    scale, bias = (others.get(part, default) for part, default in (("scale", 1), ("bias", 0)))
    scale, bias = (np.reshape(v, shape if np.ndim(v) else ()).astype(np.float64) for v in (scale, bias))
    residual = np.asarray(others.get("residual", 0), np.float64)
    z = numerics.reference(case, "forward", x, kernel) * scale + bias + residual
    magnitude = numerics.reference(case, "forward", np.abs(x), np.abs(kernel)) * np.abs(scale)
    magnitude += np.abs(bias) + np.abs(residual)
    if activation in (*SMOOTH, "hard_swish"):
        magnitude = 1.5 * magnitude + 1
    length = max(9, case.reduction_length("forward"))
    numerics.assert_close(y, _activate(activation, z), length=length, magnitude=magnitude)


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", SUBSETS, ids="+".join)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "case",
    [Case(channels=37, size=(6, 11)), Case(channels=9, size=(5, 35), layout="NCHW", filter_layout="OHW")],
    ids=str,
)
def test_every_combination(case, activation, parts):
    _check(case, parts, activation)


def _each_with_a_combination(some_cases):
    pairs = zip(some_cases, itertools.cycle(COMBINATIONS), strict=False)
    return [pytest.param(c, *rest, id=f"{c}-{'+'.join(rest[0])}-{rest[1]}") for c, rest in pairs]


@pytest.mark.parametrize(("case", "parts", "activation"), _each_with_a_combination(cases.grid()[::3]))
def test_grid(case, parts, activation):
    _check(case, parts, activation)


@pytest.mark.parametrize(("case", "parts", "activation"), _each_with_a_combination(cases.usual(96, seed=5)))
def test_usual(case, parts, activation):
    _check(case, parts, activation)


@pytest.mark.parametrize(
    ("case", "activation"),
    list(
        zip(
            cases.of_dtypes(cases.DTYPES_WITH_KERNEL, cases.DTYPES_BY_CONVERSION),
            itertools.cycle(("gelu", "relu6", None, "hard_swish", "silu")),
            strict=False,
        )
    ),
    ids=str,
)
def test_dtypes(case, activation):
    _check(case, PARTS, activation)


@pytest.mark.parametrize(("case", "parts", "activation"), _each_with_a_combination(cases.of_dtypes(cases.DTYPES_WIDE)))
def test_float64(case, parts, activation):
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        _check(case, parts, activation)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_over_the_whole_range(activation, layout):
    """A few units in the last place, and what grows with the argument of an exponential function."""
    magnitudes = np.concatenate(
        [np.linspace(0, 20, 20_001), np.geomspace(1e-37, 3e38, 5_000), [88.0, 88.3, 88.8, 1e30]]
    )
    z = np.concatenate([magnitudes, -magnitudes, [np.inf, -np.inf, np.nan, 0.0, -0.0]]).astype(np.float32)
    z = np.pad(z, (0, -z.size % 64))
    x = z.reshape((1, -1, 1, 64) if layout == "NHWC" else (1, 1, -1, 64))
    case = Case(1, x.shape[1:3], 64, 1, (1, 1), padding=((0, 0), (0, 0)))
    if layout == "NCHW":
        case = dataclasses.replace(case, size=x.shape[2:], channels=1, layout="NCHW")
    kernel = np.ones(case.shapes()["filter"], np.float32)
    y = np.asarray(_run(case, x, kernel, {"bias": np.zeros(case.channels, np.float32)}, activation), np.float64).ravel()

    z = z.astype(np.float64)
    expected = _activate(activation, z)
    finite = np.isfinite(z)
    np.testing.assert_array_equal(y[~finite], expected[~finite])
    t = z if activation == "silu" else _twice_gelu_argument(np.where(finite, z, 0))
    with np.errstate(over="ignore", invalid="ignore"):
        slope = np.abs(t) / (1 + np.exp(t)) if activation in SMOOTH else 0  # of log(y) by the relative error of t
        bound = 2.0**-23 * np.abs(expected) * (4 + 4 * slope) + 1e-36
        wrong = finite & ~(np.abs(y - expected) <= bound)
    assert not wrong.any(), (z[wrong][:5], y[wrong][:5], expected[wrong][:5])


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_2d(activation, data_format):
    """Stride 2 and multiplier 2, several batch dimensions, scalar scale."""
    x, kernel = numerics.normal(2, 3, 8, 9, 5), numerics.normal(3, 3, 1, 10, seed=1)
    residual, bias = numerics.normal(2, 3, 4, 5, 10, seed=2), numerics.normal(10, seed=3)
    to_format = (lambda a: np.moveaxis(a, -1, -3)) if data_format == "NCHW" else (lambda a: a)
    convolve = functools.partial(jax_dwsconv.depthwise_conv2d, kernel=kernel, strides=2, data_format=data_format)
    y = convolve(to_format(x), scale=np.float32(0.5), bias=bias, residual=to_format(residual), activation=activation)
    sums = np.asarray(jax_dwsconv.depthwise_conv2d(x, kernel, strides=2), np.float64)
    expected = _activate(activation, sums * 0.5 + bias + residual)
    numerics.assert_close(y, to_format(expected), length=50)


@pytest.mark.parametrize("data_format", ["NWC", "NCW"])
def test_1d(data_format):
    x, kernel, residual = numerics.normal(3, 17, 5), numerics.normal(4, 1, 10, seed=1), numerics.normal(3, 17, 10)
    to_format = (lambda a: a.swapaxes(1, 2)) if data_format == "NCW" else (lambda a: a)
    convolve = functools.partial(jax_dwsconv.depthwise_conv1d, padding="CAUSAL", data_format=data_format)
    y = convolve(to_format(x), kernel, residual=to_format(residual), activation="silu")
    sums = np.asarray(convolve(to_format(x), kernel), np.float64)
    numerics.assert_close(y, _activate("silu", sums + to_format(residual)), length=50)


def test_an_activation_without_a_name_sees_the_rounded_sum():
    x, kernel = numerics.normal(2, 5, 7, 3, dtype="bfloat16"), numerics.normal(3, 3, 1, 3, dtype="bfloat16", seed=1)
    convolve = functools.partial(jax_dwsconv.depthwise_conv2d, x, kernel, residual=x)
    np.testing.assert_array_equal(convolve(activation=jnp.tanh), jnp.tanh(convolve()))


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_lowering(platform):
    x, kernel = numerics.normal(2, 5, 7, 3), numerics.normal(3, 3, 1, 3)
    for arguments in ({"bias": numerics.normal(3)}, {"activation": jax.nn.silu}, {"residual": x}):
        traced = jax.jit(functools.partial(jax_dwsconv.depthwise_conv2d, **arguments)).trace(x, kernel)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert (_native.TARGETS["fused_forward"] in text) == (platform != "tpu")
        assert (_native.TARGETS["forward"] in text) is False
        assert ("stablehlo.convolution" in text) == (platform == "tpu")


def test_float64_on_cuda_goes_to_lax(monkeypatch):
    with jax.enable_x64(True):
        x, kernel = numerics.normal(2, 5, 7, 3, dtype="float64"), numerics.normal(3, 3, 1, 3, dtype="float64")

        def lower():
            traced = jax.jit(functools.partial(jax_dwsconv.depthwise_conv2d, activation="relu")).trace(x, kernel)
            return traced.lower(lowering_platforms=("cuda",))

        assert "stablehlo.convolution" in lower().as_text()
        jax.clear_caches()
        monkeypatch.setenv("JAX_DWSCONV_FALLBACK", "error")
        with pytest.raises(jax_dwsconv.UnsupportedError, match="float64 has no CUDA kernel"):
            lower()


def test_disabled(monkeypatch):
    x, kernel, others = *Case().operands("forward"), _others(Case())
    fused = functools.partial(_run, Case(), activation="gelu")
    y = fused(x, kernel, others)
    monkeypatch.setenv("JAX_DWSCONV_DISABLE", "1")
    assert numerics.primitives_in(functools.partial(fused), x, kernel, others)["dwsconv_fused_forward"] == 0
    numerics.assert_close(fused(x, kernel, others), y, length=50)


# Derivatives ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, size=(4, 5), channels=3),
        Case(batch=2, size=(4, 5), channels=2, multiplier=2, strides=(2, 1), groups=2, layout="NCHW"),
    ],
    ids=str,
)
def test_second_order(case, activation):
    case = dataclasses.replace(case, dtypes=("float64",) * 3)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        args = *map(jnp.asarray, case.operands("forward")), jax.tree.map(jnp.asarray, _others(case))
        check_grads(functools.partial(_run, case, activation=activation), args, 2, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtypes", [("float32",) * 3, ("bfloat16",) * 3, ("bfloat16", "float32", "bfloat16")], ids=str)
@pytest.mark.parametrize(("parts", "activation"), COMBINATIONS[:12], ids=str)
def test_gradients_are_those_of_the_composition(parts, activation, dtypes):
    case = Case(channels=5, multiplier=2, strides=(1, 2), dtypes=dtypes)
    args = *map(jnp.asarray, case.operands("forward")), jax.tree.map(jnp.asarray, _others(case, parts))
    y = _run(case, *args, activation)
    g = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype)
    fused, composed = (
        jax.vjp(functools.partial(f, case, activation=activation), *args)[1](g) for f in (_run, _composed)
    )
    for got, expected, operand in zip(*map(jax.tree.leaves, (fused, composed, args)), strict=True):
        assert got.dtype == operand.dtype
        numerics.assert_close(got, expected, length=1000, dtype=min(dtypes, key=lambda d: -jnp.finfo(d).eps))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_grad_has_the_value_of_the_plain_call(activation, layout, dtype):
    case = Case(channels=16, layout=layout, dtypes=(dtype,) * 3)
    args = *map(jnp.asarray, case.operands("forward")), jax.tree.map(jnp.asarray, _others(case))

    def loss(*args):
        y = _run(case, *args, activation)
        return y.astype(jnp.float32).sum(), y

    plain = jax.jit(loss)(*args)[1]
    for argnums in (0, (0, 1, 2)):
        (_, y), _ = jax.jit(jax.value_and_grad(loss, argnums, has_aux=True))(*args)
        np.testing.assert_array_equal(y, plain)
    np.testing.assert_array_equal(jax.linearize(loss, *args)[0][1], plain)


# What is computed for the gradients by some of the operands: (forward, grad_input, grad_filter).
CONVOLUTIONS = {
    (None, "bias"): (0, 0, 0),
    ("relu", "residual"): (0, 0, 0),
    (None, "x"): (0, 1, 0),
    ("relu", "x"): (0, 1, 0),
    (None, "kernel"): (0, 0, 1),
    (None, "scale"): (1, 0, 0),
    ("relu6", "bias"): (1, 0, 0),
    ("silu", "x"): (1, 1, 0),
}


@pytest.mark.parametrize(("activation", "by"), CONVOLUTIONS)
def test_only_what_is_needed_is_computed(activation, by):
    x, kernel = map(jnp.asarray, Case().operands("forward"))
    others = jax.tree.map(jnp.asarray, _others(Case()))
    operands = {"x": x, "kernel": kernel, **others}

    def loss(operand):
        changed = {**operands, by: operand}
        return _run(Case(), changed["x"], changed["kernel"], changed, activation).sum()

    counts = numerics.primitives_in(jax.grad(loss), operands[by])
    found = tuple(counts[f"dwsconv_{op}"] for op in cases.OPERATORS)
    assert counts["dwsconv_fused_forward"] == 1
    assert found == CONVOLUTIONS[activation, by]


# Batching -------------------------------------------------------------------------------------------------------------

OPERANDS = ("x", "kernel", *PARTS)
MAPPED = [
    ("x",),
    ("kernel",),
    ("x", "residual"),
    ("x", "kernel", "residual"),
    ("kernel", "residual"),
    ("residual",),
    ("bias",),
    ("x", "scale"),
    OPERANDS,
]


@pytest.mark.parametrize("mapped", MAPPED, ids="+".join)
@pytest.mark.parametrize(
    "case",
    [Case(channels=5, strides=(1, 2)), Case(batch=4, channels=3, multiplier=2, groups=2, layout="NCHW")],
    ids=str,
)
def test_vmap(case, mapped):
    def f(*operands):
        return _run(case, *operands[:2], dict(zip(PARTS, operands[2:], strict=True)), "silu")

    operands = dict(zip(OPERANDS, (*case.operands("forward"), *_others(case).values()), strict=True))
    axes = tuple((i % operands[name].ndim if name in mapped else None) for i, name in enumerate(OPERANDS))
    stacked = [
        a if axis is None else np.stack([a * np.float32(1 + i / 4) for i in range(3)], axis)
        for a, axis in zip(operands.values(), axes, strict=True)
    ]
    result = jax.vmap(f, axes)(*stacked)
    for i in range(3):
        one = [a if axis is None else np.take(a, i, axis) for a, axis in zip(stacked, axes, strict=True)]
        numerics.assert_close(result[i], f(*one), length=50)
    if not {"scale", "bias"} & set(mapped) and {"x", "kernel"} & set(mapped):
        assert numerics.primitives_in(jax.vmap(f, axes), *stacked)["dwsconv_fused_forward"] == 1

    nothing = [a if axis is None else np.take(a, [], axis) for a, axis in zip(stacked, axes, strict=True)]
    assert jax.vmap(f, axes)(*nothing).shape == (0, *result.shape[1:])


# Sharding -------------------------------------------------------------------------------------------------------------

SHARDED = Case(batch=8, channels=8, multiplier=2)
BATCH, CHANNELS, BOTH = (("a",), ()), ((), ("b",)), (("a",), ("b",))


def _public(case, x, kernel, scale, bias, residual):
    return jax_dwsconv.depthwise_conv2d(
        x,
        jnp.squeeze(kernel, 0)[..., None, :],
        padding=case.padding,
        scale=scale,
        bias=bias,
        residual=residual,
        activation="silu",
        data_format=case.layout,
    )


def _sharded_operands(case, batch, channels):
    """The operands and how they are divided, and how the result is."""
    division = Division(batch, channels, grouped=False)
    operands = (*case.operands("forward"), *_others(case).values())
    return operands, [division.spec(role, case.window) for role in OPERANDS], division.spec("y", case.window)


def _gradients(case, operands, g):
    return jax.vjp(functools.partial(_public, case), *operands)[1](g)


@pytest.mark.parametrize("divided", [BATCH, CHANNELS, BOTH], ids=["batch", "channels", "both"])
@pytest.mark.parametrize("carriers", [OPERANDS, ("x",), ("x", "residual"), ("residual",)], ids="+".join)
@pytest.mark.parametrize("case", [SHARDED, dataclasses.replace(SHARDED, multiplier=1, layout="NCHW")], ids=str)
def test_auto_mode(case, carriers, divided):
    mesh = meshes.make(4, 2)
    operands, specs, result_spec = _sharded_operands(case, *divided)
    specs = [spec if name in carriers else P() for name, spec in zip(OPERANDS, specs, strict=True)]
    placed = meshes.place(mesh, *zip(operands, specs, strict=True))
    f = functools.partial(_public, case)
    y, collectives = meshes.run(f, *placed)
    assert collectives == {}
    assert meshes.is_divided(y, result_spec, mesh)
    numerics.assert_close(y, f(*operands), length=50)

    (g,) = meshes.place(mesh, (np.asarray(y), result_spec))
    gradients, collectives = meshes.run(functools.partial(_gradients, case), placed, g)
    assert collectives == ({"all-reduce": 1} if divided[0] else {})  # of kernel, scale and bias together
    for a, b in zip(gradients, _gradients(case, operands, np.asarray(y)), strict=True):
        numerics.assert_close(a, b, length=1000)


@pytest.mark.parametrize("divided", [BATCH, CHANNELS, BOTH], ids=["batch", "channels", "both"])
@pytest.mark.parametrize("case", [SHARDED, dataclasses.replace(SHARDED, layout="NCHW")], ids=str)
def test_explicit_mode(case, divided):
    operands, specs, result_spec = _sharded_operands(case, *divided)
    expected = _public(case, *operands)
    expected_gradients = _gradients(case, operands, expected)
    mesh = meshes.make(4, 2, axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = meshes.place(mesh, *zip(operands, specs, strict=True))
        y, collectives = meshes.run(functools.partial(_public, case), *placed)
        assert collectives == {}
        assert meshes.is_divided(y, result_spec, mesh)
        gradients = jax.jit(functools.partial(_gradients, case))(placed, y)
    numerics.assert_close(y, expected, length=50)
    for gradient, expected_gradient, operand in zip(gradients, expected_gradients, placed, strict=True):
        assert jax.typeof(gradient).sharding == jax.typeof(operand).sharding
        numerics.assert_close(gradient, expected_gradient, length=1000)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P("b"), r"the batch of x and residual are sharded over different mesh axes.*'a'.*'b'"),
        (P(None, "a"), r"the height of residual over .*'a'.* one dimension only.*reshard"),
    ],
)
def test_explicit_mode_refuses(spec, message):
    mesh = meshes.make(4, 2, axis_type=AxisType.Explicit)
    x, kernel = numerics.normal(8, 8, 4, 8), numerics.normal(3, 3, 1, 8)
    with jax.set_mesh(mesh):
        x, residual, kernel = meshes.place(mesh, (x, P("a")), (x, spec), (kernel, P()))
        with pytest.raises(ValueError, match=message):
            jax_dwsconv.depthwise_conv2d(x, kernel, residual=residual)


@pytest.mark.parametrize("manual", [{"a", "b"}, {"a"}], ids=["all_axes", "one_axis"])
@pytest.mark.parametrize("outer", [BATCH, BOTH], ids=["batch", "both"])
def test_shard_map(outer, manual):
    """Over the axes `manual`; where "b" is not among them, XLA divides the channels by it."""
    mesh = meshes.make(4, 2)
    operands, specs, result_spec = _sharded_operands(SHARDED, *outer)
    _, inside, inside_result = _sharded_operands(SHARDED, *(outer if "b" in manual else BATCH))
    f = functools.partial(_public, SHARDED)
    mapped = jax.shard_map(f, mesh=mesh, in_specs=tuple(inside), out_specs=inside_result, axis_names=manual)
    placed = meshes.place(mesh, *zip(operands, specs, strict=True))
    y, collectives = meshes.run(mapped, *placed)
    numerics.assert_close(y, f(*operands), length=50)
    if "b" in manual:
        assert collectives == {}

    (g,) = meshes.place(mesh, (np.asarray(y), result_spec))
    gradients = jax.jit(lambda operands, g: jax.vjp(mapped, *operands)[1](g))(placed, g)
    for a, b in zip(gradients, _gradients(SHARDED, operands, np.asarray(y)), strict=True):
        numerics.assert_close(a, b, length=1000)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "bad"),
    [
        ("scale", np.ones(4, np.float32)),
        ("bias", np.ones(5, np.float16)),
        ("residual", np.ones((2, 7, 8, 5), np.float32)),
        ("residual", np.ones((2, 7, 9, 5), np.float16)),
    ],
)
def test_bad_operands(part, bad):
    others = {**_others(Case()), part: bad}
    with pytest.raises(ValueError, match=rf"fused_forward: {part} must have shape \(.*5,?\) and dtype float32, got"):
        _run(Case(), *Case().operands("forward"), others, None)


# The handler ----------------------------------------------------------------------------------------------------------

ATTRIBUTES = {
    "strides": np.array([1, 1]),
    "padding": np.array([1, 1, 1, 1]),
    "dilation": np.array([1, 1]),
    "layout": "NHWC",
    "filter_layout": "HWO",
    "activation": "relu",
    "since": "0.1.0",
}
# What is changed among the operands or the attributes, and what the message must contain.
BAD = {
    "scale": ({"scale": np.ones(4, np.float32)}, r"scale and bias must be float32.*\(5,\); got \(4\)"),
    "bias dtype": ({"bias": np.ones(5, np.float16)}, "scale and bias must be float32"),
    "residual": ({"residual": np.ones((2, 7, 9, 4), np.float32)}, r"residual must have .*shape \(2, 7, 9, 5\)"),
    "residual dtype": ({"residual": np.ones((2, 7, 9, 5), np.float16)}, "residual must have the output's dtype"),
    "activation": ({"activation": "mish", "since": "9.9.0"}, "activation must be one of .*needs jax-dwsconv 9.9.0"),
    "further attribute": ({"alpha": 1.0}, "needs jax-dwsconv 0.1.0"),
}


@pytest.mark.parametrize("name", BAD)
def test_handler_checks_what_it_is_given(name):
    changed, message = BAD[name]
    nothing = np.zeros(0, np.float32)
    operands = {"scale": np.ones(5, np.float32), "bias": nothing, "residual": np.ones((2, 7, 9, 5), np.float32)}

    def call(changed):
        following = [jnp.asarray(changed.get(part, operands[part])) for part in PARTS]
        attributes = {**ATTRIBUTES, **{name: value for name, value in changed.items() if name not in PARTS}}
        x = jnp.ones((2, 7, 9, 5))
        function = jax.ffi.ffi_call(_native.TARGETS["fused_forward"], jax.ShapeDtypeStruct(x.shape, x.dtype))
        return jax.block_until_ready(function(x, jnp.ones((1, 3, 3, 5)), *following, **attributes))

    with jax.default_device(jax.devices("cpu")[0]):
        assert call({}).max() == 10
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"jax_dwsconv.fused_forward: .*{message}"):
            call(changed)
