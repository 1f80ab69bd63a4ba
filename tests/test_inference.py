import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import jax
import models
from flax import nnx
from folding import assert_equal, image, randomize
from jax import export, lax, numpy as jnp

import jax_dwsconv
import jax_dwsconv.nnx
from jax_dwsconv.inference import Identity, fold

pytestmark = pytest.mark.filterwarnings("ignore:Variable hooks are deprecated")

BATCH_NORMS = {"mobilenet_v1": 27, "mobilenet_v2": 52, "efficientnet_b0": 49, "efficientnet_lite0": 49, "convnext_t": 0}


class Model(nnx.Module):
    """Named layers, and a function of them and the input."""

    def __init__(self, run, **layers):
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)
        nnx.update(self, randomize(nnx.state(self)))

    def __call__(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def conv(features=4, inputs=4, **options):
    return nnx.Conv(inputs, features, (3, 3), **options, rngs=nnx.Rngs(0))


def depthwise(features=4, inputs=4, **options):
    return jax_dwsconv.nnx.DepthwiseConv(inputs, features, (3, 3), **options, rngs=nnx.Rngs(0))


def norm(features=4, **options):
    return nnx.BatchNorm(features, **options, epsilon=0.1, rngs=nnx.Rngs(0))


def in_order(model, x):
    return model.norm(model.conv(x))


def evaluated(model, *args, **kwargs):
    model = nnx.clone(model)
    model.eval()
    return model(*args, **kwargs)


# Whole models ---------------------------------------------------------------------------------------------------------


def whole(name, conv):
    model = nnx.eval_shape(lambda: models.create(name, conv=conv, num_classes=10))
    nnx.update(model, randomize(nnx.state(model)))
    model.eval()
    return model


@pytest.mark.parametrize("name", models.MODELS)
def test_models(name):
    x = image(2, 32, 32, 3)
    plain, ours = whole(name, "flax"), whole(name, "ours")
    folded, report = fold(ours, x)
    assert len(report.folded) == BATCH_NORMS[name] and report.left == ()
    assert not any(isinstance(node, nnx.BatchNorm) for _, node in nnx.iter_graph(folded))
    assert_equal(models.compiled(folded)(x), models.compiled(plain)(x), 1e-4)
    folded_plain, report_of_plain = fold(plain, x)
    assert report_of_plain == report
    jax.tree.map(np.testing.assert_array_equal, nnx.state(folded_plain), nnx.state(folded))


@pytest.mark.slow
@pytest.mark.parametrize("name", models.MODELS)
def test_plain_models(name):
    model, x = whole(name, "flax"), image(2, 64, 64, 3)
    assert_equal(models.compiled(fold(model, x)[0])(x), models.compiled(model)(x), 1e-4)


def tiny(conv):
    model = models.mobilenet.MobileNetV1(conv=conv, num_classes=10, blocks=((8, 1), (16, 2)), rngs=nnx.Rngs(0))
    nnx.update(model, randomize(nnx.state(model)))
    model.eval()
    return model


@pytest.mark.parametrize("conv", ["ours", "flax"])
def test_activations_move_into_our_layers(conv):
    x, model = image(2, 32, 32, 3), tiny(conv)
    folded = models.folded(model)
    depthwise, pointwise = folded.blocks[0].depthwise, folded.blocks[0].pointwise
    if conv == "ours":
        assert depthwise.activation is None and depthwise.conv.activation is nnx.relu6
    else:
        assert depthwise.activation is nnx.relu6
    assert pointwise.activation is nnx.relu6
    assert_equal(models.compiled(folded)(x), models.compiled(model)(x))


def test_a_block_that_was_not_folded_keeps_its_activation():
    block = models.blocks.ConvNorm(depthwise(activation="relu"), norm(), nnx.relu6)
    block.fuse()
    assert block.activation is nnx.relu6


def test_export_with_symbolic_batch():
    model = tiny("ours")
    folded = models.folded(model)
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, 32, 32, 3"), jnp.float32)
    checks = jax_dwsconv.disabled_export_checks()
    written = export.export(jax.jit(folded.__call__), disabled_checks=checks)(shape).serialize()
    restored = export.deserialize(written)
    for batch in (1, 3):
        x = image(batch, 32, 32, 3)
        assert_equal(restored.call(x), model(x))


# nnx: what is folded --------------------------------------------------------------------------------------------------

LAYERS = {
    "conv": conv,
    "conv_bias": lambda **o: conv(use_bias=True, **o),
    "conv_no_bias": lambda **o: conv(use_bias=False, **o),
    "conv_masked": lambda **o: conv(mask=jnp.asarray(image(3, 3, 4, 4) > 0, jnp.float32), **o),
    "grouped": lambda **o: conv(8, feature_group_count=4, **o),
    "drop_in": lambda **o: conv(
        feature_group_count=4, conv_general_dilated=jax_dwsconv.conv_general_dilated, strides=2, **o
    ),
    "depthwise": lambda **o: depthwise(use_bias=False, **o),
    "depthwise_bias": depthwise,
    "depthwise_multiplier": lambda **o: depthwise(8, **o),
    "depthwise_1d": lambda **o: jax_dwsconv.nnx.DepthwiseConv(4, 4, 3, rngs=nnx.Rngs(0), **o),
    "separable": lambda **o: jax_dwsconv.nnx.SeparableConv(4, 6, (3, 3), rngs=nnx.Rngs(0), **o),
    "separable_no_bias": lambda **o: jax_dwsconv.nnx.SeparableConv(
        4, 6, (3, 3), use_bias=False, depthwise_activation="relu", rngs=nnx.Rngs(0), **o
    ),
    "linear": lambda **o: nnx.Linear(4, 5, use_bias=False, rngs=nnx.Rngs(0), **o),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("affine", [{}, {"use_scale": False}, {"use_bias": False}], ids=["affine", "bias", "scale"])
def test_layers(layer, affine):
    layer = LAYERS[layer]()
    features = layer(image()).shape[-1]
    model = Model(in_order, conv=layer, norm=norm(features, **affine))
    before = jax.tree.map(np.asarray, nnx.state(model))
    folded, report = fold(model, image())
    assert (report.folded, report.left) == ((("conv", "norm"),), ())
    assert isinstance(folded.norm, Identity)
    assert_equal(folded(image(seed=1)), evaluated(model, image(seed=1)))
    # The given model is as it was.
    assert isinstance(model.norm, nnx.BatchNorm) and not model.norm.use_running_average
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)


@pytest.mark.parametrize("layer", ["conv", "depthwise", "separable", "linear"])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["none", "bfloat16"])
@pytest.mark.parametrize("norm_dtype", [None, jnp.bfloat16, jnp.float32], ids=["none", "bfloat16", "float32"])
def test_bfloat16(layer, dtype, norm_dtype):
    layer = LAYERS[layer](dtype=dtype)
    model = Model(in_order, conv=layer, norm=norm(layer(image()).shape[-1], dtype=norm_dtype))
    folded, report = fold(model, image())
    assert len(report.folded) == 1
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(folded))} == {jnp.dtype("float32")}
    for x in (image(), image().astype(jnp.bfloat16)):
        assert_equal(folded(x), evaluated(model, x), 0.03)


