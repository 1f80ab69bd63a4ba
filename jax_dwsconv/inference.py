"""Folding of batch normalisation into the convolutions before it, for inference with Flax models.

With running statistics BatchNorm multiplies every channel by scale / sqrt(var + epsilon) and adds a constant. A
convolution or a linear layer before it can do the same with another kernel and bias, and nothing is left to compute.
Which BatchNorm follows which layer is not guessed from names: the model is traced once, and a pair is folded only where
the program shows that the very result of the layer enters the BatchNorm and nothing else reads it.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from flax import linen, nnx, traverse_util
from flax.core import DenyList, FrozenDict, unfreeze
from jax import numpy as jnp

from jax_dwsconv import linen as our_linen, nnx as our_nnx
from jax_dwsconv._dataflow import LAYERS, NORMS, Path, Report, Trace, bind

__all__ = ["FoldedModule", "Identity", "Report", "fold", "fold_linen"]


class Identity(nnx.Module):
    """What a folded `nnx.BatchNorm` becomes: it returns its input, in the dtype that the BatchNorm would give."""

    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None) -> jax.Array:
        """Takes the arguments of `nnx.BatchNorm`; only x is used."""
        return _as_normalised(x, self.dtype, self.param_dtype)


def fold(model: nnx.Module, *args: Any, **kwargs: Any) -> tuple[nnx.Module, Report]:
    """Folds every BatchNorm of an nnx model that directly follows a convolution or a linear layer into that layer.

    Folded are `nnx.Conv`, `nnx.Linear` and this package's `DepthwiseConv` and `SeparableConv` (not subclasses of them),
    where the trace shows that a BatchNorm with running statistics over the last axis is all that reads their result.
    Kernel and bias are computed in float32 (float64 for float64) and stored in the dtype of the kernel. A layer without
    bias gets one. Every BatchNorm that cannot be shown to qualify is left as it is, and reported with the reason.

    The result holds for calls that take the same way through the model as the example.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs))
    >>> folded, report = fold(model, jnp.ones((1, 16, 16, 3)))
    >>> print(report)
    1 BatchNorm folded, 0 left
      folded layers.1 into layers.0

    Args:
      model: any nnx module. It is not changed.
      *args: example inputs, arrays or `jax.ShapeDtypeStruct`s. Their values do not matter; nothing is computed.
      **kwargs: more of them. Whatever is not an array is passed on as it is.

    Returns:
      A copy of the model in evaluation mode, each folded BatchNorm an `Identity`, and the report.

    Raises:
      Exception: what the model raises when it is called with the example inputs.
    """
    folded = nnx.clone(model)
    folded.eval()
    modules = {path: node for path, node in nnx.iter_graph(folded) if isinstance(node, nnx.Module)}
    pairs, report = _trace_nnx(folded, args, kwargs).pairs()
    for layer_path, norm_path in pairs:
        layer, norm = modules[layer_path], modules[norm_path]
        convolution = layer.pointwise if isinstance(layer, our_nnx.SeparableConv) else layer
        kernel, bias = _folded_parameters(_nnx_values(convolution), _nnx_values(norm), norm.epsilon)
        # New variables: the old ones may have other readers.
        convolution.kernel = convolution.kernel.replace(kernel)
        convolution.bias = nnx.Param(bias) if convolution.bias is None else convolution.bias.replace(bias)
        convolution.use_bias = True
        _become_identity(norm)
    return folded, report


@dataclasses.dataclass(frozen=True)
class FoldedModule:
    """A linen module whose folded BatchNorms are skipped. Made by `fold_linen`.

    Attributes:
      module: the module.
      layers: the paths of the layers that BatchNorms were folded into.
      norms: the paths of these BatchNorms, with the promoted dtype of their parameters (None without parameters).
    """

    module: linen.Module
    layers: frozenset[Path]
    norms: Mapping[Path, Any]

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As `module.apply`, with the variables that `fold_linen` returned."""
        with linen.intercept_methods(self._intercept):
            return self.module.apply(variables, *args, **kwargs)

    def _intercept(self, call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or module.scope is None:
            return call(*args, **kwargs)
        if module.path in self.norms and type(module) is linen.BatchNorm:
            x = bind(type(module), module, args, kwargs).arguments["x"]
            return _as_normalised(x, module.dtype, self.norms[module.path])
        if module.path in self.layers and type(module) in LAYERS and not module.use_bias:
            layer = module.clone(use_bias=True, parent=None, name=None)
            return layer.apply({"params": module.variables["params"]}, *args, **kwargs)
        return call(*args, **kwargs)


def fold_linen(
    module: linen.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any
) -> tuple[FoldedModule, dict[str, Any], Report]:
    """Folds every BatchNorm of a linen model that directly follows a convolution or a linear layer into that layer.

    As `fold`, for `linen.Conv`, `linen.Dense` and this package's layers. A linen module is what its source makes it, so
    the result is not another module but a `FoldedModule`, whose `apply` runs the given one and skips the BatchNorms.

    Args:
      module: any linen module, unbound. Its BatchNorms must use running statistics when it is called with `args` and
        `kwargs`, for example because of `train=False`.
      variables: what `module.init` returned, or training made of it. They are not changed.
      *args: as for `fold`.
      **kwargs: as for `fold`.

    Returns:
      The `FoldedModule`; its variables, without those of the folded BatchNorms, to be used as
      `folded.apply(variables, x)`; and the report.

    Raises:
      Exception: what the module raises when it is called with the example inputs.
    """
    flat = traverse_util.flatten_dict(unfreeze(variables))
    values = collections.defaultdict(dict)
    for (collection, *path, name), value in flat.items():
        if collection in _COLLECTIONS:
            values[tuple(path)][name] = linen.meta.unbox(value)
    trace = _trace_linen(module, variables, args, kwargs)
    pairs, report = trace.pairs()
    layers = {call.path: call.module for call in trace.calls}
    norms = {}
    for layer_path, norm_path in pairs:
        separable = isinstance(layers[layer_path], our_linen.SeparableConv)
        path = ("params", *layer_path, "pointwise") if separable else ("params", *layer_path)
        kernel, bias = _folded_parameters(values[path[1:]], values[norm_path], layers[norm_path].epsilon)
        for name, value in (("kernel", kernel), ("bias", bias)):
            box = flat.get((*path, name))
            flat[*path, name] = value if box is None else linen.meta.replace_boxed(box, value)
        if separable and not layers[layer_path].use_bias:  # in linen both halves have a bias, or none
            depthwise = flat["params", *layer_path, "depthwise", "kernel"]
            flat["params", *layer_path, "depthwise", "bias"] = jnp.zeros(depthwise.shape[-1], depthwise.dtype)
        # The statistics do not count for the dtype of linen's result.
        norms[norm_path] = _promoted(values[norm_path], ("scale", "bias"))
        flat = {path: value for path, value in flat.items() if path[1:-1] != norm_path}
    folded = FoldedModule(module, frozenset(layer for layer, _ in pairs), FrozenDict(norms))
    return folded, traverse_util.unflatten_dict(flat), report


# Arithmetic -----------------------------------------------------------------------------------------------------------


def _folded_parameters(layer: Mapping[str, Any], norm: Mapping[str, Any], epsilon: float) -> tuple[Any, Any]:
    """Kernel and bias of a layer that does what the layer and the BatchNorm did."""
    dtype = layer["kernel"].dtype
    exact = functools.partial(jnp.asarray, dtype=jnp.promote_types(dtype, jnp.float32))
    factor = 1 / jnp.sqrt(exact(norm["var"]) + epsilon)
    if norm.get("scale") is not None:
        factor *= exact(norm["scale"])
    bias = -exact(norm["mean"]) if layer.get("bias") is None else exact(layer["bias"]) - exact(norm["mean"])
    bias *= factor
    if norm.get("bias") is not None:
        bias += exact(norm["bias"])
    return (exact(layer["kernel"]) * factor).astype(dtype), bias.astype(dtype)


def _as_normalised(x, dtype, param_dtype):
    """x in the dtype that a BatchNorm's result has."""
    if dtype is None:
        dtype = x.dtype if param_dtype is None else jnp.promote_types(x.dtype, param_dtype)
    return x.astype(dtype)


def _promoted(values: Mapping[str, Any], names: Iterable[str]):
    dtypes = [values[name].dtype for name in names if values.get(name) is not None]
    return functools.reduce(jnp.promote_types, dtypes) if dtypes else None


def _nnx_values(module: nnx.Module) -> dict[str, jax.Array]:
    """The variables that are attributes of a module."""
    return {name: value[...] for name, value in vars(module).items() if isinstance(value, nnx.Variable)}


def _become_identity(norm: nnx.BatchNorm) -> None:
    """In place: all that refer to it, in whatever container, see the change."""
    dtype, param_dtype = norm.dtype, _promoted(_nnx_values(norm), ("mean", "var", "scale", "bias"))
    for name in [name for name in vars(norm) if not name.startswith("_")]:
        delattr(norm, name)
    norm.__class__ = Identity
    norm.dtype, norm.param_dtype = dtype, param_dtype


# nnx ------------------------------------------------------------------------------------------------------------------


def _trace_nnx(model: nnx.Module, args, kwargs) -> Trace:
    trace = Trace()
    trace.norms = {path: module for path, module in nnx.iter_graph(model) if isinstance(module, nnx.BatchNorm)}
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)
    paths = [path for path, _ in nnx.to_flat_state(state)]

    def run(leaves, *args, **kwargs):
        model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        for path, module in nnx.iter_graph(model):
            if type(module) in (*LAYERS, *NORMS):
                module.__class__ = _recorded(type(module))
                module._recorder = functools.partial(trace.call, path)
        result = model(*args, **kwargs)
        return result, nnx.state(model)

    trace.run(run, leaves, paths, args, kwargs)
    return trace


