import functools

import jax
import numpy as np
import pytest
from cases import Case
from jax import numpy as jnp
from numerics import normal

import jax_dwsconv
from jax_dwsconv import primitives

ARRAYS = {
    "x": normal(2, 9, 11, 6),
    "kernel": normal(3, 3, 1, 6),
    "depthwise_kernel": normal(3, 3, 1, 6),
    "pointwise_kernel": normal(1, 1, 6, 4),
}
FUNCTIONS = {
    "conv1d": (jax_dwsconv.depthwise_conv1d, {"x": normal(2, 11, 6), "kernel": normal(3, 1, 6)}),
    "conv2d": (jax_dwsconv.depthwise_conv2d, {name: ARRAYS[name] for name in ("x", "kernel")}),
    "transpose": (jax_dwsconv.depthwise_conv_transpose2d, {name: ARRAYS[name] for name in ("x", "kernel")}),
    "separable": (
        jax_dwsconv.separable_conv2d,
        {name: ARRAYS[name] for name in ("x", "depthwise_kernel", "pointwise_kernel")},
    ),
}

# (function, what replaces or joins the arguments of a good call, the error, what its message must contain).
BAD = [
    # ranks and shapes
    ("conv2d", {"x": normal(9, 6)}, ValueError, "x must have at least 3 dimensions.*H, W, C"),
    ("conv1d", {"x": normal(6)}, ValueError, "x must have at least 2 dimensions.*W, C"),
    ("conv2d", {"kernel": normal(3, 3, 6)}, ValueError, r"kernel must have shape \(kh, kw, 1, C \* multiplier\)"),
    ("conv1d", {"kernel": normal(3, 3, 1, 6)}, ValueError, r"kernel must have shape \(kw, 1, C \* multiplier\)"),
    ("conv2d", {"kernel": normal(3, 3, 6, 1)}, ValueError, r"kernel must have shape .*got \(3, 3, 6, 1\)"),
    ("conv2d", {"kernel": normal(0, 3, 1, 6)}, ValueError, "kernel must have shape"),
    ("conv2d", {"kernel": normal(3, 3, 1, 7)}, ValueError, "kernel.*multiple of the 6 channels of x"),
    ("conv2d", {"kernel": normal(3, 3, 1, 0)}, ValueError, "kernel.*multiple of the 6 channels of x"),
    ("conv2d", {"x": normal(2, 9, 11, 0)}, ValueError, "kernel.*multiple of the 0 channels of x"),
    ("conv2d", {"data_format": "NCHW"}, ValueError, "kernel.*multiple of the 9 channels of x.*NCHW"),
    ("conv2d", {"bias": normal(5)}, ValueError, r"bias must have shape \(6,\).*got \(5,\)"),
    ("conv2d", {"bias": normal(1, 6)}, ValueError, r"bias must have shape \(6,\)"),
    ("transpose", {"scale": normal(5)}, ValueError, r"scale must have shape \(6,\).*got \(5,\)"),
    (
        "separable",
        {"pointwise_kernel": normal(1, 1, 5, 4)},
        ValueError,
        r"pointwise_kernel must have shape \(1, 1, 6, F\)",
    ),
    (
        "separable",
        {"pointwise_kernel": normal(3, 3, 6, 4)},
        ValueError,
        r"pointwise_kernel must have shape \(1, 1, 6, F\)",
    ),
    ("separable", {"pointwise_bias": normal(6)}, ValueError, r"pointwise_bias must have shape \(4,\)"),
    ("separable", {"depthwise_bias": normal(4)}, ValueError, r"depthwise_bias must have shape \(6,\)"),
    ("separable", {"depthwise_kernel": normal(3, 3, 1, 7)}, ValueError, "depthwise_kernel.*multiple of the 6 channels"),
    ("conv2d", {"residual": normal(2, 9, 11, 5)}, ValueError, r"residual must have the shape.*\(2, 9, 11, 6\), got"),
    (
        "conv2d",
        {"residual": normal(9, 11, 6)},
        ValueError,
        r"residual must have the shape of the result, \(2, 9, 11, 6\)",
    ),
    ("conv2d", {"residual": normal(2, 9, 11, 6), "strides": 2}, ValueError, r"residual must .* \(2, 5, 6, 6\), got"),
    (
        "conv1d",
        {"residual": normal(2, 1, 11, 6)},
        ValueError,
        r"residual must have the shape of the result, \(2, 11, 6\)",
    ),
    (
        "separable",
        {"pointwise_gate": normal(2, 4)},
        ValueError,
        r"pointwise_gate must have shape \(2, 6\).*got \(2, 4\)",
    ),
    (
        "separable",
        {"pointwise_residual": normal(2, 9, 11, 6)},
        ValueError,
        r"pointwise_residual .* \(2, 9, 11, 4\), got",
    ),
    # dtypes
    (
        "conv2d",
        {"residual": ARRAYS["x"].astype(np.float16)},
        TypeError,
        "residual must have the dtype .*float32.*float16",
    ),
    ("conv2d", {"residual": ARRAYS["x"].astype(int)}, TypeError, "residual must have a floating dtype"),
    ("separable", {"pointwise_gate": np.ones((2, 6), int)}, TypeError, "pointwise_gate must have a floating dtype"),
    ("conv2d", {"x": np.ones((2, 9, 11, 6), np.int32)}, TypeError, "x must have a floating dtype.*int32"),
    ("conv2d", {"x": np.ones((2, 9, 11, 6), np.complex64)}, TypeError, "x must have a floating dtype.*complex64"),
    ("conv2d", {"kernel": np.ones((3, 3, 1, 6), np.int8)}, TypeError, "kernel must have a floating dtype.*int8"),
    ("conv2d", {"bias": np.ones(6, np.int32)}, TypeError, "bias must have a floating dtype"),
    ("conv2d", {"preferred_element_type": jnp.int32}, TypeError, "preferred_element_type must be a floating dtype"),
    ("conv2d", {"preferred_element_type": "float33"}, TypeError, "preferred_element_type must be a floating dtype"),
    ("conv2d", {"x": None}, TypeError, "x must be an array"),
    ("conv2d", {"x": "image"}, TypeError, "x must be an array"),
    ("separable", {"pointwise_kernel": np.ones((6, 4), int)}, TypeError, "pointwise_kernel must have a floating dtype"),
    ("separable", {"depthwise_kernel": np.ones((3, 3, 1, 6), int)}, TypeError, "depthwise_kernel must have a floating"),
    # windows
    ("conv2d", {"strides": 0}, ValueError, "strides .*integers from 1"),
    ("conv2d", {"strides": (1, -1)}, ValueError, "strides .*integers from 1"),
    ("conv1d", {"dilation": 0}, ValueError, "dilation .*integers from 1"),
    ("transpose", {"strides": (0, 1)}, ValueError, "strides .*integers from 1"),
    ("conv2d", {"strides": (1, 1, 1)}, ValueError, "strides must be an int or 2 ints"),
    ("conv1d", {"strides": (1, 1)}, ValueError, "strides must be an int or 1 ints"),
    ("conv2d", {"dilation": ()}, ValueError, "dilation must be an int or 2 ints"),
    ("conv2d", {"strides": 1.0}, TypeError, "strides must be made of integers"),
    ("conv2d", {"dilation": (1.5, 1)}, TypeError, "dilation must be made of integers"),
    ("conv2d", {"strides": np.array([1.0, 2.0])}, TypeError, "strides must be made of integers"),
    ("conv2d", {"padding": 1.0}, TypeError, "padding must be made of integers"),
    ("conv2d", {"padding": ((1.0, 1), (1, 1))}, TypeError, "padding must be made of integers"),
    ("conv2d", {"padding": None}, TypeError, "padding must be made of integers"),
    ("conv2d", {"strides": "2"}, (TypeError, ValueError), "strides"),
    ("conv2d", {"padding": ((1, 1),)}, ValueError, "padding must have one entry for each of the 2 spatial axes"),
    ("conv2d", {"padding": ((1, 1, 1), (1, 1))}, ValueError, "padding: every axis needs an int or a .low, high. pair"),
    ("conv2d", {"padding": "REFLECT"}, ValueError, "padding='REFLECT' is unknown; use 'SAME'"),
    ("conv2d", {"padding": "CAUSAL"}, ValueError, "padding='CAUSAL' is for one spatial axis"),
    ("transpose", {"padding": "SAME_LOWER"}, ValueError, "padding='SAME_LOWER' is not for transposed"),
    ("transpose", {"padding": "CAUSAL"}, ValueError, "padding='CAUSAL' is not for transposed"),
    # sizes
    ("conv2d", {"padding": 2**40}, ValueError, "padding must be made of integers from -2147483647 to 2147483647"),
    ("conv2d", {"padding": ((0, 0), (-(2**31), 0))}, ValueError, "padding must be made of integers"),
    ("conv2d", {"strides": 2**31}, ValueError, "strides must be made of integers from 1 to 2147483647"),
    ("conv1d", {"dilation": 2**64}, ValueError, "dilation must be made of integers"),
    # the rest
    ("conv2d", {"activation": "swish9"}, ValueError, "activation='swish9' is unknown; use one of 'relu'"),
    ("conv2d", {"activation": 3}, TypeError, "activation must be a name, a function"),
    ("separable", {"pointwise_activation": "swish9"}, ValueError, "activation='swish9' is unknown"),
    ("conv2d", {"data_format": "NHCW"}, ValueError, "data_format must be 'NHWC' or 'NCHW'"),
    ("conv2d", {"data_format": "NWC"}, ValueError, "data_format must be 'NHWC' or 'NCHW'"),
    ("conv1d", {"data_format": "NHWC"}, ValueError, "data_format must be 'NWC' or 'NCW'"),
    ("separable", {"data_format": "nhwc"}, ValueError, "data_format must be 'NHWC' or 'NCHW'"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD, ids=[f"{b[0]} {b[3]}" for b in BAD])
def test_bad_calls(name, change, error, message):
    """Eagerly and while tracing, where arrays are abstract."""
    function, arguments = FUNCTIONS[name]
    function(**arguments)
    arguments = {**arguments, **change}
    with pytest.raises(error, match=message):
        function(**arguments)
    arrays = {
        key: value for key, value in arguments.items() if isinstance(value, np.ndarray) and key not in ("strides",)
    }
    static = {key: value for key, value in arguments.items() if key not in arrays}
    for trace in (jax.eval_shape, lambda f, arrays: jax.make_jaxpr(f)(arrays)):
        with pytest.raises(error, match=message):
            trace(lambda arrays: function(**arrays, **static), arrays)


@pytest.mark.parametrize("argument", ["strides", "dilation", "padding"])
@pytest.mark.parametrize("make", [lambda n: n, lambda n: (n, n), lambda n: [1, n], lambda n: jnp.stack([n, n])])
def test_traced_windows(argument, make):
    def convolve(n):
        return jax_dwsconv.depthwise_conv2d(ARRAYS["x"], ARRAYS["kernel"], **{argument: make(n)})

    with pytest.raises(TypeError, match=f"{argument} must be made of integers known when the function is traced"):
        jax.jit(convolve)(1)


@pytest.mark.parametrize(
    "value", [2, np.int64(2), np.array(2), [2, 1], (2, 1), np.array([2, 1]), (np.int32(2), np.uint8(1))], ids=repr
)
@pytest.mark.parametrize("argument", ["strides", "padding", "dilation"])
def test_integers_of_any_kind(argument, value):
    """None of these has to be hashable."""
    shapes = [
        jax.eval_shape(lambda x, v=v: jax_dwsconv.depthwise_conv2d(x, ARRAYS["kernel"], **{argument: v}), ARRAYS["x"])
        for v in (value, np.asarray(value).tolist())
    ]
    assert shapes[0] == shapes[1]


HUGE = 2**31 - 1


@pytest.mark.parametrize(
    ("x", "kernel", "padding"),
    [
        ((1, 4, 4, 6), (1, 1, 1, 6), HUGE),  # the result
        ((2**20, 2**20, 2**20, 2), (1, 1, 1, 2), 0),  # the input: 2**61 elements
        ((2**21, 2**20, 2**18, 1), (1, 1, 1, 4), 0),  # the result: 2**61 elements
    ],
)
@pytest.mark.parametrize("operator", ["value", "grad"])
def test_sizes_beyond_int64(x, kernel, padding, operator):
    x, kernel = (jax.ShapeDtypeStruct(shape, np.float32) for shape in (x, kernel))
    convolve = functools.partial(jax_dwsconv.depthwise_conv2d, padding=padding)
    function = convolve if operator == "value" else jax.grad(lambda *args: convolve(*args).sum(), 1)
    with pytest.raises(ValueError, match=r"more than 2\*\*63 - 1 bytes"):
        jax.eval_shape(function, x, kernel)


def test_sizes_below_int64():
    """Abstractly, no size is too large otherwise."""
    x, kernel = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2**20, 2**20, 2**18, 4), (31, 31, 1, 4)))
    assert jax.eval_shape(jax_dwsconv.depthwise_conv2d, x, kernel).shape == x.shape


