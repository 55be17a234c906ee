"""What each rank runs: training with an exact validation every epoch, predictions, and a throughput measurement.

The same functions run in one process without MPI and on every rank of a cluster. Nothing here averages an AUROC:
predictions are gathered and the metric is computed once, on the same numbers, by every rank.

    summary = train(TrainConfig(shard_folder="data/shards/synthetic", image_size=64), "results/first-try")
    summary["best_epoch"], summary["val_auroc"], summary["images_per_second"]
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import keras
import numpy as np
import pandas as pd
import tensorflow as tf
from sklearn.metrics import roc_auc_score

from workbench import WorkbenchError
from workbench.data import damage, pipeline, shards
from workbench.files import held, remove_parts, written_whole
from workbench.runs import TRAINING_LOCK, now, update_run
from workbench.training import checkpoint, distributed, fast, network, pulse, skipping
from workbench.training.config import TrainConfig, better, decay_after
from workbench.training.pulse import PATIENCE, beat, exchange

Report = Callable[[dict], None]
PACED = 10  # measurements of an epoch, each of a second or more, that make a rank's pace: that of one jumps about


def train(
    config: TrainConfig, run_folder: str | os.PathLike, *, report: Report | None = None, resume: bool = False
) -> dict:
    """Train, keep the best epoch, and write what the run's folder is promised to hold.

    Writes `history.csv` and `checkpoint/` after every epoch, `model.keras` after every epoch that is the best so
    far, and at the end `predictions-val.csv` and `predictions-test.csv` of the best epoch. Whatever ends it, the epochs
    that were complete are kept, and `resume` goes on after them: with the same number of ranks on CPUs to the same
    weights, bit for bit, as if nothing had happened.

    Args:
        config: the settings, equal on all ranks.
        run_folder: the run's folder, as `workbench.runs.create_run` made it.
        report: called on rank 0 about once a second with a dictionary of progress.
        resume: go on after the last complete epoch of `checkpoint/`; what is not as it was then is printed.

    Returns:
        On every rank: epochs, best_epoch, val_auroc, val_loss (of the best epoch), images_per_second (over all
        ranks, median of the epochs after the first where there are several), seconds, world_size, hosts, precision, and
        weights_sha256, this rank's own digest of the best epoch's weights.

    Raises:
        WorkbenchError: shards that do not fit, a loss that is not finite, nothing to resume, a disk that is full, a run
            that is being trained already.
        Interrupted: this rank was asked to stop.
    """
    beat("joining the other ranks")
    folder, world = Path(run_folder), distributed.start(config.threads)
    # Horovod: one rank writes, so one rank holds the lock; of a killed run the ranks may need seconds to end.
    alone = held(folder / TRAINING_LOCK, f"The run {folder.name}", wait=30) if world.rank == 0 else nullcontext()
    with alone:
        if world.rank == 0:
            remove_parts(folder)
        return _train(config, folder, world, report if report and world.rank == 0 else lambda progress: None, resume)


@skipping.damaged_records
def _train(config: TrainConfig, folder: Path, world: distributed.World, tell: Report, resume: bool) -> dict:
    config = _settled(config)
    beat("reading what the shards hold")
    info = shards.read_info(config.shard_folder, findings=list(config.findings) or None)
    train_images = info["splits"]["train"]["images"]
    _check_validation(config, info)
    # Asked before anything is built: the error about too few images should come at once.
    steps = pipeline.steps_per_epoch(train_images, batch_size=config.batch_size, size=world.size)
    if world.rank == 0:
        skipping.record_skipped(info, folder)
    tell({"phase": "building the network"})
    # Weights may have to be fetched from far away.
    beat("building the network", patience=PATIENCE if config.weights == "imagenet" else 1)
    model, optimizer = _build(config, len(info["findings"]), world)
    history, best, best_weights = [], None, None
    settings = config.to_parameters() | {
        "findings": info["findings"],
        "workers": world.size,
        "shards": info.get("plan_sha256", "")[:12],
        **skipping.describe_skipped(info),
    }
    if resume:
        beat("reading the checkpoint")
        state = checkpoint.read(folder)
        checkpoint.apply(state, settings, model, optimizer)
        # Horovod: ranks that went on from different epochs would wait for each other for ever.
        if len(set(gather_names(state.sha256))) > 1:
            raise WorkbenchError(f"The ranks read different checkpoints in {folder}: check the disk that they share.")
        history, best_weights = state.history, state.best_weights
        best = next(row for row in reversed(history) if row["best"])
        if world.rank == 0:
            for line in (*state.notes, *checkpoint.describe_changes(state.settings, settings)):
                print(line)
            print(f"going on after epoch {len(history)} of {config.epochs}, best so far epoch {best['epoch']}")
        for row in history:
            tell({"history": row, "epoch": row["epoch"], "epochs": config.epochs})
    train_step, predict_step = build_train_step(model, optimizer, xla=config.xla), build_predict_step(model)
    tell({"phase": "compiling the first step", "epoch": len(history) + 1, "epochs": config.epochs})
    began = time.perf_counter()
    for epoch in range(len(history), config.epochs):
        if _should_stop(config, history):
            break
        decay = decay_after(history, factor=config.plateau_factor, patience=config.plateau_patience)
        row = _train_epoch(config, train_step, optimizer, epoch, steps, decay, world, tell)
        tell({"phase": "validating"})
        beat(f"validating after epoch {epoch + 1}")
        # Horovod: each rank's moving statistics come from its own batches.
        distributed.average_batch_statistics(model)
        labels, scores, _ = predict(predict_step, config, "val", world)
        if not np.isfinite(scores).all():
            # The loss is that of before the step, so it cannot see what the last one did to the weights.
            raise _not_finite("The weights", steps, epoch, world.rank)
        row |= {"val_loss": binary_crossentropy(labels, scores), "val_auroc": mean_auroc(labels, scores)}
        row["best"] = int(better(config.best_by, row, best))
        history.append(row)
        if row["best"]:
            best, best_weights = row, [np.array(value) for value in model.get_weights()]
        # Horovod: all ranks hold the same, so one of them writes.
        beat(f"keeping epoch {epoch + 1}", stops=False)
        if world.rank == 0:
            _write_history(folder, history)
            if row["best"]:
                _write_model(folder, model, info)
            # Last, since it is what a resumed run begins from: what it says is complete is there.
            checkpoint.write(folder, settings, history, model, optimizer, best_weights)
        tell({"history": history[-1], "epoch": epoch + 1, "epochs": config.epochs})
    tell({"phase": "predicting with the best epoch"})
    beat("predicting with the best epoch")
    model.set_weights(best_weights)
    if resume and world.rank == 0:
        # After a break these two may be of an epoch that the checkpoint does not have.
        _write_history(folder, history)
        _write_model(folder, model, info)
    images = shards.read_images(config.shard_folder).set_index("row")
    for split in ("val", "test"):
        labels, scores, rows = predict(predict_step, config, split, world)
        if world.rank == 0:
            write_predictions(folder, split, labels, scores, info["findings"], images.loc[rows])
    rates = [row["images_per_second"] for row in history]
    summary = {
        "epochs": len(history),
        "best_epoch": best["epoch"],
        "val_auroc": best["val_auroc"],
        "val_loss": best["val_loss"],
        # The first epoch holds the compilation of the step.
        "images_per_second": float(np.median(rates[1:] or rates)),
        "seconds": time.perf_counter() - began,
        "world_size": world.size,
        "hosts": sorted(set(gather_names(socket.gethostname()))),
        "precision": config.precision,
        "weights_sha256": weights_digest(model),
    }
    if world.rank == 0:
        names = ("world_size", "images_per_second", "best_epoch", "hosts", "precision")
        record = update_run(folder, **{name: summary[name] for name in names})
        if not record["stages"]:  # a run by hand, which nobody else will call finished
            update_run(folder, status="finished", ended=now())
    return summary


def _write_history(folder: Path, history: list[dict]) -> None:
    with written_whole(folder / "history.csv") as part:
        pd.DataFrame(history).to_csv(part, index=False)


def _write_model(folder: Path, model: keras.Model, info: dict) -> None:
    with written_whole(folder / "model.keras") as part:
        network.write_network(
            model, part, findings=info["findings"], stored_size=info["image_size"], encoding=info["encoding"]
        )


@skipping.damaged_records
def measure_throughput(
    config: TrainConfig,
    *,
    steps: int = 20,
    warmup: int = 3,
    limit: float = math.inf,
    timeline: str | os.PathLike = "",
    watched: int = 5,
) -> dict:
    """Time training steps on the real shards, input included, without keeping anything.

    Args:
        config: as for `train`.
        steps: how many steps are timed, one by one; epochs follow each other as far as needed.
        warmup: untimed steps before them (the first one compiles).
        limit: seconds that the timed steps may take in all; there are fewer of them then, but at least one.
        timeline: file for Horovod's timeline of further steps, which are not timed since recording slows them down;
            written by rank 0, where there are other ranks, all started with `cluster.RECORDING`.
        watched: how many these are.

    Returns:
        On every rank: world_size; images_per_second over all ranks and input_seconds, the mean over ranks of what they
        waited for images, one value per timed step; gradient_bytes of all gradients, before compression; and
        first_step_seconds (None without a step of warm-up).
    """
    world = distributed.start(config.threads)
    info = shards.read_info(config.shard_folder, findings=list(config.findings) or None)
    model, optimizer = _build(config, len(info["findings"]), world)
    train_step, batches = build_train_step(model, optimizer, xla=config.xla), _endless(config, world)

    def run_step(number: int) -> tuple[float, float]:
        beat(f"measuring step {number}")
        began = time.perf_counter()
        batch = next(batches)
        came = time.perf_counter()
        with exchange():
            float(train_step(*batch))
        return time.perf_counter() - began, came - began

    took = []
    while len(took) < warmup + steps:
        took.append(run_step(len(took) + 1))
        if len(took) == warmup + 1 and limit < math.inf:
            # Horovod: all ranks do as many steps, by the one that was slowest.
            slowest = float(distributed.gather(np.array(took[-1][:1])).max())
            steps = max(1, min(steps, int(limit / slowest)))
    if timeline:
        with distributed.timeline(timeline):
            for step in range(watched):
                run_step(warmup + steps + step + 1)
    everyone = distributed.gather(np.array([took]))  # (ranks, steps, 2)
    first, everyone = float(everyone[:, 0, 0].max()), everyone[:, warmup:]
    return {
        "world_size": world.size,
        # Horovod: a step ends when its slowest rank does.
        "images_per_second": (config.batch_size * world.size / everyone[..., 0].max(axis=0)).tolist(),
        "input_seconds": everyone[..., 1].mean(axis=0).tolist(),
        "gradient_bytes": 4 * sum(int(np.prod(v.shape)) for v in model.trainable_variables),
        "first_step_seconds": first if warmup else None,
    }


def _check_validation(config: TrainConfig, info: dict) -> None:
    """Refuse what would leave the choice of the best epoch to nothing."""
    images = shards.read_images(config.shard_folder)
    positives = images.loc[images["split"] == "val", info["findings"]]
    if positives.empty:
        raise WorkbenchError(
            f"The shards in {config.shard_folder} have no validation images, by which the best epoch is chosen: write "
            "them with a `validation_fraction` above 0."
        )
    if config.best_by == "auroc" and not ((positives.sum() > 0) & (positives.sum() < len(positives))).any():
        raise WorkbenchError(
            f"None of {', '.join(info['findings'])} has both positives and negatives among the {len(positives)} "
            "validation images, so there is no AUROC to choose the best epoch by: set `best_by` to loss, or write "
            "shards with another `seed` or a larger `validation_fraction`."
        )


def build_train_step(model: keras.Model, optimizer: keras.optimizers.Optimizer, *, xla: bool = False) -> Callable:
    """A compiled step: (B, H, W, 1) uint8 and (B, K) float32 in, this rank's mean loss out; weights updated.

    With `xla` forward and backward pass are compiled by XLA, which knows TensorFlow's own operations alone.
    """
    compute, loss_function = fast.forward(model, compiled=not xla), keras.losses.BinaryCrossentropy()

    def differentiate(radiographs, labels):
        with tf.GradientTape() as tape:
            loss = loss_function(labels, compute(radiographs, training=True))
            scaled = optimizer.scale_loss(loss)
        return loss, tape.gradient(scaled, model.trainable_variables)

    if xla:
        # Horovod: the exchange stays outside, where it is the same operation as without XLA.
        differentiate = tf.function(differentiate, jit_compile=True)

    @tf.function(reduce_retracing=True)
    def train_step(radiographs, labels):
        loss, gradients = differentiate(radiographs, labels)
        # Horovod: `averaging` made apply() average these gradients over all ranks first.
        optimizer.apply(gradients, model.trainable_variables)
        return loss

    return train_step


def build_predict_step(model: keras.Model) -> Callable:
    """A compiled prediction: (B, H, W, 1) uint8 in, (B, K) float32 in [0, 1] out."""
    compute = fast.forward(model)
    return tf.function(lambda radiographs: compute(radiographs), reduce_retracing=True)


def predict(
    predict_step: Callable, config: TrainConfig, split: str, world: distributed.World
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predict a split, each image once over all ranks.

    Returns:
        labels (n, K) float32 0/1, scores (n, K) float32 in [0, 1] and rows (n,) int64 of images.csv, for the
        whole split in the shards' order, on every rank.
    """
    batches = pipeline.build_evaluation(
        config.shard_folder,
        split,
        image_size=config.image_size,
        batch_size=config.batch_size,
        # Horovod: this rank's slice; ranks may hold unequal numbers, since no step here waits for another rank.
        rank=world.rank,
        size=world.size,
        threads=world.threads,
    )
    findings = len(shards.read_info(config.shard_folder)["findings"])
    labels, scores, rows = [np.zeros((0, findings), np.float32)], [np.zeros((0, findings), np.float32)], []
    for number, (radiographs, truth, where) in enumerate(damage.each_batch(batches, config.shard_folder, split), 1):
        beat(f"predicting {split}, batch {number}")
        scores.append(predict_step(radiographs).numpy())
        labels.append(truth.numpy())
        rows.extend(where.numpy())
    # Horovod: uneven numbers of rows from every rank, joined in rank order.
    parts = (np.concatenate(labels), np.concatenate(scores), np.array(rows, np.int64))
    return tuple(distributed.gather(part) for part in parts)


