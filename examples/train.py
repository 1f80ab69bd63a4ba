#!/usr/bin/env python3
"""Train a model of `models` on crops of photographs and textures, its depthwise layers on jax_dwsconv or on plain lax.

The task is to tell which picture a crop comes from; a strip of each picture is held out. The pictures come with
scikit-image: nothing is downloaded. The same command gives the same losses again, and so does a run that was stopped
and resumed. Exit code 0: done; 1: training failed, or a checkpoint cannot be read; 2: bad arguments, or a package is
missing. With --distributed the same command runs on several machines: they train one model, and end together.
"""

import argparse
import csv
import functools
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

try:
    import jax
    import models
    import numpy as np
    import optax
    from crops import SIZES, TASKS, Batch, Crops, load_parts, prefetch
    from jax.experimental import multihost_utils
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text
    from training import (
        CheckpointError,
        Checkpoints,
        Divided,
        Metrics,
        State,
        create_state,
        evaluation_step,
        train_step,
    )
except ModuleNotFoundError as error:
    print(f"train.py: {error.name} is missing: pip install 'jax-dwsconv[examples]'", file=sys.stderr)
    raise SystemExit(2) from None

HELD_OUT_CROPS = 512
WARMUP = 0.1  # of the steps
WEIGHT_DECAY = 1e-4
LARGEST_GRADIENT = 1.0
LAG = 4  # steps between the launch of one and the look at its loss, so that the device never waits

CHECKPOINTS, TABLE, PLOT = "checkpoints", "metrics.csv", "training.png"


class InputError(Exception):
    """Something that the user can mend, said in one line."""


class TrainingError(Exception):
    """Why training cannot go on, said in one line."""


# --- History --------------------------------------------------------------------------------------------------------


class History(NamedTuple):
    """What happened so far: (loss, accuracy) of each step, and (step, loss, accuracy) of each evaluation."""

    training: list[tuple[float, float]]
    held_out: list[tuple[int, float, float]]

    def add(self, metrics: Metrics) -> None:
        """Waits for the metrics of the next step and adds them. Raises TrainingError where the loss is not finite."""
        loss, accuracy = map(float, metrics)
        if not math.isfinite(loss):
            raise TrainingError(f"the loss of step {len(self.training) + 1} is {loss}: try a smaller --learning-rate")
        self.training.append((loss, accuracy))

    def recent(self, steps: int) -> tuple[float, float]:
        """The means of loss and accuracy over the last steps."""
        recent = self.training[-steps:]
        return tuple(sum(values) / len(recent) for values in zip(*recent, strict=True))

    def write_table(self, path: Path) -> None:
        """Writes one line for each step."""
        held_out = {step: values for step, *values in self.held_out}
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("step", "loss", "accuracy", "held_out_loss", "held_out_accuracy"))
            for step, values in enumerate(self.training, 1):
                writer.writerow((step, *values, *held_out.get(step, ("", ""))))

    def plot(self, path: Path, title: str) -> None:
        """Draws loss and accuracy against the step."""
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        figure.suptitle(title, fontsize=10)
        steps = range(1, len(self.training) + 1)
        window = max(1, len(self.training) // 50)
        for axis, column, name in zip(figure.subplots(1, 2), (0, 1), ("loss", "accuracy"), strict=True):
            values = [row[column] for row in self.training]
            means = [sum(part) / len(part) for part in (values[max(0, i - window) : i + 1] for i in range(len(values)))]
            axis.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8)
            axis.plot(steps, means, color="tab:blue", label="training")
            looks = [row[0] for row in self.held_out]
            axis.plot(looks, [row[1 + column] for row in self.held_out], "o-", color="tab:orange", label="held out")
            axis.set_xlabel("step")
            axis.set_ylabel(name)
            axis.set_ylim(0, 1.02 if name == "accuracy" else None)
            axis.grid(alpha=0.3)
            axis.legend()
        figure.savefig(path, dpi=130)


