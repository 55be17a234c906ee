"""DeLong's variance: against brute force and a closed form, by patient, and its intervals cover."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from workbench.analysis import delong, evaluation


def by_hand(label, scores):
    """DeLong 1988 as it is written, pair by pair."""
    x, y = scores[label == 1], scores[label == 0]
    wins = (x[:, None] > y[None]) + 0.5 * (x[:, None] == y[None])  # (m, n, S)
    areas = wins.mean(axis=(0, 1))
    s10 = np.cov(wins.mean(axis=1), rowvar=False).reshape(2, 2)
    s01 = np.cov(wins.mean(axis=0), rowvar=False).reshape(2, 2)
    return areas, s10 / len(x) + s01 / len(y)


@pytest.mark.parametrize("levels", [None, 5])
def test_ranks_give_what_all_pairs_give(levels):
    generator = np.random.default_rng(0)
    label = (generator.random(80) < 0.3).astype(int)
    scores = generator.normal(size=(80, 2)) + label[:, None] * [1.0, 0.5]
    scores = np.round(scores * levels) / levels if levels else scores
    areas, covariance = delong.covariance(label, scores)
    expected, spread = by_hand(label, scores)
    np.testing.assert_allclose(areas, expected, atol=1e-12)
    np.testing.assert_allclose(covariance, spread, atol=1e-12)


def test_worked_by_hand():
    # Positives 3 and 1, negatives 2 and 0: 3 beats both, 1 beats one. Area 3/4; components (1, 1/2) and (1/2, 1).
    areas, covariance = delong.covariance([1, 1, 0, 0], np.array([[3.0], [1.0], [2.0], [0.0]]))
    assert areas[0] == 0.75
    assert covariance[0, 0] == pytest.approx(0.125 / 2 + 0.125 / 2)


def test_one_image_a_patient_is_delongs_own():
    generator = np.random.default_rng(1)
    label = np.r_[np.ones(20), np.zeros(30)]
    scores = generator.normal(size=(50, 2)) + label[:, None]
    plain = delong.covariance(label, scores)[1]
    np.testing.assert_allclose(delong.covariance(label, scores, generator.permutation(50))[1], plain, rtol=1e-12)


def test_copies_of_an_image_say_no_more_than_one():
    generator = np.random.default_rng(2)
    label = np.r_[np.ones(20), np.zeros(30)]
    score = generator.normal(size=50) + label
    once = delong.covariance(label, score[:, None])[1][0, 0]
    copies = np.repeat(np.arange(50), 8)
    by_patient = delong.covariance(label[copies], score[copies, None], copies)[1][0, 0]
    assert by_patient == pytest.approx(once, rel=1e-9)
    assert delong.covariance(label[copies], score[copies, None])[1][0, 0] < once / 4


def test_patients_with_images_of_both_classes_count_the_cross_term():
    # Each patient has one image of each class and a level of its own, which the scores share: it cancels within pairs.
    generator = np.random.default_rng(3)
    areas, told = [], []
    for _ in range(300):
        level = generator.normal(size=40)
        score = np.r_[level + 0.5 + 0.3 * generator.normal(size=40), level + 0.3 * generator.normal(size=40)]
        label, patients = np.r_[np.ones(40), np.zeros(40)], np.r_[np.arange(40), np.arange(40)]
        area, covariance = delong.covariance(label, score[:, None], patients)
        areas.append(area[0])
        told.append(covariance[0, 0])
    assert np.mean(told) == pytest.approx(np.var(areas), rel=0.25)
    plain = delong.covariance(label, score[:, None])[1][0, 0]
    assert plain > 2 * np.mean(told)  # without the cross term it would be far too wide


def test_at_the_limits():
    label = np.array([1, 1, 0, 0])
    assert delong.interval(label, np.array([4, 3, 2, 1])) == (1, 1)
    assert np.isnan(delong.interval(np.ones(4), np.arange(4))).all()
    assert np.isnan(delong.interval(label, np.array([4, 2, 3, 1]), [7, 7, 8, 8])).all()  # one ill patient
    same = np.array([0.1, 0.4, 0.3, 0.2])
    assert delong.paired_p_value(label, same, 10 * same) == 1


def test_p_values_are_uniform_where_nothing_differs():
    generator = np.random.default_rng(4)
    label = (np.arange(120) < 40).astype(int)
    patients = np.arange(120) // 2
    p = []
    for _ in range(300):
        level = generator.normal(size=120) + label
        one, other = level + generator.normal(size=(2, 120))
        p.append(delong.paired_p_value(label, one, other, patients))
    assert 0.02 < np.mean(np.array(p) < 0.05) < 0.09


def test_intervals_cover_the_truth():
    """Images of one patient resemble each other; both intervals hold the true area about 95 times in 100."""
    generator = np.random.default_rng(5)
    shift, within = 1.2, 0.7
    truth = norm.cdf(shift / np.sqrt(2))
    covered, covered_by_images = {"bootstrap": 0, "DeLong": 0}, 0
    for _ in range(400):
        ill = np.repeat(generator.random(80) < 0.4, 5)
        patients = pd.Series(np.repeat(np.arange(80), 5))
        shared = np.repeat(generator.normal(size=80), 5)
        score = np.sqrt(within) * shared + np.sqrt(1 - within) * generator.normal(size=400) + shift * ill
        labels, scores = pd.DataFrame({"Mass": ill.astype(int)}), pd.DataFrame({"Mass": score})
        row = evaluation.auroc_table(labels, scores, patients, resamples=200).loc["Mass"]
        covered["bootstrap"] += row["ci_low"] <= truth <= row["ci_high"]
        covered["DeLong"] += row["delong_low"] <= truth <= row["delong_high"]
        low, high = delong.interval(ill, score)
        covered_by_images += low <= truth <= high
    for name, count in covered.items():
        assert 0.91 < count / 400 < 0.98, name
    assert covered_by_images / 400 < 0.8  # what resampling images would claim
