# ruff: noqa: E402  (the examples are no package: their folder goes on the path first)
"""`examples/train.py` with a model that compiles in seconds; as a command, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
EXAMPLES = TESTS.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import models
import train
from flax import nnx
from models import blocks

HELD_OUT_CROPS = 64
STAGES = (blocks.Stage(1, 16, 1, 2, 3), blocks.Stage(2, 16, 1, 1, 5))


def tiny(**options):
    return blocks.InvertedResidualNet(STAGES, head_channels=64, activation=nnx.relu6, **options)


def patch(set_item, set_attribute) -> None:
    """Makes this model the default one: with dict's and object's `__setitem__` and `setattr`, or with monkeypatch's."""
    set_item(models.MODELS, "mobilenet_v2", tiny)
    set_attribute(train, "HELD_OUT_CROPS", HELD_OUT_CROPS)


def arguments(output, *more):
    return ["--task", "textures", "--size", "32", "--batch", "16", "--output", str(output), *map(str, more)]


def start(output, *more, devices: int = 1) -> subprocess.Popen:
    """The command on so many devices of the CPU; stderr can be read."""
    # Not an empty entry: that would be the current folder, and perhaps the source tree.
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-P", str(TESTS / "tiny_training.py"), *arguments(output, *more)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


if __name__ == "__main__":
    patch(dict.__setitem__, setattr)
    sys.exit(train.main())
