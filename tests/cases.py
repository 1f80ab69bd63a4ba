"""The convolutions that tests and benchmarks run: hand-picked ones, and a sampler for random ones.

Lengths straddle every tile edge of the kernels (one less, equal, one more), because that is where kernels go wrong.
"""

import dataclasses
import itertools
import math
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy "bfloat16")
import numpy as np

from jax_dwsconv._geometry import Padding, Size, Window

LAYOUTS = ("NHWC", "NCHW")
FILTER_LAYOUTS = ("HWO", "OHW")
OPERATORS = ("forward", "grad_input", "grad_filter")

# The lane counts and column tiles of the kernels, their neighbours, and a few primes.
EDGES = (1, 2, 3, 4, 5, 7, 8, 9, 11, 15, 16, 17, 31, 32, 33, 37, 63, 64, 65)

# (input, filter, output) of the forward convolution.
DTYPES_WITH_KERNEL = tuple(
    (narrow, kernel, output)
    for narrow in ("float32", "bfloat16", "float16")
    for kernel in dict.fromkeys((narrow, "float32"))
    for output in dict.fromkeys((narrow, "float32"))
)
# These are converted to float32 on the way in and out.
DTYPES_BY_CONVERSION = (
    ("float32", "bfloat16", "float32"),
    ("float32", "float32", "bfloat16"),
    ("float32", "bfloat16", "bfloat16"),
    ("bfloat16", "float16", "float32"),
    ("float16", "bfloat16", "float16"),
    ("bfloat16", "bfloat16", "float16"),
)
# These need jax_enable_x64.
DTYPES_WIDE = (
    ("float64", "float64", "float64"),
    ("float64", "float32", "float64"),
    ("float32", "float64", "float64"),
    ("float64", "float64", "float32"),
    ("bfloat16", "float64", "float64"),
)

_MOST_PRODUCTS = 2_000_000  # of a sampled case, so that a float64 NumPy reference takes milliseconds


