"""Functions that tests run on MPI ranks, by name, through `workbench.training.cluster`."""

import os
import signal
import time
from types import SimpleNamespace
from unittest import mock

import keras
import numpy as np
import tensorflow as tf

from workbench import WorkbenchError
from workbench.data import pipeline, shards
from workbench.training import distributed, network, pulse, skipping, trainer


def world():
    """What the rank knows about itself."""
    here = distributed.start()
    return {
        "rank": here.rank,
        "size": here.size,
        "threads": here.threads,
        "pid": os.getpid(),
        "cores": sorted(os.sched_getaffinity(0)),
    }


def record_unasked(path: str) -> str:
    """What Horovod says to one who wants a timeline: it can record only with the thread that it keeps for that."""
    distributed.start()
    try:
        distributed._hvd.start_timeline(path)
    except ValueError as error:
        return str(error)
    return ""


def collectives():
    """Uneven gather, average, broadcast of an object, names."""
    here = distributed.start()
    rows = np.full((here.rank + 1, 2), here.rank, np.float32)
    return {
        "gathered": distributed.gather(rows),
        "nobody": distributed.gather(np.zeros((0, 3), np.int64)),
        "average": distributed.average({"loss": float(here.rank), "one": 1.0}),
        "names": trainer.gather_names(f"rank-{here.rank}"),
    }


def broadcast_from_different_starts():
    """Ranks begin with different weights and a different optimizer state; what do they hold afterwards?"""
    here = distributed.start()
    keras.utils.set_random_seed(here.rank)
    model = network.build_network("Tiny", findings=3, image_size=32, weights=None)
    optimizer = distributed.averaging(keras.optimizers.Adam(10.0 ** -(here.rank + 2)))
    optimizer.build(model.trainable_variables)
    for variable in optimizer.variables[2:]:
        variable.assign(np.full(variable.shape, here.rank + 1.0))
    before = trainer.weights_digest(model)
    distributed.broadcast(model.variables + optimizer.variables)
    state = np.concatenate([np.ravel(np.array(variable)) for variable in optimizer.variables])
    return {"before": before, "after": trainer.weights_digest(model), "optimizer": state}


def train_on_different_data(*, averaged: bool, compression: str = "none"):
    """Five steps, each rank on its own random batches."""
    here = distributed.start()
    keras.utils.set_random_seed(0)
    model = network.build_network("Tiny", findings=3, image_size=32, weights=None)
    optimizer = keras.optimizers.Adam(1e-2)
    if averaged:
        optimizer = distributed.averaging(optimizer, compression=compression)
    optimizer.build(model.trainable_variables)
    step = trainer.build_train_step(model, optimizer)
    rng = np.random.default_rng(here.rank)
    for _ in range(5):
        step(rng.integers(0, 256, (4, 32, 32, 1), np.uint8), rng.integers(0, 2, (4, 3)).astype(np.float32))
    statistics = np.concatenate([np.ravel(v) for v in model.non_trainable_variables if "moving" in v.name])
    distributed.average_batch_statistics(model)
    averaged_statistics = np.concatenate([np.ravel(v) for v in model.non_trainable_variables if "moving" in v.name])
    return {
        "weights": np.concatenate([np.ravel(np.array(v)) for v in model.trainable_variables]),
        "statistics": statistics,
        "averaged_statistics": averaged_statistics,
        "digest": trainer.weights_digest(model),
    }


def fit_on_different_data():
    """The same through Keras's own `fit`."""
    here = distributed.start()
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(1)])
    model.compile(distributed.averaging(keras.optimizers.Adam(1e-2)), loss="mse")
    rng = np.random.default_rng(here.rank)
    model.fit(rng.normal(size=(32, 8)), rng.normal(size=(32, 1)), batch_size=8, epochs=2, verbose=0, shuffle=False)
    return trainer.weights_digest(model)


def follow_a_global_batch(*, optimizer: str, precision: str = "float32", steps: int = 10, batch: int = 4):
    """Steps on this rank's part of global batches that are the same however many ranks share them."""
    here = distributed.start()
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 16, 1), dtype="uint8")
    x = keras.layers.Rescaling(1 / 255)(inputs)
    for channels in (8, 16):
        x = keras.layers.Conv2D(channels, 3, strides=2, activation="relu")(x)
    outputs = keras.layers.Dense(3, activation="sigmoid")(keras.layers.Flatten()(x))
    model = keras.Model(inputs, outputs)
    made = {"sgd": keras.optimizers.SGD(0.1, momentum=0.9), "adam": keras.optimizers.Adam(1e-3)}[optimizer]
    made = distributed.averaging(made)
    made.build(model.trainable_variables)
    step = trainer.build_train_step(model, made)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        images = rng.integers(0, 256, (batch * 2, 16, 16, 1), np.uint8)
        labels = rng.integers(0, 2, (batch * 2, 3)).astype(np.float32)
        share = 2 * batch // here.size
        mine = slice(here.rank * share, (here.rank + 1) * share)
        step(images[mine], labels[mine])
    return np.concatenate([np.ravel(np.array(v)) for v in model.trainable_variables])


def scaled_overflow():
    """A loss-scaled step in which rank 1 alone overflows: no rank may move, and none may hang."""
    here = distributed.start()
    weight = keras.Variable([1.0])
    optimizer = distributed.averaging(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1)))
    optimizer.build([weight])
    optimizer.apply([tf.constant([np.inf if here.rank == 1 else 1.0])], [weight])
    skipped = float(np.array(weight)[0])
    optimizer.apply([tf.constant([float(optimizer.scale_loss(1.0))])], [weight])
    return skipped, float(np.array(weight)[0])


