"""How well a model reads radiographs: arrays in, tables out.

Areas under the ROC curve with intervals, curves, thresholds, calibration, and the examples worth looking at.
It neither runs a model nor draws. Intervals are bootstraps over patients, because the images of one patient
resemble each other: resampling images would pretend to know more than the data do. A finding of which one
class is absent has no AUROC: it is NaN, stays out of the mean, and is listed.

    from workbench.analysis import evaluation

    labels, scores, images, patients = evaluation.read_predictions("results/first/predictions-test.csv")
    evaluation.auroc_table(labels, scores, patients)
    evaluation.mean_auroc(labels, scores, patients)
"""

import os
from pathlib import Path

import numpy as np
import pandas as pd

from workbench import WorkbenchError
from workbench.analysis import delong, resampling


def read_predictions(path: str | os.PathLike) -> tuple[pd.DataFrame, pd.DataFrame, pd.Series, pd.Series]:
    """Read and check a file of predictions.

    Args:
        path: a CSV file: `image`, `patient`, each finding (0 or 1), then each `<finding>_score` (0 to 1).

    Returns:
        Labels and scores (n, K), with the findings as columns of both, then the images and the patients (n).

    Raises:
        WorkbenchError: the file is missing or empty, or a column, label, score or image in it is wrong.
    """
    path = Path(path)
    try:
        table = pd.read_csv(path, dtype={"image": str})
    except FileNotFoundError:
        raise WorkbenchError(f"There are no predictions at {path}: train a model first (notebook 03).") from None
    except (ValueError, OSError) as error:
        raise WorkbenchError(f"{path} is not a CSV file of predictions ({error}): train again to write it.") from None
    names = [name for name in table.columns if name not in ("image", "patient")]
    findings = [name for name in names if not name.endswith("_score")]
    wanted = ["image", "patient", *findings, *(f"{name}_score" for name in findings)]
    if not findings or set(wanted) != set(table.columns):
        odd = sorted(set(wanted) ^ set(table.columns)) or ["a finding"]
        raise WorkbenchError(
            f"The columns of {path} are not those of predictions: {', '.join(odd)} is missing or too much; "
            "expected are image, patient, each finding and each <finding>_score."
        )
    if table.empty:
        raise WorkbenchError(f"{path} has no rows: the split it comes from holds no images.")
    for name in wanted:
        column = table[name]
        _refuse(path, column, column.isna(), "every cell needs a value")
        if name in findings:
            _refuse(path, column, ~column.isin([0, 1]), "a label is 0 or 1")
        elif name.endswith("_score"):
            numbers = pd.to_numeric(column, errors="coerce")
            _refuse(path, column, ~numbers.between(0, 1), "a score lies between 0 and 1")
    _refuse(path, table["image"], table["image"].duplicated(), "an image is predicted once")
    scores = table[[f"{name}_score" for name in findings]].set_axis(findings, axis=1).astype(float)
    return table[findings].astype("uint8"), scores, table["image"], table["patient"]


