import collections
import functools
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import jax
import jax.numpy as jnp
import models
from flax import nnx
from models import blocks, convnext, mobilenet

from jax_dwsconv import _bench

# Published, trainable and with the running statistics. (Keras' 5,330,571 of EfficientNet-B0 has 7 more, which normalise
# the input.)
PARAMETERS = {
    "mobilenet_v1": (4_231_976, 4_253_864),
    "mobilenet_v2": (3_504_872, 3_538_984),
    "efficientnet_b0": (5_288_548, 5_330_564),
    "efficientnet_lite0": (4_652_008, 4_694_024),
    "convnext_t": (28_589_128, 28_589_128),
}

TINY_STAGES = (
    blocks.Stage(expansion=1, channels=8, repeats=1, stride=1, kernel_size=3),
    blocks.Stage(expansion=4, channels=8, repeats=2, stride=2, kernel_size=5),
)


def build(kind, **options):
    if kind == "separable":
        return mobilenet.MobileNetV1(**options, blocks=((8, 1), (16, 2)))
    if kind == "convnext":
        return convnext.ConvNeXtT(**options, stages=((8, 1), (16, 1)))
    return blocks.InvertedResidualNet(
        TINY_STAGES, head_channels=32, activation=nnx.silu, squeeze_excite=True, **options
    )


def tiny(kind, conv, dtype=None, training=False):
    """A small model with the blocks of the large ones."""
    model = nnx.eval_shape(lambda: build(kind, conv=conv, num_classes=5, dtype=dtype, rngs=nnx.Rngs(0)))
    models.fill(model)
    (model.train if training else model.eval)()
    return model


KINDS = ("separable", "inverted_residual", "convnext")


@functools.cache
def abstract(name, conv):
    return nnx.eval_shape(lambda: models.create(name, conv=conv, dtype=jnp.bfloat16))


def paths(model):
    return {path: (leaf.shape, leaf.dtype) for path, leaf in nnx.to_flat_state(nnx.state(model))}


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("conv", ["ours", "flax"])
def test_parameters_are_the_published_number(name, conv):
    model = abstract(name, conv)
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert (models.count_parameters(model), total) == PARAMETERS[name]
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", models.MODELS)
def test_only_the_layer_differs(name):
    assert paths(abstract(name, "ours")) == paths(abstract(name, "flax"))


def depthwise_layers(name):
    """(H = W, C, k, stride) of the depthwise convolutions of the model at 224 x 224, with their number."""
    graphdef, state = nnx.split(abstract(name, "flax"))
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x, rngs=nnx.Rngs(dropout=0)))(state, x)
    layers = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.params.get("feature_group_count", 1) > 1:
            image, kernel = (operand.aval.shape for operand in equation.invars)
            assert kernel[2:] == (1, image[3]) and image[1] == image[2]
            layers[_bench.Layer(image[1], image[3], kernel[0], equation.params["window_strides"][0])] += 1
    return layers


@pytest.mark.parametrize(
    "name, count", [("mobilenet_v1", 13), ("mobilenet_v2", 17), ("efficientnet_b0", 16), ("convnext_t", 18)]
)
def test_depthwise_layers_are_those_of_the_operator_benchmark(name, count):
    layers = depthwise_layers(name)
    assert set(layers) == set(_bench.MODELS[name])
    assert layers.total() == count


@pytest.mark.parametrize("kind", KINDS)
def test_ours_equals_flax(kind):
    x = jax.random.normal(jax.random.key(0), (4, 20, 20, 3))

    @nnx.jit
    @nnx.value_and_grad
    def loss_and_gradients(model):
        return (model(x, rngs=nnx.Rngs(dropout=2)) ** 2).mean()

    ours, flax = (tiny(kind, conv, training=True) for conv in ("ours", "flax"))
    (our_loss, our_gradients), (loss, gradients) = map(loss_and_gradients, (ours, flax))
    np.testing.assert_allclose(our_loss, loss, rtol=1e-5)
    # The state too: training has moved the running statistics.
    got, want = (jax.tree.leaves_with_path(tree) for tree in ((our_gradients, ours), (gradients, flax)))
    for (path, array), (_, expected) in zip(got, want, strict=True):
        tolerance = 1e-4 * np.abs(expected).max() + 1e-6
        np.testing.assert_allclose(array, expected, atol=tolerance, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_one_loads_in_the_other(kind):
    x = jax.random.normal(jax.random.key(0), (2, 20, 20, 3))
    source, target = (tiny(kind, conv) for conv in ("flax", "ours"))
    nnx.update(source, jax.tree.map(lambda leaf: 1.5 * leaf, nnx.state(source)))
    expected = models.compiled(source)(x)
    nnx.update(target, nnx.state(source))
    np.testing.assert_allclose(models.compiled(target)(x), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conv", ["ours", "flax"])
def test_bfloat16_computes_in_bfloat16(kind, conv):
    graphdef, state = nnx.split(tiny(kind, conv, jnp.bfloat16))
    jaxpr = jax.make_jaxpr(nnx.merge(graphdef, state))(jnp.zeros((2, 20, 20, 3)))
    assert jaxpr.out_avals[0].dtype == jnp.bfloat16
    heavy = [e for e in jaxpr.eqns if e.primitive.name in ("conv_general_dilated", "dot_general", "dwsconv_forward")]
    assert len(heavy) > 4
    assert {e.invars[0].aval.dtype for e in heavy} == {jnp.dtype("bfloat16")}


def test_only_training_drops():
    x = jax.random.normal(jax.random.key(0), (2, 20, 20, 3))
    for training in (True, False):
        model = tiny("separable", "ours", training=training)
        model.dropout.rate = 0.5
        call = nnx.jit(lambda model, key: model(x, rngs=nnx.Rngs(dropout=key)))
        first, second = (call(model, jax.random.key(seed)) for seed in (1, 2))
        assert (first != second).any() == training


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no model 'resnet', choose from mobilenet_v1"):
        models.create("resnet")
    with pytest.raises(ValueError, match="conv must be 'ours' or 'flax', got 'lax'"):
        models.create("mobilenet_v1", conv="lax")


@pytest.mark.slow
@pytest.mark.parametrize("name", models.MODELS)
def test_whole_models_agree(name):
    x = jax.random.normal(jax.random.key(0), (2, 64, 64, 3))
    logits = []
    for conv in ("ours", "flax"):
        model = models.create(name, conv=conv)
        model.eval()
        logits.append(models.compiled(model)(x))
    np.testing.assert_allclose(*logits, atol=1e-4 * np.abs(logits[1]).max())
