"""Depthwise convolutions in the field's usual terms."""

import math

import jax
from jax import numpy as jnp

from jax_dwsconv import _arguments, _epilogue, primitives, quantized_primitive
from jax_dwsconv._epilogue import Activation
from jax_dwsconv._geometry import Window


def depthwise_conv1d(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | tuple[int] = 1,
    padding="SAME",
    dilation: int | tuple[int] = 1,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: Activation = None,
    data_format: str | None = None,
    preferred_element_type=None,
) -> jax.Array:
    """Depthwise convolution over one spatial dimension, and what follows it, in one kernel.

    The result is activation(conv(x, kernel) * scale + bias + residual), rounded once.

    Args:
      x: (..., W, C), or (..., C, W) with data_format="NCW"; any number of batch dimensions, none included.
      kernel: (kw, 1, C * multiplier) in both formats, as flax holds it. Output channel c * multiplier + j reads channel
        c.
      strides: step of the window.
      padding: "SAME", "SAME_LOWER", "VALID", "CAUSAL" (dilation * (kw - 1) zeros before), an int, or
        ((low, high),).
      dilation: distance between the taps.
      bias: (C * multiplier,) or (), or None.
      scale: (C * multiplier,) or (), or None.
      residual: of the shape and dtype of the result, or None. It is added before the activation.
      activation: None, "relu", "relu6", "silu", "gelu" (tanh form), "hard_swish", or a function of one array. The
        functions of `jax.nn` with these names are recognised; any other is applied to the rounded result.
      data_format: "NWC" (the default) or "NCW".
      preferred_element_type: dtype of the result; by default the promoted dtype of x and kernel.

    Returns:
      (..., W', C * multiplier) or (..., C * multiplier, W'). Sums are kept in float32 (float64 for float64).

    Raises:
      ValueError: shapes, padding, data_format or the activation's name do not fit; the message names the argument.
      TypeError: a dtype is not floating, the residual's is not the result's, or an argument is of the wrong type.
    """
    return depthwise(
        x, kernel, 1, strides, padding, dilation, bias, scale, activation, data_format, preferred_element_type, residual
    )


def depthwise_conv2d(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding="SAME",
    dilation: int | tuple[int, int] = 1,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: Activation = None,
    data_format: str | None = None,
    preferred_element_type=None,
) -> jax.Array:
    """Depthwise convolution over two spatial dimensions, and what follows it, in one kernel.

    The result is activation(conv(x, kernel) * scale + bias + residual), rounded once.

    Args:
      x: (..., H, W, C), or (..., C, H, W) with data_format="NCHW"; any number of batch dimensions, none included.
      kernel: (kh, kw, 1, C * multiplier) in both formats, as flax holds it. Output channel c * multiplier + j reads
        channel c.
      strides: step of the window, an int or (height, width).
      padding: "SAME", "SAME_LOWER", "VALID", an int, or for both axes an int or a (low, high) pair.
      dilation: distance between the taps, an int or (height, width).
      bias: (C * multiplier,) or (), or None.
      scale: (C * multiplier,) or (), or None.
      residual: of the shape and dtype of the result, or None. It is added before the activation.
      activation: None, "relu", "relu6", "silu", "gelu" (tanh form), "hard_swish", or a function of one array. The
        functions of `jax.nn` with these names are recognised; any other is applied to the rounded result.
      data_format: "NHWC" (the default) or "NCHW".
      preferred_element_type: dtype of the result; by default the promoted dtype of x and kernel.

    Returns:
      (..., H', W', C * multiplier) or (..., C * multiplier, H', W'). Sums are kept in float32 (float64 for float64).

    Raises:
      ValueError: shapes, padding, data_format or the activation's name do not fit; the message names the argument.
      TypeError: a dtype is not floating, the residual's is not the result's, or an argument is of the wrong type.
    """
    return depthwise(
        x, kernel, 2, strides, padding, dilation, bias, scale, activation, data_format, preferred_element_type, residual
    )


def depthwise_conv_transpose2d(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding="SAME",
    dilation: int | tuple[int, int] = 1,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    activation: Activation = None,
    data_format: str | None = None,
    preferred_element_type=None,
) -> jax.Array:
    """Transposed depthwise convolution, by the conventions of `jax.lax.conv_transpose` (the kernel is not flipped).

    Args:
      x: (..., H, W, C), or (..., C, H, W) with data_format="NCHW".
      kernel: (kh, kw, 1, C * multiplier) in both formats.
      strides: factor by which the result is larger, an int or (height, width).
      padding: "SAME" (the result has `strides` times the size of x), "VALID", an int, or for both axes an int or a
        (low, high) pair: the padding of the stride-1 convolution over the dilated x.
      dilation: distance between the taps, an int or (height, width).
      bias: as for `depthwise_conv2d`.
      scale: as for `depthwise_conv2d`.
      activation: as for `depthwise_conv2d`.
      data_format: "NHWC" (the default) or "NCHW".
      preferred_element_type: dtype of the result; by default the promoted dtype of x and kernel.

    Returns:
      (..., H', W', C * multiplier) or (..., C * multiplier, H', W').

    Raises:
      ValueError, TypeError: as `depthwise_conv2d`.
    """
    return depthwise(
        x,
        kernel,
        2,
        strides,
        padding,
        dilation,
        bias,
        scale,
        activation,
        data_format,
        preferred_element_type,
        transposed=True,
    )


