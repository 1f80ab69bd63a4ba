"""Which BatchNorm of a Flax model directly follows which layer, proven by a trace of the model."""

import collections
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen, nnx
from flax.linen.dtypes import promote_dtype as linen_promote_dtype
from flax.nnx.nn.dtypes import promote_dtype as nnx_promote_dtype
from jax import lax, numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal

from jax_dwsconv import linen as our_linen, nnx as our_nnx
from jax_dwsconv.drop_in import conv_general_dilated

Path = tuple[Any, ...]

NORMS = (nnx.BatchNorm, linen.BatchNorm)
_SEPARABLE = (our_nnx.SeparableConv, our_linen.SeparableConv)
LAYERS = (nnx.Conv, linen.Conv, our_nnx.DepthwiseConv, our_linen.DepthwiseConv, *_SEPARABLE, nnx.Linear, linen.Dense)
# What makes a layer linear in its kernel; quantised operators, for example, are not.
_KNOWN_FUNCTIONS = {
    "conv_general_dilated": (lax.conv_general_dilated, conv_general_dilated),
    "dot_general": (lax.dot_general,),
    "promote_dtype": (nnx_promote_dtype, linen_promote_dtype),
}
_HOOKS = {"on_get_value", "on_set_value", "on_create_value"}


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


@dataclasses.dataclass
class Call:
    """A call of a layer or BatchNorm. What it took and gave has a name in the traced program, made of its number."""

    path: Path
    kind: type
    module: Any
    arguments: Mapping[str, Any]
    input_shape: tuple[int, ...]  # as the layer sees it: without the axes that vmap maps
    output_shape: tuple[int, ...] | None = None
    enter: int | None = None  # positions of the two names in the program; None inside of a transformation
    exit: int | None = None
    input: Any = None
    output: Any = None


_TAG = "jax_dwsconv.inference"


class Trace:
    """The calls of the layers and BatchNorms of a model, and the program that it is."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.norms: dict[Path, Any] = {}  # all BatchNorms, subclasses too, that there are (nnx) or are called (linen)

    def call(self, path: Path, kind: type, module, function: Callable, args, kwargs):
        """function(*args, **kwargs), recorded as a call of the module."""
        bound = bind(kind, module, args, kwargs)
        name = list(bound.arguments)[1]
        number = len(self.calls)
        x = checkpoint_name(bound.arguments[name], f"{_TAG} {number} input")
        call = Call(path, kind, module, dict(bound.arguments), jnp.shape(x))
        self.calls.append(call)
        bound.arguments[name] = x
        y = checkpoint_name(function(*bound.args[1:], **bound.kwargs), f"{_TAG} {number} output")
        call.output_shape = jnp.shape(y)
        return y

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

    def pairs(self) -> tuple[list[tuple[Path, Path]], Report]:
        """(path of the layer, path of the BatchNorm) of all that can be folded, and the report."""
        calls = collections.defaultdict(list)
        for call in self.calls:
            calls[call.path].append(call)
        pairs, left = [], []
        for norm in self.norms:
            try:
                pairs.append((self._layer_before(norm, calls), norm))
            except _NotFoldableError as reason:
                left.append((_text(norm), str(reason)))
        folded = tuple((_text(layer), _text(norm)) for layer, norm in pairs)
        return pairs, Report(folded, tuple(left))

    def _layer_before(self, norm: Path, calls: Mapping[Path, list[Call]]) -> Path:
        """The path of the layer that this BatchNorm can be folded into."""
        norm_calls = calls.get(norm, ())
        _require(type(self.norms[norm]) in NORMS, "is of a subclass of BatchNorm")
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
        _require(jnp.issubdtype(kernel.aval.dtype, jnp.floating), f"the kernel of {name} is not real")
        return path

    def _producer(self, norm: Call) -> Call:
        layer = next((call for call in self.calls if call.output is norm.input and call.kind in LAYERS), None)
        _require(layer and layer.enter is not None, "does not directly follow a convolution or a linear layer")
        shapes = {layer.output_shape, norm.input_shape, layer.output.aval.shape}
        _require(len(shapes) == 1, "is called inside of vmap, or the layer before it is")
        others = [use for use in self._uses[layer.output] if use != norm.enter]
        _require(not others, f"the result of {_text(layer.path)} is used elsewhere too")
        return layer

    def _stray_uses(self, owner: Path, calls: list[Call]) -> list[int]:
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


def _check_norm(call: Call) -> None:
    norm, axis = call.module, call.module.axis
    rank = len(call.input_shape)
    axes = axis if isinstance(axis, tuple | list) else (axis,)
    running = call.arguments.get("use_running_average")
    running = norm.use_running_average if running is None else running
    _require(call.enter is not None and call.exit is not None, "is called inside of jit, scan, remat or the like")
    _require(running is True, "normalises by the statistics of the batch")
    _require([axis % rank for axis in axes] == [rank - 1], "does not normalise the last axis")
    promote = getattr(norm, "promote_dtype", nnx_promote_dtype)
    _require(promote in _KNOWN_FUNCTIONS["promote_dtype"], "has a promote_dtype of its own")


def _check_linear(name: str, layer) -> None:
    activation = getattr(layer, "pointwise_activation" if isinstance(layer, _SEPARABLE) else "activation", None)
    _require(activation is None, f"{name} applies an activation")
    variables = [v for v in vars(getattr(layer, "pointwise", layer)).values() if isinstance(v, nnx.Variable)]
    plain = all(type(v) is nnx.Param and not v.get_metadata().keys() & _HOOKS for v in variables)
    _require(plain, f"the parameters of {name} have hooks, or are no plain nnx.Param")
    for attribute, known in _KNOWN_FUNCTIONS.items():
        function, make = getattr(layer, attribute, None), getattr(layer, f"{attribute}_cls", None)
        function = function if make is None else make()
        _require(function is None or function in known, f"{name} has a {attribute} of its own")


def bind(kind: type, module, args, kwargs) -> inspect.BoundArguments:
    """The arguments of a call of the module by name, the module itself first."""
    return inspect.signature(kind.__call__).bind(module, *args, **kwargs)


def _text(path: Path) -> str:
    return ".".join(map(str, path))
