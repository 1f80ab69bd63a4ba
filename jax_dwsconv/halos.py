"""Halos: what a device needs of its neighbours where the height or the width of an image is divided.

Along one dimension, let x have n rows and y have m, and let a device be number p of `parts`: it has the rows
[p b, p b + b) of x and [p c, p c + c) of y, with b = ceil(n / parts) and c = ceil(m / parts). For stride s, `low` zeros
before the first row, and a kernel that reaches over r = dilation * (taps - 1) + 1 rows,

    row t of y reads some of the rows [t s - low, t s - low + r) of x, so that
    row i of x is read by some of the rows [ceil((i + low - r + 1) / s), floor((i + low) / s)] of y.

The first line says which rows of their source, x, forward and grad_filter need for rows of their target, y; the second
says it of grad_input, whose source is y. What of them lies outside of the device's block is the halo, and it comes from
as many neighbours as it covers; outside of the array there are zeros, or what stands for them in an int8 array.

Applied to the rows [x0, x1) of x and [y0, y1) of y alone, an operator is that of the whole with the padding

    low' = low + x0 - y0 s,    high' = (y1 - y0 - 1) s + r - (x1 - x0) - low'    (a negative number crops).

Where b = c s, the first rows of both blocks are as far apart on every device, low' is the same, and the operator runs
on the block as it is, then again on the few rows at its ends that need a halo: nothing large is copied, and most of the
work can be done while the halos are under way. Otherwise it runs on a copy of the block that includes them.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import lax, numpy as jnp

from jax_dwsconv import _arguments
from jax_dwsconv._geometry import Window

Axes = tuple[str, ...]
Rows = tuple[int, int]  # the first, and the one after the last


class Dimension(NamedTuple):
    """A dimension of an operator that is divided among devices.

    Attributes:
      axes: of the mesh, that divide it, the major one first.
      mesh: the sizes of all axes of the mesh, in its order.
      source: whole size of operand 0, which is x, or y for grad_input.
      target: whole size of y, or of x for grad_input.
      stride: of the window.
      reach: of the kernel.
      low: padding before.
      transposed: for grad_input.
      zero: what the source has for zero.
    """

    axes: Axes
    mesh: dict[str, int]
    source: int
    target: int
    stride: int
    reach: int
    low: int
    transposed: bool = False
    zero: int = 0

    @property
    def parts(self) -> int:
        """Into how many it is divided."""
        return math.prod(self.mesh[axis] for axis in self.axes)

    @property
    def blocks(self) -> tuple[int, int]:
        """How many rows of the source and of the target a device has."""
        return -(-self.source // self.parts), -(-self.target // self.parts)

    def needed(self, targets: Rows) -> Rows:
        """The rows of the source that rows of the target need."""
        first, last = targets[0], targets[1] - 1
        if self.transposed:
            return -((self.reach - 1 - self.low - first) // self.stride), (last + self.low) // self.stride + 1
        return first * self.stride - self.low, last * self.stride - self.low + self.reach

    def padding(self, sources: Rows, targets: Rows) -> tuple[int, int]:
        """The padding with which these rows of the source give these rows of the target."""
        (x0, x1), (y0, y1) = (targets, sources) if self.transposed else (sources, targets)
        low = self.low + x0 - y0 * self.stride
        return low, (y1 - y0 - 1) * self.stride + self.reach - (x1 - x0) - low

    def permute(self, x: jax.Array, shift: int) -> jax.Array:
        """What the device `shift` places before has, or zeros where there is none."""
        # ppermute numbers devices in the order of the mesh, whatever that of the axes is.
        axes = tuple(axis for axis in self.mesh if axis in self.axes)
        numbers = np.arange(self.parts).reshape([self.mesh[axis] for axis in axes])
        numbers = numbers.transpose([axes.index(axis) for axis in self.axes]).ravel()
        pairs = zip(numbers[max(0, -shift) :], numbers[max(0, shift) :], strict=False)
        return lax.ppermute(x, axes, [(int(sender), int(receiver)) for sender, receiver in pairs])

    def inner(self) -> Rows | None:
        """The targets in a block that need no halo. None where most do, or where devices differ."""
        source, target = self.blocks
        x, y = (target, source) if self.transposed else (source, target)
        start = next((t for t in range(target) if self.needed((t, t + 1))[0] >= 0), target)
        stop = next((t for t in range(target, 0, -1) if self.needed((t - 1, t))[1] <= source), 0)
        return (start, stop) if x == y * self.stride and 2 * (stop - start) >= target else None


def exchange_halos(
    x: jax.Array,
    axis_names: Sequence[str | Axes | None],
    kernel_size: int | Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding="SAME",
    dilation: int | Sequence[int] = 1,
    data_format: str | None = None,
    zero_point: int = 0,
) -> tuple[jax.Array, tuple[tuple[int, int], ...]]:
    """A device's part of an image, and what a convolution of it reads of the neighbours' parts. For `jax.shard_map`.

    The convolution of the result, with the returned padding and the same strides and dilation, is this device's part of
    the convolution of the whole image. Only the rows and columns that it reads are sent, by collective-permutes, to as
    many neighbours as need them. Differentiable to any order: gradients go back the same way.

    Args:
      x: this device's part, (..., H, W, C) or (..., C, H, W), or in one dimension (..., W, C) or (..., C, W). All
        devices have parts of the same size.
      axis_names: for every spatial axis the mesh axis or axes that divide it, or None.
      kernel_size: of the convolution, an int or one for every spatial axis.
      strides: as `depthwise_conv2d`.
      padding: as `depthwise_conv2d`, of the whole image.
      dilation: as `depthwise_conv2d`.
      data_format: "NHWC" (the default) or "NCHW"; in one dimension "NWC" (the default) or "NCW".
      zero_point: what an int8 x has for zero, and what is around the image therefore.

    Returns:
      The larger part, and the padding for it: (low, high) for every spatial axis, (0, 0) for the divided ones.

    Raises:
      ValueError: the whole result cannot be divided evenly, or an argument does not fit.
    """
    rank = len(axis_names)
    if isinstance(axis_names, str) or rank not in (1, 2):
        raise ValueError(f"axis_names must be a sequence with an entry for each of 1 or 2 axes, got {axis_names!r}")
    data_format = _arguments.data_format(data_format, rank)
    kernel_size = _arguments.per_axis("kernel_size", kernel_size, rank)
    strides = _arguments.per_axis("strides", strides, rank)
    dilation = _arguments.per_axis("dilation", dilation, rank)
    names = [() if name is None else name if isinstance(name, tuple) else (name,) for name in axis_names]
    mesh = dict(jax.sharding.get_abstract_mesh().shape)
    if unknown := [axis for axes in names for axis in axes if axis not in mesh]:
        raise ValueError(f"axis_names: {unknown[0]!r} is no axis of the mesh of a shard_map around this, {tuple(mesh)}")
    parts = [math.prod(mesh[axis] for axis in axes) for axes in names]
    at = [data_format.index(letter) - len(data_format) for letter in data_format if letter in "HW"]
    whole = [x.shape[axis] * n for axis, n in zip(at, parts, strict=True)]
    pairs = list(_arguments.padding_pairs(padding, whole, kernel_size, strides, dilation))
    for i, axes in enumerate(names):
        if not axes:
            continue
        reach = dilation[i] * (kernel_size[i] - 1) + 1
        size = max(0, (whole[i] + sum(pairs[i]) - reach) // strides[i] + 1)
        if size % parts[i] or size == 0:
            raise ValueError(
                f"spatial axis {i} of size {whole[i]}, in {parts[i]} parts, has a result of size {size}, which cannot "
                "be divided evenly; use another padding, such as 'SAME'"
            )
        dimension = Dimension(axes, mesh, whole[i], size, strides[i], reach, pairs[i][0], zero=zero_point)
        x, *_ = _with_halo(x, at[i] % x.ndim, dimension)
        pairs[i] = (0, 0)
    return x, tuple(pairs)


def on_blocks(run: Callable, operands: Sequence[jax.Array], params: dict, divided: dict[int, Dimension], aligned):
    """An operator on one device's blocks of its operands, with the halos that it needs.

    Args:
      run: the operator on one device.
      operands: its operands, the source first.
      params: its parameters for the whole arrays.
      divided: the divided dimensions, by 0 for the height and 1 for the width.
      aligned: which operands have the rows of the target: a residual, or the second one of grad_filter, whose result is
        the sum over the device's own rows.
    """
    if not divided:
        return run(*operands, **params)
    (index, dimension), *rest = divided.items()
    at = params["window"].layout.index("HW"[index])
    adds = "kernel_size" in params
    operands = list(operands)
    size, count = dimension.blocks
    if dimension.source % dimension.parts:
        operands[0] = _inside(operands[0], at, dimension, dimension.source, 0, size)
    if adds and dimension.target % dimension.parts:
        operands[1] = _inside(operands[1], at, dimension, dimension.target, 0, count)

    def on_rows(source, sources: Rows, targets: Rows):
        of_targets = [lax.slice_in_dim(x, *targets, axis=at) if i in aligned else x for i, x in enumerate(operands)]
        local = _local(params, index, dimension, sources, targets)
        return on_blocks(run, (source, *of_targets[1:]), local, dict(rest), aligned)

    inner = None if rest else dimension.inner()
    if inner is None:
        source, sources, targets, places = _with_halo(operands[0], at, dimension)
        result = on_rows(source, sources, targets)
        return result if adds else _from_place(result, at, dimension, places, count)

    def on_own_rows(sources: Rows, targets: Rows):
        return on_rows(_rows(operands[0], at, dimension, sources), sources, targets)

    first, last = dimension.needed((0, count))
    result = on_own_rows((0, size), (0, count))
    for halo, targets in (((first, 0), (0, inner[0])), ((size, last), (inner[1], count))):
        if targets[0] == targets[1]:
            continue
        if adds:
            result += on_own_rows(halo, targets)
        else:
            start, stop = dimension.needed(targets)
            strip = on_own_rows((min(start, size), max(stop, 0)), targets)
            result = lax.dynamic_update_slice_in_dim(result, strip, targets[0], at)
    return result


def _local(params: dict, index: int, dimension: Dimension, sources: Rows, targets: Rows) -> dict:
    """The parameters of the operator on some of the rows."""

    def replaced(pair, value):
        return tuple(value if i == index else v for i, v in enumerate(pair))

    window: Window = params["window"]
    padding = replaced(window.padding, dimension.padding(sources, targets))
    params = {**params, "window": window._replace(padding=padding)}
    if dimension.transposed:
        params["input_size"] = replaced(params["input_size"], targets[1] - targets[0])
    return params


def _with_halo(source, at: int, dimension: Dimension):
    """A copy of the source's block with all that its targets need.

    Returns:
      The copy; what rows of the source and of the target to take it for; and for every device where in the result its
      own targets begin. That is not 0 only for grad_input, if blocks are no multiple of the stride: then the padding
      would not be the same on every device, and up to a stride more rows are computed. Without that the rows of the
      target are counted from the start of the block.
    """
    size, count = dimension.blocks
    blocks = [(p * count, (p + 1) * count) for p in range(dimension.parts)]
    needed = [dimension.needed(block) for block in blocks]
    length = max(1, *(stop - start for start, stop in needed))
    # Relative to the block of the source that a device has.
    starts = [start - p * size for p, (start, _) in enumerate(needed)]
    before, after = max(0, -min(starts)), max(0, max(starts) + length - size)
    with_halo = _rows(source, at, dimension, (-before, size + after))
    copy = _from_place(with_halo, at, dimension, [before + start for start in starts], length)
    lows = [dimension.padding(*rows)[0] for rows in zip(needed, blocks, strict=True)]
    places = [low - min(lows) for low in lows]
    start, target = needed[places.index(0)][0], blocks[places.index(0)][0]
    return copy, (start, start + length), (target, target + count + max(places)), places


def _from_place(x, at: int, dimension: Dimension, places: Sequence[int], length: int):
    """`length` rows, from a place that every device has of its own."""
    if len(set(places)) == 1:
        return lax.slice_in_dim(x, places[0], places[0] + length, axis=at)
    place = jnp.asarray(places)[lax.axis_index(dimension.axes)]
    return lax.dynamic_slice_in_dim(x, place, length, axis=at)


def _inside(x, at: int, dimension: Dimension, size: int, first: int, block: int):
    """Zero for the rows of x that lie outside of the array; the first one is row `first` of the device's block."""
    row = lax.axis_index(dimension.axes) * block + first + lax.broadcasted_iota(jnp.int32, x.shape, at)
    return jnp.where((row >= 0) & (row < size), x, jnp.asarray(dimension.zero, x.dtype))


