# ruff: noqa: E402  (nothing is imported where a package is missing)
"""Training over two processes of this machine, which meet on the loopback interface."""

import contextlib
import csv
import shutil
import socket
import subprocess
import time

import pytest

for package in ("flax", "matplotlib", "optax", "orbax.checkpoint", "rich", "skimage"):
    pytest.importorskip(package)

import tiny_training  # isort: skip  (puts the examples on the path)

import train

TIMEOUT = 10  # seconds without a sign of life
STEPS = ("--steps", 8, "--every", 4)


@contextlib.contextmanager
def running(output, *more):
    """Two processes, which are killed in the end if they still run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ("--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", 2, "--timeout", TIMEOUT, *more)
    processes = [tiny_training.start(output, *options, "--process", number) for number in range(2)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    """Exit code and standard error."""
    _, errors = process.communicate(timeout=seconds)
    return process.returncode, errors


def table(output):
    with (output / train.TABLE).open() as file:
        return list(csv.DictReader(file))


def test_two_processes_train_as_one(tmp_path):
    """The same losses to the last digit; a checkpoint that both resume exactly; a folder that both refuse."""
    one, two = tmp_path / "one", tmp_path / "two"
    alone = tiny_training.start(one, *STEPS, devices=2)
    with running(two, *STEPS) as processes:
        assert [finish(process)[0] for process in (alone, *processes)] == [0, 0, 0]
    assert len(table(one)) == 8
    assert table(two) == table(one)

    with running(two, *STEPS) as processes:
        (first, first_line), (second, second_line) = map(finish, processes)
    assert (first, second) == (2, 2)
    assert "is not empty" in first_line and "process 0 refuses" in second_line

    shutil.rmtree(two / train.CHECKPOINTS / "8")
    (two / train.TABLE).unlink()
    with running(two, *STEPS, "--resume") as processes:
        assert [finish(process)[0] for process in processes] == [0, 0]
    assert table(two) == table(one)


@pytest.mark.slow
def test_one_process_resumes_what_two_began(tmp_path):
    with running(tmp_path / "run", *STEPS) as processes:
        assert [finish(process)[0] for process in processes] == [0, 0]
    expected = table(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / train.CHECKPOINTS / "8")
    assert finish(tiny_training.start(tmp_path / "run", *STEPS, "--resume", devices=2))[0] == 0
    assert table(tmp_path / "run") == expected


@pytest.mark.parametrize("dies", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_no_process_outlives_another(dies, tmp_path):
    with running(tmp_path / "run", "--steps", 10_000, "--every", 4) as processes:
        while not (tmp_path / "run" / train.CHECKPOINTS / "4").exists():
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        processes[dies].kill()
        start = time.monotonic()
        code, errors = finish(processes[1 - dies], 3 * TIMEOUT)
        assert time.monotonic() - start < 2 * TIMEOUT
    assert code != 0
    assert "train.py: another process ended, it seems; --resume" in errors or "another task died" in errors


def test_a_process_that_never_comes(tmp_path):
    alone = ("--distributed", "--coordinator", "127.0.0.1:1", "--processes", 2, "--process", 1, "--timeout", 2)
    code, errors = finish(tiny_training.start(tmp_path / "run", *alone))
    assert code != 0
    assert "distributed" in errors


@pytest.mark.parametrize(
    "bad", [["--coordinator", "127.0.0.1:1"], ["--distributed", "--processes", "2"], ["--process", "0"]]
)
def test_half_an_address_is_refused(bad, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(tiny_training.arguments(tmp_path / "run", *bad))
    assert stopped.value.code == 2
    assert "go together" in capsys.readouterr().err
