"""How the operators are divided among devices.

Images and channels are independent of one another, so a shard of the batch or of the channels needs nothing from the
other devices. A shard of the height or of the width needs the rows around it: see `halos`. The filter gradient adds up
its sums over the shards of the batch, the height and the width. Taps are not divided: a filter that comes in so is
gathered (in explicit mode: refused).

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

from jax_dwsconv import halos
from jax_dwsconv._geometry import Size, Window
from jax_dwsconv.halos import Axes, Dimension


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
        """Whether shards of the batch, the height and the width give partial sums."""
        return self.roles[-1] == "kernel"


_VECTORS = ("scale", "bias")


class Division(NamedTuple):
    """The mesh axes that divide the batch, and with `grouped` the filters along with it, and the other dimensions."""

    batch: Axes
    channels: Axes
    grouped: bool
    height: Axes = ()
    width: Axes = ()

    def spec(self, role: str, window: Window) -> PartitionSpec:
        """How an operand or a result is divided."""
        batch, channels = self.batch or None, self.channels or None
        if role == "kernel":
            return PartitionSpec(*window.filter_shape(batch if self.grouped else None, (None, None), channels))
        if role in _VECTORS:
            return PartitionSpec(channels)
        return PartitionSpec(*window.activation_shape(batch, (self.height or None, self.width or None), channels))

    @property
    def summed(self) -> Axes:
        """The axes over which the filter gradient adds up."""
        return (() if self.grouped else self.batch) + self.height + self.width


def _groups(operator: Operator, shapes, params: dict):
    return shapes[1][0] if operator.roles[1] == "kernel" else params["groups"]


def _axes(spec, dimension: int) -> Axes:
    entry = spec[dimension] if dimension < len(spec) else None
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _dimensions(role: str, window: Window, groups) -> dict[str, int]:
    """Where an operand has what can be divided. The filters, where there are several, go with the batch."""
    if role in _VECTORS:
        return {"channels": 0}
    if role == "kernel":
        return {"channels": window.filter_channel_axis, **({"batch": 0} if groups > 1 else {})}
    height, width = window.layout.index("H"), window.layout.index("W")
    return {"batch": 0, "channels": window.channel_axis, "height": height, "width": width}


def _sizes(operator: Operator, params: dict, shapes) -> tuple[Size, Size, Size]:
    """Spatial sizes of x, of y and of the kernel."""
    window, found = params["window"], dict(zip(operator.roles[:2], shapes, strict=False))
    kernel = params["kernel_size"] if operator.sums_over_batch else window.kernel_size(found["kernel"])
    x = window.spatial(found["x"]) if "x" in found else params["input_size"]
    return x, window.output_size(x, kernel), kernel


def _divide(operator: Operator, params: dict, shapes, specs, axis_sizes: dict[str, int], *, evenly: bool) -> Division:
    """The division that fits the operands' shardings best.

    Batch and channels must divide evenly. With `evenly`, height and width must, too; without it, every device must only
    have something of them.
    """
    window, roles = params["window"], operator.roles[:-1]
    groups = _groups(operator, shapes, params)
    found: dict[str, Axes] = {}
    for role, spec in zip(roles, specs, strict=True):
        for kind, dimension in _dimensions(role, window, groups).items():
            found[kind] = found.get(kind) or _axes(spec, dimension)
    channels = min(s[_dimensions(r, window, groups)["channels"]] for r, s in zip(roles, shapes, strict=True))
    if "x" not in roles:
        channels //= params["multiplier"]
    x, y, _ = _sizes(operator, params, shapes)
    sizes = {"batch": (shapes[0][0] if groups == 1 else groups,), "channels": (channels,)}
    sizes |= {"height": (x[0], y[0]), "width": (x[1], y[1])}
    division, used = {}, set()
    for kind, dimensions in sizes.items():
        axes = tuple(axis for axis in found.get(kind, ()) if axis not in used)
        parts = _count(axes, axis_sizes)
        must_be_even = evenly or kind in ("batch", "channels")
        fits = all(n % parts == 0 if must_be_even else n >= parts for n in dimensions)
        division[kind] = axes if fits else ()
        used |= set(division[kind])
    return Division(**division, grouped=groups > 1)


def _count(axes: Axes, axis_sizes: dict[str, int]) -> int:
    return math.prod(axis_sizes[axis] for axis in axes)


def _run_shard(operator: Operator, run: Callable, params: dict, division: Division, shapes, axis_sizes, *operands):
    """The operator on one device's shards of its operands, which have these shapes as a whole."""
    x, y, kernel = _sizes(operator, params, shapes)
    if division.grouped and "groups" in params:
        params = {**params, "groups": params["groups"] // _count(division.batch, axis_sizes)}
    window, transposed = params["window"], operator.roles[0] == "y"
    divided, zero = {}, params["quantization"].x_zero_point if "quantization" in params else 0
    # The last one need not be copied: the height, whose rows lie together.
    for i, axes in ((1, division.width), (0, division.height)):
        if axes:
            source, target = (y[i], x[i]) if transposed else (x[i], y[i])
            reach = window.dilation[i] * (kernel[i] - 1) + 1
            low = window.padding[i][0]
            divided[i] = Dimension(axes, axis_sizes, source, target, window.strides[i], reach, low, transposed, zero)
    aligned = [i for i, role in enumerate(operator.roles[1:-1], 1) if role in ("y", "residual")]
    on_shard = functools.partial(halos.on_blocks, run, divided=divided, aligned=aligned)
    if not (operator.sums_over_batch and division.summed):
        return on_shard(operands, params)
    out_dtype = params["out_dtype"]
    sums = on_shard(operands, {**params, "out_dtype": jnp.promote_types(out_dtype, jnp.float32)})
    return lax.psum(sums, division.summed).astype(out_dtype)


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
    division = _divide(operator, params, shapes, specs, dict(mesh.shape), evenly=False)
    needs, gives = division_specs(operator, division, window)

    def shard(*operands):
        return _run_shard(operator, run, params, division, shapes, dict(mesh.shape), *operands)

    return mesh, shard, NamedSharding(mesh, gives), tuple(NamedSharding(mesh, spec) for spec in needs)


def division_specs(operator: Operator, division: Division, window: Window):
    """The specs of the operands and of the result."""
    *needs, gives = (division.spec(role, window) for role in operator.roles)
    return tuple(needs), gives


def _partition_without_names(operator: Operator, run: Callable, params, mesh, operands, result):
    """Inside a shard_map over some of the axes, XLA gives shardings without names for the others.

    No axis can be named there in a sum or for a halo, so sums over a divided batch, heights and widths are not divided;
    all else keeps the division that it has, if the shards fit together.
    """
    undivided = {"height", "width"} | ({"batch"} if operator.sums_over_batch else set())
    groups = _groups(operator, [x.shape for x in operands], params)
    needs_names = any(
        kind in undivided and _is_divided(x.sharding, dimension)
        for role, x in zip(operator.roles, (*operands, result), strict=True)
        for kind, dimension in _dimensions(role, params["window"], groups).items()
    )
    run, shardings, result_sharding = functools.partial(run, **params), [x.sharding for x in operands], result.sharding
    if needs_names or not _shards_fit(run, operands, result):
        shardings = [type(s).get_replicated(s._device_assignment) for s in shardings]
        result_sharding = shardings[0]
    return mesh, run, result_sharding, tuple(shardings)


def _shards_fit(run: Callable, operands, result) -> bool:
    try:
        shards = [jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype) for x in operands]
        return jax.eval_shape(run, *shards).shape == result.sharding.shard_shape(result.shape)
    except ValueError:
        return False


