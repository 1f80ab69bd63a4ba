"""Depthwise convolutions: the drop-in for lax, and functions in the field's usual terms."""

import functools
import math
import operator

import jax
from jax import lax, numpy as jnp

from jax_dwsconv import _arguments, _config, _epilogue, primitives, quantized_primitive
from jax_dwsconv._epilogue import Activation
from jax_dwsconv._geometry import Window
from jax_dwsconv.quantized_primitive import Quantization

_LAYOUTS = {(0, 3, 1, 2): "NHWC", (0, 1, 2, 3): "NCHW", (0, 2, 1): "NWC", (0, 1, 2): "NCW"}


def conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count=1,
    batch_group_count=1,
    precision=None,
    preferred_element_type=None,
    out_sharding=None,
):
    """Drop-in for `jax.lax.conv_general_dilated`: the same signature and results.

    Takes this package's kernels where it is a depthwise convolution (`feature_group_count` equals the input channels,
    the kernel has one input feature) with one or two spatial dimensions, floating dtypes, and activations in NHWC,
    NCHW, NWC or NCW order. The kernel may have any order. `lhs_dilation` (a transposed convolution) is supported where
    all strides are 1. Sums are kept in float32 at any `precision`. Also taken is int8 with
    `preferred_element_type=jnp.int32` and without `lhs_dilation`, which lax refuses on GPUs; where there is no kernel
    it is made of shifted products. Everything else goes to lax: silently where it is not depthwise, as
    JAX_DWSCONV_FALLBACK says where it is.

    Args:
      lhs: input with batch, channel and spatial dimensions.
      rhs: kernel.
      window_strides: int for every spatial dimension.
      padding: "SAME", "SAME_LOWER", "VALID", or (low, high) for every spatial dimension.
      lhs_dilation: int for every spatial dimension, or None.
      rhs_dilation: int for every spatial dimension, or None.
      dimension_numbers: as for lax.
      feature_group_count: as for lax.
      batch_group_count: as for lax.
      precision: as for lax.
      preferred_element_type: dtype of the result, or None for that of the operands.
      out_sharding: as for lax.

    Returns:
      The convolution, as lax gives it.

    Raises:
      UnsupportedError: a depthwise convolution without a kernel, where JAX_DWSCONV_FALLBACK=error.
      TypeError, ValueError: as lax.
    """
    in_lax = functools.partial(
        lax.conv_general_dilated,
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
        out_sharding,
    )
    if not _is_depthwise(lhs, rhs, dimension_numbers, feature_group_count, batch_group_count) or (
        _config.disabled() and not _is_int8(lhs, rhs, preferred_element_type)
    ):
        return in_lax()
    lhs, rhs = jnp.asarray(lhs), jnp.asarray(rhs)  # as lax: NumPy's float64 becomes float32 without x64
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    rank = lhs.ndim - 2
    try:
        sizes = [_lax_sizes(sizes, rank) for sizes in (window_strides, lhs_dilation, rhs_dilation)]
        padding = padding if isinstance(padding, str) else _lax_padding(padding, rank)
    except (TypeError, ValueError):
        return in_lax()  # not a valid call: the error is lax's
    numbers, padding, (strides, input_dilation, dilation) = _in_memory_order(numbers, padding, sizes)
    if reason := _why_unsupported(lhs, rhs, numbers, strides, input_dilation, preferred_element_type, out_sharding):
        _config.fall_back(reason)
        return in_lax()
    if _is_refused_by_lax(lhs, rhs, padding, input_dilation, preferred_element_type):
        return in_lax()  # likewise
    if precision is not None:
        jax.eval_shape(in_lax)  # likewise: the kernels have one precision, but lax knows which are valid

    data_format = _LAYOUTS[numbers.lhs_spec]
    rhs, filter_layout = _as_filter(rhs, numbers.rhs_spec)
    size = tuple(lhs.shape[axis] for axis in numbers.lhs_spec[2:])
    kernel_size = rhs.shape[:-1] if filter_layout == "HWO" else rhs.shape[1:]
    pairs = _arguments.padding_pairs(padding, size, kernel_size, strides, dilation)
    if _is_int8(lhs, rhs, preferred_element_type):
        return _convolve_int8(lhs, rhs, strides, pairs, dilation, data_format, filter_layout)
    out_dtype = _arguments.result_dtype(preferred_element_type, lhs)
    convolve = _convolve if max(input_dilation) == 1 else _convolve_transposed
    strides = strides if max(input_dilation) == 1 else input_dilation
    return convolve(lhs, rhs, strides, pairs, dilation, data_format, filter_layout, out_dtype)