def write_predictions(folder: Path, split: str, labels, scores, findings: list[str], images: pd.DataFrame) -> None:
    """Write `predictions-<split>.csv`: image, patient, a label and a score per finding, sorted by image.

    Args:
        folder: the run's folder.
        labels, scores: (n, K), 0/1 and in [0, 1].
        findings: the K names.
        images: n rows with `image` and `patient`, in the order of the scores.
    """
    truth = pd.DataFrame(labels.astype(np.uint8), columns=findings)
    score = pd.DataFrame(scores.astype(np.float64), columns=[f"{name}_score" for name in findings])
    table = pd.concat([images[["image", "patient"]].reset_index(drop=True), truth, score], axis=1)
    with written_whole(folder / f"predictions-{split}.csv") as part:
        table.sort_values("image").to_csv(part, index=False)


def mean_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean area under the ROC curve over the findings that have positives and negatives; NaN if none has."""
    defined = [k for k in range(labels.shape[1]) if 0 < labels[:, k].sum() < len(labels)]
    return float(np.mean([roc_auc_score(labels[:, k], scores[:, k]) for k in defined])) if defined else math.nan


def binary_crossentropy(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean binary cross-entropy over images and findings, clipped like Keras's at 1e-7; NaN without images."""
    if not len(labels):
        return math.nan
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.mean(labels * np.log(p) + (1 - labels) * np.log1p(-p)))