def depthwise(
    x,
    kernel,
    rank,
    strides,
    padding,
    dilation,
    bias,
    scale,
    activation,
    data_format,
    preferred_element_type,
    residual=None,
    *,
    transposed=False,
    prefix="",
):
    """All of the public functions. `prefix` is what their caller puts before the names of kernel, scale and bias."""
    x, kernel = _arguments.floating_array("x", x), _arguments.floating_array(f"{prefix}kernel", kernel)
    out_dtype = _arguments.result_dtype(preferred_element_type, x, kernel)
    batch = x.shape[: -rank - 1]
    operands = in_one_batch(
        x, kernel, rank, strides, padding, dilation, data_format, f"{prefix}kernel", transposed=transposed
    )
    *_, data_format, _ = operands
    channels = kernel.shape[-1]
    scale = _arguments.channel_vector(f"{prefix}scale", scale, channels)
    bias = _arguments.channel_vector(f"{prefix}bias", bias, channels)
    if _epilogue.is_empty(scale, bias, residual, activation):
        y = (convolve_transposed if transposed else convolve)(*operands, out_dtype)
    elif transposed:
        y = convolve_transposed(*operands, _epilogue.accumulator_dtype(out_dtype))
        y = _epilogue.apply(y, scale, bias, None, activation, data_format.index("C"), out_dtype)
    else:
        name = _epilogue.activation_name(activation)
        y = _convolve_fused(*operands, out_dtype, scale, bias, residual, name, batch)
    return _epilogue.apply_unnamed(y.reshape(*batch, *y.shape[1:]), activation)


def in_one_batch(x, kernel, rank, strides, padding, dilation, data_format, kernel_name, *, transposed=False):
    """Checks the arguments that all public functions share and returns what `convolve` takes of them."""
    data_format = _arguments.data_format(data_format, rank)
    strides = _arguments.per_axis("strides", strides, rank)
    dilation = _arguments.per_axis("dilation", dilation, rank)
    _check_shapes(x, kernel, rank, data_format, kernel_name)
    kernel_size = kernel.shape[:rank]
    if transposed:
        pairs = _transpose_padding(padding, kernel_size, strides, dilation)
    else:
        spatial = slice(-rank - 1, -1) if data_format[-1] == "C" else slice(-rank, None)
        pairs = _arguments.padding_pairs(padding, x.shape[spatial], kernel_size, strides, dilation)
    x = x.reshape(math.prod(x.shape[: -rank - 1]), *x.shape[-rank - 1 :])
    return x, jnp.squeeze(kernel, rank), strides, pairs, dilation, data_format, "HWO"


def _check_shapes(x, kernel, rank: int, data_format: str, name: str) -> None:
    kernel_shape = "(kh, kw, 1, C * multiplier)" if rank == 2 else "(kw, 1, C * multiplier)"
    if x.ndim < rank + 1:
        raise ValueError(
            f"x must have at least {rank + 1} dimensions, (..., {', '.join(data_format[1:])}), got shape {x.shape}"
        )
    if kernel.ndim != rank + 2 or kernel.shape[rank] != 1 or 0 in kernel.shape[:rank]:
        raise ValueError(f"{name} must have shape {kernel_shape}, got {kernel.shape}")
    channels = x.shape[-1 if data_format[-1] == "C" else -rank - 1]
    outputs = kernel.shape[-1]
    if (outputs != 0) if channels == 0 else (outputs == 0 or outputs % channels != 0):
        raise ValueError(
            f"{name} of shape {kernel.shape} must have a positive multiple of the {channels} channels of x, which has "
            f"shape {x.shape} in {data_format} format; expected {kernel_shape}"
        )


