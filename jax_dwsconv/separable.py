"""Depthwise-separable convolution: a depthwise convolution followed by a pointwise (1x1) one."""

import jax
from jax import lax, numpy as jnp

from jax_dwsconv import _arguments, _epilogue
from jax_dwsconv._epilogue import Activation
from jax_dwsconv.convolution import depthwise


def separable_conv2d(
    x: jax.Array,
    depthwise_kernel: jax.Array,
    pointwise_kernel: jax.Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding="SAME",
    dilation: int | tuple[int, int] = 1,
    depthwise_scale: jax.Array | None = None,
    depthwise_bias: jax.Array | None = None,
    depthwise_activation: Activation = None,
    pointwise_scale: jax.Array | None = None,
    pointwise_bias: jax.Array | None = None,
    pointwise_gate: jax.Array | None = None,
    pointwise_residual: jax.Array | None = None,
    pointwise_activation: Activation = None,
    precision: lax.PrecisionLike = None,
    data_format: str | None = None,
    preferred_element_type=None,
) -> jax.Array:
    """Depthwise convolution, then a matrix product over the channels, each with scale, bias and activation.

    As networks have them, factors may be between the two, and a residual after them.

    Args:
      x: (..., H, W, C), or (..., C, H, W) with data_format="NCHW".
      depthwise_kernel: (kh, kw, 1, C * multiplier).
      pointwise_kernel: (1, 1, C * multiplier, F), or (C * multiplier, F).
      strides: of the depthwise convolution, as are padding and dilation; see `depthwise_conv2d`.
      padding: see `depthwise_conv2d`.
      dilation: see `depthwise_conv2d`.
      depthwise_scale: (C * multiplier,) or (), or None.
      depthwise_bias: (C * multiplier,) or (), or None.
      depthwise_activation: see `depthwise_conv2d`.
      pointwise_scale: (F,) or (), or None.
      pointwise_bias: (F,) or (), or None.
      pointwise_gate: (..., C * multiplier), or None: factors of every image and channel for the input of the matrix
        product, as squeeze-and-excitation has them (Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018).
      pointwise_residual: of the shape and dtype of the result, or None. It is added before the activation.
      pointwise_activation: see `depthwise_conv2d`.
      precision: of the matrix product, as for `jax.lax.dot_general`.
      data_format: "NHWC" (the default) or "NCHW".
      preferred_element_type: dtype of the result and of what lies between the two halves; by default the promoted dtype
        of x and both kernels. The matrix product takes its operands in this dtype and sums in float32.

    Returns:
      (..., H', W', F) or (..., F, H', W').

    Raises:
      ValueError, TypeError: as `depthwise_conv2d`.
    """
    pointwise_kernel = _arguments.floating_array("pointwise_kernel", pointwise_kernel)
    dtype = _arguments.result_dtype(
        preferred_element_type,
        _arguments.floating_array("x", x),
        _arguments.floating_array("depthwise_kernel", depthwise_kernel),
        pointwise_kernel,
    )
    y = depthwise(
        x,
        depthwise_kernel,
        2,
        strides,
        padding,
        dilation,
        depthwise_bias,
        depthwise_scale,
        depthwise_activation,
        data_format,
        dtype,
        prefix="depthwise_",
    )
    channel_axis = y.ndim - 1 if _arguments.data_format(data_format, 2) == "NHWC" else y.ndim - 3
    if pointwise_gate is not None:
        y = _gated(y, pointwise_gate, channel_axis)
    return _pointwise(
        y,
        pointwise_kernel,
        channel_axis,
        pointwise_scale,
        pointwise_bias,
        pointwise_residual,
        pointwise_activation,
        precision,
        dtype,
    )


def _gated(y, gate, channel_axis):
    gate = _arguments.floating_array("pointwise_gate", gate)
    shape = (*y.shape[:-3], y.shape[channel_axis])
    if gate.shape != shape:
        raise ValueError(
            f"pointwise_gate must have shape {shape}, one factor for every image and channel of the depthwise result, "
            f"got {gate.shape}"
        )
    accumulator = _epilogue.accumulator_dtype(y.dtype)
    spatial_axes = tuple(axis for axis in range(y.ndim - 3, y.ndim) if axis != channel_axis)
    return (y.astype(accumulator) * jnp.expand_dims(gate.astype(accumulator), spatial_axes)).astype(y.dtype)


def _pointwise(y, kernel, channel_axis, scale, bias, residual, activation, precision, out_dtype):
    channels = y.shape[channel_axis]
    if kernel.shape[-2:-1] != (channels,) or kernel.shape[:-2] not in ((), (1, 1)):
        raise ValueError(
            f"pointwise_kernel must have shape (1, 1, {channels}, F) or ({channels}, F) to follow a depthwise result "
            f"with {channels} channels, got {kernel.shape}"
        )
    features = kernel.shape[-1]
    scale = _arguments.channel_vector("pointwise_scale", scale, features)
    bias = _arguments.channel_vector("pointwise_bias", bias, features)
    kernel = kernel.reshape(channels, features).astype(out_dtype)
    accumulator = _epilogue.accumulator_dtype(out_dtype)
    contract = (((channel_axis,), (0,)), ((), ()))
    y = lax.dot_general(y, kernel, contract, precision=precision, preferred_element_type=accumulator)
    y = jnp.moveaxis(y, -1, channel_axis)
    if residual is not None:
        residual = _arguments.like_result("pointwise_residual", residual, y.shape, out_dtype)
    y = _epilogue.apply(y, scale, bias, residual, activation, channel_axis, out_dtype)
    return _epilogue.apply_unnamed(y, activation)
