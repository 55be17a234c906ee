"""How long a recipe would take, measured on a few real steps or known from an earlier run, and how much memory.

from workbench import estimate, plan, runs
planned = plan.plan_recipe(runs.project_root(), "synthetic")
told = estimate.try_recipe(planned, cluster.start)               # about half a minute
estimate.rate_of(told), estimate.predict_seconds(planned, told)
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from workbench import WorkbenchError, provenance, runs
from workbench.data import chestxray14, shards, synthetic
from workbench.plan import Plan

TRIAL_SECONDS = 20.0  # that the timed steps may take
PATIENCE = 120  # seconds without a sign of life: on a busy machine the first step may take long, and that is measured

# Fitted to the peaks of fifteen pairs of ranks: DenseNet-121 and -201, ResNet-50, VGG-16, MobileNetV2 and Tiny, 64 to
# 256 px, 8 to 64 images, float32 and bfloat16, on CPUs. They came to 0.88 to 1.09 of what was measured.
PROCESS = 560 * 2**20  # bytes of a rank that has loaded TensorFlow
HOROVOD = 140 * 2**20  # and of Horovod and MPI in it
LAYER = 0.45 * 2**20  # of the graph that a layer becomes
WEIGHTS = 6.9  # times the weights: themselves, their gradients, Adam's two moments, and copies on the way
HELD_TIMES = 1.18  # times what the backward pass holds: gradients that pass through it
SHARED = 290 * 2**20  # bytes of libraries that are in the memory once for all ranks of a host
ERROR = 0.3  # of the estimate; twice what was seen, since memory also depends on the moment

# What a training takes seconds for only once: workers, network, and the compilation of two kinds of step.
ONCE = ("start_seconds", "building_seconds", "first_step_seconds", "first_prediction_seconds")


def memory_of_rank(held: dict, *, batch_size: int, ranks: int, input_bytes: int) -> int:
    """Bytes of one rank at its largest, while training on CPUs, to within ERROR.

    Args:
        held: of `trial.count_network`.
        batch_size: images of one rank and step.
        ranks: how many ranks there are.
        input_bytes: that reading ahead and shuffling hold.
    """
    weights = 4 * held["parameters"]
    process = PROCESS + (HOROVOD if ranks > 1 else 0) + LAYER * held["layers"]
    return int(process + WEIGHTS * weights + HELD_TIMES * batch_size * held["held"] + input_bytes)


def memory_of_gpu(held: dict, *, batch_size: int) -> int:
    """Bytes on a GPU, where concatenations are carried out as well. Nothing on a GPU has been measured against it."""
    activations = held["held"] + held["joined"]
    return int(4 * 4 * held["parameters"] + HELD_TIMES * batch_size * activations + 2**30)


def try_recipe(plan: Plan, start: Callable[..., AbstractContextManager], *, scratch: Path | None = None) -> list[dict]:
    """Train and predict a few batches on the ranks that the recipe asks for; what each of them tells.

    Args:
        plan: of the recipe; where its shards are not written yet, a few are written for the while.
        start: starts workers, as `cluster.start` does.
        scratch: a folder for those shards, which the workers see; by default the host's own for temporary files.

    Returns:
        In rank order what `trial.try_steps` returns, with `start_seconds` of the workers and whether on `trial_shards`.

    Raises:
        WorkbenchError: the workers do not start, or cannot train.
    """
    with tempfile.TemporaryDirectory(prefix="workbench-preflight-", dir=scratch) as made:
        folder = plan.config.shard_folder if plan.files else _write_trial_shards(plan, Path(made))
        # Random weights compute as fast, and need not be fetched.
        config = dataclasses.replace(plan.config, shard_folder=str(folder), weights="none")
        began = time.monotonic()
        hang_limit = max(plan.parameters["hang_limit"], PATIENCE)
        with start(plan.workers, threads=config.threads, hang_limit=hang_limit) as ranks:
            up = time.monotonic() - began
            told = ranks.run("workbench.training.trial.try_steps", config, seconds=TRIAL_SECONDS)
    return [one | {"start_seconds": up, "trial_shards": not plan.files} for one in told]


def _write_trial_shards(plan: Plan, scratch: Path) -> Path:
    """A few global batches as notebook 02 would write them, of the data or of made-up ones."""
    given, frame = plan.parameters, plan.frame
    if plan.drawn:
        patients = min(given["synthetic_patients"], max(16, plan.global_batch))
        made = synthetic.write_synthetic(scratch / "data", patients=patients, seed=given["seed"], progress=False)
        frame = chestxray14.read_dataset(made, findings=given["findings"] or chestxray14.FINDINGS)
    parts = [frame[frame["split"] == name].head(4 * plan.global_batch) for name in chestxray14.SPLITS]
    few = frame.loc[sorted(index for part in parts for index in part.index)].reset_index(drop=True)
    stored = given["image_size"] + given["shard_margin"]
    how = {name: given[name] for name in ("encoding", "images_per_shard", "seed")}
    shards.write_shards(few, scratch / "shards", image_size=stored, processes=1, progress=False, **how)
    return scratch / "shards"


def rate_of(told: list[dict]) -> float:
    """Images a second of all ranks in training."""
    return statistics.median(told[0]["images_per_second"])


def predict_seconds(plan: Plan, told: list[dict]) -> float:
    """Seconds from the start of the workers to the predictions of the best epoch, from what `try_recipe` told."""
    rate = rate_of(told)
    slowest = {name: max(one[name] for one in told) for name in ONCE}
    predicting = [one["predicted_per_second"] for one in told]
    # Too few images to time a second batch of them: as slow as training, which it never is.
    predicting = rate if None in predicting else sum(predicting)
    once = sum(slowest.values()) + (plan.images["val"] + plan.images["test"]) / predicting
    return once + plan.config.epochs * (plan.steps * plan.global_batch / rate + plan.images["val"] / predicting)


def find_earlier(plan: Plan) -> tuple[str, dict] | None:
    """Name and record of the newest run that trained the same network in the same way on the same kind of machine."""
    hardware, found = provenance.describe_hardware(), []
    for path in (plan.root / "results").glob("*/run.json"):
        try:
            record = runs.read_run(path.parent)
        except WorkbenchError:
            continue
        same = all(
            record.get("parameters", {}).get(name) == plan.parameters[name]
            for name in ("network", "image_size", "precision", "batch_size")
        )
        same = same and record["parameters"].get("cluster_name", "local") == plan.site.name
        if (
            same
            and record.get("images_per_second")
            and (record.get("world_size"), record.get("hardware")) == (plan.workers, hardware)
        ):
            found.append((record.get("started", ""), path.parent.name, record))
    return max(found, key=lambda entry: entry[:2])[1:] if found else None


def is_same_work(plan: Plan, record: dict) -> bool:
    """Whether a finished run did all that this one would do."""
    names = ("data_folder", "epochs", "measured_steps", "synthetic_patients", "worker_counts")
    parameters = record["parameters"]
    alike = all(parameters.get(name) == plan.parameters[name] for name in names)
    return alike and record.get("recipe") == plan.recipe and runs.minutes(record) is not None