def _transpose_padding(padding, kernel_size, strides, dilation):
    """lax.conv_transpose's rule for "SAME" and "VALID"."""
    if not isinstance(padding, str):
        return _arguments.padding_pairs(padding, kernel_size, kernel_size, strides, dilation)
    if padding.upper() not in ("SAME", "VALID"):
        raise ValueError(
            f"padding={padding!r} is not for transposed convolutions; use 'SAME', 'VALID', an int or (low, high) pairs"
        )
    pairs = []
    for k, s, d in zip(kernel_size, strides, dilation, strict=True):
        reach = d * (k - 1) + 1
        if padding.upper() == "SAME":
            total = reach + s - 2
            low = reach - 1 if s > reach - 1 else -(-total // 2)
        else:
            total = reach + s - 2 + max(reach - s, 0)
            low = reach - 1
        pairs.append((low, total - low))
    return tuple(pairs)


# In the functions below, x has exactly one batch dimension and one or two spatial ones, kernel is (..spatial.., O) or
# (O, ..spatial..) by filter_layout, and strides, padding and dilation have an entry for every spatial dimension.


def convolve(x, kernel, strides, padding, dilation, data_format, filter_layout, out_dtype):
    """The convolution of floating arrays, with nothing after it."""
    x, kernel, window = _as_2d(x, kernel, strides, padding, dilation, data_format, filter_layout)
    y = primitives.forward(x, kernel, window=window, out_dtype=out_dtype)
    return _drop_height(y, data_format)


def convolve_int8(x, kernel, strides, padding, dilation, data_format, filter_layout, scale, bias, quantization):
    """That of int8 arrays; scale and bias are vectors of all output channels, or None."""
    x, kernel, window = _as_2d(x, kernel, strides, padding, dilation, data_format, filter_layout)
    y = quantized_primitive.quantized_forward(x, kernel, scale, bias, window=window, quantization=quantization)
    return _drop_height(y, data_format)


def _convolve_fused(
    x,
    kernel,
    strides,
    padding,
    dilation,
    data_format,
    filter_layout,
    out_dtype,
    scale,
    bias,
    residual,
    activation,
    batch,
):
    """Scale and bias may be scalars. The residual has the batch dimensions `batch`, which in x are one."""
    x, kernel, window = _as_2d(x, kernel, strides, padding, dilation, data_format, filter_layout)
    channels, accumulator = kernel.shape[window.filter_channel_axis], _epilogue.accumulator_dtype(out_dtype)
    scale, bias = (v if v is None else jnp.broadcast_to(v.astype(accumulator), (channels,)) for v in (scale, bias))
    if residual is not None:
        size = window.output_size(window.spatial(x.shape), window.kernel_size(kernel.shape))
        shape = window.activation_shape(x.shape[0], size, channels)
        public = [n for n, axis in zip(shape, window.layout, strict=True) if axis in data_format]
        residual = _arguments.like_result("residual", residual, (*batch, *public[1:]), out_dtype).reshape(shape)
    y = primitives.fused_forward(
        x, kernel, scale, bias, residual, window=window, activation=activation, out_dtype=out_dtype
    )
    return _drop_height(y, data_format)


def convolve_transposed(x, kernel, strides, padding, dilation, data_format, filter_layout, out_dtype):
    """The convolution with strides 1 over x dilated by `strides`: grad_input with the kernel flipped."""
    x, kernel, window = _as_2d(x, kernel, strides, padding, dilation, data_format, filter_layout)
    kernel_size = window.kernel_size(kernel.shape)
    reach = [d * (k - 1) + 1 for d, k in zip(window.dilation, kernel_size, strict=True)]
    size = []
    for n, r, s, (low, high) in zip(window.spatial(x.shape), reach, window.strides, window.padding, strict=True):
        dilated = 0 if n == 0 else (n - 1) * s + 1
        size.append(max(dilated + low + high - r + 1, 0))
    channels, outputs = x.shape[window.channel_axis], kernel.shape[window.filter_channel_axis]
    if 0 in size:
        return _drop_height(jnp.zeros(window.activation_shape(x.shape[0], size, outputs), out_dtype), data_format)
    if outputs != channels:
        x = jnp.repeat(x, outputs // channels, axis=window.channel_axis)
    kernel_axes = (1, 2) if window.filter_layout == "HWO" else (2, 3)
    padding = tuple((r - 1 - low, r - 1 - high) for r, (low, high) in zip(reach, window.padding, strict=True))
    y = primitives.grad_input(
        x,
        jnp.flip(kernel, kernel_axes),
        window=window._replace(padding=padding),
        input_size=tuple(size),
        multiplier=1,
        out_dtype=out_dtype,
    )
    return _drop_height(y, data_format)


def _as_2d(x, kernel, strides, padding, dilation, data_format, filter_layout):
    """Operands and window of the primitives: a height of 1 for one spatial dimension, and one filter for all images."""
    if len(strides) == 1:
        x = jnp.expand_dims(x, data_format.index("W"))
        kernel = jnp.expand_dims(kernel, filter_layout.index("H"))
        strides, padding, dilation = (1, *strides), ((0, 0), *padding), (1, *dilation)
    layout = "NHWC" if data_format[-1] == "C" else "NCHW"
    return x, kernel[None], Window(tuple(strides), tuple(padding), tuple(dilation), layout, filter_layout)


def _drop_height(y, data_format):
    """The result of the primitives in the format that was asked for."""
    return y if "H" in data_format else jnp.squeeze(y, data_format.index("W"))
