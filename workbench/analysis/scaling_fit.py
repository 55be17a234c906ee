"""Fits the model of a step to measured throughput, with intervals, and refuses what the points say nothing about.

fit = fit_step_model(measured, exchange=exchange, batch_size=64)
parameters(fit)                                       # what was fitted, with 95 % intervals
fit.how                                               # where these come from
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from workbench import WorkbenchError
from workbench.analysis.scaling_model import Exchange, StepModel

# What can be fitted, with its unit. Bandwidths are fitted as seconds per byte, in which a step's time is linear.
FREE = {
    "per_image": "s",
    "jitter": "share",
    "overhead": "s",
    "bandwidth_within": "bytes/s",
    "bandwidth_between": "bytes/s",
}


@dataclass(frozen=True)
class Fit:
    """A fitted model, and how sure it is.

    Attributes:
        model: the best fit.
        free: the parameters that were fitted; all others were given.
        draws: models fitted to points redrawn within their noise; none where nothing is known of the noise.
        how: where the intervals come from, or why there are none.
    """

    model: StepModel
    free: tuple[str, ...]
    draws: tuple[StepModel, ...]
    how: str


def fit_step_model(
    measured: pd.DataFrame,
    *,
    exchange: Exchange,
    batch_size: int,
    free: Sequence[str] = ("per_image", "jitter"),
    input_per_image: float = 0.0,
    resamples: int = 300,
    seed: int = 0,
) -> Fit:
    """Fit a step's time to measured throughput: least squares of relative (logarithmic) errors, no parameter negative.

    Points are medians of the rows with equal workers and batch. Intervals come from a parametric bootstrap: the points
    are redrawn within their noise and fitted again. A point's noise is the standard error of its median, from its own
    rows, or the scatter of the points about the fit if that is larger; the latter is known no better than the points
    beyond the parameters allow, so that it is drawn as Student's t asks (few points, wide intervals). A
    parameter that ends at 0 counts as none. With as many points as parameters only the rows speak, and without repeated
    rows there is no interval. None of this covers what the model leaves out, nor a machine that is busier tomorrow;
    steps in a row are taken as independent.

    Args:
        measured: `workers`, `images_per_second` over all workers, optionally `batch_size` per worker; repetitions are
            further rows.
        exchange: what is given of the exchange of gradients.
        batch_size: images per worker and step, where the table does not say, and of the fitted model.
        free: the names in `FREE` to be fitted; the rest is given.
        input_per_image: seconds that a worker was measured to wait for each image; throughput alone cannot tell it from
            computing.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        WorkbenchError: a figure that is not positive, or parameters that these points say nothing about.
    """
    check(measured)
    points = measured.assign(batch_size=measured.get("batch_size", batch_size))
    groups = points.groupby(["workers", "batch_size"])["images_per_second"]
    workers, batch = (np.array(values) for values in zip(*groups.groups, strict=True))
    free = tuple(free)
    start = StepModel(1.0, 0.0, batch_size, exchange, input_per_image=input_per_image)
    _check_identified(free, workers, batch, exchange)
    median = groups.median().to_numpy()
    seconds = batch * workers / median
    best, found = _solve(start, free, workers, batch, seconds)
    rng = np.random.default_rng(seed)
    within = np.array([_error_of_median(group.to_numpy(), rng) for _, group in groups])
    # A parameter that ended at nothing describes nothing.
    surplus = len(workers) - int((found > 1e-4).sum())
    scatter = 0.0
    if surplus > 0:
        off = np.log(best.seconds(workers, batch) / seconds)
        scatter = float(np.sqrt((off**2).sum() / surplus))
    known = np.isfinite(within).all()
    if not known and surplus <= 0:
        told = f"no interval: {len(workers)} points for {len(free)} parameters, and none was measured twice"
        return Fit(best, free, (), told)
    draws = []
    for _ in range(resamples):
        drawn = scatter * np.sqrt(surplus / rng.chisquare(surplus)) if surplus > 0 else 0.0
        noise = np.fmax(within, drawn) * rng.standard_normal(len(workers))
        # Student's t draws a few that are beyond all numbers.
        drawn_seconds = seconds * np.exp(np.clip(noise, -5, 5))
        draws.append(_solve(start, free, workers, batch, drawn_seconds, found)[0])
    told = [f"the scatter of {len(workers)} points about {len(workers) - surplus} parameters"] if surplus > 0 else []
    told += ["the spread of repetitions"] if np.isfinite(within).any() else []
    return Fit(best, free, tuple(draws), f"95 % intervals from {' and '.join(told)}")


def parameters(fit: Fit) -> pd.DataFrame:
    """What was fitted: index `parameter`, columns `value`, `low`, `high` (95 %, NaN where unknown), `unit`."""
    rows = {}
    for name in fit.free:
        low, high = band([[_value(model, name)] for model in fit.draws], 1)
        rows[name] = {"value": _value(fit.model, name), "low": low[0], "high": high[0], "unit": FREE[name]}
    return pd.DataFrame(rows).T.rename_axis("parameter")


def band(values: Sequence, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The 2.5 % and 97.5 % quantiles of rows of `count` values; NaN without rows."""
    if not len(values):
        return np.full(count, np.nan), np.full(count, np.nan)
    return tuple(np.quantile(np.asarray(values), [0.025, 0.975], axis=0))