WINDOW = Case().window
BAD_OPERANDS = [
    ("forward", ((2, 7, 9, 5), (3, 3, 5)), {}, "kernel must have rank 4"),
    ("forward", ((2, 7, 9, 5), (1, 3, 3, 7)), {}, "7 output channels.*multiple of the 5 channels"),
    ("forward", ((2, 7, 9, 5), (3, 3, 3, 5)), {}, "batch size.*multiple of the number of filters, 3"),
    (
        "grad_input",
        ((2, 7, 9, 5), (1, 3, 3, 5)),
        {"input_size": (8, 9), "multiplier": 1},
        r"give an output of size \(8, 9\)",
    ),
    ("grad_input", ((2, 7, 9, 5), (1, 3, 3, 5)), {"input_size": (7, 9), "multiplier": 2}, "a multiple of 2"),
    (
        "grad_filter",
        ((2, 7, 9, 5), (2, 8, 9, 5)),
        {"kernel_size": (3, 3), "groups": 1},
        r"give an output of size \(7, 9\)",
    ),
    ("grad_filter", ((2, 7, 9, 5), (3, 7, 9, 5)), {"kernel_size": (3, 3), "groups": 1}, "same batch size"),
    (
        "grad_filter",
        ((2, 7, 9, 5), (2, 7, 9, 6)),
        {"kernel_size": (3, 3), "groups": 1},
        "multiple of the channels of x",
    ),
]


