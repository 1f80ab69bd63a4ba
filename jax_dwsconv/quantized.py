"""Convolutions of int8 arrays, as quantised networks have them.

An array of real numbers r is held as int8 q with r = scale * (q - zero_point): activations with one scale and one zero
point, kernels with one scale for every output channel and no zero point. All of these functions compute, exactly and on
every platform alike,

    without scale:  sums + bias                                                          int32
    with scale:     clamp(round((sums + bias) * scale) + out_zero_point)                 int8

where sums are those of (x - x_zero_point) * kernel in int32, padding stands for real zeros, the int32 becomes a float32
(to nearest, ties to even), the product with scale is rounded to float32, and `round` goes to the nearest integer, ties
to even. To quantise a real convolution with the scales s_x, s_kernel and s_out:

    scale = s_x * s_kernel / s_out,    bias = round(real bias / (s_x * s_kernel))

`pointwise_conv` can add an int8 residual to these sums.

There are no derivatives. For quantisation-aware training compute in floating point on values rounded to the int8 grid.
"""

import math
from collections.abc import Sequence

import jax
from jax import numpy as jnp

from jax_dwsconv import _arguments, convolution, quantized_primitive, reference
from jax_dwsconv.quantized_pointwise import quantized_pointwise
from jax_dwsconv.quantized_primitive import Quantization

__all__ = [
    "depthwise_conv1d",
    "depthwise_conv2d",
    "dequantize",
    "pointwise_conv",
    "quantize",
    "quantize_kernel",
    "requantize",
    "scale_and_zero_point",
    "separable_conv2d",
]


def quantize(x: jax.Array, scale, zero_point: int = 0) -> jax.Array:
    """The int8 array that stands for x: clamp(round(x / scale) + zero_point), ties to even.

    Args:
      x: real numbers.
      scale: float that broadcasts against x.
      zero_point: int from -128 to 127, what stands for 0.

    Returns:
      int8 of the shape of x.

    Raises:
      TypeError: x is not floating.
      ValueError: the zero point is out of range.
    """
    x = _arguments.floating_array("x", x)
    zero_point = _int8("zero_point", zero_point)
    return jnp.clip(jnp.round(x.astype(jnp.float32) / scale) + zero_point, -128, 127).astype(jnp.int8)


def dequantize(x: jax.Array, scale, zero_point: int = 0) -> jax.Array:
    """The float32 numbers scale * (x - zero_point) that an integer array stands for; see `quantize`."""
    return (x.astype(jnp.int32) - zero_point).astype(jnp.float32) * scale