@dataclasses.dataclass(frozen=True)
class Case:
    """A depthwise convolution. `dtypes` are those of (input, filter, output); 1d has a height of 1."""

    batch: int = 2
    size: Size = (7, 9)
    channels: int = 5
    multiplier: int = 1
    kernel_size: Size = (3, 3)
    strides: Size = (1, 1)
    padding: Padding = ((1, 1), (1, 1))
    dilation: Size = (1, 1)
    layout: str = "NHWC"
    filter_layout: str = "HWO"
    groups: int = 1
    dtypes: tuple[str, str, str] = ("float32",) * 3

    def __str__(self) -> str:
        """A test id: what differs from the default."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return "-".join(f"{f.name}={_flat(getattr(self, f.name))}" for f in changed) or "default"

    @property
    def out_channels(self) -> int:
        return self.channels * self.multiplier

    @property
    def output_size(self) -> Size:
        axes = zip(self.size, self.padding, self.kernel_size, self.dilation, self.strides, strict=True)
        return tuple(max(0, (n + sum(pad) - d * (k - 1) - 1) // s + 1) for n, pad, k, d, s in axes)

    @property
    def window(self) -> Window:
        return Window(self.strides, self.padding, self.dilation, self.layout, self.filter_layout)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the input, the filter and the output."""
        n, (h, w), (oh, ow), (kh, kw), o = self.batch, self.size, self.output_size, self.kernel_size, self.out_channels
        last, taps_first = self.layout == "NHWC", self.filter_layout == "HWO"
        return {
            "input": (n, h, w, self.channels) if last else (n, self.channels, h, w),
            "filter": (self.groups, kh, kw, o) if taps_first else (self.groups, o, kh, kw),
            "output": (n, oh, ow, o) if last else (n, o, oh, ow),
        }

    def operands(self, operator: str, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Normally distributed operands, the first with mean `offset`. The same case always gives the same ones."""
        rng = np.random.default_rng(zlib.crc32(f"{self} {operator}".encode()))
        shapes, dtypes = self.shapes(), dict(zip(("input", "filter", "output"), self.dtypes, strict=True))
        first, second = ROLES[operator][:2]
        a, b = (rng.standard_normal(shapes[role]) for role in (first, second))
        return (a + offset).astype(dtypes[first]), b.astype(dtypes[second])

    def parameters(self, operator: str) -> dict[str, Any]:
        """The keyword arguments of the operator in `jax_dwsconv.primitives`."""
        of_operator = {
            "forward": {},
            "grad_input": {"input_size": self.size, "multiplier": self.multiplier},
            "grad_filter": {"kernel_size": self.kernel_size, "groups": self.groups},
        }[operator]
        out_dtype = self.dtypes[("input", "filter", "output").index(ROLES[operator][2])]
        return {"window": self.window, "out_dtype": np.dtype(out_dtype), **of_operator}

    def reduction_length(self, operator: str) -> int:
        """How many products an element of the result is a sum of, at most."""
        return {
            "forward": math.prod(self.kernel_size),
            "grad_input": math.prod(self.kernel_size) * self.multiplier,
            "grad_filter": self.batch // self.groups * math.prod(self.output_size),
        }[operator]


# What the first operand, the second operand and the result of an operator are in the forward convolution.
ROLES = {
    "forward": ("input", "filter", "output"),
    "grad_input": ("output", "filter", "input"),
    "grad_filter": ("input", "output", "filter"),
}


def _flat(value) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ("," if any(isinstance(v, tuple) for v in value) else "x").join(map(_flat, value))


def with_layouts(cases: Sequence[Case]) -> Iterator[Case]:
    """Every case in the two usual pairs of layouts, and every third in the two others."""
    for i, case in enumerate(cases):
        for layout, filter_layout in itertools.product(LAYOUTS, FILTER_LAYOUTS):
            is_usual = (layout == "NHWC") == (filter_layout == "HWO")
            if is_usual or i % 3 == 0:
                yield dataclasses.replace(case, layout=layout, filter_layout=filter_layout)


def grid() -> list[Case]:
    """The hand-picked cases, in float32."""
    none = ((0, 0), (0, 0))
    lengths = [
        *(Case(channels=n, size=(3, 5), strides=(1, 1 + n % 2)) for n in EDGES),
        *(Case(channels=2, size=(3, n), strides=(1, 1 + n % 2)) for n in EDGES),
        *(Case(channels=2, size=(n, 3)) for n in EDGES[:11]),
        Case(channels=4099, size=(2, 3), batch=1),
    ]
    kernels = [
        Case(size=(12, 21), kernel_size=k, padding=((k[0] // 2,) * 2, (k[1] // 2,) * 2), channels=c)
        for k, c in (
            ((1, 1), 17),
            ((2, 2), 16),
            ((5, 5), 8),
            ((7, 7), 9),
            ((3, 1), 16),
            ((1, 3), 16),
            ((4, 6), 3),
            ((2, 7), 33),
        )
    ]
    large_kernels = [
        Case(size=(20, 33), kernel_size=(31, 31), padding=((15, 15), (15, 15)), channels=3, batch=1),
        Case(size=(1, 64), kernel_size=(1, 31), padding=((0, 0), (30, 0)), channels=9),
        Case(size=(40, 9), kernel_size=(13, 9), padding=((6, 6), (4, 4)), channels=16, batch=1),
    ]
    strides = [
        Case(size=(15, 17), strides=(2, 2), channels=16),
        Case(size=(16, 18), strides=(2, 2), channels=7, padding=((0, 1), (0, 1))),
        Case(size=(13, 29), strides=(3, 2), channels=8, kernel_size=(5, 5), padding=((2, 2), (2, 2))),
        Case(size=(17, 23), strides=(5, 4), channels=3),
        Case(size=(9, 9), strides=(4, 7), kernel_size=(2, 2), padding=none),
        Case(size=(8, 8), strides=(2, 2), kernel_size=(1, 1), padding=none, channels=16),
        Case(size=(5, 6), strides=(64, 100)),
    ]
    dilations = [
        Case(size=(14, 19), dilation=(2, 2), padding=((2, 2), (2, 2)), channels=16),
        Case(size=(21, 33), dilation=(4, 3), padding=((4, 4), (3, 3)), channels=4),
        Case(size=(19, 20), dilation=(2, 3), strides=(2, 3), padding=((2, 2), (3, 3)), channels=17),
        Case(size=(19, 20), dilation=(3, 2), strides=(2, 4), kernel_size=(2, 5), padding=((1, 2), (4, 3))),
        Case(size=(16, 16), dilation=(4, 4), strides=(2, 2), padding=((4, 4), (4, 4)), channels=8),
    ]
    paddings = [
        Case(padding=((0, 2), (2, 0)), channels=8),
        Case(padding=((5, 4), (6, 7)), channels=8),
        Case(padding=((-1, -2), (-2, -1)), channels=8),
        Case(padding=((-2, 3), (4, -3)), channels=3, strides=(2, 2)),
        Case(padding=((-1, 0), (0, -1)), dilation=(2, 2), strides=(2, 1), size=(11, 12)),
        Case(padding=((40, 0), (0, 40)), size=(2, 3)),  # some results, whole rows of them, read no input at all
        Case(padding=((-6, 3), (3, 3)), size=(7, 9)),
    ]
    multipliers = [
        Case(multiplier=2, channels=8),
        Case(multiplier=3, channels=5, strides=(2, 2)),
        Case(multiplier=2, channels=17, dilation=(2, 2), padding=((2, 2), (2, 2))),
        Case(multiplier=3, channels=1),
        Case(multiplier=2, channels=16, groups=2, batch=4),
    ]
    groups = [
        Case(groups=3, batch=3),
        Case(groups=3, batch=6, channels=16, strides=(2, 2)),
        Case(groups=2, batch=6, channels=33, size=(5, 8)),
        Case(groups=5, batch=5, multiplier=3, channels=3),
    ]
    empty = [
        Case(batch=0),
        Case(batch=0, groups=3),
        Case(channels=0),
        Case(size=(0, 4)),
        Case(size=(4, 0), padding=none),
        Case(size=(2, 9), padding=none, kernel_size=(3, 3)),
        Case(size=(9, 4), padding=none, dilation=(1, 4)),
        Case(size=(3, 3), padding=((-2, -2), (1, 1))),
        Case(size=(4, 4), padding=((0, 0), (-3, -3)), kernel_size=(1, 1)),
    ]
    small = [
        Case(batch=1, size=(1, 1), channels=1),
        Case(batch=1, size=(1, 1), channels=1, kernel_size=(1, 1), padding=none),
        Case(batch=1, size=(2, 2), kernel_size=(5, 5), padding=((2, 2), (2, 2))),
        Case(batch=1, size=(1, 1), kernel_size=(9, 9), padding=((4, 4), (4, 4)), channels=64),
        Case(batch=7, size=(1, 13), kernel_size=(1, 4), padding=((0, 0), (3, 0)), channels=10),  # 1d, causal
        Case(
            batch=3,
            size=(1, 24),
            kernel_size=(1, 3),
            padding=((0, 0), (0, 0)),
            strides=(1, 2),
            channels=16,
            multiplier=2,
        ),
        Case(batch=11, size=(7, 7), channels=24),
    ]
    rest = (kernels, large_kernels, strides, dilations, paddings, multipliers, groups, empty, small)
    return list(dict.fromkeys(with_layouts([*lengths, *itertools.chain(*rest)])))


def of_dtypes(*triples: Sequence[tuple[str, str, str]]) -> list[Case]:
    """A few geometries, with vector bodies and tails, for every triple of dtypes."""
    geometries = (
        Case(channels=37, size=(6, 11)),
        Case(channels=9, size=(5, 35), layout="NCHW", filter_layout="OHW"),
        Case(channels=6, size=(9, 14), strides=(2, 2), kernel_size=(5, 3), multiplier=2, groups=2),
        Case(channels=3, size=(9, 40), dilation=(2, 2), layout="NCHW", groups=2, multiplier=3),
    )
    return [dataclasses.replace(case, dtypes=d) for d in itertools.chain(*triples) for case in geometries]


def sample(choose: Callable[[Sequence[Any]], Any]) -> Case:
    """A case made of whatever `choose` picks from each of the sequences that it is given."""
    groups = choose((1, 1, 1, 3))
    kernel_size = choose(((3, 3), (5, 5), (1, 1), (7, 7), (2, 2), (3, 1), (1, 5), (4, 3), (6, 2), (9, 9), (1, 31)))
    multiplier = choose((1, 1, 2, 3))
    batch = groups * choose((1, 1, 2, 3, 5, 0))
    size = choose((*EDGES[:12], 1)), choose(EDGES)
    budget = _MOST_PRODUCTS // (math.prod(kernel_size) * math.prod(size) * max(1, batch) * multiplier)
    return Case(
        batch=batch,
        size=size,
        channels=choose([c for c in EDGES if c <= max(1, budget)]),
        multiplier=multiplier,
        kernel_size=kernel_size,
        strides=(choose((1, 2, 3, 5)), choose((1, 1, 2, 3, 4))),
        padding=tuple((choose((0, 1, k // 2, k, -1)), choose((0, 1, k // 2, k, -2))) for k in kernel_size),
        dilation=(choose((1, 1, 2, 4)), choose((1, 1, 2, 3))),
        layout=choose(LAYOUTS),
        filter_layout=choose(FILTER_LAYOUTS),
        groups=groups,
        dtypes=choose((*DTYPES_WITH_KERNEL[:1] * 4, *DTYPES_WITH_KERNEL, *DTYPES_BY_CONVERSION)),
    )


def usual(count: int = 96, seed: int = 3) -> list[Case]:
    """What networks are made of, in every dtype: random cases that the specialised kernels take."""
    choose = random.Random(seed).choice
    found: dict[Case, None] = {}
    while len(found) < count:
        k = choose((3, 3, 5, 5, 7, 7, 2, 4, 6))
        kernel_size = choose(((k, k), (k, k), (k, k), (k, choose((1, 2, 3, 5, 7))), (choose((1, 2, 3, 5)), k)))
        stride = choose((1, 1, 2))
        size = choose((1, 5, 7, 8, 14, 19)), choose((3, 7, 8, 9, 14, 17, 28, 33, 57))
        if choose((0, 0, 0, 0, 1)):  # one spatial dimension
            kernel_size, size, stride = (1, choose((3, 4, 5))), (1, choose((5, 31, 70, 131))), choose((1, 1, 1, 2))
        case = Case(
            batch=choose((1, 2, 3, 9)),
            size=size,
            channels=choose((2, 3, 4, 8, 16, 24, 32, 40, 48)),
            kernel_size=kernel_size,
            strides=(stride if size[0] > 1 else 1, stride),
            padding=tuple((choose((0, n // 2, n // 2, n - 1)), choose((0, n // 2, n // 2))) for n in kernel_size),
            dilation=(1, choose((1, 1, 1, 2))),
            layout=choose(LAYOUTS),
            filter_layout=choose(("HWO", "HWO", "OHW")),
            dtypes=(choose(("float32", "bfloat16", "bfloat16", "float16")),) * 3,
        )
        if min(case.output_size) > 0:
            found[case] = None
    return list(found)


def random_cases(count: int, seed: int = 0) -> list[Case]:
    """Different random cases, always the same ones for a seed."""
    choose = random.Random(seed).choice
    found: dict[Case, None] = {}
    while len(found) < count:
        found[sample(choose)] = None
    return list(found)