# --- Training -------------------------------------------------------------------------------------------------------


class ImagesPerSecond(ProgressColumn):
    """The recent rate of a bar of steps."""

    def __init__(self, batch: int):
        super().__init__()
        self.batch = batch

    def render(self, task: Task) -> Text:
        """The text of the column."""
        return Text(f"{self.batch * task.speed:,.0f} images/s" if task.speed else "compiling")


def progress_bar(console: Console, batch: int) -> Progress:
    """A bar of steps with the loss and the rate, on a terminal only."""
    columns = (MofNCompleteColumn(), BarColumn(), TextColumn("loss {task.fields[loss]}"))
    return Progress(
        *columns, ImagesPerSecond(batch), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )


class Run:
    """One training run, from the command line to the files in its folder."""

    def __init__(self, options: argparse.Namespace, checkpoints: Checkpoints, console: Console):
        self.options, self.checkpoints, self.console = options, checkpoints, console
        # Both the initial values and everything after depend on these; --conv may change when a run is resumed.
        settings = ("task", "model", "size", "batch", "dtype", "steps", "learning_rate", "seed")
        self.settings = {name: getattr(options, name) for name in settings}
        self.history = History([], [])
        self.divided = Divided.over_all_devices()
        self.names, training, held_out = load_parts(options.task, options.size)
        rows = self.divided.rows(options.batch)
        self.crops = Crops(training, options.size, options.batch, (options.seed, 0), rows)
        self.held_out = Crops(held_out, options.size, options.batch, (0, 1), rows)

    def train(self) -> None:
        """Trains, or goes on where the latest checkpoint is."""
        options = self.options
        start = self._read_record() if options.resume else 0
        model = models.create(
            options.model, conv=options.conv, num_classes=len(self.names), dtype=options.dtype, seed=options.seed
        )
        self._describe(models.count_parameters(model))
        state, step, evaluate = self._compile(model)
        if start:
            state = self.checkpoints.state(start, state)
            self.console.print(f"resumed after step {start}")
        waiting: deque[Metrics] = deque()
        batches = prefetch(self._on_device(self.crops), iter(range(start, options.steps)))
        with progress_bar(self.console, options.batch) as progress:
            bar = progress.add_task("", total=options.steps, completed=start, loss="-")
            clock, counted = time.perf_counter(), 0
            for done, batch in enumerate(batches, start + 1):
                state, metrics = step(state, *batch)
                waiting.append(metrics)
                counted += 1
                if done == start + 1:  # which was compiled
                    jax.block_until_ready(state)
                    clock, counted = time.perf_counter(), 0
                report = done % options.every == 0 or done == options.steps
                while len(waiting) > (0 if report else LAG):
                    self.history.add(waiting.popleft())
                    progress.update(bar, advance=1, loss=f"{self.history.training[-1][0]:.4f}")
                if report:
                    rate = counted * options.batch / (time.perf_counter() - clock)
                    self._report(done, state, evaluate, rate)
                    clock, counted = time.perf_counter(), 0

    def _read_record(self) -> int:
        step = self.checkpoints.latest()
        if step is None:
            raise InputError(f"{self.options.output}: there is no checkpoint to resume from")
        record = self.checkpoints.record(step)
        for name, value in record["settings"].items():
            if self.settings.get(name) != value:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{self.options.output} was started with {option} {value}, not {self.settings[name]}")
        self.history.training.extend(map(tuple, record["training"]))
        self.history.held_out.extend(map(tuple, record["held_out"]))
        return step

    def _describe(self, parameters: int) -> None:
        options, devices = self.options, jax.devices()
        kind = devices[0].device_kind
        self.console.print(
            f"{options.model}, {parameters:,} parameters, depthwise layers on "
            f"{'jax_dwsconv' if options.conv == 'ours' else 'plain lax'}, {options.dtype}, on {len(devices)} x {kind}"
            f"{f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''}\n"
            f"{len(self.names)} classes: {', '.join(self.names)}; crops of {options.size} x {options.size}, "
            f"{options.batch} a step",
        )

    def _compile(self, model: Any) -> tuple[State, Any, Any]:
        options = self.options
        schedule = optax.warmup_cosine_decay_schedule(
            0, options.learning_rate, math.ceil(WARMUP * options.steps), options.steps + 1
        )
        optimizer = optax.chain(
            optax.clip_by_global_norm(LARGEST_GRADIENT), optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
        )
        state = jax.device_put(create_state(model, optimizer), self.divided.state)
        step = self.divided.jit(train_step(model, optimizer, options.seed), donate_argnums=0)
        evaluate = self.divided.jit(evaluation_step(model))
        return state, step, evaluate

    def _on_device(self, crops: Crops) -> Any:
        return lambda index: Batch(*(self.divided.place(rows, crops.batch) for rows in crops(index)))

    def _report(self, done: int, state: State, evaluate: Any, rate: float) -> None:
        options = self.options
        count = math.ceil(HELD_OUT_CROPS / options.batch)
        held_out = [evaluate(state, *batch) for batch in prefetch(self._on_device(self.held_out), iter(range(count)))]
        loss, accuracy = (sum(map(float, values)) / count for values in zip(*held_out, strict=True))
        self.history.held_out.append((done, loss, accuracy))
        means = self.history.recent(options.every)
        self.console.print(
            f"step {done:>5}  loss {means[0]:.4f}  accuracy {means[1]:6.1%}  held out: loss {loss:.4f}  accuracy "
            f"{accuracy:6.1%}  {rate:,.0f} images/s"
        )
        self.checkpoints.save(state, {"settings": self.settings, **self.history._asdict()})
        if jax.process_index() == 0:
            self.history.write_table(options.output / TABLE)
            self.history.plot(
                options.output / PLOT, f"{options.model}, {options.task} at {options.size} pixels, {options.dtype}"
            )


