"""Areas, intervals, curves and thresholds: against scikit-learn, at their limits, and by patient."""

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics

from workbench import WorkbenchError
from workbench.analysis import evaluation, resampling

FINDINGS = ["Mass", "Edema", "Hernia"]


def make_predictions(patients=60, images_each=4, *, levels=None, seed=0):
    """Labels, scores and patients; `levels` rounds the scores to that many values, so that many are tied."""
    generator = np.random.default_rng(seed)
    images = patients * images_each
    labels = pd.DataFrame(generator.random((images, 3)) < [0.5, 0.3, 0.1], columns=FINDINGS).astype("uint8")
    scores = 1 / (1 + np.exp(-generator.normal(size=(images, 3)) - 1.5 * labels.to_numpy()))
    scores = np.round(scores * levels) / levels if levels else scores
    return (
        labels,
        pd.DataFrame(scores, columns=FINDINGS),
        pd.Series(np.repeat(np.arange(patients), images_each)),
    )


@pytest.mark.parametrize("levels", [None, 50, 4, 1])
def test_auroc_agrees_with_scikit_learn(levels):
    labels, scores, _ = make_predictions(levels=levels)
    for name in FINDINGS:
        expected = metrics.roc_auc_score(labels[name], scores[name])
        assert evaluation.auroc(labels[name], scores[name]) == pytest.approx(expected, abs=1e-9)


def test_auroc_at_its_limits():
    label, score = np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9])
    assert evaluation.auroc(label, score) == 1
    assert evaluation.auroc(label, -score) == 0
    assert evaluation.auroc(label, np.full(4, 0.5)) == 0.5
    assert np.isnan(evaluation.auroc(np.zeros(4), score))
    assert np.isnan(evaluation.auroc(np.ones(4), score))


@pytest.mark.parametrize("levels", [None, 7])
def test_resamples_agree_with_scikit_learns_weights(levels):
    labels, scores, patients = make_predictions(levels=levels, seed=3)
    resamples, seed = 12, 5
    areas, precisions = resampling.bootstrap_areas(labels, scores, patients, resamples=resamples, seed=seed)
    ((_, weights),) = resampling.draw_patients(patients.nunique(), resamples=resamples, seed=seed)
    assert (weights.sum(axis=0) == patients.nunique()).all()
    for resample in range(resamples):
        weight = weights[patients.to_numpy(), resample]
        for column, name in enumerate(FINDINGS):
            expected = metrics.roc_auc_score(labels[name], scores[name], sample_weight=weight)
            assert areas[resample, column] == pytest.approx(expected, abs=1e-9)
            expected = metrics.average_precision_score(labels[name], scores[name], sample_weight=weight)
            assert precisions[resample, column] == pytest.approx(expected, abs=1e-9)


def test_resamples_are_the_same_by_seed_and_not_by_what_stands_beside():
    labels, scores, patients = make_predictions()
    areas = resampling.bootstrap_areas(labels, scores, patients, resamples=120, seed=1)[0]
    again = resampling.bootstrap_areas(labels[["Edema"]], scores[["Edema"]], patients, resamples=120, seed=1)[0]
    np.testing.assert_array_equal(areas[:, 1], again[:, 0])
    other = resampling.bootstrap_areas(labels, scores, patients, resamples=120, seed=2)[0]
    assert not np.array_equal(areas, other)


def test_patients_may_be_named_anyhow():
    labels, scores, patients = make_predictions()
    table = evaluation.auroc_table(labels, scores, patients, resamples=50)
    renamed = evaluation.auroc_table(labels, scores, patients.map(lambda n: f"patient {n}"), resamples=50)
    pd.testing.assert_frame_equal(table, renamed)


def test_table_agrees_with_scikit_learn():
    labels, scores, patients = make_predictions(levels=30)
    table = evaluation.auroc_table(labels, scores, patients, resamples=200)
    assert list(table.index) == FINDINGS
    for name in FINDINGS:
        row = table.loc[name]
        assert row["average_precision"] == pytest.approx(
            metrics.average_precision_score(labels[name], scores[name]), abs=1e-9
        )
        assert row["positives"] + row["negatives"] == len(labels)
        assert row["ci_low"] < row["auroc"] < row["ci_high"]


def test_a_finding_with_one_class_is_nan_and_named():
    labels, scores, patients = make_predictions()
    labels["Hernia"] = np.uint8(0)
    table = evaluation.auroc_table(labels, scores, patients, resamples=20)
    assert table.loc["Hernia", ["auroc", "ci_low", "ci_high", "average_precision"]].isna().all()
    mean = evaluation.mean_auroc(labels, scores, patients, resamples=20)
    assert mean["undefined"] == ["Hernia"]
    assert mean["findings"] == 2
    assert mean["auroc"] == pytest.approx(table["auroc"].drop("Hernia").mean())
    assert set(evaluation.roc_table(labels, scores)["finding"]) == {"Mass", "Edema"}


