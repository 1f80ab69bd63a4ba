"""How the operators are divided among devices.

Images and channels are independent of one another, so a shard of the batch or of the channels needs nothing from the
other devices; only the filter gradient adds up its sums over the shards of the batch. Spatial dimensions and taps are
not divided: an operand that comes in so is gathered (in explicit mode: refused).

In auto mode XLA asks, through `custom_partitioning`, how to divide an operator whose operands' shardings it knows. In
explicit mode the shardings are part of the types, and the operator is a `shard_map` over them.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax, numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_dwsconv._geometry import Window

Axes = tuple[str, ...]


class Operator(NamedTuple):
    """What the operands and the result of an operator are in the forward convolution.

    Attributes:
      name: of the operator.
      roles: "x", "kernel" or "y", or for what follows the sums "scale", "bias" (vectors of output channels) or
        "residual" (like y). The result's comes last.
    """

    name: str
    roles: tuple[str, ...]

    def of(self, params: dict) -> "Operator":
        """The operator with the operands that `params` adds to the first two."""
        return self._replace(roles=(*self.roles[:2], *params.get("parts", ()), self.roles[-1]))

    @property
    def sums_over_batch(self) -> bool:
        """Whether shards of the batch give partial sums."""
        return self.roles[-1] == "kernel"


_VECTORS = ("scale", "bias")


class Division(NamedTuple):
    """The mesh axes that divide the batch, and with `grouped` the filters along with it, and the channels."""

    batch: Axes
    channels: Axes
    grouped: bool

    def spec(self, role: str, window: Window) -> PartitionSpec:
        """How an operand or a result is divided."""
        batch, channels = self.batch or None, self.channels or None
        if role == "kernel":
            return PartitionSpec(*window.filter_shape(batch if self.grouped else None, (None, None), channels))
        if role in _VECTORS:
            return PartitionSpec(channels)
        return PartitionSpec(*window.activation_shape(batch, (None, None), channels))


def _groups(operator: Operator, shapes, params: dict):
    return shapes[1][0] if operator.roles[1] == "kernel" else params["groups"]


def _axes(spec, dimension: int) -> Axes:
    entry = spec[dimension] if dimension < len(spec) else None
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _dimensions(role: str, window: Window, groups) -> tuple[int | None, int]:
    """Where an operand has its batch (or its filters, where there are several) and its channels."""
    if role in _VECTORS:
        return None, 0
    if role == "kernel":
        return 0 if groups > 1 else None, window.filter_channel_axis
    return 0, window.channel_axis


def _divide(operator: Operator, params: dict, shapes, specs, axis_sizes: dict[str, int]) -> Division:
    """The division that fits the operands' shardings best; what does not divide evenly is not divided."""
    window, roles = params["window"], operator.roles[:-1]
    groups = _groups(operator, shapes, params)
    batch, channels = (), ()
    for role, spec in zip(roles, specs, strict=True):
        batch_at, channels_at = _dimensions(role, window, groups)
        if batch_at is not None:
            batch = batch or _axes(spec, batch_at)
        channels = channels or _axes(spec, channels_at)
    channels = tuple(axis for axis in channels if axis not in batch)
    images = shapes[0][0] if groups == 1 else groups
    smallest_channels = min(s[_dimensions(r, window, groups)[1]] for r, s in zip(roles, shapes, strict=True))
    if "x" not in roles:
        smallest_channels //= params["multiplier"]
    batch = batch if images % _count(batch, axis_sizes) == 0 else ()
    channels = channels if smallest_channels % _count(channels, axis_sizes) == 0 else ()
    return Division(batch, channels, groups > 1)


def _count(axes: Axes, axis_sizes: dict[str, int]) -> int:
    return math.prod(axis_sizes[axis] for axis in axes)


