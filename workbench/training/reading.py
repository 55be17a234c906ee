"""A trained run reads image files: the same pixels, the same network, the same scores as in its predictions.

with cluster.start(1) as ranks:
    answer = ranks.run("workbench.training.reading.read_files", "results/first", ["chest.dcm"])[0]
answer["scores"]                 # a data frame: a row a file, a column a finding, in [0, 1], not calibrated
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import numpy as np
import pandas as pd
import tensorflow as tf

from workbench import WorkbenchError
from workbench.data import pipeline, radiographs
from workbench.training import gradcam, network, trainer


def read_files(
    run_folder: str | os.PathLike,
    files: Sequence[str | os.PathLike],
    *,
    heat_maps: bool = False,
    batch_size: int = 16,
    tell: Callable[[int], None] | None = None,
) -> dict:
    """Read files with a run's network.

    Args:
        run_folder: a run that has `model.keras`.
        files: PNG, JPEG or DICOM.
        heat_maps: compute one for the likeliest finding of each file as well.
        batch_size: files read and scored together.
        tell: called with the number of files read so far.

    Returns:
        `scores`: (n, K) by file and finding, in [0, 1], for the files that could be read; `refused`: file -> why it
        could not be; `radiographs`: uint8 (n, S, S), what the network saw; with heat_maps `maps`, float32 (n, h, w) in
        [0, 1], and `mapped`, the findings (n,) that they are for.

    Raises:
        WorkbenchError: the run has no model, or one that does not say what it finds.
    """
    path = Path(run_folder) / "model.keras"
    told = network.describe_network(path)
    findings, size = told["findings"], told["image_size"]
    model = network.read_network(path, findings=findings, image_size=size)
    predict_step = trainer.build_predict_step(model)
    seen, names, scores, refused = [], [], [], {}
    for start in range(0, len(files), batch_size):
        batch = []
        for file in files[start : start + batch_size]:
            try:
                batch.append(prepare_radiograph(file, told))
                names.append(str(file))
            except WorkbenchError as error:
                refused[str(file)] = str(error)
        if batch:
            seen.extend(batch)
            scores.append(predict_step(tf.constant(np.stack(batch)))[: len(batch)].numpy())
        if tell:
            tell(min(start + batch_size, len(files)))
    pixels = np.array(seen, np.uint8).reshape(len(seen), size, size, 1)
    table = pd.DataFrame(np.concatenate([np.zeros((0, len(findings))), *scores]), index=names, columns=findings)
    answer = {"scores": table.rename_axis("file"), "refused": refused, "radiographs": pixels[..., 0]}
    if heat_maps and len(table):
        likeliest = table.to_numpy().argmax(axis=1)
        answer |= {"maps": gradcam.heat_maps(model, pixels, likeliest), "mapped": [findings[k] for k in likeliest]}
    return answer


def prepare_radiograph(file: str | os.PathLike, told: dict) -> np.ndarray:
    """One file as the network sees it: uint8 (S, S, 1); resized and, if shards were lossy, encoded as they were."""
    radiographs.refuse_colour(file)
    stored = radiographs.resize_radiograph(radiographs.read_radiograph(file), told["stored_size"])
    if told["encoding"] == "jpeg":
        encoded = radiographs.encode_pixels(stored, "jpeg")
        stored = tf.io.decode_image(encoded, channels=1, expand_animations=False).numpy()[..., 0]
    return np.asarray(pipeline.crop_centre(stored[None], image_size=told["image_size"]))[0]
