"""What follows from a fitted model of a step: workers for a wanted time, where efficiency falls, what a change brings.

On paper, up to `scaling_model.LIMIT` workers. How well a training learns with batches that large is another question.

    forecast.workers_for(fit, seconds=600, images=1_000_000)     # Count(best=12, low=10, high=15)
    forecast.where_efficiency_falls(fit, below=0.8)
    forecast.what_if(fit, [64, 1024], compression="fp16")
    forecast.answers(fit, images=1_000_000, wanted=[3600, 600])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from workbench import WorkbenchError
from workbench.analysis.scaling import predict
from workbench.analysis.scaling_fit import Fit, band
from workbench.analysis.scaling_model import LIMIT, Fabric, StepModel


@dataclass(frozen=True)
class Count:
    """A number of workers with its 95 % interval; infinite where up to `LIMIT` do not do, NaN where unknown."""

    best: int
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.best:,}, interval unknown"
        low, high = (f"{end:,.0f}" if np.isfinite(end) else f"more than {LIMIT:,}" for end in (self.low, self.high))
        return f"{self.best:,} ({low} to {high})"


def workers_for(fit: Fit, *, seconds: float, images: int, global_batch: int = 0) -> Count:
    """The fewest workers that process some images in a wanted time.

    Args:
        fit: a fitted model.
        seconds: the wanted time.
        images: of the whole training: those of an epoch times the epochs.
        global_batch: as for `scaling.predict`.

    Raises:
        WorkbenchError: no number of workers does it; says what the best one reaches.
    """
    if not (seconds > 0 and images > 0):
        raise WorkbenchError(f"`seconds` is {seconds} and `images` {images}: both have to be more than 0.")
    counts = _counts(global_batch)

    def rates(model: StepModel) -> np.ndarray:
        batch = global_batch / counts if global_batch else model.batch_size
        return batch * counts / model.seconds(counts, batch)

    found = _first(fit, counts, lambda model: rates(model) >= images / seconds)
    if found is None:
        rate = rates(fit.model)
        raise WorkbenchError(
            f"No number of workers up to {counts[-1]:,} gets {images:,} images through in {_time(seconds)}: the "
            f"best, {counts[rate.argmax()]:,}, takes {_time(images / rate.max())}."
        )
    return found


def where_efficiency_falls(fit: Fit, *, below: float = 0.8, global_batch: int = 0) -> Count:
    """The fewest workers whose efficiency is under a share of the ideal.

    Raises:
        WorkbenchError: it stays above, for every number of workers; says how low it comes.
    """
    if not 0 < below < 1:
        raise WorkbenchError(f"`below` is {below}: it has to be a share between 0 and 1.")
    counts = _counts(global_batch)

    def efficiency(model: StepModel) -> np.ndarray:
        batch = global_batch / counts if global_batch else np.full(len(counts), model.batch_size)
        return batch / model.seconds(counts, batch) / (batch[0] / model.seconds([1], batch[:1]))

    found = _first(fit, counts, lambda model: efficiency(model) < below)
    if found is None:
        raise WorkbenchError(
            f"Efficiency does not fall under {below:.0%} up to {counts[-1]:,} workers: it is "
            f"{efficiency(fit.model).min():.0%} at its lowest."
        )
    return found


def what_if(
    fit: Fit, workers: Sequence[int], *, fabric: Fabric | None = None, global_batch: int = 0, **exchange
) -> pd.DataFrame:
    """What another fabric or another way of exchanging gradients would bring.

    Args:
        fit: a fitted model.
        workers: numbers of workers.
        fabric: to be used instead; a bandwidth that was fitted is replaced with it.
        global_batch: as for `scaling.predict`.
        **exchange: fields of `scaling_model.Exchange` to be changed, such as `compression="fp16"`, `overlap=0.6`.

    Returns:
        One row per number: `workers`, `images_per_second` (as it is), `changed` (with the change), `gain` (0.1 being a
        tenth more), `gain_low`, `gain_high` (95 %, NaN where the fit has no interval).
    """
    if fabric is not None:
        exchange["fabric"] = fabric
    other = replace(fit, model=_with(fit.model, exchange), draws=tuple(_with(model, exchange) for model in fit.draws))
    now, then = (predict(which, workers, global_batch=global_batch) for which in (fit, other))
    # Of the same draw, before and after, so that what they share falls out.
    gains = [
        before.seconds(now["workers"], now["batch_size"]) / after.seconds(now["workers"], now["batch_size"]) - 1
        for before, after in zip(fit.draws, other.draws, strict=True)
    ]
    low, high = band(gains, len(now))
    columns = {"changed": then["images_per_second"], "gain": then["images_per_second"] / now["images_per_second"] - 1}
    return now[["workers", "images_per_second"]].assign(**columns, gain_low=low, gain_high=high)


def answers(
    fit: Fit,
    *,
    images: int,
    wanted: Sequence[float],
    fabrics: Mapping[str, Fabric] | None = None,
    workers: Sequence[int] = (64, 1024, LIMIT),
) -> pd.DataFrame:
    """Questions that one asks before buying or booking, answered: columns `question`, `answer`.

    Args:
        fit: a fitted model.
        images: of the whole training.
        wanted: times in seconds.
        fabrics: others to be tried, by name.
        workers: where changes are looked at.
    """
    rows = [
        (f"workers for {_time(seconds)}", _told(workers_for, fit, seconds=seconds, images=images)) for seconds in wanted
    ]
    rows.append(("workers at which efficiency falls under 80 %", _told(where_efficiency_falls, fit, below=0.8)))
    tried = {"gradients in fp16": {"compression": "fp16"}}
    tried |= {f"fabric: {name}": {"fabric": fabric} for name, fabric in (fabrics or {}).items()}
    for name, change in tried.items():
        gains = what_if(fit, workers, **change)
        told = [f"{row.gain:+.1%} at {row.workers:,}" for row in gains.itertuples()]
        rows.append((name, "throughput " + ", ".join(told) + " workers"))
    return pd.DataFrame(rows, columns=["question", "answer"])


def _with(model: StepModel, exchange: dict) -> StepModel:
    return replace(model, exchange=replace(model.exchange, **exchange))


def _counts(global_batch: int) -> np.ndarray:
    # Nobody can have less than an image.
    return np.arange(1, min(LIMIT, global_batch or LIMIT) + 1)


def _first(fit: Fit, counts: np.ndarray, holds: Callable[[StepModel], np.ndarray]) -> Count | None:
    """The first of the counts for which it holds, None if none; with an interval from the fit's draws."""

    def first(model: StepModel) -> float:
        true = holds(model)
        return float(counts[true.argmax()]) if true.any() else np.inf

    best = first(fit.model)
    if not np.isfinite(best):
        return None
    drawn = np.sort([first(model) for model in fit.draws])
    if not len(drawn):
        return Count(int(best), np.nan, np.nan)
    # Whole numbers that were drawn, since infinite ones cannot be interpolated.
    low, high = np.quantile(drawn, [0.025, 0.975], method="nearest")
    return Count(int(best), float(low), float(high))


def _told(question: Callable, *args, **kwargs) -> str:
    try:
        return str(question(*args, **kwargs))
    except WorkbenchError as error:
        return str(error)


def _time(seconds: float) -> str:
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} seconds"