# --- Command --------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with code 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def number(kind: type, low: float, high: float, text: str) -> Any:
    """A number within bounds, for argparse."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what} {bounds}, got {text!r}")
    return value


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        prog="train.py",
        description="Train a model to tell which picture a crop comes from, its depthwise layers on jax_dwsconv or on "
        "plain lax, on all devices that jax sees.",
        epilog="exit code: 0 done, 1 training failed or a checkpoint cannot be read, 2 bad arguments or a package is "
        "missing",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    positive = functools.partial(number, int, 1, math.inf)
    add("--model", choices=tuple(models.MODELS), default="mobilenet_v2", help="what to train")
    add("--task", choices=tuple(TASKS), default="pictures", help="12 photographs and textures, or 3 textures")
    size = functools.partial(number, int, SIZES[0], SIZES[-1])
    add("--size", type=size, default=64, metavar="PIXELS", help=f"side of the crops, {SIZES[0]} to {SIZES[-1]}")
    add("--batch", type=positive, default=64, metavar="N", help="crops a step, a multiple of the number of devices")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in; parameters are float32")
    add("--steps", type=positive, default=300, metavar="N", help="when to stop")
    add("--conv", choices=("ours", "flax"), default="ours", help="the depthwise layers: jax_dwsconv, or plain lax")
    rate = functools.partial(number, float, 1e-8, 1.0)
    add("--learning-rate", type=rate, default=2e-3, metavar="RATE", help="of AdamW, after a warmup and before a decay")
    seed = functools.partial(number, int, 0, 2**31 - 1)
    add("--seed", type=seed, default=0, metavar="N", help="of the initial parameters, the crops and the dropout")
    add(
        "--every",
        type=positive,
        default=100,
        metavar="N",
        help="steps between looks at held-out crops, each with a checkpoint",
    )
    add(
        "--output",
        type=Path,
        default=Path("training"),
        metavar="FOLDER",
        help="for checkpoints, metrics.csv, training.png",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in the folder")
    existing.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run in the folder")
    several = parser.add_argument_group("several processes")
    several.add_argument(
        "--distributed",
        action="store_true",
        help="train with the other processes that run this command: Slurm, Open MPI and Kubernetes know them, "
        "elsewhere the next three options do",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="a free port on the machine of process 0")
    several.add_argument("--processes", type=positive, metavar="N", help="how many")
    several.add_argument("--process", type=functools.partial(number, int, 0, math.inf), metavar="N", help="which one")
    several.add_argument(
        "--timeout", type=positive, default=100, metavar="SECONDS", help="without a sign of life of another process"
    )
    options = parser.parse_args(arguments)
    by_hand = (options.coordinator, options.processes, options.process)
    if by_hand != (None,) * 3 and (None in by_hand or not options.distributed):
        parser.error("--coordinator, --processes and --process go together, and with --distributed")
    return options


def join(options: argparse.Namespace) -> None:
    """Meets the other processes."""
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process,
            initialization_timeout=options.timeout,
            heartbeat_timeout_seconds=options.timeout,
            shutdown_timeout_seconds=options.timeout,
        )
    except (RuntimeError, ValueError) as error:
        reason = f"{error}".partition("\n")[0]
        raise InputError(f"--distributed: the processes do not come together: {reason}") from None


def prepare(options: argparse.Namespace) -> None:
    """Process 0 looks at the output folder; where it refuses it, all do."""
    refusal = None
    if jax.process_index() == 0:
        try:
            prepare_folder(options)
        except InputError as error:
            refusal = error
    if multihost_utils.broadcast_one_to_all(np.asarray(refusal is not None)):
        raise refusal or InputError("process 0 refuses, and says why")


def prepare_folder(options: argparse.Namespace) -> None:
    """Refuses, before any work is done, what could not be done. Makes the output folder."""
    devices = jax.device_count()
    if options.batch % devices:
        raise InputError(f"--batch {options.batch} cannot be divided among {devices} devices")
    folder = options.output
    if options.resume:
        if not (folder / CHECKPOINTS).is_dir():
            raise InputError(f"{folder}: there is no checkpoint to resume from")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if options.overwrite:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            for name in (TABLE, PLOT):
                (folder / name).unlink(missing_ok=True)
        elif any(path.is_file() for path in folder.rglob("*")):
            raise InputError(f"{folder}: is not empty: --resume, --overwrite or another --output")
    except OSError as error:
        raise InputError(f"{folder}: cannot write there: {error.strerror or error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        if options.distributed:
            join(options)
        console = Console(highlight=False, soft_wrap=True, quiet=jax.process_index() != 0)
        prepare(options)
        with Checkpoints(options.output / CHECKPOINTS) as checkpoints:
            Run(options, checkpoints, console).train()
        console.print(f"{options.output / PLOT}, {options.output / TABLE}, {options.output / CHECKPOINTS}")
        return 0
    except KeyboardInterrupt:
        code, message = 130, "interrupted; --resume goes on from the latest checkpoint, if there is one"
    except ModuleNotFoundError as error:
        code, message = 2, f"{error.name.partition('.')[0]} is missing: pip install 'jax-dwsconv[examples]'"
    except (InputError, ImportError) as error:
        code, message = 2, str(error)
    except (TrainingError, CheckpointError) as error:
        code, message = 1, str(error)
    except OSError as error:
        code, message = 1, f"{error.filename or options.output}: {error.strerror or error}"
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            code, message = 1, "out of memory: try a smaller --batch or --size"
        elif options.distributed:
            reason = f"{error}".partition("\n")[0]
            message = f"another process ended, it seems; --resume goes on after the latest checkpoint ({reason})"
            print(f"train.py: {message}", file=sys.stderr, flush=True)
            os._exit(1)  # jax would wait for the other one
        else:
            raise
    print(f"train.py: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
