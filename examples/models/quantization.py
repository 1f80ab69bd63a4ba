"""int8 networks from trained models: calibration on images, quantisation, and files of the result.

All that is between two layers is int8, with one scale and one zero point for each such array; kernels have a scale for
every output channel, and BatchNorm is folded into them. A skip connection is added to the int32 sums of the projection
and rounded with them. A network is a pytree of arrays, and the integers that are compiled into its function; its
logits are float32. `jax_dwsconv.quantized` has the arithmetic.

The scales come from ranges: for every layer the least and the largest real number that enters it, by the layer's name.
They are observed by `calibrate`, or by qwix (see `qwix_ranges`), or made otherwise. Where the mean of every channel is
known too, biases make up for what the rounding of the kernels does to the mean of the result (bias correction; Nagel et
al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019). Depthwise kernels need it:
an error of few taps does not average out.
"""

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_dwsconv import inference, quantized

from .blocks import ConvNorm, InvertedResidual, InvertedResidualNet, as_pointwise
from .mobilenet import MobileNetV1

BINS = 4096  # of the histograms that percentiles are read from
BATCH = 16  # images that calibration computes at once
LARGEST_INTEGER = 2**24  # of a bias or a skip connection among the int32 sums; a float32 holds them exactly
_ACTIVATIONS = {None: (-math.inf, math.inf), nnx.relu: (0.0, math.inf), nnx.relu6: (0.0, 6.0)}
_FORMAT = "jax-dwsconv int8 network 1"


class NetworkError(ValueError):
    """A model, ranges or a file that no int8 network can be made of."""


class Range(NamedTuple):
    """What enters a layer: the least and the largest number, and the mean of every channel, (C,), where it is known."""

    low: float
    high: float
    mean: np.ndarray | None = None


class Layer(NamedTuple):
    """What is compiled into the function of a network.

    Attributes:
        name: the key of its arrays.
        kind: "depthwise"; "dense", a convolution or matrix product; "mean" over the pixels; "logits", the classifier.
        stride: of a convolution, whose padding is "SAME".
        x_zero_point: what stands for 0 in the input.
        out_zero_point: what stands for 0 in the result.
        clamp: limits of the result.
        skip: the name of an earlier layer whose result is added, or "".
        skip_zero_point: what stands for 0 in that.
    """

    name: str
    kind: Literal["depthwise", "dense", "mean", "logits"]
    stride: int = 1
    x_zero_point: int = 0
    out_zero_point: int = 0
    clamp: tuple[int, int] = (-128, 127)
    skip: str = ""
    skip_zero_point: int = 0


class Network(NamedTuple):
    """An int8 network; `compiled` makes a function of it.

    Attributes:
        arrays: by the name of the layer its "kernel" (int8), "bias" (int32), "scale" (float32) and, where something is
            added, "skip_scale" (float32); under "image" the "scale" of the images. All but depthwise biases hold what
            the zero point of the input contributes.
        layers: in the order of computation.
    """

    arrays: dict[str, dict[str, jax.Array]]
    layers: tuple[Layer, ...]


# The function ---------------------------------------------------------------------------------------------------------


def run(layers: tuple[Layer, ...], arrays: Mapping[str, Mapping[str, jax.Array]], x: jax.Array) -> jax.Array:
    """Images (N, H, W, 3), floating, as the model takes them, -> logits (N, classes), float32."""
    x = quantized.quantize(x, arrays["image"]["scale"], layers[0].x_zero_point)
    results: dict[str, jax.Array] = {}
    for layer in layers:
        x = results[layer.name] = _KINDS[layer.kind](layer, arrays[layer.name], x, results)
    return x


def compiled(network: Network) -> Callable[[jax.Array], jax.Array]:
    """The network as a jitted function of the images alone, its arrays constant as in `models.compiled`."""
    return jax.jit(lambda x: run(network.layers, network.arrays, x))


def _depthwise(layer, arrays, x, results):
    del results
    return quantized.depthwise_conv2d(
        x,
        arrays["kernel"],
        strides=layer.stride,
        scale=arrays["scale"],
        bias=arrays["bias"],
        clamp=layer.clamp,
        x_zero_point=layer.x_zero_point,
        out_zero_point=layer.out_zero_point,
    )


