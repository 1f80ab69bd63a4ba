"""The operators in plain `jax.lax`: the fallback, and the lowering for platforms without kernels."""

import functools
import math

import jax
from jax import lax, numpy as jnp

from jax_dwsconv import _epilogue
from jax_dwsconv._geometry import Window

# What may follow the sums of `fused_forward`, besides an activation.
PARTS = ("scale", "bias", "residual")

_MOST_UNROLLED_TAPS = 64
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


# int8: sums of shifted products, because lax refuses integer convolutions on GPUs ------------------------------------


def quantized_sums(x: jax.Array, kernel: jax.Array, *, window: Window, x_zero_point: int) -> jax.Array:
    """The int32 sums of (x - x_zero_point) times kernel; outside the image the difference is zero."""
    if window.layout == "NCHW":
        last = quantized_sums(
            jnp.moveaxis(x, 1, 3), kernel, window=window._replace(layout="NHWC"), x_zero_point=x_zero_point
        )
        return jnp.moveaxis(last, 3, 1)
    kernel = kernel if window.filter_layout == "HWO" else jnp.moveaxis(kernel, 1, 3)
    groups, *kernel_size, outputs = kernel.shape
    batch, *size, channels = x.shape
    height, width = window.output_size(size, kernel_size)
    shape = (batch, height, width, outputs)
    if 0 in shape:
        return jnp.zeros(shape, jnp.int32)
    (sh, sw), (dh, dw) = window.strides, window.dilation
    x = x.astype(jnp.int32) - x_zero_point
    x = lax.pad(x, jnp.int32(0), ((0, 0, 0), *((low, high, 0) for low, high in window.padding), (0, 0, 0)))
    x = x if channels == outputs else jnp.repeat(x, outputs // channels, axis=3)
    by_group = (groups, batch // groups, height, width, outputs)

    def add_tap(tap, sums):
        i, j = tap // kernel_size[1], tap % kernel_size[1]
        read = (batch, (height - 1) * sh + 1, (width - 1) * sw + 1, outputs)
        shifted = lax.dynamic_slice(x, (0, i * dh, j * dw, 0), read)[:, ::sh, ::sw].reshape(by_group)
        weights = lax.dynamic_slice(kernel, (0, i, j, 0), (groups, 1, 1, outputs)).astype(jnp.int32)
        return sums + shifted * weights[:, None]

    sums, taps = jnp.zeros(by_group, jnp.int32), math.prod(kernel_size)
    if taps > _MOST_UNROLLED_TAPS:
        return lax.fori_loop(0, taps, add_tap, sums).reshape(shape)
    return functools.reduce(lambda sums, tap: add_tap(tap, sums), range(taps), sums).reshape(shape)


def quantized_forward(x, kernel, *others, parts, window: Window, out_dtype, quantization, convolve=quantized_sums):
    """As `quantized_primitive.quantized_forward`, `parts` being the names of the `others`."""
    following = dict(zip(parts, others, strict=True))
    sums = convolve(x, kernel, window=window, x_zero_point=quantization.x_zero_point)
    return requantize(sums, following.get("scale"), following.get("bias"), quantization, window.channel_axis)


def requantize(sums: jax.Array, scale, bias, quantization, channel_axis: int) -> jax.Array:
    """What follows the int32 sums of an int8 operator; int8 with a scale, else int32."""
    shape = [1] * sums.ndim
    shape[channel_axis] = -1
    if bias is not None:
        sums = sums + bias.reshape(shape)
    if scale is None:
        return sums
    rounded = jnp.round(sums.astype(jnp.float32) * scale.reshape(shape))
    zero_point, low, high = quantization[1:]
    return (jnp.clip(rounded, low - zero_point, high - zero_point).astype(jnp.int32) + zero_point).astype(jnp.int8)