def scale_and_zero_point(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of activations from low to high, widened to hold 0, which an integer then stands for.

    Raises:
      ValueError: low or high is not finite, or low is above high.
    """
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"low and high must be finite, with low <= high, got {low} and {high}")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return scale, round(-128 - low / scale)


def quantize_kernel(kernel: jax.Array, least_scale=0.0) -> tuple[jax.Array, jax.Array]:
    """A kernel in int8 with a scale for every output channel: the largest magnitude becomes 127.

    Args:
      kernel: (..., F), floating, the output channels last.
      least_scale: (F,) or (), which scales are not below. With it biases, which are divided by the scale, stay in int32
        for channels of a very small kernel.

    Returns:
      int8 of the shape of the kernel, and the scale, (F,) of float32. A kernel of zeros has the scale 1.

    Raises:
      TypeError: the kernel is not floating.
    """
    kernel = _arguments.floating_array("kernel", kernel).astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(kernel).max(range(kernel.ndim - 1)) / 127, least_scale)
    scale = jnp.where(scale > 0, scale, 1.0)
    return quantize(kernel, scale), scale


def requantize(
    sums: jax.Array,
    scale: jax.Array,
    *,
    bias: jax.Array | None = None,
    clamp: tuple[int, int] = (-128, 127),
    out_zero_point: int = 0,
    channel_axis: int = -1,
) -> jax.Array:
    """clamp(round((sums + bias) * scale) + out_zero_point), as it follows the sums of all functions here.

    For sums that something is added to, or that come from elsewhere, such as those of a mean.

    Args:
      sums: (..., C), or with the channels at `channel_axis`, int32.
      scale: (C,) or (); as for `depthwise_conv2d`.
      bias: (C,) or (); as for `depthwise_conv2d`.
      clamp: as for `depthwise_conv2d`.
      out_zero_point: as for `depthwise_conv2d`.
      channel_axis: where sums and the result have their channels.

    Returns:
      int8 of the shape of sums.

    Raises:
      ValueError, TypeError: as `depthwise_conv2d`.
    """
    if sums.dtype != jnp.int32:
        raise TypeError(f"sums must have dtype int32, got {sums.dtype}")
    if scale is None:
        raise TypeError("scale must be an array, got None")
    scale, bias, quantization = _following(sums.shape[channel_axis], scale, bias, clamp, 0, out_zero_point)
    return reference.requantize(sums, scale, bias, quantization, channel_axis)


def depthwise_conv1d(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | tuple[int] = 1,
    padding="SAME",
    dilation: int | tuple[int] = 1,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    clamp: tuple[int, int] = (-128, 127),
    x_zero_point: int = 0,
    out_zero_point: int = 0,
    data_format: str | None = None,
) -> jax.Array:
    """Depthwise convolution of int8 arrays over one spatial dimension; see `depthwise_conv2d`.

    Args:
      x: (..., W, C), or (..., C, W) with data_format="NCW"; any number of batch dimensions, none included.
      kernel: (kw, 1, C * multiplier) in both formats.
      strides: step of the window.
      padding: as for `jax_dwsconv.depthwise_conv1d`.
      dilation: distance between the taps.
      scale: as for `depthwise_conv2d`.
      bias: as for `depthwise_conv2d`.
      clamp: as for `depthwise_conv2d`.
      x_zero_point: as for `depthwise_conv2d`.
      out_zero_point: as for `depthwise_conv2d`.
      data_format: "NWC" (the default) or "NCW".

    Returns:
      (..., W', C * multiplier) or (..., C * multiplier, W'); int8 with a scale, int32 without.

    Raises:
      ValueError, TypeError: as `depthwise_conv2d`.
    """
    follow = (scale, bias, clamp, x_zero_point, out_zero_point)
    return _depthwise(x, kernel, 1, strides, padding, dilation, data_format, *follow)


def depthwise_conv2d(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding="SAME",
    dilation: int | tuple[int, int] = 1,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    clamp: tuple[int, int] = (-128, 127),
    x_zero_point: int = 0,
    out_zero_point: int = 0,
    data_format: str | None = None,
) -> jax.Array:
    """Depthwise convolution of int8 arrays, and their requantisation, in one kernel.

    The module's docstring has the arithmetic. Sums stay below 2**30 in magnitude; a bias that does so, too, cannot
    overflow (others wrap around).

    Args:
      x: (..., H, W, C), or (..., C, H, W) with data_format="NCHW"; any number of batch dimensions, none included. int8.
      kernel: (kh, kw, 1, C * multiplier) in both formats, int8, with at most 2**15 taps. Output channel
        c * multiplier + j reads channel c.
      strides: step of the window.
      padding: as for `jax_dwsconv.depthwise_conv2d`. It inserts the zero point of x.
      dilation: distance between the taps.
      scale: (C * multiplier,) or (), floating and finite, used in float32; or None for an int32 result.
      bias: (C * multiplier,) or (), of a signed integer dtype up to int32, or None.
      clamp: (low, high), limits of an int8 result. For a ReLU low is the out_zero_point; for a ReLU6 high is
        out_zero_point + round(6 / the scale of the result), besides.
      x_zero_point: int from -128 to 127, what x has for zero.
      out_zero_point: int from -128 to 127, what an int8 result has for zero.
      data_format: "NHWC" (the default) or "NCHW".

    Returns:
      (..., H', W', C * multiplier) or (..., C * multiplier, H', W'); int8 with a scale, int32 without.

    Raises:
      ValueError: shapes, padding, zero points, clamp or data_format do not fit, or the kernel has too many taps; the
        message names the argument.
      TypeError: an array is not of its dtype, or an argument is of the wrong type.
      NotImplementedError: a derivative is taken.
    """
    follow = (scale, bias, clamp, x_zero_point, out_zero_point)
    return _depthwise(x, kernel, 2, strides, padding, dilation, data_format, *follow)


def pointwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    residual_scale: jax.Array | None = None,
    residual_zero_point: int = 0,
    clamp: tuple[int, int] = (-128, 127),
    x_zero_point: int = 0,
    out_zero_point: int = 0,
    channel_axis: int = -1,
) -> jax.Array:
    """Matrix product over the channels (a 1x1 convolution, or a dense layer) of int8 arrays, and its requantisation.

    The product is XLA's, and what follows a pass of its own, or all of it is one kernel of ours: on a GPU with an int8
    result, where that is expected to be faster. Both take the integer tensor cores.

    Args:
      x: (..., C), or with the channels at `channel_axis`. int8.
      kernel: (C, F) or (1, 1, C, F), int8, with at most 2**15 channels C.
      scale: (F,) or (); as for `depthwise_conv2d`.
      bias: (F,) or (); as for `depthwise_conv2d`.
      residual: of the shape of the result, int8, or None. round((residual - residual_zero_point) * residual_scale), the
        product of float32 and ties to even, is added to the int32 sums.
      residual_scale: (F,) or (), for a residual.
      residual_zero_point: int from -128 to 127.
      clamp: as for `depthwise_conv2d`.
      x_zero_point: as for `depthwise_conv2d`.
      out_zero_point: as for `depthwise_conv2d`.
      channel_axis: where x and the result have their channels.

    Returns:
      x with F channels; int8 with a scale, int32 without.

    Raises:
      ValueError, TypeError: as `depthwise_conv2d`.
      NotImplementedError: the derivative by the scale of an int8 result is asked for.
    """
    x, kernel = _int8_array("x", x), _int8_array("kernel", kernel)
    channels = x.shape[channel_axis]
    if kernel.shape[-2:-1] != (channels,) or kernel.shape[:-2] not in ((), (1, 1)):
        raise ValueError(f"kernel must have shape ({channels}, F) or (1, 1, {channels}, F), got {kernel.shape}")
    if channels > quantized_primitive.MOST_TAPS:
        raise ValueError(
            f"kernel of shape {kernel.shape} sums over more than {quantized_primitive.MOST_TAPS} channels: the int32 "
            "sums could overflow"
        )
    kernel = kernel.reshape(channels, kernel.shape[-1])
    scale, bias, quantization = _following(kernel.shape[-1], scale, bias, clamp, x_zero_point, out_zero_point)
    if quantization.x_zero_point != 0:
        correction = quantization.x_zero_point * kernel.sum(0, dtype=jnp.int32)
        bias = -correction if bias is None else bias - correction
    others = {"scale": scale, "bias": bias}
    if (residual is None) != (residual_scale is None):
        raise ValueError("residual and residual_scale need each other")
    if residual is not None:
        others["residual"] = residual = _int8_array("residual", residual)
        shape = list(x.shape)
        shape[channel_axis] = kernel.shape[-1]
        if residual.shape != tuple(shape):
            raise ValueError(f"residual must have the shape of the result, {tuple(shape)}, got {residual.shape}")
        vector = _arguments.channel_vector("residual_scale", residual_scale, kernel.shape[-1])
        others["residual_scale"] = jnp.broadcast_to(vector.astype(jnp.float32), (kernel.shape[-1],))
    quantization = quantization._replace(x_zero_point=_int8("residual_zero_point", residual_zero_point))
    return quantized_pointwise(x, kernel, others, quantization, channel_axis)


def separable_conv2d(
    x: jax.Array,
    depthwise_kernel: jax.Array,
    pointwise_kernel: jax.Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding="SAME",
    dilation: int | tuple[int, int] = 1,
    depthwise_scale: jax.Array,
    depthwise_bias: jax.Array | None = None,
    depthwise_clamp: tuple[int, int] = (-128, 127),
    pointwise_scale: jax.Array | None = None,
    pointwise_bias: jax.Array | None = None,
    pointwise_clamp: tuple[int, int] = (-128, 127),
    x_zero_point: int = 0,
    depthwise_zero_point: int = 0,
    out_zero_point: int = 0,
    data_format: str | None = None,
) -> jax.Array:
    """Depthwise convolution to int8, then a matrix product over the channels, both with their requantisation.

    Args:
      x: as for `depthwise_conv2d`.
      depthwise_kernel: (kh, kw, 1, C * multiplier), int8.
      pointwise_kernel: (1, 1, C * multiplier, F) or (C * multiplier, F), int8.
      strides: of the depthwise convolution, as are padding and dilation; see `depthwise_conv2d`.
      padding: see `depthwise_conv2d`.
      dilation: see `depthwise_conv2d`.
      depthwise_scale: (C * multiplier,) or ().
      depthwise_bias: (C * multiplier,) or (), or None.
      depthwise_clamp: limits of what lies between the two halves.
      pointwise_scale: (F,) or (), or None for an int32 result.
      pointwise_bias: (F,) or (), or None.
      pointwise_clamp: limits of an int8 result.
      x_zero_point: what x has for zero.
      depthwise_zero_point: what the array between the two halves has for zero.
      out_zero_point: what an int8 result has for zero.
      data_format: "NHWC" (the default) or "NCHW".

    Returns:
      (..., H', W', F) or (..., F, H', W'); int8 with a pointwise_scale, int32 without.

    Raises:
      ValueError, TypeError: as `depthwise_conv2d`.
    """
    y = depthwise_conv2d(
        x,
        depthwise_kernel,
        strides=strides,
        padding=padding,
        dilation=dilation,
        scale=depthwise_scale,
        bias=depthwise_bias,
        clamp=depthwise_clamp,
        x_zero_point=x_zero_point,
        out_zero_point=depthwise_zero_point,
        data_format=data_format,
    )
    return pointwise_conv(
        y,
        pointwise_kernel,
        scale=pointwise_scale,
        bias=pointwise_bias,
        clamp=pointwise_clamp,
        x_zero_point=depthwise_zero_point,
        out_zero_point=out_zero_point,
        channel_axis=-1 if _arguments.data_format(data_format, 2) == "NHWC" else -3,
    )


def _depthwise(
    x, kernel, rank, strides, padding, dilation, data_format, scale, bias, clamp, x_zero_point, out_zero_point
):
    x, kernel = _int8_array("x", x), _int8_array("kernel", kernel)
    operands = convolution.in_one_batch(x, kernel, rank, strides, padding, dilation, data_format, "kernel")
    scale, bias, quantization = _following(kernel.shape[-1], scale, bias, clamp, x_zero_point, out_zero_point)
    y = convolution.convolve_int8(*operands, scale, bias, quantization)
    return y.reshape(*x.shape[: -rank - 1], *y.shape[1:])


def _int8_array(name: str, value) -> jax.Array:
    array = jnp.asarray(value)
    if array.dtype != jnp.int8:
        raise TypeError(f"{name} must have dtype int8, got {array.dtype}; see jax_dwsconv.quantized.quantize")
    return array


def _int8(name: str, value) -> int:
    number = _arguments.as_int(name, value, -128)
    if number > 127:
        raise ValueError(f"{name} must be made of integers from -128 to 127, got {number}")
    return number


def _following(channels: int, scale, bias, clamp: Sequence[int], x_zero_point, out_zero_point):
    """Scale and bias as vectors of all output channels, or None, and the zero points and limits."""
    if len(clamp) != 2:
        raise ValueError(f"clamp must be (low, high), got {clamp!r}")
    numbers = Quantization(
        _int8("x_zero_point", x_zero_point),
        _int8("out_zero_point", out_zero_point),
        *(_int8("clamp", limit) for limit in clamp),
    )
    if numbers.low > numbers.high:
        raise ValueError(f"clamp must be (low, high) with low <= high, got {clamp!r}")
    if scale is None and numbers[1:] != Quantization()[1:]:
        raise ValueError("out_zero_point and clamp are for an int8 result: they need a scale")
    scale = _arguments.channel_vector("scale", scale, channels)
    if scale is not None:
        scale = jnp.broadcast_to(scale.astype(jnp.float32), (channels,))
    return scale, _bias(bias, channels), numbers


def _bias(value, channels: int) -> jax.Array | None:
    if value is None:
        return None
    bias = jnp.asarray(value)
    if not jnp.issubdtype(bias.dtype, jnp.signedinteger) or bias.dtype.itemsize > 4:
        raise TypeError(f"bias must have dtype int32 (int16, int8), got {bias.dtype}")
    if bias.shape not in ((), (channels,)):
        raise ValueError(
            f"bias must have shape ({channels},), one element for every output channel, or (), got {bias.shape}"
        )
    return jnp.broadcast_to(bias.astype(jnp.int32), (channels,))