def test_bfloat16_parameters_stay():
    model = Model(in_order, conv=depthwise(param_dtype=jnp.bfloat16), norm=norm())
    folded, _ = fold(model, image())
    assert folded.conv.kernel.dtype == folded.conv.bias.dtype == jnp.bfloat16
    x = image().astype(jnp.bfloat16)
    assert_equal(folded(x), evaluated(model, x), 0.03)


def test_shared_pair_is_folded_once():
    def run(model, x):
        return in_order(model, in_order(model, x))

    model = Model(run, conv=conv(), norm=norm())
    model.again = nnx.List([model.norm])
    folded, report = fold(model, image())
    assert len(report.folded) == 1
    assert folded.again[0] is folded.norm and isinstance(folded.norm, Identity)
    assert_equal(folded(image()), evaluated(model, image()))


def test_metadata_stays():
    kernel_init = nnx.with_metadata(nnx.initializers.ones, note="kept")
    folded, _ = fold(Model(in_order, conv=conv(kernel_init=kernel_init), norm=norm()), image())
    assert folded.conv.kernel.note == "kept"


def test_report_reads_well():
    model = Model(lambda m, x: m.stray(in_order(m, x)), conv=conv(), norm=norm(), stray=norm())
    _, report = fold(model, jax.ShapeDtypeStruct((1, 9, 9, 4), jnp.float32))
    assert str(report) == (
        "1 BatchNorm folded, 1 left\n"
        "  folded norm into conv\n"
        "  left   stray: does not directly follow a convolution or a linear layer"
    )


# nnx: what is not -----------------------------------------------------------------------------------------------------


class MyNorm(nnx.BatchNorm):
    pass


class MyConv(nnx.Conv):
    def __call__(self, x):
        return super().__call__(x) ** 2


def twice(model, x):
    y = model.conv(x)
    return model.norm(y) + y


def stored(model, x):
    y = model.conv(x)
    model.seen = nnx.Intermediate(y)
    return model.norm(y)


def reads_kernel(model, x):
    return in_order(model, x) + model.conv.kernel[...].sum()


def writes_kernel(model, x):
    model.conv.kernel[...] = jnp.tanh(model.conv.kernel[...])
    return in_order(model, x)


def reads_mean(model, x):
    return in_order(model, x) + model.norm.mean[...]


def also_alone(model, x):
    return in_order(model, model.conv(x))


def norm_shared(model, x):
    return model.norm(model.other(in_order(model, x)))


def norm_elsewhere(model, x):
    return model.norm(nnx.relu(in_order(model, x)))


def convolve_quantised(x, kernel, *args, **options):
    options.pop("out_sharding")
    return lax.conv_general_dilated(x, jnp.round(kernel * 8) / 8, *args, **options)


