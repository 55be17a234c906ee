"""From throughput to speed-up, efficiency and time, and what a fitted model of a step predicts, with intervals.

It measures nothing: it takes images per second by number of workers, wherever they come from. What a step is made of
is in `scaling_model.py`, how it is fitted in `scaling_fit.py` (to be had from here), what follows in `forecast.py`.

    from workbench.analysis import published, scaling
    from workbench.analysis.scaling_model import FABRICS, Exchange

    article = published.published_scaling()
    exchange = Exchange(gradient_bytes=28e6, fabric=FABRICS["4 V100, EDR InfiniBand"])
    fit = scaling.fit_step_model(article[article["workers"] <= 4], exchange=exchange, batch_size=64)
    scaling.predict(fit, [8, 12, 16])
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from workbench import WorkbenchError
from workbench.analysis.scaling_fit import FREE, Fit, band, check, fit_step_model, parameters
from workbench.analysis.scaling_model import StepModel

__all__ = ["FREE", "Fit", "band", "fit_step_model", "parameters", "predict", "predict_parts", "scaling_table"]


def scaling_table(measured: pd.DataFrame, *, images_per_epoch: int, epochs: int) -> pd.DataFrame:
    """Speed-up, efficiency and time to train from measured throughput.

    Args:
        measured: `workers`, `images_per_second` (over all workers), one row per number of workers; optionally
            `spread_low` and `spread_high`, the slowest and the fastest repetition.
        images_per_epoch: images of one epoch.
        epochs: epochs of the training whose time is wanted.

    Returns:
        Sorted by workers: `workers`, `images_per_second`, `speed_up` (over one worker), `efficiency`
        (speed-up per worker, 1 being ideal), `seconds`, and the spread if given. Where one worker was not
        measured, the smallest number of workers stands for it, taken as ideal.

    Raises:
        WorkbenchError: no rows, a number of workers twice, or a figure that is not positive.
    """
    check(measured)
    if measured["workers"].duplicated().any():
        twice = measured["workers"][measured["workers"].duplicated()].iloc[0]
        raise WorkbenchError(
            f"The table of throughput has {twice} workers twice: take the median of the repetitions first."
        )
    table = measured.sort_values("workers", ignore_index=True)
    of_one = table["images_per_second"].iloc[0] / table["workers"].iloc[0]
    table["speed_up"] = table["images_per_second"] / of_one
    table["efficiency"] = table["speed_up"] / table["workers"]
    table["seconds"] = images_per_epoch * epochs / table["images_per_second"]
    spread = [name for name in ("spread_low", "spread_high") if name in table]
    return table[["workers", "images_per_second", "speed_up", "efficiency", "seconds", *spread]]


def predict(fit: Fit, workers: Sequence[int], *, global_batch: int = 0) -> pd.DataFrame:
    """The throughput that a fit predicts.

    Args:
        fit: a fitted model.
        workers: numbers of workers, up to `scaling_model.LIMIT`.
        global_batch: images per step over all workers, shared out evenly (strong scaling); 0: each worker has the
            fit's batch size, however many they are (weak scaling).

    Returns:
        One row per number: `workers`, `batch_size` (per worker), `images_per_second`, `speed_up`, `efficiency`
        (over one worker, 1 being ideal), `step_seconds`, and `low`, `high`, `efficiency_low`, `efficiency_high`: 95 %,
        of the curve and not of single steps; NaN where the fit has no interval.
    """
    workers = np.asarray(workers, dtype=int)
    batch = _batch(fit.model, workers, global_batch)
    rates = [_rates(model, workers, global_batch) for model in (fit.model, *fit.draws)]
    low, high = band([rate for rate, _ in rates[1:]], len(workers))
    least, most = band([efficiency for _, efficiency in rates[1:]], len(workers))
    rate, efficiency = rates[0]
    columns = {
        "workers": workers,
        "batch_size": batch,
        "images_per_second": rate,
        "low": low,
        "high": high,
        "speed_up": efficiency * workers,
        "efficiency": efficiency,
        "efficiency_low": least,
        "efficiency_high": most,
        "step_seconds": fit.model.seconds(workers, batch),
    }
    return pd.DataFrame(columns)


def predict_parts(fit: Fit, workers: Sequence[int], *, global_batch: int = 0) -> pd.DataFrame:
    """What the predicted step is made of: `workers`, and seconds in a column for each of `scaling_model.PARTS`."""
    workers = np.asarray(workers, dtype=int)
    return pd.DataFrame({"workers": workers} | fit.model.parts(workers, _batch(fit.model, workers, global_batch)))


def _rates(model: StepModel, workers: np.ndarray, global_batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Images per second over all workers, and the efficiency."""
    batch = _batch(model, workers, global_batch)
    rate = batch * workers / model.seconds(workers, batch)
    alone = global_batch or model.batch_size
    return rate, rate / workers / (alone / model.seconds([1], alone))


def _batch(model: StepModel, workers: np.ndarray, global_batch: int) -> np.ndarray:
    if global_batch and workers.max() > global_batch:
        raise WorkbenchError(
            f"{workers.max():,} workers cannot share a global batch of {global_batch:,} images: ask for "
            f"{global_batch:,} workers at most, or a larger batch."
        )
    return global_batch / workers if global_batch else np.full(len(workers), float(model.batch_size))
