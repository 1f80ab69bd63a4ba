"""Height and width divided: halos come from the neighbours, and nothing is gathered. Auto and explicit mode."""

import functools
import math
import random
import re

import jax
import meshes
import numerics
import numpy as np
import pytest
from cases import OPERATORS, ROLES, Case
from jax import lax, numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

import jax_dwsconv
import jax_dwsconv.quantized
from jax_dwsconv.partitioning import Division

HALO = {"collective-permute", "all-reduce"}
MESHES = ((8,), (2, 4), (4, 2), (2, 2, 2))
KINDS = ("batch", "channels", "height", "width")


def _parts(mesh_shape, axes) -> int:
    return math.prod(mesh_shape["abc".index(axis)] for axis in axes)


def _generated(count: int, seed: int = 0) -> list:
    """Meshes, divisions with a height or a width in them, and cases of any window whose sizes they divide."""
    choose, found = random.Random(seed).choice, {}
    while len(found) < count:
        mesh_shape = choose(MESHES)
        axes: dict[str, tuple[str, ...]] = dict.fromkeys(KINDS, ())
        for axis in "abc"[: len(mesh_shape)]:
            kind = choose((*KINDS, "height", "width", None))
            if kind:
                axes[kind] = choose(((*axes[kind], axis), (axis, *axes[kind])))
        kernel_size = choose(((3, 3), (5, 5), (2, 4), (1, 7), (4, 1), (9, 3)))
        groups = choose((1, 1, 8))
        case = Case(
            batch=8,
            size=(choose((8, 16, 24, 32)), choose((8, 12, 16, 24))),
            channels=8,
            multiplier=choose((1, 1, 2)),
            kernel_size=kernel_size,
            strides=(choose((1, 1, 2, 3)), choose((1, 1, 2, 3))),
            padding=tuple(
                (choose((0, k // 2, k // 2, k - 1, -1)), choose((0, k // 2, k // 2, 2, -2))) for k in kernel_size
            ),
            dilation=(choose((1, 1, 2)), choose((1, 1, 3))),
            layout=choose(("NHWC", "NCHW")),
            filter_layout=choose(("HWO", "OHW")),
            groups=groups,
            dtypes=choose((("float32",) * 3, ("bfloat16", "float32", "bfloat16"))),
        )
        parts = [_parts(mesh_shape, axes[kind]) for kind in ("height", "width")]
        sizes = zip(case.size, case.output_size, parts, strict=True)
        fits = all(y > 0 and x % n == y % n == 0 for x, y, n in sizes)
        if (axes["height"] or axes["width"]) and fits:
            found[mesh_shape, Division(grouped=groups > 1, **axes), case] = None
    return [pytest.param(*key, id=_id(*key)) for key in found]


def _id(mesh_shape, division: Division, case: Case) -> str:
    divided = "-".join(f"{kind}={''.join(getattr(division, kind))}" for kind in KINDS if getattr(division, kind))
    return f"{'x'.join(map(str, mesh_shape))}-{divided}-{case}"


def _specs(case: Case, operator: str, division: Division) -> list[P]:
    roles = ("kernel" if role == "filter" else "x" for role in ROLES[operator])
    return [division.spec(role, case.window) for role in roles]


def _check(mesh_shape, division, case, operator, axis_type=AxisType.Auto):
    mesh = meshes.make(*mesh_shape, axis_type=axis_type)
    *operand_specs, result_spec = _specs(case, operator, division)
    a, b = case.operands(operator)
    with jax.set_mesh(mesh):
        operands = meshes.place(mesh, *zip((a, b), operand_specs, strict=True))
        result, collectives = meshes.run(functools.partial(numerics.run, case, operator), *operands)
    numerics.check_result(case, operator, a, b, result)
    assert meshes.is_divided(result, result_spec, mesh)
    assert collectives["all-reduce"] == (operator == "grad_filter")
    assert set(collectives) <= HALO
    return result


def _assert_same(sharded, unsharded, length=2000):
    """Both are rounded, so each may be as far from their mean as a result from the exact value."""

    def check(a, b):
        mean = (np.asarray(a, np.float64) + np.asarray(b, np.float64)) / 2
        numerics.assert_close(a, mean, length=length)
        numerics.assert_close(b, mean, length=length)

    jax.tree.map(check, sharded, unsharded)


@pytest.mark.parametrize(("mesh_shape", "division", "case"), _generated(60))
@pytest.mark.parametrize("operator", OPERATORS)
def test_generated(operator, mesh_shape, division, case):
    _check(mesh_shape, division, case, operator)


@pytest.mark.parametrize(("mesh_shape", "division", "case"), _generated(20, seed=1))
@pytest.mark.parametrize("operator", OPERATORS)
def test_explicit_mode(operator, mesh_shape, division, case):
    result = _check(mesh_shape, division, case, operator, AxisType.Explicit)
    assert jax.typeof(result).sharding.spec == _specs(case, operator, division)[-1]


# --- What is sent -----------------------------------------------------------------------------------------------------


def _halo_rows(case: Case, operator: str, parts: int) -> int:
    """Rows before and after a block of the height that some tap of the block's results reads, counted tap by tap."""
    x, y = case.size[0], case.output_size[0]
    taps = range(case.kernel_size[0])
    pairs = [(t * case.strides[0] + j * case.dilation[0] - case.padding[0][0], t) for t in range(y) for j in taps]
    pairs = [(i, t) for i, t in pairs if 0 <= i < x]
    if operator == "grad_input":
        pairs, x, y = [(t, i) for i, t in pairs], y, x
    block, results = x // parts, y // parts
    before = max(p * block - source for source, t in pairs for p in [t // results])
    after = max(source - (p + 1) * block + 1 for source, t in pairs for p in [t // results])
    return max(0, before) + max(0, after)


HALO_CASES = [
    Case(size=(32, 5)),
    Case(size=(32, 5), kernel_size=(7, 3), padding=((3, 3), (1, 1))),
    Case(size=(32, 5), kernel_size=(5, 3), padding=((4, 0), (1, 1)), layout="NCHW"),
    Case(size=(32, 5), strides=(2, 2), padding=((0, 1), (1, 1))),
    Case(size=(32, 5), strides=(2, 1), dilation=(3, 1), kernel_size=(4, 3), padding=((4, 4), (1, 1)), multiplier=2),
    Case(size=(32, 5), kernel_size=(9, 1), padding=((4, 4), (0, 0))),  # as many rows as a block of 8 has
    Case(size=(32, 5), kernel_size=(23, 1), padding=((11, 11), (0, 0))),  # more than a neighbour has
    Case(size=(32, 5), kernel_size=(2, 2), strides=(2, 2), padding=((0, 0), (0, 0))),  # none
]


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("case", HALO_CASES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_only_the_halo_is_sent(operator, case, parts):
    division = Division((), (), False, height=("a",))
    mesh = meshes.make(parts)
    operands = meshes.place(mesh, *zip(case.operands(operator), _specs(case, operator, division)[:2], strict=True))
    of_y = operator == "grad_input"
    row = case.batch * (case.output_size if of_y else case.size)[1] * (case.out_channels if of_y else case.channels)
    sent = meshes.permuted(functools.partial(numerics.run, case, operator), *operands)
    assert sent == row * _halo_rows(case, operator, parts)


def test_a_large_block_is_not_copied():
    """Rows that need no halo are computed of the block as it is: no concatenation is as large as that."""
    mesh = meshes.make(2)
    x, kernel = meshes.place(mesh, (numerics.normal(1, 64, 9, 4), P(None, "a")), (numerics.normal(5, 5, 1, 4), P()))
    text = jax.jit(jax_dwsconv.depthwise_conv2d).lower(x, kernel).compile().as_text()
    copied = [int(rows) for rows in re.findall(r"f32\[1,(\d+),9,4\]\S* concatenate\(", text)]
    assert copied and max(copied) <= 8
    assert not re.search(r"f32\[1,32,9,4\]\S* copy\(", text)


# --- What does not divide evenly --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (64, {"padding": "VALID"}),
        (56, {"padding": "SAME", "strides": 2}),
        (48, {"padding": "VALID", "strides": 3, "dilation": 2}),
        (40, {"padding": ((7, 2), (1, 1))}),
        (40, {"padding": ((-3, 2), (1, 1)), "strides": 2}),
        (24, {"padding": "VALID", "dilation": 4}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_uneven_in_between(size, options, dtype):
    """The second convolution has a height that 8 does not divide; so have all of the backward pass."""
    mesh = meshes.make(8)
    x, kernel = numerics.normal(2, size, 9, 4, dtype=dtype), numerics.normal(3, 3, 1, 4, seed=1)

    def value(x, kernel):
        y = jax_dwsconv.depthwise_conv2d(x, kernel, preferred_element_type=jnp.float32, **options)
        y = jax_dwsconv.depthwise_conv2d(jnp.tanh(y), kernel, activation="relu", padding="VALID")
        return jnp.sum(y**2)

    value_and_gradients = jax.value_and_grad(value, (0, 1))
    operands = meshes.place(mesh, (x, P(None, "a")), (kernel, P()))
    result, collectives = meshes.run(value_and_gradients, *operands)
    assert set(collectives) <= HALO
    _assert_same(result, value_and_gradients(x, kernel), length=2 * size * 9 * 30)


def test_uneven_result_of_a_program():
    """What leaves a jitted function is even or whole: XLA gathers it, as it does for lax."""
    mesh = meshes.make(8)
    x, kernel = numerics.normal(1, 64, 9, 4), numerics.normal(3, 3, 1, 4)
    convolve = functools.partial(jax_dwsconv.depthwise_conv2d, padding="VALID")
    y, _ = meshes.run(convolve, *meshes.place(mesh, (x, P(None, "a")), (kernel, P())))
    assert y.sharding.is_fully_replicated
    _assert_same(y, convolve(x, kernel))


def test_fewer_rows_than_parts():
    """Where a device would have nothing, the dimension is gathered."""
    mesh = meshes.make(8)
    x, kernel = numerics.normal(1, 8, 9, 4), numerics.normal(8, 3, 1, 4)
    convolve = functools.partial(jax_dwsconv.depthwise_conv2d, padding="VALID")
    y, collectives = meshes.run(convolve, *meshes.place(mesh, (x, P(None, "a")), (kernel, P())))
    assert collectives == {"all-gather": 1}
    _assert_same(y, convolve(x, kernel))


def test_explicit_mode_refuses_uneven_results():
    mesh = meshes.make(8, axis_type=AxisType.Explicit)
    with jax.set_mesh(mesh):
        x, kernel = meshes.place(mesh, (numerics.normal(1, 64, 9, 4), P(None, "a")), (numerics.normal(3, 3, 1, 4), P()))
        with pytest.raises(ValueError, match=r"\(1, 64, 9, 4\).*height of x over .*'a'.*equal.*reshard"):
            jax_dwsconv.depthwise_conv2d(x, kernel, padding="VALID")


# --- Everything around ------------------------------------------------------------------------------------------------

# x and y of shape (8, 16, 24, 8); the devices of a combined mesh.
COMBINED = [
    ((2, 4), P("a", "b")),
    ((4, 2), P(None, "a", "b")),
    ((2, 4), P(None, "b", None, "a")),
    ((2, 2, 2), P("b", "a", "c")),
    ((2, 2, 2), P(None, ("c", "a"), None, "b")),
]
X, Y, KERNEL = numerics.normal(8, 16, 24, 8), numerics.normal(8, 16, 24, 8, seed=1), numerics.normal(5, 3, 1, 8, seed=2)
MODES = pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


def _kernel_spec(spec: P, dimensions: int) -> P:
    """Divided as the channels are: where it is whole, its gradient is gathered in explicit mode, as its type asks."""
    return P(*[None] * (dimensions - 1), spec[3] if len(spec) > 3 else None)


def _int8(x):
    return np.clip(np.rint(40 * x), -128, 127).astype(np.int8)


def _pullback(f, cotangent, *args):
    value, vjp = jax.vjp(f, *args)
    return value, vjp(cotangent)


def _run_as(mode, mesh_shape, f, *arrays_and_specs):
    """The result of `f` of the divided arrays, compared with that of the whole ones."""
    mesh = meshes.make(*mesh_shape, axis_type=mode)
    with jax.set_mesh(mesh):
        result, collectives = meshes.run(f, *meshes.place(mesh, *arrays_and_specs))
    _assert_same(result, f(*(x for x, _ in arrays_and_specs)))
    assert set(collectives) <= HALO
    return result, collectives


@MODES
@pytest.mark.parametrize(("mesh_shape", "spec"), COMBINED, ids=str)
@pytest.mark.parametrize("parts", [("bias",), ("scale", "bias", "residual")], ids=str)
def test_fused(parts, mesh_shape, spec, mode):
    values = {"scale": numerics.normal(8, seed=3), "bias": numerics.normal(8, seed=4), "residual": Y}
    others = [(values[part], spec if part == "residual" else _kernel_spec(spec, 1)) for part in parts]
    operands = [(X, spec), (KERNEL, _kernel_spec(spec, 4)), *others]

    def convolve(x, kernel, *others):
        options = dict(zip(parts, others, strict=True))
        return jax_dwsconv.depthwise_conv2d(x, kernel, **options, activation="silu")

    y, collectives = _run_as(mode, mesh_shape, convolve, *operands)
    assert set(collectives) == {"collective-permute"}
    if mode == AxisType.Explicit:
        assert jax.typeof(y).sharding.spec == P(*spec, *[None] * (4 - len(spec)))

    def gradients(g, *args):
        return _pullback(convolve, g, *args)

    _run_as(mode, mesh_shape, gradients, (Y, spec), *operands)


@MODES
@pytest.mark.parametrize("options", [{}, {"strides": 2, "dilation": (3, 1)}, {"padding": ((5, 3), (2, 2))}], ids=str)
@pytest.mark.parametrize(("mesh_shape", "spec"), COMBINED, ids=str)
def test_int8(mesh_shape, spec, options, mode):
    """Equal to the last bit, whatever stands for zero."""
    convolve = functools.partial(jax_dwsconv.quantized.depthwise_conv2d, x_zero_point=-3, out_zero_point=5, **options)
    operands = [(_int8(X), spec), (_int8(KERNEL), _kernel_spec(spec, 4)), (np.full(8, 0.01, np.float32), P())]
    mesh = meshes.make(*mesh_shape, axis_type=mode)
    with jax.set_mesh(mesh):
        y, collectives = meshes.run(lambda x, k, scale: convolve(x, k, scale=scale), *meshes.place(mesh, *operands))
    np.testing.assert_array_equal(y, convolve(*(x for x, _ in operands[:2]), scale=operands[2][0]))
    assert set(collectives) <= {"collective-permute"}


@pytest.mark.parametrize("padding", ["VALID", ((9, 0), (1, 1))], ids=str)
def test_uneven_int8(padding):
    def sums(x, kernel):
        for _ in range(2):
            x = jax_dwsconv.quantized.depthwise_conv2d(x, kernel, scale=0.02, x_zero_point=7, padding=padding)
        return x.astype(jnp.int32).sum((1, 2))

    x, kernel = _int8(numerics.normal(2, 64, 9, 4)), _int8(numerics.normal(3, 3, 1, 4, seed=1))
    result, collectives = meshes.run(sums, *meshes.place(meshes.make(8), (x, P(None, "a")), (kernel, P())))
    assert set(collectives) <= HALO
    np.testing.assert_array_equal(result, sums(x, kernel))


@MODES
@pytest.mark.parametrize("per_example", [False, True], ids=["shared", "per_example"])
@pytest.mark.parametrize(("mesh_shape", "spec"), COMBINED, ids=str)
def test_vmap(mesh_shape, spec, per_example, mode):
    x, g = (numerics.normal(8, 2, 16, 24, 8, seed=seed) for seed in (0, 1))
    kernel = numerics.normal(*([8] if per_example else []), 3, 3, 1, 8, seed=2)
    mapped = jax.vmap(jax_dwsconv.depthwise_conv2d, (0, 0 if per_example else None))
    kernel_spec = _kernel_spec(spec, 4)
    kernel_spec = P(spec[0], *kernel_spec) if per_example else kernel_spec
    spec = P(spec[0], None, *spec[1:])

    def gradients(x, kernel, g):
        return _pullback(mapped, g, x, kernel)

    _run_as(mode, mesh_shape, gradients, (x, spec), (kernel, kernel_spec), (g, spec))


@MODES
@pytest.mark.parametrize(("mesh_shape", "spec"), COMBINED[:1] + COMBINED[-1:], ids=str)
def test_scan_and_second_derivative(mesh_shape, spec, mode):
    kernels = np.stack([KERNEL, KERNEL[::-1]]) / 4

    def loss(kernels, x):
        def layer(x, kernel):
            return jnp.tanh(jax_dwsconv.depthwise_conv2d(x, kernel)), None

        return jnp.sum(lax.scan(layer, x, kernels)[0] ** 2)

    def hessian_vector(kernels, x):
        return jax.jvp(lambda k: jax.grad(loss)(k, x), (kernels,), (kernels,))[1]

    _run_as(mode, mesh_shape, hessian_vector, (kernels, _kernel_spec(spec, 5)), (X, spec))


@MODES
@pytest.mark.parametrize("padding", ["SAME", "CAUSAL"])
@pytest.mark.parametrize("data_format", ["NWC", "NCW"])
def test_length(data_format, padding, mode):
    shape, spec = ((2, 64, 4), P(None, "a")) if data_format == "NWC" else ((2, 4, 64), P(None, None, "a"))
    x, g, kernel = numerics.normal(*shape), numerics.normal(*shape, seed=1), numerics.normal(4, 1, 4, seed=2)

    def gradients(x, kernel, g):
        convolve = functools.partial(jax_dwsconv.depthwise_conv1d, dilation=2, padding=padding, data_format=data_format)
        return _pullback(convolve, g, x, kernel)

    _, collectives = _run_as(mode, (8,), gradients, (x, spec), (kernel, P()), (g, spec))
    ways = 1 if padding == "CAUSAL" else 2
    halos = 3 if mode == AxisType.Auto else 2  # in explicit mode XLA sees that forward and grad_filter need the same
    assert collectives == {"collective-permute": halos * ways, "all-reduce": 1}


@MODES
@pytest.mark.parametrize("strides", [1, 2, 3])
def test_transposed(strides, mode):
    def gradients(x, kernel):
        convolve = functools.partial(jax_dwsconv.depthwise_conv_transpose2d, strides=strides)
        y, vjp = jax.vjp(convolve, x, kernel)
        return y, vjp(y)

    _run_as(mode, (4, 2), gradients, (X, P(None, "a", "b")), (KERNEL, P()))


@MODES
def test_drop_in(mode):
    convolve = functools.partial(
        jax_dwsconv.conv_general_dilated,
        window_strides=(2, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=8,
    )
    _run_as(mode, (2, 4), convolve, (X, P("a", "b")), (KERNEL, P()))


def test_lax_sends_as_much():
    """Forward and gradient by the input of the usual convolution; expected values above are never those of lax."""
    mesh = meshes.make(8)
    operands = meshes.place(mesh, (X, P(None, "a")), (KERNEL, P()))

    def in_lax(x, kernel):
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=8
        )

    for take in (lambda f: f, lambda f: lambda x, kernel: jax.vjp(lambda x: f(x, kernel), x)[1](x)):
        ours, theirs = (meshes.permuted(take(f), *operands) for f in (jax_dwsconv.depthwise_conv2d, in_lax))
        assert 0 < ours <= theirs
