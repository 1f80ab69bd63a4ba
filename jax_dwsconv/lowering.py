"""From an operator on one device to the call of its native kernel, or to lax.

The handler reads all sizes from the buffers at run time; only the window travels as attributes. So symbolic sizes work,
and so does lowering on a machine without the GPU.
"""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax import numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jax_dwsconv import _config, _native
from jax_dwsconv._geometry import Window
from jax_dwsconv.partitioning import Operator


def register(primitive: Primitive, operator: Operator, in_lax: Callable) -> None:
    """Lowers the primitive to the operator's kernels on the CPU and on CUDA, and to `in_lax` elsewhere."""
    mlir.register_lowering(primitive, mlir.lower_fun(in_lax, multiple_results=False))
    roles = [operator.roles.index(role) for role in ("x", "kernel", "y")]
    for platform in ("cpu", "cuda"):
        rule = functools.partial(_lower, operator.name, platform, primitive, in_lax, roles)
        mlir.register_lowering(primitive, rule, platform=platform)


def _of_window(window: Window) -> dict:
    return {
        "strides": np.asarray(window.strides, np.int64),
        "padding": np.asarray(window.padding, np.int64).reshape(4),
        "dilation": np.asarray(window.dilation, np.int64),
        "layout": window.layout,
        "filter_layout": window.filter_layout,
    }


def _has_instance(input_dtype, filter_dtype, output_dtype) -> bool:
    """Whether the kernels are compiled for these dtypes: the table in tests/cases.py lists them."""
    if input_dtype == np.float64:
        return filter_dtype == output_dtype == np.float64
    allowed = (input_dtype, np.dtype(np.float32))
    return (
        input_dtype in (np.float32, jnp.bfloat16, jnp.float16) and filter_dtype in allowed and output_dtype in allowed
    )


def _common_dtype(*dtypes):
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)


def _lower(op: str, platform: str, primitive, in_lax, roles, ctx, *operands, window, out_dtype, **params):
    """Lowers to the native kernel, by way of a common dtype where none is compiled for this combination, else to lax.

    `roles` says which of the first two operands and the result are the input, the filter and the output of the forward
    convolution.
    """
    dtypes = (ctx.avals_in[0].dtype, ctx.avals_in[1].dtype, out_dtype)
    if reason := _why_lax(platform, dtypes):
        _config.fall_back(reason)
        in_lax = functools.partial(in_lax, window=window, out_dtype=out_dtype, **params)
        return mlir.lower_fun(in_lax, multiple_results=False)(ctx, *operands)
    if not _has_instance(*(dtypes[role] for role in roles)):
        common = _common_dtype(*dtypes)

        def convert(*operands):
            operands = (x.astype(common) for x in operands)
            return primitive.bind(*operands, window=window, out_dtype=common, **params).astype(out_dtype)

        return mlir.lower_fun(convert, multiple_results=False)(ctx, *operands)
    further = {}
    if op == "fused_forward":
        dtype = _common_dtype(out_dtype)
        dtypes = {"scale": dtype, "bias": dtype, "residual": out_dtype}
        ctx, operands = with_empty(ctx, operands, params["parts"], dtypes)
        further["activation"] = params["activation"] or "none"
    return emit(op, platform, ctx, *operands, window=window, **further)


def emit(op: str, platform: str, ctx, *operands, window: Window | None = None, **further):
    """The call of the native kernel, with the attributes `further` besides those of the window and of every one."""
    attributes = {"since": _native.SINCE[op], **(_of_window(window) if window else {}), **further}
    if platform == "cuda" and (tile := _config.forced_tile()):
        attributes["tile"] = tile
    call = _with_workspace if (platform, op) == ("cuda", "grad_filter") else _plain
    return call(op, ctx, *operands, **attributes)


def _why_lax(platform: str, dtypes) -> str | None:
    if platform == "cuda" and np.dtype(np.float64) in dtypes:
        return "float64 has no CUDA kernel; use float32, bfloat16 or float16"
    if any(dtype not in (np.float64, np.float32, jnp.bfloat16, jnp.float16) for dtype in dtypes):
        return (
            f"no kernel for dtypes {', '.join(map(str, dtypes))}; use float32, bfloat16, float16, or float64 on the CPU"
        )
    return why_no_kernels(platform)


def why_no_kernels(platform: str) -> str | None:
    """Why there are no kernels to lower to, or None where there are."""
    return None if _is_for_another_machine(platform) else _native.why_unavailable(platform)


def _is_for_another_machine(platform: str) -> bool:
    """Whether code for this platform is lowered where it cannot run, say for export on a machine without a GPU."""
    try:
        return not jax.devices(platform)
    except RuntimeError:
        return True


def with_empty(ctx, operands, parts, dtypes: dict):
    """The operands, with an array of no elements for each of `dtypes` that is not among the `parts` which are there."""
    avals, values = list(ctx.avals_in[:2]), list(operands[:2])
    given = dict(zip(parts, zip(ctx.avals_in[2:], operands[2:], strict=True), strict=True))
    for part, dtype in dtypes.items():
        empty = np.zeros((0,), dtype)
        aval, value = given.get(part) or (jax.typeof(empty), mlir.ir_constant(empty))
        avals.append(aval)
        values.append(value)
    return ctx.replace(avals_in=avals), values


def _plain(op: str, ctx, *operands, **attributes):
    return jax.ffi.ffi_lowering(_native.TARGETS[op])(ctx, *operands, **attributes)


def _with_workspace(op: str, ctx, *operands, **attributes):
    """The call returns a workspace as a second result, which is dropped here."""
    (result,) = ctx.avals_out
    workspace = result.update(shape=workspace_shape(result.shape), dtype=np.dtype(np.float32))
    ctx = ctx.replace(avals_out=[result, workspace])
    return jax.ffi.ffi_lowering(_native.TARGETS[op])(ctx, *operands, **attributes)[:1]


def workspace_shape(filter_shape) -> tuple:
    """Partial sums of grad_filter on a GPU: (splits, elements of the filter), float32.

    The number of splits must be the same on every device. It bounds what the planner may use: as many as keep the
    workspace at 16 MiB, from 8 to 1024.
    """
    elements = math.prod(filter_shape)
    splits = max(8, min(1024, 2**22 // max(1, elements))) if isinstance(elements, int) else 32
    return (splits, elements)
