import dataclasses

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


@pytest.mark.parametrize("case", cases.grid(), ids=str)
def test_grid(case):
    numerics.check(case, "forward")


@pytest.mark.parametrize("case", cases.usual(), ids=str)
def test_usual(case):
    numerics.check(case, "forward")


@pytest.mark.parametrize("case", cases.of_dtypes(cases.DTYPES_WITH_KERNEL, cases.DTYPES_BY_CONVERSION), ids=str)
def test_dtypes(case):
    numerics.check(case, "forward")


@pytest.mark.parametrize("case", cases.of_dtypes(cases.DTYPES_WIDE), ids=str)
def test_float64(case):
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        numerics.check(case, "forward")


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_sampled(data):
    numerics.check(cases.sample(lambda options: data.draw(st.sampled_from(options))), "forward")


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.random_cases(600, seed=1), ids=str)
def test_random(case):
    numerics.check(case, "forward")


@pytest.mark.parametrize("case", cases.grid()[::12], ids=str)
def test_agrees_with_lax(case):
    x, kernel = (jnp.asarray(a) for a in case.operands("forward"))
    expected = reference.forward(x, kernel, **case.parameters("forward"))
    numerics.assert_close(numerics.run(case, "forward", x, kernel), expected, length=case.reduction_length("forward"))


NON_FINITE = (
    Case(channels=19, size=(9, 21)),
    Case(channels=24, size=(9, 21), kernel_size=(5, 5), padding=((2, 2), (2, 2))),
    Case(channels=16, size=(9, 37), strides=(2, 2)),
    Case(channels=3, size=(9, 37), layout="NCHW", filter_layout="OHW"),
    Case(channels=4, size=(9, 21), strides=(2, 3), dilation=(2, 1), multiplier=2),
    Case(channels=4, size=(9, 21), strides=(4, 4), layout="NCHW", multiplier=2),  # some inputs are read by nobody
)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", NON_FINITE, ids=str)
def test_non_finite_stays_local(case, dtype, value):
    case = dataclasses.replace(case, dtypes=(dtype,) * 3)
    x, kernel = case.operands("forward")
    for position in ((0, 0, 0, 0), (1, -1, -1, -1), (0, 2, 3, 1)):
        poisoned = x.copy()
        poisoned[position] = value
        numerics.check_result(case, "forward", poisoned, kernel, numerics.run(case, "forward", poisoned, kernel))


def test_overflow_of_a_narrow_result_is_infinite():
    case = Case(kernel_size=(1, 1), padding=((0, 0), (0, 0)), channels=19, dtypes=("float16",) * 3)
    x, kernel = np.full(case.shapes()["input"], 300, np.float16), np.full(case.shapes()["filter"], 300, np.float16)
    assert np.isposinf(numerics.run(case, "forward", x, kernel)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_rounding(dtype):
    """The sum 1 + 2**-12 + ... of 9 taps is exact in float32, and lost where partial sums are rounded."""
    case = Case(batch=1, size=(3, 3), padding=((0, 0), (0, 0)), channels=17, dtypes=(dtype, dtype, dtype))
    x, kernel = np.full(case.shapes()["input"], 2.0**-9, dtype), np.ones(case.shapes()["filter"], dtype)
    x[:, 0, 0] = 1
    numerics.check_result(case, "forward", x, kernel, numerics.run(case, "forward", x, kernel))
