"""What only a GPU can show. The rest of the suite runs there unchanged."""

import functools

import jax
import numerics
import numpy as np
import pytest
from cases import Case
from jax import numpy as jnp

import jax_dwsconv
from jax_dwsconv import _epilogue, _native, _planning, primitives

pytestmark = pytest.mark.gpu

CHAIN = 12  # XLA does not make a graph of a single small operation


def _chain(x, kernels):
    for kernel in kernels:
        x = jnp.tanh(jax_dwsconv.depthwise_conv2d(x, kernel))
    return x


def _operands(shape=(1, 14, 14, 64), dtype=np.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    kernels = [jnp.asarray(rng.normal(size=(3, 3, 1, shape[-1])), dtype) for _ in range(CHAIN)]
    return x, kernels


def test_kernels_are_used():
    assert _native.why_unavailable("cuda") is None
    x, kernels = _operands()
    assert "jax_dwsconv.forward.v1" in jax.jit(_chain).lower(x, kernels).compile().as_text()


@pytest.mark.parametrize("differentiated", [False, True])
def test_a_chain_of_calls_is_recorded_into_a_graph(differentiated):
    function = jax.grad(lambda x, k: _chain(x, k).sum(), (0, 1)) if differentiated else _chain
    function = jax.jit(functools.partial(function))
    x, kernels = _operands()
    before = _native.load("cuda").captured_calls()
    results = [jax.block_until_ready(function(x, kernels)) for _ in range(4)]
    recorded = _native.load("cuda").captured_calls() - before
    calls = CHAIN * (3 if differentiated else 1)
    assert recorded >= calls - 2  # XLA may leave a call at the edge outside
    for result in results[1:]:  # replays give what the first, plain launch gave
        jax.tree.map(np.testing.assert_array_equal, result, results[0])


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sanitizer_selection(layout, dtype):
    """A few shapes that touch every border; short, so that compute-sanitizer gets through."""
    rng = np.random.default_rng(0)
    for size, channels, multiplier, kernel_size, stride, dilation in (
        ((9, 7), 33, 1, (3, 3), 1, 1),
        ((12, 13), 8, 2, (5, 4), 2, 1),
        ((3, 2), 5, 1, (7, 7), 1, 1),
        ((16, 17), 64, 1, (3, 5), 3, 2),
    ):
        shape = (2, *size, channels) if layout == "NHWC" else (2, channels, *size)
        x = jnp.asarray(rng.normal(size=shape), dtype)
        kernel = jnp.asarray(rng.normal(size=(*kernel_size, 1, channels * multiplier)), jnp.float32)

        def convolve(x, kernel, stride=stride, dilation=dilation):
            y = jax_dwsconv.depthwise_conv2d(x, kernel, strides=stride, dilation=dilation, data_format=layout)
            return (y * y).sum()

        dx, dkernel = jax.jit(jax.grad(convolve, (0, 1)))(x, kernel)
        assert np.isfinite(np.asarray(dx, np.float32)).all()
        assert np.isfinite(np.asarray(dkernel)).all()


TILED = [
    Case(size=(13, 28), channels=48, dtypes=("bfloat16",) * 3),
    Case(size=(13, 28), channels=48),
    Case(size=(14, 56), channels=6, kernel_size=(5, 5), padding=((2, 2), (2, 2)), layout="NCHW"),
    Case(size=(14, 14), channels=32, kernel_size=(7, 7), padding=((3, 3), (3, 3)), dtypes=("float16",) * 3),
    Case(batch=5, size=(9, 7), channels=40, kernel_size=(5, 5), padding=((2, 2), (2, 2)), dtypes=("bfloat16",) * 3),
    Case(
        batch=6,
        size=(11, 29),
        channels=40,
        kernel_size=(5, 5),
        padding=((-1, 7), (6, -2)),
        dtypes=("bfloat16",) * 3,
    ),
    Case(size=(13, 20), channels=6, layout="NCHW", dtypes=("bfloat16",) * 3),
    Case(
        batch=5,
        size=(7, 7),
        channels=44,
        kernel_size=(5, 5),
        padding=((2, 2), (2, 2)),
        layout="NCHW",
        dtypes=("bfloat16",) * 3,
    ),
    Case(
        batch=3,
        size=(2, 9),
        channels=40,
        kernel_size=(7, 7),
        padding=((3, 3), (3, 3)),
        layout="NCHW",
        dtypes=("float16",) * 3,
    ),
    Case(batch=3, size=(15, 19), channels=12, layout="NCHW"),
    Case(
        batch=9,
        size=(14, 14),
        channels=6,
        kernel_size=(6, 5),
        padding=((2, 3), (2, 2)),
        layout="NCHW",
        dtypes=("float16",) * 3,
    ),
    Case(
        batch=5,
        size=(10, 22),
        channels=5,
        kernel_size=(7, 7),
        padding=((3, -1), (0, 4)),
        layout="NCHW",
        dtypes=("bfloat16",) * 3,
    ),
    Case(size=(15, 30), channels=24, strides=(2, 2), kernel_size=(5, 5), padding=((1, 2), (1, 2))),
    Case(size=(16, 30), channels=24, strides=(2, 2), padding=((0, 1), (0, 1)), dtypes=("bfloat16",) * 3),
    Case(batch=3, size=(11, 23), channels=40, strides=(2, 2), kernel_size=(7, 7), padding=((3, 3), (2, 3))),
    Case(batch=9, size=(9, 7), channels=10, layout="NCHW", dtypes=("bfloat16",) * 3),
    Case(
        batch=6,
        size=(11, 29),
        channels=10,
        kernel_size=(7, 7),
        padding=((-1, 7), (6, -2)),
        layout="NCHW",
        dtypes=("float16",) * 3,
    ),
    Case(
        batch=3,
        size=(30, 32),
        channels=10,
        strides=(2, 2),
        kernel_size=(5, 5),
        padding=((0, 2), (3, 0)),
        layout="NCHW",
        dtypes=("bfloat16",) * 3,
    ),
    Case(batch=3, size=(15, 13), channels=9, strides=(2, 2), layout="NCHW"),
    Case(size=(1, 300), channels=8, kernel_size=(1, 4), padding=((0, 0), (3, 0))),
    Case(size=(1, 40), channels=6, kernel_size=(1, 5), padding=((0, 0), (2, 2)), layout="NCHW"),
    Case(
        size=(1, 64),
        channels=5,
        kernel_size=(1, 4),
        padding=((0, 0), (3, 0)),
        layout="NCHW",
        dtypes=("bfloat16",) * 3,
    ),
    Case(
        size=(1, 48),
        channels=5,
        kernel_size=(1, 7),
        padding=((0, 0), (-8, 22)),
        layout="NCHW",
        dtypes=("float16",) * 3,
    ),
    Case(size=(17, 13), channels=12, kernel_size=(4, 9), dilation=(3, 2), padding=((4, 5), (8, 8))),
    Case(size=(17, 13), channels=5, kernel_size=(6, 2), strides=(3, 3), padding=((2, 3), (0, 1)), layout="NCHW"),
    Case(size=(8, 8), padding=((60, 60), (50, 50)), dilation=(60, 50)),  # further apart than the image is large
]


@pytest.mark.parametrize("operator", ["forward", "grad_input", "grad_filter"])
@pytest.mark.parametrize("case", TILED, ids=str)
def test_every_kind_of_tile(case, operator, monkeypatch):
    """The planner takes the best; here the others show that they are right, too."""
    operands = [jnp.asarray(a) for a in case.operands(operator)]
    for tile in _tiles(case, operator):
        monkeypatch.setenv("JAX_DWSCONV_TILE", tile)
        result = jax.jit(functools.partial(numerics.run, case, operator))(*operands)
        numerics.check_result(case, operator, *(np.asarray(a) for a in operands), result)
        assert _native_module().last_forced_plan() == tile


@pytest.mark.parametrize("width", [20, 18, 21])
@pytest.mark.parametrize(("layout", "kernel"), [("NHWC", "toeplitz:"), ("NCHW", "toeplitz_planes:")])
@pytest.mark.parametrize("operator", ["forward", "grad_input"])
def test_non_finite_stays_local_on_tensor_cores(operator, layout, kernel, width, monkeypatch):
    """There it meets the zeros between the bands of a matrix, too."""
    case = Case(
        batch=3,
        size=(9, width),
        channels=16,
        kernel_size=(5, 5),
        padding=((2, 2), (2, 2)),
        layout=layout,
        dtypes=("bfloat16",) * 3,
    )
    operand, filters = (a.copy() for a in case.operands(operator))
    for position, value in (((0, 0, 0, 0), np.inf), ((1, -1, -1, -1), -np.inf), ((2, 2, 3, 1), np.nan)):
        operand[position] = value
    tiles = [tile for tile in _tiles(case, operator) if tile.startswith(kernel)]
    assert tiles
    for tile in tiles[:: len(tiles) // 4 + 1]:
        monkeypatch.setenv("JAX_DWSCONV_TILE", tile)
        result = jax.jit(functools.partial(numerics.run, case, operator))(jnp.asarray(operand), jnp.asarray(filters))
        numerics.check_result(case, operator, operand, filters, result)


@pytest.mark.parametrize("case", [case for case in TILED if case.multiplier == 1], ids=str)
def test_epilogue_of_every_kind_of_kernel(case, monkeypatch):
    x, kernel = (jnp.asarray(a) for a in case.operands("forward"))
    channels = kernel.shape[case.window.filter_channel_axis]
    scale, bias = (jnp.asarray(numerics.normal(channels, seed=seed), jnp.float32) for seed in (5, 6))
    sums = primitives.forward(x, kernel, window=case.window, out_dtype=jnp.float32)
    residual = jnp.asarray(numerics.normal(*sums.shape, seed=7), case.dtypes[2])
    for parts in ((scale, bias, None), (None, bias, residual)):
        expected = _epilogue.apply(sums, *parts, "silu", case.window.channel_axis, jnp.float32)
        kinds = set()
        for tile in _tiles(case, "forward"):
            kind = tile.partition(":")[0]
            if kind in kinds or (kind in ("toeplitz", "small_planes") and parts[2] is not None):
                continue  # these take no residual
            kinds.add(kind)
            monkeypatch.setenv("JAX_DWSCONV_TILE", tile)

            def fused(x, kernel, parts=parts):
                return primitives.fused_forward(
                    x, kernel, *parts, window=case.window, activation="silu", out_dtype=case.dtypes[2]
                )

            result = jax.jit(fused)(x, kernel)
            assert _native_module().last_forced_plan() == tile
            monkeypatch.delenv("JAX_DWSCONV_TILE")
            numerics.assert_close(result, np.asarray(expected, np.float64), length=100)


def _native_module():
    from jax_dwsconv import _cuda

    return _cuda


def _tiles(case, operator):
    """Some texts of plans of every kernel that takes the case on this device."""
    device = _planning.visible_device()
    if device is None:
        pytest.skip("the planner's table does not have this GPU")
    _, candidates = _planning.plan(
        operator,
        (case.batch, *case.size, case.channels),
        case.kernel_size,
        case.strides,
        case.padding,
        case.dilation,
        case.layout,
        case.dtypes[0],
        device,
    )
    kernels = {}
    for candidate in candidates:
        kernels.setdefault(candidate.text.partition(":")[0], []).append(candidate.text)
    return [tile for tiles in kernels.values() for tile in tiles[:: len(tiles) // 16 + 1]]


@pytest.mark.parametrize("operator", ["forward", "grad_input", "grad_filter"])
def test_more_images_than_a_grid_has_blocks(operator):
    case = Case(batch=66_000, size=(2, 3), channels=4, kernel_size=(2, 2), padding=((0, 1), (0, 1)))
    operands = case.operands(operator)
    numerics.check_result(case, operator, *operands, numerics.run(case, operator, *map(jnp.asarray, operands)))


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_products_with_invented_zeros_leave_no_trace(value, kernel_size, layout, monkeypatch):
    """On tensor cores a pixel of x meets zeros in place of the rows and columns of g that are not there.

    From shared memory it would meet whatever is behind the last column of g.
    """
    pad = kernel_size // 2
    x, g = numerics.normal(2, 9, 9, 16), numerics.normal(2, 9, 9, 16, seed=1)
    x[0, 0, 0, 3], x[1, 8, 4, 5] = value, value
    problem = {"shape": x.shape, "kernel_size": (kernel_size,) * 2, "layout": layout, "dtype": "bfloat16"}
    if layout == "NCHW":
        x, g = np.moveaxis(x, -1, 1), np.moveaxis(g, -1, 1)

    def dkernel(x, g):
        kernel = jnp.zeros((kernel_size, kernel_size, 1, 16), x.dtype)
        forward = functools.partial(jax_dwsconv.depthwise_conv2d, x, padding=pad, data_format=layout)
        return jax.linear_transpose(forward, kernel)(g)[0].astype(jnp.float32)

    operands = jnp.asarray(x, jnp.bfloat16), jnp.asarray(g, jnp.bfloat16)
    _, candidates = _planning.plan("grad_filter", **problem)
    shared = ("tap_products", "tap_rows", "tap_planes")
    tiles = [candidate.text for candidate in candidates if candidate.text.startswith(shared)]
    monkeypatch.setenv("JAX_DWSCONV_TILE", "none")
    expected = ~np.isfinite(jax.jit(functools.partial(dkernel))(*(a.astype(jnp.float32) for a in operands)))
    assert 0 < expected.sum() < 2 * kernel_size**2
    for tile in tiles[:: len(tiles) // 8 + 1]:
        monkeypatch.setenv("JAX_DWSCONV_TILE", tile)
        np.testing.assert_array_equal(~np.isfinite(jax.jit(functools.partial(dkernel))(*operands)), expected)


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 12])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_misaligned_operands(dtype, layout, channels):
    """A slice inside a jitted function may reach the kernel as an address in the middle of a buffer."""
    shape = (3, 5, 28, channels) if layout == "NHWC" else (3, channels, 5, 28)
    x, kernel = numerics.normal(*shape), numerics.normal(3, 3, 1, channels, seed=1)

    def loss(x, kernel):
        y = jax_dwsconv.depthwise_conv2d(x, kernel, data_format=layout)
        return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    step = jax.value_and_grad(loss, (0, 1), has_aux=True)
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    whole = jax.jit(step)(jnp.array(x[1:]), kernel)
    sliced = jax.jit(lambda x, kernel: step(x[1:], kernel))(x, kernel)
    for a, b in zip(jax.tree.leaves(sliced), jax.tree.leaves(whole), strict=True):
        numerics.assert_close(a, np.asarray(b, np.float64), length=3 * 5 * 28)