class MyParam(nnx.Param):
    pass


own_variable = conv()
own_variable.bias = MyParam(own_variable.bias[...])
own_hook = conv()
own_hook.kernel.set_metadata(on_get_value=lambda variable, value: jnp.tanh(value))

LEFT = {
    "used_twice": (twice, {}, "the result of conv is used elsewhere too"),
    "stored": (stored, {}, "the result of conv is used elsewhere too"),
    "returned": (lambda m, x: (y := m.conv(x), m.norm(y)), {}, "the result of conv is used elsewhere too"),
    "activation": (lambda m, x: m.norm(nnx.relu(m.conv(x))), {}, "does not directly follow"),
    "fused_activation": (in_order, {"conv": depthwise(activation="relu")}, "conv applies an activation"),
    "reads_kernel": (reads_kernel, {}, "variables of conv are used elsewhere too"),
    "writes_kernel": (writes_kernel, {}, "variables of conv are used elsewhere too"),
    "reads_mean": (reads_mean, {}, "variables of norm are used elsewhere too"),
    "also_alone": (also_alone, {}, "conv is also called without it"),
    "shared": (norm_shared, {"other": conv()}, "follows several layers"),
    "norm_elsewhere": (norm_elsewhere, {}, "does not directly follow"),
    "not_called": (lambda m, x: m.conv(x), {}, "is not called with the example inputs"),
    "in_jit": (nnx.jit(in_order), {}, "is called inside of jit"),
    "in_remat": (nnx.remat(in_order), {}, "is called inside of jit"),
    "conv_in_jit": (lambda m, x: m.norm(nnx.jit(lambda c, x: c(x))(m.conv, x)), {}, "does not directly follow"),
    "statistics_of_the_batch": (
        lambda m, x: m.norm(m.conv(x), use_running_average=False),
        {},
        "normalises by the statistics of the batch",
    ),
    "axis": (in_order, {"norm": norm(9, axis=1)}, "does not normalise the last axis"),
    "subclass": (in_order, {"norm": MyNorm(4, rngs=nnx.Rngs(0))}, "is of a subclass of BatchNorm"),
    "conv_subclass": (in_order, {"conv": MyConv(4, 4, (3, 3), rngs=nnx.Rngs(0))}, "does not directly follow"),
    "quantised": (
        in_order,
        {"conv": conv(conv_general_dilated=convolve_quantised)},
        "a conv_general_dilated of its own",
    ),
    "vmapped_norm": (
        lambda m, x: jax.vmap(m.norm, in_axes=-1, out_axes=-1)(m.conv(x)),
        {"norm": norm(9)},
        "is called inside of vmap",
    ),
    "vmapped_conv": (lambda m, x: m.norm(jax.vmap(m.conv)(x)), {}, "is called inside of vmap"),
    "hook": (in_order, {"conv": own_hook}, "the parameters of conv have hooks"),
    "own_variable": (in_order, {"conv": own_variable}, "are no plain nnx.Param"),
    "promote": (
        in_order,
        {"conv": conv(promote_dtype=lambda operands, dtype: operands)},
        "a promote_dtype of its own",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_alone(case):
    run, layers, reason = LEFT[case]
    model = Model(run, **{"conv": conv(), "norm": norm()} | layers)
    folded, report = fold(model, image())
    assert report.folded == ()
    assert [path for path, _ in report.left] == ["norm"]
    assert reason in report.left[0][1]
    for result, expected in zip(*map(jax.tree.leaves, (folded(image()), evaluated(model, image()))), strict=True):
        np.testing.assert_array_equal(result, expected)


def test_tied_kernels_are_left():
    model = Model(lambda m, x: m.other(in_order(m, x)), conv=conv(), norm=norm(), other=conv())
    model.other.kernel = model.conv.kernel
    folded, report = fold(model, image())
    assert report.folded == ()
    assert_equal(folded(image()), evaluated(model, image()))


def test_stacked_layers_are_left():
    @nnx.vmap(in_axes=(0, None))
    def run_conv(layer, x):
        return layer(x)

    model = Model(lambda m, x: m.norm(run_conv(m.conv, x)), conv=conv(), norm=norm())
    model.conv.kernel = nnx.Param(jnp.stack([model.conv.kernel[...]] * 3))
    model.conv.bias = nnx.Param(jnp.stack([model.conv.bias[...]] * 3))
    folded, report = fold(model, image())
    assert report.folded == ()
    assert_equal(folded(image()), evaluated(model, image()))


def test_arguments_are_passed_on():
    def run(model, x, y, flag):
        return in_order(model, x) + y if flag else y

    model = Model(run, conv=conv(), norm=norm())
    assert len(fold(model, image(), 1.0, flag=True)[1].folded) == 1
    assert fold(model, image(), y=image(), flag=False)[1].left[0][1] == "is not called with the example inputs"


def test_errors_of_the_model_come_through():
    with pytest.raises(ValueError, match="features"):
        fold(Model(in_order, conv=depthwise(), norm=norm()), image(1, 9, 9, 3))
