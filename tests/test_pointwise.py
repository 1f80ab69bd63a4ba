import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.test_util import check_grads

import jax_dwsconv
from jax_dwsconv import _epilogue, _native, _planning, pointwise

# Pixels, channels and features beside what the kernel divides by: 16 pixels, 32 and 256 channels, 32 and 64 features.
SHAPES = [
    (1, 7, 7, 160, 40),
    (2, 7, 7, 1152, 192),
    (3, 5, 3, 264, 20),
    (1, 1, 1, 1024, 1000),
    (1, 1, 17, 8, 4),
    (1, 3, 5, 72, 100),
    (2, 9, 9, 248, 68),
    (1, 14, 14, 520, 512),
]
PARTS = [(), ("bias",), ("scale", "bias", "residual"), ("gate",), ("scale", "bias", "residual", "gate")]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}


def operands(shape, dtype, parts=(), seed=0):
    *pixels, channels, features = shape
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(*pixels, channels)), dtype)
    kernel = jnp.asarray(rng.normal(size=(channels, features)) / channels**0.5, dtype)
    others = {
        "scale": jnp.asarray(rng.normal(size=features), jnp.float32),
        "bias": jnp.asarray(rng.normal(size=features), jnp.float32),
        "residual": jnp.asarray(rng.normal(size=(*pixels, features)), dtype),
        "gate": jnp.asarray(rng.normal(size=(*pixels[:-2], channels)), dtype),
    }
    return x, kernel, {name: others[name] for name in parts}


def reference(x, kernel, others, activation):
    value = {name: np.asarray(a, np.float64) for name, a in others.items()}
    y = np.asarray(x, np.float64)
    if "gate" in value:
        y = np.asarray(jnp.asarray(y * value["gate"][..., None, None, :], x.dtype), np.float64)
    y = y @ np.asarray(kernel, np.float64) * value.get("scale", 1) + value.get("bias", 0) + value.get("residual", 0)
    with jax.enable_x64(True):
        return np.asarray(_epilogue.function(activation)(jnp.asarray(y)))


def is_ours(function, *args):
    return _native.TARGETS["pointwise"] in jax.jit(function).lower(*args).as_text()


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype, parts):
    activation = {"bfloat16": "relu6", "float16": "silu"}.get(dtype)
    x, kernel, others = operands(shape, dtype, parts)

    def function(x, kernel, others):
        return jax_dwsconv.pointwise_conv2d(x, kernel, activation=activation, precision="highest", **others)

    y = jax.jit(function)(x, kernel, others)
    assert y.dtype == dtype
    expected = reference(x, kernel, others, activation)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=TOLERANCE[dtype] * np.abs(expected).max())
    if jax.default_backend() == "gpu":
        assert is_ours(function, x, kernel, others) == (dtype != "float32")


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_batch_dimensions_and_layouts(batch, data_format):
    x, kernel, others = operands((*batch, 4, 5, 16, 8), "float32", PARTS[-1])
    expected = reference(x, kernel, others, "relu")
    if data_format == "NCHW":
        x, others["residual"] = (jnp.moveaxis(a, -1, -3) for a in (x, others["residual"]))
    y = jax_dwsconv.pointwise_conv2d(
        x, kernel[None, None], activation="relu", data_format=data_format, precision="highest", **others
    )
    y = jnp.moveaxis(y, -3, -1) if data_format == "NCHW" else y
    np.testing.assert_allclose(np.asarray(y), expected, atol=1e-5 * np.abs(expected).max())


def test_derivatives():
    x, kernel, others = operands((2, 3, 3, 8, 4), "float32", PARTS[-1])

    def function(x, kernel, others):
        return jax_dwsconv.pointwise_conv2d(x, kernel, activation="silu", precision="highest", **others)

    check_grads(function, (x, kernel, others), order=2, modes=["fwd", "rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_value_is_the_same_with_a_derivative(shape):
    x, kernel, others = operands(shape, "bfloat16", PARTS[-1])

    def function(x):
        return jax_dwsconv.pointwise_conv2d(x, kernel, activation="silu", **others)

    y, pullback = jax.jit(lambda x: jax.vjp(function, x))(x)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(jax.jit(function)(x)))
    dy = jnp.ones_like(y)
    expected = jax.vjp(lambda x: _composition(x, kernel, others, "silu"), x)[1](dy)[0]
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (pullback(dy)[0], expected)), atol=5e-2)


