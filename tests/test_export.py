"""Programs that are saved: by this process, by an earlier version of the package, and by a later one."""

import subprocess
import sys
from pathlib import Path

import jax
import meshes
import numerics
import numpy as np
import pytest
from cases import Case
from jax import export, numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

import jax_dwsconv
from jax_dwsconv import _native

pytest.importorskip("flatbuffers", reason="jax.export writes files with it")

BATCHES = (1, 3, 8)
ARTEFACT = Path(__file__).parent / "data" / "separable_v1.bin"


def _shapes(*shapes: str) -> list[jax.ShapeDtypeStruct]:
    """Float32 operands; "b" stands for any batch size."""
    scope = export.SymbolicScope()
    return [jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), jnp.float32) for shape in shapes]


def _restored(f, *shapes, **options) -> export.Exported:
    """A function that was exported, written, and read."""
    checks = jax_dwsconv.disabled_export_checks()
    written = export.export(jax.jit(f), disabled_checks=checks, **options)(*shapes).serialize(vjp_order=1)
    return export.deserialize(written)


def _block(x, kernel, bias):
    return jax_dwsconv.depthwise_conv2d(x, kernel, strides=(2, 1), bias=bias, activation="silu")


def _residual_block(x, kernel, scale):
    y = jax_dwsconv.depthwise_conv2d(x, kernel[..., ::2], scale=scale[::2], residual=x, activation="relu")
    return jax_dwsconv.depthwise_conv2d(y, kernel)


def _operands(batch: int):
    x, kernel = numerics.normal(batch, 7, 6, 4), numerics.normal(3, 3, 1, 8, seed=1)
    return x, kernel, numerics.normal(8, seed=2)


def _assert_same(restored, expected, length=8 * 7 * 6):
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        numerics.assert_close(a, b, length=length)


def _gradients(f, *args):
    return jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))), range(len(args)))(*args)


@pytest.mark.parametrize("block", [_block, _residual_block])
@pytest.mark.parametrize("platforms", [None, ("cpu", "cuda")], ids=["this_platform", "cpu+cuda"])
def test_symbolic_batch(platforms, block):
    restored = _restored(block, *_shapes("b, 7, 6, 4", "3, 3, 1, 8", "8"), platforms=platforms)
    for batch in BATCHES:
        args = _operands(batch)
        _assert_same(restored.call(*args), block(*args))
        _assert_same(jax.jit(restored.call)(*args), block(*args))
        _assert_same(_gradients(restored.call, *args), _gradients(block, *args))


@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
def test_symbolic_batch_of_exported_gradients(data_format):
    def gradients(x, kernel):
        return _gradients(lambda x, k: jax_dwsconv.depthwise_conv2d(x, k, data_format=data_format), x, kernel)

    restored = _restored(gradients, *_shapes("b, 6, 6, 6", "3, 3, 1, 6"))
    kernel = numerics.normal(3, 3, 1, 6)
    for batch in BATCHES:
        x = numerics.normal(batch, 6, 6, 6, seed=1)
        _assert_same(restored.call(x, kernel), gradients(x, kernel))


def test_symbolic_height_and_width():
    def convolve(x, kernel):
        return jax_dwsconv.depthwise_conv2d(x, kernel, padding=1, strides=(2, 1))

    restored = _restored(convolve, *_shapes("b, h, w, 4", "3, 3, 1, 8"))
    kernel = numerics.normal(3, 3, 1, 8)
    for size in ((7, 6), (4, 9), (1, 1)):
        x = numerics.normal(2, *size, 4)
        _assert_same(restored.call(x, kernel), convolve(x, kernel))


MESH_SPECS = P("a", None, None, "b"), P(None, None, None, "b"), P("b")


