"""What the models are made of: the choice of depthwise layer, convolutions with BatchNorm, the inverted residual."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

DepthwiseLayer = Literal["ours", "flax"]
Activation = Callable[[jax.Array], jax.Array]

STEM_CHANNELS = 32
# The published models average over more steps (0.99 and more). With 0.9 the statistics of a short run are usable too.
NORM_MOMENTUM = 0.9
NORM_EPSILON = 1e-3


class Layers(NamedTuple):
    """Makes the layers of one model: convolutions with "SAME" padding and parameters in float32.

    Attributes:
        conv: what the depthwise convolutions are, "ours" (`jax_dwsconv.nnx.DepthwiseConv`) or "flax" (`flax.nnx.Conv`).
            Either holds the same parameters under the same names, so the state of one model loads in the other.
        dtype: of the computation and its results; None for float32.
        rngs: the source of the initial parameters.
    """

    conv: DepthwiseLayer
    dtype: Any
    rngs: nnx.Rngs

    def depthwise(self, channels: int, kernel_size: int, stride: int = 1, **options: Any) -> nnx.Conv:
        """(N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), C), kernel (kernel_size, kernel_size, 1, C)."""
        options |= {"strides": (stride, stride), "padding": "SAME", "dtype": self.dtype, "rngs": self.rngs}
        window = (kernel_size, kernel_size)
        if self.conv == "flax":
            return nnx.Conv(channels, channels, window, feature_group_count=channels, **options)
        if self.conv == "ours":
            # Imported here, so that the plain model runs without the plugin.
            from jax_dwsconv.nnx import DepthwiseConv  # noqa: PLC0415

            return DepthwiseConv(channels, channels, window, **options)
        raise ValueError(f"conv must be 'ours' or 'flax', got {self.conv!r}")

    def depthwise_norm(
        self, channels: int, kernel_size: int, stride: int = 1, activation: Activation | None = None
    ) -> "ConvNorm":
        """A depthwise convolution without bias and its BatchNorm."""
        return self._normalized(self.depthwise(channels, kernel_size, stride, use_bias=False), channels, activation)

    def conv_norm(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        activation: Activation | None = None,
    ) -> "ConvNorm":
        """A dense convolution without bias and its BatchNorm."""
        window, strides = (kernel_size, kernel_size), (stride, stride)
        conv = nnx.Conv(in_channels, channels, window, strides, use_bias=False, dtype=self.dtype, rngs=self.rngs)
        return self._normalized(conv, channels, activation)

    def linear(self, in_features: int, features: int, **options: Any) -> nnx.Linear:
        """(..., in_features) -> (..., features), with bias."""
        return nnx.Linear(in_features, features, dtype=self.dtype, rngs=self.rngs, **options)

    def _normalized(self, conv: nnx.Module, channels: int, activation: Activation | None) -> "ConvNorm":
        norm = nnx.BatchNorm(channels, momentum=NORM_MOMENTUM, epsilon=NORM_EPSILON, dtype=self.dtype, rngs=self.rngs)
        return ConvNorm(conv, norm, activation)


class ConvNorm(nnx.Module):
    """A convolution, BatchNorm and, where there is one, an activation."""

    def __init__(self, conv: nnx.Module, norm: nnx.BatchNorm, activation: Activation | None):
        self.conv = conv
        self.norm = norm
        self.activation = activation
        self.as_product = False

    def __call__(self, x: jax.Array, gate: jax.Array | None = None, residual: jax.Array | None = None) -> jax.Array:
        """(N, H, W, C) -> (N, H', W', channels).

        Args:
            x: the input.
            gate: (N, C), factors of x.
            residual: of the shape of the result, which it is added to. Only without an activation.
        """
        if self.as_product:
            return self._product(x, gate, residual)
        if gate is not None:
            x = x * gate[:, None, None]
        x = self.norm(self.conv(x))
        x = x if self.activation is None else self.activation(x)
        return x if residual is None else residual + x

    def fuse(self) -> None:
        """Makes one operation of all of it. Only where BatchNorm is folded.

        A depthwise convolution of ours takes the activation. A dense convolution becomes a matrix product: a GPU gets
        it without a call of a library that XLA cannot record in a CUDA graph. Parameters take the dtype of the
        computation, but for biases: these are added in float32.
        """
        if getattr(self.conv, "activation", self) is None:
            self.conv.activation, self.activation = self.activation, None
        self.as_product = self.conv.feature_group_count == 1
        if self.conv.dtype is not None:
            self.conv.kernel = self.conv.kernel.replace(self.conv.kernel[...].astype(self.conv.dtype))

    def _product(self, x: jax.Array, gate: jax.Array | None, residual: jax.Array | None) -> jax.Array:
        # Imported here, so that the plain model runs without the plugin.
        from jax_dwsconv import pointwise_conv2d  # noqa: PLC0415

        kernel, bias = self.conv.kernel[...], self.conv.bias[...]
        if kernel.shape[:2] != (1, 1) or tuple(self.conv.strides) != (1, 1):
            x, kernel = as_pointwise(x.astype(kernel.dtype), kernel, self.conv.strides)
        return pointwise_conv2d(x, kernel, bias=bias, gate=gate, residual=residual, activation=self.activation)


def as_pointwise(
    x: jax.Array, kernel: jax.Array, strides: tuple[int, int], zero_point: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Image and kernel of a pointwise convolution that does the same as a convolution with "SAME" padding.

    A pixel becomes all that is under the window, which on a GPU one kernel gathers; zeros make the number of channels a
    multiple of 16.

    Args:
        x: (N, H, W, C).
        kernel: (kh, kw, C, F).
        strides: of the window.
        zero_point: what is around the image.

    Returns:
        (N, H', W', K) and (K, F), with K at least kh * kw * C.
    """
    height, width, channels = kernel.shape[:3]
    missing = -(height * width * channels) % 16
    pads = jax.lax.padtype_to_pads(x.shape[1:3], (height, width), strides, "SAME")
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=zero_point)
    _, rows, columns, _ = x.shape
    taps = np.arange(rows * columns * channels, dtype=np.int32).reshape(rows, columns, channels)
    windows = np.lib.stride_tricks.sliding_window_view(taps, (height, width), (0, 1))[:: strides[0], :: strides[1]]
    index = np.moveaxis(windows, 2, 4).reshape(*windows.shape[:2], -1)
    index = np.pad(index, ((0, 0), (0, 0), (0, missing)), constant_values=taps.size)  # a zero at the end
    pixels = jnp.pad(x.reshape(x.shape[0], taps.size), ((0, 0), (0, 1)))
    kernel = jnp.pad(kernel.reshape(-1, kernel.shape[-1]), ((0, missing), (0, 0)))
    return jnp.take(pixels, index, axis=1, mode="clip"), kernel


