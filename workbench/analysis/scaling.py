"""From throughput to speed-up, efficiency and time, and a small model that predicts them.

It measures nothing: it takes images per second by number of workers, wherever they come from.

    from workbench.analysis import published, scaling

    article = published.published_scaling()
    model = scaling.fit_step_time(article[article["workers"] <= 4], batch_size=64)
    scaling.predict(model, [8, 16, 32])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from workbench import WorkbenchError


@dataclass(frozen=True)
class StepTime:
    """What one training step takes, in seconds: `compute + communication * log2(workers)`."""

    compute: float
    communication: float
    batch_size: int  # images per worker and step

    def seconds(self, workers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Seconds per step at each number of workers."""
        return self.compute + self.communication * np.log2(np.asarray(workers, dtype=float))


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
    _check(measured)
    table = measured.sort_values("workers", ignore_index=True)
    of_one = table["images_per_second"].iloc[0] / table["workers"].iloc[0]
    table["speed_up"] = table["images_per_second"] / of_one
    table["efficiency"] = table["speed_up"] / table["workers"]
    table["seconds"] = images_per_epoch * epochs / table["images_per_second"]
    spread = [name for name in ("spread_low", "spread_high") if name in table]
    return table[["workers", "images_per_second", "speed_up", "efficiency", "seconds", *spread]]


def fit_step_time(table: pd.DataFrame, *, batch_size: int) -> StepTime:
    """Fit the time of a step to measured throughput, by least squares with no negative part.

    In data-parallel training every worker computes the same, whatever their number; what grows is the
    averaging of gradients. Its cost is taken to grow with log2(workers), as the steps of a tree or
    recursive-doubling all-reduce do (Thakur, Rabenseifner, Gropp: Optimization of Collective Communication
    Operations in MPICH, 2005); waiting for the slowest of n workers grows about as slowly. A ring's bandwidth
    term, (n - 1) / n, levels off after a few workers and cannot describe the losses that are seen beyond:
    fitted to the article's 1, 2 and 4 GPUs it is 17 % too high at 16, where this is within 1 %.

    Args:
        table: `workers`, `images_per_second`, at two numbers of workers or more.
        batch_size: images per worker and step.

    Raises:
        WorkbenchError: fewer than two numbers of workers, or a figure that is not positive.
    """
    _check(table)
    if len(table) < 2:
        raise WorkbenchError(
            f"One number of workers ({table['workers'].iloc[0]}) says nothing about communication: measure two or more."
        )
    workers = table["workers"].to_numpy(float)
    seconds = batch_size * workers / table["images_per_second"].to_numpy(float)
    # Divided by the measured time, so that what is kept small is the relative error.
    parts = np.column_stack([np.ones_like(workers), np.log2(workers)]) / seconds[:, None]
    (compute, communication), _ = nnls(parts, np.ones_like(workers))
    return StepTime(float(compute), float(communication), batch_size)


def predict(model: StepTime, workers: Sequence[int]) -> pd.DataFrame:
    """The throughput that the model predicts.

    Returns:
        One row per number: `workers`, `images_per_second`, `speed_up`, `efficiency`, `step_seconds`.
    """
    workers = np.asarray(workers, dtype=int)
    seconds = model.seconds(workers)
    efficiency = model.seconds([1]) / seconds
    columns = {
        "workers": workers,
        "images_per_second": model.batch_size * workers / seconds,
        "speed_up": efficiency * workers,
        "efficiency": efficiency,
        "step_seconds": seconds,
    }
    return pd.DataFrame(columns)


def _check(table: pd.DataFrame) -> None:
    if table.empty:
        raise WorkbenchError("There is no throughput to look at: measure at one number of workers or more first.")
    for name in ("workers", "images_per_second"):
        if not (table[name] > 0).all():
            value = table[name][~(table[name] > 0)].iloc[0]
            raise WorkbenchError(f"`{name}` is {value} in the table of throughput: it has to be more than 0.")
    if table["workers"].duplicated().any():
        twice = table["workers"][table["workers"].duplicated()].iloc[0]
        raise WorkbenchError(
            f"The table of throughput has {twice} workers twice: take the median of the repetitions first."
        )
