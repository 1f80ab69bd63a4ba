"""Reference models that the examples and benchmarks share."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .blocks import ConvNorm, DepthwiseLayer, SqueezeExcite
from .convnext import ConvNeXtT
from .efficientnet import EfficientNetB0, EfficientNetLite0
from .mobilenet import MobileNetV1, MobileNetV2

__all__ = ["MODELS", "DepthwiseLayer", "compiled", "count_parameters", "create", "fill", "folded"]

MODELS: dict[str, Callable[..., nnx.Module]] = {
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "efficientnet_b0": EfficientNetB0,
    "efficientnet_lite0": EfficientNetLite0,
    "convnext_t": ConvNeXtT,
}


def create(
    name: str, *, conv: DepthwiseLayer = "ours", num_classes: int = 1000, dtype: Any = None, seed: int = 0
) -> nnx.Module:
    """A model by its name in `MODELS`, in training mode.

    Args:
        name: a key of `MODELS`.
        conv: the depthwise layers, "ours" (`jax_dwsconv.nnx.DepthwiseConv`) or "flax" (`flax.nnx.Conv`).
        num_classes: the number of logits.
        dtype: of the computation and the logits, None for float32; the parameters are float32.
        seed: of the initial parameters, which do not depend on `conv`.

    Raises:
        ValueError: there is no such model or layer.
    """
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}, choose from {', '.join(MODELS)}")
    return MODELS[name](conv=conv, num_classes=num_classes, dtype=dtype, rngs=nnx.Rngs(seed))


def fill(model: nnx.Module) -> None:
    """Gives an abstract model (of `nnx.eval_shape`) values from numpy: to compile jax's initial ones takes seconds.

    Vectors are uniform in [0.5, 1.5], kernels normal with variance 1 / fan-in.
    """
    rng = np.random.default_rng(0)

    def values(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) == 1:
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(0, math.prod(leaf.shape[:-1]) ** -0.5, leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree.map(values, nnx.state(model)))


def count_parameters(model: nnx.Module) -> int:
    """The number of trainable parameters; the running statistics of BatchNorm are none."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def compiled(model: nnx.Module) -> Callable[[jax.Array], jax.Array]:
    """The model as a jitted function of its input alone.

    Its state is constant: on a GPU, to pass some hundred arrays to every call takes longer than a small network does.
    """
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, state)(x)

    return forward


def folded(model: nnx.Module) -> nnx.Module:
    """A copy for inference: BatchNorm folded, each convolution with what follows it in one operation."""
    # Imported here, so that the plain model runs without the plugin.
    from jax_dwsconv import inference  # noqa: PLC0415

    model, _ = inference.fold(model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    for _, module in nnx.iter_graph(model):
        if isinstance(module, ConvNorm) and isinstance(module.norm, inference.Identity):
            module.fuse()
        if isinstance(module, SqueezeExcite):
            module.by_rows = True
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Linear) and module.dtype is not None:
            module.kernel = module.kernel.replace(module.kernel[...].astype(module.dtype))
            module.bias = module.bias.replace(module.bias[...].astype(module.dtype))
    return model