def _run_shard(operator: Operator, run: Callable, params: dict, division: Division, shards: int, *operands):
    """The operator on one device's shards of its operands. `shards` is how many parts the batch has."""
    if division.grouped and "groups" in params:
        params = {**params, "groups": params["groups"] // shards}
    if not (operator.sums_over_batch and division.batch) or division.grouped:
        return run(*operands, **params)
    out_dtype = params["out_dtype"]
    sums = run(*operands, **{**params, "out_dtype": jnp.promote_types(out_dtype, jnp.float32)})
    return lax.psum(sums, division.batch).astype(out_dtype)


# Auto mode -----------------------------------------------------------------------------------------------------------


def in_auto_mode(operator: Operator, run: Callable) -> Callable:
    """`run(*operands, **params)` as a function of (params, *operands) that XLA can divide."""

    def whole(params, *operands):
        return run(*operands, **dict(params))

    whole.__name__ = f"dwsconv_{operator.name}"
    divisible = custom_partitioning(whole, static_argnums=(0,))
    divisible.def_partition(
        partition=functools.partial(_partition, operator, run),
        sharding_rule=functools.partial(_sharding_rule, operator),
    )
    return divisible


def _partition(operator: Operator, run: Callable, params, mesh, operands, result):
    """What `custom_partitioning` asks for: the shard's function, and the shardings it needs and gives."""
    params, window = dict(params), dict(params)["window"]
    shardings = [operand.sharding for operand in operands]
    if not all(isinstance(sharding, NamedSharding) for sharding in shardings):
        return _partition_without_names(operator, run, params, mesh, operands, result)
    specs, shapes = [sharding.spec for sharding in shardings], [operand.shape for operand in operands]
    division = _divide(operator, params, shapes, specs, dict(mesh.shape))
    shards = _count(division.batch, dict(mesh.shape))
    needs, gives = division_specs(operator, division, window)

    def shard(*operands):
        return _run_shard(operator, run, params, division, shards, *operands)

    return mesh, shard, NamedSharding(mesh, gives), tuple(NamedSharding(mesh, spec) for spec in needs)


def division_specs(operator: Operator, division: Division, window: Window):
    """The specs of the operands and of the result."""
    *needs, gives = (division.spec(role, window) for role in operator.roles)
    return tuple(needs), gives


def _partition_without_names(operator: Operator, run: Callable, params, mesh, operands, result):
    """Inside a shard_map over some of the axes, XLA gives shardings without names for the others.

    No axis can be named in a sum there, so sums over a divided batch are not divided; all else keeps the division that
    it has, if the shards fit together.
    """
    run, shardings, result_sharding = functools.partial(run, **params), [x.sharding for x in operands], result.sharding
    sums = operator.sums_over_batch and any(_divides_batch(sharding) for sharding in shardings)
    if sums or not _shards_fit(run, operands, result):
        shardings = [type(s).get_replicated(s._device_assignment) for s in shardings]
        result_sharding = shardings[0]
    return mesh, run, result_sharding, tuple(shardings)


def _shards_fit(run: Callable, operands, result) -> bool:
    try:
        shards = [jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype) for x in operands]
        return jax.eval_shape(run, *shards).shape == result.sharding.shard_shape(result.shape)
    except ValueError:
        return False


def _divides_batch(sharding) -> bool:
    parts = sharding._hlo_sharding  # without names, this is all there is
    return not parts.is_replicated() and parts.tile_assignment_dimensions()[0] > 1


def _every_axis_divides(mesh, size: int) -> bool:
    """Whether a factor of this size is never divided by a part of a mesh axis, for which jax has no notation."""
    return all(size % axis_size == 0 for axis_size in mesh.shape.values())


def _sharding_rule(operator: Operator, params, mesh, operand_types, result_types):
    """The rule by which shardings spread: an einsum over the dimensions, with the factors that must not be divided."""
    params, window = dict(params), dict(params)["window"]
    shapes = dict(zip(operator.roles, (tuple(t.shape) for t in (*operand_types, *result_types)), strict=True))
    groups, images = shapes["kernel"][0], shapes["x"][0]
    channels, outputs = shapes["x"][window.channel_axis], shapes["y"][window.channel_axis]
    undivided = {"h", "w", "i", "j", "y", "z", "m"}
    sizes = {}
    if groups == 1:
        batch, filters = "n", "g"
        undivided |= {"g"}
    elif groups == images:
        batch, filters = "g", "g"
    elif _every_axis_divides(mesh, groups):
        batch, filters = "(g n)", "g"
        sizes["n"] = images // groups
    else:
        batch, filters = "n", "g"
        undivided |= {"g", "n"}
    output_channels = "c"
    if outputs != channels and _every_axis_divides(mesh, channels):
        output_channels = "(c m)"
        sizes["m"] = outputs // channels
    elif outputs != channels:
        output_channels = "m"
        undivided |= {"c"}
    dimensions = {
        "x": window.activation_shape(batch, ("h", "w"), "c"),
        "kernel": window.filter_shape(filters, ("i", "j"), output_channels),
        "y": window.activation_shape(batch, ("y", "z"), output_channels),
        "scale": (output_channels,),
        "bias": (output_channels,),
    }
    dimensions["residual"] = dimensions["y"]
    *operands, result = (" ".join(dimensions[role]) for role in operator.roles)
    rule = f"{', '.join(operands)} -> {result}"
    appearing = list(dict.fromkeys(factor for factor in rule if factor.isalpha()))
    special = {"need_replication_factors": tuple(f for f in appearing if f in undivided)}
    if operator.sums_over_batch and "n" in appearing and "n" not in undivided:
        special["reduction_factors"] = ("n",)
    return rule, sizes | special


