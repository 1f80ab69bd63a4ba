"""How right a result is: a float64 reference in plain NumPy, one tolerance, and one comparison built on it."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from cases import Case
from jax import numpy as jnp

from jax_dwsconv import primitives


class Tolerance(NamedTuple):
    """The error that a result may have.

    Attributes:
      of_sum: times the sum of the magnitudes of the products that were added: cancellation does not matter.
      of_value: times the value itself, for rounding it to the dtype of the result.
      absolute: the spacing of the numbers next to zero.
    """

    of_sum: float
    of_value: float
    absolute: float


def tolerance(dtype, length: int) -> Tolerance:
    """What is allowed for a result of this dtype that sums `length` products in float32 (float64 where the dtype is).

    The rounding errors of a running sum of terms of one sign, the worst case, walk about eps * sqrt(length) / 6 far;
    the maximum over many elements is some five times as much.
    """
    info, accumulator = jnp.finfo(dtype), jnp.finfo(jnp.promote_types(dtype, "float32"))
    return Tolerance(
        of_sum=float(accumulator.eps) * (1 + length**0.5),
        of_value=0.0 if info.dtype == accumulator.dtype else float(info.eps) / 2,
        absolute=float(info.smallest_subnormal),
    )


def assert_close(actual, expected, *, length: int, magnitude=None, dtype=None) -> None:
    """Asserts that a result is as close to the expected one as its dtype allows, and infinite or NaN where that is.

    Args:
      actual: the result.
      expected: of the same shape, in float64 or as good.
      length: how many products an element sums.
      magnitude: the sum of the products' magnitudes; by default the largest expected value stands for it.
      dtype: the coarsest dtype to which something was rounded on the way, where that is not the result's.
    """
    allowed = tolerance(dtype or actual.dtype, length)
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    if expected.size == 0:
        return
    finite = np.isfinite(expected)
    if magnitude is None:
        magnitude = np.max(np.abs(expected), where=finite, initial=0.0)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    with np.errstate(invalid="ignore"):
        bound = allowed.of_sum * magnitude + allowed.of_value * np.abs(expected) + allowed.absolute
        wrong = finite & ~(np.abs(actual - expected) <= bound)  # true for an unexpected NaN, too
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        got, wanted, limit = actual[at], expected[at], np.broadcast_to(bound, actual.shape)[at]
        raise AssertionError(
            f"{wrong.sum()} of {wrong.size} elements are wrong, first {at}: {got} for {wanted} +- {limit:.3g}"
        )


def reference(case: Case, operator: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """An operator in float64: one shifted product for every tap."""
    a, b = (_canonical(case, x, role).astype(np.float64) for x, role in zip((a, b), _OPERANDS[operator], strict=True))
    m, per_group = case.multiplier, case.batch // case.groups
    by_image = np.repeat(np.arange(case.groups), per_group)
    if operator == "forward":
        x = np.repeat(a, m, axis=-1)
        y = np.zeros((case.batch, *case.output_size, case.out_channels))
        for tap, source, target in _taps(case):
            y[:, *target] += x[:, *source] * b[by_image, *tap][:, None, None]
        return _to_layout(y, case.layout)
    if operator == "grad_input":
        x = np.zeros((case.batch, *case.size, case.out_channels))
        for tap, source, target in _taps(case):
            x[:, *source] += a[:, *target] * b[by_image, *tap][:, None, None]
        return _to_layout(x.reshape(*x.shape[:3], case.channels, m).sum(-1), case.layout)
    x = np.repeat(a, m, axis=-1)
    kernel = np.zeros((case.groups, *case.kernel_size, case.out_channels))
    for tap, source, target in _taps(case):
        products = (x[:, *source] * b[:, *target]).sum((1, 2))
        kernel[:, *tap] = products.reshape(case.groups, per_group, case.out_channels).sum(1)
    return kernel if case.filter_layout == "HWO" else np.moveaxis(kernel, 3, 1)


_OPERANDS = {
    "forward": ("activation", "filter"),
    "grad_input": ("activation", "filter"),
    "grad_filter": ("activation", "activation"),
}


def _canonical(case: Case, x: np.ndarray, role: str) -> np.ndarray:
    """Channels last."""
    channels_first = case.layout == "NCHW" if role == "activation" else case.filter_layout == "OHW"
    return np.moveaxis(x, 1, 3) if channels_first else x


def _to_layout(x: np.ndarray, layout: str) -> np.ndarray:
    return x if layout == "NHWC" else np.moveaxis(x, 3, 1)


def _taps(case: Case) -> Iterator[tuple]:
    """Every tap (i, j), with the (rows, columns) of the input that it reads and of the output that it adds to."""

    def axis(d: int) -> list[tuple[np.ndarray, np.ndarray]]:
        target = np.arange(case.output_size[d])
        found = []
        for k in range(case.kernel_size[d]):
            source = target * case.strides[d] + k * case.dilation[d] - case.padding[d][0]
            inside = (source >= 0) & (source < case.size[d])
            found.append((source[inside], target[inside]))
        return found

    columns = axis(1)
    for i, (source_rows, target_rows) in enumerate(axis(0)):
        for j, (source_columns, target_columns) in enumerate(columns):
            yield (i, j), (source_rows[:, None], source_columns), (target_rows[:, None], target_columns)


def normal(*shape: int, dtype="float32", seed: int = 0) -> np.ndarray:
    """Normally distributed numbers, for tests that need no whole case."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def run(case: Case, operator: str, a, b) -> jax.Array:
    """The operator of the package."""
    return getattr(primitives, operator)(jnp.asarray(a), jnp.asarray(b), **case.parameters(operator))


def check(case: Case, operator: str, offset: float = 0.0) -> None:
    """Compares an operator of the package with the reference."""
    a, b = case.operands(operator, offset)
    check_result(case, operator, a, b, run(case, operator, a, b))


def check_result(
    case: Case, operator: str, a: np.ndarray, b: np.ndarray, result: jax.Array, length: int | None = None
) -> None:
    """Compares a result with the reference."""
    assert result.dtype == case.parameters(operator)["out_dtype"]
    magnitude = reference(case, operator, np.abs(a), np.abs(b))
    length = length or case.reduction_length(operator)
    assert_close(result, reference(case, operator, a, b), length=length, magnitude=magnitude)


def primitives_in(function: Callable, *args) -> Counter[str]:
    """How often each primitive occurs in the trace of a function, inner functions included."""
    return Counter(equation.primitive.name for equation in equations(jax.make_jaxpr(function)(*args).jaxpr))


def equations(jaxpr) -> Iterator:
    """All equations of a jaxpr and of the jaxprs within."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from equations(getattr(value, "jaxpr", value))
