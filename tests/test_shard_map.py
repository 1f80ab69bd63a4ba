"""Inside shard_map every device runs its own operator, over all axes of the mesh or over some of them."""

import functools

import jax
import meshes
import numerics
import numpy as np
import pytest
from jax import lax, numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

import jax_dwsconv
import jax_dwsconv.quantized

X, KERNEL, Y = numerics.normal(8, 6, 5, 8), numerics.normal(3, 3, 1, 16, seed=1), numerics.normal(8, 6, 5, 16, seed=2)
# The specs of x and of the kernel; that of y follows.
BATCH = (P("a"), P(), P("a"))
CHANNELS = (P(None, None, None, "a"), P(None, None, None, "a"), P(None, None, None, "a"))
BOTH = (P("a", None, None, "b"), P(None, None, None, "b"), P("a", None, None, "b"))
BOTH_BATCH = (P(("a", "b")), P(), P(("a", "b")))
BATCH_AND_HEIGHT = (P("a", "b"), P(), P("a", "b"))
# (specs, the manual axes or None for all)
FULL = [(BATCH, None), (CHANNELS, None), (BOTH, None), (BOTH_BATCH, None)]
PARTIAL = [(BATCH, {"a"}), (CHANNELS, {"a"})]
WITH_AND_WITHOUT_CHECK = pytest.mark.parametrize("check_vma", [True, False], ids=["check_vma", "unchecked"])
EVERY_DIVISION = pytest.mark.parametrize(("specs", "manual"), FULL + PARTIAL, ids=str)


def _gradients(x, kernel, g):
    return jax.vjp(jax_dwsconv.depthwise_conv2d, x, kernel)[1](g)


def _assert_same(mapped, whole, length=8 * 6 * 5):
    jax.tree.map(functools.partial(numerics.assert_close, length=length), mapped, whole)


def _shard_map(f, mesh, in_specs, out_specs, manual, check_vma=True):
    axis_names = set(mesh.axis_names) if manual is None else manual
    return jax.shard_map(
        f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=axis_names, check_vma=check_vma
    )


@WITH_AND_WITHOUT_CHECK
@EVERY_DIVISION
def test_forward(specs, manual, check_vma):
    mesh = meshes.make(4, 2)
    *in_specs, out_spec = specs
    convolve = _shard_map(jax_dwsconv.depthwise_conv2d, mesh, tuple(in_specs), out_spec, manual, check_vma)
    y, collectives = meshes.run(convolve, *meshes.place(mesh, (X, specs[0]), (KERNEL, specs[1])))
    assert collectives == {}
    assert meshes.is_divided(y, out_spec, mesh)
    _assert_same(y, jax_dwsconv.depthwise_conv2d(X, KERNEL))


@WITH_AND_WITHOUT_CHECK
@EVERY_DIVISION
def test_gradients_of_a_mapped_function(specs, manual, check_vma):
    mesh = meshes.make(4, 2)
    *in_specs, out_spec = specs
    convolve = _shard_map(jax_dwsconv.depthwise_conv2d, mesh, tuple(in_specs), out_spec, manual, check_vma)

    def gradients(x, kernel, g):
        return jax.vjp(convolve, x, kernel)[1](g)

    operands = meshes.place(mesh, *zip((X, KERNEL, Y), specs, strict=True))
    result, collectives = meshes.run(gradients, *operands)
    if check_vma:  # without it JAX itself adds up over the axes that a spec does not name
        assert collectives == ({} if specs is CHANNELS else {"all-reduce": 1})
    _assert_same(result, _gradients(X, KERNEL, Y))


@EVERY_DIVISION
def test_gradients_inside(specs, manual):
    """The sum over the shards of the batch comes by itself, since a whole kernel is the same on every device."""
    mesh = meshes.make(4, 2)
    gradients = _shard_map(_gradients, mesh, specs, specs[:2], manual)
    operands = meshes.place(mesh, *zip((X, KERNEL, Y), specs, strict=True))
    result, collectives = meshes.run(gradients, *operands)
    assert collectives == ({} if specs is CHANNELS else {"all-reduce": 1})
    _assert_same(result, _gradients(X, KERNEL, Y))