def _dense(layer, arrays, x, results):
    kernel = arrays["kernel"]
    if kernel.shape[:2] != (1, 1) or layer.stride != 1:
        x, kernel = as_pointwise(x, kernel, (layer.stride,) * 2, layer.x_zero_point)
    skip = {}
    if layer.skip:
        skip = {
            "residual": results[layer.skip],
            "residual_scale": arrays["skip_scale"],
            "residual_zero_point": layer.skip_zero_point,
        }
    return quantized.pointwise_conv(
        x,
        kernel,
        scale=arrays["scale"],
        bias=arrays["bias"],
        clamp=layer.clamp,
        out_zero_point=layer.out_zero_point,
        **skip,
    )


def _mean(layer, arrays, x, results):
    del results
    pixels = x.shape[1] * x.shape[2]
    sums = jnp.sum(x, axis=(1, 2), dtype=jnp.int32) - pixels * layer.x_zero_point
    return quantized.requantize(sums, arrays["scale"] / pixels, out_zero_point=layer.out_zero_point)


def _logits(layer, arrays, x, results):
    del layer, results
    sums = quantized.pointwise_conv(x, arrays["kernel"], bias=arrays["bias"])
    return quantized.dequantize(sums, arrays["scale"])


_KINDS = {"depthwise": _depthwise, "dense": _dense, "mean": _mean, "logits": _logits}


# Models ---------------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """A layer of a model, `skip` being the name of an earlier one whose result is added to its own."""

    name: str
    module: ConvNorm
    skip: str = ""


def _steps(model: nnx.Module) -> list[_Step]:
    """The convolutions of a model in the order of their calls; after them come the mean and the classifier."""
    if not isinstance(model, InvertedResidualNet | MobileNetV1):
        raise NetworkError(f"{type(model).__name__} cannot be quantised: it is no MobileNet or EfficientNet-Lite")
    steps = [_Step("stem", model.stem)]
    for index, block in enumerate(model.blocks):
        before = steps[-1].name
        if isinstance(block, InvertedResidual) and block.squeeze_excite is not None:
            raise NetworkError(f"{type(model).__name__} cannot be quantised: blocks.{index} has squeeze-and-excitation")
        for name in ("expand", "depthwise", "project", "pointwise"):
            if getattr(block, name, None) is not None:
                skip = before if name == "project" and block.residual else ""
                steps.append(_Step(f"blocks.{index}.{name}", getattr(block, name), skip))
    if isinstance(model, InvertedResidualNet):
        steps.append(_Step("head", model.head))
    for step in steps:
        if step.module.activation not in _ACTIVATIONS:
            raise NetworkError(f"{type(model).__name__} cannot be quantised: {step.name} has neither ReLU nor ReLU6")
    return steps


def inputs(model: nnx.Module, x: jax.Array) -> Iterator[tuple[str, jax.Array]]:
    """What enters each layer, by its name, and last the logits, under ""."""
    results: dict[str, jax.Array] = {}
    for step in _steps(model):
        yield step.name, x
        x = step.module(x)
        x = results[step.name] = x + results[step.skip] if step.skip else x
    yield "mean", x
    x = jnp.mean(x, axis=(1, 2))
    yield "classifier", x
    yield "", model.classifier(x)


# Calibration ----------------------------------------------------------------------------------------------------------


