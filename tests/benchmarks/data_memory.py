"""Memory of the input pipeline: MiB by which a process grows at most while it reads an epoch of so many shards.

    python data_memory.py --shards 100       # and with 1000: the answer should hardly grow with it

Ten different shards of 64 random raw images of 256 pixels are written, and named over and over in info.json.
"""

import argparse
import json
import os
import resource
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import numpy as np
import pandas as pd
import psutil
from party import serve
from PIL import Image

from workbench.data import pipeline, shards


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=100)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shards"
        paths = [str(Path(temporary) / f"{number:08d}_000.png") for number in range(640)]
        for number, path in enumerate(paths):
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (256, 256), np.uint8)).save(path)
        frame = pd.DataFrame({"image": paths, "path": paths, "patient": 1, "split": "train", "Mass": 0})
        info = shards.write_shards(frame, folder, image_size=256, images_per_shard=64, processes=1, progress=False)
        train = info["splits"]["train"]
        train |= {"images": 64 * asked.shards, "shards": train["shards"] * (asked.shards // 10)}
        (folder / "info.json").write_text(json.dumps(info))
        shape = {"image_size": 224, "batch_size": 16, "seed": 0}
        next(iter(pipeline.build_training(folder, epoch=0, **shape)))
        before = psutil.Process().memory_info().rss

        def measure() -> float:
            for _ in pipeline.build_training(folder, epoch=1, **shape):
                pass
            return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20

        serve(measure)


if __name__ == "__main__":
    main()
