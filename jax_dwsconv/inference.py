"""Folding of batch normalisation into the convolutions before it, for inference with Flax models.

With running statistics BatchNorm multiplies every channel by scale / sqrt(var + epsilon) and adds a constant. A
convolution or a linear layer before it can do the same with another kernel and bias, and nothing is left to compute.
Which BatchNorm follows which layer is not guessed from names: the model is traced once, and a pair is folded only where
the program shows that the very result of the layer enters the BatchNorm and nothing else reads it.
"""

import collections
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import linen, nnx, traverse_util
from flax.core import DenyList, FrozenDict, unfreeze
from flax.linen.dtypes import promote_dtype as linen_promote_dtype
from flax.nnx.nn.dtypes import promote_dtype as nnx_promote_dtype
from jax import lax, numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from jax_dwsconv import linen as our_linen, nnx as our_nnx
from jax_dwsconv.convolution import conv_general_dilated

__all__ = ["FoldedModule", "Identity", "Report", "fold", "fold_linen"]

Path = tuple[Any, ...]

_NORMS = (nnx.BatchNorm, linen.BatchNorm)
_SEPARABLE = (our_nnx.SeparableConv, our_linen.SeparableConv)
_DENSE = (nnx.Linear, linen.Dense)
_LAYERS = (nnx.Conv, linen.Conv, our_nnx.DepthwiseConv, our_linen.DepthwiseConv, *_SEPARABLE, *_DENSE)
# What makes a layer linear in its kernel; quantised operators, for example, are not.
_KNOWN_FUNCTIONS = {
    "conv_general_dilated": (lax.conv_general_dilated, conv_general_dilated),
    "dot_general": (lax.dot_general,),
    "promote_dtype": (nnx_promote_dtype, linen_promote_dtype),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What was folded and what was not.

    Attributes:
      folded: (path of the layer, path of the BatchNorm) of every pair that was folded.
      left: (path, reason) of every other BatchNorm.
    """

    folded: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{len(self.folded)} BatchNorm folded, {len(self.left)} left"]
        lines += [f"  folded {norm} into {layer}" for layer, norm in self.folded]
        lines += [f"  left   {norm}: {reason}" for norm, reason in self.left]
        return "\n".join(lines)


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
    pairs, report = _trace_nnx(folded, args, kwargs).pairs(lambda path: _nnx_values(modules[path]))
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
            x = _bind(type(module), module, args, kwargs).arguments["x"]
            return _as_normalised(x, module.dtype, self.norms[module.path])
        if module.path in self.layers and type(module) in _LAYERS and not module.use_bias:
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
    for (_, *path, name), value in flat.items():
        values[tuple(path)][name] = linen.meta.unbox(value)
    trace = _trace_linen(module, variables, args, kwargs)
    pairs, report = trace.pairs(values.__getitem__)
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
        for path in [path for path in flat if path[1:-1] == norm_path]:
            del flat[path]
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


# The trace ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Call:
    """A call of a layer or BatchNorm. What it took and gave has a name in the traced program, made of its number."""

    path: Path
    kind: type
    module: Any
    arguments: Mapping[str, Any]
    rank: int  # of the input
    enter: int | None = None  # positions of the two names in the program; None inside of a transformation
    exit: int | None = None
    input: Any = None
    output: Any = None


_TAG = "jax_dwsconv.inference"


class _Trace:
    """The calls of the layers and BatchNorms of a model, and the program that it is."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.norms: dict[Path, Any] = {}  # all BatchNorms, subclasses too, that there are (nnx) or are called (linen)

    def call(self, path: Path, kind: type, module, function: Callable, args, kwargs):
        """function(*args, **kwargs), recorded as a call of the module."""
        bound = _bind(kind, module, args, kwargs)
        name = list(bound.arguments)[1]
        number = len(self.calls)
        x = checkpoint_name(bound.arguments[name], f"{_TAG} {number} input")
        self.calls.append(_Call(path, kind, module, dict(bound.arguments), jnp.ndim(x)))
        bound.arguments[name] = x
        return checkpoint_name(function(*bound.args[1:], **bound.kwargs), f"{_TAG} {number} output")

    def run(self, function: Callable, variables, variable_paths: list[Path], args, kwargs) -> None:
        """Traces function(variables, *args, **kwargs) -> (result, variables), without computing anything."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

        def traced(variables, arrays):
            arrays = iter(arrays)
            merged = [next(arrays) if dynamic else leaf for leaf, dynamic in zip(leaves, is_array, strict=True)]
            args, kwargs = jax.tree.unflatten(treedef, merged)
            return function(variables, *args, **kwargs)

        arrays = [leaf for leaf, dynamic in zip(leaves, is_array, strict=True) if dynamic]
        jaxpr, (result, _) = jax.make_jaxpr(traced, return_shape=True)(variables, arrays)
        equations, outputs = jaxpr.jaxpr.eqns, jaxpr.jaxpr.outvars
        self._end, results = len(equations), len(jax.tree.leaves(result))
        inputs = jaxpr.jaxpr.invars[: len(variable_paths)]
        self._variables = dict(zip(variable_paths, inputs, strict=True))
        # Position of every use of a value: the equation's, `_end` for a result, `_end + 1` for a new state.
        self._uses = collections.defaultdict(list)
        for position, equation in enumerate(equations):
            for operand in equation.invars:
                self._use(operand, position)
            if equation.primitive.name == "name" and str(equation.params["name"]).startswith(_TAG):
                self._locate(position, equation)
        for index, output in enumerate(outputs):
            self._use(output, self._end if index < results else self._end + 1)

    def _use(self, value, position):
        if not isinstance(value, Literal):
            self._uses[value].append(position)

    def _locate(self, position, equation):
        _, number, what = equation.params["name"].split()
        call = self.calls[int(number)]
        if what == "input":
            call.enter, call.input = position, equation.invars[0]
        else:
            call.exit, call.output = position, equation.outvars[0]

    def pairs(self, values: Callable[[Path], Mapping[str, Any]]) -> tuple[list[tuple[Path, Path]], Report]:
        """(path of the layer, path of the BatchNorm) of all that can be folded, and the report.

        Args:
          values: from the path of a module to its arrays by name.
        """
        calls = collections.defaultdict(list)
        for call in self.calls:
            calls[call.path].append(call)
        pairs, left = [], []
        for norm in self.norms:
            try:
                pairs.append((self._layer_before(norm, calls, values), norm))
            except _NotFoldableError as reason:
                left.append((_text(norm), str(reason)))
        folded = tuple((_text(layer), _text(norm)) for layer, norm in pairs)
        return pairs, Report(folded, tuple(left))

    def _layer_before(self, norm: Path, calls: Mapping[Path, list[_Call]], values) -> Path:
        """The path of the layer that this BatchNorm can be folded into."""
        norm_calls = calls.get(norm, ())
        _require(type(self.norms[norm]) in _NORMS, "is of a subclass of BatchNorm")
        _require(norm_calls, "is not called with the example inputs")
        for call in norm_calls:
            _check_norm(call)
        layers = [self._producer(call) for call in norm_calls]
        path, name = layers[0].path, _text(layers[0].path)
        _require(all(layer.path == path for layer in layers), "follows several layers")
        _require(len(calls[path]) == len({id(layer) for layer in layers}), f"{name} is also called without it")
        layer = layers[0]
        _check_linear(name, layer.module)
        kernel_path = (*path, "pointwise") if layer.kind in _SEPARABLE else path
        for owner in (path, norm):
            _require(not self._stray_uses(owner, calls[owner]), f"variables of {_text(owner)} are used elsewhere too")
        kernel = self._variables.get((*kernel_path, "kernel"))
        inside = all(any(call.enter < use < call.exit for use in self._uses[kernel]) for call in calls[path])
        _require(kernel is not None and inside, f"the kernel of {name} is shared, or is not what it computes with")
        array = values(kernel_path)["kernel"]
        plain = array.ndim == _kernel_rank(layer) and values(norm)["mean"].shape == array.shape[-1:]
        _require(plain and jnp.issubdtype(array.dtype, jnp.floating), f"the kernel of {name} is stacked, or not real")
        return path

    def _producer(self, norm: _Call) -> _Call:
        layer = next((call for call in self.calls if call.output is norm.input and call.kind in _LAYERS), None)
        _require(layer is not None, "does not directly follow a convolution or a linear layer")
        others = [use for use in self._uses[layer.output] if use != norm.enter]
        _require(not others, f"the result of {_text(layer.path)} is used elsewhere too")
        return layer

    def _stray_uses(self, owner: Path, calls: list[_Call]) -> list[int]:
        """Where variables of a module are read outside of its calls."""
        uses = [
            use
            for path, variable in self._variables.items()
            if path[: len(owner)] == owner
            for use in self._uses[variable]
        ]
        return [use for use in uses if use <= self._end and not any(call.enter < use < call.exit for call in calls)]


class _NotFoldableError(Exception):
    """The reason."""


def _require(condition, reason: str) -> None:
    if not condition:
        raise _NotFoldableError(reason)


def _check_norm(call: _Call) -> None:
    norm, axis = call.module, call.module.axis
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    running = call.arguments.get("use_running_average")
    running = norm.use_running_average if running is None else running
    _require(call.enter is not None and call.exit is not None, "is called inside of jit, scan, remat or the like")
    _require(running is True, "normalises by the statistics of the batch")
    _require([axis % call.rank for axis in axes] == [call.rank - 1], "does not normalise the last axis")
    promote = getattr(norm, "promote_dtype", nnx_promote_dtype)
    _require(promote in _KNOWN_FUNCTIONS["promote_dtype"], "has a promote_dtype of its own")


def _check_linear(name: str, layer) -> None:
    activation = getattr(layer, "pointwise_activation" if isinstance(layer, _SEPARABLE) else "activation", None)
    _require(activation is None, f"{name} applies an activation")
    for attribute, known in _KNOWN_FUNCTIONS.items():
        function, make = getattr(layer, attribute, None), getattr(layer, f"{attribute}_cls", None)
        function = function if make is None else make()
        _require(function is None or function in known, f"{name} has a {attribute} of its own")


def _kernel_rank(layer: _Call) -> int:
    if layer.kind in _DENSE:
        return 2
    return 4 if layer.kind in _SEPARABLE else len(tuple(jnp.atleast_1d(jnp.asarray(layer.module.kernel_size)))) + 2


def _bind(kind: type, module, args, kwargs) -> inspect.BoundArguments:
    return inspect.signature(kind.__call__).bind(module, *args, **kwargs)


def _text(path: Path) -> str:
    return ".".join(map(str, path))


# nnx ------------------------------------------------------------------------------------------------------------------


def _trace_nnx(model: nnx.Module, args, kwargs) -> _Trace:
    trace = _Trace()
    trace.norms = {path: module for path, module in nnx.iter_graph(model) if isinstance(module, nnx.BatchNorm)}
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree.flatten(state)
    paths = [path for path, _ in nnx.to_flat_state(state)]

    def run(leaves, *args, **kwargs):
        model = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
        for path, module in nnx.iter_graph(model):
            if type(module) in (*_LAYERS, *_NORMS):
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


def _trace_linen(module: linen.Module, variables, args, kwargs) -> _Trace:
    trace = _Trace()
    leaves, treedef = jax.tree.flatten(linen.meta.unbox(variables))
    paths = [tuple(key.key for key in path)[1:] for path, _ in jax.tree.leaves_with_path(linen.meta.unbox(variables))]

    def record(call, args, kwargs, context):
        module = context.module
        if isinstance(module, linen.BatchNorm):
            trace.norms[module.path] = module
        if context.method_name != "__call__" or type(module) not in (*_LAYERS, *_NORMS):
            return call(*args, **kwargs)
        return trace.call(module.path, type(module), module, call, args, kwargs)

    def run(leaves, *args, **kwargs):
        # Whatever the module stores (`sow`) counts as a use. Without parameters among it: it must not make new ones.
        with linen.intercept_methods(record):
            return module.apply(jax.tree.unflatten(treedef, leaves), *args, mutable=DenyList("params"), **kwargs)

    trace.run(run, leaves, paths, args, kwargs)
    return trace