def _rows(x, at: int, dimension: Dimension, rows: Rows):
    """Rows of the array, counted from the start of the device's block: its own ones and its neighbours'."""
    size, (start, stop) = x.shape[at], rows
    before, after = _neighbours(x, at, dimension, -1, -start), _neighbours(x, at, dimension, 1, stop - size)
    own = [lax.slice_in_dim(x, max(start, 0), min(stop, size), axis=at)] if stop > 0 and start < size else []
    pieces = [*reversed(before), *own, *after]
    found = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, at)
    is_zero = dimension.zero == 0 or not (before or after)  # outside of the array
    return found if is_zero else _inside(found, at, dimension, dimension.source, start, size)


def _neighbours(x, at: int, dimension: Dimension, side: int, count: int) -> list:
    """The `count` rows before (side -1) or after (1) the block, one piece for each neighbour, the nearest first."""
    size, others, pieces = x.shape[at], dimension.parts - 1, []
    for hop in range(1, others + 1):
        rows = min(size, count - (hop - 1) * size)
        if rows > 0:
            edge = lax.slice_in_dim(x, *((size - rows, size) if side < 0 else (0, rows)), axis=at)
            pieces.append(dimension.permute(edge, -side * hop))
    beyond = count - others * size  # of the array, whichever device this is
    if beyond > 0:
        pieces.append(jnp.zeros((*x.shape[:at], beyond, *x.shape[at + 1 :]), x.dtype))
    return pieces
