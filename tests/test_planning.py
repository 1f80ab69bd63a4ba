"""The planner of the CUDA kernels, which needs no GPU."""

import jax
import pytest
from jax import numpy as jnp

import jax_dwsconv
from jax_dwsconv import __main__ as command_line, _planning, lowering

DEVICES = _planning.DEVICES
PROBLEMS = {
    "small": {"shape": (1, 14, 14, 512), "kernel_size": (3, 3)},
    "large": {"shape": (128, 56, 56, 144), "kernel_size": (3, 3)},
    "wide filter": {"shape": (64, 28, 28, 192), "kernel_size": (7, 7)},
    "stride 2": {"shape": (8, 56, 56, 144), "kernel_size": (5, 5), "strides": (2, 2)},
    "odd": {"shape": (3, 19, 33, 33), "kernel_size": (3, 3)},
    "one dimension": {"shape": (4, 1, 4096, 64), "kernel_size": (1, 4)},
}

TENSOR_CORES = {"forward": "toeplitz", "grad_filter": "tap_products"}


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.partition(":")[2].split("x") if n]


@pytest.mark.parametrize("operator", ["forward", "grad_input", "grad_filter"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_the_choice_is_the_candidate_of_the_least_estimate(problem, dtype, layout, operator):
    for device in DEVICES.values():
        chosen, candidates = _planning.plan(operator, **problem, dtype=dtype, layout=layout, device=device)
        estimated = [candidate for candidate in candidates if candidate.cycles > 0]
        assert chosen in candidates
        assert estimated
        assert chosen.cycles == min(candidate.cycles for candidate in estimated)


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_int8(problem):
    """Words of four channels are marched over; other numbers of channels have the general kernel alone."""
    for device in DEVICES.values():
        chosen, candidates = _planning.plan("quantized_forward", **problem, dtype="int8", device=device)
        marches = [candidate for candidate in candidates if candidate.text.startswith("quantized")]
        assert len(marches) == len(candidates) - 1
        assert bool(marches) == (problem["shape"][3] % 4 == 0)
        assert chosen == min(marches or candidates, key=lambda candidate: candidate.cycles)


@pytest.mark.parametrize(("operator", "dtype"), [("forward", "int8"), ("quantized_forward", "float32")])
def test_int8_has_an_operator_of_its_own(operator, dtype, capsys):
    arguments = f"plan --shape 1,8,8,8 --operator {operator} --dtype {dtype}"
    assert command_line.main(arguments.split()) == 2
    assert "quantized_forward, and nothing else, is for int8" in capsys.readouterr().err


@pytest.mark.parametrize(("operator", "kernel"), TENSOR_CORES.items())
@pytest.mark.parametrize(("device", "dtype"), [("rtx2080ti", "bfloat16"), ("h100", "float32")])
def test_tensor_cores_only_where_they_help(device, dtype, operator, kernel):
    """The instructions are of compute capability 8.0, and of 16-bit types."""
    _, candidates = _planning.plan(operator, **PROBLEMS["wide filter"], dtype=dtype, device=DEVICES[device])
    assert not any(candidate.text.startswith(kernel) for candidate in candidates)


@pytest.mark.parametrize(("operator", "kernel"), TENSOR_CORES.items())
def test_tensor_cores_for_wide_filters(operator, kernel):
    chosen, _ = _planning.plan(operator, **PROBLEMS["wide filter"], dtype="bfloat16")
    assert chosen.text.startswith(kernel)


@pytest.mark.parametrize(("operator", "kernel"), TENSOR_CORES.items())
def test_shared_memory_bounds_the_tiles(operator, kernel):
    device = DEVICES["h100"]
    small = device._replace(most_shared_memory=1024)
    _, candidates = _planning.plan(operator, **PROBLEMS["large"], dtype="bfloat16", device=device)
    assert any(candidate.text.startswith(kernel) for candidate in candidates)
    _, candidates = _planning.plan(operator, **PROBLEMS["large"], dtype="bfloat16", device=small)
    assert not any(candidate.text.startswith(kernel) for candidate in candidates)


@pytest.mark.parametrize(
    ("kernel_size", "strides", "fits"), [(3, 1, True), (7, 1, True), (8, 1, False), (5, 2, True), (7, 2, False)]
)
def test_filters_that_fit_the_shifts_of_a_product(kernel_size, strides, fits):
    _, candidates = _planning.plan("grad_filter", (8, 28, 28, 64), (kernel_size,) * 2, (strides,) * 2, dtype="bfloat16")
    assert any(candidate.text.startswith("tap_products") for candidate in candidates) == fits


def test_planes_of_channels_from_shared_memory():
    """For wide filters in NCHW, in strips of rows where whole planes do not fit; the copies need capability 8.0."""
    for device, dtype in (("h100", "bfloat16"), ("h100", "float32"), ("rtx2080ti", "float32")):
        chosen, _ = _planning.plan(
            "grad_filter", **PROBLEMS["wide filter"], layout="NCHW", dtype=dtype, device=DEVICES[device]
        )
        assert chosen.text.startswith("tap_planes") == (device == "h100")
    _, candidates = _planning.plan("grad_filter", (8, 512, 512, 32), (7, 7), layout="NCHW", dtype="float32")
    tiles = [_numbers(c.text) for c in candidates if c.text.startswith("tap_planes")]
    assert tiles
    assert all(walkers <= rows < 512 and planes * walkers * 7 <= 512 for planes, walkers, rows, _ in tiles)


@pytest.mark.parametrize(("width", "access"), [(28, 4), (14, 2), (7, 1)])
def test_toeplitz_planes_load_as_rows_are_aligned(width, access):
    """On tensor cores in NCHW: a row begins where the row before it ends, at any even address."""
    for device, dtype in (("h100", "bfloat16"), ("h100", "float32"), ("rtx2080ti", "bfloat16")):
        _, candidates = _planning.plan(
            "forward", (64, 28, width, 64), (7, 7), layout="NCHW", dtype=dtype, device=DEVICES[device]
        )
        found = {_numbers(c.text)[0] for c in candidates if c.text.startswith("toeplitz_planes")}
        assert (max(found) == access) if (device, dtype) == ("h100", "bfloat16") else not found


def test_small_planes_are_copied_in_whole_words():
    """Those of some neighbouring channels together, whatever the size of one."""
    for channels, dtype, found in ((960, "float32", True), (960, "bfloat16", True), (959, "bfloat16", False)):
        chosen, candidates = _planning.plan("forward", (64, 7, 7, channels), (5, 5), layout="NCHW", dtype=dtype)
        assert chosen.text.startswith("small_planes") == found
        assert any(candidate.text.startswith("small_planes") for candidate in candidates) == found


def test_vectors_divide_the_channels():
    for operator in ("forward", "grad_input", "grad_filter"):
        _, candidates = _planning.plan(operator, **PROBLEMS["odd"], dtype="float32")
        vectors = {_numbers(c.text)[0] for c in candidates if c.text.partition(":")[0] in ("march", "tap_sums")}
        assert vectors == {1}


@pytest.mark.parametrize("operator", ["forward", "grad_input"])
def test_small_batches_are_cut_until_the_machine_is_full(operator):
    """A 7x7 plane has no strips to spare, but at 28x28 one image must not run in whole columns."""
    rows = {}
    for batch in (1, 128):
        chosen, _ = _planning.plan(operator, (batch, 28, 28, 192), (5, 5), dtype="float32")
        rows[batch] = _numbers(chosen.text)[-1]
    assert rows[1] < rows[128]


def test_splits_fit_the_workspace():
    for channels in (8, 512, 8192):
        most = lowering.workspace_shape((1, 7, 7, channels))[0]
        _, candidates = _planning.plan("grad_filter", (64, 14, 14, channels), (7, 7))
        splits = [_numbers(candidate.text)[-1] for candidate in candidates]
        assert all(1 <= n <= most for n in splits)


@pytest.mark.parametrize(
    "unusual", [{"dilation": (2, 2)}, {"strides": (3, 3)}, {"kernel_size": (9, 9)}, {"strides": (1, 2)}], ids=str
)
@pytest.mark.parametrize("operator", ["forward", "grad_input"])
def test_a_sliding_window_takes_the_rest(operator, unusual):
    problem = {"kernel_size": (3, 3), **unusual}
    chosen, candidates = _planning.plan(operator, (2, 32, 32, 33), **problem)
    assert chosen.text.startswith("slide")
    assert {c.text.split(":")[0] for c in candidates} == {"slide", "gather"}
    assert _planning.plan("grad_filter", (2, 32, 32, 33), **problem)[0].text.startswith("pieces")


@pytest.mark.parametrize("operator", ["forward", "grad_input"])
def test_gather_takes_what_is_strided_and_dilated(operator):
    chosen, candidates = _planning.plan(operator, (2, 32, 32, 33), (3, 3), strides=(2, 2), dilation=(2, 2))
    assert (chosen.text, chosen.cycles) == ("gather", 0)
    assert len(candidates) == 1


@pytest.mark.parametrize("operator", ["forward", "grad_input"])
def test_lines_of_ncw(operator):
    def chosen(width, kernel_width):
        return _planning.plan(operator, (32, 1, width, 512), (1, kernel_width), layout="NCHW")[0].text

    assert chosen(1024, 5) == "lines"
    assert chosen(1024, 15).startswith("slide")
    assert chosen(1022, 5) != "lines"  # a line would not begin at a vector


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_small_problems_load_all_at_once(layout, dtype):
    shape = (1, 14, 14, 672) if layout == "NHWC" else (1, 7, 7, 1152)
    assert _planning.plan("forward", shape, (5, 5), layout=layout, dtype=dtype)[0].text.startswith("burst")


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"dtype": "float64"}, "dtype"),
        ({"layout": "HWNC"}, "layout"),
        ({"padding": "FULL"}, "padding"),
        ({"operator": "backward"}, "operator"),
        ({"padding": "VALID", "kernel_size": (15, 15)}, "empty"),
    ],
)
def test_bad_arguments_are_named(bad, named):
    arguments = {"operator": "forward", "shape": (1, 14, 14, 8), "kernel_size": (3, 3), **bad}
    with pytest.raises(ValueError, match=named):
        _planning.plan(**arguments)


