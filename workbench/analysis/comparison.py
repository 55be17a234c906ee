"""Two runs, or two averages of runs, compared on the same images; and runs averaged into an ensemble.

from workbench.analysis import comparison, evaluation

first = evaluation.read_predictions("results/a/predictions-test.csv")
second = comparison.average_predictions([evaluation.read_predictions(path) for path in paths])
comparison.compare_predictions(first, second)
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from workbench import WorkbenchError
from workbench.analysis import delong, evaluation, resampling

Predictions = tuple[pd.DataFrame, pd.DataFrame, pd.Series, pd.Series]  # labels, scores, images, patients


def align_predictions(first: Predictions, second: Predictions) -> Predictions:
    """The second predictions in the order of the first's images and findings, which are matched by name.

    Raises:
        WorkbenchError: other images, findings, labels or patients: the two were not scored on the same test.
    """
    labels, scores, images, patients = second
    odd = sorted(set(first[0].columns) ^ set(labels.columns))
    if odd:
        raise WorkbenchError(f"The predictions are of different findings ({', '.join(odd)}): compare like with like.")
    apart = sorted(set(first[2]) ^ set(images))
    if apart:
        raise WorkbenchError(
            f"The predictions are of different images: {len(apart)} stand in one only, such as {apart[0]}; compare "
            "runs on the same split."
        )
    order = pd.Series(range(len(images)), index=images.to_numpy())[first[2].to_numpy()].to_numpy()
    names = list(first[0].columns)
    labels, scores = (table[names].iloc[order].reset_index(drop=True) for table in (labels, scores))
    images, patients = (column.iloc[order].reset_index(drop=True) for column in (images, patients))
    wrong = (labels.to_numpy() != first[0].to_numpy()).any(axis=0)
    if wrong.any():
        raise WorkbenchError(
            f"The predictions have other labels for {', '.join(np.array(names)[wrong])} on the same images: they come "
            "from other tables, or the findings' names were exchanged."
        )
    if (patients.to_numpy() != first[3].to_numpy()).any():
        raise WorkbenchError("The predictions give the same images to other patients: they come from other tables.")
    return labels, scores, images, patients


def average_predictions(several: Sequence[Predictions]) -> Predictions:
    """An ensemble: the mean of the scores of several runs on the same images. Raises as `align_predictions`."""
    labels, scores, images, patients = several[0]
    total = scores.to_numpy(float).copy()
    for other in several[1:]:
        total += align_predictions(several[0], other)[1].to_numpy(float)
    return labels, pd.DataFrame(total / len(several), index=scores.index, columns=scores.columns), images, patients


def compare_predictions(
    first: Predictions, second: Predictions, *, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """How much better the second reads than the first.

    Args:
        first, second: as `evaluation.read_predictions` gives them; of the same images.
        resamples: of the patients, the same for both sides (a paired bootstrap).
        seed: the same seed gives the same intervals.

    Returns:
        Index finding, and last "mean" over those that are defined: `first`, `second` (AUROC), `difference` (second less
        first), `ci_low`, `ci_high` (95 %, bootstrap), `p` (two-sided; DeLong's test by patient, and for the mean,
        which has none, twice the smaller share of resamples on one side of 0), `p_holm` (corrected for the number of
        findings, Holm 1979; NaN for the mean), `positives`, `negatives`.
    """
    labels, one, _, patients = first
    evaluation.check_tables(labels, one, patients)
    _, other, _, _ = align_predictions(first, second)
    evaluation.check_tables(labels, other, patients)
    areas = [resampling.bootstrap_areas(labels, s, patients, resamples=resamples, seed=seed)[0] for s in (one, other)]
    drawn = areas[1] - areas[0]
    rows = {}
    for column, finding in enumerate(labels.columns):
        label = labels[finding].to_numpy(bool)
        was, now = evaluation.auroc(label, one[finding]), evaluation.auroc(label, other[finding])
        low, high = resampling.interval(drawn[:, column])
        rows[finding] = {
            "first": was,
            "second": now,
            "difference": now - was,
            "ci_low": low,
            "ci_high": high,
            "p": delong.paired_p_value(label, one[finding], other[finding], patients),
            "positives": int(label.sum()),
            "negatives": int((~label).sum()),
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.insert(6, "p_holm", holm(table["p"]))
    known = table["difference"].notna().to_numpy()
    mean = table.loc[known, ["first", "second", "difference"]].mean()
    means = drawn[:, known].mean(axis=1) if known.any() else np.array([])
    mean["ci_low"], mean["ci_high"] = resampling.interval(means)
    means = means[np.isfinite(means)]
    smaller = min((means <= 0).sum(), (means >= 0).sum())
    mean["p"] = min(1.0, 2 * max(smaller, 1) / len(means)) if len(means) else np.nan
    table.loc["mean"] = mean
    return table.astype({"positives": "Int64", "negatives": "Int64"}).rename_axis("finding")


def holm(p_values: pd.Series) -> pd.Series:
    """Correct p-values for their number, so that one false alarm among all has the chance of one (Holm 1979)."""
    p = p_values.dropna().sort_values()
    raised = (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1)
    return raised.reindex(p_values.index)
