"""The int8 primitive, and all that JAX needs to know about it.

    quantized_forward(x, kernel, scale, bias) -> y

With the sums of (x - x_zero_point) * kernel in int32, to which what lies outside the image adds nothing:

    int32 result:  y = sums + bias
    int8 result:   y = clamp(round((sums + bias) * scale) + out_zero_point)

where the int32 becomes a float32 (to nearest, ties to even), the product is rounded to float32, `round` goes to the
nearest integer, ties to even, and clamp limits to [low, high]. Every platform computes exactly this.

Shapes are those of `primitives.forward`; x and kernel are int8, bias is int32, scale float32. A kernel has at most
`MOST_TAPS` taps: sums then stay below 2**30 in magnitude, and with a bias that does so, too, nothing overflows.
"""

import functools
from typing import NamedTuple

import jax
import numpy as np
from jax.interpreters import ad, batching, mlir

from jax_dwsconv import _config, lowering, primitives, reference
from jax_dwsconv._geometry import Window
from jax_dwsconv.partitioning import Operator

MOST_TAPS = 2**15  # 255 * 128 * 2**15 < 2**30


class Quantization(NamedTuple):
    """The integers of a quantised convolution; a parameter of the primitive.

    Attributes:
      x_zero_point: what x has for zero.
      out_zero_point: what an int8 result has for zero.
      low: the least int8 result.
      high: the largest int8 result.
    """

    x_zero_point: int = 0
    out_zero_point: int = 0
    low: int = -128
    high: int = 127


# Public entry point ---------------------------------------------------------------------------------------------------


def quantized_forward(
    x: jax.Array, kernel: jax.Array, scale, bias, *, window: Window, quantization: Quantization
) -> jax.Array:
    """Depthwise convolution of int8 arrays; see the module's docstring.

    Args:
      x: as for `primitives.forward`, int8.
      kernel: as for `primitives.forward`, int8.
      scale: (C * multiplier,) of float32 for an int8 result, or None for an int32 one.
      bias: (C * multiplier,) of int32, or None.
      window: of the convolution.
      quantization: zero points and limits. An int32 result has only the first of them.
    """
    parts = {name: a for name, a in zip(_PARTS, (scale, bias), strict=True) if a is not None}
    params = {"parts": tuple(parts), "window": window, "quantization": quantization}
    return _bind(x, kernel, *parts.values(), **params, out_dtype=np.dtype(np.int32 if scale is None else np.int8))


def _bind(*operands, **params):
    return primitives._bind(quantized_forward_p, reference.quantized_forward, *operands, **params)


# Shape rule, dtype rule -----------------------------------------------------------------------------------------------

_PARTS = ("scale", "bias")


def _shape(x, kernel, *others, parts, window: Window, **_):
    shape = primitives._forward_shape(x, kernel, window=window)
    taps = np.prod(window.kernel_size(kernel.shape))
    if taps > MOST_TAPS:
        raise ValueError(
            f"quantized_forward: a kernel of size {window.kernel_size(kernel.shape)} has {taps} taps; the int32 sums "
            f"are proven not to overflow for at most {MOST_TAPS}"
        )
    for name, vector in zip(parts, others, strict=True):
        if vector.shape != (shape[window.channel_axis],):
            raise ValueError(
                f"quantized_forward: {name} must have shape {(shape[window.channel_axis],)}, got {vector.shape}"
            )
    return shape


def _check_dtypes(op: str, *operands, parts, out_dtype, **_) -> None:
    expected = ("int8", "int8", *({"scale": "float32", "bias": "int32"}[part] for part in parts))
    found = tuple(str(operand.dtype) for operand in operands)
    if found != expected or out_dtype != ("int8" if "scale" in parts else "int32"):
        raise TypeError(f"{op}: operands must have dtypes {', '.join(expected)}, got {', '.join(found)}")


QUANTIZED_FORWARD = Operator("quantized_forward", ("x", "kernel", "y"))
_new = functools.partial(primitives._primitive, "dwsconv_quantized_forward", QUANTIZED_FORWARD, _shape, _check_dtypes)
quantized_forward_p = _new()
primitives._DIVIDED_BY_TYPES[quantized_forward_p] = _new()
_BOTH = (quantized_forward_p, primitives._DIVIDED_BY_TYPES[quantized_forward_p])


# JVP ------------------------------------------------------------------------------------------------------------------


def no_derivative(primals, tangents, **_):
    """The JVP rule of int8 operators, which says what to do instead."""
    raise NotImplementedError(
        "an int8 convolution has no derivative: its result moves in steps. For quantisation-aware training compute in "
        "floating point, with jax_dwsconv.depthwise_conv2d on values that are rounded to the int8 grid (their gradient "
        "passing straight through), and use jax_dwsconv.quantized for inference"
    )


# Batching -------------------------------------------------------------------------------------------------------------


@primitives._or_empty
def _batch(bind, operands, axes, *, parts, **params):
    if any(axis is not None for axis in axes[2:]):  # there is one scale and one bias for all images
        unfused = functools.partial(reference.quantized_forward, parts=parts, convolve=_sums, **params)
        return jax.vmap(unfused, axes)(*operands), 0

    def bind_folded(x, kernel, **params):
        return bind(x, kernel, *operands[2:], parts=parts, **params)

    return primitives._batch_with_kernel(bind_folded, operands[:2], axes[:2], **params)


def _sums(x, kernel, *, window, x_zero_point):
    return quantized_forward(x, kernel, None, None, window=window, quantization=Quantization(x_zero_point))


for _p in _BOTH:
    ad.primitive_jvps[_p] = no_derivative
    batching.primitive_batchers[_p] = functools.partial(_batch, _bind)


# Lowering -------------------------------------------------------------------------------------------------------------


def _lower(platform: str, ctx, *operands, parts, window: Window, out_dtype, quantization: Quantization):
    if reason := lowering.why_no_kernels(platform):
        _config.fall_back(reason)
        in_jax = functools.partial(
            reference.quantized_forward, parts=parts, window=window, out_dtype=out_dtype, quantization=quantization
        )
        return mlir.lower_fun(in_jax, multiple_results=False)(ctx, *operands)
    ctx, operands = lowering.with_empty(ctx, operands, parts, {"scale": np.float32, "bias": np.int32})
    return lowering.emit(
        "quantized_forward", platform, ctx, *operands, window=window, quantization=np.asarray(quantization, np.int64)
    )


_on_one_device = primitives._primitive(
    "dwsconv_quantized_forward_on_one_device", QUANTIZED_FORWARD, _shape, _check_dtypes
)
mlir.register_lowering(_on_one_device, mlir.lower_fun(reference.quantized_forward, multiple_results=False))
for _platform in ("cpu", "cuda"):
    mlir.register_lowering(_on_one_device, functools.partial(_lower, _platform), platform=_platform)
primitives._lower_by_division(QUANTIZED_FORWARD, quantized_forward_p, _on_one_device)
