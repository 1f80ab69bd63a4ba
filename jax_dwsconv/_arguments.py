"""Checks and normal forms of the arguments of the public functions.

Every error names the argument and says what would work.
"""

import operator
from collections.abc import Sequence

import jax
from jax import numpy as jnp

from jax_dwsconv._geometry import same_padding

_LARGEST = 2**31 - 1  # of a stride, dilation or padding


def as_int(name: str, value, smallest: int) -> int:
    """A Python int from anything that is one, within [smallest, 2**31)."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be made of integers known when the function is traced, got {value!r} of type "
            f"{type(value).__name__}"
        ) from None
    if not smallest <= number <= _LARGEST:
        raise ValueError(f"{name} must be made of integers from {smallest} to {_LARGEST}, got {number}")
    return number


def _has_length(value) -> bool:
    """Whether the value has elements: not so a scalar array, although it has a method for it."""
    return hasattr(value, "__len__") and getattr(value, "ndim", 1) != 0


def per_axis(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One int of at least 1 for every spatial axis; a single int, or None for 1, stands for all of them."""
    if value is None:
        return (1,) * rank
    if not _has_length(value):
        return (as_int(name, value, 1),) * rank
    if len(value) != rank:
        raise ValueError(f"{name} must be an int or {rank} ints, one for every spatial axis, got {value!r}")
    return tuple(as_int(name, v, 1) for v in value)


def padding_pairs(padding, size, kernel_size, strides, dilation) -> tuple[tuple[int, int], ...]:
    """(low, high) for every spatial axis.

    Args:
      padding: "SAME", "SAME_LOWER", "VALID", "CAUSAL" (one spatial axis), an int for both sides of all axes, or for
        every axis an int or a (low, high) pair. Pairs may be negative.
      size: spatial size of the input.
      kernel_size: spatial size of the kernel.
      strides: of the window.
      dilation: of the kernel.
    """
    rank = len(size)
    if isinstance(padding, str):
        name = padding.upper()
        if name == "VALID":
            return ((0, 0),) * rank
        if name in ("SAME", "SAME_LOWER"):
            axes = zip(size, kernel_size, strides, dilation, strict=True)
            return tuple(same_padding(*axis, lower=name == "SAME_LOWER") for axis in axes)
        if name == "CAUSAL":
            if rank != 1:
                raise ValueError(
                    f"padding='CAUSAL' is for one spatial axis, this convolution has {rank}; use (low, high) pairs"
                )
            return ((dilation[0] * (kernel_size[0] - 1), 0),)
        raise ValueError(
            f"padding={padding!r} is unknown; use 'SAME', 'SAME_LOWER', 'VALID', 'CAUSAL' (1d), an int or "
            "(low, high) pairs"
        )
    if not _has_length(padding):
        return ((as_int("padding", padding, -_LARGEST),) * 2,) * rank
    if len(padding) != rank:
        raise ValueError(f"padding must have one entry for each of the {rank} spatial axes, got {padding!r}")
    return tuple(_pair(entry) for entry in padding)


def _pair(entry) -> tuple[int, int]:
    if not _has_length(entry):
        return (as_int("padding", entry, -_LARGEST),) * 2
    if len(entry) != 2:
        raise ValueError(f"padding: every axis needs an int or a (low, high) pair, got {entry!r}")
    return (as_int("padding", entry[0], -_LARGEST), as_int("padding", entry[1], -_LARGEST))


def floating_array(name: str, value) -> jax.Array:
    """The value as an array of a floating dtype."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array, got {type(value).__name__}") from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must have a floating dtype (float32, bfloat16, float16, float64), got {array.dtype}")
    return array


def channel_vector(name: str, value, channels: int) -> jax.Array | None:
    """A vector with one element for every output channel, or a scalar for all of them; None stays None."""
    if value is None:
        return None
    array = floating_array(name, value)
    if array.shape not in ((), (channels,)):
        raise ValueError(
            f"{name} must have shape ({channels},), one element for every output channel, or (), got {array.shape}"
        )
    return array


def like_result(name: str, value, shape, dtype) -> jax.Array:
    """An array of the shape and dtype of the result."""
    array = floating_array(name, value)
    if array.shape != tuple(shape):
        raise ValueError(f"{name} must have the shape of the result, {tuple(shape)}, got {array.shape}")
    if array.dtype != dtype:
        raise TypeError(f"{name} must have the dtype of the result, {dtype}, got {array.dtype}; use astype on it")
    return array


def result_dtype(preferred_element_type, *operands) -> jnp.dtype:
    """The preferred dtype where given, else the promoted dtype of the operands."""
    if preferred_element_type is None:
        return jnp.result_type(*operands)
    try:
        dtype = jax.dtypes.canonicalize_dtype(preferred_element_type)
    except TypeError as error:
        raise TypeError(f"preferred_element_type must be a floating dtype, got {preferred_element_type!r}") from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"preferred_element_type must be a floating dtype, got {dtype}")
    return dtype


def data_format(value: str | None, rank: int) -> str:
    """The layout of the activations: channels last ("NHWC", "NWC"; the default) or channels first ("NCHW", "NCW")."""
    formats = ("NHWC", "NCHW") if rank == 2 else ("NWC", "NCW")
    if value is None:
        return formats[0]
    if value not in formats:
        raise ValueError(f"data_format must be {formats[0]!r} or {formats[1]!r}, got {value!r}")
    return value