def test_nothing_defined_gives_nan_and_no_error():
    labels, scores, patients = make_predictions()
    mean = evaluation.mean_auroc(labels * 0, scores, patients, resamples=5)
    assert np.isnan([mean["auroc"], mean["ci_low"], mean["ci_high"]]).all()
    assert evaluation.roc_table(labels * 0, scores).empty
    assert evaluation.precision_recall_table(labels * 0, scores).empty


def test_mean_takes_the_mean_in_each_resample():
    labels, scores, patients = make_predictions()
    areas = resampling.bootstrap_areas(labels, scores, patients, resamples=100, seed=4)[0].mean(axis=1)
    mean = evaluation.mean_auroc(labels, scores, patients, resamples=100, seed=4)
    assert [mean["ci_low"], mean["ci_high"]] == pytest.approx(np.quantile(areas, [0.025, 0.975]))


def test_resamples_without_a_positive_are_left_out():
    label = pd.DataFrame({"Mass": np.r_[1, np.zeros(29)].astype("uint8")})
    score = pd.DataFrame({"Mass": np.linspace(0.9, 0.1, 30)})
    areas = resampling.bootstrap_areas(label, score, pd.Series(range(30)), resamples=200)[0]
    assert 0.2 < np.isnan(areas).mean() < 0.55  # the share of resamples without one patient of 30: 0.36
    table = evaluation.auroc_table(label, score, pd.Series(range(30)), resamples=200)
    assert table.loc["Mass", ["auroc", "ci_low", "ci_high"]].tolist() == [1, 1, 1]


def test_interval_is_by_patient():
    # 25 images of each patient are copies of one: they say no more than 40 images, whatever their number.
    labels, scores, _ = make_predictions(patients=40, images_each=1)
    copies = np.repeat(np.arange(40), 25)
    many_labels, many_scores = labels.iloc[copies], scores.iloc[copies]
    by_patient = evaluation.auroc_table(many_labels, many_scores, pd.Series(copies), resamples=300)
    by_image = evaluation.auroc_table(many_labels, many_scores, pd.Series(range(1000)), resamples=300)
    plain = evaluation.auroc_table(labels, scores, pd.Series(range(40)), resamples=300)
    width, narrow, honest = (table.loc["Mass", "ci_high"] - table.loc["Mass", "ci_low"]
                             for table in (by_patient, by_image, plain))  # fmt: skip
    assert width == pytest.approx(honest, rel=1e-9)
    assert width > 3 * narrow


def test_interval_covers_the_truth_about_as_often_as_it_says():
    truth = 0.8556  # AUROC of two normal distributions 1.5 apart: Phi(1.5 / sqrt(2))
    covered = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        label = np.arange(200) % 2
        score = generator.normal(size=200) + 1.5 * label
        frames = pd.DataFrame({"Mass": label}), pd.DataFrame({"Mass": score})
        row = evaluation.auroc_table(*frames, pd.Series(range(200)), resamples=200, seed=seed).loc["Mass"]
        covered += row["ci_low"] <= truth <= row["ci_high"]
    assert 88 <= covered <= 99


@pytest.mark.parametrize("levels", [None, 20])
def test_curves_hold_the_areas(levels):
    labels, scores, patients = make_predictions(levels=levels)
    table = evaluation.auroc_table(labels, scores, patients, resamples=2)
    for name, curve in evaluation.roc_table(labels, scores).groupby("finding"):
        x, y = curve["false_positive_rate"], curve["true_positive_rate"]
        assert (x.iloc[0], y.iloc[0], x.iloc[-1], y.iloc[-1]) == (0, 0, 1, 1)
        assert np.trapezoid(y, x) == pytest.approx(table.loc[name, "auroc"], abs=1e-9)
    for name, curve in evaluation.precision_recall_table(labels, scores).groupby("finding"):
        area = np.sum(np.diff(curve["recall"]) * curve["precision"].to_numpy()[1:])
        assert area == pytest.approx(table.loc[name, "average_precision"], abs=1e-9)
        assert curve["precision"].iloc[-1] == pytest.approx(labels[name].mean())


def test_roc_curve_agrees_with_scikit_learn():
    labels, scores, _ = make_predictions(levels=25)
    curve = evaluation.roc_table(labels[["Mass"]], scores[["Mass"]])
    x, y, threshold = metrics.roc_curve(labels["Mass"], scores["Mass"])
    np.testing.assert_allclose(
        curve[["false_positive_rate", "true_positive_rate", "threshold"]], np.c_[x, y, threshold]
    )


def test_best_and_worst_are_the_surest():
    labels = pd.DataFrame({"Mass": [1, 1, 1, 0, 0, 0]})
    scores = pd.DataFrame({"Mass": [0.9, 0.5, 0.1, 0.8, 0.4, 0.2]})
    table = evaluation.best_and_worst(labels, scores, pd.Series(list("abcdef")), "Mass", 2)
    assert table.groupby("case", sort=False)["image"].sum().to_dict() == {
        "found": "ab", "missed": "cb", "false alarm": "de", "cleared": "fe"
    }  # fmt: skip
    with pytest.raises(WorkbenchError, match="`Edema` is not among the findings predicted: Mass"):
        evaluation.best_and_worst(labels, scores, pd.Series(list("abcdef")), "Edema", 2)


