"""Layers that `python -m jax_dwsconv bench` times."""

from typing import NamedTuple

import numpy as np


class Layer(NamedTuple):
    """A depthwise convolution with SAME padding, of a square image with a square kernel unless a width is given."""

    size: int
    channels: int
    kernel_size: int
    stride: int
    width: int | None = None
    kernel_width: int | None = None
    dilation: int = 1
    multiplier: int = 1

    @property
    def image(self) -> tuple[int, int]:
        """Height and width."""
        return self.size, self.width or self.size

    @property
    def result(self) -> tuple[int, int]:
        """Height and width."""
        return tuple(-(-n // self.stride) for n in self.image)

    @property
    def window(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        return self.kernel_size, self.kernel_width or self.kernel_size

    def __str__(self) -> str:
        (height, width), (kernel_height, kernel_width) = self.image, self.window
        kernel = f"k{kernel_height}" if kernel_height == kernel_width else f"k{kernel_height}x{kernel_width}"
        text = f"{height}x{width}x{self.channels} {kernel} s{self.stride}"
        text += f" d{self.dilation}" if self.dilation > 1 else ""
        return text + (f" m{self.multiplier}" if self.multiplier > 1 else "")


def random_layers(count: int, seed: int) -> list[Layer]:
    """Layers that no model has: kernels of 2 to 9, some rectangular or dilated, odd images, odd numbers of channels."""
    rng = np.random.default_rng(seed)
    layers = []
    while len(layers) < count:
        height, kernel_height = int(rng.integers(7, 57)), int(rng.integers(2, 10))
        width = height if rng.random() < 0.5 else int(rng.integers(7, 57))
        kernel_width = kernel_height if rng.random() < 0.6 else int(rng.integers(1, 10))
        stride = 2 if rng.random() < 0.25 else 1
        dilation = int(rng.integers(2, 5)) if stride == 1 and rng.random() < 0.3 else 1
        channels = int(rng.integers(3, 50)) * 8 if rng.random() < 0.7 else int(rng.integers(20, 400))
        multiplier = 2 if rng.random() < 0.15 else 1
        layers.append(Layer(height, channels, kernel_height, stride, width, kernel_width, dilation, multiplier))
    return layers


# Of MobileNetV2, EfficientNet-B0 and ConvNeXt-T.
LAYERS = (
    Layer(112, 32, 3, 1),
    Layer(112, 96, 3, 2),
    Layer(56, 144, 3, 1),
    Layer(56, 144, 5, 2),
    Layer(28, 240, 5, 1),
    Layer(14, 512, 3, 1),
    Layer(14, 672, 5, 1),
    Layer(7, 1152, 5, 1),
    Layer(56, 96, 7, 1),
    Layer(14, 384, 7, 1),
)

# The different layers of each model at 224 x 224.
MODELS = {
    "mobilenet_v1": (
        Layer(112, 32, 3, 1),
        Layer(112, 64, 3, 2),
        Layer(56, 128, 3, 1),
        Layer(56, 128, 3, 2),
        Layer(28, 256, 3, 1),
        Layer(28, 256, 3, 2),
        Layer(14, 512, 3, 1),
        Layer(14, 512, 3, 2),
        Layer(7, 1024, 3, 1),
    ),
    "mobilenet_v2": (
        Layer(112, 32, 3, 1),
        Layer(112, 96, 3, 2),
        Layer(56, 144, 3, 1),
        Layer(56, 144, 3, 2),
        Layer(28, 192, 3, 1),
        Layer(28, 192, 3, 2),
        Layer(14, 384, 3, 1),
        Layer(14, 576, 3, 1),
        Layer(14, 576, 3, 2),
        Layer(7, 960, 3, 1),
    ),
    "efficientnet_b0": (
        Layer(112, 32, 3, 1),
        Layer(112, 96, 3, 2),
        Layer(56, 144, 3, 1),
        Layer(56, 144, 5, 2),
        Layer(28, 240, 5, 1),
        Layer(28, 240, 3, 2),
        Layer(14, 480, 3, 1),
        Layer(14, 480, 5, 1),
        Layer(14, 672, 5, 1),
        Layer(14, 672, 5, 2),
        Layer(7, 1152, 5, 1),
        Layer(7, 1152, 3, 1),
    ),
    "convnext_t": (Layer(56, 96, 7, 1), Layer(28, 192, 7, 1), Layer(14, 384, 7, 1), Layer(7, 768, 7, 1)),
}