# Explicit mode -------------------------------------------------------------------------------------------------------


def is_divided_by_types(*types) -> bool:
    """Whether the types of the operands say how they are divided: in explicit mode, or with all axes manual."""
    if explicit_mesh(*types) is not None:
        return True
    meshes = [t.sharding.mesh for t in types if not t.sharding.mesh.empty]
    return bool(meshes) and all(kind == AxisType.Manual for mesh in meshes for kind in mesh.axis_types)


def explicit_mesh(*types):
    """The mesh of the types if some of its axes are explicit, else None."""
    meshes = (t.sharding.mesh for t in types)
    return next((mesh for mesh in meshes if not mesh.empty and AxisType.Explicit in mesh.axis_types), None)


def result_sharding(operator: Operator, params: dict, *types):
    """The sharding in the type of the result, for operands of these types."""
    mesh = explicit_mesh(*types)
    if mesh is None:
        return types[0].sharding
    division = explicit_division(operator, params, mesh, *types)
    return NamedSharding(mesh, division_specs(operator, division, params["window"])[1])


def explicit_division(operator: Operator, params: dict, mesh, *types) -> Division:
    """The division that the operands' types ask for.

    Raises:
      ValueError: a dimension is divided that the operator does not divide, or the operands do not agree.
    """
    window, groups = params["window"], _groups(operator, [t.shape for t in types], params)
    found: dict[str, tuple[str, Axes]] = {}
    for role, operand in zip(operator.roles, types, strict=False):
        batch_at, channels_at = _dimensions(role, window, groups)
        spec = operand.sharding.spec
        for dimension in range(len(operand.shape)):
            axes = _axes(spec, dimension)
            is_batch = dimension == batch_at
            if axes and not is_batch and dimension != channels_at:
                raise ValueError(
                    f"{operator.name}: dimension {dimension} of {role} {operand.shape} is sharded over {axes}, but in "
                    "explicit mode only the batch and the channels may be; use jax.sharding.reshard on it first, or "
                    "auto axes"
                )
            if axes:
                kind = "batch" if is_batch else "channels"
                other_role, other_axes = found.setdefault(kind, (role, axes))
                if other_axes != axes:
                    raise ValueError(
                        f"{operator.name}: the {kind} of {other_role} and {role} are sharded over different mesh axes, "
                        f"{other_axes} and {axes}; use jax.sharding.reshard on one of them first"
                    )
    axes = {kind: axes for kind, (_, axes) in found.items()}
    division = Division(axes.get("batch", ()), axes.get("channels", ()), groups > 1)
    even = _divide(operator, params, [t.shape for t in types], [t.sharding.spec for t in types], dict(mesh.shape))
    if division != even:
        raise ValueError(
            f"{operator.name}: operands of shapes {', '.join(str(t.shape) for t in types)} cannot be divided into "
            f"equal parts as their types ask, batch over {division.batch} and channels over {division.channels}; use "
            "jax.sharding.reshard first"
        )
    return division


def in_explicit_mode(operator: Operator, run: Callable, operands, params: dict) -> jax.Array:
    """`run(*operands, **params)` for operands whose types have explicit shardings."""
    types = [jax.typeof(x) for x in operands]
    mesh = explicit_mesh(*types)
    division = explicit_division(operator, params, mesh, *types)
    needs, gives = division_specs(operator, division, params["window"])
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    shards = _count(division.batch, dict(mesh.shape))
    operands = (jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, needs, strict=True))
    on_shard = functools.partial(_run_shard, operator, run, params, division, shards)
    return jax.shard_map(on_shard, mesh=mesh, in_specs=needs, out_specs=gives, axis_names=explicit)(*operands)
