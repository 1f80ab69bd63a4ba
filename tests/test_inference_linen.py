import functools

import jax
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import linen as nn
from folding import assert_equal, image, randomize
from jax import numpy as jnp

import jax_dwsconv.linen
from jax_dwsconv.inference import fold_linen


class LinenModel(nn.Module):
    layer: type
    options: dict
    norm: dict

    @nn.compact
    def __call__(self, x, train):
        y = self.layer(**self.options, name="conv")(x)
        y = nn.BatchNorm(epsilon=0.1, use_running_average=not train, **self.norm, name="norm")(y)
        return nn.relu(nn.Conv(3, (1, 1), name="last")(y))


LINEN_LAYERS = {
    "conv": (nn.Conv, {"features": 4, "kernel_size": (3, 3), "use_bias": False}),
    "conv_bias": (nn.Conv, {"features": 4, "kernel_size": (3, 3)}),
    "dense": (nn.Dense, {"features": 4, "use_bias": False}),
    "depthwise": (jax_dwsconv.linen.DepthwiseConv, {"kernel_size": (3, 3), "use_bias": False}),
    "multiplier": (jax_dwsconv.linen.DepthwiseConv, {"features": 8, "kernel_size": (3, 3), "strides": 2}),
    "separable": (jax_dwsconv.linen.SeparableConv, {"features": 4, "kernel_size": (3, 3)}),
    "separable_no_bias": (
        jax_dwsconv.linen.SeparableConv,
        {"features": 4, "kernel_size": (3, 3), "use_bias": False, "depthwise_activation": "silu"},
    ),
}


def initialized(module, *args, **kwargs):
    return randomize(jax.eval_shape(functools.partial(module.init, **kwargs), jax.random.key(0), *args))


@pytest.mark.parametrize("layer", LINEN_LAYERS)
@pytest.mark.parametrize("affine", [{}, {"use_scale": False}, {"use_bias": False}], ids=["affine", "bias", "scale"])
def test_linen_layers(layer, affine):
    module = LinenModel(*LINEN_LAYERS[layer], affine)
    variables = initialized(module, image(), train=False)
    before = jax.tree.map(np.asarray, variables)
    folded, folded_variables, report = fold_linen(module, variables, image(), train=False)
    assert (report.folded, report.left) == ((("conv", "norm"),), ())
    assert "norm" not in folded_variables["params"] and "batch_stats" not in folded_variables
    result = jax.jit(functools.partial(folded.apply, train=False))(folded_variables, image(seed=1))
    assert_equal(result, module.apply(variables, image(seed=1), train=False))
    jax.tree.map(np.testing.assert_array_equal, variables, before)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["none", "bfloat16"])
@pytest.mark.parametrize("norm_dtype", [None, jnp.bfloat16], ids=["none", "bfloat16"])
def test_linen_bfloat16(dtype, norm_dtype):
    options = {"kernel_size": (3, 3), "use_bias": False, "dtype": dtype}
    module = nn.Sequential(
        [jax_dwsconv.linen.DepthwiseConv(**options), nn.BatchNorm(use_running_average=True, dtype=norm_dtype)]
    )
    variables = initialized(module, image())
    folded, folded_variables, report = fold_linen(module, variables, image())
    assert report.folded == (("layers_0", "layers_1"),)
    assert {leaf.dtype for leaf in jax.tree.leaves(folded_variables)} == {jnp.dtype("float32")}
    for x in (image(), image().astype(jnp.bfloat16)):
        assert_equal(folded.apply(folded_variables, x), module.apply(variables, x), 0.03)


def test_linen_boxes_stay():
    kernel_init = nn.with_partitioning(nn.initializers.ones, (None, None, None, "model"))
    module = nn.Sequential([nn.Conv(4, (3, 3), kernel_init=kernel_init), nn.BatchNorm(use_running_average=True)])
    variables = module.init(jax.random.key(0), image())
    folded, folded_variables, _ = fold_linen(module, variables, image())
    assert folded_variables["params"]["layers_0"]["kernel"].names == (None, None, None, "model")
    assert_equal(folded.apply(folded_variables, image()), module.apply(variables, image()))


class LinenFunction(nn.Module):
    run: object
    running: bool = True

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=self.running, name="norm")
        return self.run(self, nn.Conv(4, (3, 3), name="conv"), norm, x)


def linen_stored(self, conv, norm, x):
    y = conv(x)
    self.sow("intermediates", "y", y)
    return norm(y)


def linen_twice(self, conv, norm, x):
    y = conv(x)
    return norm(y) + y


def linen_reads_kernel(self, conv, norm, x):
    return norm(conv(x)) + conv.variables["params"]["kernel"].sum()


def linen_weight_norm(self, conv, norm, x):
    return norm(nn.WeightNorm(conv)(x))


@pytest.mark.parametrize(
    "run, reason",
    [
        (linen_twice, "the result of conv is used elsewhere too"),
        (linen_stored, "the result of conv is used elsewhere too"),
        (linen_reads_kernel, "variables of conv are used elsewhere too"),
        (linen_weight_norm, "conv"),
        (lambda self, conv, norm, x: norm(nn.relu(conv(x))), "does not directly follow"),
    ],
    ids=["twice", "stored", "reads_kernel", "weight_norm", "activation"],
)
def test_linen_left_alone(run, reason):
    module = LinenFunction(run)
    variables = module.init(jax.random.key(0), image())
    folded, folded_variables, report = fold_linen(module, variables, image())
    assert report.folded == ()
    assert len(report.left) == 1 and reason in report.left[0][1]
    mutable = ["batch_stats", "intermediates"]
    expected = module.apply(variables, image(), mutable=mutable)
    jax.tree.map(np.testing.assert_array_equal, folded.apply(folded_variables, image(), mutable=mutable), expected)


def test_linen_statistics_of_the_batch_are_left():
    module = LinenFunction(lambda self, conv, norm, x: norm(conv(x)), running=False)
    variables = module.init(jax.random.key(0), image())
    assert fold_linen(module, variables, image())[2].left == (("norm", "normalises by the statistics of the batch"),)
