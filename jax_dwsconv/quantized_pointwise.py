"""Pointwise convolution of int8 arrays with requantisation: XLA's matrix product, or one kernel of ours on a GPU."""

import functools
import math

import jax
import numpy as np
from jax import lax, numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_dwsconv import _config, lowering, pointwise, reference
from jax_dwsconv.quantized_primitive import Quantization, no_derivative

PARTS = ("scale", "bias", "residual", "residual_scale")

# quantized_pointwise(x, kernel, *others): x (M, C), kernel (C, F) -> (M, F); `parts` names the others. x_zero_point of
# the quantization is the residual's zero point: that of x is in the bias. With a scale, which the primitive needs:
#
#     y = clamp(round((x kernel + bias + round((residual - zero point) * residual_scale)) * scale) + out_zero_point)


def quantized_pointwise(x, kernel, others: dict, quantization: Quantization, channel_axis: int) -> jax.Array:
    """x of any shape, with its channels at `channel_axis`; `others` as PARTS, with a scale for an int8 result."""
    others = {name: others[name] for name in PARTS if others.get(name) is not None}
    params = {"parts": tuple(others), "quantization": quantization}
    operands = (x, kernel, *others.values())
    last = channel_axis in (-1, x.ndim - 1)
    if "scale" not in others or not last or _config.disabled() or not all(map(pointwise.on_no_mesh, operands)):
        if "scale" in others:
            others["scale"] = _without_derivative(others["scale"])
        return _in_lax(x, kernel, *others.values(), channel_axis=channel_axis, **params)
    pixels, features = math.prod(x.shape[:-1]), kernel.shape[-1]
    if "residual" in others:
        others["residual"] = others["residual"].reshape(pixels, features)
    y = quantized_pointwise_p.bind(x.reshape(pixels, x.shape[-1]), kernel, *others.values(), **params)
    return y.reshape(*x.shape[:-1], features)


@jax.custom_jvp
def _without_derivative(scale):
    return scale


_without_derivative.defjvp(no_derivative)


def _in_lax(x, kernel, *others, parts, quantization, channel_axis=-1):
    value = dict(zip(parts, others, strict=True))
    contract = (((channel_axis % x.ndim,), (0,)), ((), ()))
    sums = jnp.moveaxis(lax.dot_general(x, kernel, contract, preferred_element_type=jnp.int32), -1, channel_axis)
    shape = [1] * x.ndim
    shape[channel_axis] = -1
    if "bias" in value:
        sums += value["bias"].reshape(shape)
    if "residual" in value:
        real = (value["residual"].astype(jnp.int32) - quantization.x_zero_point).astype(jnp.float32)
        sums += jnp.round(real * value["residual_scale"].reshape(shape)).astype(jnp.int32)
    return reference.requantize(sums, value.get("scale"), None, quantization, channel_axis)


def _abstract_eval(x, kernel, *others, parts, **_):
    del others, parts
    return x.update(shape=(x.shape[0], kernel.shape[1]), dtype=np.dtype(np.int8), weak_type=False)


quantized_pointwise_p = Primitive("dwsconv_quantized_pointwise")
quantized_pointwise_p.def_abstract_eval(_abstract_eval)
quantized_pointwise_p.def_impl(jax.jit(quantized_pointwise_p.bind, static_argnames=("parts", "quantization")))
ad.primitive_jvps[quantized_pointwise_p] = no_derivative
batching.primitive_batchers[quantized_pointwise_p] = functools.partial(
    pointwise.batch, quantized_pointwise_p.bind, _in_lax, {"x", "residual"}
)


def _has_kernel(ctx) -> bool:
    x, kernel, *_ = ctx.avals_in
    if getattr(ctx.module_context.axis_context, "num_devices", 0) != 1 or not pointwise.fits_kernel(x, kernel):
        return False
    return pointwise.pays((1, 1, *x.shape), kernel.shape[1], "int8", ("scale",), None)


def _lower_for_cuda(ctx, *operands, parts, quantization):
    if not _has_kernel(ctx):
        in_lax = functools.partial(_in_lax, parts=parts, quantization=quantization)
        return mlir.lower_fun(in_lax, multiple_results=False)(ctx, *operands)
    dtypes = {"scale": np.float32, "bias": np.int32, "residual": np.int8, "residual_scale": np.float32}
    ctx, operands = lowering.with_empty(ctx, operands, parts, dtypes)
    return lowering.emit("quantized_pointwise", "cuda", ctx, *operands, quantization=np.asarray(quantization, np.int64))


mlir.register_lowering(quantized_pointwise_p, mlir.lower_fun(_in_lax, multiple_results=False))
mlir.register_lowering(quantized_pointwise_p, _lower_for_cuda, platform="cuda")