class SqueezeExcite(nnx.Module):
    """Factors of every channel, which a small network makes of the means of all channels.

    Attributes:
      by_rows: whether to take the mean of the means of rows. Of few images, XLA leaves the mean of a plane to a few
        blocks of a GPU, those of rows to many.
    """

    def __init__(self, channels: int, reduced: int, activation: Activation, layers: Layers):
        self.by_rows = False
        self.reduce = layers.linear(channels, reduced)
        self.expand = layers.linear(reduced, channels)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, channels) -> (N, channels)."""
        if self.by_rows:
            dtype = jnp.promote_types(x.dtype, jnp.float32)
            means = jnp.mean(jnp.mean(x, axis=2, dtype=dtype), axis=1).astype(x.dtype)
        else:
            means = jnp.mean(x, axis=(1, 2))
        return nnx.sigmoid(self.expand(self.activation(self.reduce(means))))


class Stage(NamedTuple):
    """`repeats` inverted residual blocks; only the first has the stride and changes the number of channels."""

    expansion: int
    channels: int
    repeats: int
    stride: int
    kernel_size: int


class InvertedResidual(nnx.Module):
    """Expand by 1x1, filter depthwise, project by 1x1 (no activation), and add the input where the shapes allow it."""

    def __init__(
        self,
        in_channels: int,
        stage: Stage,
        stride: int,
        *,
        activation: Activation,
        squeeze_excite: bool,
        layers: Layers,
    ):
        hidden = in_channels * stage.expansion
        self.expand = layers.conv_norm(in_channels, hidden, activation=activation) if stage.expansion > 1 else None
        self.depthwise = layers.depthwise_norm(hidden, stage.kernel_size, stride, activation)
        self.squeeze_excite = SqueezeExcite(hidden, in_channels // 4, activation, layers) if squeeze_excite else None
        self.project = layers.conv_norm(hidden, stage.channels)
        self.residual = stride == 1 and in_channels == stage.channels

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, in_channels) -> (N, ceil(H / stride), ceil(W / stride), stage.channels)."""
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        gate = None if self.squeeze_excite is None else self.squeeze_excite(y)
        return self.project(y, gate, x if self.residual else None)


class InvertedResidualNet(nnx.Module):
    """A 3x3 stem of stride 2, stages of inverted residual blocks, a 1x1 head, the mean and a classifier.

    A new model is in training mode, as any nnx module: ``model.eval()`` switches BatchNorm to its running statistics
    and dropout off.

    Args:
        stages: the blocks.
        head_channels: width of the 1x1 head.
        dropout_rate: before the classifier.
        activation: everywhere but after the projections.
        squeeze_excite: whether the blocks have one, a quarter of their input wide.
        conv: as for `Layers`. Nothing else depends on it, and neither does the state.
        num_classes: the number of logits.
        dtype: of the computation and the logits, None for float32; the parameters are float32.
        rngs: the source of the initial parameters.
    """

    def __init__(
        self,
        stages: tuple[Stage, ...],
        *,
        head_channels: int = 1280,
        dropout_rate: float = 0.2,
        activation: Activation,
        squeeze_excite: bool = False,
        conv: DepthwiseLayer = "ours",
        num_classes: int = 1000,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        layers = Layers(conv, dtype, rngs)
        self.stem = layers.conv_norm(3, STEM_CHANNELS, kernel_size=3, stride=2, activation=activation)
        self.blocks = nnx.List([])
        channels = STEM_CHANNELS
        for stage in stages:
            for index in range(stage.repeats):
                block = InvertedResidual(
                    channels,
                    stage,
                    stage.stride if index == 0 else 1,
                    activation=activation,
                    squeeze_excite=squeeze_excite,
                    layers=layers,
                )
                self.blocks.append(block)
                channels = stage.channels
        self.head = layers.conv_norm(channels, head_channels, activation=activation)
        # Dropout takes its random stream when called: the model then has no random state to carry or to restore.
        self.dropout = nnx.Dropout(dropout_rate)
        self.classifier = layers.linear(head_channels, num_classes)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Images (N, H, W, 3), (pixel - 127) / 128, -> logits (N, num_classes). Training needs ``rngs`` for dropout."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = jnp.mean(self.head(x), axis=(1, 2))
        return self.classifier(self.dropout(x, rngs=rngs))
