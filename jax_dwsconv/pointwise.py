"""Pointwise (1x1) convolution: a matrix product over the channels, and what precedes and follows it.

On a GPU it is one kernel of ours where that is expected to be faster than XLA's matrix product and the two or three
kernels that XLA often makes of what precedes and follows it. Elsewhere it is XLA's, which XLA records in CUDA graphs.
"""

import functools
import math
import os

import jax
import numpy as np
from jax import lax, numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_dwsconv import _arguments, _config, _epilogue, _native, _planning, lowering
from jax_dwsconv._epilogue import Activation

PARTS = ("scale", "bias", "residual", "gate")


# Public function ------------------------------------------------------------------------------------------------------


def pointwise_conv2d(
    x: jax.Array,
    kernel: jax.Array,
    *,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    gate: jax.Array | None = None,
    residual: jax.Array | None = None,
    activation: Activation = None,
    precision: lax.PrecisionLike = None,
    data_format: str | None = None,
    preferred_element_type=None,
) -> jax.Array:
    """activation((x * gate) kernel * scale + bias + residual), a matrix product over the channels of each pixel.

    Args:
      x: (..., H, W, C), or (..., C, H, W) with data_format="NCHW".
      kernel: (1, 1, C, F), as `flax.nnx.Conv` holds it, or (C, F).
      scale: (F,) or (), or None.
      bias: (F,) or (), or None.
      gate: (..., C), or None: factors of every image and channel, as squeeze-and-excitation has them (Hu, Shen, Sun,
        "Squeeze-and-Excitation Networks", CVPR 2018). The products are rounded to x's dtype.
      residual: of the shape and dtype of the result, or None.
      activation: see `depthwise_conv2d`.
      precision: of the matrix product, as for `jax.lax.dot_general`.
      data_format: "NHWC" (the default) or "NCHW".
      preferred_element_type: dtype of the operands of the matrix product and of the result; by default the promoted
        dtype of x and kernel. Sums, scale, bias, residual and activation are computed in float32 (float64 for float64).

    Returns:
      (..., H, W, F) or (..., F, H, W).

    Raises:
      ValueError, TypeError: a shape or dtype does not fit; the message names the argument.
    """
    x = _arguments.floating_array("x", x)
    kernel = _arguments.floating_array("kernel", kernel)
    dtype = _arguments.result_dtype(preferred_element_type, x, kernel)
    channels_last = _arguments.data_format(data_format, 2) == "NHWC"
    if x.ndim < 3:
        raise ValueError(f"x must have rank 3 or more, got shape {x.shape}")
    return pointwise(
        x.astype(dtype), kernel, scale, bias, gate, residual, activation, precision, channels_last, dtype, prefix=""
    )


def pointwise(x, kernel, scale, bias, gate, residual, activation, precision, channels_last, out_dtype, *, prefix):
    """As `pointwise_conv2d`, for an x of dtype `out_dtype`; `prefix` goes before the names of arguments in messages."""
    channel_axis = x.ndim - 1 if channels_last else x.ndim - 3
    channels = x.shape[channel_axis]
    if kernel.shape[-2:-1] != (channels,) or kernel.shape[:-2] not in ((), (1, 1)):
        raise ValueError(
            f"{prefix}kernel must have shape (1, 1, {channels}, F) or ({channels}, F) for an input with {channels} "
            f"channels, got {kernel.shape}"
        )
    features = kernel.shape[-1]
    kernel = kernel.reshape(channels, features).astype(out_dtype)
    others = {
        "scale": _arguments.channel_vector(f"{prefix}scale", scale, features),
        "bias": _arguments.channel_vector(f"{prefix}bias", bias, features),
    }
    if residual is not None:
        shape = list(x.shape)
        shape[channel_axis] = features
        others["residual"] = _arguments.like_result(f"{prefix}residual", residual, tuple(shape), out_dtype)
    if gate is not None:
        others["gate"] = gate = _arguments.floating_array(f"{prefix}gate", gate)
        shape = (*x.shape[:-3], channels)
        if gate.shape != shape:
            raise ValueError(
                f"{prefix}gate must have shape {shape}, one factor for every image and channel, got {gate.shape}"
            )
    others = {name: others[name] for name in PARTS if others.get(name) is not None}
    params = {
        "parts": tuple(others),
        "activation": _epilogue.activation_name(activation),
        # Now, not where the primitive is lowered: the setting may be a context's.
        "precision": _hashable(jax.config.jax_default_matmul_precision if precision is None else precision),
        "out_dtype": np.dtype(out_dtype),
    }
    if channels_last and not _config.disabled() and all(on_no_mesh(a) for a in (x, kernel, *others.values())):
        y = _bind_images(x, kernel, others, params)
    else:
        y = _in_lax(x, kernel, *others.values(), channel_axis=channel_axis, **params)
    return _epilogue.apply_unnamed(y, activation)


