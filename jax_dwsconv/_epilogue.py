"""What follows the convolution: activation(y * scale + bias + residual), in float32 (float64 for float64).

It is rounded once. This is how JAX computes it; the native kernels have the same formulas.
"""

from collections.abc import Callable

import jax
from jax import numpy as jnp

Activation = str | Callable[[jax.Array], jax.Array] | None

# gelu is the tanh form, jax.nn.gelu's default.
_BY_NAME = {
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
    "hard_swish": jax.nn.hard_swish,
}


def activation_name(activation: Activation) -> str | None:
    """The name of a known activation, None for any other function.

    Known are the names, and the functions of jax.nn that they stand for (flax exports the same).

    Raises:
      ValueError: an unknown name.
      TypeError: neither a name, nor callable, nor None.
    """
    if isinstance(activation, str):
        if activation not in _BY_NAME:
            known = ", ".join(map(repr, _BY_NAME))
            raise ValueError(
                f"activation={activation!r} is unknown; use one of {known}, a function of one array, or None"
            )
        return activation
    if activation is None:
        return None
    if not callable(activation):
        raise TypeError(f"activation must be a name, a function of one array or None, got {type(activation).__name__}")
    return next((name for name, function in _BY_NAME.items() if function is activation), None)


def accumulator_dtype(dtype) -> jnp.dtype:
    """The dtype in which sums and epilogues are computed for results of this dtype."""
    return jnp.promote_types(dtype, jnp.float32)


def apply(y: jax.Array, scale, bias, residual, activation: Activation, channel_axis: int, out_dtype) -> jax.Array:
    """activation(y * scale + bias + residual) rounded to out_dtype, where the activation has a name, else without it.

    Args:
      y: the sums, in the accumulator dtype.
      scale: (C,) or (), or None.
      bias: (C,) or (), or None.
      residual: of the shape of y, or None.
      activation: see `activation_name`.
      channel_axis: the axis of y that scale and bias follow.
      out_dtype: of the result.
    """
    shape = [1] * y.ndim
    shape[channel_axis] = -1
    if scale is not None:
        y = y * scale.astype(y.dtype).reshape(shape)
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape(shape)
    if residual is not None:
        y = y + residual.astype(y.dtype)
    return function(activation_name(activation))(y).astype(out_dtype)


def function(name: str | None) -> Callable[[jax.Array], jax.Array]:
    """The activation of this name, the identity for None."""
    return _BY_NAME[name] if name else lambda y: y


def apply_unnamed(y: jax.Array, activation: Activation) -> jax.Array:
    """The activation of the rounded result in its final shape, where `apply` has left it out.

    Raises:
      ValueError: it changes the shape.
    """
    if activation is None or activation_name(activation) is not None:
        return y
    result = activation(y)
    if jnp.shape(result) != y.shape:
        raise ValueError(
            f"activation must return an array of the shape it is given, {y.shape}, got {jnp.shape(result)}"
        )
    return result


def is_empty(scale, bias, residual, activation: Activation) -> bool:
    """Whether there is nothing to compute in the accumulator dtype."""
    return scale is None and bias is None and residual is None and activation_name(activation) is None