def weights_digest(model: keras.Model) -> str:
    """SHA-256 of all weights of a model, bit for bit, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for value in model.get_weights():
        digest.update(np.ascontiguousarray(value))
    return digest.hexdigest()


def gather_names(name: str) -> list[str]:
    """A short text of every rank, in rank order, on every rank."""
    # Horovod: collectives carry numbers, so the text travels as fixed-width bytes.
    padded = np.frombuffer(name.encode()[:64].ljust(64, b"\0"), np.uint8)[None]
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in distributed.gather(padded)]


def _settled(config: TrainConfig) -> TrainConfig:
    return replace(config, precision=distributed.settle_precision(config.precision))


def _build(config: TrainConfig, findings: int, world: distributed.World):
    config = _settled(config)
    # The same seed on every rank; the broadcast makes sure whatever the seed does not reach.
    keras.utils.set_random_seed(config.seed)
    weights = None if config.weights in ("", "none") else config.weights
    model = network.build_network(
        config.network,
        findings=findings,
        image_size=config.image_size,
        # Horovod: one rank fetches the weights, the broadcast brings them to the others.
        weights=weights if world.rank == 0 else None,
        precision=config.precision,
    )
    optimizer = fast.Adam(config.learning_rate)
    if config.precision == "mixed_float16":
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    # Horovod: average the gradients of all ranks in every step.
    optimizer = distributed.averaging(optimizer, compression=config.compression)
    optimizer.build(model.trainable_variables)
    # Horovod: begin with rank 0's weights and optimizer state.
    distributed.broadcast(model.variables + optimizer.variables)
    return model, optimizer


def _train_epoch(config, train_step, optimizer, epoch, steps, decay, world, tell) -> dict:
    """One epoch over this rank's slice; returns the history row without its validation columns."""
    batches = damage.each_batch(_training_batches(config, epoch, world), config.shard_folder, "train")
    # Horovod: the rate may grow with the number of workers, since the global batch does.
    rate = config.base_rate(world.size) * decay
    began = told = time.perf_counter()
    waited, losses = 0.0, []
    distributed.begin_steps()
    # Of the first measurement, with the compilation in it, no later one knows.
    start, paces = _Pace(began, *distributed.exchange_seconds()), deque(maxlen=PACED)
    for step in range(steps):
        asked = time.perf_counter()
        radiographs, labels = next(batches)
        waited += time.perf_counter() - asked
        beat(f"step {step + 1} of {steps} in epoch {epoch + 1}")
        set_learning_rate(optimizer, rate * config.warmup(epoch, step, steps))
        with exchange():
            losses.append(train_step(radiographs, labels))
            # A step late, so that a GPU is never made to wait for Python to look at its loss.
            if step:
                _check_finite(losses[step - 1], epoch, step - 1, world.rank)
        done = step + 1
        # At an epoch's end as well, since some are shorter than a second.
        if time.perf_counter() - told > 1 or done == steps:
            told = time.perf_counter()
            pace = _Pace(told, *distributed.exchange_seconds(), waited, done)
            if not paces or pace.clock - paces[-1].clock > 1:
                _measure_pace(paces[0] if paces else start, pace, config.batch_size)
                paces.append(pace)
            tell(
                {
                    "phase": "training",
                    "epoch": epoch + 1,
                    "epochs": config.epochs,
                    "step": done,
                    "steps": steps,
                    "loss": float(np.mean([float(loss) for loss in losses[-20:-1] or losses])),
                    "learning_rate": rate * config.warmup(epoch, step, steps),
                    "images_per_second": done * config.batch_size * world.size / (told - began),
                    "input_wait_share": waited / (told - began),
                    "epoch_seconds": told - began,
                }
            )
    _check_finite(losses[-1], epoch, steps - 1, world.rank)
    seconds = time.perf_counter() - began
    # Horovod: averaged before anything reads them; every rank did the same number of images.
    row = distributed.average(
        {"loss": float(np.mean([float(loss) for loss in losses])), "seconds": seconds, "waited": waited}
    )
    return {
        "epoch": epoch + 1,
        "seconds": row["seconds"],
        "images_per_second": steps * config.batch_size * world.size / row["seconds"],
        "input_wait_share": row["waited"] / row["seconds"],
        "learning_rate": rate * config.warmup(epoch, steps - 1, steps),
        "loss": row["loss"],
    }


