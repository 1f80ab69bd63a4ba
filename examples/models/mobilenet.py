"""MobileNetV1 and MobileNetV2 in Flax nnx, width 1."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .blocks import STEM_CHANNELS, DepthwiseLayer, InvertedResidualNet, Layers, Stage

# (channels, stride) of the blocks
V1_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

V2_STAGES = (
    Stage(expansion=1, channels=16, repeats=1, stride=1, kernel_size=3),
    Stage(expansion=6, channels=24, repeats=2, stride=2, kernel_size=3),
    Stage(expansion=6, channels=32, repeats=3, stride=2, kernel_size=3),
    Stage(expansion=6, channels=64, repeats=4, stride=2, kernel_size=3),
    Stage(expansion=6, channels=96, repeats=3, stride=1, kernel_size=3),
    Stage(expansion=6, channels=160, repeats=3, stride=2, kernel_size=3),
    Stage(expansion=6, channels=320, repeats=1, stride=1, kernel_size=3),
)


class SeparableBlock(nnx.Module):
    """A depthwise 3x3 and a pointwise convolution, each with BatchNorm and ReLU6."""

    def __init__(self, in_channels: int, channels: int, stride: int, layers: Layers):
        self.depthwise = layers.depthwise_norm(in_channels, 3, stride, nnx.relu6)
        self.pointwise = layers.conv_norm(in_channels, channels, activation=nnx.relu6)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, in_channels) -> (N, ceil(H / stride), ceil(W / stride), channels)."""
        return self.pointwise(self.depthwise(x))


class MobileNetV1(nnx.Module):
    """MobileNetV1 (Howard et al., 2017), 4,231,976 parameters with 1000 classes.

    Args:
        conv: as for `Layers`. Nothing else depends on it, and neither does the state.
        num_classes: the number of logits.
        dtype: of the computation and the logits, None for float32; the parameters are float32.
        rngs: the source of the initial parameters.
        blocks: (channels, stride) of each block.
    """

    def __init__(
        self,
        *,
        conv: DepthwiseLayer = "ours",
        num_classes: int = 1000,
        dtype: Any = None,
        rngs: nnx.Rngs,
        blocks: tuple[tuple[int, int], ...] = V1_BLOCKS,
    ):
        layers = Layers(conv, dtype, rngs)
        self.stem = layers.conv_norm(3, STEM_CHANNELS, kernel_size=3, stride=2, activation=nnx.relu6)
        inputs = (STEM_CHANNELS, *(channels for channels, _ in blocks))
        self.blocks = nnx.List(
            SeparableBlock(before, channels, stride, layers)
            for before, (channels, stride) in zip(inputs, blocks, strict=False)
        )
        self.dropout = nnx.Dropout(1e-3)
        self.classifier = layers.linear(inputs[-1], num_classes)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Images (N, H, W, 3), (pixel - 127) / 128, -> logits (N, num_classes). Training needs ``rngs`` for dropout."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.dropout(jnp.mean(x, axis=(1, 2)), rngs=rngs))


class MobileNetV2(InvertedResidualNet):
    """MobileNetV2 (Sandler et al., 2018), 3,504,872 parameters with 1000 classes.

    Args:
        **options: `conv`, `num_classes`, `dtype` and `rngs` of `InvertedResidualNet`.
    """

    def __init__(self, **options: Any):
        super().__init__(V2_STAGES, activation=nnx.relu6, **options)
