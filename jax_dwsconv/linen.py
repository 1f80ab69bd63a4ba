"""Depthwise and depthwise-separable convolution layers for `flax.linen`."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax import numpy as jnp

from jax_dwsconv import _layers
from jax_dwsconv._epilogue import Activation

__all__ = ["DepthwiseConv", "SeparableConv"]


class DepthwiseConv(nn.Module):
    """Depthwise convolution over one or two spatial dimensions, with bias and activation.

    Stands in for `flax.linen.Conv` with `feature_group_count` equal to the input features: the same arguments, the
    same parameters `kernel` (..kernel_size.., 1, features) and `bias` (features,) with the same initial values for
    the same rng, so that a checkpoint of such a Conv loads as it is, and the same dtype of the result. The parameters
    enter the convolution as they are: in bfloat16 and float16, kernel and bias are not rounded first, the bias is
    added to the float32 sum, and the activation is applied to that, before the one rounding. That is more exact than
    flax's layer and not bit-equal to it. (With `input_dilation` or complex dtypes, the operands and the convolution
    are rounded as in flax.)

    >>> import jax, jax.numpy as jnp
    >>> layer = DepthwiseConv(kernel_size=(3, 3), activation="relu6")
    >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((8, 32, 32, 16)))
    >>> y.shape, variables["params"]["kernel"].shape
    ((8, 32, 32, 16), (3, 3, 1, 16))

    Attributes:
      features: number of output features, a multiple of the input features; None for as many as come in. Output feature
        c * multiplier + j reads input feature c.
      kernel_size: int (one spatial dimension), or one or two ints. Required.
      strides: step of the window, an int or one for every spatial dimension.
      padding: "SAME", "SAME_LOWER", "VALID", "CAUSAL" (1d), "CIRCULAR", "REFLECT", an int for all sides, or for every
        spatial dimension an int or a (low, high) pair. CIRCULAR and REFLECT cost a padded copy of the input.
      input_dilation: distance between the elements of the input, as in a transposed convolution.
        Where it is not 1, the padding must be an int or pairs.
      kernel_dilation: distance between the taps.
      use_bias: whether there is a bias.
      mask: of the kernel's shape, multiplied with it; None for no mask.
      dtype: of the computation and the result; None for the promoted dtype of inputs and parameters.
      param_dtype: of the initial parameters.
      precision: as for `flax.linen.Conv`; only where the convolution goes to lax. The kernels here always sum in
        float32.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
      promote_dtype: as for `flax.linen.Conv`. Any function but the default is called on (inputs, kernel, bias), and
        its results are what enters the convolution.
      activation: None, "relu", "relu6", "silu", "gelu" (tanh form), "hard_swish", or a function of one array. The
        functions of `jax.nn` with these names are recognised; any other is applied to the rounded result.
    """

    features: int | None = None
    kernel_size: int | Sequence[int] | None = None
    strides: int | Sequence[int] | None = 1
    padding: Any = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    use_bias: bool = True
    mask: jax.Array | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable = _layers.KERNEL_INIT
    bias_init: Callable = _layers.BIAS_INIT
    promote_dtype: Callable = promote_dtype
    activation: Activation = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the convolution.

        Args:
          inputs: (..., *spatial, C); any number of batch dimensions, none included.

        Returns:
          (..., *spatial', features), in `dtype` or the promoted dtype of inputs and parameters.

        Raises:
          ValueError: kernel_size is not for one or two spatial dimensions, features is not a multiple of C, or a
            shape, the padding, the mask or the activation's name does not fit; the message names the argument.
          TypeError: an argument is of the wrong type.
        """
        shape = _kernel_shape(self.kernel_size, inputs, self.features)
        return _layers.depthwise_conv(
            self,
            inputs,
            _parameters(self, shape),
            promote=None
            if self.promote_dtype is promote_dtype
            else functools.partial(self.promote_dtype, dtype=self.dtype),
        )


class SeparableConv(nn.Module):
    """Depthwise convolution over two spatial dimensions, then a pointwise (1x1) one, each with bias and activation.

    Stands in for two `flax.linen.Conv` layers named `depthwise` and `pointwise`: the parameters `kernel` and `bias`
    of the two are in submodules of these names, with the same shapes, (kh, kw, 1, C * multiplier) and (1, 1, C *
    multiplier, features), and the same initial values for the same rng. The result has their dtype. In bfloat16 and
    float16, biases and activations are applied to float32 sums before these are rounded, which is more exact than
    flax's layers and not bit-equal to them.

    Attributes:
      features: number of output features.
      kernel_size: (kh, kw) of the depthwise half. Required.
      strides: of the depthwise half, an int or (height, width).
      padding: of the depthwise half: "SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", an int, or for both axes
        an int or a (low, high) pair.
      kernel_dilation: of the depthwise half, an int or (height, width).
      multiplier: depthwise output features for each input feature.
      use_bias: whether the two halves have a bias.
      dtype: of the computation and the result; None for the promoted dtype of inputs and parameters.
      param_dtype: of the initial parameters.
      precision: of the pointwise half, as for `jax.lax.dot_general`.
      kernel_init: initializer of both kernels.
      bias_init: initializer of both biases.
      depthwise_activation: between the halves; as for `DepthwiseConv`.
      pointwise_activation: of the result; as for `DepthwiseConv`.
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: Any = "SAME"
    kernel_dilation: int | Sequence[int] | None = 1
    multiplier: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Callable = _layers.KERNEL_INIT
    bias_init: Callable = _layers.BIAS_INIT
    depthwise_activation: Activation = None
    pointwise_activation: Activation = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies both convolutions.

        Args:
          inputs: (..., H, W, C); any number of batch dimensions, none included.

        Returns:
          (..., H', W', features), in `dtype` or the promoted dtype of inputs and parameters.

        Raises:
          ValueError: kernel_size has not two entries, or a shape, the padding or an activation's name does not fit;
            the message names the argument.
          TypeError: an argument is of the wrong type, or the dtype is complex.
        """
        shape = _kernel_shape(self.kernel_size, inputs, None, self.multiplier, ranks=(2,))
        pointwise_shape = (1, 1, shape[-1], self.features)
        settings = (self.use_bias, self.param_dtype, self.kernel_init, self.bias_init)
        depthwise = _Parameters(shape, *settings, name="depthwise")()
        pointwise = _Parameters(pointwise_shape, *settings, name="pointwise")()
        return _layers.separable_conv(self, inputs, depthwise, pointwise)


class _Parameters(nn.Module):
    """Holds the parameters of a convolution that is computed elsewhere."""

    kernel_shape: tuple[int, ...]
    use_bias: bool
    param_dtype: Any
    kernel_init: Callable
    bias_init: Callable

    @nn.compact
    def __call__(self) -> _layers.Parameters:
        return _parameters(self, self.kernel_shape)


def _parameters(module, kernel_shape) -> _layers.Parameters:
    kernel = module.param("kernel", module.kernel_init, kernel_shape, module.param_dtype)
    if not module.use_bias:
        return kernel, None
    return kernel, module.param("bias", module.bias_init, kernel_shape[-1:], module.param_dtype)


def _kernel_shape(kernel_size, inputs, features, multiplier=1, **options):
    in_features = inputs.shape[-1] if inputs.ndim else 0
    shape = _layers.kernel_shape(
        kernel_size, in_features, in_features * multiplier if features is None else features, **options
    )
    _layers.check_input(inputs, shape[:-2], in_features)
    return shape
