"""The operators in plain `jax.lax`: the fallback, and the lowering for platforms without kernels."""

import jax
from jax import lax, numpy as jnp

from jax_dwsconv import _epilogue
from jax_dwsconv._geometry import Window

# What may follow the sums of `fused_forward`, besides an activation.
PARTS = ("scale", "bias", "residual")

_FILTER_SPEC = {"HWO": "HWIO", "OHW": "OIHW"}


def forward(x: jax.Array, kernel: jax.Array, *, window: Window, out_dtype) -> jax.Array:
    """Depthwise convolution; shapes and dtypes as `primitives.forward`."""
    dtype = jnp.promote_types(x.dtype, kernel.dtype)
    accumulator = jnp.promote_types(dtype, out_dtype)
    y = _convolve(x.astype(dtype), kernel.astype(dtype), window, None if accumulator == dtype else accumulator)
    return y.astype(out_dtype)


def fused_forward(x, kernel, *others, parts, window: Window, activation, out_dtype, convolve=forward) -> jax.Array:
    """A convolution and what follows it; as `primitives.fused_forward`, `parts` being the names of the `others`."""
    y = convolve(x, kernel, window=window, out_dtype=_epilogue.accumulator_dtype(out_dtype))
    following = (dict(zip(parts, others, strict=True)).get(part) for part in PARTS)
    return _epilogue.apply(y, *following, activation, window.channel_axis, out_dtype)


def grad_input(g: jax.Array, kernel: jax.Array, *, window: Window, input_size, multiplier, out_dtype) -> jax.Array:
    """Gradient by the input; shapes and dtypes as `primitives.grad_input`."""
    dtype = jnp.promote_types(g.dtype, kernel.dtype)
    channels = g.shape[window.channel_axis] // multiplier
    x = jax.ShapeDtypeStruct(window.activation_shape(g.shape[0], input_size, channels), dtype)
    transpose = jax.linear_transpose(lambda x: _convolve(x, kernel.astype(dtype), window), x)
    return transpose(g.astype(dtype))[0].astype(out_dtype)


def grad_filter(x: jax.Array, g: jax.Array, *, window: Window, kernel_size, groups, out_dtype) -> jax.Array:
    """Gradient by the filter; shapes and dtypes as `primitives.grad_filter`."""
    dtype = jnp.promote_types(x.dtype, g.dtype)
    shape = window.filter_shape(groups, kernel_size, g.shape[window.channel_axis])
    kernel = jax.ShapeDtypeStruct(shape, dtype)
    transpose = jax.linear_transpose(lambda kernel: _convolve(x.astype(dtype), kernel, window), kernel)
    return transpose(g.astype(dtype))[0].astype(out_dtype)


def _convolve(x, kernel, window: Window, preferred_element_type=None):
    """`lax.conv_general_dilated`, mapped over the filter's groups."""

    def one_group(x, kernel):
        axis = 2 if window.filter_layout == "HWO" else 1
        return lax.conv_general_dilated(
            x,
            jnp.expand_dims(kernel, axis),
            window.strides,
            window.padding,
            rhs_dilation=window.dilation,
            dimension_numbers=(window.layout, _FILTER_SPEC[window.filter_layout], window.layout),
            feature_group_count=x.shape[window.channel_axis],
            preferred_element_type=preferred_element_type,
        )

    groups = kernel.shape[0]
    size = window.output_size(window.spatial(x.shape), window.kernel_size(kernel.shape))
    result_shape = window.activation_shape(x.shape[0], size, kernel.shape[window.filter_channel_axis])
    if 0 in result_shape:  # lax refuses some of these
        return _empty(x, kernel, result_shape, preferred_element_type or x.dtype)
    if groups == 1:
        return one_group(x, kernel[0])
    y = jax.vmap(one_group)(x.reshape(groups, -1, *x.shape[1:]), kernel)
    return y.reshape(x.shape[0], *y.shape[2:])


def _empty(x, kernel, shape, dtype):
    """An empty result that depends linearly on both operands, so that it can be transposed."""
    return jnp.broadcast_to((x.sum() * kernel.sum()).astype(dtype), shape)
