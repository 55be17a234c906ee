"""Calibration: measured as by hand and by scikit-learn, corrected without changing the order of scores."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit, logit
from sklearn import metrics
from test_evaluation import make_predictions

from workbench import WorkbenchError
from workbench.analysis import calibration, evaluation


def made(images=20_000, *, slope=1.0, shift=0.0, seed=0):
    """Labels, and scores that are off by a known line on the scale of the logit."""
    generator = np.random.default_rng(seed)
    true = expit(generator.normal(-1, 1.5, size=(images, 1)))
    labels = pd.DataFrame(generator.random((images, 1)) < true, columns=["Mass"]).astype("uint8")
    return labels, pd.DataFrame(expit((logit(true) - shift) / slope), columns=["Mass"])


def test_a_calibrated_model_is_found_so():
    labels, scores = made()
    table = calibration.calibration_table(labels, scores)
    assert table["images"].sum() == 20_000
    assert len(table) == 10
    assert (table["predicted"] - table["observed"]).abs().max() < 0.04
    assert calibration.calibration_scores(labels, scores).loc["Mass", "ece"] < 0.01


def test_errors_as_by_hand_and_by_scikit_learn():
    labels = pd.DataFrame({"Mass": [0, 0, 1, 1]})
    scores = pd.DataFrame({"Mass": [0.1, 0.3, 0.4, 0.8]})
    row = calibration.calibration_scores(labels, scores, groups=2).loc["Mass"]
    assert row["ece"] == pytest.approx((abs(0.2 - 0) * 2 + abs(0.6 - 1) * 2) / 4)
    assert row["brier"] == pytest.approx(metrics.brier_score_loss(labels["Mass"], scores["Mass"]), abs=1e-12)


def test_the_line_is_found():
    labels, scores = made(slope=2.0, shift=-0.7)
    fitted = calibration.fit_calibration(labels, scores)
    assert fitted.loc["Mass", "slope"] == pytest.approx(2.0, rel=0.05)
    assert fitted.loc["Mass", "shift"] == pytest.approx(-0.7, abs=0.07)
    corrected = calibration.apply_calibration(fitted, scores)
    before, after = (calibration.calibration_scores(labels, s).loc["Mass"] for s in (scores, corrected))
    assert after["ece"] < before["ece"] / 5
    assert after["brier"] < before["brier"]


def test_temperature_has_no_shift():
    labels, scores = made(slope=2.0)
    row = calibration.fit_calibration(labels, scores, method="temperature").loc["Mass"]
    assert row["slope"] == pytest.approx(2.0, rel=0.05)
    assert row["shift"] == 0
    with pytest.raises(WorkbenchError, match="no calibration `isotonic`"):
        calibration.fit_calibration(labels, scores, method="isotonic")


def test_auroc_stays():
    labels, scores, _ = make_predictions()
    corrected = calibration.apply_calibration(calibration.fit_calibration(labels, scores), scores)
    for name in labels:
        assert evaluation.auroc(labels[name], corrected[name]) == evaluation.auroc(labels[name], scores[name])
        assert not np.allclose(corrected[name], scores[name])


def test_what_cannot_be_fitted_is_left_alone():
    labels, scores, _ = make_predictions()
    labels = labels.assign(Mass=0, Edema=1 - labels["Edema"])  # none; and scores that point the wrong way
    fitted = calibration.fit_calibration(labels, scores)
    assert fitted["fitted"].tolist() == [False, False, True]
    corrected = calibration.apply_calibration(fitted, scores)
    pd.testing.assert_frame_equal(corrected[["Mass", "Edema"]], scores[["Mass", "Edema"]])


def test_separable_scores_keep_a_finite_slope():
    labels = pd.DataFrame({"Mass": [0, 0, 0, 1, 1]})
    fitted = calibration.fit_calibration(labels, pd.DataFrame({"Mass": [0.0, 0.1, 0.2, 0.9, 1.0]}))
    assert 0 < fitted.loc["Mass", "slope"] < 10


def test_kept_by_name_and_read_again(tmp_path):
    labels, scores, _ = make_predictions()
    fitted = calibration.fit_calibration(labels, scores)
    calibration.write_calibration(tmp_path / "calibration.json", fitted)
    again = calibration.read_calibration(tmp_path / "calibration.json")
    pd.testing.assert_frame_equal(again, fitted)
    turned = scores[scores.columns[::-1]]
    pd.testing.assert_frame_equal(
        calibration.apply_calibration(again, turned)[scores.columns], calibration.apply_calibration(fitted, scores)
    )
    with pytest.raises(WorkbenchError, match="different findings \\(Hernia\\)"):
        calibration.apply_calibration(again, scores.drop(columns="Hernia"))


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "calibration.json"
    with pytest.raises(WorkbenchError, match="There is no calibration at"):
        calibration.read_calibration(path)
    for text in ("{}", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(WorkbenchError, match="cannot be read"):
            calibration.read_calibration(path)
    row = {"slope": -1.0, "shift": 0.0, "positives": 3, "fitted": True}
    path.write_text(json.dumps({"findings": {"Mass": row}}))
    with pytest.raises(WorkbenchError, match="slope that is not above 0"):
        calibration.read_calibration(path)
