"""The peer in input: PyTorch's DataLoader over the same 256-pixel radiographs, with the same augmentation and batches.

Runs in the peers' own environment. Each image is decoded by Pillow, cropped, flipped, and changed in contrast and
brightness by a table of 256 grey levels, the cheapest of the ways that were tried.

    python data_input_torch.py --cores 1 --workers 0         # no worker: the fastest on one core
    python data_input_torch.py --cores 2 --workers 2
    python data_input_torch.py --files raw                   # pixels of one file in memory-mapped bytes, no decoding
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from data_files import image_files, pin, rate
from party import serve
from PIL import Image
from torch.utils.data import DataLoader, Dataset

STORED, SIZE = 256, 224


class Radiographs(Dataset):
    def __init__(self, paths: list[str], packed: Path | None):
        self.paths, self.labels = paths, torch.zeros(14)
        self.pixels = None
        if packed:
            np.stack([np.asarray(Image.open(path)) for path in paths]).tofile(packed)
            self.pixels = np.memmap(packed, np.uint8, "r", shape=(len(paths), STORED, STORED))

    def __len__(self) -> int:
        return len(self.paths) * 1000

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        index %= len(self.paths)
        pixels = np.asarray(Image.open(self.paths[index])) if self.pixels is None else self.pixels[index]
        top, left, flip, contrast, brightness = torch.rand(5).tolist()
        top, left = int(top * (STORED - SIZE + 1)), int(left * (STORED - SIZE + 1))
        part = pixels[top : top + SIZE, left : left + SIZE]
        part = part[:, ::-1] if flip < 0.5 else part
        levels = (np.arange(256) - 128) * (0.9 + 0.2 * contrast) + 128 + 26 * (brightness - 0.5)
        return torch.from_numpy(np.take(levels.clip(0, 255).astype(np.uint8), part)[None]), self.labels


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", choices=("png", "raw"), default="png")
    for name, default in (("cores", 1), ("workers", 0), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=3.0)
    asked = parser.parse_args()
    pin(asked.cores)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = image_files(STORED, Path(folder))
        radiographs = Radiographs(paths, Path(folder) / "pixels" if asked.files == "raw" else None)
        batches = DataLoader(radiographs, asked.batch, shuffle=True, num_workers=asked.workers, drop_last=True)

        def measure() -> float:
            return rate(batches, asked.batch, warm=16 * asked.batch, seconds=asked.seconds)

        measure()
        serve(measure)


if __name__ == "__main__":
    main()