def _composition(x, kernel, others, activation):
    parts = tuple(name for name in pointwise.PARTS if name in others)
    given = [others[name] for name in parts]
    return pointwise._in_lax(
        x, kernel, *given, parts=parts, activation=activation, precision=None, out_dtype=np.dtype(x.dtype)
    )


@pytest.mark.parametrize("mapped", ["x", "x+residual", "x+gate", "kernel", "bias", "x+kernel+scale+bias+residual+gate"])
def test_vmap(mapped):
    names = ("x", "kernel", *PARTS[-1])
    mapped = mapped.split("+")
    several = [operands((2, 3, 3, 16, 8), "float32", PARTS[-1], seed) for seed in range(3)]
    several = [dict(zip(("x", "kernel"), each[:2], strict=True)) | each[2] for each in several]
    stacked = {name: jnp.stack([each[name] for each in several], 1 if name == "x" else 0) for name in names}
    given = {name: stacked[name] if name in mapped else several[0][name] for name in names}

    def function(given):
        others = {name: given[name] for name in PARTS[-1]}
        return jax_dwsconv.pointwise_conv2d(given["x"], given["kernel"], precision="highest", **others)

    axes = {name: (1 if name == "x" else 0) if name in mapped else None for name in names}
    y = jax.vmap(function, (axes,))(given)
    for i, each in enumerate(several):
        single = function({name: each[name] if name in mapped else several[0][name] for name in names})
        np.testing.assert_allclose(np.asarray(y[i]), np.asarray(single), atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
def test_vmap_over_nothing(axis):
    x = jnp.zeros((0, 2, 3, 5, 16) if axis == 0 else (2, 0, 3, 5, 16))
    y = jax.vmap(lambda x: jax_dwsconv.pointwise_conv2d(x, jnp.zeros((16, 8))), axis)(x)
    assert y.shape == (0, 2, 3, 5, 8)


def test_symbolic_features_are_exported_for_a_gpu():
    kernel = jax.ShapeDtypeStruct(jax.export.symbolic_shape("160, f"), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((1, 7, 7, 160), jnp.bfloat16)
    exported = jax.export.export(jax.jit(jax_dwsconv.pointwise_conv2d), platforms=["cuda"])(x, kernel)
    assert exported.out_avals[0].shape[:3] == (1, 7, 7)


@pytest.mark.parametrize("precision", [["default", "default"], [jax.lax.Precision.HIGHEST] * 2])
def test_precision_may_be_a_list(precision):
    x, kernel, _ = operands((1, 3, 5, 16, 8), "float32")
    y = jax.jit(functools.partial(jax_dwsconv.pointwise_conv2d, precision=precision))(x, kernel)
    np.testing.assert_allclose(np.asarray(y), np.asarray(x) @ np.asarray(kernel), atol=2e-2)


def test_nvidias_override_of_tf32(monkeypatch):
    assert pointwise._allows_tf32(None)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert not pointwise._allows_tf32(None)


def test_a_symbolic_batch_is_exported():
    _, kernel, _ = operands(SHAPES[0], "bfloat16")
    function = jax.jit(functools.partial(jax_dwsconv.pointwise_conv2d, kernel=kernel, activation="relu"))
    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 7, 7, 160"), jnp.bfloat16)
    exported = jax.export.export(function)(shape)
    x = operands((3, *SHAPES[0][1:]), "bfloat16")[0]
    expected = np.asarray(function(x), np.float32)
    np.testing.assert_allclose(np.asarray(exported.call(x), np.float32), expected, atol=1e-2 * expected.max())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kernel": jnp.ones((4, 4))}, r"kernel must have shape \(1, 1, 8, F\) or \(8, F\)"),
        ({"bias": jnp.ones(5)}, "bias"),
        ({"gate": jnp.ones((8,))}, r"gate must have shape \(2, 8\)"),
        ({"residual": jnp.ones((2, 3, 3, 8))}, "residual"),
        ({"x": jnp.ones((3, 8))}, "x must have rank 3 or more"),
        ({"activation": "swich"}, "activation='swich' is unknown"),
        ({"data_format": "NHCW"}, "data_format"),
    ],
)
def test_errors(change, message):
    arguments = {"x": jnp.ones((2, 3, 3, 8)), "kernel": jnp.ones((8, 4))} | change
    with pytest.raises(ValueError, match=message):
        jax_dwsconv.pointwise_conv2d(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [("bias",), ("gate",), ("scale", "bias", "residual", "gate")], ids="+".join)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 23, 31, 24, 144), (700, 1, 1, 40, 8), (5, 40, 40, 16, 96)], ids=str)
