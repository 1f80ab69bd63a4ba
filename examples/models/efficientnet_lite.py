"""EfficientNet-Lite0 in Flax nnx, with a choice of depthwise layer.

The architecture is that of the TensorFlow TPU repository, ``models/official/efficientnet/lite``: EfficientNet-B0
without squeeze-and-excite, ReLU6 in place of swish, and a stem and a head of fixed width. Stochastic depth is left out.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

DepthwiseLayer = Literal["ours", "flax"]

IMAGE_SIZE = 224
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280
DROPOUT_RATE = 0.2
NORM_MOMENTUM = 0.99
NORM_EPSILON = 1e-3


class Stage(NamedTuple):
    """``repeats`` inverted residual blocks; only the first has the stride and changes the number of channels."""

    expansion: int
    channels: int
    repeats: int
    stride: int
    kernel_size: int


STAGES = (
    Stage(expansion=1, channels=16, repeats=1, stride=1, kernel_size=3),
    Stage(expansion=6, channels=24, repeats=2, stride=2, kernel_size=3),
    Stage(expansion=6, channels=40, repeats=2, stride=2, kernel_size=5),
    Stage(expansion=6, channels=80, repeats=3, stride=2, kernel_size=3),
    Stage(expansion=6, channels=112, repeats=3, stride=1, kernel_size=5),
    Stage(expansion=6, channels=192, repeats=4, stride=2, kernel_size=5),
    Stage(expansion=6, channels=320, repeats=1, stride=1, kernel_size=3),
)


def depthwise_conv(layer: DepthwiseLayer, channels: int, kernel_size: int, stride: int, rngs: nnx.Rngs) -> nnx.Module:
    """A depthwise layer, (N, H, W, C) -> (N, ceil(H / stride), ceil(W / stride), C).

    Either kind holds one parameter, ``kernel`` of shape (kernel_size, kernel_size, 1, C), so the same state loads in
    both.
    """
    window = {"kernel_size": (kernel_size, kernel_size), "strides": (stride, stride), "padding": "SAME"}
    if layer == "flax":
        return nnx.Conv(channels, channels, **window, use_bias=False, feature_group_count=channels, rngs=rngs)
    if layer == "ours":
        # Imported here, so that the plain model runs without the plugin.
        from jax_dwsconv.nnx import DepthwiseConv  # noqa: PLC0415

        return DepthwiseConv(channels, channels, **window, use_bias=False, rngs=rngs)
    raise ValueError(f"conv must be 'ours' or 'flax', got {layer!r}")


class ConvNorm(nnx.Module):
    """A convolution, BatchNorm and, if asked for, ReLU6."""

    def __init__(self, conv: nnx.Module, channels: int, *, activate: bool, rngs: nnx.Rngs):
        self.conv = conv
        self.norm = nnx.BatchNorm(channels, momentum=NORM_MOMENTUM, epsilon=NORM_EPSILON, rngs=rngs)
        self.activate = activate

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C_in) -> (N, H', W', channels)."""
        x = self.norm(self.conv(x))
        return nnx.relu6(x) if self.activate else x


def conv_norm(
    in_channels: int, channels: int, *, kernel_size: int = 1, stride: int = 1, activate: bool = True, rngs: nnx.Rngs
) -> ConvNorm:
    """A dense convolution with "SAME" padding and its BatchNorm."""
    window = {"kernel_size": (kernel_size, kernel_size), "strides": (stride, stride), "padding": "SAME"}
    conv = nnx.Conv(in_channels, channels, **window, use_bias=False, rngs=rngs)
    return ConvNorm(conv, channels, activate=activate, rngs=rngs)


class InvertedResidual(nnx.Module):
    """Expand by 1x1, filter depthwise, project by 1x1 (no activation), and add the input where the shapes allow it."""

    def __init__(self, in_channels: int, stage: Stage, stride: int, *, conv: DepthwiseLayer, rngs: nnx.Rngs):
        hidden = in_channels * stage.expansion
        self.expand = conv_norm(in_channels, hidden, rngs=rngs) if stage.expansion > 1 else None
        depthwise = depthwise_conv(conv, hidden, stage.kernel_size, stride, rngs)
        self.depthwise = ConvNorm(depthwise, hidden, activate=True, rngs=rngs)
        self.project = conv_norm(hidden, stage.channels, activate=False, rngs=rngs)
        self.residual = stride == 1 and in_channels == stage.channels

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, in_channels) -> (N, ceil(H / stride), ceil(W / stride), stage.channels)."""
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.depthwise(y))
        return x + y if self.residual else y


class EfficientNetLite0(nnx.Module):
    """EfficientNet-Lite0, 4,652,008 parameters with 1000 classes.

    A new model is in training mode, as any nnx module: ``model.eval()`` switches BatchNorm to its running statistics
    and dropout off.

    Args:
        conv: which layer the depthwise convolutions are, "ours" (``jax_dwsconv.nnx.DepthwiseConv``) or "flax"
            (``flax.nnx.Conv``). Nothing else depends on it, and neither does the state.
        num_classes: the number of logits.
        rngs: the source of the initial parameters.
    """

    def __init__(self, *, conv: DepthwiseLayer = "ours", num_classes: int = 1000, rngs: nnx.Rngs):
        self.stem = conv_norm(3, STEM_CHANNELS, kernel_size=3, stride=2, rngs=rngs)
        self.blocks = nnx.List(_blocks(conv, rngs))
        self.head = conv_norm(STAGES[-1].channels, HEAD_CHANNELS, rngs=rngs)
        # Dropout takes its random stream when called: the model then has no random state to carry or to restore.
        self.dropout = nnx.Dropout(DROPOUT_RATE)
        self.classifier = nnx.Linear(HEAD_CHANNELS, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Images (N, H, W, 3), (pixel - 127) / 128, -> logits (N, num_classes). Training needs ``rngs`` for dropout."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = jnp.mean(self.head(x), axis=(1, 2))
        return self.classifier(self.dropout(x, rngs=rngs))


def _blocks(conv: DepthwiseLayer, rngs: nnx.Rngs) -> list[InvertedResidual]:
    blocks, channels = [], STEM_CHANNELS
    for stage in STAGES:
        for index in range(stage.repeats):
            stride = stage.stride if index == 0 else 1
            blocks.append(InvertedResidual(channels, stage, stride, conv=conv, rngs=rngs))
            channels = stage.channels
    return blocks


def count_parameters(model: nnx.Module) -> int:
    """The number of trainable parameters; the running statistics of BatchNorm are none."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def compiled(model: nnx.Module) -> partial[jax.Array]:
    """The model as a function of its input alone, `partial(jitted, leaves)`.

    The state is passed as a flat list: flattening the module's own tree on each call would cost more than a small
    network takes on a GPU.
    """
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)

    @jax.jit
    def forward(leaves: list[jax.Array], x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))(x)

    return partial(forward, leaves)
