"""Calibration: does a finding occur as often as its scores say, and a correction fitted on validation.

The correction is a line on the scale of the logit, with a slope and a shift (Platt 1999) or a slope alone (temperature
scaling, Guo et al. 2017). Its slope is positive, so it changes no AUROC. It is kept beside the model, by finding.

    from workbench.analysis import calibration

    fitted = calibration.fit_calibration(val_labels, val_scores)
    calibrated = calibration.apply_calibration(fitted, scores)
    calibration.calibration_scores(labels, calibrated)
    calibration.write_calibration("results/first/calibration.json", fitted)
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit, logit

from workbench import WorkbenchError
from workbench.analysis import evaluation, resampling
from workbench.runs import read_json, write_json

METHODS = ("platt", "temperature")
_NEAREST = 1e-7  # scores are kept this far from 0 and 1, where the logit has no value


def fit_calibration(labels: pd.DataFrame, scores: pd.DataFrame, *, method: str = "platt") -> pd.DataFrame:
    """Fit a correction per finding, on validation images.

    Args:
        labels: (n, K), 0 or 1.
        scores: (n, K) in [0, 1], the same columns.
        method: "platt" for slope and shift, with Platt's targets, which stay clear of 0 and 1 so that a few positives
            cannot make the slope endless; "temperature" for the slope alone.

    Returns:
        Index `finding`; `slope` (above 0), `shift`, `positives`, and `fitted`: False where one class is absent or where
        scores fall as the finding gets likelier, so that no correction is made (slope 1, shift 0).
    """
    evaluation.check_tables(labels, scores)
    if method not in METHODS:
        raise WorkbenchError(f"There is no calibration `{method}`: choose from {', '.join(METHODS)}.")
    rows = {}
    for finding in labels.columns:
        label = labels[finding].to_numpy(bool)
        row = {"slope": 1.0, "shift": 0.0, "positives": int(label.sum()), "fitted": False}
        if label.any() and not label.all():
            line = _fit_line(label, _logit(scores[finding].to_numpy(float)), shifted=method == "platt")
            if line[0] > 0:
                row |= {"slope": line[0], "shift": line[1], "fitted": True}
        rows[finding] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("finding")


def apply_calibration(fitted: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Correct scores (n, K) in [0, 1]; findings are matched by name, and others are refused by a WorkbenchError."""
    odd = sorted(set(fitted.index) ^ set(scores.columns))
    if odd:
        raise WorkbenchError(
            f"The calibration and the scores are of different findings ({', '.join(odd)}): run notebook 04 on this run."
        )
    fitted = fitted.loc[scores.columns]
    lines = _logit(scores.to_numpy(float)) * fitted["slope"].to_numpy() + fitted["shift"].to_numpy()
    corrected = np.where(fitted["fitted"].to_numpy(bool), expit(lines), scores.to_numpy(float))
    return pd.DataFrame(corrected, index=scores.index, columns=scores.columns)


def calibration_scores(labels: pd.DataFrame, scores: pd.DataFrame, *, groups: int = 10) -> pd.DataFrame:
    """How far scores are from what is observed.

    Returns:
        Index `finding`; `ece`, the expected calibration error: the distance of mean score and observed share, averaged
        over groups of (nearly) equal size, weighted by images; `brier`, the mean squared distance of score and label;
        `prevalence` and `mean_score`. All in [0, 1], 0 being best for the first two.
    """
    table = calibration_table(labels, scores, groups=groups)
    off = (table["predicted"] - table["observed"]).abs() * table["images"]
    ece = off.groupby(table["finding"], sort=False).sum() / len(labels)
    return pd.DataFrame(
        {
            "ece": ece,
            "brier": ((scores - labels) ** 2).mean(),
            "prevalence": labels.mean(),
            "mean_score": scores.mean(),
        }
    ).rename_axis("finding")


def calibration_table(labels: pd.DataFrame, scores: pd.DataFrame, *, groups: int = 10) -> pd.DataFrame:
    """The mean score and the observed share of each finding, in groups of images of rising score.

    Returns:
        Long: `finding`, `predicted` and `observed` (0 to 1), `low` and `high` (Wilson's 95 % interval of the observed
        share, 1927), `positives`, `images`. The groups are of (nearly) equal size.
    """
    evaluation.check_tables(labels, scores)
    rows = []
    for finding in labels.columns:
        order = np.argsort(scores[finding].to_numpy(), kind="stable")
        label, score = labels[finding].to_numpy()[order], scores[finding].to_numpy()[order]
        for part in np.array_split(np.arange(len(order)), min(groups, len(order))):
            low, high = resampling.wilson_interval(int(label[part].sum()), len(part))
            rows.append((finding, score[part].mean(), label[part].mean(), low, high, int(label[part].sum()), len(part)))
    return pd.DataFrame(rows, columns=["finding", "predicted", "observed", "low", "high", "positives", "images"])


def write_calibration(path: str | os.PathLike, fitted: pd.DataFrame, *, method: str = "platt") -> None:
    """Write a correction as JSON: the method, and slope, shift, positives and fitted by finding."""
    write_json(path, {"method": method, "findings": fitted.to_dict("index")})


def read_calibration(path: str | os.PathLike) -> pd.DataFrame:
    """Read what `write_calibration` wrote. Raises a WorkbenchError where it is missing or broken."""
    path = Path(path)
    try:
        fitted = pd.DataFrame.from_dict(read_json(path, "run notebook 04 again")["findings"], orient="index")
        sound = (fitted["slope"] > 0).all() and np.isfinite(fitted[["slope", "shift"]]).all(axis=None)
        fitted = fitted.astype({"fitted": bool})
    except FileNotFoundError:
        raise WorkbenchError(f"There is no calibration at {path}: run notebook 04 on this run first.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkbenchError(f"The calibration {path} cannot be read ({error}): run notebook 04 again.") from None
    if not sound:
        raise WorkbenchError(f"The calibration {path} has a slope that is not above 0: run notebook 04 again.")
    return fitted.rename_axis("finding")


def _logit(scores: np.ndarray) -> np.ndarray:
    return logit(np.clip(scores, _NEAREST, 1 - _NEAREST))


def _fit_line(label: np.ndarray, x: np.ndarray, *, shifted: bool) -> tuple[float, float]:
    """Slope and shift of least cross-entropy against Platt's targets."""
    positives, negatives = label.sum(), (~label).sum()
    target = np.where(label, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
        z = line[0] * x + (line[1] if shifted else 0.0)
        off = expit(z) - target
        return float(np.mean(np.logaddexp(0, z) - target * z)), np.array([np.mean(off * x), np.mean(off) * shifted])

    best = minimize(loss, np.array([1.0, 0.0]), jac=True, method="BFGS").x
    return float(best[0]), float(best[1]) if shifted else 0.0
