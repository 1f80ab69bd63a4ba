"""Compiling before running, for other platforms, and once for several processes."""

import functools
import json
import os
import subprocess
import sys

import jax
import numerics
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import jax_dwsconv
from jax_dwsconv import _native

X, KERNEL = numerics.normal(2, 7, 6, 4), numerics.normal(3, 3, 1, 8, seed=1)


def _gradients(x, kernel):
    return jax.grad(lambda x, kernel: jnp.sum(jax_dwsconv.depthwise_conv2d(x, kernel) ** 2), (0, 1))(x, kernel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_and_compile(dtype):
    operands = X.astype(dtype), KERNEL.astype(dtype)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    for f in (jax_dwsconv.depthwise_conv2d, _gradients):
        jitted = jax.jit(functools.partial(f))
        compiled = jitted.lower(*shapes).compile()
        jax.tree.map(np.testing.assert_array_equal, compiled(*operands), jitted(*operands))
    with pytest.raises(TypeError, match="compiled"):
        compiled(operands[0][:1], operands[1])


def _targets(f, platforms: tuple[str, ...]) -> set[str]:
    """Which of the package's targets the lowered function calls."""
    text = jax.jit(f).trace(X, KERNEL).lower(lowering_platforms=platforms).as_text()
    return {operator for operator, target in _native.TARGETS.items() if target in text}


@pytest.mark.parametrize("platforms", [("cpu",), ("cuda",), ("cpu", "cuda"), ("cuda", "tpu")], ids="+".join)
def test_lowering_for_platforms_with_kernels(platforms):
    assert _targets(jax_dwsconv.depthwise_conv2d, platforms) == {"forward"}
    assert _targets(_gradients, platforms) == {"forward", "grad_input", "grad_filter"}


@pytest.mark.parametrize("platforms", [("tpu",), ("rocm",)], ids="+".join)
def test_lowering_for_platforms_without_kernels(platforms):
    for f in (jax_dwsconv.depthwise_conv2d, _gradients):
        assert _targets(f, platforms) == set()
        assert "stablehlo.convolution" in jax.jit(f).trace(X, KERNEL).lower(lowering_platforms=platforms).as_text()


@pytest.mark.parametrize("f", [jax_dwsconv.depthwise_conv2d, _gradients], ids=["value", "gradients"])
@pytest.mark.parametrize("mapped", [False, True], ids=["explicit", "shard_map"])
def test_lowering_for_devices_that_are_not_here(mapped, f):
    mesh = AbstractMesh((64,), ("a",), (AxisType.Explicit,))
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((128, 7, 6, 4), P("a")), (KERNEL.shape, P()))
    ]
    if mapped:
        out_specs = P("a") if f is jax_dwsconv.depthwise_conv2d else (P("a"), P())
        f = jax.shard_map(f, mesh=mesh, in_specs=(P("a"), P()), out_specs=out_specs)
    text = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert _native.TARGETS["forward"] in text


@pytest.mark.parametrize("f", [jax_dwsconv.depthwise_conv2d, _gradients])
def test_lowering_of_a_divided_height_for_devices_that_are_not_here(f):
    mesh = AbstractMesh((64,), ("a",), (AxisType.Explicit,))
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((2, 128, 6, 4), P(None, "a")), (KERNEL.shape, P()))
    ]
    text = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert _native.TARGETS["forward"] in text
    assert "collective_permute" in text and "all_gather" not in text


# Prints how often the compiled function came from the cache, how often it did not, and a result.
_CACHED = """
import collections, json, sys
import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import jax_dwsconv

jax.config.update("jax_num_cpu_devices", 8)
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
x, kernel = jnp.sin(jnp.arange(8 * 7 * 6 * 4.0)).reshape(8, 7, 6, 4), jnp.cos(jnp.arange(36.0)).reshape(3, 3, 1, 4)
if sys.argv[1] != "one_device":
    kind = jax.sharding.AxisType[sys.argv[1]]
    mesh = jax.make_mesh((8,), ("a",), (kind,), devices=jax.devices("cpu"))
    x, kernel = jax.device_put((x, kernel), (NamedSharding(mesh, P("a")), NamedSharding(mesh, P())))

def loss(x, kernel):
    return jnp.sum(jax_dwsconv.depthwise_conv2d(x, kernel) ** 2)

jax.block_until_ready((x, kernel))
events.clear()
_, dkernel = jax.jit(jax.grad(loss, (0, 1)))(x, kernel)
hits, misses = (events["/jax/compilation_cache/cache_" + kind] for kind in ("hits", "misses"))
print(json.dumps({"hits": hits, "misses": misses, "dkernel": dkernel.ravel().tolist()}))
"""


@pytest.mark.parametrize("placement", ["one_device", "Auto", "Explicit"])
def test_persistent_compilation_cache(placement, tmp_path):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # Auto mode goes through custom_partitioning, which otherwise puts an address into the key.
        "JAX_REMOVE_CUSTOM_PARTITIONING_PTR_FROM_CACHE_KEY": "1",
    }
    command = [sys.executable, "-P", "-c", _CACHED, placement]
    first, second = (
        json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, timeout=300).stdout)
        for _ in range(2)
    )
    assert (first["hits"], first["misses"]) == (0, 1)
    assert (second["hits"], second["misses"]) == (1, 0)
    assert second["dkernel"] == first["dkernel"]
