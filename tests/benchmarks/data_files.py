"""What the sides of the data benchmarks share: the image files that they read, the cores they run on, and a clock.

The files are NIH's own from the sample beside the project; without it made-up ones that compress about as well
(smooth shapes under noise, 3 bits a pixel), so that decoding costs about as much. Needs NumPy and Pillow only, since
it also runs in the peers' environment.
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

NIH = Path(__file__).resolve().parents[2].parent / "shared" / "nih"
FOLDERS = {1024: "images", 256: "images_256"}


def image_files(size: int, folder: Path, *, count: int = 150) -> list[str]:
    """Paths of the real files of that size, or of as many made-up ones, written into `folder`."""
    real = sorted((NIH / FOLDERS[size]).glob("*.png"))
    for number in range(0 if real else count):
        rng = np.random.default_rng(number)
        shapes = Image.fromarray(rng.integers(40, 216, (8, 8), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        pixels = np.clip(np.asarray(shapes) + rng.normal(0, 1.5, (size, size)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:08d}_000.png")
    return [str(path) for path in real or sorted(folder.glob("*.png"))]


def pin(cores: int) -> None:
    """Keep this process, and the threads and processes that it will start, on that many cores; before TensorFlow."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def rate(batches: Iterable, batch_size: int, *, warm: int, seconds: float) -> float:
    """Images per second while the stream runs: from the batch after `warm` images until `seconds` have passed."""
    iterator = iter(batches)
    for _ in range(-(-warm // batch_size)):
        next(iterator)
    began, count = time.perf_counter(), 0
    for _ in iterator:
        count += batch_size
        if (passed := time.perf_counter() - began) >= seconds:
            return count / passed
    raise SystemExit(f"The stream ended after {count} images, before {seconds} s had passed: give it more images.")