def _is_depthwise(lhs, rhs, dimension_numbers, feature_group_count, batch_group_count) -> bool:
    if not (hasattr(lhs, "ndim") and hasattr(rhs, "ndim") and lhs.ndim == rhs.ndim > 2) or batch_group_count != 1:
        return False
    try:
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    except (TypeError, ValueError):
        return False
    channels = lhs.shape[numbers.lhs_spec[1]]
    outputs, inputs = (rhs.shape[axis] for axis in numbers.rhs_spec[:2])
    # A single input channel spread over many outputs is a dense convolution.
    is_grouped = feature_group_count == channels > 0 and (channels != 1 or outputs == 1)
    return is_grouped and inputs == 1 and outputs > 0 and outputs % channels == 0


def _lax_sizes(sizes, rank: int) -> tuple[int, ...]:
    sizes = (1,) * rank if sizes is None else tuple(operator.index(n) for n in sizes)
    if len(sizes) != rank or min(sizes) < 1:
        raise ValueError(sizes)
    return sizes


def _lax_padding(padding, rank: int) -> tuple[tuple[int, int], ...]:
    pairs = tuple((operator.index(low), operator.index(high)) for low, high in padding)
    if len(pairs) != rank:
        raise ValueError(padding)
    return pairs


def _in_memory_order(numbers, padding, sizes):
    """The same convolution with the spatial dimensions in the order that they have in the input, not in the kernel."""
    order = sorted(range(len(numbers.lhs_spec) - 2), key=lambda i: numbers.lhs_spec[2 + i])
    numbers = type(numbers)(*((*spec[:2], *(spec[2 + i] for i in order)) for spec in numbers))
    padding = padding if isinstance(padding, str) else tuple(padding[i] for i in order)
    return numbers, padding, [tuple(size[i] for i in order) for size in sizes]


def _why_unsupported(lhs, rhs, numbers, strides, input_dilation, preferred_element_type, out_sharding) -> str | None:
    if lhs.ndim > 4:
        return f"{lhs.ndim - 2} spatial dimensions; 1 and 2 are supported"
    if numbers.lhs_spec not in _LAYOUTS or numbers.out_spec != numbers.lhs_spec:
        return f"dimension numbers {numbers}; NHWC, NCHW, NWC and NCW are supported, the same for input and output"
    dtypes = [lhs.dtype, rhs.dtype, *([] if preferred_element_type is None else [preferred_element_type])]
    is_int8 = _is_int8(lhs, rhs, preferred_element_type)
    if not is_int8 and not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        found = ", ".join(str(jnp.dtype(dtype)) for dtype in dtypes)
        return (
            f"dtypes {found}; float32, bfloat16, float16 and float64 are supported, and int8 with "
            "preferred_element_type=int32"
        )
    taps = math.prod(rhs.shape[axis] for axis in numbers.rhs_spec[2:])
    if is_int8 and (max(input_dilation) > 1 or taps > quantized_primitive.MOST_TAPS):
        return f"int8 with lhs_dilation, or with more than {quantized_primitive.MOST_TAPS} taps"
    if max(input_dilation) > 1 and max(strides) > 1:
        return f"lhs_dilation {input_dilation} together with strides {strides}; either is supported alone"
    return None if out_sharding is None else "out_sharding; use jax.sharding.reshard on the result"


def _is_int8(lhs, rhs, preferred_element_type) -> bool:
    return lhs.dtype == rhs.dtype == jnp.int8 and preferred_element_type == jnp.int32


def _is_refused_by_lax(lhs, rhs, padding, input_dilation, preferred_element_type) -> bool:
    narrows = (
        preferred_element_type is not None
        and jax.dtypes.canonicalize_dtype(preferred_element_type).itemsize < lhs.dtype.itemsize
    )
    string_with_dilation = isinstance(padding, str) and max(input_dilation) > 1
    return lhs.dtype != rhs.dtype or narrows or string_with_dilation


