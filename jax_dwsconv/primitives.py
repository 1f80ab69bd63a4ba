"""The three bilinear primitives and the fused one, and all that JAX needs to know about them.

The operators, for a window with its strides, padding and dilation:

    forward(x, kernel)     -> y         the depthwise convolution
    grad_input(g, kernel)  -> x         its gradient by the input
    grad_filter(x, g)      -> kernel    its gradient by the filter

    fused_forward(x, kernel, scale, bias, residual)
        -> activation(forward(x, kernel) * scale + bias + residual), rounded once

Shapes: x is (N, H, W, C) or (N, C, H, W), y and g the same with C * multiplier channels, kernel is
(G, kh, kw, C * multiplier) or (G, C * multiplier, kh, kw), by `window.layout` and `window.filter_layout`. Output
channel o reads input channel o // multiplier. Image n uses filter n // (N // G): a mapped filter or per-example
gradients need no transposed activations.

Dtypes: every operand has its own floating dtype and the result is `out_dtype`; sums are kept in float32 (float64 where
an operand is float64). A cotangent has the dtype of what it is the cotangent of. What follows the sums is computed in
float32 (float64 for a float64 result), in which scale and bias are given.

Source of the algorithm: Lu, Zhang, Wang, "Optimizing Depthwise Separable Convolution Operations on GPUs", IEEE TPDS
33(1), 2022.
"""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax import lax, numpy as jnp
from jax._src import dispatch
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_dwsconv import _config, _epilogue, _native, lowering, partitioning, reference
from jax_dwsconv._geometry import Window
from jax_dwsconv.partitioning import Operator

_LARGEST_SIZE = 2**63 - 1


# Public entry points --------------------------------------------------------------------------------------------------


def forward(x: jax.Array, kernel: jax.Array, *, window: Window, out_dtype) -> jax.Array:
    """Depthwise convolution of x with kernel; see the module's docstring for shapes and dtypes."""
    return _bind(forward_p, reference.forward, x, kernel, window=window, out_dtype=np.dtype(out_dtype))


def fused_forward(x: jax.Array, kernel: jax.Array, scale, bias, residual, *, window: Window, activation, out_dtype):
    """Depthwise convolution of x with kernel, and what follows it, rounded once.

    Args:
      x: as for `forward`.
      kernel: as for `forward`.
      scale: (C * multiplier,) of float32 (float64 where out_dtype is), or None.
      bias: the same.
      residual: of the shape and dtype of the result, or None.
      window: of the convolution.
      activation: a name that `_epilogue` knows, or None.
      out_dtype: of the result.
    """
    params = {"window": window, "activation": activation, "out_dtype": np.dtype(out_dtype)}
    others = {name: a for name, a in zip(reference.PARTS, (scale, bias, residual), strict=True) if a is not None}
    return _bind_fused_forward(x, kernel, *others.values(), parts=tuple(others), **params)


def _bind_fused_forward(*operands, **params):
    """With `parts`, the names of the operands that follow x and kernel."""
    return _bind(fused_forward_p, reference.fused_forward, *operands, **params)


def grad_input(g: jax.Array, kernel: jax.Array, *, window: Window, input_size, multiplier: int, out_dtype) -> jax.Array:
    """Transpose of `forward` by its first operand, for an x of spatial size `input_size`."""
    return _bind(
        grad_input_p,
        reference.grad_input,
        g,
        kernel,
        window=window,
        input_size=tuple(input_size),
        multiplier=multiplier,
        out_dtype=np.dtype(out_dtype),
    )


def grad_filter(x: jax.Array, g: jax.Array, *, window: Window, kernel_size, groups: int, out_dtype) -> jax.Array:
    """Transpose of `forward` by its second operand, for `groups` filters of spatial size `kernel_size`."""
    return _bind(
        grad_filter_p,
        reference.grad_filter,
        x,
        g,
        window=window,
        kernel_size=tuple(kernel_size),
        groups=groups,
        out_dtype=np.dtype(out_dtype),
    )


def _bind(primitive, in_lax, *operands, **params):
    if _config.disabled():
        return in_lax(*operands, **params)
    operands = _same_varying_axes(*operands)
    if partitioning.is_divided_by_types(*map(jax.typeof, operands)):
        primitive = _DIVIDED_BY_TYPES[primitive]
    return primitive.bind(*operands, **params)