def calibrate(model: nnx.Module, images: np.ndarray, percentile: float = 100.0) -> dict[str, Range]:
    """The range of what enters each layer, for `quantize`.

    Args:
        model: as it was trained. It is not changed.
        images: (N, H, W, 3), floating, as the model takes them.
        percentile: the ends of a range are this percentile and its opposite, 100 for the least and the largest number.
            With less the outliers are clipped, and all others get a finer scale.

    Raises:
        NetworkError: the model cannot be quantised, or the images or the percentile are not as they should be.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3 or images.size == 0 or not np.issubdtype(images.dtype, np.floating):
        raise NetworkError(f"calibration needs floating images (N, H, W, 3), got {images.dtype} {images.shape}")
    if not np.isfinite(images).all():
        raise NetworkError("calibration needs finite images")
    if not 50 < percentile <= 100:
        raise NetworkError(f"percentile must be above 50 and at most 100, got {percentile}")
    names = [*(step.name for step in _steps(model)), "mean", "classifier"]
    model = nnx.clone(model)
    model.eval()
    graphdef, state = nnx.split(model)
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]

    def observe(function, *further):
        """function(input, *further) of every layer, a list for each batch."""

        @jax.jit
        def observed(state, x, *further):
            entering = dict(inputs(nnx.merge(graphdef, state), x))
            return [function(entering[name], *f) for name, *f in zip(names, *further, strict=True)]

        return [jax.device_get(observed(state, batch, *further)) for batch in batches]

    moments = observe(lambda a: (a.min(), a.max(), a.mean(range(a.ndim - 1))))
    lows, highs, means = zip(*(zip(*layer, strict=True) for layer in zip(*moments, strict=True)), strict=True)
    lows, highs = [min(low) for low in lows], [max(high) for high in highs]
    means = [np.average(mean, axis=0, weights=[len(batch) for batch in batches]) for mean in means]
    if percentile < 100:
        counts = [sum(layer) for layer in zip(*observe(_histogram, lows, highs), strict=True)]
        ends = [_percentiles(*layer, percentile) for layer in zip(counts, lows, highs, strict=True)]
        lows, highs = zip(*ends, strict=True)
    return {
        name: Range(float(low), float(high), mean)
        for name, low, high, mean in zip(names, lows, highs, means, strict=True)
    }


def _histogram(a: jax.Array, low, high) -> jax.Array:
    bins = ((a.ravel() - low) * (BINS / jnp.maximum(high - low, 1e-30))).astype(jnp.int32)
    return jnp.zeros(BINS, jnp.int32).at[jnp.clip(bins, 0, BINS - 1)].add(1)


def _percentiles(count: np.ndarray, low: float, high: float, percentile: float) -> tuple[float, float]:
    """Edges of bins that leave out no more than the percentile says."""
    edges = np.linspace(low, high, BINS + 1)
    below = np.cumsum(count, dtype=np.int64) / count.sum(dtype=np.int64)
    first = np.searchsorted(below, 1 - percentile / 100, side="right")
    return edges[first], edges[1 + np.searchsorted(below, percentile / 100)]


def qwix_ranges(model: nnx.Module) -> dict[str, Range]:
    """Ranges for `quantize` from the statistics that qwix has collected in a model of `conv="flax"`.

    With a rule of static, asymmetric activations, calls of the quantised model are its calibration:

        rule = qwix.QtRule(
            weight_qtype="int8", act_qtype="int8", act_static_scale=True, act_calibration_method="minmax"
        )
        observed = qwix.quantize_model(model, qwix.QtProvider([rule]), images)
        observed(images)
        network = quantize(model, qwix_ranges(observed))

    Raises:
        NetworkError: the model has no such statistics.
    """
    ranges = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        statistics = variable.get_value()
        if isinstance(statistics, dict) and {"count", "sum_of_min", "sum_of_max"} <= statistics.keys():
            name = ".".join(str(part) for part in path[:-1] if part != "conv")
            count = np.maximum(statistics["count"], 1)
            ranges[name] = Range(*(float((statistics[f"sum_of_{end}"] / count).squeeze()) for end in ("min", "max")))
    if not ranges:
        raise NetworkError("the model has no statistics of qwix with a minimum and a maximum")
    # qwix sees convolutions and products only; the mean takes what ReLU6 gives.
    return {"mean": Range(0.0, 6.0)} | ranges


# Quantisation ---------------------------------------------------------------------------------------------------------


def quantize(model: nnx.Module, ranges: Mapping[str, Range]) -> Network:
    """The int8 network of a trained model.

    Args:
        model: as it was trained. It is not changed.
        ranges: of what enters each layer, by its name; see `calibrate`.

    Raises:
        NetworkError: the model cannot be quantised, or a range is missing or not as it should be.
    """
    names = [*(step.name for step in _steps(model)), "mean", "classifier"]
    if missing := [name for name in names if name not in ranges]:
        raise NetworkError(f"ranges are missing: {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}")
    encodings = {}
    for name in names:
        try:
            encodings[name] = quantized.scale_and_zero_point(*ranges[name][:2])
        except (ValueError, TypeError) as error:
            raise NetworkError(f"the range of {name} is not as it should be: {error}") from None
    folded, report = inference.fold(model, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    if report.left:
        raise NetworkError("batch normalisation cannot be folded: " + ": ".join(report.left[0]))
    arrays = {"image": {"scale": jnp.float32(encodings[names[0]][0])}}
    layers = []
    for step, following in zip(_steps(folded), names[1:], strict=False):
        conv = step.module.conv
        skip = names[names.index(step.skip) + 1] if step.skip else None  # what it enters
        skip_scale, skip_zero_point = encodings[skip] if skip else (0.0, 0)
        scale, zero_point = encodings[following]
        x_scale, x_zero_point = encodings[step.name]
        kind = "dense" if conv.feature_group_count == 1 else "depthwise"
        offset = x_zero_point if kind == "dense" else 0
        arrays[step.name], x_scale = _parameters(conv, x_scale, offset, ranges[step.name], 255 * skip_scale)
        if skip:
            arrays[step.name]["skip_scale"] = skip_scale / x_scale
        arrays[step.name]["scale"] = x_scale / scale
        limits = (limit / scale + zero_point for limit in _ACTIVATIONS[step.module.activation])
        layers.append(
            Layer(
                step.name,
                kind,
                conv.strides[0] if isinstance(conv.strides, tuple) else conv.strides,
                x_zero_point,
                zero_point,
                tuple(int(np.clip(np.rint(limit), -128, 127)) for limit in limits),
                step.skip,
                skip_zero_point,
            )
        )
    (mean_scale, mean_zero_point), (x_scale, x_zero_point) = encodings["mean"], encodings["classifier"]
    arrays["mean"] = {"scale": jnp.float32(mean_scale / x_scale)}
    arrays["classifier"], scale = _parameters(model.classifier, x_scale, x_zero_point, ranges["classifier"])
    arrays["classifier"]["scale"] = scale
    layers.append(Layer("mean", "mean", x_zero_point=mean_zero_point, out_zero_point=x_zero_point))
    layers.append(Layer("classifier", "logits", x_zero_point=x_zero_point))
    return Network(arrays, tuple(layers))


def _parameters(layer, x_scale: float, x_zero_point: int, entering: Range, largest_skip: float = 0.0):
    """Kernel and bias of a layer, and the scales of its sums of x, not x - x_zero_point, times kernel."""
    _, _, mean, *_ = (*entering, None)
    return _rounded(layer.kernel[...], layer.bias[...], x_scale, x_zero_point, mean, largest_skip)


@jax.jit
def _rounded(real, bias, x_scale, x_zero_point, mean, largest_skip):
    # Channels that training has switched off have tiny kernels, but not tiny biases.
    least = jnp.maximum(jnp.abs(bias), largest_skip) / (x_scale * LARGEST_INTEGER)
    kernel, scale = quantized.quantize_kernel(real, least)
    if mean is not None:
        error = (quantized.dequantize(kernel, scale) - real).reshape(-1, *real.shape[-2:]).sum(0)  # (C or 1, F)
        bias -= (mean * error if len(error) == 1 else mean @ error).ravel()
    scale *= x_scale
    offset = x_zero_point * kernel.sum(range(kernel.ndim - 1), dtype=jnp.int32)
    return {"kernel": kernel, "bias": jnp.round(bias / scale).astype(jnp.int32) - offset}, scale


# Files ----------------------------------------------------------------------------------------------------------------


def to_bytes(network: Network) -> bytes:
    """The content of a safetensors file: the arrays as `layer.array`, and the layers as JSON in the metadata."""
    from safetensors import numpy as safetensors  # noqa: PLC0415  (nothing else needs it)

    tensors = {
        f"{layer}.{name}": np.asarray(a) for layer, arrays in network.arrays.items() for name, a in arrays.items()
    }
    # One entry: the order of several is not always the same.
    return safetensors.save(tensors, {"network": json.dumps({"format": _FORMAT, "layers": network.layers})})


def load(path: Path) -> Network:
    """The network in a file that `to_bytes` is the content of.

    Raises:
        NetworkError: the file cannot be read, or holds no such network.
    """
    import safetensors  # noqa: PLC0415  (nothing else needs it)

    try:
        with safetensors.safe_open(path, "numpy") as file:
            names, metadata = file.keys(), file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names}
    except OSError as error:
        raise NetworkError(f"{path}: cannot read: {error.strerror or error}") from None
    except safetensors.SafetensorError as error:
        raise NetworkError(f"{path}: not a safetensors file: {error}") from None
    arrays: dict[str, dict[str, jax.Array]] = {}
    for name, tensor in tensors.items():
        layer, _, array = name.rpartition(".")
        arrays.setdefault(layer, {})[array] = jnp.asarray(tensor)
    try:
        description = json.loads(metadata["network"])
        if description["format"] != _FORMAT:
            raise ValueError(f"of another format, {description['format']!r}")
        layers = tuple(Layer(*fields)._replace(clamp=tuple(fields[5])) for fields in description["layers"])
        image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        logits = jax.eval_shape(functools.partial(run, layers), arrays, image)
    except (ValueError, TypeError, LookupError) as error:
        raise NetworkError(f"{path}: it holds no int8 network: {error!r}"[:200]) from None
    if logits.ndim != 2 or logits.dtype != jnp.float32:
        raise NetworkError(f"{path}: its network gives {logits.dtype} {logits.shape}, and no logits")
    return Network(arrays, layers)