def _as_filter(rhs: jax.Array, rhs_spec) -> tuple[jax.Array, str]:
    """A kernel of any dimension order without its input dimension of size 1: (..spatial.., O) or (O, ..spatial..)."""
    out, inputs, *spatial = rhs_spec
    if rhs_spec == tuple(range(rhs.ndim)):
        return jnp.squeeze(rhs, inputs), "OHW"
    return jnp.squeeze(jnp.transpose(rhs, (*spatial, inputs, out)), -2), "HWO"


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
    data_format = _arguments.data_format(data_format, rank)
    strides = _arguments.per_axis("strides", strides, rank)
    dilation = _arguments.per_axis("dilation", dilation, rank)
    out_dtype = _arguments.result_dtype(preferred_element_type, x, kernel)
    check_shapes(x, kernel, rank, data_format, f"{prefix}kernel")
    channels = kernel.shape[-1]
    scale = _arguments.channel_vector(f"{prefix}scale", scale, channels)
    bias = _arguments.channel_vector(f"{prefix}bias", bias, channels)
    spatial = slice(-rank - 1, -1) if data_format[-1] == "C" else slice(-rank, None)
    kernel_size = kernel.shape[:rank]
    if transposed:
        pairs = _transpose_padding(padding, kernel_size, strides, dilation)
    else:
        pairs = _arguments.padding_pairs(padding, x.shape[spatial], kernel_size, strides, dilation)
    batch = x.shape[: -rank - 1]
    x = x.reshape(math.prod(batch), *x.shape[-rank - 1 :])
    operands = x, jnp.squeeze(kernel, rank), strides, pairs, dilation, data_format, "HWO"
    if _epilogue.is_empty(scale, bias, residual, activation):
        y = (_convolve_transposed if transposed else _convolve)(*operands, out_dtype)
    elif transposed:
        y = _convolve_transposed(*operands, _epilogue.accumulator_dtype(out_dtype))
        y = _epilogue.apply(y, scale, bias, None, activation, data_format.index("C"), out_dtype)
    else:
        name = _epilogue.activation_name(activation)
        y = _convolve_fused(*operands, out_dtype, scale, bias, residual, name, batch)
    return _epilogue.apply_unnamed(y.reshape(*batch, *y.shape[1:]), activation)


def check_shapes(x, kernel, rank: int, data_format: str, name: str) -> None:
    """Checks the shapes of the arrays that the public functions take."""
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


def _convolve(x, kernel, strides, padding, dilation, data_format, filter_layout, out_dtype):
    x, kernel, window = as_2d(x, kernel, strides, padding, dilation, data_format, filter_layout)
    y = primitives.forward(x, kernel, window=window, out_dtype=out_dtype)
    return drop_height(y, data_format)


def _convolve_int8(x, kernel, strides, padding, dilation, data_format, filter_layout):
    x, kernel, window = as_2d(x, kernel, strides, padding, dilation, data_format, filter_layout)
    y = quantized_primitive.quantized_forward(x, kernel, None, None, window=window, quantization=Quantization())
    return drop_height(y, data_format)


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
    x, kernel, window = as_2d(x, kernel, strides, padding, dilation, data_format, filter_layout)
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
    return drop_height(y, data_format)


def _convolve_transposed(x, kernel, strides, padding, dilation, data_format, filter_layout, out_dtype):
    """The convolution with strides 1 over x dilated by `strides`: grad_input with the kernel flipped."""
    x, kernel, window = as_2d(x, kernel, strides, padding, dilation, data_format, filter_layout)
    kernel_size = window.kernel_size(kernel.shape)
    reach = [d * (k - 1) + 1 for d, k in zip(window.dilation, kernel_size, strict=True)]
    size = []
    for n, r, s, (low, high) in zip(window.spatial(x.shape), reach, window.strides, window.padding, strict=True):
        dilated = 0 if n == 0 else (n - 1) * s + 1
        size.append(max(dilated + low + high - r + 1, 0))
    channels, outputs = x.shape[window.channel_axis], kernel.shape[window.filter_channel_axis]
    if 0 in size:
        return drop_height(jnp.zeros(window.activation_shape(x.shape[0], size, outputs), out_dtype), data_format)
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
    return drop_height(y, data_format)


def as_2d(x, kernel, strides, padding, dilation, data_format, filter_layout):
    """Operands and window of the primitives: a height of 1 for one spatial dimension, and one filter for all images."""
    if len(strides) == 1:
        x = jnp.expand_dims(x, data_format.index("W"))
        kernel = jnp.expand_dims(kernel, filter_layout.index("H"))
        strides, padding, dilation = (1, *strides), ((0, 0), *padding), (1, *dilation)
    layout = "NHWC" if data_format[-1] == "C" else "NCHW"
    return x, kernel[None], Window(tuple(strides), tuple(padding), tuple(dilation), layout, filter_layout)


def drop_height(y, data_format):
    """The result of the primitives in the format that was asked for."""
    return y if "H" in data_format else jnp.squeeze(y, data_format.index("W"))