@pytest.mark.parametrize(
    ("operator", "shapes", "further", "message"), BAD_OPERANDS, ids=[f"{b[0]} {b[3]}" for b in BAD_OPERANDS]
)
def test_bad_operands_of_primitives(operator, shapes, further, message):
    function = functools.partial(getattr(primitives, operator), window=WINDOW, out_dtype=np.float32, **further)
    with pytest.raises(ValueError, match=f"{operator}: .*{message}"):
        jax.eval_shape(function, *(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes))


# The handler itself -------------------------------------------------------------------------------------------------

ATTRIBUTES = {
    "strides": np.array([1, 1]),
    "padding": np.array([1, 1, 1, 1]),
    "dilation": np.array([1, 1]),
    "layout": "NHWC",
    "filter_layout": "HWO",
    "since": "0.1.0",
}
GOOD = ((2, 7, 9, 5), (1, 3, 3, 5), (2, 7, 9, 5))
# (shapes of x, filter and result, changed attributes, dtype, what the message must contain)
BAD_BUFFERS = {
    "height": (((2, 7, 9, 5), (1, 3, 3, 5), (2, 8, 9, 5)), {}, "float32", "sizes do not describe one convolution"),
    "batch": (((2, 7, 9, 5), (1, 3, 3, 5), (3, 7, 9, 5)), {}, "float32", "sizes do not describe one convolution"),
    "channels": (((2, 7, 9, 5), (1, 3, 3, 5), (2, 7, 9, 6)), {}, "float32", "sizes do not describe one convolution"),
    "filter channels": (
        ((2, 7, 9, 5), (1, 3, 3, 4), (2, 7, 9, 5)),
        {},
        "float32",
        "sizes do not describe one convolution",
    ),
    "groups": (((2, 7, 9, 5), (3, 3, 3, 5), (2, 7, 9, 5)), {}, "float32", "sizes do not describe one convolution"),
    "no filters": (((2, 7, 9, 5), (0, 3, 3, 5), (2, 7, 9, 5)), {}, "float32", "sizes do not describe one convolution"),
    "no taps": (((2, 7, 9, 5), (1, 0, 3, 5), (2, 10, 9, 5)), {}, "float32", "sizes do not describe one convolution"),
    "no channels": (((2, 7, 9, 0), (1, 3, 3, 5), (2, 7, 9, 5)), {}, "float32", "sizes do not describe one convolution"),
    "rank": (((2, 7, 9, 5), (3, 3, 5), (2, 7, 9, 5)), {}, "float32", "rank 4"),
    "dtype": (GOOD, {}, "int32", "dtypes must be"),
    "layout": (GOOD, {"layout": "CHWN"}, "float32", "layout must be NHWC or NCHW"),
    "filter layout": (GOOD, {"filter_layout": "HWIO"}, "float32", "filter_layout must be HWO or OHW"),
    "zero stride": (GOOD, {"strides": np.array([0, 1])}, "float32", "strides and dilation need"),
    "too few": (GOOD, {"padding": np.array([1, 1])}, "float32", "strides and dilation need"),
    "overflowing": (GOOD, {"dilation": np.array([2**62, 1])}, "float32", "strides and dilation need"),
    "unknown attribute": (GOOD, {"tile": np.int64(3)}, "float32", "needs jax-dwsconv 0.1.0"),
    "wrong type of attribute": (GOOD, {"strides": np.array([1.0, 1.0])}, "float32", "needs jax-dwsconv 0.1.0"),
}


def _call_handler(shapes, changed, dtype):
    x, kernel, result = shapes
    call = jax.ffi.ffi_call("jax_dwsconv.forward.v1", jax.ShapeDtypeStruct(result, dtype))
    return call(jnp.zeros(x, dtype), jnp.zeros(kernel, dtype), **{**ATTRIBUTES, **changed})


@pytest.mark.parametrize("name", BAD_BUFFERS)
def test_handler_checks_what_it_is_given(name):
    *arguments, message = BAD_BUFFERS[name]
    with jax.default_device(jax.devices("cpu")[0]):
        assert _call_handler(GOOD, {}, "float32").shape == GOOD[2]
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"jax_dwsconv.forward: .*{message}"):
            jax.block_until_ready(_call_handler(*arguments))
