"""A classification task of real images that need no download: which picture does a crop come from?

The pictures are photographs and textures inside scikit-image's wheel. Of each, a strip on the right is held out: no
pixel of it is ever trained on.
"""

import importlib.resources
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

TASKS = {
    "textures": ("brick.png", "grass.png", "gravel.png"),
    "pictures": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
}
SIZES = range(32, 225)
HELD_OUT = 0.3  # of the width, or as wide as a crop where that is more

T = TypeVar("T")


class Batch(NamedTuple):
    """Crops (N, size, size, 3) in uint8, and the number of the picture of each, (N,) int32."""

    images: np.ndarray
    labels: np.ndarray


class Crops:
    """Random crops of one part of the pictures, turned over half of the time. A batch depends on seed and index alone.

    Args:
        parts: (H, W, 3) uint8, one for each class.
        size: side of the crops.
        batch: number of crops in a batch.
        seed: of the choice of the crops.
        rows: which ones of each batch to make.
    """

    def __init__(
        self, parts: list[np.ndarray], size: int, batch: int, seed: tuple[int, ...], rows: slice = slice(None)
    ):
        self.parts, self.size, self.batch, self.seed, self.rows = parts, size, batch, seed, rows

    def __call__(self, index: int) -> Batch:
        """The batch of this index, or the rows of it."""
        rng = np.random.default_rng((*self.seed, index))
        labels = rng.integers(len(self.parts), size=self.batch, dtype=np.int32)
        places, turned = rng.random((self.batch, 2)), rng.random(self.batch) < 0.5
        labels, places, turned = labels[self.rows], places[self.rows], turned[self.rows]
        images = np.empty((len(labels), self.size, self.size, 3), np.uint8)
        for image, label, place, turn in zip(images, labels, places, turned, strict=True):
            part = self.parts[label]
            top, left = (int(p * (n - self.size + 1)) for p, n in zip(place, part.shape, strict=False))
            crop = part[top : top + self.size, left : left + self.size]
            image[...] = crop[:, ::-1] if turn else crop
        return Batch(images, labels)


def data_folder() -> Path:
    """Where the installed scikit-image has its pictures."""
    return Path(str(importlib.resources.files("skimage"))) / "data"


def load_parts(task: str, size: int) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """The classes' names, and the parts of the pictures to train on and to hold out, (H, W, 3) uint8."""
    names, training, held_out = [], [], []
    for name in TASKS[task]:
        picture = np.asarray(Image.open(data_folder() / name).convert("RGB"))
        width = picture.shape[1] - max(size, round(HELD_OUT * picture.shape[1]))
        names.append(Path(name).stem)
        training.append(picture[:, :width])
        held_out.append(picture[:, width:])
    return names, training, held_out


def prefetch(make: Callable[[int], T], indices: Iterator[int], threads: int = 4) -> Iterator[T]:
    """`make` of each index, in order, made by threads ahead of the loop that takes them."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="crops")
    try:
        ahead = deque(pool.submit(make, index) for index in itertools.islice(indices, 2 * threads))
        while ahead:
            made = ahead.popleft().result()
            ahead.extend(pool.submit(make, index) for index in itertools.islice(indices, 1))
            yield made
    finally:
        pool.shutdown(cancel_futures=True)
