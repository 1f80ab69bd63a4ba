"""What the linen and nnx layers share: dtype promotion, padding, and the calls of the public functions."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from flax.linen.dtypes import canonicalize_dtype
from jax import numpy as jnp

from jax_dwsconv import _arguments, _epilogue
from jax_dwsconv._epilogue import Activation
from jax_dwsconv.convolution import depthwise_conv1d, depthwise_conv2d
from jax_dwsconv.drop_in import conv_general_dilated
from jax_dwsconv.separable import separable_conv2d

KERNEL_INIT = jax.nn.initializers.lecun_normal()
BIAS_INIT = jax.nn.initializers.zeros

_PAD_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}

# kernel and bias, where there is one
Parameters = tuple[jax.Array, jax.Array | None]


class DepthwiseLayer(Protocol):
    """The attributes of a layer that `depthwise_conv` reads."""

    strides: int | Sequence[int] | None
    padding: Any
    input_dilation: int | Sequence[int] | None
    kernel_dilation: int | Sequence[int] | None
    mask: jax.Array | None
    dtype: Any
    precision: Any
    activation: Activation


class SeparableLayer(Protocol):
    """The attributes of a layer that `separable_conv` reads."""

    strides: int | Sequence[int] | None
    padding: Any
    kernel_dilation: int | Sequence[int] | None
    dtype: Any
    precision: Any
    depthwise_activation: Activation
    pointwise_activation: Activation


def kernel_shape(
    kernel_size: int | Sequence[int] | None, in_features: int, out_features: int, ranks: tuple[int, ...] = (1, 2)
) -> tuple[int, ...]:
    """The shape of a depthwise kernel, (..kernel_size.., 1, out_features).

    Raises:
      ValueError: `kernel_size` has not one of the `ranks`, or `out_features` is not a positive multiple of
        `in_features`.
      TypeError: `kernel_size` is not made of integers.
    """
    sizes = kernel_size if hasattr(kernel_size, "__len__") else (kernel_size,)
    if kernel_size is None or len(sizes) not in ranks:
        accepted = "an int, or a sequence of one or two ints" if 1 in ranks else "a sequence of two ints"
        raise ValueError(f"kernel_size must be {accepted}, got {kernel_size!r}; for other convolutions use flax's Conv")
    sizes = tuple(_arguments.as_int("kernel_size", n, 1) for n in sizes)
    if in_features < 1 or out_features < 1 or out_features % in_features:
        raise ValueError(
            f"the output features of a depthwise convolution must be a positive multiple of its input features, got "
            f"{out_features} output features and {in_features} input features"
        )
    return (*sizes, 1, out_features)


def check_input(x: jax.Array, kernel_size: Sequence[int], in_features: int) -> None:
    """Raises ValueError where x is not (..., *spatial, in_features)."""
    if x.ndim < len(kernel_size) + 1 or x.shape[-1] != in_features:
        raise ValueError(
            f"inputs must have at least {len(kernel_size) + 1} dimensions, the last of size {in_features} for the "
            f"features, got shape {x.shape}"
        )


def depthwise_conv(
    layer: DepthwiseLayer,
    x: jax.Array,
    parameters: Parameters,
    *,
    promote: Callable | None,
    preferred_element_type=None,
    out_sharding=None,
) -> jax.Array:
    """The depthwise convolution of a layer, with its bias and activation.

    Args:
      layer: the settings.
      x: (..., *spatial, C).
      parameters: of the shapes that `kernel_shape` gives.
      promote: (x, kernel, bias) -> the same in the dtypes to compute with; None for flax's rule without its casts.
      preferred_element_type: as for flax.nnx.Conv.
      out_sharding: as for flax.nnx.Conv.
    """
    kernel, bias = parameters
    rank, kernel = kernel.ndim - 2, _masked(kernel, layer.mask)
    x, kernel, bias, dtype = _promote(x, kernel, bias, layer.dtype, promote)
    out_dtype = _out_dtype(dtype, preferred_element_type, bias)
    dilation = _arguments.per_axis("kernel_dilation", layer.kernel_dilation, rank)
    input_dilation = _arguments.per_axis("input_dilation", layer.input_dilation, rank)
    x, padding = _pad(x, layer.padding, kernel.shape[:rank], dilation)
    if max(input_dilation) == 1 and out_sharding is None and jnp.issubdtype(dtype, jnp.floating):
        convolve = depthwise_conv1d if rank == 1 else depthwise_conv2d
        return convolve(
            x,
            kernel,
            strides=layer.strides,
            padding=padding,
            dilation=dilation,
            bias=bias,
            activation=layer.activation,
            preferred_element_type=out_dtype,
        )
    y = _conv_general_dilated(
        x.astype(dtype),
        kernel.astype(dtype),
        strides=_arguments.per_axis("strides", layer.strides, rank),
        padding=padding,
        input_dilation=input_dilation,
        dilation=dilation,
        precision=layer.precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    ).astype(_epilogue.accumulator_dtype(out_dtype))
    y = _epilogue.apply(y, None, bias, None, layer.activation, y.ndim - 1, out_dtype)
    return _epilogue.apply_unnamed(y, layer.activation)


def separable_conv(layer: SeparableLayer, x: jax.Array, depthwise: Parameters, pointwise: Parameters) -> jax.Array:
    """The depthwise and then the pointwise convolution of a layer, each with its bias and activation."""
    dtype = _result_type(x, *depthwise, *pointwise, dtype=layer.dtype)
    dilation = _arguments.per_axis("kernel_dilation", layer.kernel_dilation, 2)
    x, padding = _pad(_cast_input(x, dtype), layer.padding, depthwise[0].shape[:2], dilation)
    (depthwise_kernel, depthwise_bias), (pointwise_kernel, pointwise_bias) = (
        [_cast_parameter(p, dtype) for p in parameters] for parameters in (depthwise, pointwise)
    )
    return separable_conv2d(
        x,
        depthwise_kernel,
        pointwise_kernel,
        strides=layer.strides,
        padding=padding,
        dilation=dilation,
        depthwise_bias=depthwise_bias,
        depthwise_activation=layer.depthwise_activation,
        pointwise_bias=pointwise_bias,
        pointwise_activation=layer.pointwise_activation,
        precision=layer.precision,
        preferred_element_type=dtype,
    )


def _masked(kernel, mask):
    if mask is None:
        return kernel
    if jnp.shape(mask) != kernel.shape:
        raise ValueError(f"mask must have the shape of the kernel, {kernel.shape}, got {jnp.shape(mask)}")
    return kernel * mask


# Dtypes: the result has the dtype that flax gives it. The kernels read operands of a lower precision as they are, and
# the float32 parameters of a bfloat16 computation too, so most of flax's casts, each a pass over memory, are not
# needed.


def _result_type(*operands, dtype=None):
    return jax.dtypes.canonicalize_dtype(canonicalize_dtype(*operands, dtype=dtype))


def _promote(x, kernel, bias, dtype, promote):
    if promote is not None:
        x, kernel, bias = promote(x, kernel, bias)
        return x, kernel, bias, _result_type(x, kernel, bias)
    dtype = _result_type(x, kernel, bias, dtype=dtype)
    return _cast_input(x, dtype), _cast_parameter(kernel, dtype), _cast_parameter(bias, dtype), dtype


def _out_dtype(dtype, preferred_element_type, bias):
    if preferred_element_type is None:
        return dtype
    # flax adds a bias of the compute dtype to a convolution of the preferred one.
    return preferred_element_type if bias is None else jnp.promote_types(preferred_element_type, dtype)


def _cast_input(x, dtype):
    x = jnp.asarray(x)
    is_read_as_it_is = dtype == jnp.float32 and x.dtype in (jnp.bfloat16, jnp.float16)
    return x if is_read_as_it_is else x.astype(dtype)


def _cast_parameter(parameter, dtype):
    if parameter is None or parameter.dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        return parameter
    return parameter.astype(dtype)


def _pad(x, padding, kernel_size, dilation):
    """Resolves "CIRCULAR" and "REFLECT", as flax does: the padded x, and the padding that is left to do."""
    mode = _PAD_MODES.get(padding.upper()) if isinstance(padding, str) else None
    if mode is None:
        return x, padding
    reach = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    batch = [(0, 0)] * (x.ndim - len(reach) - 1)
    return jnp.pad(x, [*batch, *((r // 2, (r + 1) // 2) for r in reach), (0, 0)], mode=mode), "VALID"


def _conv_general_dilated(x, kernel, *, strides, padding, input_dilation, dilation, **options):
    """The drop-in for lax, over any number of batch dimensions."""
    rank, channels = len(strides), x.shape[-1]
    if isinstance(padding, str) and max(input_dilation) > 1:
        raise ValueError(
            f"padding must be an int or (low, high) pairs where input_dilation is not 1, got padding={padding!r} and "
            f"input_dilation={input_dilation}"
        )
    padding = _arguments.padding_pairs(padding, x.shape[-rank - 1 : -1], kernel.shape[:rank], strides, dilation)
    batch = x.shape[: -rank - 1]
    y = conv_general_dilated(
        x.reshape(math.prod(batch), *x.shape[-rank - 1 :]),
        kernel,
        strides,
        padding,
        input_dilation,
        dilation,
        dimension_numbers=("NWC", "WIO", "NWC") if rank == 1 else ("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels,
        **options,
    )
    return y.reshape(*batch, *y.shape[1:])
