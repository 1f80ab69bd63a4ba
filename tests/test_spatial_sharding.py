"""Height and width divided: halos come from the neighbours, and nothing is gathered. Auto and explicit mode."""

import dataclasses
import functools
import math
import random
from collections.abc import Iterator

import jax
import meshes
import numerics
import numpy as np
import pytest
from cases import OPERATORS, ROLES, Case
from jax import lax, numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P

import jax_dwsconv
from jax_dwsconv.partitioning import Division

HALO = {"collective-permute", "all-reduce"}
MESHES = ((8,), (2, 4), (4, 2), (2, 2, 2))
KINDS = ("batch", "channels", "height", "width")


def _axes(division: Division, kind: str) -> int:
    return getattr(division, kind)


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
            padding=tuple((choose((0, k // 2, k // 2, k - 1, -1)), choose((0, k // 2, k // 2, 2, -2))) for k in kernel_size),
            dilation=(choose((1, 1, 2)), choose((1, 1, 3))),
            layout=choose(("NHWC", "NCHW")),
            filter_layout=choose(("HWO", "OHW")),
            groups=groups,
            dtypes=choose((("float32",) * 3, ("bfloat16", "float32", "bfloat16"))),
        )
        spatial = zip(("height", "width"), case.size, case.output_size, strict=True)
        fits = all(y >= parts and x % parts == y % parts == 0 for kind, x, y in spatial for parts in [_parts(mesh_shape, axes[kind])])
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


@pytest.mark.parametrize(("mesh_shape", "division", "case"), _generated(60))
@pytest.mark.parametrize("operator", OPERATORS)
def test_generated(operator, mesh_shape, division, case):
    _check(mesh_shape, division, case, operator)


@pytest.mark.parametrize(("mesh_shape", "division", "case"), _generated(20, seed=1))
@pytest.mark.parametrize("operator", OPERATORS)
def test_explicit_mode(operator, mesh_shape, division, case):
    result = _check(mesh_shape, division, case, operator, AxisType.Explicit)
    assert jax.typeof(result).sharding.spec == _specs(case, operator, division)[-1]
