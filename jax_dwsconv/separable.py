"""Depthwise-separable convolution: a depthwise convolution followed by a pointwise (1x1) one."""

import jax
from jax import lax

from jax_dwsconv import _arguments
from jax_dwsconv._epilogue import Activation
from jax_dwsconv.convolution import depthwise
from jax_dwsconv.pointwise import pointwise


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
      pointwise_gate: (..., C * multiplier), or None; see `pointwise_conv2d`.
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
    channels_last = _arguments.data_format(data_format, 2) == "NHWC"
    return pointwise(
        y,
        pointwise_kernel,
        pointwise_scale,
        pointwise_bias,
        pointwise_gate,
        pointwise_residual,
        pointwise_activation,
        precision,
        channels_last,
        dtype,
        prefix="pointwise_",
    )