def _check_on_mesh(mesh, f, batch):
    """Values and gradients of the block, divided by batch and channels, without a collective for the values."""
    args = _operands(batch)
    placed = meshes.place(mesh, *zip(args, MESH_SPECS, strict=True))
    y, collectives = meshes.run(f, *placed)
    assert collectives == {}
    _assert_same(y, _block(*args))
    _assert_same(jax.jit(lambda *args: _gradients(f, *args))(*placed), _gradients(_block, *args))


@pytest.mark.parametrize("batch", [4, 8, 20])
def test_shard_map_is_exported(batch):
    mesh = meshes.make(4, 2)
    block = jax.shard_map(_block, mesh=mesh, in_specs=MESH_SPECS, out_specs=MESH_SPECS[0])
    restored = _restored(block, *_shapes(f"{batch}, 7, 6, 4", "3, 3, 1, 8", "8"), platforms=("cpu", "cuda"))
    _check_on_mesh(mesh, restored.call, batch)


def test_halos_are_exported():
    def convolve(x, kernel):
        x, padding = jax_dwsconv.exchange_halos(x, ("a", None), 3)
        return jax_dwsconv.depthwise_conv2d(x, kernel, padding=padding)

    mesh, spec = meshes.make(4, 2), P(None, "a")
    mapped = jax.shard_map(convolve, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
    restored = _restored(mapped, *_shapes("2, 8, 6, 4", "3, 3, 1, 8"), platforms=("cpu", "cuda"))
    x, kernel = numerics.normal(2, 8, 6, 4), numerics.normal(3, 3, 1, 8, seed=1)
    operands = meshes.place(mesh, (x, spec), (kernel, P()))
    y, collectives = meshes.run(restored.call, *operands)
    assert collectives == {"collective-permute": 2}
    _assert_same(y, jax_dwsconv.depthwise_conv2d(x, kernel))


def test_explicit_sharding_is_exported():
    mesh = meshes.make(4, 2, axis_type=AxisType.Explicit)
    args = _operands(8)
    with jax.set_mesh(mesh):
        placed = meshes.place(mesh, *zip(args, MESH_SPECS, strict=True))
        shapes = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in placed)
        restored = _restored(_block, *shapes, platforms=("cpu",))
        y, collectives = meshes.run(restored.call, *placed)
    assert collectives == {}
    assert meshes.is_divided(y, MESH_SPECS[0], mesh)
    _assert_same(y, _block(*args))


def test_shard_map_of_an_exported_function_with_symbolic_batch():
    """JAX cannot load a shard_map with symbolic sizes, of whatever function; but a shard_map can be put around."""
    mesh = meshes.make(4, 2)
    restored = _restored(_block, *_shapes("b, 7, 6, 2", "3, 3, 1, 4", "4"), platforms=("cpu", "cuda"))
    # The types of an exported function do not say over which axes its gradients vary.
    block = jax.shard_map(restored.call, mesh=mesh, in_specs=MESH_SPECS, out_specs=MESH_SPECS[0], check_vma=False)
    for batch in (4, 8, 20):
        _check_on_mesh(mesh, block, batch)


def test_refused_without_the_disabled_checks():
    with pytest.raises(ValueError, match=r"jax_dwsconv\.fused_forward"):
        export.export(jax.jit(_block))(*_shapes("b, 7, 6, 4", "3, 3, 1, 8", "8"))


def test_the_disabled_checks_are_those_of_this_package():
    assert jax_dwsconv.disabled_export_checks() == [
        export.DisabledSafetyCheck.custom_call(target) for target in _native.TARGETS.values()
    ]


# Nothing of the exporting process is here: neither the function nor the modules that its tests import.
_RUN_ARTEFACT = """
import sys, jax, jax_dwsconv
import numpy as np
operands = np.load(sys.argv[2])
separable = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
results = {}
for batch in map(int, sys.argv[4:]):
    args = operands[f"x{batch}"], operands["depthwise"], operands["pointwise"]
    results[f"y{batch}"], pullback = jax.vjp(separable.call, *args)
    gradients = pullback(operands[f"g{batch}"])
    results |= {f"d{name}{batch}": d for name, d in zip(("x", "depthwise", "pointwise"), gradients, strict=True)}
np.savez(sys.argv[3], **results)
"""


