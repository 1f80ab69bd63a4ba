# ruff: noqa: E402  (the examples are no package: their folder goes on the path first)
import contextlib
import csv
import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

for package in ("flax", "matplotlib", "optax", "orbax.checkpoint", "rich", "skimage"):
    pytest.importorskip(package)

import tiny_training  # isort: skip  (puts the examples on the path)

import crops
import jax
import optax
import train
import training
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P
from PIL import Image
from tiny_training import EXAMPLES, arguments

on_a_gpu_open = pytest.mark.xfail(
    jax.default_backend() == "gpu",
    reason="open: the first run of a process differs from later ones by about 1e-5 on a GPU",
    strict=False,
)


@pytest.fixture(autouse=True)
def _tiny_model(monkeypatch):
    tiny_training.patch(monkeypatch.setitem, monkeypatch.setattr)


def table(output):
    with (output / train.TABLE).open() as file:
        return list(csv.DictReader(file))


def losses(output):
    return [float(row["loss"]) for row in table(output)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps with checkpoints after 4 and 8."""
    output = tmp_path_factory.mktemp("train") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_training.patch(patch.setitem, patch.setattr)
        assert train.main(arguments(output, "--steps", 8, "--every", 4)) == 0
    return output


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of the finished run to be damaged or resumed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# --- Crops ---


def test_held_out_pixels_are_not_trained_on():
    for task, names in crops.TASKS.items():
        for size in (crops.SIZES[0], crops.SIZES[-1]):
            classes, seen, held_out = crops.load_parts(task, size)
            assert len(classes) == len(seen) == len(held_out) == len(names)
            for name, left, right in zip(classes, seen, held_out, strict=True):
                assert min(left.shape[:2]) >= size and min(right.shape[:2]) >= size, name
            brick = np.asarray(Image.open(crops.data_folder() / "brick.png").convert("RGB"))
            index = classes.index("brick")
            np.testing.assert_array_equal(np.concatenate([seen[index], held_out[index]], axis=1), brick)


def test_crops_are_of_the_picture_that_the_label_says():
    # Every pixel of part n is 10 n, plus 1 in the left half.
    parts = [np.full((40, 48, 3), 10 * n, np.uint8) for n in range(3)]
    for part in parts:
        part[:, :24] += 1
    batch = crops.Crops(parts, 40, 64, (0,))(0)
    assert batch.images.shape == (64, 40, 40, 3) and batch.labels.dtype == np.int32
    assert set(batch.labels) == {0, 1, 2}
    np.testing.assert_array_equal(batch.images[:, 0, 0, 0] // 10, batch.labels)
    turned = batch.images[:, 0, -1, 0] > batch.images[:, 0, 0, 0]
    assert 16 < turned.sum() < 48


def test_batches_depend_on_seed_and_index_alone():
    parts = [np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)] * 2
    first = crops.Crops(parts, 32, 8, (1, 0))
    made = list(crops.prefetch(first, iter(range(3, 20))))
    for index, batch in enumerate(made, 3):
        np.testing.assert_array_equal(batch.images, crops.Crops(parts, 32, 8, (1, 0))(index).images)
    assert (made[0].images != made[1].images).any()
    assert (made[0].images != crops.Crops(parts, 32, 8, (2, 0))(3).images).any()


def test_an_error_in_a_thread_reaches_the_loop():
    def fail(index):
        if index == 2:
            raise OSError("broken")
        return index

    made = crops.prefetch(fail, iter(range(9)))
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(OSError, match="broken"):
        next(made)


# --- Training ---


def test_a_run_writes_what_it_says(finished):
    rows = table(finished)
    assert [int(row["step"]) for row in rows] == list(range(1, 9))
    assert [bool(row["held_out_accuracy"]) for row in rows] == [False, False, False, True] * 2
    assert Image.open(finished / train.PLOT).format == "PNG"


@on_a_gpu_open
def test_the_same_run_again_has_the_same_losses(finished, tmp_path):
    assert train.main(arguments(tmp_path / "again", "--steps", 8, "--every", 4)) == 0
    assert table(tmp_path / "again") == table(finished)


@on_a_gpu_open
def test_resuming_is_exact(finished, run_folder):
    shutil.rmtree(run_folder / train.CHECKPOINTS / "8")
    (run_folder / train.TABLE).unlink()
    assert train.main(arguments(run_folder, "--steps", 8, "--every", 4, "--resume")) == 0
    assert table(run_folder) == table(finished)


def test_ours_and_flax_train_alike(tmp_path):
    steps = 10 if jax.default_backend() == "gpu" else 50
    for conv in ("ours", "flax"):
        with jax.default_matmul_precision("highest"):
            assert train.main(arguments(tmp_path / conv, "--steps", steps, "--every", steps, "--conv", conv)) == 0
    np.testing.assert_allclose(losses(tmp_path / "flax"), losses(tmp_path / "ours"), rtol=1e-3)
    assert losses(tmp_path / "flax") != losses(tmp_path / "ours")


@pytest.mark.slow
def test_a_run_of_ours_is_resumed_with_flax(finished, run_folder):
    shutil.rmtree(run_folder / train.CHECKPOINTS / "8")
    assert train.main(arguments(run_folder, "--steps", 8, "--every", 4, "--resume", "--conv", "flax")) == 0
    np.testing.assert_allclose(losses(run_folder), losses(finished), rtol=1e-3)


def test_textures_are_learned(tmp_path):
    more = ("--steps", 80, "--every", 80, "--batch", 32, "--learning-rate", 0.01)
    assert train.main(arguments(tmp_path / "run", *more)) == 0
    assert float(table(tmp_path / "run")[-1]["held_out_accuracy"]) >= 0.9


@pytest.mark.skipif(jax.device_count() == 1, reason="needs several devices")
def test_images_are_divided_and_the_state_is_everywhere():
    divided = training.Divided.over_all_devices()
    images = jax.device_put(np.zeros((16, 32, 32, 3), np.uint8), divided.images)
    assert {shard.data.shape[0] for shard in images.addressable_shards} == {16 // jax.device_count()}
    compiled = divided.jit(lambda state, images, labels: images.astype(float).mean() + state)
    labels = jax.device_put(np.zeros(16, np.int32), divided.images)
    assert compiled(jax.device_put(1.0, divided.state), images, labels).sharding.is_fully_replicated


@pytest.mark.skipif(jax.device_count() == 1, reason="needs several devices")
def test_statistics_of_each_device():
    """Where all devices have the same images, a step with their own statistics is that of one device."""
    mesh = jax.make_mesh((2,), ("d",), (AxisType.Auto,), devices=jax.devices()[:2])
    model, optimizer = tiny_training.tiny(num_classes=3, dropout_rate=0.0, rngs=nnx.Rngs(0)), optax.sgd(0.1)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(8, 32, 32, 3), dtype=np.uint8), rng.integers(3, size=8, dtype=np.int32)
    batch = [np.concatenate([part] * 2) for part in (images, labels)]
    step = training.train_step(model, optimizer, axis="d")
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("d"), P("d")), out_specs=P(), check_vma=False)
    state = training.create_state(model, optimizer)
    several = jax.jit(mapped)(state, *batch)
    one = jax.jit(training.train_step(model, optimizer))(state, images, labels)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), several, one)

    other = [images, 255 - images], [labels, labels]
    state, _ = jax.jit(mapped)(state, *map(np.concatenate, other))
    assert not np.allclose(jax.tree.leaves(state.statistics)[0], jax.tree.leaves(several[0].statistics)[0], rtol=1e-3)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))


# --- What goes wrong ---


def only_line(capsys):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("train.py: ")
    return captured.err


@pytest.mark.parametrize(
    "bad, message",
    [
        (["--model", "resnet"], "invalid choice: 'resnet'"),
        (["--size", "31"], "a whole number from 32 to 224, got '31'"),
        (["--size", "large"], "a whole number from 32 to 224, got 'large'"),
        (["--batch", "0"], "at least 1, got '0'"),
        (["--steps", "-3"], "at least 1, got '-3'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--learning-rate", "nan"], "a number from 1e-08 to 1.0, got 'nan'"),
        (["--resume", "--overwrite"], "not allowed with"),
        (["--frobnicate"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(tmp_path, capsys, bad, message):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments(tmp_path / "run", *bad))
    assert stopped.value.code == 2
    assert message in only_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(jax.device_count() == 1, reason="needs several devices")
def test_an_indivisible_batch_is_refused(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run", "--batch", jax.device_count() + 1)) == 2
    assert "cannot be divided" in only_line(capsys)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_overwritten_unless_asked(run_folder, capsys, monkeypatch):
    before = contents(run_folder)
    assert train.main(arguments(run_folder, "--steps", 1)) == 2
    assert "not empty" in only_line(capsys)
    assert contents(run_folder) == before
    (run_folder / "notes.txt").write_text("keep")
    monkeypatch.setattr(train.Run, "train", lambda run: None)
    assert train.main(arguments(run_folder, "--overwrite")) == 0
    assert {path.name for path in contents(run_folder)} == {"notes.txt"}


def test_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(arguments(tmp_path / "file")) == 2
    assert "cannot write" in only_line(capsys)


def test_nothing_to_resume(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run", "--resume")) == 2
    assert "no checkpoint" in only_line(capsys)
    assert not (tmp_path / "run").exists()


def test_other_settings_are_not_resumed(run_folder, capsys):
    assert train.main(arguments(run_folder, "--steps", 8, "--every", 4, "--resume", "--seed", 1)) == 2
    assert "was started with --seed 0, not 1" in only_line(capsys)


def flip_bits(folder):
    """Of every file of arrays, since some have parts that nothing reads."""
    for path in (folder / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        for at in range(len(content) // 4, len(content) * 3 // 4, 16):
            content[at] ^= 1
        path.write_bytes(content)


def cut_off(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:50])


def spoil_the_record(folder):
    (folder / "content" / "metadata").write_text('{"checksum": 1, "rec')


@pytest.mark.parametrize(
    "damage",
    [flip_bits, cut_off, spoil_the_record, lambda folder: shutil.rmtree(folder / "state")],
    ids=["flipped", "truncated", "record", "missing"],
)
def test_a_corrupt_checkpoint_is_one_line_and_exit_code_1(run_folder, capsys, damage):
    damage(run_folder / train.CHECKPOINTS / "8")
    assert train.main(arguments(run_folder, "--steps", 8, "--every", 4, "--resume")) == 1
    line = only_line(capsys)
    assert str(run_folder / train.CHECKPOINTS / "8") in line and "cannot read this checkpoint" in line


def test_a_loss_that_is_not_finite_stops(tmp_path, capsys, monkeypatch):
    history = train.History([(1.0, 0.5)], [])
    monkeypatch.setattr(train.Run, "train", lambda run: history.add(training.Metrics(np.nan, 0.0)))
    assert train.main(arguments(tmp_path / "run")) == 1
    assert "the loss of step 2 is nan" in only_line(capsys)


def test_an_interruption_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Run, "train", interrupt)
    assert train.main(arguments(tmp_path / "run")) == 130
    assert "--resume" in only_line(capsys)


@pytest.mark.slow
def test_a_killed_run_is_resumed_exactly(tmp_path):
    """The real command, killed without warning after its first checkpoint."""
    command = [
        sys.executable,
        "-P",
        str(EXAMPLES / "train.py"),
        "--model",
        "mobilenet_v1",
        "--every",
        "5",
        "--steps",
        "20",
    ]
    command += ["--task", "textures", "--size", "32", "--batch", "16"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([*command, "--output", whole], check=True, env=environment, timeout=600)
    process = subprocess.Popen([*command, "--output", killed], env=environment)
    with contextlib.suppress(ProcessLookupError):
        while process.poll() is None and not (killed / train.CHECKPOINTS / "5").exists():
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, "--output", killed, "--resume"], check=True, env=environment, timeout=600)
    assert table(killed) == table(whole)