@functools.cache
def _recorded(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass that records its calls. Inside of nnx.jit and the like its instances keep class and path."""

    class Recorded(kind):
        def __call__(self, *args, **kwargs):
            return self._recorder(kind, self, functools.partial(kind.__call__, self), args, kwargs)

    return Recorded


# linen ----------------------------------------------------------------------------------------------------------------


_COLLECTIONS = ("params", "batch_stats")


def _trace_linen(module: linen.Module, variables, args, kwargs) -> Trace:
    trace = Trace()
    leaves, treedef = jax.tree.flatten(linen.meta.unbox(variables))
    paths = [tuple(key.key for key in path) for path, _ in jax.tree.leaves_with_path(linen.meta.unbox(variables))]
    paths = [path[1:] if path[0] in _COLLECTIONS else (None, *path) for path in paths]

    def record(call, args, kwargs, context):
        module = context.module
        if isinstance(module, linen.BatchNorm):
            trace.norms[module.path] = module
        if context.method_name != "__call__" or type(module) not in (*LAYERS, *NORMS):
            return call(*args, **kwargs)
        return trace.call(module.path, type(module), module, call, args, kwargs)

    def run(leaves, *args, **kwargs):
        # Whatever the module stores (`sow`) counts as a use. Without parameters among it: it must not make new ones.
        with linen.intercept_methods(record):
            return module.apply(jax.tree.unflatten(treedef, leaves), *args, mutable=DenyList("params"), **kwargs)

    trace.run(run, leaves, paths, args, kwargs)
    return trace
