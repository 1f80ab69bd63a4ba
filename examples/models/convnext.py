"""ConvNeXt-T in Flax nnx, without stochastic depth."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .blocks import DepthwiseLayer, Layers

STAGES = ((96, 3), (192, 3), (384, 9), (768, 3))  # (channels, blocks)
NORM_EPSILON = 1e-6
LAYER_SCALE = 1e-6
INIT = nnx.initializers.truncated_normal(0.02)


class Block(nnx.Module):
    """A depthwise 7x7, LayerNorm, and two 1x1 convolutions with GELU between them, scaled and added to the input."""

    def __init__(self, channels: int, layers: Layers):
        self.depthwise = layers.depthwise(channels, 7, kernel_init=INIT)
        self.norm = _layer_norm(channels, layers)
        self.expand = layers.linear(channels, 4 * channels, kernel_init=INIT)
        self.project = layers.linear(4 * channels, channels, kernel_init=INIT)
        self.scale = nnx.Param(jnp.full(channels, LAYER_SCALE))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, channels), unchanged in shape."""
        y = self.expand(self.norm(self.depthwise(x)))
        y = self.project(nnx.gelu(y, approximate=False))
        return x + y * self.scale[...].astype(y.dtype)


class Downsample(nnx.Module):
    """LayerNorm and a 2x2 convolution of stride 2."""

    def __init__(self, in_channels: int, channels: int, layers: Layers):
        self.norm = _layer_norm(in_channels, layers)
        self.conv = _patches(in_channels, channels, 2, layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, in_channels) -> (N, H // 2, W // 2, channels)."""
        return self.conv(self.norm(x))


class ConvNeXtT(nnx.Module):
    """ConvNeXt-T (Liu et al., 2022), 28,589,128 parameters with 1000 classes. Images of at least 32 x 32.

    Args:
        conv: as for `Layers`. Nothing else depends on it, and neither does the state.
        num_classes: the number of logits.
        dtype: of the computation and the logits, None for float32; the parameters are float32.
        rngs: the source of the initial parameters.
        stages: (channels, blocks) of each stage.
    """

    def __init__(
        self,
        *,
        conv: DepthwiseLayer = "ours",
        num_classes: int = 1000,
        dtype: Any = None,
        rngs: nnx.Rngs,
        stages: tuple[tuple[int, int], ...] = STAGES,
    ):
        layers = Layers(conv, dtype, rngs)
        channels = stages[0][0]
        self.stem = _patches(3, channels, 4, layers)
        self.stem_norm = _layer_norm(channels, layers)
        self.blocks = nnx.List([])
        for width, count in stages:
            if width != channels:
                self.blocks.append(Downsample(channels, width, layers))
                channels = width
            self.blocks.extend(Block(width, layers) for _ in range(count))
        self.norm = _layer_norm(channels, layers)
        self.classifier = layers.linear(channels, num_classes, kernel_init=INIT)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Images (N, H, W, 3), (pixel - 127) / 128, -> logits (N, num_classes). ``rngs`` is not used: no dropout."""
        x = self.stem_norm(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(jnp.mean(x, axis=(1, 2))))


def _patches(in_channels: int, channels: int, size: int, layers: Layers) -> nnx.Conv:
    window = (size, size)
    return nnx.Conv(
        in_channels, channels, window, window, padding="VALID", kernel_init=INIT, dtype=layers.dtype, rngs=layers.rngs
    )


def _layer_norm(channels: int, layers: Layers) -> nnx.LayerNorm:
    return nnx.LayerNorm(channels, epsilon=NORM_EPSILON, dtype=layers.dtype, rngs=layers.rngs)
