"""What only a GPU can show. The rest of the suite runs there unchanged."""

import functools

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jax_dwsconv
from jax_dwsconv import _native

pytestmark = pytest.mark.gpu

CHAIN = 12  # XLA does not make a graph of a single small operation


def _chain(x, kernels):
    for kernel in kernels:
        x = jnp.tanh(jax_dwsconv.depthwise_conv2d(x, kernel))
    return x


def _operands(shape=(1, 14, 14, 64), dtype=np.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=shape), dtype)
    kernels = [jnp.asarray(rng.normal(size=(3, 3, 1, shape[-1])), dtype) for _ in range(CHAIN)]
    return x, kernels


def test_kernels_are_used():
    assert _native.why_unavailable("cuda") is None
    x, kernels = _operands()
    assert "jax_dwsconv.forward.v1" in jax.jit(_chain).lower(x, kernels).compile().as_text()


@pytest.mark.parametrize("differentiated", [False, True])
def test_a_chain_of_calls_is_recorded_into_a_graph(differentiated):
    function = jax.grad(lambda x, k: _chain(x, k).sum(), (0, 1)) if differentiated else _chain
    function = jax.jit(functools.partial(function))
    x, kernels = _operands()
    before = _native.load("cuda").captured_calls()
    results = [jax.block_until_ready(function(x, kernels)) for _ in range(4)]
    recorded = _native.load("cuda").captured_calls() - before
    calls = CHAIN * (3 if differentiated else 1)
    assert recorded >= calls - 2  # XLA may leave a call at the edge outside
    for result in results[1:]:  # replays give what the first, plain launch gave
        jax.tree.map(np.testing.assert_array_equal, result, results[0])


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sanitizer_selection(layout, dtype):
    """A few shapes that touch every border; short, so that compute-sanitizer gets through."""
    rng = np.random.default_rng(0)
    for size, channels, multiplier, kernel_size, stride, dilation in (
        ((9, 7), 33, 1, (3, 3), 1, 1),
        ((12, 13), 8, 2, (5, 4), 2, 1),
        ((3, 2), 5, 1, (7, 7), 1, 1),
        ((16, 17), 64, 1, (3, 5), 3, 2),
    ):
        shape = (2, *size, channels) if layout == "NHWC" else (2, channels, *size)
        x = jnp.asarray(rng.normal(size=shape), dtype)
        kernel = jnp.asarray(rng.normal(size=(*kernel_size, 1, channels * multiplier)), jnp.float32)

        def convolve(x, kernel, stride=stride, dilation=dilation):
            y = jax_dwsconv.depthwise_conv2d(x, kernel, strides=stride, dilation=dilation, data_format=layout)
            return (y * y).sum()

        dx, dkernel = jax.jit(jax.grad(convolve, (0, 1)))(x, kernel)
        assert np.isfinite(np.asarray(dx, np.float32)).all()
        assert np.isfinite(np.asarray(dkernel)).all()
