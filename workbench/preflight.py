"""What a recipe would do here, before it is run: the command `workbench doctor RECIPE`.

Numbers come from `plan`, times from `estimate`; here they are held against what there is. Nothing is written but
temporary files.

    from workbench import preflight, runs
    preflight.main(runs.project_root(), "synthetic", overrides={"workers": 1})     # 0 if it can run
    plan = preflight.plan_recipe(runs.project_root(), "synthetic")
    plan.steps, plan.left_out
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench import Interrupted, WorkbenchError, estimate, machine, runs
from workbench.data import pipeline
from workbench.doctor import TIMEOUT
from workbench.findings import Check, reading_check, show
from workbench.plan import Plan, plan_recipe
from workbench.training import cluster

BUSY = "other programs compute on this host now: alone it would take less time"
OTHERS = 0.5e9  # bytes of a notebook's kernel and the cluster's controller
DRAWN = 0.76  # bytes of a pixel of the made-up data set
PAGES = 30e6  # bytes of a run's notebooks, charts and report
SMALL_BATCH = 8  # fewer images make batch normalisation's statistics noisy (Wu and He 2018, arXiv:1803.08494)
IMAGENET = {"MobileNetV2": "mobilenet_v2"}  # where Keras's file is not called after the network
_COUNT = """
import json, sys
from workbench.training import trial
print(json.dumps(trial.count_network(**json.loads(sys.argv[1]))))
"""


@dataclass(frozen=True)
class Place:
    """Where workers would run, as `this_host` describes it; a cluster is described likewise.

    Attributes:
        name: in words, such as "this host".
        slots: the most workers it takes.
        slot: what a slot is, in words.
        hosts: how many hosts they are shared out to.
        memory: bytes that can be taken on each host; 0: not known before workers are there.
        gpus: of each host.
        start: starts workers there: `start(workers, threads=...)` as `cluster.start`; None: nothing can be timed.
        start_seconds: what starting has taken already.
    """

    name: str
    slots: int
    slot: str
    hosts: int
    memory: int
    gpus: int
    start: Callable[..., AbstractContextManager] | None
    start_seconds: float = 0.0


def this_host(threads: int = 0) -> Place:
    """This host: a worker takes a GPU, or as many cores as it has threads, one where that is 0."""
    gpus, cores = machine.gpus_present(), len(os.sched_getaffinity(0))
    each = max(threads, 1)
    slots = min(gpus, cores // each) if gpus else cores // each
    slot = f"{gpus} GPUs" if gpus else f"{cores} cores"
    return Place("this host", slots, slot, 1, machine.available_memory(), gpus, cluster.start)


@contextmanager
def find_place(plan: Plan, *, start: bool) -> Iterator[Place]:
    """Where a plan's workers would run; on a cluster they are started, if asked for, and tell what is there.

    Raises:
        WorkbenchError: they do not start.
    """
    site, config = plan.site, plan.config
    if site.kind == "local":
        yield this_host(config.threads)
        return
    hosts = len(site.hosts) or site.nodes
    slot = f"{hosts} host{'s' * (hosts > 1)}"
    place = Place(f"the cluster {site.name}", site.slots, slot, hosts, 0, site.gpus_per_node, None)
    if not start:
        yield place
        return
    print(f"Starting {plan.workers} workers on {place.name}.", flush=True)
    began = time.monotonic()
    how = {"threads": config.threads, "hang_limit": estimate.PATIENCE, "environment": config.horovod_environment()}
    with cluster.start(plan.workers, site=site, **how) as ranks:
        memory, gpus = (ranks.run(f"workbench.machine.{name}") for name in ("available_memory", "gpus_present"))
        yield replace(
            place,
            hosts=len(set(ranks.hosts)),
            memory=min(memory),
            gpus=max(gpus),
            start=lambda *_, **__: nullcontext(ranks),
            start_seconds=time.monotonic() - began,
        )


def main(
    root: Path,
    recipe: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    timing: bool = True,
    place: Place | None = None,
) -> int:
    """Print what a recipe would do here, line by line; return 0 if it can run, else 1.

    Args:
        root: the project's top folder.
        recipe: a name in notebooks/recipes/, or the path of a YAML file.
        overrides: parameters that replace the recipe's.
        timing: train a few real steps, which takes about a minute; else only an earlier run tells the time.
        place: where the workers would run; where the parameter `cluster_name` says by default.

    Raises:
        WorkbenchError: the recipe, its parameters or its data are such that it cannot be run.
    """
    plan = plan_recipe(root, recipe, overrides=overrides)
    config, local = plan.config, plan.site.kind == "local"
    where = place.name if place else "this host" if local else f"the cluster {plan.site.name}"
    print(
        f"Recipe {plan.recipe}: {config.network}, {config.image_size} px, {config.precision}, {config.epochs} epochs, "
        f"{plan.workers} worker{'s' * (plan.workers > 1)} on {where}.",
        flush=True,
    )
    with nullcontext(place) if place else find_place(plan, start=timing) as found:
        failed = show(check_plan(plan, found, timing=timing))
    there = "here" if local else "there"
    print(f"This recipe cannot run {there}: {', '.join(failed)}." if failed else f"This recipe can run {there}.")
    return 1 if failed else 0


def check_plan(plan: Plan, place: Place, *, timing: bool = True) -> Iterator[Check]:
    """All findings about a plan at a place, as they are made; see `main`."""
    yield _data(plan)
    yield _shards(plan)
    yield _steps(plan)
    yield _batch(plan)
    if plan.config.weights == "imagenet":
        yield _weights(plan)
    local = plan.site.kind == "local"
    fits, busy = _workers(plan, place), local and machine.is_busy()
    yield fits
    held = _count(plan)
    if "error" in held:
        yield Check("Network", "failed", held["error"].rpartition("WorkbenchError: ")[2], "see `workbench doctor`")
        return
    yield _disk(plan, held)
    memory = _memory(plan, place, held, None)
    told, skipped = None, "not timed (--no-timing)"
    if "failed" in (fits.status, memory.status):
        skipped = "not timed, since it does not fit"
    elif timing and place.start:
        print(f"{'':<20} training a few steps, which takes up to a minute ...", flush=True)
        try:
            # What is written for the while has to be seen on other hosts, as the project's folder is.
            told = estimate.try_recipe(
                plan, place.start, scratch=None if local else machine.existing_folder(plan.root / "data")
            )
            told = [one | {"start_seconds": one["start_seconds"] + place.start_seconds} for one in told]
        except Interrupted:
            raise
        except WorkbenchError as error:
            yield memory
            yield Check("Time", "failed", str(error), BUSY if busy else "see `workbench doctor`")
            return
    yield _memory(plan, place, held, told) if told else memory
    earlier = estimate.find_earlier(plan)
    rate = estimate.rate_of(told) if told else earlier[1]["images_per_second"] if earlier else 0.0
    if plan.files:
        mine = math.ceil(plan.workers / place.hosts) / plan.workers
        yield reading_check(
            Path(plan.config.shard_folder), list(plan.files), image_bytes=plan.image_bytes, needed=rate * mine
        )
    yield _time(plan, told, earlier, skipped, busy)


def _data(plan: Plan) -> Check:
    frame = plan.frame
    if frame is None:
        return Check("Data", "warning", *plan.trouble)
    gone = frame.attrs.get("missing", 0)
    left = f", {gone:,} without a file left out" if gone and not plan.drawn else ""
    return Check("Data", "ok", f"{len(frame):,} images of {frame['patient'].nunique():,} patients: {plan.told}{left}")


def _shards(plan: Plan) -> Check:
    state = "written" if plan.files else "to be written"
    split = ", ".join(f"{name} {plan.images[name]:,} in {plan.shards[name]:,}" for name in plan.images)
    size = sum(plan.images.values()) * plan.image_bytes
    found = f"{plan.parameters['shard_folder']}, {state}: images {split}; {_size(size)}"
    if plan.frame is not None and plan.trouble[0]:
        return Check("Shards", "failed", *plan.trouble)
    return Check("Shards", "ok", found)


def _steps(plan: Plan) -> Check:
    workers = f"{plan.workers} worker{'s' * (plan.workers > 1)}"
    found = (
        f"{plan.shards['train']:,} shards × {workers} × batch {plan.config.batch_size}: {plan.steps:,} "
        f"steps an epoch of {plan.global_batch:,} images, {plan.left_out:,} left out, others in each epoch"
    )
    if plan.left_out > 0.1 * plan.images["train"]:
        advice = "more than a tenth of the training images: use a smaller `batch_size` or fewer `workers`"
        return Check("Steps", "warning", found, advice)
    return Check("Steps", "ok", found)


def _batch(plan: Plan) -> Check:
    config, rate = plan.config, plan.config.base_rate(plan.workers)
    found = (
        f"gradients over {plan.global_batch:,} images at rate {rate:.2g}, batch normalisation over each worker's "
        f"{config.batch_size}"
    )
    if config.batch_size < SMALL_BATCH and config.network != "VGG16":  # which does not normalise
        return Check("Batch", "warning", found, f"statistics of so few images are noisy: use {SMALL_BATCH} or more")
    return Check("Batch", "ok", found)


def _weights(plan: Plan) -> Check:
    name = IMAGENET.get(plan.config.network, plan.config.network.lower())
    folder = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "models"
    there = [path for path in folder.glob(f"{name}_weights*") if path.stem.endswith(("notop", "no_top"))]
    if there:
        return Check("Weights", "ok", f"ImageNet's, in {there[0]}")
    advice = "go online once before hosts without a network need them, or set `weights` to a file or to none"
    return Check("Weights", "warning", f"ImageNet's are not in {folder} yet, the first worker downloads them", advice)


def _workers(plan: Plan, place: Place) -> Check:
    threads = plan.config.threads
    each = f" of {threads} cores" if threads > 1 else ""
    found = f"{plan.workers}{each}, {place.name} takes up to {place.slots} ({place.slot})"
    if plan.workers > place.slots:
        most = f"`--set workers={place.slots}`" if place.slots else "`--set threads=0`"
        return Check("Workers", "failed", found, f"ask for fewer with {most}, or for a larger machine")
    return Check("Workers", "ok", found)


def _count(plan: Plan) -> dict:
    """What the network and a rank hold, see `trial.count_network`, or {"error": why that is not known}."""
    config = plan.config
    network = {"name": config.network, "findings": plan.findings}
    held = _count_network(json.dumps(network | {name: getattr(config, name) for name in ("image_size", "precision")}))
    if "error" in held:
        return held
    # Encoded records that are shuffled, and batches that are read ahead.
    waiting = min(pipeline.SHUFFLED_RECORDS, plan.images["train"] // plan.workers) * plan.image_bytes
    waiting += 4 * config.batch_size * config.image_size**2
    rank = estimate.memory_of_rank(held, batch_size=config.batch_size, ranks=plan.workers, input_bytes=int(waiting))
    return held | {"rank": rank, "gpu": estimate.memory_of_gpu(held, batch_size=config.batch_size)}


def _count_network(network: str) -> dict:
    """In a process of its own, which takes seconds: this one stays without TensorFlow."""
    return machine.run_python(_COUNT, network, timeout=TIMEOUT)


def _memory(plan: Plan, place: Place, held: dict, told: list[dict] | None) -> Check:
    ranks = math.ceil(plan.workers / place.hosts)
    rank = held["rank"]
    host = estimate.SHARED + ranks * (rank - estimate.SHARED) + OTHERS
    found = f"{_size(rank)} a rank, {_size(host)} a host, of {_size(place.memory)} available; ± {estimate.ERROR:.0%}"
    if told:
        found += f", {_size(max(one['peak_bytes'] for one in told))} a rank measured"
    if place.gpus:
        gpu = max((one["gpu_peak_bytes"] for one in told or []), default=0)
        found += f"; {_size(held['gpu'])} on each GPU" + (f", {_size(gpu)} measured" if gpu else ", a rough guess")
    advice = "use a smaller `batch_size`, fewer `workers`, or `precision` mixed_bfloat16"
    if not place.memory:
        found = f"{_size(rank)} a rank, {_size(host)} a host; ± {estimate.ERROR:.0%}"
        return Check("Memory", "ok", f"{found}; what the hosts have is known when workers are there")
    if host > place.memory:
        return Check("Memory", "failed", found, advice)
    if host * (1 + estimate.ERROR) > place.memory:
        return Check("Memory", "warning", found, f"it may not be enough: {advice}")
    return Check("Memory", "ok", found)


def _disk(plan: Plan, held: dict) -> Check:
    images, weights = sum(plan.images.values()), 4 * held["parameters"]
    predicted = (plan.images["val"] + plan.images["test"]) * (plan.findings * 24 + 40)
    # The model, and two checkpoints and one being written, each of weights, two moments and the best weights.
    need = {plan.root / "results": weights + 3 * 4 * weights + predicted + PAGES}
    if not plan.files:
        need[Path(plan.config.shard_folder)] = images * plan.image_bytes
    if plan.drawn:
        need[plan.data] = images * 96**2 * DRAWN
    disks: dict[int, list] = {}
    for path, size in need.items():
        folder = machine.existing_folder(path)
        disk = disks.setdefault(folder.stat().st_dev, [folder, 0.0])
        disk[1] += size
    told, status = [], "ok"
    for folder, size in disks.values():
        free = shutil.disk_usage(folder).free
        told.append(f"{_size(size)} of {_size(free)} free in {folder}")
        status = "failed" if size > free else "warning" if 2 * size > free and status == "ok" else status
    parts = ["run"] + ["shards"] * (not plan.files) + ["data"] * plan.drawn
    found = f"{', '.join(parts)}: {'; '.join(told)}"
    return Check("Disk", status, found, "" if status == "ok" else "make room, or set the folders to another disk")


def _time(plan: Plan, told: list[dict] | None, earlier: tuple | None, skipped: str, busy: bool) -> Check:
    known = ""
    if earlier and estimate.is_same_work(plan, earlier[1]):
        known = f"; the whole of {earlier[0]} took {runs.minutes(earlier[1]):g} min"
    if told:
        seconds, rate = estimate.predict_seconds(plan, told), estimate.rate_of(told)
        first = max(one["first_step_seconds"] for one in told)
        where = "trial shards" if told[0]["trial_shards"] else "the shards"
        found = (
            f"training {_duration(seconds)}: {plan.config.epochs} epochs of {plan.steps:,} steps of "
            f"{plan.global_batch / rate:.2f} s ({rate:,.0f} images/s, median of {len(told[0]['images_per_second'])} on "
            f"{where}), validation, {told[0]['start_seconds']:.0f} s to start, {first:.0f} s for the first step{known}"
        )
        return Check("Time", "warning", found, BUSY) if busy else Check("Time", "ok", found)
    if earlier:
        rate = earlier[1]["images_per_second"]
        seconds = plan.config.epochs * plan.steps * plan.global_batch / rate
        found = (
            f"training steps {_duration(seconds)} at the {rate:,.0f} images/s of the run {earlier[0]}{known}; {skipped}"
        )
        return Check("Time", "ok", found)
    return Check("Time", "ok", f"{skipped}, and no run of the same network, size, batch and machine is here to tell")


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
