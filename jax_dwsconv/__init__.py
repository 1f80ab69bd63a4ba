"""Fast depthwise and depthwise-separable convolution for JAX.

Native kernels for the CPU and for NVIDIA GPUs behind JAX primitives: differentiable to any order, batchable, and
drop-in for `jax.lax.conv_general_dilated`. The Flax layers are in `jax_dwsconv.linen` and `jax_dwsconv.nnx`, the
folding of batch normalisation in `jax_dwsconv.inference`; they are not imported here.
"""

from jax_dwsconv import _versions  # isort: skip

_versions.check()

from jax_dwsconv._config import FallbackWarning, UnsupportedError
from jax_dwsconv.convolution import depthwise_conv1d, depthwise_conv2d, depthwise_conv_transpose2d
from jax_dwsconv.drop_in import conv_general_dilated
from jax_dwsconv.exporting import disabled_export_checks
from jax_dwsconv.halos import exchange_halos
from jax_dwsconv.pointwise import pointwise_conv2d
from jax_dwsconv.separable import separable_conv2d

__version__ = _versions.PACKAGE

__all__ = [
    "FallbackWarning",
    "UnsupportedError",
    "conv_general_dilated",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "depthwise_conv_transpose2d",
    "disabled_export_checks",
    "exchange_halos",
    "pointwise_conv2d",
    "separable_conv2d",
]
