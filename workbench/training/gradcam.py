"""Where a network looks: Grad-CAM heat maps, for one batch here or for many requests on the workers.

Selvaraju et al. 2017 (arXiv:1610.02391): the channels of the last feature map are added up, each weighted by the
mean gradient of one finding's logit, and what is negative is cut off. For a network that ends in global average
pooling and a dense layer, as ours do, that is the class activation map of Zhou et al. 2016. Scoring the maps against
boxes is `workbench.analysis.localisation`'s, which reads the file written here and needs no TensorFlow.

    maps = heat_maps(model, radiographs, columns=[8, 8, 0])      # (3, 224, 224, 1) uint8 -> (3, 7, 7) float32
    with cluster.start(workers=2) as ranks:                      # writes results/<run>/heatmaps.npz
        ranks.run("workbench.training.gradcam.write_heat_maps", config, folder, [("00000032_037.png", "Mass")])
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from workbench import WorkbenchError
from workbench.data import pipeline, shards
from workbench.files import written_whole
from workbench.training import distributed, network
from workbench.training.config import TrainConfig
from workbench.training.pulse import beat


def heat_maps(
    model: keras.Model,
    radiographs: np.ndarray,
    columns: Sequence[int],
    *,
    rectify: bool = True,
    batch_size: int = 32,
) -> np.ndarray:
    """Compute one heat map for each radiograph.

    Args:
        model: a functional Keras model (models may be nested in it) that ends in a dense layer, alone or followed
            by a sigmoid, over the pooled or flattened last feature map.
        radiographs: (n, H, W, 1) uint8, or whatever the model takes.
        columns: for each radiograph the output that is explained, n numbers from 0.
        rectify: True cuts off what is negative, as Grad-CAM does; then a low score mostly has a map of zeros, since
            nothing speaks for the finding. False scales each map from its coldest place to its hottest, as Wang et
            al. 2017 do with theirs, so that every map says where the evidence is strongest or least against.
        batch_size: radiographs computed at once.

    Returns:
        (n, h, w) float32 at the size of the last feature map, in [0, 1], the hottest place of each map 1;
        all zero where nothing speaks for the finding (or, not rectified, where all places are alike).

    Raises:
        WorkbenchError: the model has no such end, or a column that it does not have.
    """
    return explain(model, radiographs, columns, rectify=rectify, batch_size=batch_size)[0]


def explain(
    model: keras.Model,
    radiographs: np.ndarray,
    columns: Sequence[int],
    *,
    rectify: bool = True,
    batch_size: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """`heat_maps`, and the score of each radiograph's finding: (n,) float32 in [0, 1]."""
    columns = np.asarray(columns, np.int32)
    findings = model.output_shape[-1]
    if len(columns) != len(radiographs) or not ((columns >= 0) & (columns < findings)).all():
        raise WorkbenchError(
            f"The columns {columns.tolist()[:8]} do not fit {len(radiographs)} radiographs and a model of {findings} "
            "findings: expected one for each radiograph, from 0."
        )
    step, (height, width) = build_heat_map_step(model, rectify=rectify)
    maps, scores = [np.zeros((0, height, width), np.float32)], [np.zeros(0, np.float32)]
    for start in range(0, len(columns), batch_size):
        beat(f"heat maps {start + 1} and on of {len(columns)}")
        part = slice(start, start + batch_size)
        made, score = step(tf.convert_to_tensor(radiographs[part]), tf.convert_to_tensor(columns[part]))
        maps.append(made.numpy())
        scores.append(score.numpy())
    return np.concatenate(maps), np.concatenate(scores)


