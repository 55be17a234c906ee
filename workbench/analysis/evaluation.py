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
from scipy.sparse import csr_array

from workbench import WorkbenchError

_AT_ONCE = 100  # resamples held in memory together; a constant, so that a seed always gives the same numbers


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
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
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


def bootstrap_auroc(
    labels: pd.DataFrame, scores: pd.DataFrame, patients: pd.Series, *, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """The AUROC of every finding in resamples of the patients, drawn with replacement.

    A resample weights every image by how often its patient was drawn; all findings share the resamples, so
    that means over findings can be taken resample by resample. Exact, ties included.

    Args:
        labels: (n, K), 0 or 1.
        scores: (n, K), the same columns.
        patients: (n,), whom each image shows.
        resamples: how many.
        seed: the same seed gives the same resamples.

    Returns:
        (resamples, K); NaN where a resample lacks one class.
    """
    _check(labels, scores)
    patient, names = pd.factorize(np.asarray(patients))
    ranked = [
        _rank(labels[finding].to_numpy(bool), scores[finding].to_numpy(float), patient, len(names))
        for finding in labels.columns
    ]
    generator = np.random.default_rng(seed)
    areas = np.full((resamples, len(ranked)), np.nan)
    for start in range(0, resamples, _AT_ONCE):
        weights = _draw(generator, len(names), min(_AT_ONCE, resamples - start))
        for column, matrices in enumerate(ranked):
            areas[start : start + weights.shape[1], column] = _weighted_auroc(*matrices, weights)
    return areas


def auroc_table(
    labels: pd.DataFrame, scores: pd.DataFrame, patients: pd.Series, *, resamples: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """The AUROC of every finding with its 95 % interval.

    Args:
        labels: (n, K), 0 or 1.
        scores: (n, K), the same columns.
        patients: (n,), whom each image shows.
        resamples: bootstrap resamples of the patients; the interval is their 2.5th to 97.5th percentile, over
            those resamples in which both classes occur.
        seed: the same seed gives the same interval.

    Returns:
        Index `finding`; `auroc`, `ci_low`, `ci_high`, `positives`, `negatives`, `average_precision`. Where
        one class is absent, the areas are NaN.
    """
    areas = bootstrap_auroc(labels, scores, patients, resamples=resamples, seed=seed)
    rows = {}
    for column, finding in enumerate(labels.columns):
        label, score = labels[finding].to_numpy(bool), scores[finding].to_numpy(float)
        low, high = _interval(areas[:, column])
        rows[finding] = {
            "auroc": auroc(label, score),
            "ci_low": low,
            "ci_high": high,
            "positives": int(label.sum()),
            "negatives": int((~label).sum()),
            "average_precision": _average_precision(label, score),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("finding")


def mean_auroc(
    labels: pd.DataFrame, scores: pd.DataFrame, patients: pd.Series, *, resamples: int = 1000, seed: int = 0
) -> dict:
    """The mean AUROC over the findings that have one, with its 95 % interval.

    Args:
        labels: (n, K), 0 or 1.
        scores: (n, K), the same columns.
        patients: (n,), whom each image shows.
        resamples: bootstrap resamples of the patients. The mean is taken in each; a resample in which one of
            the findings has no AUROC is left out, since its mean would be one of other findings.
        seed: the same seed gives the same interval.

    Returns:
        `auroc`, `ci_low`, `ci_high`, `findings` (how many are in the mean), `undefined` (names of those that
        are not, because one class is absent). NaN where there is nothing to take a mean of.
    """
    points = pd.Series({name: auroc(labels[name], scores[name]) for name in labels.columns}, dtype=float)
    known = points.notna().to_numpy()
    areas = bootstrap_auroc(labels, scores, patients, resamples=resamples, seed=seed)[:, known]
    low, high = _interval(areas.mean(axis=1)) if known.any() else (float("nan"), float("nan"))
    return {
        "auroc": float(points.mean()),
        "ci_low": low,
        "ci_high": high,
        "findings": int(known.sum()),
        "undefined": list(points.index[~known]),
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
        threshold, true, false = _curve(label, score)
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
        threshold, true, false = _curve(label, score)
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


def threshold_table(
    val_labels: pd.DataFrame, val_scores: pd.DataFrame, test_labels: pd.DataFrame, test_scores: pd.DataFrame
) -> pd.DataFrame:
    """A threshold per finding, chosen on the validation images, and how it does on the test images.

    The threshold maximises Youden's J = sensitivity + specificity - 1 (Youden 1950). Choosing and scoring on
    the same images would flatter it.

    Returns:
        Index `finding`; `threshold` (called positive from this score on) and on test `sensitivity`,
        `specificity`, `ppv` and `npv` (positive and negative predictive value). NaN where a class is absent.
    """
    _check(val_labels, val_scores)
    _check(test_labels, test_scores)
    _check(val_labels, test_labels)
    rows = {}
    for finding in val_labels.columns:
        label, score = val_labels[finding].to_numpy(bool), val_scores[finding].to_numpy(float)
        chosen = float("nan")
        if label.any() and not label.all():
            threshold, true, false = _curve(label, score)
            chosen = threshold[np.argmax(true / true[-1] - false / false[-1])]
        truth, called = test_labels[finding].to_numpy(bool), test_scores[finding].to_numpy(float) >= chosen
        known = np.isfinite(chosen)
        rows[finding] = {
            "threshold": chosen,
            "sensitivity": _share(called[truth]) if known else np.nan,
            "specificity": _share(~called[~truth]) if known else np.nan,
            "ppv": _share(truth[called]) if known else np.nan,
            "npv": _share(~truth[~called]) if known else np.nan,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("finding")


def calibration_table(labels: pd.DataFrame, scores: pd.DataFrame, *, groups: int = 10) -> pd.DataFrame:
    """The mean score and the observed share of each finding, in groups of images of rising score.

    Returns:
        Long: `finding`, `predicted` and `observed` (0 to 1), `images`. The groups are of (nearly) equal size.
    """
    _check(labels, scores)
    rows = []
    for finding in labels.columns:
        order = np.argsort(scores[finding].to_numpy(), kind="stable")
        label, score = labels[finding].to_numpy()[order], scores[finding].to_numpy()[order]
        for part in np.array_split(np.arange(len(order)), min(groups, len(order))):
            rows.append((finding, score[part].mean(), label[part].mean(), len(part)))
    return pd.DataFrame(rows, columns=["finding", "predicted", "observed", "images"])


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


def _check(labels: pd.DataFrame, scores: pd.DataFrame) -> None:
    if list(labels.columns) != list(scores.columns):
        odd = [*labels.columns.symmetric_difference(scores.columns)] or "their order"
        raise WorkbenchError(f"Two tables hold different findings ({odd}): take both from the same run.")


def _refuse(path: Path, column: pd.Series, wrong: pd.Series, rule: str) -> None:
    if wrong.any():
        row = int(np.argmax(wrong.to_numpy()))
        raise WorkbenchError(
            f"{path} has {column.iloc[row]} for `{column.name}` in row {row + 1}: {rule}; predict again (notebook 03)."
        )


def _defined(labels: pd.DataFrame, scores: pd.DataFrame):
    """Label and score of every finding of which both classes occur."""
    _check(labels, scores)
    for finding in labels.columns:
        label = labels[finding].to_numpy(bool)
        if label.any() and not label.all():
            yield finding, label, scores[finding].to_numpy(float)


def _join(curves: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    return pd.concat(curves, ignore_index=True)[columns] if curves else pd.DataFrame(columns=columns)


def _curve(label: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores, falling, and how many positives and negatives are called positive from each on."""
    order = np.argsort(-score, kind="stable")
    label, score = label[order], score[order]
    last = np.r_[np.flatnonzero(np.diff(score)), len(score) - 1]  # the last image of each run of ties
    true = np.cumsum(label)[last]
    return score[last], true, last + 1 - true


def _average_precision(label: np.ndarray, score: np.ndarray) -> float:
    """Precision, averaged over the positives as they are found; NaN if one class is absent."""
    if not label.any() or label.all():
        return float("nan")
    _, true, false = _curve(label, score)
    return float(np.sum(np.diff(np.r_[0, true]) * true / (true + false)) / true[-1])


def _share(yes: np.ndarray) -> float:
    return float(yes.mean()) if len(yes) else float("nan")


def _interval(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _draw(generator: np.random.Generator, patients: int, resamples: int) -> np.ndarray:
    """How often each patient is drawn: (patients, resamples), every column summing to `patients`."""
    drawn = generator.integers(patients, size=(resamples, patients))
    flat = drawn + patients * np.arange(resamples)[:, None]
    counts = np.bincount(flat.ravel(), minlength=patients * resamples).reshape(resamples, patients)
    return np.ascontiguousarray(counts.T, dtype=float)


def _rank(label: np.ndarray, score: np.ndarray, patient: np.ndarray, patients: int) -> tuple[csr_array, csr_array]:
    """Count positives and negatives by rank and patient, so that a resample needs no sorting.

    Only the P distinct scores that positives have matter as ranks. Row k of the first matrix counts the
    positives at the k-th of them. Of the second, row 2k + 1 counts the negatives at that score, and row 2k
    those between it and the one below; row 2P those above the last.
    """
    levels = np.unique(score[label])
    below = np.searchsorted(levels, score, side="left")
    tied = np.searchsorted(levels, score, side="right") > below

    def count(rows: np.ndarray, who: np.ndarray, height: int) -> csr_array:
        return csr_array((np.ones(len(rows)), (rows, who)), shape=(height, patients))

    negative_rows = (2 * below + tied)[~label]
    return (
        count(below[label], patient[label], len(levels)),
        count(negative_rows, patient[~label], 2 * len(levels) + 1),
    )


def _weighted_auroc(positives: csr_array, negatives: csr_array, weights: np.ndarray) -> np.ndarray:
    """AUROC under each column of patient weights; all sums are of whole numbers, hence exact."""
    found = positives @ weights
    passed = np.cumsum(negatives @ weights, axis=0)
    # A positive beats the negatives below its score and half of those at it.
    beaten = (passed[:-1:2] + passed[1::2]) / 2
    pairs = found.sum(axis=0) * passed[-1]
    won = np.einsum("kr,kr->r", found, beaten)
    return np.divide(won, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