def _same_varying_axes(*operands):
    """Inside shard_map, marks every operand as varying over all axes over which one of them varies."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    union = frozenset().union(*varying)
    return [
        lax.pcast(x, tuple(sorted(union - axes)), to="varying") if union - axes else x
        for x, axes in zip(operands, varying, strict=True)
    ]


# Shape rules ----------------------------------------------------------------------------------------------------------


def _forward_shape(x, kernel, *, window: Window, **_):
    _check_ranks("forward", x=x, kernel=kernel)
    channels, out_channels = x.shape[window.channel_axis], kernel.shape[window.filter_channel_axis]
    if (out_channels % channels != 0) if _positive(channels) else (out_channels != 0):
        raise ValueError(
            f"forward: kernel {kernel.shape} ({window.filter_layout}) has {out_channels} output channels, which must "
            f"be a multiple of the {channels} channels of x {x.shape} ({window.layout})"
        )
    _check_groups("forward", kernel.shape[0], x)
    size = window.output_size(window.spatial(x.shape), window.kernel_size(kernel.shape))
    return window.activation_shape(x.shape[0], size, out_channels)


def _fused_forward_shape(x, kernel, *others, parts, window: Window, out_dtype, **_):
    shape = _forward_shape(x, kernel, window=window)
    vector = (shape[window.channel_axis],), _epilogue.accumulator_dtype(out_dtype)
    expected = {"scale": vector, "bias": vector, "residual": (shape, out_dtype)}
    for name, operand in zip(parts, others, strict=True):
        if (operand.shape, operand.dtype) != expected[name]:
            raise ValueError(
                f"fused_forward: {name} must have shape {expected[name][0]} and dtype {expected[name][1]}, got "
                f"{operand.shape} and {operand.dtype}"
            )
    return shape


def _grad_input_shape(g, kernel, *, window: Window, input_size, multiplier, **_):
    _check_ranks("grad_input", g=g, kernel=kernel)
    out_channels = g.shape[window.channel_axis]
    if kernel.shape[window.filter_channel_axis] != out_channels or out_channels % multiplier != 0:
        raise ValueError(
            f"grad_input: g {g.shape} ({window.layout}) and kernel {kernel.shape} ({window.filter_layout}) must have "
            f"the same number of channels, a multiple of {multiplier}"
        )
    _check_groups("grad_input", kernel.shape[0], g)
    _check_output_size("grad_input", g, window, input_size, window.kernel_size(kernel.shape))
    return window.activation_shape(g.shape[0], input_size, out_channels // multiplier)


def _grad_filter_shape(x, g, *, window: Window, kernel_size, groups, **_):
    _check_ranks("grad_filter", x=x, g=g)
    channels, out_channels = x.shape[window.channel_axis], g.shape[window.channel_axis]
    channels_agree = out_channels % channels == 0 if _positive(channels) else out_channels == 0
    if x.shape[0] != g.shape[0] or not channels_agree:
        raise ValueError(
            f"grad_filter: x {x.shape} and g {g.shape} ({window.layout}) must have the same batch size, and g a "
            "multiple of the channels of x"
        )
    _check_groups("grad_filter", groups, x)
    _check_output_size("grad_filter", g, window, window.spatial(x.shape), kernel_size)
    return window.filter_shape(groups, kernel_size, out_channels)


def _positive(dimension) -> bool:
    return not isinstance(dimension, int) or dimension > 0  # a symbolic dimension stands for a positive one


def _check_ranks(op: str, **operands) -> None:
    for name, operand in operands.items():
        if len(operand.shape) != 4:
            raise ValueError(f"{op}: {name} must have rank 4, got shape {operand.shape}")


def _check_groups(op: str, groups, operand) -> None:
    if groups == 0 or operand.shape[0] % groups != 0:
        raise ValueError(
            f"{op}: the batch size of {operand.shape} must be a multiple of the number of filters, {groups}"
        )


def _check_output_size(op: str, g, window: Window, input_size, kernel_size) -> None:
    expected = window.output_size(input_size, kernel_size)
    if window.spatial(g.shape) != expected:
        raise ValueError(
            f"{op}: an input of size {tuple(input_size)} and a kernel of size {tuple(kernel_size)} give an output of "
            f"size {expected}, but g has shape {g.shape} ({window.layout}); {window}"
        )


# Dtype rule, abstract evaluation --------------------------------------------------------------------------------------


def _check_floating(op: str, *operands, out_dtype, **_) -> None:
    for dtype in (*(x.dtype for x in operands), out_dtype):
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{op}: dtypes must be floating point, got {dtype}; use float32, bfloat16, float16 or float64"
            )


def _abstract_eval(operator: Operator, shape_rule, check_dtypes, *operands, **params):
    op = operator.name
    check_dtypes(op, *operands, **params)
    shape = shape_rule(*operands, **params)
    for dims, dtype in (*((x.shape, x.dtype) for x in operands), (shape, params["out_dtype"])):
        if all(isinstance(d, int) for d in dims) and math.prod(dims) * dtype.itemsize > _LARGEST_SIZE:
            raise ValueError(f"{op}: an array of shape {dims} and dtype {dtype} has more than 2**63 - 1 bytes")
    # Updating an operand's type, not making a new one, keeps the axes over which it varies inside shard_map.
    sharding = partitioning.result_sharding(operator.of(params), params, *operands)
    return operands[0].update(shape=shape, dtype=params["out_dtype"], weak_type=False, sharding=sharding)


FORWARD = Operator("forward", ("x", "kernel", "y"))
FUSED_FORWARD = Operator("fused_forward", ("x", "kernel", "y"))
GRAD_INPUT = Operator("grad_input", ("y", "kernel", "x"))
GRAD_FILTER = Operator("grad_filter", ("x", "y", "kernel"))


def _primitive(name: str, operator: Operator, shape_rule, check_dtypes=_check_floating) -> Primitive:
    primitive = Primitive(name)
    primitive.def_abstract_eval(functools.partial(_abstract_eval, operator, shape_rule, check_dtypes))
    params = ("window", "out_dtype", "input_size", "multiplier", "kernel_size", "groups", "activation", "parts")
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=(*params, "quantization")))
    return primitive


forward_p = _primitive("dwsconv_forward", FORWARD, _forward_shape)
fused_forward_p = _primitive("dwsconv_fused_forward", FUSED_FORWARD, _fused_forward_shape)
grad_input_p = _primitive("dwsconv_grad_input", GRAD_INPUT, _grad_input_shape)
grad_filter_p = _primitive("dwsconv_grad_filter", GRAD_FILTER, _grad_filter_shape)

# The same operators where the types of the operands say how they are divided, in explicit mode and inside shard_map.
# JAX lowers these for a mesh of devices that are not there; to divide the ones above, XLA must know the devices.
_DIVIDED_BY_TYPES = {
    forward_p: _primitive("dwsconv_forward", FORWARD, _forward_shape),
    fused_forward_p: _primitive("dwsconv_fused_forward", FUSED_FORWARD, _fused_forward_shape),
    grad_input_p: _primitive("dwsconv_grad_input", GRAD_INPUT, _grad_input_shape),
    grad_filter_p: _primitive("dwsconv_grad_filter", GRAD_FILTER, _grad_filter_shape),
}


# JVP and transpose ----------------------------------------------------------------------------------------------------
#
# A depthwise convolution is the trilinear form T(x, w, g) = <g, x * w>. Its three partial derivatives are the three
# primitives, each bilinear, so that they are closed under transposition and every order of derivative is made of them
# alone:
#
#     forward(x, w)     = dT/dg    transposes to grad_input (by x) and grad_filter (by w)
#     grad_input(g, w)  = dT/dx    transposes to forward    (by g) and grad_filter (by w)
#     grad_filter(x, g) = dT/dw    transposes to grad_input (by x) and forward     (by g)
#
# `ct` is the cotangent of the result; the operand that is transposed comes without a value, only with its type, which
# its cotangent must have, sharding included.


def _of_type(cotangent, operand):
    if partitioning.explicit_mesh(operand) is None or cotangent.aval.sharding == operand.sharding:
        return cotangent
    return jax.sharding.reshard(cotangent, operand.sharding)


def _multiplier(window: Window, x, y) -> int:
    channels = x.shape[window.channel_axis]
    return y.shape[window.channel_axis] // channels if _positive(channels) else 1


def _forward_by_x(ct, x, kernel, *, window, **_):
    x = x.aval
    multiplier = _multiplier(window, x, ct)
    size = window.spatial(x.shape)
    dx = grad_input(ct, kernel, window=window, input_size=size, multiplier=multiplier, out_dtype=x.dtype)
    return _of_type(dx, x)


def _forward_by_kernel(ct, x, kernel, *, window, **_):
    return _filter_gradient(x, ct, kernel.aval, window)


def _grad_input_by_g(ct, g, kernel, *, window, **_):
    return _of_type(forward(ct, kernel, window=window, out_dtype=g.aval.dtype), g.aval)


def _grad_input_by_kernel(ct, g, kernel, *, window, **_):
    return _filter_gradient(ct, g, kernel.aval, window)


def _filter_gradient(x, g, kernel, window):
    size = window.kernel_size(kernel.shape)
    dkernel = grad_filter(x, g, window=window, kernel_size=size, groups=kernel.shape[0], out_dtype=kernel.dtype)
    return _of_type(dkernel, kernel)


def _grad_filter_by_x(ct, x, g, *, window, **_):
    x = x.aval
    multiplier = _multiplier(window, x, g)
    size = window.spatial(x.shape)
    dx = grad_input(g, ct, window=window, input_size=size, multiplier=multiplier, out_dtype=x.dtype)
    return _of_type(dx, x)


def _grad_filter_by_g(ct, x, g, *, window, **_):
    return _of_type(forward(x, ct, window=window, out_dtype=g.aval.dtype), g.aval)


for _p, *_transposes in (
    (forward_p, _forward_by_x, _forward_by_kernel),
    (grad_input_p, _grad_input_by_g, _grad_input_by_kernel),
    (grad_filter_p, _grad_filter_by_x, _grad_filter_by_g),
):
    ad.defbilinear(_p, *_transposes)
    ad.defbilinear(_DIVIDED_BY_TYPES[_p], *_transposes)


# The value of the fused operator is the same with and without a derivative, to the last bit: its JVP keeps the kernel.
# The tangent is that of the composition, rounded once (but see below). It convolves no zeros, and it recomputes the
# sums only for the scale and for activations whose slope depends on more than the sign of the value.


def _fused_forward_jvp(primals, tangents, *, parts, window, activation, out_dtype):
    params = {"parts": parts, "window": window, "activation": activation, "out_dtype": out_dtype}
    y = _bind_fused_forward(*primals, **params)
    names = ("x", "kernel", *parts)
    value = dict(zip(names, primals, strict=True))
    d = {name: t for name, t in zip(names, tangents, strict=True) if not isinstance(t, ad.Zero)}
    x, kernel, scale, bias, residual = (value.get(name) for name in ("x", "kernel", *reference.PARTS))
    accumulator = _epilogue.accumulator_dtype(out_dtype)
    convolve = functools.partial(forward, window=window, out_dtype=accumulator)
    # Where nothing but a mask lies between, the cotangent of the sums is that of y, exactly. It stays in y's dtype, for
    # which the gradients have their fastest kernels.
    masked = scale is None and activation in (None, "relu")
    convolve_tangent = functools.partial(forward, window=window, out_dtype=out_dtype if masked else accumulator)

    def along_channels(vector):
        return vector.reshape(window.activation_shape(1, (1, 1), vector.size))

    terms = [convolve_tangent(d["x"], kernel).astype(accumulator)] if "x" in d else []
    terms += [convolve_tangent(x, d["kernel"]).astype(accumulator)] if "kernel" in d else []
    if scale is not None:
        terms = [term * along_channels(scale) for term in terms]
    needs_sums = "scale" in d or activation not in (None, "relu")
    sums = convolve(x, kernel) if needs_sums else None
    terms += [sums * along_channels(d["scale"])] if "scale" in d else []
    terms += [along_channels(d["bias"])] if "bias" in d else []
    terms += [d["residual"].astype(accumulator)] if "residual" in d else []
    dy = jnp.broadcast_to(functools.reduce(jnp.add, terms), y.shape)
    if activation == "relu":
        dy = jnp.where(y > 0, dy, 0)
    elif activation is not None:
        z = _epilogue.apply(sums, scale, bias, residual, None, window.channel_axis, accumulator)
        _, dy = jax.jvp(_epilogue.function(activation), (z,), (dy,))
    return y, _of_type(dy.astype(out_dtype), jax.typeof(y))


ad.primitive_jvps[fused_forward_p] = _fused_forward_jvp
ad.primitive_jvps[_DIVIDED_BY_TYPES[fused_forward_p]] = _fused_forward_jvp


# Batching -------------------------------------------------------------------------------------------------------------
#
# A mapped axis is folded into the batch. A mapped filter makes a group of every element of the mapped axis. The fused
# operator has one scale and one bias for all images: where these are mapped, or only the residual is, the convolution
# and what follows it are mapped apart.


def _to_front(operand, axis, size):
    """The operand with its mapped axis first; repeated along a new one where it is not mapped."""
    if axis is None:
        return jnp.broadcast_to(operand[None], (size, *operand.shape))
    return jnp.moveaxis(operand, axis, 0)


def _fold(operand):
    return operand.reshape(operand.shape[0] * operand.shape[1], *operand.shape[2:])


def _unfold(result, size):
    return result.reshape(size, result.shape[0] // size, *result.shape[1:])


def _mapped_size(operands, axes):
    return next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)


def _or_empty(rule):
    """A batching rule for mapped axes of size 0 too, where there is nothing to fold."""

    def batch(bind, operands, axes, **params):
        if _mapped_size(operands, axes) != 0:
            return rule(bind, operands, axes, **params)
        single = [
            jax.ShapeDtypeStruct([d for i, d in enumerate(x.shape) if i != axis], x.dtype)
            for x, axis in zip(operands, axes, strict=True)
        ]
        result = jax.eval_shape(functools.partial(bind, **params), *single)
        return jnp.zeros((0, *result.shape), result.dtype), 0

    return batch


@_or_empty
def _batch_with_kernel(bind, operands, axes, **params):
    """forward and grad_input: an activation and a kernel."""
    (activation, kernel), (activation_axis, kernel_axis) = operands, axes
    size = _mapped_size(operands, axes)
    shares_kernel = kernel_axis is None and kernel.shape[0] == 1
    if not shares_kernel:
        kernel = _fold(_to_front(kernel, kernel_axis, size))
    return _unfold(bind(_fold(_to_front(activation, activation_axis, size)), kernel, **params), size), 0


@_or_empty
def _batch_fused_forward(bind, operands, axes, *, parts, window, activation, out_dtype):
    params = {"parts": parts, "window": window, "activation": activation, "out_dtype": out_dtype}
    mapped = {name for name, axis in zip(("x", "kernel", *parts), axes, strict=True) if axis is not None}
    if mapped & {"scale", "bias"} or not mapped & {"x", "kernel"}:
        return jax.vmap(functools.partial(reference.fused_forward, convolve=forward, **params), axes)(*operands), 0
    size = _mapped_size(operands, axes)
    if "residual" in parts:
        operands = (*operands[:-1], _fold(_to_front(operands[-1], axes[-1], size)))

    def bind_folded(x, kernel, **params):
        return bind(x, kernel, *operands[2:], **params)

    return _batch_with_kernel(bind_folded, operands[:2], axes[:2], **params)


@_or_empty
def _batch_grad_filter(bind, operands, axes, *, groups, **params):
    size = _mapped_size(operands, axes)
    x, g = (_fold(_to_front(x, axis, size)) for x, axis in zip(operands, axes, strict=True))
    return _unfold(bind(x, g, groups=size * groups, **params), size), 0


for _p, _rule, _bind_again in (
    (forward_p, _batch_with_kernel, forward),
    (fused_forward_p, _batch_fused_forward, _bind_fused_forward),
    (grad_input_p, _batch_with_kernel, grad_input),
    (grad_filter_p, _batch_grad_filter, grad_filter),
):
    batching.primitive_batchers[_p] = functools.partial(_rule, _bind_again)
    batching.primitive_batchers[_DIVIDED_BY_TYPES[_p]] = functools.partial(_rule, _bind_again)


# Sharding ------------------------------------------------------------------------------------------------------------
#
# The primitives above lower to a function that JAX can divide among devices. What runs on one device is a primitive of
# its own, with the same types, that knows only how to lower.


def _dividable(operator: Operator, run: Callable):
    @functools.cache
    def in_auto_mode(operator):
        return partitioning.in_auto_mode(operator, run)

    def divide(*operands, **params):
        return in_auto_mode(operator.of(params))(tuple(params.items()), *operands)

    def divide_by_types(*operands, **params):
        if partitioning.explicit_mesh(*map(jax.typeof, operands)) is not None:
            return partitioning.in_explicit_mode(operator.of(params), run, operands, params)
        return run(*operands, **params)

    return divide, divide_by_types


def _lower_by_division(operator: Operator, p: Primitive, on_one_device: Primitive) -> None:
    divide, divide_by_types = _dividable(operator, on_one_device.bind)
    mlir.register_lowering(p, mlir.lower_fun(divide, multiple_results=False))
    mlir.register_lowering(_DIVIDED_BY_TYPES[p], mlir.lower_fun(divide_by_types, multiple_results=False))
    dispatch.prim_requires_devices_during_lowering.add(p)  # custom_partitioning asks for them


# Lowering -------------------------------------------------------------------------------------------------------------

for _operator, _p, _shape_rule, _in_lax in (
    (FORWARD, forward_p, _forward_shape, reference.forward),
    (FUSED_FORWARD, fused_forward_p, _fused_forward_shape, reference.fused_forward),
    (GRAD_INPUT, grad_input_p, _grad_input_shape, reference.grad_input),
    (GRAD_FILTER, grad_filter_p, _grad_filter_shape, reference.grad_filter),
):
    _on_one_device = _primitive(f"dwsconv_{_operator.name}_on_one_device", _operator, _shape_rule)
    lowering.register(_on_one_device, _operator, _in_lax)
    _lower_by_division(_operator, _p, _on_one_device)

_native.register()