def build_heat_map_step(model: keras.Model, *, rectify: bool = True) -> tuple[Callable, tuple[int, int]]:
    """A compiled step, (B, H, W, 1) and (B,) columns to maps (B, h, w) and scores (B,); and height and width h, w."""
    bodies, head = split_network(model)
    head = _in_float32(head)

    @tf.function(reduce_retracing=True)
    def step(radiographs, columns):
        features = radiographs
        for body in bodies:
            features = body(features, training=False)
        # In float32 from here on: in float16 the small gradients of a large map would vanish.
        features = tf.cast(features, tf.float32)
        with tf.GradientTape() as tape:
            tape.watch(features)
            # The logit, not the score: the sigmoid's slope is 0 where the network is sure.
            logits = tf.gather(_logits(head, features), columns, batch_dims=1)
        # The network is in inference, so no radiograph's logit depends on another's features.
        weights = tf.reduce_mean(tape.gradient(logits, features), axis=(1, 2), keepdims=True)
        maps = tf.reduce_sum(weights * features, axis=-1)
        maps = tf.nn.relu(maps) if rectify else maps - tf.reduce_min(maps, axis=(1, 2), keepdims=True)
        return tf.math.divide_no_nan(maps, tf.reduce_max(maps, axis=(1, 2), keepdims=True)), tf.sigmoid(logits)

    return step, tuple(bodies[-1].output_shape[1:3])


def split_network(model: keras.Model) -> tuple[list[keras.Model], list]:
    """Cut a network at its last feature map.

    Returns:
        Models which, one after another, lead from the input to the feature map (B, h, w, C), and the operations from
        there to the output, the last of them the dense layer or a sigmoid after it. Nothing is copied or changed.

    Raises:
        WorkbenchError: on the way back from the output the path forks, or comes to the input.
    """
    bodies, head = _split(model)
    dense = head[:-1] if head and _is_sigmoid(head[-1]) else head
    if not bodies or not dense or not isinstance(dense[-1], keras.layers.Dense):
        raise WorkbenchError(
            f"The model {model.name} has no feature map followed by pooling and a dense layer, so there is no Grad-CAM "
            f"of it: use one of {', '.join(network.NETWORKS)}."
        )
    return bodies, head


def _split(model: keras.Model) -> tuple[list[keras.Model], list]:
    tensor, head = model.outputs[0], []
    while len(tensor.shape) != 4:
        operation, inputs = _made_by(tensor)
        if len(inputs) != 1:
            return [], head
        if isinstance(operation, keras.Model) and len(inputs[0].shape) == 4:
            # A network inside the network: the feature map is in there, unless it only pools.
            inner, inner_head = _split(operation)
            head, tensor = inner_head + head, inputs[0]
            return [*_body(model, tensor), *inner], head
        head, tensor = [operation, *head], inputs[0]
    return _body(model, tensor), head


def _body(model: keras.Model, tensor) -> list[keras.Model]:
    """The model from the input to a tensor inside; none if that is the input itself."""
    return [] if tensor is model.inputs[0] else [keras.Model(model.inputs[0], tensor)]


def _made_by(tensor) -> tuple:
    """The operation whose output a symbolic tensor is, and its inputs in that very call."""
    # `layer.input` will not do: of a nested model it is the inner one.
    operation, node, _ = tensor._keras_history
    return operation, operation._inbound_nodes[node].input_tensors


def _is_sigmoid(operation) -> bool:
    return getattr(operation, "activation", None) is keras.activations.sigmoid and not operation.weights


def _in_float32(head: list) -> list:
    """The same operations without the sigmoid, those without weights as layers that do not cast their input."""
    head = head[:-1] if _is_sigmoid(head[-1]) else head
    return [
        type(operation).from_config(operation.get_config() | {"dtype": "float32"})
        if isinstance(operation, keras.layers.Layer) and not operation.weights
        else operation
        for operation in head
    ]


def _logits(head: list, features: tf.Tensor) -> tf.Tensor:
    *first, dense = head
    for operation in first:
        features = operation(features)
    # Not `dense(features)`, which may have the sigmoid in it.
    return tf.matmul(tf.cast(features, tf.float32), dense.kernel) + (dense.bias if dense.use_bias else 0.0)


