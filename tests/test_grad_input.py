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
    numerics.check(case, "grad_input")


@pytest.mark.parametrize("case", cases.usual(), ids=str)
def test_usual(case):
    numerics.check(case, "grad_input")


@pytest.mark.parametrize("case", cases.of_dtypes(cases.DTYPES_WITH_KERNEL, cases.DTYPES_BY_CONVERSION), ids=str)
def test_dtypes(case):
    numerics.check(case, "grad_input")


@pytest.mark.parametrize("case", cases.of_dtypes(cases.DTYPES_WIDE), ids=str)
def test_float64(case):
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        numerics.check(case, "grad_input")


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_sampled(data):
    numerics.check(cases.sample(lambda options: data.draw(st.sampled_from(options))), "grad_input")


@pytest.mark.slow
@pytest.mark.parametrize("case", cases.random_cases(600, seed=2), ids=str)
def test_random(case):
    numerics.check(case, "grad_input")


@pytest.mark.parametrize("case", cases.grid()[5::16], ids=str)
def test_agrees_with_lax(case):
    g, kernel = (jnp.asarray(a) for a in case.operands("grad_input"))
    expected = reference.grad_input(g, kernel, **case.parameters("grad_input"))
    numerics.assert_close(
        numerics.run(case, "grad_input", g, kernel), expected, length=case.reduction_length("grad_input")
    )


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        Case(size=(5, 6), kernel_size=(2, 2), strides=(3, 4), padding=((0, 0), (0, 0))),  # read by no window
        Case(size=(8, 21), strides=(2, 4), padding=((-2, 0), (0, -3)), channels=16),  # cropped away
    ],
    ids=str,
)
def test_unread_inputs_get_exact_zeros(case, layout):
    case = dataclasses.replace(case, layout=layout)
    g, kernel = (np.abs(a) + 1 for a in case.operands("grad_input"))
    expected = numerics.reference(case, "grad_input", g, kernel)
    assert (expected == 0).any()
    assert (expected != 0).any()
    np.testing.assert_array_equal(np.asarray(numerics.run(case, "grad_input", g, kernel)) == 0, expected == 0)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    "case",
    [
        Case(channels=19, size=(9, 21)),
        Case(channels=3, size=(9, 37), layout="NCHW", filter_layout="OHW"),
        Case(channels=4, size=(9, 21), strides=(2, 3), dilation=(2, 1), multiplier=2),
        Case(channels=4, size=(9, 21), strides=(2, 2), layout="NCHW", multiplier=2, dtypes=("bfloat16",) * 3),
        Case(channels=24, size=(9, 21), dtypes=("bfloat16",) * 3),
        Case(channels=16, size=(9, 38), strides=(2, 2), dtypes=("float16",) * 3),
    ],
    ids=str,
)
def test_non_finite_stays_local(case, value):
    g, kernel = case.operands("grad_input")
    for position in ((0, 0, 0, 0), (1, -1, -1, -1), (0, 2, 3, 1)):
        poisoned = g.copy()
        poisoned[position] = value
        numerics.check_result(case, "grad_input", poisoned, kernel, numerics.run(case, "grad_input", poisoned, kernel))
