"""Thresholds: chosen by each rule as one would by trying all, scored elsewhere, with intervals by patient."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics
from test_evaluation import make_predictions

from workbench import WorkbenchError
from workbench.analysis import thresholds


def test_chosen_on_validation_and_scored_on_test():
    val_labels = pd.DataFrame({"Mass": [0, 0, 0, 1, 1]})
    val_scores = pd.DataFrame({"Mass": [0.1, 0.2, 0.6, 0.5, 0.9]})
    labels = pd.DataFrame({"Mass": [1, 1, 1, 0, 0, 0, 0]})
    scores = pd.DataFrame({"Mass": [0.5, 0.7, 0.4, 0.5, 0.1, 0.2, 0.3]})
    chosen = thresholds.fit_thresholds(val_labels, val_scores)
    # From 0.5 on: all positives and one of three negatives of validation, J = 2/3.
    assert chosen.to_dict() == {"Mass": 0.5}
    row = thresholds.score_thresholds(chosen, labels, scores, pd.Series(range(7)), resamples=20).loc["Mass"]
    expected = {"sensitivity": 2 / 3, "specificity": 3 / 4, "ppv": 2 / 3, "npv": 3 / 4, "f1": 2 / 3}
    assert row[list(expected)].to_dict() == pytest.approx(expected)
    cells = ["true_positives", "false_positives", "false_negatives", "true_negatives"]
    assert row[cells].tolist() == [2, 1, 1, 3]


@pytest.mark.parametrize("levels", [None, 20])
def test_rules_agree_with_trying_every_threshold(levels):
    labels, scores, _ = make_predictions(levels=levels)
    for name in labels.columns:
        label, score = labels[name], scores[name]
        tried = np.unique(score)
        recall = np.array([(score[label == 1] >= t).mean() for t in tried])
        special = np.array([(score[label == 0] < t).mean() for t in tried])
        f1 = np.array([metrics.f1_score(label, score >= t) for t in tried])
        j = recall + special
        chosen = thresholds.fit_thresholds(labels, scores)[name]
        assert j[tried == chosen][0] == pytest.approx(j.max())
        chosen = thresholds.fit_thresholds(labels, scores, rule="f1")[name]
        assert f1[tried == chosen][0] == pytest.approx(f1.max())
        chosen = thresholds.fit_thresholds(labels, scores, rule="sensitivity", sensitivity=0.8)[name]
        assert chosen == tried[recall >= 0.8 - 1e-12].max()


def test_measures_agree_with_scikit_learn_in_every_resample():
    labels, scores, patients = make_predictions(seed=2)
    chosen = thresholds.fit_thresholds(labels, scores)
    table = thresholds.score_thresholds(chosen, labels, scores, patients, resamples=60, seed=3)
    drawn = np.random.default_rng(3).integers(60, size=(60, 60))
    for name in labels.columns:
        called, values = scores[name] >= chosen[name], []
        for patient in drawn:
            weight = np.bincount(patient, minlength=60)[patients]
            values.append(metrics.f1_score(labels[name], called, sample_weight=weight))
        expected = [metrics.f1_score(labels[name], called), *np.quantile(values, [0.025, 0.975])]
        assert table.loc[name, ["f1", "f1_low", "f1_high"]].tolist() == pytest.approx(expected, abs=1e-9)


def test_where_a_class_is_absent():
    labels, scores, patients = make_predictions()
    chosen = thresholds.fit_thresholds(labels * [0, 1, 1], scores)
    assert chosen.isna().tolist() == [True, False, False]
    table = thresholds.score_thresholds(chosen, labels * [1, 0, 1], scores, patients, resamples=20)
    assert table.loc["Mass"].isna().all()
    assert np.isnan(table.loc["Edema", "sensitivity"])
    assert 0 < table.loc["Edema", "specificity"] < 1
    assert table.loc["Hernia"].notna().all()


def test_findings_are_matched_by_name():
    labels, scores, patients = make_predictions()
    chosen = thresholds.fit_thresholds(labels, scores)
    one = thresholds.score_thresholds(chosen, labels, scores, patients, resamples=5)
    other = thresholds.score_thresholds(chosen[::-1], labels, scores, patients, resamples=5)
    pd.testing.assert_frame_equal(one, other)
    with pytest.raises(WorkbenchError, match="different findings \\(Hernia\\)"):
        thresholds.score_thresholds(chosen.drop("Hernia"), labels, scores, patients)


def test_bad_rules_are_refused():
    labels, scores, _ = make_predictions()
    with pytest.raises(WorkbenchError, match="no rule `best` for thresholds: choose from youden"):
        thresholds.fit_thresholds(labels, scores, rule="best")
    with pytest.raises(WorkbenchError, match=r"sensitivity of 1\.5 cannot"):
        thresholds.fit_thresholds(labels, scores, rule="sensitivity", sensitivity=1.5)