def _hashable(precision):
    return tuple(precision) if isinstance(precision, list) else precision


def on_no_mesh(operand) -> bool:
    """Where types say how arrays are divided, JAX's own operators know what to do."""
    return jax.typeof(operand).sharding.mesh.empty


def _bind_images(x, kernel, others, params):
    """With all batch dimensions as one."""
    batch = x.shape[:-3]
    flat = {"residual": lambda a: a.reshape(-1, *a.shape[-3:]), "gate": lambda a: a.reshape(-1, a.shape[-1])}
    others = [flat.get(name, lambda a: a)(a) if len(batch) != 1 else a for name, a in others.items()]
    images = x if len(batch) == 1 else x.reshape(math.prod(batch), *x.shape[-3:])
    y = pointwise_p.bind(images, kernel, *_in_accumulator(params, others), **params)
    return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])


def _in_accumulator(params, others):
    """scale and bias as the kernel takes them."""
    dtype = _epilogue.accumulator_dtype(params["out_dtype"])
    names = zip(params["parts"], others, strict=True)
    return [a.astype(dtype) if name in ("scale", "bias") else a for name, a in names]


# In JAX's own operators -----------------------------------------------------------------------------------------------


def _in_lax(x, kernel, *others, parts, activation, precision, out_dtype, channel_axis=3):
    value = dict(zip(parts, others, strict=True))
    accumulator = _epilogue.accumulator_dtype(out_dtype)
    if "gate" in parts:
        spatial = tuple(axis for axis in range(x.ndim - 3, x.ndim) if axis != channel_axis)
        factors = jnp.expand_dims(value["gate"].astype(accumulator), spatial)
        x = (x.astype(accumulator) * factors).astype(out_dtype)
    contract = (((channel_axis,), (0,)), ((), ()))
    y = lax.dot_general(x, kernel, contract, precision=precision, preferred_element_type=accumulator)
    y = jnp.moveaxis(y, -1, channel_axis)
    epilogue = (value.get(name) for name in ("scale", "bias", "residual"))
    return _epilogue.apply(y, *epilogue, activation, channel_axis, out_dtype)


# The primitive --------------------------------------------------------------------------------------------------------
#
# pointwise(x, kernel, *others): x (N, H, W, C), kernel (C, F), `parts` names the others. Its value is that of the
# kernel with and without a derivative; everything else is that of the composition above.


def _abstract_eval(x, kernel, *others, **params):
    operands = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel, *others)]
    result = jax.eval_shape(functools.partial(_in_lax, **params), *operands)
    return x.update(shape=result.shape, dtype=result.dtype, weak_type=False)


def _jvp(primals, tangents, **params):
    moving = [i for i, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]

    def of_moving(*operands):
        everything = list(primals)
        for i, operand in zip(moving, operands, strict=True):
            everything[i] = operand
        return _in_lax(*everything, **params)

    _, dy = jax.jvp(of_moving, [primals[i] for i in moving], [tangents[i] for i in moving])
    return pointwise_p.bind(*primals, **params), dy


def batch(bind, in_lax, per_image: set[str], operands, axes, *, parts, **params):
    """The batching rule of a pointwise primitive: in what `per_image` names, the mapped axis joins the first one."""
    names = ("x", "kernel", *parts)
    mapped = {name: axis for name, axis in zip(names, axes, strict=True) if axis is not None}
    if not mapped.keys() <= per_image:
        return jax.vmap(functools.partial(in_lax, parts=parts, **params), axes)(*operands), 0
    size = next(operands[names.index(name)].shape[axis] for name, axis in mapped.items())
    own = operands[0].shape[1 if mapped.get("x") == 0 else 0]

    def fold(name, operand):
        if name not in per_image:
            return operand
        axis = mapped.get(name)
        whole = jnp.broadcast_to(operand, (size, *operand.shape)) if axis is None else jnp.moveaxis(operand, axis, 0)
        return whole.reshape(whole.shape[0] * whole.shape[1], *whole.shape[2:])

    y = bind(*map(fold, names, operands), parts=parts, **params)
    return y.reshape(size, own, *y.shape[1:]), 0