def test_every_kind_of_tile(shape, dtype, parts, monkeypatch):
    """The planner takes the best; here the others show that they are right, too. float32 is multiplied as TF32."""
    x, kernel, others = operands(shape, dtype, parts)
    expected = reference(x, kernel, others, "relu")
    monkeypatch.setattr(pointwise, "pays", lambda *_: True)
    tolerance = max(TOLERANCE[dtype], 2e-3) * np.abs(expected).max()
    *image, features = shape
    device = _planning.visible_device() or _planning.DEVICES["h100"]
    plans = _planning.plan_pointwise(tuple(image), features, dtype, "gate" in parts, device)
    for plan in plans[1]:
        monkeypatch.setenv("JAX_DWSCONV_TILE", plan.text)

        def function(x, kernel, others):
            return jax_dwsconv.pointwise_conv2d(x, kernel, activation="relu", precision="default", **others)

        y = jax.jit(function)(x, kernel, others)
        assert _native.load("cuda").last_forced_plan() == plan.text
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=tolerance, err_msg=plan.text)


@pytest.mark.parametrize("precision", ["highest", "tensorfloat32", "default"])
def test_float32_is_rounded_only_where_that_is_allowed(precision):
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU")
    x, kernel, _ = operands((2, 14, 14, 64, 96), "float32")
    function = functools.partial(jax_dwsconv.pointwise_conv2d, activation="relu", precision=precision)
    assert is_ours(function, x, kernel) == (precision != "highest")


def test_the_choice_is_the_candidate_of_the_least_estimate():
    for shape, features in (((1, 7, 7, 960), 160), ((32, 112, 112, 16), 96), ((8, 28, 28, 40), 240)):
        for dtype in TOLERANCE:
            chosen, candidates = _planning.plan_pointwise(shape, features, dtype)
            assert chosen == min(candidates, key=lambda plan: plan.cycles)
            assert all(plan.cycles > 0 for plan in candidates)


@pytest.mark.parametrize(("channels", "features", "dtype"), [(12, 8, "bfloat16"), (6, 8, "float32"), (8, 6, "float16")])
def test_what_no_kernel_takes(channels, features, dtype):
    assert _planning.plan_pointwise((1, 8, 8, channels), features, dtype) is None


def test_few_pixels_and_many_channels_divide_the_channels():
    assert _planning.plan_pointwise((1, 7, 7, 960), 160, "bfloat16")[0].text.startswith("pointwise_split:")
    assert _planning.plan_pointwise((32, 112, 112, 16), 96, "float32")[0].text.startswith("pointwise_tiles:")


def test_pays_where_the_rest_costs_passes():
    assert pointwise.pays((32, 112, 112, 16), 96, "bfloat16", ("bias",), "relu6")
    assert not pointwise.pays((32, 14, 14, 1024), 1024, "bfloat16", (), None)  # XLA's product is all that there is


@pytest.mark.gpu
def test_recorded_in_a_graph():
    """Eight products, each taking the result of the one before."""
    x, kernel, others = operands((1, 7, 7, 512, 512), "bfloat16", ("bias",))

    def function(x):
        for _ in range(8):
            x = jax_dwsconv.pointwise_conv2d(x, kernel, activation="relu", **others)
        return x

    module = _native.load("cuda")
    before = module.captured_calls()
    function = jax.jit(function)
    first = np.asarray(function(x), np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(np.asarray(function(x), np.float32), first)
    assert module.captured_calls() > before
