"""Writes separable_v1.bin, an exported program that every later version of this package must run.

Only a new version of a custom-call target gets a new artefact; one that exists is never written again. Run it with the
oldest supported JAX, because a program runs with the JAX that exported it and with later ones:

    python -P tests/data/make_artefact.py separable_v2.bin
"""

import sys
from pathlib import Path

import jax
from jax import numpy as jnp

import jax_dwsconv


def separable(x: jax.Array, depthwise: jax.Array, pointwise: jax.Array) -> jax.Array:
    """A strided depthwise convolution with multiplier 2, and a pointwise one."""
    y = jax_dwsconv.depthwise_conv2d(x, depthwise, strides=2, padding=((0, 1), (1, 2)))
    return jnp.einsum("nhwc,cd->nhwd", y, pointwise, precision="highest")


def main(name: str) -> None:
    jax.config.update("jax_traceback_in_locations_limit", 0)  # no source paths in the file
    (batch,) = jax.export.symbolic_shape("b")
    shapes = (batch, 7, 6, 4), (3, 3, 1, 8), (8, 5)
    exported = jax.export.export(
        jax.jit(separable), platforms=("cpu", "cuda"), disabled_checks=jax_dwsconv.disabled_export_checks()
    )(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    (Path(__file__).parent / name).write_bytes(exported.serialize(vjp_order=1))


if __name__ == "__main__":
    main(sys.argv[1])
