"""Depthwise and depthwise-separable convolution layers for `flax.nnx`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import numpy as jnp

from jax_dwsconv import _layers
from jax_dwsconv._epilogue import Activation
from jax_dwsconv.drop_in import conv_general_dilated

__all__ = ["DepthwiseConv", "SeparableConv"]


class DepthwiseConv(nnx.Conv):
    """Depthwise convolution over one or two spatial dimensions, with bias and activation.

    It is a `flax.nnx.Conv` with `feature_group_count` equal to `in_features`: the same arguments, the same parameters
    `kernel` (..kernel_size.., 1, out_features) and `bias` (out_features,) with the same initial values for the same
    rngs, so that the state of such a Conv loads as it is, and the same dtype of the result. The parameters enter the
    convolution as they are: in bfloat16 and float16, kernel and bias are not rounded first, the bias is added to the
    float32 sum, and the activation is applied to that, before the one rounding. That is more exact than flax's layer
    and not bit-equal to it. (With `input_dilation`, `out_sharding` or complex dtypes, the operands and the
    convolution are rounded as in flax.)

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = DepthwiseConv(16, 16, (3, 3), activation="relu6", rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((8, 32, 32, 16))).shape, layer.kernel.shape
    ((8, 32, 32, 16), (3, 3, 1, 16))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Any = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        use_bias: bool = True,
        mask: jax.Array | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable = _layers.KERNEL_INIT,
        bias_init: Callable = _layers.BIAS_INIT,
        promote_dtype: Callable = promote_dtype,
        preferred_element_type: Any = None,
        activation: Activation = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] | None = None,
        bias_metadata: Mapping[str, Any] | None = None,
    ):
        """Initializes the parameters.

        Args:
          in_features: number of input features.
          out_features: number of output features, a multiple of `in_features`. Output feature c * multiplier + j
            reads input feature c.
          kernel_size: int (one spatial dimension), or one or two ints.
          strides: step of the window, an int or one for every spatial dimension.
          padding: "SAME", "SAME_LOWER", "VALID", "CAUSAL" (1d), "CIRCULAR", "REFLECT", an int for all sides, or for
            every spatial dimension an int or a (low, high) pair. CIRCULAR and REFLECT cost a padded copy of the input.
          input_dilation: distance between the elements of the input, as in a transposed convolution.
            Where it is not 1, the padding must be an int or pairs.
          kernel_dilation: distance between the taps.
          use_bias: whether there is a bias.
          mask: of the kernel's shape, multiplied with it; None for no mask.
          dtype: of the computation and the result; None for the promoted dtype of inputs and parameters.
          param_dtype: of the initial parameters.
          precision: as for `flax.nnx.Conv`; only where the convolution goes to lax. The kernels here always sum in
            float32.
          kernel_init: initializer of the kernel.
          bias_init: initializer of the bias.
          promote_dtype: as for `flax.nnx.Conv`. Any function but the default is called on (inputs, kernel, bias), and
            its results are what enters the convolution.
          preferred_element_type: as for `flax.nnx.Conv`: dtype of the convolution, to which the bias is added.
          activation: None, "relu", "relu6", "silu", "gelu" (tanh form), "hard_swish", or a function of one array. The
            functions of `jax.nn` with these names are recognised; any other is applied to the rounded result.
          rngs: source of the initial values.
          kernel_metadata: metadata of the kernel's `nnx.Param`.
          bias_metadata: metadata of the bias's `nnx.Param`.

        Raises:
          ValueError: out_features is not a multiple of in_features, or kernel_size is not for one or two spatial
            dimensions.
          TypeError: kernel_size is not made of integers.
        """
        shape = _layers.kernel_shape(kernel_size, in_features, out_features)
        # flax 0.12.0 has no such arguments.
        metadata = {"kernel_metadata": kernel_metadata, "bias_metadata": bias_metadata}
        super().__init__(
            in_features,
            out_features,
            shape[:-2],
            strides,
            padding=padding,
            input_dilation=input_dilation,
            kernel_dilation=kernel_dilation,
            feature_group_count=in_features,
            use_bias=use_bias,
            mask=mask,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            conv_general_dilated=conv_general_dilated,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            **{name: value for name, value in metadata.items() if value},
        )
        self.activation = activation

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Applies the convolution.

        Args:
          inputs: (..., *spatial, in_features); any number of batch dimensions, none included.
          out_sharding: as for `flax.nnx.Conv`. With it the convolution goes to lax.

        Returns:
          (..., *spatial', out_features), in `dtype` or the promoted dtype of inputs and parameters.

        Raises:
          ValueError: a shape, the padding, the mask or the activation's name does not fit; the message names the
            argument.
          TypeError: an argument is of the wrong type.
        """
        _layers.check_input(inputs, self.kernel_size, self.in_features)
        return _layers.depthwise_conv(
            self,
            inputs,
            _parameters(self),
            promote=None if self.promote_dtype is promote_dtype else self._promote,
            preferred_element_type=self.preferred_element_type,
            out_sharding=out_sharding,
        )

    def _promote(self, *operands):
        return self.promote_dtype(operands, dtype=self.dtype)


class SeparableConv(nnx.Module):
    """Depthwise convolution over two spatial dimensions, then a pointwise (1x1) one, each with bias and activation.

    Stands in for two `flax.nnx.Conv` layers that are attributes `depthwise` and `pointwise`, created in this order:
    the same parameters under these names, (kh, kw, 1, in_features * multiplier) and (1, 1, in_features * multiplier,
    out_features) for the kernels, with the same initial values for the same rngs. The result has their dtype. In
    bfloat16 and float16, biases and activations are applied to float32 sums before these are rounded, which is more
    exact than flax's layers and not bit-equal to them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Any = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        multiplier: int = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable = _layers.KERNEL_INIT,
        bias_init: Callable = _layers.BIAS_INIT,
        depthwise_activation: Activation = None,
        pointwise_activation: Activation = None,
        rngs: nnx.Rngs,
    ):
        """Initializes the parameters.

        Args:
          in_features: number of input features.
          out_features: number of output features.
          kernel_size: (kh, kw) of the depthwise half.
          strides: of the depthwise half, an int or (height, width).
          padding: of the depthwise half: "SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", an int, or for both
            axes an int or a (low, high) pair.
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
          rngs: source of the initial values.

        Raises:
          ValueError: kernel_size has not two entries, or the multiplier is not positive.
          TypeError: kernel_size is not made of integers.
        """
        shape = _layers.kernel_shape(kernel_size, in_features, in_features * multiplier, ranks=(2,))
        init = {
            "use_bias": use_bias,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "precision": precision,
            "kernel_init": kernel_init,
            "bias_init": bias_init,
            "rngs": rngs,
        }
        self.depthwise = DepthwiseConv(
            in_features,
            shape[-1],
            shape[:-2],
            strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            activation=depthwise_activation,
            **init,
        )
        self.pointwise = nnx.Conv(shape[-1], out_features, (1, 1), **init)
        self.strides = strides
        self.padding = padding
        self.kernel_dilation = kernel_dilation
        self.dtype = dtype
        self.precision = precision
        self.depthwise_activation = depthwise_activation
        self.pointwise_activation = pointwise_activation

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies both convolutions.

        Args:
          inputs: (..., H, W, in_features); any number of batch dimensions, none included.

        Returns:
          (..., H', W', out_features), in `dtype` or the promoted dtype of inputs and parameters.

        Raises:
          ValueError: a shape, the padding or an activation's name does not fit; the message names the argument.
          TypeError: an argument is of the wrong type, or the dtype is complex.
        """
        _layers.check_input(inputs, self.depthwise.kernel_size, self.depthwise.in_features)
        return _layers.separable_conv(self, inputs, _parameters(self.depthwise), _parameters(self.pointwise))


def _parameters(conv: nnx.Conv) -> _layers.Parameters:
    return conv.kernel[...], None if conv.bias is None else conv.bias[...]
