"""What the planner of the CUDA kernels chooses, on any machine: `python -m jax_dwsconv plan`."""

from typing import NamedTuple

import jax

from jax_dwsconv import _geometry, lowering


class Device(NamedTuple):
    """What the planner knows of a GPU.

    Attributes:
      multiprocessors: how many it has.
      capability: the compute capability, 10 * major + minor.
      shared_memory: bytes of a multiprocessor.
      most_shared_memory: bytes that one block may have.
    """

    multiprocessors: int
    capability: int
    shared_memory: int
    most_shared_memory: int


def _kib(multiprocessors: int, capability: int, shared: int, most: int) -> Device:
    return Device(multiprocessors, capability, shared * 1024, most * 1024)


DEVICES = {
    "rtx2080ti": _kib(68, 75, 64, 64),
    "a100": _kib(108, 80, 164, 163),
    "rtx3090": _kib(82, 86, 100, 99),
    "a10": _kib(72, 86, 100, 99),
    "l4": _kib(58, 89, 100, 99),
    "rtx4090": _kib(128, 89, 100, 99),
    "h100": _kib(132, 90, 228, 227),
    "h200": _kib(132, 90, 228, 227),
    "b200": _kib(148, 100, 228, 227),
    "rtx5090": _kib(170, 120, 100, 99),
}


class Plan(NamedTuple):
    """A way to launch an operator: the text that JAX_DWSCONV_TILE takes, and the estimated cycles (0: no estimate)."""

    text: str
    cycles: float


def visible_device() -> Device | None:
    """The facts about the GPU that JAX uses by default; None where there is none, or none that is known."""
    kind = jax.devices()[0].device_kind.lower().replace(" ", "")
    return next((facts for name, facts in DEVICES.items() if name in kind), None)


def plan(
    operator: str,
    shape: tuple[int, int, int, int],
    kernel_size: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    padding: str | tuple[tuple[int, int], tuple[int, int]] = "SAME",
    dilation: tuple[int, int] = (1, 1),
    layout: str = "NHWC",
    dtype: str = "float32",
    device: Device = DEVICES["h100"],
) -> tuple[Plan, list[Plan]]:
    """What the planner chooses for a problem on a device, and everything that it could choose.

    Args:
      operator: "forward", "grad_input", "grad_filter", or with the dtype int8 "quantized_forward".
      shape: of x, (N, H, W, C) whatever the layout.
      kernel_size: of the filter.
      strides: of the window.
      padding: "SAME", "VALID" or ((top, bottom), (left, right)).
      dilation: of the window.
      layout: "NHWC" or "NCHW".
      dtype: of all operands.
      device: the facts about the GPU.

    Raises:
      ValueError: an argument is not one of these, or the result would be empty.
    """
    from jax_dwsconv import _plan  # noqa: PLC0415  (native; everything else works without it)

    if isinstance(padding, str) and padding not in ("SAME", "VALID"):
        raise ValueError(f"padding must be SAME, VALID or pairs, not {padding}")
    pads = ((0, 0), (0, 0)) if padding == "VALID" else padding
    if padding == "SAME":
        axes = zip(shape[1:3], kernel_size, strides, dilation, strict=True)
        pads = tuple(_geometry.same_padding(*axis, lower=False) for axis in axes)
    splits = lowering.workspace_shape((1, *kernel_size, shape[3]))[0]
    found = _plan.plan(
        operator, shape, kernel_size, strides, (*pads[0], *pads[1]), dilation, layout, dtype, tuple(device), splits
    )
    chosen, *candidates = (Plan(*each) for each in found)
    return chosen, list(dict.fromkeys(candidates))


def plan_pointwise(
    shape: tuple[int, int, int, int], features: int, dtype: str, gated: bool = False, device: Device = DEVICES["h100"]
) -> tuple[Plan, list[Plan]] | None:
    """The same for a pointwise convolution, or None where no kernel takes it.

    Args:
      shape: of x, (N, H, W, C).
      features: of the result.
      dtype: of all operands.
      gated: whether x is multiplied by a gate.
      device: the facts about the GPU.

    Raises:
      ValueError: something is empty, or there is no such dtype.
    """
    from jax_dwsconv import _plan  # noqa: PLC0415

    found = _plan.plan_pointwise(shape, features, dtype, gated, tuple(device))
    if not found:
        return None
    chosen, *candidates = (Plan(*each) for each in found)
    return chosen, candidates
