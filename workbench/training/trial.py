"""What training would take here: what a network's own layers hold, time and memory from a few real steps.

`count_network` needs no data and no ranks; `try_steps` is run on the ranks that would train. Nothing is kept. What it
means for a recipe is said by `workbench.estimate` and `workbench.preflight`.

    count_network("DenseNet121", findings=14, image_size=224, precision="float32")["parameters"]
    with cluster.start(2) as ranks:
        told = ranks.run("workbench.training.trial.try_steps", config, seconds=30)[0]
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras
import numpy as np
import tensorflow as tf

from workbench.data import pipeline, shards
from workbench.training import distributed, network, trainer
from workbench.training.config import TrainConfig
from workbench.training.pulse import beat

HELD = (
    keras.layers.Activation,
    keras.layers.Conv2D,
    keras.layers.DepthwiseConv2D,
    keras.layers.MaxPooling2D,
    keras.layers.Normalization,
    keras.layers.ReLU,
    keras.layers.ZeroPadding2D,
)


def count_network(name: str, *, findings: int, image_size: int, precision: str) -> dict:
    """What a network holds while it trains.

    Returns:
        `parameters` (numbers), `layers`, and in bytes per image `held` (what the backward pass needs of each image:
        outputs of convolutions, ReLUs, paddings and poolings) and `joined` (concatenations, which only GPUs carry out).

    Raises:
        WorkbenchError: there is no such network or precision, or the radiographs are too small for it.
    """
    precision = distributed.settle_precision(precision)
    model = network.build_network(name, findings=findings, image_size=image_size, weights=None, precision=precision)
    held = joined = 0
    for layer in model.layers:
        size = math.prod(layer.output.shape[1:]) * np.dtype(_held_as(layer)).itemsize
        held += size if isinstance(layer, HELD) else 0
        joined += size if isinstance(layer, keras.layers.Concatenate) else 0
    return {"parameters": model.count_params(), "layers": len(model.layers), "held": held, "joined": joined}


def try_steps(config: TrainConfig, *, seconds: float = 20.0, steps: int = 10) -> dict:
    """Run on every rank: train and predict a few batches, and tell how long that takes and what it needs.

    Args:
        config: as for `trainer.train`; the shards need one global batch of training images.
        seconds: that the timed steps may take; there is at least one, and up to `steps`.
        steps: how many steps are timed at most.

    Returns:
        Of this rank: `host`, `peak_bytes` of memory and `gpu_peak_bytes` (0 without a GPU). Of all: `world_size` and
        `images_per_second` (of each timed step). And `building_seconds` (the network, before the first step),
        `first_step_seconds`, `first_prediction_seconds` (both compile), and `predicted_per_second`, images in
        validation of this rank, None where it has no more than one batch of them.
    """
    began = time.perf_counter()
    told = trainer.measure_throughput(config, steps=steps, warmup=2, limit=seconds)
    whole, per_step = time.perf_counter() - began, np.array(told["images_per_second"])
    stepping = (config.batch_size * told["world_size"] / per_step).sum()
    # The second step of the warm-up is as long as any later one.
    stepping += stepping / len(per_step) + told["first_step_seconds"]
    gpus = tf.config.get_visible_devices("GPU")
    return told | {
        "host": socket.gethostname(),
        "peak_bytes": peak_memory(),
        "gpu_peak_bytes": tf.config.experimental.get_memory_info("GPU:0")["peak"] if gpus else 0,
        "building_seconds": max(whole - stepping, 0.0),
        **_time_predictions(config),
    }


def _time_predictions(config: TrainConfig, batches: int = 4) -> dict:
    """How long the first batch of validation takes, and how many images a second the next ones."""
    world = distributed.start(config.threads)
    findings = shards.read_info(config.shard_folder)["findings"]
    model = network.build_network(
        config.network,
        findings=len(findings),
        image_size=config.image_size,
        weights=None,
        precision=distributed.settle_precision(config.precision),
    )
    predict, seconds = trainer.build_predict_step(model), []
    whole = pipeline.build_evaluation(
        config.shard_folder,
        "val",
        image_size=config.image_size,
        batch_size=config.batch_size,
        # Horovod: this rank's part; no step here waits for another rank.
        rank=world.rank,
        size=world.size,
        threads=world.threads,
    ).unbatch()
    # Full batches only: another shape would be compiled again.
    for radiographs, *_ in itertools.islice(whole.batch(config.batch_size, drop_remainder=True), batches):
        beat(f"measuring prediction {len(seconds) + 1}")
        began = time.perf_counter()
        predict(radiographs).numpy()
        seconds.append(time.perf_counter() - began)
    later = seconds[1:]
    return {
        "first_prediction_seconds": seconds[0] if seconds else 0.0,
        "predicted_per_second": config.batch_size / float(np.median(later)) if later else None,
    }


def peak_memory() -> int:
    """The most bytes of memory that this process has ever held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel does not tell the peak of a process's memory")


def _held_as(layer: keras.layers.Layer) -> str:
    """The type of a layer's output, bfloat16 told as the type of NumPy's that is as large."""
    return {"bfloat16": "float16"}.get(layer.compute_dtype, layer.compute_dtype)
