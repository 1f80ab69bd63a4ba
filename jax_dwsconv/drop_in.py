"""The drop-in for lax."""

import functools
import math
import operator

import jax
from jax import lax, numpy as jnp

from jax_dwsconv import _arguments, _config, convolution, quantized_primitive
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
        return convolution.convolve_int8(
            lhs, rhs, strides, pairs, dilation, data_format, filter_layout, None, None, Quantization()
        )
    out_dtype = _arguments.result_dtype(preferred_element_type, lhs)
    convolve = convolution.convolve if max(input_dilation) == 1 else convolution.convolve_transposed
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
