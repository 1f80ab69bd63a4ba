#!/usr/bin/env python3
"""Quantise EfficientNet-Lite0 to int8 after training, compare it with float32, and time it.

    python examples/quantize.py --output lite0.safetensors    # calibrated on crops of pictures of scikit-image
    python examples/quantize.py --load lite0.safetensors

Calibration sees crops of twelve pictures; the cosines are of crops of strips of them that it does not see. Exit code 0:
done; 1: the int8 network disagrees with float32; 2: a file cannot be read or written, or a package is missing.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import classify
    import crops
    import jax
    import jax.numpy as jnp
    import latency
    import numpy as np
    import serve
    from flax import nnx
    from models import compiled, folded, quantization
    from models.efficientnet import IMAGE_SIZE
    from models.quantization import Network, NetworkError
    from models.weights import load_pretrained
except ModuleNotFoundError as error:
    print(f"quantize.py: {error.name} is missing: pip install 'jax-dwsconv[examples]'", file=sys.stderr)
    raise SystemExit(2) from None

CALIBRATION_CROPS = 128
CROPS = 512
BATCHES = (1, 8, 32)
AT_ONCE = 32  # crops
LEAST_COSINE = 0.97

Model = Callable[[jax.Array], jax.Array]


def random_crops(held_out: bool, count: int) -> np.ndarray:
    """Crops (count, 224, 224, 3) of the pictures of `crops`, as the model takes them."""
    _, seen, unseen = crops.load_parts("pictures", IMAGE_SIZE)
    images = crops.Crops(unseen if held_out else seen, IMAGE_SIZE, count, (int(held_out),))(0).images
    return (images.astype(np.float32) - classify.PIXEL_MEAN) / classify.PIXEL_SCALE


def make_network(options: argparse.Namespace) -> Network:
    """The int8 network, from a file or from calibration."""
    if options.load:
        return quantization.load(options.load)
    if options.image:
        photographs = [classify.load_photograph(path) for path in options.image]
        images = np.concatenate([classify.preprocess(photograph) for photograph in photographs])
    else:
        images = random_crops(held_out=False, count=CALIBRATION_CROPS)
    model = load_pretrained("ours")
    percentile = 100.0 if options.percentile is None else options.percentile
    network = quantization.quantize(model, quantization.calibrate(model, images, percentile))
    print(f"  calibrated on {len(images)} images, percentile {percentile:g}")
    return network


def compare_photographs(reference: Model, int8: Model) -> bool:
    """Prints the likeliest class of each photograph; whether all are equal."""
    agreed = True
    for path in classify.default_photographs():
        photograph = classify.load_photograph(path)
        x = classify.preprocess(photograph)
        (expected,), (found,) = (classify.top_predictions(np.asarray(model(x))[0], 1) for model in (reference, int8))
        agrees = expected.label == found.label
        agreed = agreed and agrees
        print(
            f"  {photograph.name:<14} float32 {expected.probability:6.1%} {expected.label:<16} "
            f"int8 {found.probability:6.1%} {found.label:<16} {'agrees' if agrees else 'DISAGREES'}"
        )
    return agreed


def compare_crops(reference: Model, int8: Model, count: int) -> bool:
    """Prints how alike the logits of random crops are; whether all are alike enough."""
    images = random_crops(held_out=True, count=count)
    batches = [images[start : start + AT_ONCE] for start in range(0, count, AT_ONCE)]
    a, b = (np.concatenate([np.asarray(model(batch)) for batch in batches]) for model in (reference, int8))
    cosines = np.sum(a * b, axis=-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    equal = np.mean(a.argmax(-1) == b.argmax(-1))
    # Not "least < LEAST_COSINE": a NaN must not pass.
    agrees = bool(cosines.min() >= LEAST_COSINE)
    print(
        f"  {count} unseen crops: cosine of the logits at least {cosines.min():.4f}, on average {cosines.mean():.4f}; "
        f"top-1 equal in {equal:.1%}: {'agrees' if agrees else f'DISAGREES (at least {LEAST_COSINE:g})'}"
    )
    return agrees


def size(tree: Any) -> float:
    """Of all arrays, in MB."""
    return sum(a.nbytes for a in jax.tree.leaves(tree)) / 1e6


def positive(text: str) -> int:
    """An argument that counts something."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="quantize.py",
        description="Quantise EfficientNet-Lite0 (ImageNet) to int8, compare it with float32, and time it.",
        epilog="exit code: 0 done, 1 the int8 network disagrees with float32, 2 a file cannot be read or written, or "
        "a package is missing",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--image",
        metavar="FILE",
        type=Path,
        action="append",
        help="calibrate on the centre square of this picture; may be repeated "
        f"(default: {CALIBRATION_CROPS} crops of twelve pictures of scikit-image)",
    )
    source.add_argument("--load", metavar="FILE", type=Path, help="take the network from a file that --output wrote")
    parser.add_argument(
        "--percentile",
        type=float,
        help="of the numbers between two layers, the end of their range; 100 is the largest (default: 100)",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the network to this safetensors file")
    parser.add_argument("--force", action="store_true", help="overwrite the output if it exists")
    parser.add_argument("--crops", type=positive, default=CROPS, help="to compare the logits of (default: %(default)s)")
    parser.add_argument(
        "--batch", type=positive, nargs="*", default=BATCHES, help="sizes to time, or none (default: 1 8 32)"
    )
    options = parser.parse_args(arguments)
    if options.load and options.percentile is not None:
        parser.error("--percentile belongs to calibration, which a loaded network has behind it")
    return options


def run(options: argparse.Namespace) -> int:
    """Does the work; returns the exit code."""
    if options.output:
        serve.check_output(options.output, options.force)
    print(f"EfficientNet-Lite0 in int8 on {classify.device_name()}", flush=True)
    network = make_network(options)
    if options.output:
        serve.write(options.output, quantization.to_bytes(network))
        print(f"  written to {options.output}")
    int8 = quantization.compiled(network)
    models = {
        "float32": folded(load_pretrained("ours")),
        "bfloat16": folded(load_pretrained("ours", jnp.bfloat16)),
    }
    sizes = {name: size(nnx.state(model)) for name, model in models.items()} | {"int8": size(network.arrays)}
    print("  parameters: " + ", ".join(f"{name} {megabytes:.1f} MB" for name, megabytes in sizes.items()), flush=True)
    forms = {name: compiled(model) for name, model in models.items()} | {"int8": int8}
    agreed = compare_photographs(forms["float32"], int8)
    agreed = compare_crops(forms["float32"], int8, options.crops) and agreed
    x = random_crops(held_out=True, count=max(options.batch, default=0))
    if rows := {batch: latency.measure(forms, x[:batch]) for batch in options.batch}:
        print(f"\n{latency.table(rows)}")
    return 0 if agreed else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = parse_arguments(arguments)
    return classify.exit_code("quantize.py", run, options, classify.InputError, serve.InputError, NetworkError)


if __name__ == "__main__":
    sys.exit(main())