def test_tables_of_different_findings_are_refused():
    labels, scores, patients = make_predictions()
    with pytest.raises(WorkbenchError, match="different findings"):
        evaluation.auroc_table(labels, scores[["Mass", "Edema"]], patients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, s, p: (t, s.mask(np.arange(len(s))[:, None] == [4, -1, -1]), p), "1 scores of `Mass` are missing"),
        (lambda t, s, p: (t.replace(1, 2), s, p), "The labels of `Mass` are not all 0 or 1"),
        (lambda t, s, p: (t, s, p.head(7)), "240 images have labels, 240 scores and 7 patients"),
        (lambda t, s, p: (t, s.head(9), p), "240 images have labels, 9 scores"),
        (lambda t, s, p: (t, s, p.where(p > 3)), "Some images have no patient"),
        (lambda t, s, p: (t, s[FINDINGS[::-1]], p), "different findings"),
    ],
)
def test_tables_that_cannot_be_true_are_refused(change, message):
    tables = change(*make_predictions())
    with pytest.raises(WorkbenchError, match=message):
        evaluation.auroc_table(*tables, resamples=2)
    with pytest.raises(WorkbenchError, match=message):
        evaluation.mean_auroc(*tables, resamples=2)


def test_predictions_of_another_table_are_refused():
    labels, _, _ = make_predictions()
    labels = labels.rename(columns={"Mass": "Pneumonia", "Edema": "Pneumothorax"})
    images = pd.Series([f"{n}.png" for n in range(len(labels))])
    table = labels.assign(image=images).sample(frac=1, random_state=0)
    evaluation.check_table(labels, images, table)
    with pytest.raises(WorkbenchError, match=r"2 stand in one only, such as 3\.png"):
        evaluation.check_table(labels, images.replace("3.png", "other.png"), table)
    with pytest.raises(WorkbenchError, match="has no findings Hernia"):
        evaluation.check_table(labels, images, table.drop(columns="Hernia"))
    swapped = table.rename(columns={"Pneumonia": "Pneumothorax", "Pneumothorax": "Pneumonia"})
    with pytest.raises(WorkbenchError, match="other labels for Pneumonia, Pneumothorax than the table"):
        evaluation.check_table(labels, images, swapped)


def test_images_on_both_sides_are_refused():
    evaluation.check_apart(pd.Series(["a", "b"]), pd.Series(["c"]))
    with pytest.raises(WorkbenchError, match="1 images are in validation and test alike, such as b"):
        evaluation.check_apart(pd.Series(["a", "b"]), pd.Series(["b", "c"]))


@pytest.fixture
def predictions(tmp_path):
    """A good table of predictions, and a function that writes it with changes and reads it back."""
    labels, scores, patients = make_predictions(patients=5)
    images = pd.Series([f"{n:08d}_000.png" for n in range(len(labels))], name="image")
    table = pd.concat([images, patients.rename("patient"), labels, scores.add_suffix("_score")], axis=1)

    def read(changed):
        changed.to_csv(tmp_path / "predictions-test.csv", index=False)
        return evaluation.read_predictions(tmp_path / "predictions-test.csv")

    return table, read


def test_predictions_are_read_as_written(predictions):
    table, read = predictions
    labels, scores, images, patients = read(table)
    assert list(labels.columns) == list(scores.columns) == FINDINGS
    pd.testing.assert_frame_equal(labels, table[FINDINGS])
    np.testing.assert_allclose(scores, table[[f"{name}_score" for name in FINDINGS]], rtol=1e-15)
    assert images.tolist() == table["image"].tolist()
    assert patients.tolist() == table["patient"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="Edema_score"), "Edema_score is missing"),
        (lambda t: t.drop(columns="Edema"), "Edema_score is missing or too much"),
        (lambda t: t.drop(columns="patient"), "patient is missing"),
        (lambda t: t[["image", "patient"]], "a finding is missing"),
        (lambda t: t.head(0), "has no rows"),
        (lambda t: t.assign(Mass=2), "has 2 for `Mass` in row 1: a label is 0 or 1"),
        (
            lambda t: t.assign(Mass_score=t["Mass_score"].where(t.index != 3)),
            "nan for `Mass_score` in row 4: every cell",
        ),
        (lambda t: t.assign(Mass_score=1.5), "has 1.5 for `Mass_score` in row 1: a score lies between"),
        (lambda t: t.assign(Mass_score="high"), "has high for `Mass_score` in row 1"),
        (lambda t: t.assign(image="a.png"), "has a.png for `image` in row 2: an image is predicted once"),
    ],
)
def test_bad_predictions_are_named(predictions, change, message):
    table, read = predictions
    with pytest.raises(WorkbenchError, match=message):
        read(change(table))


def test_missing_and_broken_files_of_predictions(tmp_path):
    with pytest.raises(WorkbenchError, match="There are no predictions at"):
        evaluation.read_predictions(tmp_path / "predictions-test.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(WorkbenchError, match="is not a CSV file"):
        evaluation.read_predictions(tmp_path / "empty.csv")