@dataclass(frozen=True)
class _Pace:
    """Sums at a moment: the clock, seconds of this rank's own, in exchanges, waiting for input, and steps."""

    clock: float
    own: float
    exchanging: float
    waited: float = 0.0
    steps: int = 0


def _measure_pace(before: _Pace, now: _Pace, batch_size: int) -> None:
    """Tell with this rank's signs of life how it did since `before`."""
    seconds, exchanging = now.clock - before.clock, now.exchanging - before.exchanging
    # Horovod: all ranks do as many steps a second; how fast each would be shows in the time that is its own.
    own = now.own - before.own or seconds
    pulse.measure(
        images_per_second=(now.steps - before.steps) * batch_size / max(own, 1e-9),
        input_wait_share=(now.waited - before.waited) / seconds,
        exchange_share=min(max(exchanging / seconds, 0.0), 1.0),
    )
    pulse.measure(**distributed.measure_gpu())


def _training_batches(config: TrainConfig, epoch: int, world: distributed.World) -> tf.data.Dataset:
    return pipeline.build_training(
        config.shard_folder,
        image_size=config.image_size,
        batch_size=config.batch_size,
        seed=config.seed,
        epoch=epoch,
        # Horovod: this rank's slice of the epoch's permutation.
        rank=world.rank,
        size=world.size,
        augment=config.augment,
        threads=world.threads,
    )


def _endless(config: TrainConfig, world: distributed.World):
    epoch = 0
    while True:
        yield from damage.each_batch(_training_batches(config, epoch, world), config.shard_folder, "train")
        epoch += 1


def set_learning_rate(optimizer: keras.optimizers.Optimizer, rate: float) -> None:
    """Set the rate of an optimizer, reaching through a loss-scaling one."""
    getattr(optimizer, "inner_optimizer", optimizer).learning_rate = rate


def _check_finite(loss, epoch: int, step: int, rank: int) -> None:
    if not math.isfinite(float(loss)):
        raise _not_finite("The loss", step + 1, epoch, rank)


def _not_finite(what: str, step: int, epoch: int, rank: int) -> WorkbenchError:
    return WorkbenchError(
        f"{what} became infinite or not a number in step {step} of epoch {epoch + 1} on rank {rank}: lower "
        "`learning_rate`, add `warmup_epochs`, or use `precision` float32."
    )


def _should_stop(config: TrainConfig, history: list[dict]) -> bool:
    if not config.early_stop_patience or not history:
        return False
    best = max((i for i, row in enumerate(history) if row["best"]), default=0)
    return len(history) - 1 - best >= config.early_stop_patience