def test_stored_artefact_runs_in_a_fresh_process(tmp_path):
    """It was written by tests/data/make_artefact.py; what it computes is known from there alone."""
    cases = {
        n: Case(batch=n, size=(7, 6), channels=4, multiplier=2, strides=(2, 2), padding=((0, 1), (1, 2)))
        for n in BATCHES
    }
    operands = {"depthwise": numerics.normal(3, 3, 1, 8), "pointwise": numerics.normal(8, 5, seed=1)}
    for n, case in cases.items():
        operands[f"x{n}"] = numerics.normal(*case.shapes()["input"], seed=2)
        operands[f"g{n}"] = numerics.normal(n, *case.output_size, 5, seed=3)
    np.savez(tmp_path / "operands.npz", **operands)
    script = [sys.executable, "-P", "-c", _RUN_ARTEFACT, ARTEFACT, tmp_path / "operands.npz", tmp_path / "results.npz"]
    subprocess.run([*script, *map(str, BATCHES)], check=True, timeout=300)

    results = np.load(tmp_path / "results.npz")
    pointwise, kernel = operands["pointwise"].astype(np.float64), operands["depthwise"].reshape(1, 3, 3, 8)
    for n, case in cases.items():
        x, g = operands[f"x{n}"], operands[f"g{n}"].astype(np.float64)
        depthwise = numerics.reference(case, "forward", x, kernel)
        g_depthwise = g @ pointwise.T
        expected = {
            "y": depthwise @ pointwise,
            "dx": numerics.reference(case, "grad_input", g_depthwise, kernel),
            "ddepthwise": numerics.reference(case, "grad_filter", x, g_depthwise).reshape(3, 3, 1, 8),
            "dpointwise": np.einsum("nhwc,nhwd->cd", depthwise, g),
        }
        for name, value in expected.items():
            numerics.assert_close(results[f"{name}{n}"], value, length=n * 4 * 4 * 8)


def test_program_of_a_later_version_names_it():
    """The program of today, with the target's version and the package's raised in place."""
    written = bytes(ARTEFACT.read_bytes())
    assert b"jax_dwsconv.forward.v1" in written
    assert b"0.1.0" in written
    later = written.replace(b"jax_dwsconv.forward.v1", b"jax_dwsconv.forward.v2").replace(b"0.1.0", b"9.8.7")
    x, depthwise, pointwise = numerics.normal(1, 7, 6, 4), numerics.normal(3, 3, 1, 8), numerics.normal(8, 5)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"needs jax-dwsconv 9\.8\.7 or newer"):
        jax.block_until_ready(export.deserialize(bytearray(later)).call(x, depthwise, pointwise))


@pytest.mark.parametrize("operator", _native.TARGETS)
@pytest.mark.parametrize("version", [2, 16])
def test_later_targets_name_the_version_needed(operator, version):
    """Whatever operands, results and attributes they will have."""
    result = jax.ShapeDtypeStruct((2,), jnp.float32)
    call = jax.ffi.ffi_call(f"jax_dwsconv.{operator}.v{version}", [result, result])
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"needs jax-dwsconv 9\.9\.0 or newer"):
        jax.block_until_ready(call(jnp.ones(2), jnp.ones(3), jnp.ones(4), since="9.9.0", stochastic=True))


def test_later_attributes_name_the_version_needed():
    """An attribute that this version does not know must not be ignored."""
    x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((1, 3, 3, 2))
    call = jax.ffi.ffi_call(_native.TARGETS["forward"], jax.ShapeDtypeStruct(x.shape, x.dtype))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"needs jax-dwsconv 9\.9\.0 or newer"):
        jax.block_until_ready(call(x, kernel, since="9.9.0", stochastic=True))