def _solve(
    start: StepModel, free: tuple[str, ...], workers: np.ndarray, batch: np.ndarray, seconds: np.ndarray, begin=None
) -> tuple[StepModel, np.ndarray]:
    """The model that fits best, and its parameters on a scale of about 1, from which a like fit may `begin`."""
    typical = np.median(seconds / batch)
    scales = {"per_image": typical, "jitter": 0.1, "overhead": 0.1 * typical * np.median(batch)}
    # A bandwidth at which the exchange takes as long as a step.
    scales |= dict.fromkeys(
        ("bandwidth_within", "bandwidth_between"), np.median(seconds) / start.exchange.gradient_bytes
    )
    scale = np.array([scales[name] for name in free])
    # Away from the bound, along which no way would lead off.
    begin = np.full(len(free), 0.5) if begin is None else np.maximum(begin, 0.01)

    def off(values: np.ndarray) -> np.ndarray:
        # The logarithm, so that half as long and twice as long are as far off.
        return np.log(_changed(start, free, values * scale).seconds(workers, batch) / seconds)

    found = least_squares(off, begin, bounds=(0, np.inf), ftol=1e-9, xtol=1e-9, gtol=1e-9)
    return _changed(start, free, found.x * scale), found.x


def _changed(model: StepModel, names: tuple[str, ...], values: np.ndarray) -> StepModel:
    told = dict(zip(names, map(float, values), strict=True))
    # No slower than a modem: a bandwidth of nothing is none.
    speeds = {name: 1 / max(told.pop(name), 1e-15) for name in names if name.startswith("bandwidth")}
    exchange = replace(model.exchange, fabric=replace(model.exchange.fabric, **speeds)) if speeds else model.exchange
    return replace(model, exchange=exchange, **told)


def _value(model: StepModel, name: str) -> float:
    return getattr(model.exchange.fabric if name.startswith("bandwidth") else model, name)


def _error_of_median(rates: np.ndarray, rng: np.random.Generator) -> float:
    """Relative standard error of the median of repetitions, by resampling them; NaN for a single one."""
    if len(rates) < 2:
        return np.nan
    return float(np.median(rng.choice(rates, (400, len(rates))), axis=1).std() / np.median(rates))


def _check_identified(free: tuple[str, ...], workers: np.ndarray, batch: np.ndarray, exchange: Exchange) -> None:
    """Refuse to fit what these points say nothing about."""
    node, counts = exchange.fabric.workers_per_node, ", ".join(str(n) for n in sorted(set(workers.tolist())))
    for name in free:
        if name not in FREE:
            raise WorkbenchError(f"`{name}` cannot be fitted: choose among {', '.join(FREE)}.")
    missing = {
        "jitter": (len(set(workers)) < 2, "two numbers of workers or more"),
        "overhead": (len(set(batch)) < 2, "the same with another batch per worker, as in strong scaling"),
        "bandwidth_within": (not ((workers > 1) & (workers <= node)).any(), f"2 to {node} workers on one node"),
        "bandwidth_between": (workers.max() <= node, f"more than {node} workers, on two nodes or more"),
    }
    for name, (unknown, wanted) in missing.items():
        if name in free and unknown:
            raise WorkbenchError(
                f"`{name}` cannot be told from points at {counts} workers: measure {wanted}, or leave it out of "
                "`free`, so that it is taken as given."
            )
    if len(workers) < len(free):
        raise WorkbenchError(
            f"{len(workers)} points, at {counts} workers, cannot tell {len(free)} parameters ({', '.join(free)}): "
            "measure more, or take some as given."
        )


def check(table: pd.DataFrame) -> None:
    """Refuse a table of throughput without rows, or with a figure that is not positive."""
    if table.empty:
        raise WorkbenchError("There is no throughput to look at: measure at one number of workers or more first.")
    for name in ("workers", "images_per_second"):
        if not (table[name] > 0).all():
            value = table[name][~(table[name] > 0)].iloc[0]
            raise WorkbenchError(f"`{name}` is {value} in the table of throughput: it has to be more than 0.")
