"""Thresholds: fitted on validation images, scored on test images, with intervals over patients.

from workbench.analysis import thresholds

chosen = thresholds.fit_thresholds(val_labels, val_scores, rule="sensitivity", sensitivity=0.9)
thresholds.score_thresholds(chosen, labels, scores, patients)
"""

import numpy as np
import pandas as pd

from workbench import WorkbenchError
from workbench.analysis import evaluation, resampling

RULES = ("youden", "sensitivity", "f1")
MEASURES = ("sensitivity", "specificity", "ppv", "npv", "f1")


def fit_thresholds(
    labels: pd.DataFrame, scores: pd.DataFrame, *, rule: str = "youden", sensitivity: float = 0.9
) -> pd.Series:
    """Choose a threshold per finding; an image is called positive from it on.

    Args:
        labels: (n, K), 0 or 1, of the images to choose on: validation, never test.
        scores: (n, K), the same columns.
        rule: "youden" for the largest sensitivity + specificity (Youden 1950), "sensitivity" for the highest threshold
            that finds the wanted share of positives, "f1" for the largest F1.
        sensitivity: the wanted share, above 0 and up to 1, for that rule.

    Returns:
        (K,), index finding; NaN where one class is absent.

    Raises:
        WorkbenchError: an unknown rule, a share out of range, or tables that do not fit.
    """
    evaluation.check_tables(labels, scores)
    if rule not in RULES:
        raise WorkbenchError(f"There is no rule `{rule}` for thresholds: choose from {', '.join(RULES)}.")
    if not 0 < sensitivity <= 1:
        raise WorkbenchError(f"A sensitivity of {sensitivity} cannot be asked for: it lies above 0 and up to 1.")
    chosen = {}
    for finding in labels.columns:
        label = labels[finding].to_numpy(bool)
        if not label.any() or label.all():
            chosen[finding] = np.nan
            continue
        threshold, true, false = evaluation.curve(label, scores[finding].to_numpy(float))
        if rule == "sensitivity":
            # Of whole numbers: a share of 0.9 of ten positives is nine, whatever 0.9 * 10 comes to.
            best = int(np.argmax(true >= np.ceil(sensitivity * true[-1] - 1e-9)))
        else:
            youden = true / true[-1] - false / false[-1]
            best = int(np.argmax(youden if rule == "youden" else 2 * true / (true + false + true[-1])))
        chosen[finding] = threshold[best]
    return pd.Series(chosen, name="threshold", dtype=float).rename_axis("finding")


def score_thresholds(
    thresholds: pd.Series,
    labels: pd.DataFrame,
    scores: pd.DataFrame,
    patients: pd.Series,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How thresholds do on other images than those that they were fitted on.

    Args:
        thresholds: `fit_thresholds`'s answer; findings are matched by name.
        labels: (n, K), 0 or 1.
        scores: (n, K), the same columns.
        patients: (n,), whom each image shows.
        resamples: bootstrap resamples of the patients; an interval is their 2.5th to 97.5th percentile.
        seed: the same seed gives the same intervals.

    Returns:
        Index `finding`; `threshold`, the counts `true_positives`, `false_positives`, `false_negatives` and
        `true_negatives`, and `sensitivity`, `specificity`, `ppv`, `npv` (positive and negative predictive value) and
        `f1`, each with `_low` and `_high`. NaN where it is not defined.

    Raises:
        WorkbenchError: tables that do not fit, or thresholds of other findings.
    """
    evaluation.check_tables(labels, scores, patients)
    if set(thresholds.index) != set(labels.columns):
        odd = sorted(set(thresholds.index) ^ set(labels.columns))
        raise WorkbenchError(f"Thresholds and scores are of different findings ({', '.join(odd)}): fit them again.")
    thresholds = thresholds[labels.columns]
    known = thresholds.notna().to_numpy()
    truth, called = labels.to_numpy(bool), scores.to_numpy(float) >= thresholds.to_numpy()
    cells = np.stack([truth & called, ~truth & called, truth & ~called, ~truth & ~called]).astype(float)
    patient, names = pd.factorize(np.asarray(patients))
    counts = np.zeros((len(names), *cells.shape[::2]))
    np.add.at(counts, patient, cells.transpose(1, 0, 2))
    drawn = np.full((resamples, len(MEASURES), len(known)), np.nan)
    for start, weights in resampling.draw_patients(len(names), resamples=resamples, seed=seed):
        sums = np.tensordot(weights, counts, axes=(0, 0))
        drawn[start : start + len(sums)] = _measures(sums).transpose(1, 0, 2)
    whole = counts.sum(axis=0)
    point = _measures(whole[None])[:, 0]
    rows = {}
    for column, finding in enumerate(labels.columns):
        row = {"threshold": thresholds[finding]}
        table = whole[:, column] if known[column] else np.full(4, np.nan)
        row |= dict(zip(("true_positives", "false_positives", "false_negatives", "true_negatives"), table, strict=True))
        for number, measure in enumerate(MEASURES):
            low, high = resampling.interval(drawn[:, number, column]) if known[column] else (np.nan, np.nan)
            row |= {measure: point[number, column] if known[column] else np.nan}
            row |= {f"{measure}_low": low, f"{measure}_high": high}
        rows[finding] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("finding")


def _measures(sums: np.ndarray) -> np.ndarray:
    """(resamples, 4, K) counts -> (5, resamples, K) in the order of MEASURES; NaN where nothing is divided by."""
    true, false, missed, cleared = (sums[:, cell] for cell in range(4))

    def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)

    return np.stack(
        [
            share(true, true + missed),
            share(cleared, cleared + false),
            share(true, true + false),
            share(cleared, cleared + missed),
            share(2 * true, 2 * true + false + missed),
        ]
    )