def _is_divided(sharding, dimension: int) -> bool:
    parts = sharding._hlo_sharding  # without names, this is all there is
    return not parts.is_replicated() and parts.tile_assignment_dimensions()[dimension] > 1


def _every_axis_divides(mesh, size: int) -> bool:
    """Whether a factor of this size is never divided by a part of a mesh axis, for which jax has no notation."""
    return all(size % axis_size == 0 for axis_size in mesh.shape.values())


def _sharding_rule(operator: Operator, params, mesh, operand_types, result_types):
    """The rule by which shardings spread: an einsum over the dimensions, with the factors that must not be divided."""
    params, window = dict(params), dict(params)["window"]
    shapes = dict(zip(operator.roles, (tuple(t.shape) for t in (*operand_types, *result_types)), strict=True))
    groups, images = shapes["kernel"][0], shapes["x"][0]
    channels, outputs = shapes["x"][window.channel_axis], shapes["y"][window.channel_axis]
    undivided = {"i", "j", "m"}
    sizes = {}
    # Rows of x and of y go together, whatever their numbers, where they are enough for some axis.
    x_factors, y_factors = ["h", "w"], ["h", "w"]
    fewest = min((size for size in mesh.shape.values() if size > 1), default=1)
    for i, (x, y) in enumerate(zip(window.spatial(shapes["x"]), window.spatial(shapes["y"]), strict=True)):
        if min(x, y) < fewest:
            y_factors[i] = "yz"[i]
            undivided |= {x_factors[i], y_factors[i]}
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
        "x": window.activation_shape(batch, x_factors, "c"),
        "kernel": window.filter_shape(filters, ("i", "j"), output_channels),
        "y": window.activation_shape(batch, y_factors, output_channels),
        "scale": (output_channels,),
        "bias": (output_channels,),
    }
    dimensions["residual"] = dimensions["y"]
    *operands, result = (" ".join(dimensions[role]) for role in operator.roles)
    rule = f"{', '.join(operands)} -> {result}"
    appearing = list(dict.fromkeys(factor for factor in rule if factor.isalpha()))
    summed = {"n", "h", "w"} - undivided if operator.sums_over_batch else set()
    special = {
        "reduction_factors": tuple(f for f in appearing if f in summed),
        "need_replication_factors": tuple(f for f in appearing if f in undivided),
        "permutation_factors": tuple(f for f in appearing if f in {"h", "w"} - undivided - summed),
    }
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
        kinds = {dimension: kind for kind, dimension in _dimensions(role, window, groups).items()}
        for dimension in range(len(operand.shape)):
            axes = _axes(operand.sharding.spec, dimension)
            if axes and dimension not in kinds:
                raise ValueError(
                    f"{operator.name}: dimension {dimension} of {role} {operand.shape} is sharded over {axes}, but in "
                    "explicit mode taps and filters must not be; use jax.sharding.reshard on it first, or auto axes"
                )
            if axes:
                kind = kinds[dimension]
                other_role, other_axes = found.setdefault(kind, (role, axes))
                if other_axes != axes:
                    raise ValueError(
                        f"{operator.name}: the {kind} of {other_role} and {role} are sharded over different mesh axes, "
                        f"{other_axes} and {axes}; use jax.sharding.reshard on one of them first"
                    )
    shapes, specs = [t.shape for t in types], [t.sharding.spec for t in types]
    division = _divide(operator, params, shapes, specs, dict(mesh.shape), evenly=True)
    for kind, (role, axes) in found.items():
        if getattr(division, kind) != axes:
            raise ValueError(
                f"{operator.name}: operands of shapes {', '.join(map(str, shapes))} cannot be divided as their types "
                f"ask, the {kind} of {role} over {axes}: parts of operands and result must be equal, and an axis can "
                "divide one dimension only; use jax.sharding.reshard first, or auto axes"
            )
    return division


def in_explicit_mode(operator: Operator, run: Callable, operands, params: dict) -> jax.Array:
    """`run(*operands, **params)` for operands whose types have explicit shardings."""
    types = [jax.typeof(x) for x in operands]
    mesh = explicit_mesh(*types)
    division = explicit_division(operator, params, mesh, *types)
    needs, gives = division_specs(operator, division, params["window"])
    explicit = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}
    shapes = [t.shape for t in types]
    operands = (jax.sharding.reshard(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, needs, strict=True))
    on_shard = functools.partial(_run_shard, operator, run, params, division, shapes, dict(mesh.shape))
    return jax.shard_map(on_shard, mesh=mesh, in_specs=needs, out_specs=gives, axis_names=explicit)(*operands)
