"""Resamples of the patients, and areas under curves in each of them.

The images of one patient resemble each other, so a resample draws patients with replacement and weights each image by
how often its patient was drawn. Scores are ranked once; then a resample is a product with the weights, exact, ties
included, and nothing is sorted again.

    from workbench.analysis import resampling

    auroc, precision = resampling.bootstrap_areas(labels, scores, patients, resamples=1000, seed=0)
    resampling.interval(auroc[:, 0])
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from scipy.sparse import csr_array

_AT_ONCE = 100  # resamples held in memory together; a constant, so that a seed always gives the same numbers


def bootstrap_areas(
    labels: pd.DataFrame, scores: pd.DataFrame, patients: pd.Series, *, resamples: int = 1000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """The AUROC and the average precision of every finding in resamples of the patients.

    All findings, and all tables with the same patients, share the resamples of a seed, so that means over findings and
    differences between runs can be taken resample by resample.

    Args:
        labels: (n, K), 0 or 1.
        scores: (n, K), the same columns.
        patients: (n,), whom each image shows.
        resamples: how many.
        seed: the same seed gives the same resamples.

    Returns:
        Two arrays (resamples, K), in [0, 1]; NaN where a resample lacks one class.
    """
    patient, names = pd.factorize(np.asarray(patients))
    ranked = [
        _rank(labels[finding].to_numpy(bool), scores[finding].to_numpy(float), patient, len(names))
        for finding in labels.columns
    ]
    areas = np.full((2, resamples, len(ranked)), np.nan)
    for start, weights in draw_patients(len(names), resamples=resamples, seed=seed):
        for column, matrices in enumerate(ranked):
            areas[:, start : start + weights.shape[1], column] = _weighted_areas(*matrices, weights)
    return areas[0], areas[1]


def draw_patients(patients: int, *, resamples: int, seed: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a first resample's number, and how often it and up to 99 more draw each patient: (patients, up to 100)."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _AT_ONCE):
        count = min(_AT_ONCE, resamples - start)
        drawn = generator.integers(patients, size=(count, patients))
        flat = drawn + patients * np.arange(count)[:, None]
        counts = np.bincount(flat.ravel(), minlength=patients * count).reshape(count, patients)
        yield start, np.ascontiguousarray(counts.T, dtype=float)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile of the values that are numbers; NaN if none is."""
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan"), float("nan")
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def wilson_interval(successes, trials, *, z: float = 1.959964) -> tuple:
    """Wilson's score interval of a share (1927), low and high in [0, 1]; fair for none or all of few trials too."""
    share, spread = successes / trials, z**2 / trials
    centre = share + spread / 2
    half = z * np.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    # Rounding alone would bring an end to -1e-17.
    return np.clip((centre - half) / (1 + spread), 0, 1), np.clip((centre + half) / (1 + spread), 0, 1)


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


def _weighted_areas(positives: csr_array, negatives: csr_array, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and average precision under each column of patient weights; all sums are of whole numbers, hence exact."""
    found = positives @ weights
    passed = np.cumsum(negatives @ weights, axis=0)
    every, others = found.sum(axis=0), passed[-1]
    known = (every > 0) & (others > 0)
    # A positive beats the negatives below its score and half of those at it.
    beaten = (passed[:-1:2] + passed[1::2]) / 2
    areas = np.einsum("kr,kr->r", found, beaten)
    areas = np.divide(areas, every * others, out=np.full(len(every), np.nan), where=known)
    # Called positive from a level on: the positives there and above, and the negatives that have not passed below it.
    true = np.cumsum(found[::-1], axis=0)[::-1]
    called = true + others - passed[:-1:2]
    share = np.divide(true, called, out=np.zeros_like(true), where=called > 0)
    precision = np.einsum("kr,kr->r", found, share)
    return areas, np.divide(precision, every, out=np.full(len(every), np.nan), where=known)