def write_heat_maps(
    config: TrainConfig,
    run_folder: str | os.PathLike,
    requests: Sequence[tuple[str, str]],
    *,
    rectify: bool = True,
    batch_size: int = 32,
) -> dict:
    """Compute the heat maps of a run's kept epoch for images and findings, and write `heatmaps.npz`; on every rank.

    Each rank computes a slice of the requests. The file holds `images`, `findings` (n,) text, `maps` (n, h, w)
    float16 in [0, 1], `scores` (n,) float32 in [0, 1], `rectified`, and the geometry that boxes need: the images
    were stored at `stored_size` pixels squared, of which the network saw the centre, `image_size` squared.

    Args:
        config: the run's settings, equal on all ranks.
        run_folder: a run that has `model.keras`.
        requests: (image, finding) pairs, by name, of any split. Each is computed once, in order of first mention.
        rectify: see `heat_maps`.
        batch_size: radiographs computed at once.

    Returns:
        On every rank: maps (over all ranks), height and width of each, and mine (this rank's number).

    Raises:
        WorkbenchError: nothing requested, an image or finding that the shards lack, a model that does not fit them.
    """
    folder, world = Path(run_folder), distributed.start(config.threads)
    info = shards.read_info(config.shard_folder, findings=list(config.findings) or None)
    row = shards.read_images(config.shard_folder).set_index("image")["row"]
    images, findings = _check_requests(requests, info, row, config.shard_folder)
    model = network.read_network(folder / "model.keras", findings=info["findings"], image_size=config.image_size)
    # In the shards' order, so that a rank opens few of them.
    order = np.argsort(row[images].to_numpy(), kind="stable")
    # Horovod: this rank's slice; ranks may hold unequal numbers, since no step here waits for another rank.
    mine = order[world.rank * len(order) // world.size : (world.rank + 1) * len(order) // world.size]
    columns = [info["findings"].index(findings[i]) for i in mine]
    stored = shards.read_radiographs(config.shard_folder, [images[i] for i in mine])
    radiographs = pipeline.crop_centre(stored, image_size=config.image_size)
    maps, scores = explain(model, radiographs, columns, rectify=rectify, batch_size=batch_size)
    # Horovod: uneven numbers of rows from every rank, joined in rank order, then put back as they were asked for.
    back = np.argsort(order)
    maps, scores = distributed.gather(maps)[back], distributed.gather(scores)[back]
    # Horovod: all ranks hold the same, so one of them writes.
    if world.rank == 0:
        with written_whole(folder / "heatmaps.npz") as part:
            np.savez_compressed(
                part,
                images=np.array(images),
                findings=np.array(findings),
                maps=maps.astype(np.float16),
                scores=scores,
                image_size=config.image_size,
                stored_size=info["image_size"],
                rectified=rectify,
            )
    return {"maps": len(maps), "height": maps.shape[1], "width": maps.shape[2], "mine": len(mine)}


def _check_requests(requests: Sequence, info: dict, row: pd.Series, folder: str) -> tuple[list[str], list[str]]:
    """Images and findings of the requests, each pair once. Asked of all on every rank, so that none is left waiting."""
    pairs = list(dict.fromkeys((str(image), str(finding)) for image, finding in requests))
    if not pairs:
        raise WorkbenchError("No heat map is requested: give at least one pair of an image and a finding.")
    unknown = sorted({finding for _, finding in pairs} - set(info["findings"]))
    if unknown:
        raise WorkbenchError(
            f"`{unknown[0]}` is none of the findings of the shards in {folder}: choose from "
            f"{', '.join(info['findings'])}."
        )
    images, findings = zip(*pairs, strict=True)
    absent = [image for image in images if image not in row.index]
    if absent:
        raise WorkbenchError(f"`{absent[0]}` is in none of the shards of {folder}: look in its images.csv.")
    return list(images), list(findings)
