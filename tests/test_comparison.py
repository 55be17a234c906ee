"""Two runs are compared on the same images, findings matched by name, and exchanged names are caught."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics
from test_evaluation import FINDINGS, make_predictions

from workbench import WorkbenchError
from workbench.analysis import comparison, delong


def predictions(*, noise=0.0, seed=0):
    labels, scores, patients = make_predictions()
    generator = np.random.default_rng(seed)
    scores = (scores + noise * generator.normal(size=scores.shape)).clip(0, 1)
    return labels, scores, pd.Series([f"{n}.png" for n in range(len(labels))]), patients


def test_differences_are_those_of_scikit_learn():
    first, second = predictions(noise=0.4), predictions()
    table = comparison.compare_predictions(first, second, resamples=200)
    for name in FINDINGS:
        expected = metrics.roc_auc_score(second[0][name], second[1][name]) - metrics.roc_auc_score(
            first[0][name], first[1][name]
        )
        row = table.loc[name]
        assert row["difference"] == pytest.approx(expected, abs=1e-9)
        assert row["ci_low"] < expected < row["ci_high"]
        assert row["p"] == delong.paired_p_value(first[0][name], first[1][name], second[1][name], first[3])
    assert table.loc["mean", "difference"] == pytest.approx(table["difference"].drop("mean").mean())
    assert table.loc["mean", "ci_low"] > 0
    assert table.loc["mean", "p"] < 0.05


def test_a_run_differs_from_itself_by_nothing():
    table = comparison.compare_predictions(predictions(), predictions(), resamples=20)
    assert (table[["difference", "ci_low", "ci_high"]] == 0).all(axis=None)
    assert (table[["p"]] == 1).all(axis=None)


def test_the_bootstrap_is_paired():
    first, second = predictions(noise=0.05), predictions(noise=0.05, seed=1)
    table = comparison.compare_predictions(first, second, resamples=300)
    paired = table.loc["Mass", "ci_high"] - table.loc["Mass", "ci_low"]
    areas = comparison.evaluation.auroc_table(first[0], first[1], first[3], resamples=300).loc["Mass"]
    assert paired < (areas["ci_high"] - areas["ci_low"]) / 2


def test_order_of_images_and_findings_does_not_matter():
    first, (labels, scores, images, patients) = predictions(noise=0.4), predictions()
    order = np.random.default_rng(0).permutation(len(labels))
    turned = (
        labels[FINDINGS[::-1]].iloc[order],
        scores[FINDINGS[::-1]].iloc[order],
        images.iloc[order],
        patients.iloc[order],
    )
    pd.testing.assert_frame_equal(
        comparison.compare_predictions(first, turned, resamples=10),
        comparison.compare_predictions(first, (labels, scores, images, patients), resamples=10),
    )


def test_exchanged_names_are_caught():
    """What happened to Pneumonia and Pneumothorax in a published table."""
    labels, scores, images, patients = predictions()
    names = {"Mass": "Pneumonia", "Edema": "Pneumothorax"}
    right = (labels.rename(columns=names), scores.rename(columns=names), images, patients)
    swapped = {"Pneumonia": "Pneumothorax", "Pneumothorax": "Pneumonia"}
    wrong = (right[0].rename(columns=swapped), right[1].rename(columns=swapped), images, patients)
    with pytest.raises(WorkbenchError, match="other labels for Pneumonia, Pneumothorax on the same images"):
        comparison.compare_predictions(right, wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, s, i, p: (t.drop(columns="Mass"), s.drop(columns="Mass"), i, p), r"different findings \(Mass\)"),
        (
            lambda t, s, i, p: (t, s, i.replace("3.png", "x.png"), p),
            "different images: 2 stand in one only, such as 3.png",
        ),
        (lambda t, s, i, p: (t, s, i, p + 1), "the same images to other patients"),
    ],
)
def test_other_tables_are_refused(change, message):
    with pytest.raises(WorkbenchError, match=message):
        comparison.compare_predictions(predictions(), change(*predictions()))
    with pytest.raises(WorkbenchError, match=message):
        comparison.average_predictions([predictions(), change(*predictions())])


def test_an_ensemble_is_the_mean_of_scores():
    several = [predictions(noise=0.3, seed=seed) for seed in range(4)]
    labels, scores, images, _ = comparison.average_predictions(several)
    np.testing.assert_allclose(scores, np.mean([s for _, s, _, _ in several], axis=0), rtol=1e-12)
    assert images.equals(several[0][2])
    assert labels.equals(several[0][0])
    table = comparison.compare_predictions(several[0], (labels, scores, images, several[0][3]), resamples=100)
    assert table.loc["mean", "ci_low"] > 0  # independent noise averages out


def test_holm_by_hand():
    p = pd.Series({"a": 0.01, "b": 0.04, "c": np.nan, "d": 0.03, "e": 0.5})
    # Sorted 0.01, 0.03, 0.04, 0.5 times 4, 3, 2, 1, never falling.
    assert comparison.holm(p).drop("c").to_dict() == pytest.approx({"a": 0.04, "b": 0.09, "d": 0.09, "e": 0.5})
    assert np.isnan(comparison.holm(p)["c"])