def test_gradients_inside_without_check():
    """Without varying axes nobody can know that the kernel is the same everywhere: the sum is the caller's."""
    mesh = meshes.make(4, 2)

    def gradients(x, kernel, g):
        dx, dkernel = _gradients(x, kernel, g)
        return dx, lax.psum(dkernel, "a")

    mapped = _shard_map(gradients, mesh, BATCH, BATCH[:2], None, check_vma=False)
    result, _ = meshes.run(mapped, *meshes.place(mesh, *zip((X, KERNEL, Y), BATCH, strict=True)))
    _assert_same(result, _gradients(X, KERNEL, Y))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("rest", ["none", "batch", "channels", "height"])
def test_other_axes_divide_too(rest, kind):
    """One axis is manual; over the other one the operands come divided, and XLA or the types say so."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), (kind, kind), devices=jax.devices("cpu")[:8])
    specs = {"none": BATCH, "batch": BOTH_BATCH, "channels": BOTH, "height": BATCH_AND_HEIGHT}[rest]
    convolve = _shard_map(jax_dwsconv.depthwise_conv2d, mesh, BATCH[:2], BATCH[2], {"a"})

    def gradients(x, kernel, g):
        value, pullback = jax.vjp(convolve, x, kernel)
        return value, pullback(g)

    with jax.set_mesh(mesh):
        operands = meshes.place(mesh, *zip((X, KERNEL, Y), specs, strict=True))
        (value, result), _ = meshes.run(gradients, *operands)
    _assert_same((value, result), (jax_dwsconv.depthwise_conv2d(X, KERNEL), _gradients(X, KERNEL, Y)))


def test_second_derivative():
    mesh = meshes.make(8)

    def loss(kernel, x):
        y = jax_dwsconv.depthwise_conv2d(x, kernel)
        return (y**3).sum()

    def mapped_loss(kernel, x):
        return _shard_map(lambda k, x: lax.psum(loss(k, x), "a"), mesh, (P(), P("a")), P(), None)(kernel, x)

    def hessian_vector(loss, kernel, x):
        return jax.jvp(lambda k: jax.grad(loss)(k, x), (kernel,), (kernel,))[1]

    kernel, x = meshes.place(mesh, (KERNEL, P()), (X, P("a")))
    mapped = jax.jit(functools.partial(hessian_vector, mapped_loss))(kernel, x)
    _assert_same(mapped, hessian_vector(loss, KERNEL, X), length=10_000)


# --- Halos ------------------------------------------------------------------------------------------------------------

IMAGE = numerics.normal(2, 32, 24, 4)
# The axes that divide height and width, a window, and how often a forward pass permutes.
HALOS = [
    ((None, "a"), {}, 2),
    (("a", None), {"strides": 2}, 1),
    (("a", None), {"dilation": (4, 1), "strides": (2, 1)}, 2),
    (("a", "b"), {"padding": ((2, 0), (0, 2)), "data_format": "NCHW"}, 2),
    ((("a", "b"), None), {"padding": 1}, 2),
    ((("b", "a"), None), {"padding": ((5, 5), (1, 1)), "strides": (1, 2), "dilation": (5, 1)}, 4),
    (("b", "a"), {"padding": ((0, 6), (3, 3))}, 3),
]


def _with_halos(names, options, f):
    """`f(convolve, x, kernel)` of the whole image, and of its parts: there with halos."""
    channels_first = options.get("data_format") == "NCHW"
    spec = P(None, None, *names) if channels_first else P(None, *names)
    mesh = meshes.make(4, 2)

    def convolve_part(x, kernel):
        in_x = {name: value for name, value in options.items() if name != "padding"}
        x, padding = jax_dwsconv.exchange_halos(x, names, kernel.shape[:2], **options)
        return jax_dwsconv.depthwise_conv2d(x, kernel, **in_x, padding=padding)

    convolve = jax.shard_map(convolve_part, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
    x = IMAGE.transpose(0, 3, 1, 2) if channels_first else IMAGE
    kernel = KERNEL[..., :4]
    operands = meshes.place(mesh, (x, spec), (kernel, P()))
    result, collectives = meshes.run(functools.partial(f, convolve), *operands)
    whole = f(functools.partial(jax_dwsconv.depthwise_conv2d, **options), x, kernel)
    _assert_same(result, whole, length=10_000)
    return collectives


@pytest.mark.parametrize(("names", "options", "permutes"), HALOS, ids=str)
def test_halos(names, options, permutes):
    def gradients(convolve, x, kernel):
        value, pullback = jax.vjp(convolve, x, kernel)
        return value, pullback(value)

    assert _with_halos(names, options, lambda convolve, *args: convolve(*args)) == {"collective-permute": permutes}
    assert _with_halos(names, options, gradients) == {"collective-permute": 2 * permutes, "all-reduce": 1}


def test_second_derivative_with_halos():
    def hessian_vector(convolve, x, kernel):
        def loss(kernel):
            return (convolve(jnp.sin(convolve(x, kernel)), kernel) ** 2).mean()

        return jax.jvp(jax.grad(loss), (kernel,), (kernel,))[1]

    _with_halos(("a", "b"), {}, hessian_vector)


def test_halos_of_a_length():
    x, kernel = numerics.normal(2, 64, 4), numerics.normal(4, 1, 4, seed=1)

    def convolve_part(x, kernel):
        x, padding = jax_dwsconv.exchange_halos(x, ("a",), 4, dilation=2, padding="CAUSAL")
        return jax_dwsconv.depthwise_conv1d(x, kernel, dilation=2, padding=padding)

    mesh = meshes.make(8)
    convolve = jax.shard_map(convolve_part, mesh=mesh, in_specs=(P(None, "a"), P()), out_specs=P(None, "a"))
    y, collectives = meshes.run(convolve, *meshes.place(mesh, (x, P(None, "a")), (kernel, P())))
    assert collectives == {"collective-permute": 1}
    _assert_same(y, jax_dwsconv.depthwise_conv1d(x, kernel, dilation=2, padding="CAUSAL"))


def test_halos_of_int8():
    x, kernel = np.rint(40 * IMAGE).astype(np.int8), np.rint(40 * KERNEL[..., :4]).astype(np.int8)
    convolve = functools.partial(jax_dwsconv.quantized.depthwise_conv2d, x_zero_point=-3, scale=0.01)

    def convolve_part(x, kernel):
        x, padding = jax_dwsconv.exchange_halos(x, ("a", "b"), 3, zero_point=-3)
        return convolve(x, kernel, padding=padding)

    mesh, spec = meshes.make(4, 2), P(None, "a", "b")
    mapped = jax.shard_map(convolve_part, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
    y, _ = meshes.run(mapped, *meshes.place(mesh, (x, spec), (kernel, P())))
    np.testing.assert_array_equal(y, convolve(x, kernel))


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (
            ("a", None),
            {"padding": "VALID"},
            r"axis 0 of size 32, in 4 parts, has a result of size 30, .*evenly",
        ),
        (("c", None), {}, r"'c' is no axis of the mesh .*\('a', 'b'\)"),
        (("a", None), {"strides": (1, 1, 1)}, "strides must be an int or 2 ints"),
        ("ab", {}, "axis_names must be a sequence"),
        (("a", None, None), {}, "axis_names must be a sequence"),
    ],
)
def test_halos_refused(names, options, message):
    part = functools.partial(jax_dwsconv.exchange_halos, axis_names=names, kernel_size=3, **options)
    with pytest.raises(ValueError, match=message):
        jax.shard_map(lambda x: part(x)[0], mesh=meshes.make(4, 2), in_specs=P(None, "a"), out_specs=P(None, "a"))(
            IMAGE
        )
