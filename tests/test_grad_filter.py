import cases
import hypothesis
import jax
import numerics
import numpy as np
import pytest
from cases import Case
from hypothesis import strategies as st
from jax import numpy as jnp

from jax_dwsconv import reference

# Long sums: those that a kernel splits into parts.
LONG = (
    Case(batch=4, size=(56, 56), channels=24),
    Case(batch=4, size=(56, 57), channels=6, layout="NCHW", filter_layout="OHW"),
    Case(batch=2, size=(40, 80), channels=17, strides=(2, 2), kernel_size=(5, 5), padding=((2, 2), (2, 2))),
    Case(batch=6, size=(30, 50), channels=8, groups=3),
    Case(batch=37, size=(7, 7), channels=33, multiplier=2),
    Case(batch=1, size=(1, 20000), channels=3, kernel_size=(1, 4), padding=((0, 0), (3, 0))),
    Case(batch=1, size=(1, 20000), channels=3, kernel_size=(1, 4), padding=((0, 0), (3, 0)), layout="NCHW"),
)


@pytest.mark.parametrize("case", cases.grid(), ids=str)
def test_grid(case):
    numerics.check(case, "grad_filter")


@pytest.mark.parametrize("case", cases.usual(), ids=str)
def test_usual(case):
    numerics.check(case, "grad_filter")


@pytest.mark.parametrize("case", cases.of_dtypes(cases.DTYPES_WITH_KERNEL, cases.DTYPES_BY_CONVERSION), ids=str)
def test_dtypes(case):
    numerics.check(case, "grad_filter")


@pytest.mark.parametrize("case", cases.of_dtypes(cases.DTYPES_WIDE), ids=str)
def test_float64(case):
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        numerics.check(case, "grad_filter")


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_sampled(data):
    numerics.check(cases.sample(lambda options: data.draw(st.sampled_from(options))), "grad_filter")


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.random_cases(600, seed=3), ids=str)
def test_random(case):
    numerics.check(case, "grad_filter")


# Few: lax's own filter gradient takes long to compile on the CPU.
@pytest.mark.parametrize("case", [Case(), Case(layout="NCHW", filter_layout="OHW", strides=(2, 2))], ids=str)
def test_agrees_with_lax(case):
    x, g = (jnp.asarray(a) for a in case.operands("grad_filter"))
    expected = reference.grad_filter(x, g, **case.parameters("grad_filter"))
    numerics.assert_close(
        numerics.run(case, "grad_filter", x, g), expected, length=case.reduction_length("grad_filter")
    )


@pytest.mark.parametrize("offset", [0, 100])
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sums(case, offset):
    """One running sum of n terms of one sign errs by up to n roundings; partial sums keep that near one."""
    x, g = case.operands("grad_filter", offset)
    g = np.abs(g)
    numerics.check_result(case, "grad_filter", x, g, numerics.run(case, "grad_filter", x, g), length=64)


@pytest.mark.parametrize("case", LONG, ids=str)
def test_same_bits_every_time(case):
    x, g = (jnp.asarray(a) for a in case.operands("grad_filter"))
    first = np.asarray(numerics.run(case, "grad_filter", x, g))
    for _ in range(5):
        np.testing.assert_array_equal(np.asarray(numerics.run(case, "grad_filter", x, g)), first)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.parametrize(
    "case",
    [
        Case(channels=19, size=(9, 21), padding=((0, 0), (0, 0)), groups=2),
        Case(channels=3, size=(9, 37), padding=((0, 0), (0, 0)), layout="NCHW", filter_layout="OHW", groups=2),
        Case(channels=4, size=(9, 21), padding=((0, 0), (0, 0)), strides=(2, 3), dilation=(2, 1), multiplier=2),
        Case(channels=4, size=(9, 21), padding=((0, 0), (0, 0)), strides=(4, 4), layout="NCHW", multiplier=2),
    ],
    ids=str,
)
def test_non_finite_stays_local(case, operand, value):
    """In the taps that read it. Without padding: whether its zeros meet an infinity of g is left open."""
    operands = case.operands("grad_filter")
    for position in ((0, 0, 0, 0), (1, -1, -1, -1), (0, 2, 3, 1)):
        poisoned = [a.copy() for a in operands]
        shape = poisoned[operand].shape
        poisoned[operand][tuple(min(p, n - 1) for p, n in zip(position, shape, strict=True))] = value
        numerics.check_result(case, "grad_filter", *poisoned, numerics.run(case, "grad_filter", *poisoned))
