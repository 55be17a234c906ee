"""Writing shards of 256 pixels from 1024 x 1024 PNGs: images/s.

    python data_write.py --of workbench --processes 1        # on one core; with 2 on two
    python data_write.py --of pillow                         # a plain loop: open, grey, resize, write

Both write the same records with TensorFlow's writer, on as many cores as processes. The answer has the largest memory
of a process (MiB) beside the images/s.
"""

import argparse
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
from data_files import image_files, pin
from party import serve

SIZE = 256


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--of", choices=("workbench", "pillow"), default="workbench")
    for name, default in (("processes", 1), ("images", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    pin(asked.processes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "originals").mkdir()
        paths = (image_files(1024, folder / "originals") * asked.images)[: asked.images]
        write = globals()[f"write_{asked.of}"]

        def measure() -> dict:
            began = time.perf_counter()
            write(paths, folder / "shards", asked.processes)
            value = len(paths) / (time.perf_counter() - began)
            shutil.rmtree(folder / "shards")
            used = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            return {"value": value, "mebibytes": max(used) // 1024}

        measure()
        serve(measure)


def write_workbench(paths: list[str], folder: Path, processes: int) -> None:
    import pandas as pd

    from workbench.data import shards

    table = {"image": [f"{number:08d}_000.png" for number in range(len(paths))], "path": paths, "patient": 1}
    frame = pd.DataFrame(table | {"split": "train"} | {f"finding {number}": 0 for number in range(14)})
    shards.write_shards(frame, folder, image_size=SIZE, processes=processes, progress=False)


def write_pillow(paths: list[str], folder: Path, processes: int) -> None:
    import tensorflow as tf
    from PIL import Image

    folder.mkdir()
    for shard in range(0, len(paths), 256):
        with tf.io.TFRecordWriter(str(folder / f"{shard}.tfrecord")) as writer:
            for row, path in enumerate(paths[shard : shard + 256], shard):
                image = Image.open(path).convert("L").resize((SIZE, SIZE), Image.Resampling.BOX).tobytes()
                feature = {
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
                    "labels": tf.train.Feature(bytes_list=tf.train.BytesList(value=[bytes(14)])),
                    "row": tf.train.Feature(int64_list=tf.train.Int64List(value=[row])),
                }
                example = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(example.SerializeToString())


if __name__ == "__main__":
    main()
