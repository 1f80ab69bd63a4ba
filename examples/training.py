"""What training a model takes: its state, the steps, and checkpoints that resume exactly."""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

PIXEL_MEAN, PIXEL_SCALE = 127.0, 128.0
CHECKPOINTS_KEPT = 2


Arrays = dict[str | int, Any]


class State(NamedTuple):
    """Everything that a step changes, in plain dictionaries: jax flattens them on each call, and nnx's take longer."""

    step: jax.Array
    parameters: Arrays
    statistics: Arrays  # of BatchNorm
    optimizer: optax.OptState


class Metrics(NamedTuple):
    """Means over a batch."""

    loss: jax.Array
    accuracy: jax.Array


def create_state(model: nnx.Module, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    _, parameters, statistics = _split(model)
    return State(jnp.zeros((), jnp.int32), parameters, statistics, optimizer.init(parameters))


def train_step(
    model: nnx.Module, optimizer: optax.GradientTransformation, seed: int = 0, axis: str | None = None
) -> Callable[[State, jax.Array, jax.Array], tuple[State, Metrics]]:
    """A function of the state, images (N, H, W, 3) uint8 and labels (N,), to be jitted. It drops out by seed and step.

    Args:
        model: gives the structure; its values are not used.
        optimizer: of the parameters.
        seed: of the dropout.
        axis: None, or that of a `shard_map` over the images: BatchNorm then takes the statistics of each device's own.
    """
    model.train()
    graphdef, *_ = _split(model)

    def step(state: State, images: jax.Array, labels: jax.Array) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis))

        def loss(parameters: Arrays) -> tuple[jax.Array, tuple[Metrics, Arrays]]:
            model = nnx.merge(graphdef, parameters, state.statistics, copy=True)
            metrics = _metrics(model(_normalized(images), rngs=nnx.Rngs(dropout=key)), labels)
            _, _, statistics = _split(model)
            return metrics.loss, (metrics, statistics)

        gradients, (metrics, statistics) = jax.grad(loss, has_aux=True)(state.parameters)
        if axis is not None:
            gradients, metrics, statistics = jax.lax.pmean((gradients, metrics, statistics), axis)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        return State(state.step + 1, parameters, statistics, optimizer_state), metrics

    return step


def evaluation_step(model: nnx.Module) -> Callable[[State, jax.Array, jax.Array], Metrics]:
    """A function of the state, images (N, H, W, 3) uint8 and labels (N,), to be jitted."""
    model.eval()
    graphdef, *_ = _split(model)

    def evaluate(state: State, images: jax.Array, labels: jax.Array) -> Metrics:
        model = nnx.merge(graphdef, state.parameters, state.statistics)
        return _metrics(model(_normalized(images)), labels)

    return evaluate


def _split(model: nnx.Module) -> tuple[nnx.GraphDef, Arrays, Arrays]:
    graphdef, parameters, statistics = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(parameters), nnx.to_pure_dict(statistics)


def _normalized(images: jax.Array) -> jax.Array:
    return (images.astype(jnp.float32) - PIXEL_MEAN) / PIXEL_SCALE


def _metrics(logits: jax.Array, labels: jax.Array) -> Metrics:
    logits = logits.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return Metrics(loss, (logits.argmax(-1) == labels).mean())


class Divided(NamedTuple):
    """Data parallelism over all devices of all processes: images are divided among them, the state is on each."""

    images: NamedSharding
    state: NamedSharding

    @classmethod
    def over_all_devices(cls) -> "Divided":
        """On a mesh of one axis."""
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        return cls(NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec()))

    def rows(self, batch: int) -> slice:
        """Which images of a batch the devices of this process have."""
        indices = [index.indices(batch) for (index,) in self.images.addressable_devices_indices_map((batch,)).values()]
        return slice(min(start for start, *_ in indices), max(stop for _, stop, _ in indices))

    def place(self, rows: np.ndarray, batch: int) -> jax.Array:
        """A batch on the devices, made of the rows of every process."""
        return jax.make_array_from_process_local_data(self.images, rows, (batch, *rows.shape[1:]))

    def jit(self, step: Callable, **options: Any) -> Callable:
        """Compiles a function of state, images and labels. XLA sees to the sums over all devices.

        On the CPU the results do not change from run to run. On a GPU, XLA is told neither to use atomics nor to try
        algorithms out; the first run of a process was still seen to differ from later ones in the fifth digit.
        """
        deterministic = {"xla_gpu_deterministic_ops": True, "xla_gpu_autotune_level": 0}
        shardings = {"in_shardings": (self.state, self.images, self.images), "out_shardings": self.state}
        return jax.jit(step, **shardings, compiler_options=deterministic, **options)


class CheckpointError(Exception):
    """A checkpoint that cannot be read, said in one line."""


class Checkpoints:
    """The latest states of a run in a folder, each with a record of plain values."""

    def __init__(self, folder: Path):
        self.folder = folder
        options = ocp.CheckpointManagerOptions(max_to_keep=CHECKPOINTS_KEPT)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_unused: object) -> None:
        self.manager.close()

    def save(self, state: State, record: dict[str, Any]) -> None:
        """Copies the state; it is written in the background."""
        content = {"checksum": _checksum(state), "record": record}
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), content=ocp.args.JsonSave(content))
        self.manager.save(int(state.step), args=items)

    def latest(self) -> int | None:
        """The step of the latest complete checkpoint."""
        return self.manager.latest_step()

    def record(self, step: int) -> dict[str, Any]:
        """The record of a checkpoint. Raises CheckpointError."""
        with self._one_line(step):
            return self._restore(step, content=ocp.args.JsonRestore())["content"]["record"]

    def state(self, step: int, like: State) -> State:
        """The state of a checkpoint, with the shapes and on the devices of `like`. Raises CheckpointError."""
        target = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), like)
        with self._one_line(step):
            restored = self._restore(step, state=ocp.args.StandardRestore(target), content=ocp.args.JsonRestore())
            if _checksum(restored["state"]) != restored["content"]["checksum"]:
                raise ValueError("its checksum is wrong")
            return restored["state"]

    def _restore(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        return self.manager.restore(step, args=ocp.args.Composite(**items))

    @contextlib.contextmanager
    def _one_line(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # what is raised depends on where the damage is
            reason = f"{error}".strip().partition("\n")[0][:200] or type(error).__name__
            advice = "delete it to resume from the one before"
            raise CheckpointError(
                f"{self.folder / str(step)}: cannot read this checkpoint ({advice}): {reason}"
            ) from error


def _checksum(state: State) -> int:
    checksum = 0
    for leaf in jax.tree.leaves(state):
        checksum = zlib.crc32(np.ascontiguousarray(leaf), checksum)
    return checksum
