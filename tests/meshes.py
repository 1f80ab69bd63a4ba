"""Meshes of eight devices (see conftest.py), and what XLA sends between them."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|all-to-all|collective-broadcast|collective-permute|ragged-all-to-all|reduce-scatter)"
    r"(?:-start)?\("
)
_PERMUTED = re.compile(r"= \w+\[([\d,]*)\]\S* collective-permute\(")


def make(*shape: int, axis_type: AxisType = AxisType.Auto, platform: str = "cpu") -> Mesh:
    """A mesh of this shape with the axes "a", "b" and so on."""
    devices = jax.devices(platform)[: math.prod(shape)]
    return jax.make_mesh(shape, tuple("abc"[: len(shape)]), (axis_type,) * len(shape), devices=devices)


def place(mesh: Mesh, *operands_and_specs) -> list[jax.Array]:
    """The arrays on the mesh, each divided by its own spec: place(mesh, (x, P("a")), (y, P()))."""
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in operands_and_specs]


def is_divided(x: jax.Array, spec: PartitionSpec, mesh: Mesh) -> bool:
    """Whether an array has this sharding."""
    return x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


def run(function: Callable, *args) -> tuple[Any, Counter[str]]:
    """The result of the jitted function, and how often each collective occurs in what XLA makes of it."""
    compiled = jax.jit(function).lower(*args).compile()
    return compiled(*args), Counter(_COLLECTIVE.findall(compiled.as_text()))


def permuted(function: Callable, *args) -> int:
    """How many elements a device sends to others by the collective-permutes of the jitted function."""
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes = [[int(n) for n in shape.split(",")] for shape in _PERMUTED.findall(text)]
    assert len(shapes) == Counter(_COLLECTIVE.findall(text))["collective-permute"]
    return sum(map(math.prod, shapes))