def images_seen(shard_folder: str, *, batch_size: int, epoch: int):
    """The images (as bytes) that this rank reads in an epoch, batch by batch."""
    here = distributed.start()
    batches = pipeline.build_training(
        shard_folder,
        image_size=36,
        batch_size=batch_size,
        seed=0,
        epoch=epoch,
        rank=here.rank,
        size=here.size,
        augment=False,
    )
    return [[image.tobytes() for image in images.numpy()] for images, _ in batches]


@skipping.damaged_records
def read_without_damage(config):
    """What this rank reads in an epoch where damaged records are skipped, and what it skips."""
    skipped = shards.read_info(config.shard_folder)["skipped"]
    return {
        "batches": images_seen(config.shard_folder, batch_size=config.batch_size, epoch=0),
        "folder": config.shard_folder,
        "skipped": [(one["shard"], one["record"]) for one in skipped],
    }


def predicted(config, split: str):
    """A split's labels, scores and rows, as `trainer.predict` gives them to this rank."""
    here = distributed.start()
    keras.utils.set_random_seed(0)
    model = network.build_network(config.network, findings=14, image_size=config.image_size, weights=None)
    return trainer.predict(trainer.build_predict_step(model), config, split, here)


def raise_on(rank: int, kind: str):
    """One rank fails while the others wait for it in a collective."""
    here = distributed.start()
    distributed.average({"all here": 1.0})
    if here.rank == rank:
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"bug": ZeroDivisionError("a bug"), "user": WorkbenchError("the value 7 is wrong: use 8.")}[kind]
    distributed.average({"never": 1.0})


def talk(*, report):
    """Prints and reports progress."""
    here = distributed.start()
    for step in range(3):
        print(f"step {step}")
        if here.rank == 0:
            report({"phase": "talking", "step": step})
        time.sleep(0.4)
    if here.rank == 0:
        report({"history": {"epoch": 1}})
    return here.rank


def hang_on(rank: int):
    """One rank does nothing any more while the others wait for it in an exchange."""
    here = distributed.start()
    pulse.beat("hanging" if here.rank == rank else "exchanging")
    if here.rank == rank:
        time.sleep(600)
    distributed.average({"never": 1.0})


def take_memory(rank: int, group: str):
    """One rank takes more memory than the control group that it enters has."""
    here = distributed.start()
    if here.rank == rank:
        with open(f"{group}/cgroup.procs", "w") as file:
            file.write(str(os.getpid()))
        return [np.ones(1 << 20) for _ in range(1000)]
    distributed.average({"never": 1.0})


def exchange_small(times: int = 30):
    """What the environment held that Horovod read, and the median seconds of a small exchange."""
    distributed.start()
    took = []
    for _ in range(times):
        began = time.perf_counter()
        distributed.average({"one": 1.0})
        took.append(time.perf_counter() - began)
    names = ("HOROVOD_HIERARCHICAL_ALLREDUCE", "HOROVOD_CYCLE_TIME", "HOROVOD_FUSION_THRESHOLD")
    return {"environment": {name: os.environ.get(name) for name in names}, "seconds": float(np.median(took))}


def settle_with_gpus(capabilities: list):
    """What "auto" becomes when each rank sees a GPU of its own kind, or none."""
    here = distributed.start()
    mine = capabilities[here.rank]
    config = SimpleNamespace(
        get_visible_devices=lambda kind: ["a GPU"] if mine else [],
        experimental=SimpleNamespace(get_device_details=lambda gpu: {"compute_capability": tuple(mine)}),
    )
    with mock.patch.object(distributed, "tf", SimpleNamespace(config=config, convert_to_tensor=tf.convert_to_tensor)):
        return distributed.settle_precision("auto")


def gpu_of_rank():
    """Which devices this rank computes on, and how much of the memory it has taken after a step."""
    here = distributed.start()
    train_on_different_data(averaged=True)
    gpus = tf.config.get_visible_devices("GPU")
    return {
        "local_rank": here.local_rank,
        "all": [gpu.name for gpu in tf.config.list_physical_devices("GPU")],
        "mine": [gpu.name for gpu in gpus],
        "growth": [tf.config.experimental.get_memory_growth(gpu) for gpu in gpus],
    }


def average_on(device: str, compression: str):
    """A gradient averaged through the optimizer, on a device: ranks hold 1, 2, ... in it."""
    here = distributed.start()
    with tf.device(f"/{device}:0"):
        weight = keras.Variable(np.zeros(1000, np.float32))
        optimizer = distributed.averaging(keras.optimizers.SGD(-1.0), compression=compression)
        optimizer.build([weight])
        gradient = tf.fill([1000], here.rank + 1.0)
        tf.function(lambda: optimizer.apply([gradient], [weight]))()
    built = distributed._hvd.nccl_built() if distributed._hvd else 0
    return {"averaged": np.array(weight), "device": weight.value.device, "nccl": built}


def train_slowed(rank: int, config, folder, *, report):
    """A training in which one rank has more to do at every step: it keeps its core busy for a while."""
    beat = trainer.beat

    def beat_and_work(doing, **settings):
        beat(doing, **settings)
        until = time.perf_counter() + 0.05 * (distributed.start().rank == rank)
        while time.perf_counter() < until:
            pass

    trainer.beat = beat_and_work
    try:
        return trainer.train(config, folder, report=report)
    finally:
        trainer.beat = beat
