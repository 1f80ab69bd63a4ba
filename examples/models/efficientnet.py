"""EfficientNet-B0 and EfficientNet-Lite0 in Flax nnx, after the TensorFlow TPU repository, without stochastic depth."""

from typing import Any

from flax import nnx

from .blocks import InvertedResidualNet, Stage

IMAGE_SIZE = 224

STAGES = (
    Stage(expansion=1, channels=16, repeats=1, stride=1, kernel_size=3),
    Stage(expansion=6, channels=24, repeats=2, stride=2, kernel_size=3),
    Stage(expansion=6, channels=40, repeats=2, stride=2, kernel_size=5),
    Stage(expansion=6, channels=80, repeats=3, stride=2, kernel_size=3),
    Stage(expansion=6, channels=112, repeats=3, stride=1, kernel_size=5),
    Stage(expansion=6, channels=192, repeats=4, stride=2, kernel_size=5),
    Stage(expansion=6, channels=320, repeats=1, stride=1, kernel_size=3),
)


class EfficientNetB0(InvertedResidualNet):
    """EfficientNet-B0 (Tan and Le, 2019), 5,288,548 parameters with 1000 classes.

    Args:
        **options: `conv`, `num_classes`, `dtype` and `rngs` of `InvertedResidualNet`.
    """

    def __init__(self, **options: Any):
        super().__init__(STAGES, activation=nnx.silu, squeeze_excite=True, **options)


class EfficientNetLite0(InvertedResidualNet):
    """EfficientNet-Lite0, 4,652,008 parameters with 1000 classes: B0 without squeeze-excite, ReLU6 instead of SiLU.

    Args:
        **options: `conv`, `num_classes`, `dtype` and `rngs` of `InvertedResidualNet`.
    """

    def __init__(self, **options: Any):
        super().__init__(STAGES, activation=nnx.relu6, **options)
