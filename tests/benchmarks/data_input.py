"""Input without a network behind it: images/s that are read, decoded, augmented and batched to uint8 (224, 224, 1).

    python data_input.py --of workbench --encoding raw --use training --cores 1    # or png, jpeg; or evaluation
    python data_input.py --of authors     # TensorFlow decodes a 1024 x 1024 PNG and resizes it to 256 at every step
    python data_input.py --of memory      # the workbench's augmentation alone, of pixels that are in memory already

The shards hold 1,024 radiographs at 256 pixels, read over and over under other names, so they are on a local disk and
in its cache. The answer has the bytes of an image beside the images/s.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
from data_files import image_files, pin, rate
from party import serve

STORED, SIZE, IMAGES, TIMES = 256, 224, 1024, 128


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--of", choices=("workbench", "authors", "memory"), default="workbench")
    parser.add_argument("--encoding", choices=("raw", "png", "jpeg"), default="raw")
    parser.add_argument("--use", choices=("training", "evaluation"), default="training")
    for name, default in (("cores", 1), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seconds", type=float, default=3.0)
    asked = parser.parse_args()
    pin(asked.cores)
    with tempfile.TemporaryDirectory() as temporary:
        build, images_in_advance, extra = globals()[f"prepare_{asked.of}"](Path(temporary), asked)
        epochs = iter(range(sys.maxsize))

        def measure() -> dict:
            value = rate(build(next(epochs)), asked.batch, warm=images_in_advance, seconds=asked.seconds)
            return {"value": value} | extra

        measure()
        serve(measure)


def prepare_workbench(folder: Path, asked: argparse.Namespace):
    from workbench.data import pipeline

    shard_folder, size = write_shards(folder, asked.encoding)
    shape = {"image_size": SIZE, "batch_size": asked.batch, "threads": asked.cores}

    def build(epoch: int):
        if asked.use == "training":
            return pipeline.build_training(shard_folder, seed=0, epoch=epoch, **shape)
        return pipeline.build_evaluation(shard_folder, "train", **shape)

    # The blocks that training shuffles are read ahead: start the clock when they are full.
    return build, 4096, {"bytes_per_image": size}


def write_shards(folder: Path, encoding: str) -> tuple[Path, float]:
    """Shards of 1,024 radiographs, named 128 times over in info.json; and the bytes of a record."""
    import pandas as pd

    from workbench.data import shards

    paths = (image_files(STORED, folder) * IMAGES)[:IMAGES]
    table = {"image": [f"{number:08d}_000.png" for number in range(IMAGES)], "path": paths, "patient": range(IMAGES)}
    frame = pd.DataFrame(table | {"split": "train"} | {f"finding {number}": 0 for number in range(14)})
    info = shards.write_shards(
        frame, folder / "shards", image_size=STORED, encoding=encoding, processes=1, progress=False
    )
    train = info["splits"]["train"]
    size = sum(shard["bytes"] for shard in train["shards"]) / IMAGES
    train |= {"images": IMAGES * TIMES, "shards": train["shards"] * TIMES}
    (folder / "shards" / "info.json").write_text(json.dumps(info))
    return folder / "shards", size


def prepare_authors(folder: Path, asked: argparse.Namespace):
    import tensorflow as tf

    paths = image_files(1024, folder)

    def load(path):
        image = tf.io.decode_png(tf.io.read_file(path), channels=1)
        image = tf.image.random_crop(tf.image.resize(image, [STORED, STORED]), [SIZE, SIZE, 1])
        image = tf.image.random_contrast(tf.image.random_flip_left_right(image), 0.9, 1.1)
        return tf.saturate_cast(tf.image.random_brightness(image, 13.0), tf.uint8)

    def build(epoch: int):
        files = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths), seed=epoch).repeat()
        return files.map(load, num_parallel_calls=asked.cores).batch(asked.batch, drop_remainder=True).prefetch(2)

    return build, asked.batch, {}


def prepare_memory(folder: Path, asked: argparse.Namespace):
    import numpy as np
    import tensorflow as tf

    from workbench.data import pipeline, radiographs

    paths = image_files(STORED, folder)[:IMAGES]
    pixels = tf.constant(np.stack([radiographs.read_radiograph(path) for path in paths]))

    def build(epoch: int):
        draws = pipeline.draw_augmentation(len(paths), margin=STORED - SIZE, seed=0, epoch=epoch)
        rows = tf.data.Dataset.range(len(paths)).repeat().batch(asked.batch, drop_remainder=True)

        def prepare(rows):
            return pipeline.change_images(tf.gather(pixels, rows), tf.gather(draws, rows), image_size=SIZE)

        return rows.map(prepare, num_parallel_calls=asked.cores).prefetch(2)

    return build, asked.batch, {}


if __name__ == "__main__":
    main()
