#!/usr/bin/env python3
"""Export a network to a file, and run the file where there is neither Flax nor the network's source.

    python examples/serve.py export lite0.jaxexport     # EfficientNet-Lite0 with its ImageNet weights, folded
    python examples/serve.py prepare pictures.npy cat.png dog.png
    python examples/serve.py run lite0.jaxexport pictures.npy

`run` imports jax, numpy and jax_dwsconv alone. The program takes any number of pictures, and has the weights in it.
Exit code 0: done; 2: a file cannot be read or written, does not fit, or a package is missing.
"""

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

TOP = 5
PLATFORMS = ("cpu", "cuda")


class InputError(Exception):
    """Something that the user can mend, said in one line."""


def export(options: argparse.Namespace) -> None:
    """Writes EfficientNet-Lite0, BatchNorm and activations folded, for any batch size."""
    check_output(options.program, options.force)
    # Imported here, as below: `run` must not need it.
    import jax  # noqa: PLC0415
    from jax import numpy as jnp  # noqa: PLC0415
    from models import folded  # noqa: PLC0415
    from models.efficientnet import IMAGE_SIZE  # noqa: PLC0415
    from models.weights import load_pretrained  # noqa: PLC0415

    import jax_dwsconv  # noqa: PLC0415

    model = folded(load_pretrained("ours"))
    shape = jax.export.symbolic_shape(f"batch, {IMAGE_SIZE}, {IMAGE_SIZE}, 3")
    exported = jax.export.export(
        jax.jit(model.__call__), platforms=PLATFORMS, disabled_checks=jax_dwsconv.disabled_export_checks()
    )(jax.ShapeDtypeStruct(shape, jnp.float32))
    write(options.program, exported.serialize())
    print(f"{options.program}: EfficientNet-Lite0, any batch size, for {' and '.join(PLATFORMS)}")


def prepare(options: argparse.Namespace) -> None:
    """Writes pictures as the network takes them, float32 (N, 224, 224, 3)."""
    check_output(options.pictures, options.force)
    import classify  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    try:
        photographs = map(classify.load_photograph, options.images or classify.default_photographs())
        pictures = np.concatenate([classify.preprocess(photograph) for photograph in photographs])
    except classify.InputError as error:
        raise InputError(str(error)) from None
    write(options.pictures, npy(np, pictures))
    print(f"{options.pictures}: {len(pictures)} pictures")


def run(options: argparse.Namespace) -> None:
    """Runs an exported network on prepared pictures and prints the likeliest classes by number."""
    if options.logits:
        check_output(options.logits, options.force)
    import jax  # noqa: PLC0415
    import numpy as np  # noqa: PLC0415

    import jax_dwsconv  # noqa: F401, PLC0415  (makes its kernels known to XLA)

    program = read_program(jax, options.program)
    x = read_pictures(np, options.pictures, program.in_avals[0])
    try:
        model = jax.jit(program.call).lower(x).compile()
    except Exception as error:  # a damaged program fails in XLA's own ways
        raise InputError(f"{options.program}: cannot be compiled here: {first_line(error)}") from None
    logits = np.asarray(model(x))
    started = time.perf_counter()
    model(x).block_until_ready()
    milliseconds = (time.perf_counter() - started) * 1e3
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = weights / weights.sum(axis=-1, keepdims=True)
    for index, row in enumerate(probabilities):
        top = np.argsort(-row)[:TOP]
        print(f"picture {index}: " + ", ".join(f"class {label} {row[label]:.1%}" for label in top))
    print(f"{len(logits)} pictures in {milliseconds:.1f} ms on {jax.default_backend()}")
    if options.logits:
        write(options.logits, npy(np, logits))


def read_program(jax, path: Path):
    """The exported function in the file."""
    content = read(path)
    try:
        program = jax.export.deserialize(bytearray(content))
        fits = len(program.in_avals) == 1 and len(program.out_avals) == 1
    except ModuleNotFoundError:
        raise
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise InputError(f"{path}: not a program that jax.export wrote: {first_line(error)}") from None
    if not fits:
        raise InputError(f"{path}: its program is not a function of one array")
    backend = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    if backend not in program.platforms:
        raise InputError(f"{path}: exported for {' and '.join(program.platforms)}, and this is {backend}")
    return program


def read_pictures(np, path: Path, expected):
    """The array in a .npy file, of the shape and dtype that the program takes."""
    try:
        with path.open("rb") as file:
            pictures = np.load(file, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from None
    except (ValueError, EOFError):
        raise InputError(f"{path}: not an .npy file of numbers") from None
    shape = getattr(pictures, "shape", None)
    fits = shape is not None and len(shape) == len(expected.shape) and shape[1:] == tuple(expected.shape[1:])
    if not fits or shape[0] < 1 or pictures.dtype != expected.dtype:
        found = "several arrays" if shape is None else f"{pictures.dtype} {shape}"
        raise InputError(f"{path}: the program takes {expected.dtype} {expected.shape}, this is {found}")
    return pictures


def check_output(path: Path, force: bool) -> None:
    """Refuses, before any work is done, an output that could not be written after it."""
    if path.is_dir():
        raise InputError(f"{path}: cannot write: it is a folder")
    if path.exists() and not force:
        raise InputError(f"{path}: exists already; --force overwrites it")
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot write: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{path}: cannot write: permission denied")


def npy(np, array) -> bytes:
    """The content of an .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def read(path: Path) -> bytes:
    """The content of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror or error}") from None


def write(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from None


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="serve.py", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="{export,prepare,run}")
    for function, text in (
        (export, "write EfficientNet-Lite0 (ImageNet) to a file"),
        (prepare, "write pictures as the network takes them"),
        (run, "run such a file on such pictures"),
    ):
        command = commands.add_parser(function.__name__, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.set_defaults(command=function)
        command.add_argument("--force", action="store_true", help="overwrite the output if it exists")
        if function in (export, run):
            command.add_argument("program", metavar="PROGRAM", type=Path, help="the exported network")
        if function in (prepare, run):
            command.add_argument("pictures", metavar="PICTURES", type=Path, help="an .npy file, (N, 224, 224, 3)")
        if function is prepare:
            command.add_argument(
                "images", metavar="IMAGE", type=Path, nargs="*", help="default: four photographs of scikit-image"
            )
        if function is run:
            command.add_argument("--logits", metavar="FILE", type=Path, help="write the logits to this .npy file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        options.command(options)
    except ModuleNotFoundError as error:
        message = f"{error.name.partition('.')[0]} is missing: pip install 'jax-dwsconv[examples]'"
    except InputError as error:
        message = str(error)
    else:
        return 0
    print(f"serve.py: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
