"""DeLong's variance of the AUROC, its interval, and the test of two scores of the same images.

The variance comes from structural components: for each positive the share of negatives that it beats, for each
negative the share of positives that beat it (DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988), by ranks as in
Sun and Xu (IEEE Signal Processing Letters 21, 2014). The images of one patient are not independent, so these are summed
by patient first (Obuchowski, Biometrics 53, 1997). With one image per patient both are the same.

    from workbench.analysis import delong

    areas, covariance = delong.covariance(label, scores, patients)      # scores (n, S)
    low, high = delong.interval(label, score, patients)
    delong.paired_p_value(label, one, other, patients)
"""

import numpy as np
import pandas as pd
from scipy.stats import norm, rankdata


def covariance(label: np.ndarray, scores: np.ndarray, patients=None) -> tuple[np.ndarray, np.ndarray]:
    """The AUROCs of several scores of the same images and their covariance.

    Args:
        label: (n,), 0 or 1.
        scores: (n, S), each column a score of the same images.
        patients: (n,), whom each image shows; None: every image another patient, DeLong's own formula.

    Returns:
        (S,) and (S, S). NaN where one class is absent, or where all positives or all negatives are of one patient.
    """
    label, scores = np.asarray(label, dtype=bool), np.asarray(scores, dtype=float)
    patient, names = pd.factorize(np.arange(len(label)) if patients is None else np.asarray(patients))
    positives, negatives = int(label.sum()), int((~label).sum())
    kinds = scores.shape[1]
    if not positives or not negatives:
        return np.full(kinds, np.nan), np.full((kinds, kinds), np.nan)
    ranks = rankdata(scores, axis=0)
    beats = (ranks[label] - rankdata(scores[label], axis=0)) / negatives
    beaten = 1 - (ranks[~label] - rankdata(scores[~label], axis=0)) / positives
    areas = beats.mean(axis=0)

    def by_patient(parts: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, int]:
        """Deviations from the area, summed by patient, over the number of images; and how many patients there are."""
        sums = np.zeros((len(names), kinds))
        np.add.at(sums, patient[chosen], parts - areas)
        return sums / len(parts), len(np.unique(patient[chosen]))

    of_positives, ill = by_patient(beats, label)
    of_negatives, well = by_patient(beaten, ~label)
    if ill < 2 or well < 2:
        return areas, np.full((kinds, kinds), np.nan)
    both = of_positives.T @ of_negatives
    every = len(names)
    return areas, (
        ill / (ill - 1) * of_positives.T @ of_positives
        + well / (well - 1) * of_negatives.T @ of_negatives
        + every / (every - 1) * (both + both.T)
    )


def interval(label: np.ndarray, score: np.ndarray, patients=None, *, level: float = 0.95) -> tuple[float, float]:
    """The interval of an AUROC, symmetric on the scale of its logit, which keeps it between 0 and 1.

    Args:
        label, score: (n,).
        patients: as for `covariance`.
        level: its coverage.

    Returns:
        Low and high; NaN where the variance is not defined; an area of 0 or 1 itself, since its variance is 0.
    """
    areas, spread = covariance(label, np.asarray(score, dtype=float)[:, None], patients)
    area, error = areas[0], np.sqrt(spread[0, 0])
    if np.isnan(error) or area in (0, 1):
        return (float(area), float(area)) if error == 0 else (float("nan"), float("nan"))
    logit, reach = np.log(area / (1 - area)), norm.ppf((1 + level) / 2) * error / (area * (1 - area))
    low, high = 1 / (1 + np.exp(-np.array([logit - reach, logit + reach])))
    return float(low), float(high)


def paired_p_value(label: np.ndarray, one: np.ndarray, other: np.ndarray, patients=None) -> float:
    """Two-sided p-value of no difference between the AUROCs of two scores of the same images.

    Returns:
        In [0, 1]; 1 where the scores rank alike; NaN where the variance is not defined.
    """
    areas, spread = covariance(label, np.column_stack([one, other]), patients)
    variance = spread[0, 0] + spread[1, 1] - 2 * spread[0, 1]
    if np.isnan(variance):
        return float("nan")
    # Equal ranks leave nothing but rounding.
    if variance <= 1e-15:
        return 1.0 if abs(areas[0] - areas[1]) < 1e-12 else 0.0
    return float(2 * norm.sf(abs(areas[0] - areas[1]) / np.sqrt(variance)))