pointwise_p = Primitive("dwsconv_pointwise")
pointwise_p.def_abstract_eval(_abstract_eval)
pointwise_p.def_impl(jax.jit(pointwise_p.bind, static_argnames=("parts", "activation", "precision", "out_dtype")))
ad.primitive_jvps[pointwise_p] = _jvp
batching.primitive_batchers[pointwise_p] = functools.partial(
    batch, pointwise_p.bind, _in_lax, {"x", "residual", "gate"}
)


# Lowering -------------------------------------------------------------------------------------------------------------


def pays(shape: tuple[int, int, int, int], features: int, dtype: str, parts: tuple[str, ...], activation) -> bool:
    """Whether our kernel is expected to be faster than what XLA makes of x of this shape, on an H100.

    docs/performance.md has the measurements.
    """
    plans = _planning.plan_pointwise(shape, features, dtype, "gate" in parts)
    return plans is not None and plans[0].cycles / _CYCLES < _by_xla(shape, features, dtype, parts, activation)


_CYCLES = 1755  # of a microsecond


def _by_xla(shape, features, dtype, parts, activation) -> float:
    """Microseconds: fitted to EfficientNet-B0 and MobileNetV1 at batch 32 with constant weights.

    There the matrix product is a kernel of its own, with sums in float32, and what goes before and after it are two
    more.
    """
    *pixels, channels = shape
    pixels = math.prod(pixels)
    size, source, result = np.dtype(dtype).itemsize, pixels * channels, pixels * features
    follows = activation is not None or not {"scale", "bias", "residual"}.isdisjoint(parts)
    moved = size * (source + channels * features) + (4 if follows else size) * result
    products = 2 * source * features / (3e8 if size == 4 else 6e8)
    time = 2.2 + 0.0023 * min(size * channels, 1200) + max(moved / 3.3e6, products)
    if follows:
        time += 1.2 + (4 + (2 if "residual" in parts else 1) * size) * result / 3.9e6
    if "gate" in parts:
        time += 1.2 + 2 * size * source / 3.9e6
    return time


def _has_kernel(ctx, parts, activation, precision, out_dtype) -> bool:
    x, kernel, *others = ctx.avals_in
    dtypes = {a.dtype for name, a in zip(parts, others, strict=True) if name in ("residual", "gate")}
    devices = getattr(ctx.module_context.axis_context, "num_devices", 0)
    allowed = (jnp.bfloat16, jnp.float16, *((jnp.float32,) if _allows_tf32(precision) else ()))
    if devices != 1 or out_dtype not in allowed or dtypes | {x.dtype, kernel.dtype} != {out_dtype}:
        return False
    if not fits_kernel(x, kernel):
        return False
    return pays(x.shape, kernel.shape[1], out_dtype.name, parts, activation)


_MOST_PIXELS, _MOST_CHANNELS = 2**30, 2**20


def fits_kernel(x, kernel) -> bool:
    """Whether the sizes of x (..., C) and kernel (C, F) are known and allowed, and the machine has our kernel."""
    sizes = (*x.shape, *kernel.shape)
    if not all(isinstance(d, int) for d in sizes) or 0 in sizes:
        return False
    if math.prod(x.shape[:-1]) > _MOST_PIXELS or max(kernel.shape) > _MOST_CHANNELS:
        return False
    if _native.why_unavailable("cuda") is not None:
        return False
    module = _native.load("cuda")
    return _native.oldest_code(module.device_capabilities(), module.architectures.split(",")) >= 80


def _allows_tf32(precision) -> bool:
    """Whether a product of float32 may round its operands to TF32, as XLA does on a GPU by default."""
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":  # as NVIDIA's libraries take it
        return False
    pair = precision if isinstance(precision, tuple) else (precision, precision)
    return all(p in (None, "default", "fastest", "tensorfloat32", lax.Precision.DEFAULT) for p in pair)


def _lower_for_cuda(ctx, *operands, parts, activation, precision, out_dtype):
    if not _has_kernel(ctx, parts, activation, precision, out_dtype):
        params = {"parts": parts, "activation": activation, "precision": precision, "out_dtype": out_dtype}
        return mlir.lower_fun(functools.partial(_in_lax, **params), multiple_results=False)(ctx, *operands)
    dtypes = {part: np.dtype(np.float32) if part in ("scale", "bias") else out_dtype for part in PARTS}
    ctx, operands = lowering.with_empty(ctx, operands, parts, dtypes)
    return lowering.emit("pointwise", "cuda", ctx, *operands, activation=activation or "none")


mlir.register_lowering(pointwise_p, mlir.lower_fun(_in_lax, multiple_results=False))
mlir.register_lowering(pointwise_p, _lower_for_cuda, platform="cuda")