def auroc(label: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties counting half.

    Args:
        label: (n,), 0 or 1.
        score: (n,), higher means more likely positive.

    Returns:
        The area in [0, 1]; NaN if one class is absent.
    """
    label, score = np.asarray(label, dtype=bool), np.asarray(score)
    positives, negatives = int(label.sum()), int((~label).sum())
    if not positives or not negatives:
        return float("nan")
    against = np.sort(score[~label])
    beaten = np.searchsorted(against, score[label], "left") + np.searchsorted(against, score[label], "right")
    return float(beaten.sum() / (2 * positives * negatives))


def auroc_table(
    labels: pd.DataFrame, scores: pd.DataFrame, patients: pd.Series, *, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """The AUROC and the average precision of every finding with their 95 % intervals.

    Args:
        labels: (n, K), 0 or 1.
        scores: (n, K), the same columns.
        patients: (n,), whom each image shows.
        resamples: bootstrap resamples of the patients; the interval is their 2.5th to 97.5th percentile, over
            those resamples in which both classes occur.
        seed: the same seed gives the same interval.

    Returns:
        Index `finding`; `auroc`, `ci_low`, `ci_high`, `positives`, `negatives`; `delong_low` and `delong_high`,
        DeLong's interval by patient, as a cross-check; `average_precision`, `ap_ci_low`, `ap_ci_high`. Where one class
        is absent, the areas are NaN.

    Raises:
        WorkbenchError: the tables do not fit each other, or hold what is no label, score or patient.
    """
    check_tables(labels, scores, patients)
    areas, precisions = resampling.bootstrap_areas(labels, scores, patients, resamples=resamples, seed=seed)
    rows = {}
    for column, finding in enumerate(labels.columns):
        label, score = labels[finding].to_numpy(bool), scores[finding].to_numpy(float)
        low, high = resampling.interval(areas[:, column])
        ap_low, ap_high = resampling.interval(precisions[:, column])
        delong_low, delong_high = delong.interval(label, score, patients)
        rows[finding] = {
            "auroc": auroc(label, score),
            "ci_low": low,
            "ci_high": high,
            "positives": int(label.sum()),
            "negatives": int((~label).sum()),
            "delong_low": delong_low,
            "delong_high": delong_high,
            "average_precision": average_precision(label, score),
            "ap_ci_low": ap_low,
            "ap_ci_high": ap_high,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("finding")


def undefined_findings(labels: pd.DataFrame) -> list[str]:
    """The findings of which one class is absent: they have no AUROC, and stay out of every mean."""
    return [name for name in labels.columns if labels[name].nunique() < 2]


def mean_auroc(
    labels: pd.DataFrame, scores: pd.DataFrame, patients: pd.Series, *, resamples: int = 1000, seed: int = 0
) -> dict:
    """The mean AUROC and average precision over the findings that have one, with their 95 % intervals.

    Args:
        labels: (n, K), 0 or 1.
        scores: (n, K), the same columns.
        patients: (n,), whom each image shows.
        resamples: bootstrap resamples of the patients. The mean is taken in each; a resample in which one of
            the findings has no AUROC is left out, since its mean would be one of other findings.
        seed: the same seed gives the same interval.

    Returns:
        `auroc`, `ci_low`, `ci_high`, `average_precision`, `ap_ci_low`, `ap_ci_high`, `findings` (how many are in the
        mean), `undefined` (names of those that are not, because one class is absent). NaN where there is nothing to
        take a mean of.
    """
    check_tables(labels, scores, patients)
    undefined = undefined_findings(labels)
    known = [name for name in labels.columns if name not in undefined]
    areas, precisions = resampling.bootstrap_areas(
        labels[known], scores[known], patients, resamples=resamples, seed=seed
    )
    nothing = float("nan"), float("nan")
    low, high = resampling.interval(areas.mean(axis=1)) if known else nothing
    ap_low, ap_high = resampling.interval(precisions.mean(axis=1)) if known else nothing
    return {
        "auroc": float(np.mean([auroc(labels[name], scores[name]) for name in known])) if known else nothing[0],
        "ci_low": low,
        "ci_high": high,
        "average_precision": float(np.mean([average_precision(labels[name], scores[name]) for name in known]))
        if known
        else nothing[0],
        "ap_ci_low": ap_low,
        "ap_ci_high": ap_high,
        "findings": len(known),
        "undefined": undefined,
    }


def roc_table(labels: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """The ROC curves, as one long table.

    Returns:
        `finding`, `false_positive_rate`, `true_positive_rate`, `threshold` (called positive from this score
        on; infinite at the curve's start). Points in the middle of straight stretches are left out. A finding
        of which one class is absent has no rows.
    """
    curves = []
    for finding, label, score in _defined(labels, scores):
        threshold, true, false = curve(label, score)
        true, false = np.r_[0, true], np.r_[0, false]
        corner = np.ones(len(true), dtype=bool)
        corner[1:-1] = (np.diff(true, 2) != 0) | (np.diff(false, 2) != 0)
        columns = {
            "finding": finding,
            "false_positive_rate": (false / false[-1])[corner],
            "true_positive_rate": (true / true[-1])[corner],
            "threshold": np.r_[np.inf, threshold][corner],
        }
        curves.append(pd.DataFrame(columns))
    return _join(curves, ["finding", "false_positive_rate", "true_positive_rate", "threshold"])


def precision_recall_table(labels: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Precision by recall, as one long table.

    Returns:
        `finding`, `recall` (rising), `precision`, `threshold`. The last row of a finding calls every image
        positive, so its precision is the prevalence. A finding of which one class is absent has no rows.
    """
    curves = []
    for finding, label, score in _defined(labels, scores):
        threshold, true, false = curve(label, score)
        precision = true / (true + false)
        ends = np.ones(len(true), dtype=bool)  # of runs of equal recall: what lies between is on a vertical line
        ends[1:-1] = (np.diff(true)[:-1] > 0) | (np.diff(true)[1:] > 0)
        columns = {
            "finding": finding,
            "recall": np.r_[0, (true / true[-1])[ends]],
            "precision": np.r_[precision[0], precision[ends]],
            "threshold": np.r_[np.inf, threshold[ends]],
        }
        curves.append(pd.DataFrame(columns))
    return _join(curves, ["finding", "recall", "precision", "threshold"])


def best_and_worst(
    labels: pd.DataFrame, scores: pd.DataFrame, images: pd.Series, finding: str, count: int
) -> pd.DataFrame:
    """The images about which the model is surest, rightly and wrongly.

    Args:
        labels: (n, K), 0 or 1.
        scores: (n, K), the same columns.
        images: (n,), their names.
        finding: one of the columns.
        count: images per case; fewer where there are not as many.

    Returns:
        `case`, `image`, `label`, `score`: "found" (positive, highest scores), "missed" (positive, lowest),
        "false alarm" (negative, highest), "cleared" (negative, lowest), each with the surest first.
    """
    if finding not in labels.columns:
        raise WorkbenchError(f"`{finding}` is not among the findings predicted: {', '.join(labels.columns)}.")
    columns = {"image": images, "label": labels[finding], "score": scores[finding]}
    table = pd.DataFrame({name: np.asarray(column) for name, column in columns.items()})
    cases = {"found": (1, False), "missed": (1, True), "false alarm": (0, False), "cleared": (0, True)}
    parts = []
    for case, (label, rising) in cases.items():
        part = table[table["label"] == label].sort_values("score", ascending=rising, kind="stable").head(count)
        parts.append(part.assign(case=case))
    return pd.concat(parts, ignore_index=True)[["case", "image", "label", "score"]]


def check_tables(labels: pd.DataFrame, scores: pd.DataFrame, patients: pd.Series | None = None) -> None:
    """Refuse tables that do not belong together or hold what cannot be.

    Raises:
        WorkbenchError: other findings, other numbers of images, a label that is not 0 or 1, a score or a patient that
        is
            missing.
    """
    if list(labels.columns) != list(scores.columns):
        odd = [*labels.columns.symmetric_difference(scores.columns)] or "their order"
        raise WorkbenchError(f"Two tables hold different findings ({odd}): take both from the same run.")
    if len(labels) != len(scores) or (patients is not None and len(patients) != len(labels)):
        counts = f"{len(labels)} images have labels, {len(scores)} scores"
        counts += "" if patients is None else f" and {len(patients)} patients"
        raise WorkbenchError(f"{counts}: take all from the same table of predictions.")
    for finding in labels.columns:
        if not labels[finding].isin([0, 1]).all():
            raise WorkbenchError(f"The labels of `{finding}` are not all 0 or 1: give 1 where it is shown, else 0.")
        if scores[finding].isna().any():
            raise WorkbenchError(
                f"{int(scores[finding].isna().sum())} scores of `{finding}` are missing (NaN): predict again, or leave "
                "those images out of both tables."
            )
    if patients is not None and pd.isna(np.asarray(patients)).any():
        raise WorkbenchError("Some images have no patient, by whom they are resampled: give each image one.")


def check_table(labels: pd.DataFrame, images: pd.Series, table: pd.DataFrame) -> None:
    """Refuse predictions that were not made on a table's images and labels.

    Args:
        labels: (n, K), 0 or 1.
        images: (n,), their names.
        table: one row per image of the split: `image`, and each finding as 0 or 1.

    Raises:
        WorkbenchError: other images, findings that the table lacks, or other labels for some finding.
    """
    apart = sorted(set(images) ^ set(table["image"]))
    if apart or len(images) != len(table):
        raise WorkbenchError(
            f"The predictions are not of this table's images: {len(apart)} stand in one only"
            + (f", such as {apart[0]}" if apart else "")
            + "; give the shards that the run was trained on."
        )
    missing = [name for name in labels.columns if name not in table]
    if missing:
        raise WorkbenchError(f"The table has no findings {', '.join(missing)}, which the predictions have.")
    truth = table.set_index("image").loc[images.to_numpy(), list(labels.columns)].to_numpy()
    wrong = (truth != labels.to_numpy()).any(axis=0)
    if wrong.any():
        raise WorkbenchError(
            f"The predictions have other labels for {', '.join(labels.columns[wrong])} than the table: they are of "
            "another table, or the findings' names were exchanged."
        )


def check_apart(one: pd.Series, other: pd.Series, *, what: str = "validation and test") -> None:
    """Refuse two tables of predictions that share an image. Raises a WorkbenchError that names one."""
    shared = sorted(set(one) & set(other))
    if shared:
        raise WorkbenchError(
            f"{len(shared)} images are in {what} alike, such as {shared[0]}: what is fitted on an image must not be "
            "scored on it; give two splits."
        )


def _refuse(path: Path, column: pd.Series, wrong: pd.Series, rule: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong.to_numpy()))
        raise WorkbenchError(
            f"{path} has {column.iloc[row]} for `{column.name}` in row {row + 1}: {rule}; predict again (notebook 03)."
        )


def _defined(labels: pd.DataFrame, scores: pd.DataFrame):
    """Label and score of every finding of which both classes occur."""
    check_tables(labels, scores)
    for finding in labels.columns:
        label = labels[finding].to_numpy(bool)
        if label.any() and not label.all():
            yield finding, label, scores[finding].to_numpy(float)


def _join(curves: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    return pd.concat(curves, ignore_index=True)[columns] if curves else pd.DataFrame(columns=columns)


def curve(label: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores, falling, and how many positives and negatives are called positive from each on."""
    order = np.argsort(-score, kind="stable")
    label, score = label[order], score[order]
    last = np.r_[np.flatnonzero(np.diff(score)), len(score) - 1]  # the last image of each run of ties
    true = np.cumsum(label)[last]
    return score[last], true, last + 1 - true


def average_precision(label: np.ndarray, score: np.ndarray) -> float:
    """Precision, averaged over the positives as they are found; NaN if one class is absent.

    Args:
        label: (n,), 0 or 1.
        score: (n,), higher means more likely positive.
    """
    label, score = np.asarray(label, dtype=bool), np.asarray(score)
    if not label.any() or label.all():
        return float("nan")
    _, true, false = curve(label, score)
    return float(np.sum(np.diff(np.r_[0, true]) * true / (true + false)) / true[-1])
