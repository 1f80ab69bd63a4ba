"""Windows, paddings and shapes of two-dimensional depthwise convolutions. One dimension is two with a height of 1."""

from typing import NamedTuple

from jax import core

Size = tuple[int, int]
Padding = tuple[tuple[int, int], tuple[int, int]]


class Window(NamedTuple):
    """What a convolution does apart from its operands' shapes. Hashable; a parameter of the primitives.

    Attributes:
      strides: step of the window, (height, width).
      padding: zeros added before and after, ((top, bottom), (left, right)); negative crops.
      dilation: distance between taps, (height, width).
      layout: of the activations, "NHWC" or "NCHW".
      filter_layout: "HWO" for filters (groups, kh, kw, C * multiplier), "OHW" for (groups, C * multiplier, kh, kw).
    """

    strides: Size
    padding: Padding
    dilation: Size
    layout: str
    filter_layout: str

    @property
    def channel_axis(self) -> int:
        """The axis of the channels in an activation."""
        return self.layout.index("C")

    @property
    def filter_channel_axis(self) -> int:
        """The axis of the output channels in a filter."""
        return 1 + self.filter_layout.index("O")

    def spatial(self, shape) -> Size:
        """(height, width) of an activation's shape."""
        at = self.layout.index("H")
        return tuple(shape[at : at + 2])

    def kernel_size(self, shape) -> Size:
        """(kh, kw) of a filter's shape."""
        at = 1 + self.filter_layout.index("H")
        return tuple(shape[at : at + 2])

    def activation_shape(self, batch, size, channels) -> tuple:
        """The shape of an activation."""
        return (batch, *size, channels) if self.layout == "NHWC" else (batch, channels, *size)

    def filter_shape(self, groups, kernel_size, out_channels) -> tuple:
        """The shape of a filter."""
        return (
            (groups, *kernel_size, out_channels)
            if self.filter_layout == "HWO"
            else (groups, out_channels, *kernel_size)
        )

    def output_size(self, size, kernel_size) -> Size:
        """(height, width) of the convolution's result: lax's rule, 0 where the window does not fit."""
        return tuple(
            core.max_dim((n + low + high - (d * (k - 1) + 1)) // s + 1, 0)
            for n, (low, high), d, k, s in zip(
                size, self.padding, self.dilation, kernel_size, self.strides, strict=True
            )
        )


def same_padding(size: int, kernel: int, stride: int, dilation: int, *, lower: bool) -> tuple[int, int]:
    """Padding for ceil(size / stride) results; an odd total puts the extra zero before if `lower`, else after."""
    reach = dilation * (kernel - 1) + 1
    total = core.max_dim((-(-size // stride) - 1) * stride + reach - size, 0)
    return (total - total // 2, total // 2) if lower else (total // 2, total - total // 2)
