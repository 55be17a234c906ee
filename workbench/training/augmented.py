"""Predictions averaged over several views of each radiograph, on the workers: test-time augmentation.

Every view goes through the network of the kept epoch, and the scores are averaged. "flip" takes the centre crop and
its mirror image; "ten-crop" the four corners and the centre out of what is stored around them, each with its mirror
image (Krizhevsky et al. 2012). Whether it gained anything is for `workbench.analysis` to say, with an interval.

    with cluster.start(workers=2) as ranks:          # writes results/<run>/predictions-test-flip.csv
        ranks.run("workbench.training.augmented.predict_augmented", config, folder, "test", "flip")
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras
import tensorflow as tf

from workbench import WorkbenchError
from workbench.data import pipeline, shards
from workbench.training import distributed, network, skipping, trainer
from workbench.training.config import TrainConfig

KINDS = ("flip", "ten-crop")


@skipping.damaged_records
def predict_augmented(config: TrainConfig, run_folder: str | os.PathLike, split: str, kind: str) -> dict:
    """Predict a split with the mean score over the views, and write `predictions-<split>-<kind>.csv`.

    Args:
        config: the run's settings, equal on all ranks.
        run_folder: a run that has `model.keras`.
        split: "train", "val" or "test".
        kind: one of `KINDS`.

    Returns:
        On every rank: images, views (of each), and mean_auroc of the averaged scores.

    Raises:
        WorkbenchError: an unknown kind, no room for ten crops, or a model that does not fit the shards.
    """
    folder, world = Path(run_folder), distributed.start(config.threads)
    info = shards.read_info(config.shard_folder, findings=list(config.findings) or None)
    _check_kind(kind, config, info["image_size"])
    model = network.read_network(folder / "model.keras", findings=info["findings"], image_size=config.image_size)
    step = build_augmented_step(model, kind)
    # Whole as stored; the views are cut out of that.
    stored = replace(config, image_size=info["image_size"])
    labels, scores, rows = trainer.predict(step, stored, split, world)
    # Horovod: all ranks hold the same, so one of them writes.
    if world.rank == 0:
        images = shards.read_images(config.shard_folder).set_index("row").loc[rows]
        trainer.write_predictions(folder, f"{split}-{kind}", labels, scores, info["findings"], images)
    views = 2 if kind == "flip" else 10
    return {"images": len(rows), "views": views, "mean_auroc": trainer.mean_auroc(labels, scores)}


def build_augmented_step(model: keras.Model, kind: str) -> Callable:
    """A compiled prediction: radiographs as stored, (B, S, S, 1) uint8, to mean scores (B, K) float32 in [0, 1]."""
    predict, size = trainer.build_predict_step(model), model.input_shape[1]

    # One view after another: all ten at once would need ten times the memory.
    @tf.function(reduce_retracing=True)
    def step(stored):
        views = cut_views(stored, kind, image_size=size)
        return tf.add_n([predict(view) for view in views]) / len(views)

    return step


def cut_views(stored: tf.Tensor, kind: str, *, image_size: int) -> list[tf.Tensor]:
    """The views of radiographs (B, S, S, 1): each (B, image_size, image_size, 1), the mirror images last."""
    centre = pipeline.crop_centre(stored[..., 0], image_size=image_size)
    views = [centre]
    if kind == "ten-crop":
        # The last rows or columns, whatever is stored beyond the size.
        first, last = slice(None, image_size), slice(-image_size, None)
        views += [stored[:, rows, columns] for rows in (first, last) for columns in (first, last)]
    return views + [view[:, :, ::-1] for view in views]


def _check_kind(kind: str, config: TrainConfig, stored_size: int) -> None:
    if kind not in KINDS:
        raise WorkbenchError(f"There is no test-time augmentation `{kind}`: choose one of {', '.join(KINDS)}.")
    if kind == "ten-crop" and stored_size <= config.image_size:
        raise WorkbenchError(
            f"The shards in {config.shard_folder} hold images of {stored_size} pixels, no larger than the network's "
            f"{config.image_size}, so all crops are the same: write shards with a margin, or choose flip."
        )