def _lowered_for_cuda() -> str:
    x, kernel = jnp.zeros((1, 8, 8, 16)), jnp.zeros((3, 3, 1, 16))

    def convolve(x, kernel):
        return jax_dwsconv.depthwise_conv2d(x, kernel)

    return jax.jit(convolve).trace(x, kernel).lower(lowering_platforms=("cuda",)).as_text()


def test_a_forced_tile_travels_with_the_program(monkeypatch):
    monkeypatch.delenv("JAX_DWSCONV_TILE", raising=False)
    assert "tile" not in _lowered_for_cuda()
    monkeypatch.setenv("JAX_DWSCONV_TILE", "march:1x4x4x2")
    assert 'tile = "march:1x4x4x2"' in _lowered_for_cuda()


def test_command_line(capsys):
    arguments = "plan --shape 8,28,28,192 --kernel 7 --dtype bfloat16 --device a100 --candidates 3"
    assert command_line.main(arguments.split()) == 0
    printed = capsys.readouterr().out
    assert "a100 (108 multiprocessors)" in printed
    assert printed.count("cycles  ") == 3
    first = next(line for line in printed.splitlines() if "cycles  " in line)
    assert "<- chosen" in first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan", "--shape"),
        ("plan --shape 1,2,3", "4 positive integers"),
        ("plan --shape 1,2,3,0", "4 positive integers"),
        ("plan --shape 1,8,8,8 --device tpu", "invalid choice"),
        ("bench --layers 14,32,3", "4 positive integers"),
        ("bench --layers 14,32,3,1 --models convnext_t", "not allowed with"),
        ("bench --batch 0", "1 positive integer"),
        ("bench --output /no/such/folder/name", "does not exist"),
    ],
)
def test_command_line_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        command_line.main(arguments.split())
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_command_line_refuses_an_empty_result(capsys):
    assert command_line.main(["plan", "--shape", "1,2,2,8", "--kernel", "3", "--padding", "VALID"]) == 2
    assert "empty" in capsys.readouterr().err
