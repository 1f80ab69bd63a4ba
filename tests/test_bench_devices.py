import importlib.util
from pathlib import Path

import jax
import pytest

for package in ("flax", "optax", "orbax.checkpoint"):
    pytest.importorskip(package)
if jax.device_count() < 2:
    pytest.skip("needs several devices", allow_module_level=True)

_spec = importlib.util.spec_from_file_location(
    "bench_devices", Path(__file__).resolve().parent.parent / "benchmarks" / "devices.py"
)
bench_devices = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(bench_devices)

import models  # noqa: E402
import training  # noqa: E402
from models import mobilenet  # noqa: E402

ARGUMENTS = ["--devices=2", "--models=mobilenet_v1", "--batch=4", "--size=32", "--seconds=0.01"]
ARGUMENTS += ["--image", "32", "8", "4"]


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch):
    def tiny(**options):
        return mobilenet.MobileNetV1(**options, blocks=((8, 1),))

    monkeypatch.setitem(models.MODELS, "mobilenet_v1", tiny)


def test_small_run(capsys):
    assert bench_devices.main(ARGUMENTS) == 0
    printed = capsys.readouterr().out
    lines = ["32x8x4, kernel 7, forward", "32x8x4, kernel 7, gradients"]
    lines += [f"mobilenet_v1 training, {kind}" for kind in ("statistics of all", "own statistics")]
    table = printed.partition("|---|")[2].splitlines()[1:]
    assert [line.split(" | ")[0] for line in table] == [f"| {line}" for line in lines]
    assert printed.count("differs by") == 3 and "losses" in printed


@pytest.mark.parametrize(("function", "more"), [("image_pass", ["--models"]), ("training_step", [])])
def test_a_result_that_differs_is_noticed(function, more, monkeypatch):
    right = getattr(bench_devices, function)

    def wrong(name, devices, *more):
        contestant = right(name, devices, *more)
        call = contestant.call

        def twice(*operands):
            return jax.tree.map(lambda x: 2 * x, call(*operands))

        return contestant._replace(call=twice) if devices > 1 else contestant

    monkeypatch.setattr(bench_devices, function, wrong)
    with pytest.raises(SystemExit, match=r"(results|losses) are not the same"):
        bench_devices.main([*ARGUMENTS, *more])


def test_one_device_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench_devices.main(["--devices", "1"])
    assert "must be from 2 to" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_noticed():
    def diverge(state):
        return state, training.Metrics(jax.numpy.inf, 0.0)

    contestant = bench_devices.Contestant("a model", 1, diverge, (jax.numpy.zeros(()),), trains=True)
    with pytest.raises(SystemExit, match="a model: the loss is inf"):
        bench_devices.timed(contestant, calls=2)
