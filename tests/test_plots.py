"""The charts: what they show is what the table says, nothing overlaps, and no style is left behind."""

from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from workbench.analysis import calibration, comparison, evaluation, plots, published, scaling, subgroups, thresholds
from workbench.analysis.scaling_model import FABRICS, Exchange, StepModel

FINDINGS = list(published.published_auroc().index)


@pytest.fixture(autouse=True)
def _closed_and_clean():
    before = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == before


@pytest.fixture(scope="module")
def frame():
    generator = np.random.default_rng(0)
    count = 400
    patients = generator.integers(0, 90, count) ** 2 // 90
    frame = pd.DataFrame(
        {
            "patient": patients,
            "age": generator.integers(1, 130, count),  # real tables hold impossible ages
            "sex": generator.choice(["F", "M"], count),
            "view": generator.choice(["PA", "AP"], count),
            "split": generator.choice(["train", "val", "test"], count),
        }
    )
    return frame.join(pd.DataFrame(generator.random((count, 14)) < np.linspace(0.3, 0.02, 14), columns=FINDINGS))


@pytest.fixture(scope="module")
def prevalence(frame):
    labels = frame[FINDINGS].assign(**{"No Finding": ~frame[FINDINGS].any(axis=1)})
    table = pd.DataFrame({"images": labels.sum(), "share": labels.mean()})
    for split in ("train", "val", "test"):
        table[split] = labels[frame["split"] == split].mean()
    return table


@pytest.fixture(scope="module")
def predictions():
    generator = np.random.default_rng(1)
    labels = pd.DataFrame(generator.random((500, 14)) < np.linspace(0.4, 0.1, 14), columns=FINDINGS).astype(int)
    scores = 1 / (1 + np.exp(2 - generator.normal(size=labels.shape) - 1.2 * labels))
    return labels, scores, pd.Series(np.arange(500) // 2)


@pytest.fixture(scope="module")
def measured():
    table = pd.DataFrame({"workers": [1, 2], "images_per_second": [14.0, 25.2]})
    table = table.assign(spread_low=[13.5, 25.0], spread_high=[14.2, 26.0])
    return scaling.scaling_table(table, images_per_epoch=7000, epochs=10)


def predicted(workers):
    """A prediction with an interval, as `scaling.predict` gives it."""
    model = StepModel(1.0, 0.1, 16, Exchange(28e6, FABRICS["shared memory"]))
    draws = tuple(replace(model, jitter=jitter) for jitter in (0.05, 0.2))
    return scaling.predict(scaling.Fit(model, ("jitter",), draws, "given"), workers)


def texts(ax):
    return [text.get_text() for text in ax.texts]


def assert_apart(artists, figure):
    """No two of the texts cover each other."""
    figure.canvas.draw()
    # Less a pixel or two, since a box holds the room between lines as well.
    boxes = [artist.get_window_extent().padded(-2) for artist in artists if artist.get_text()]
    assert len(boxes) > 1
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_prevalence_shows_every_count_sorted(prevalence):
    ax = plots.plot_prevalence(prevalence)
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == sorted(prevalence["images"])
    assert len(texts(ax)) == 15
    assert any(text.startswith(f"{prevalence['images'].max():,}  (") for text in texts(ax))
    assert "Pleural Thickening" in [label.get_text() for label in ax.get_yticklabels()]
    assert_apart(ax.get_yticklabels() + ax.texts, ax.figure)


def test_cooccurrence_shows_shares_of_the_row(frame):
    labels = frame[FINDINGS].astype(int)
    counts = labels.T @ labels
    ax = plots.plot_cooccurrence(counts)
    rows = [label.get_text() for label in ax.get_yticklabels()]
    order = np.diag(counts).argsort()[::-1]
    assert rows[0] == f"{FINDINGS[order[0]]}  ({counts.iloc[order[0], order[0]]})"
    share = 100 * counts.iloc[order[0], order[1]] / counts.iloc[order[0], order[0]]
    assert texts(ax)[0] == f"{share:.0f}"
    assert len(texts(ax)) == 14 * 13
    assert_apart(ax.get_yticklabels(), ax.figure)


def test_cooccurrence_of_a_finding_that_never_occurs():
    counts = pd.DataFrame([[3, 0], [0, 0]], index=FINDINGS[:2], columns=FINDINGS[:2])
    assert texts(plots.plot_cooccurrence(counts)) == ["0", "0"]


def test_demographics_count_every_image(frame):
    ages, views = plots.plot_demographics(frame)
    outlines = [patch.get_data().values.sum() for patch in ages.patches]
    assert sum(outlines) == 2 * len(frame)  # an outline and a filled one for each sex
    assert sum(bar.get_height() for bar in views.patches) == len(frame)


def test_images_per_patient_shares_add_up(frame):
    ax = plots.plot_images_per_patient(frame)
    assert sum(bar.get_height() for bar in ax.patches) == pytest.approx(2)
    assert [label.get_text() for label in ax.get_xticklabels()][:3] == ["1", "2", "3–4"]


def test_images_per_patient_with_one_image_each(frame):
    ax = plots.plot_images_per_patient(frame.drop_duplicates("patient"))
    assert ax.patches[0].get_height() == 1


def test_split_shift_shows_each_split(prevalence):
    ax = plots.plot_split_shift(prevalence)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "val", "test"]
    assert_apart(ax.get_xticklabels(), ax.figure)


def test_split_shift_with_a_split_that_is_empty(prevalence):
    ax = plots.plot_split_shift(prevalence.assign(val=np.nan, test=0.0))
    ax.figure.canvas.draw()


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 64, 64, 1)])
def test_radiographs_hang_with_titles_and_boxes(shape):
    images = np.arange(np.prod(shape)).astype("uint8").reshape(shape)
    boxes = [[(5, 20, 10, 12, "Pleural_Thickening")], [], [(50, 1, 10, 10, "Mass")]]
    axes = plots.plot_radiographs(images, ["a.png\nMass, Nodule", "b", "c" * 5], boxes=boxes, columns=2)
    assert [len(ax.patches) for ax in axes] == [1, 0, 1]
    assert texts(axes[0]) == ["Pleural Thickening"]
    assert axes[0].get_title() == "a.png\nMass, Nodule"
    np.testing.assert_array_equal(axes[1].images[0].get_array(), images[1].squeeze())


def test_history_marks_the_kept_epoch():
    history = pd.DataFrame({"epoch": [1, 2, 3], "loss": [0.3, 0.2, 0.1], "val_loss": [0.3, 0.25, 0.26]})
    history = history.assign(val_auroc=[0.6, 0.75, 0.7], learning_rate=[1e-3, 1e-3, 1e-4], best=[1, 1, 0])
    loss, auroc, rate = plots.plot_history(history)
    np.testing.assert_array_equal(loss.lines[1].get_ydata(), history["val_loss"])
    assert texts(auroc) == ["best 0.750"]
    assert rate.get_yscale() == "log"
    plots.plot_history(history.head(1))


def test_auroc_shows_ours_and_tells_the_splits_apart(predictions):
    table = evaluation.auroc_table(*predictions, resamples=50)
    mean = evaluation.mean_auroc(*predictions, resamples=50)
    ax = plots.plot_auroc(table, published.published_auroc(), mean=mean, split="official")
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows[0] == table["auroc"].idxmax().replace("_", " ")
    assert rows[-1] == "mean"
    legend = ax.get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    filled = {name: line.get_markerfacecolor() != "none" for name, line in zip(names, legend.get_lines(), strict=True)}
    assert filled["CheXNet v3, random split"] is False
    assert filled["DenseNet-121, official split (gathierry)"] is True
    best = table.loc[table["auroc"].idxmax()]
    assert f"{best['auroc']:.3f}  [{best['ci_low']:.3f}, {best['ci_high']:.3f}]" in texts(ax)
    assert "this run, with 95% interval, official split" in names
    assert any("leaky split" in name for name in names)
    # Compared with a figure of its own kind of split.
    assert f"{mean['auroc'] - 0.8136:+.3f}".replace("-", "−") in texts(ax)
    assert_apart(ax.get_yticklabels() + ax.texts, ax.figure)


def test_auroc_without_published_figures_and_with_an_undefined_one(predictions):
    table = evaluation.auroc_table(*predictions, resamples=20)
    table.loc["Hernia", ["auroc", "ci_low", "ci_high"]] = np.nan
    ax = plots.plot_auroc(table)
    assert "undefined: one class absent" in texts(ax)
    assert ax.get_yticklabels()[-1].get_text() == "Hernia"


def test_mean_of_published_figures_is_over_the_same_findings(predictions):
    labels, scores, patients = predictions
    labels = labels.assign(Hernia=0)
    table = evaluation.auroc_table(labels, scores, patients, resamples=20)
    mean = evaluation.mean_auroc(labels, scores, patients, resamples=20)
    ax = plots.plot_auroc(table, published.published_auroc()[["CheXNet v3"]], mean=mean, split="random")
    shown = ax.lines[1].get_xdata()[-1]
    assert shown == pytest.approx(published.published_auroc()["CheXNet v3"].drop("Hernia").mean())


def test_curves_give_each_finding_its_area(predictions):
    labels, scores, patients = predictions
    table = evaluation.auroc_table(labels, scores, patients, resamples=2)
    axes = plots.plot_roc(evaluation.roc_table(labels, scores))
    assert len(axes) == 14
    assert [texts(ax)[0] for ax in axes] == [f"{x:.3f}" for x in table["auroc"]]
    axes = plots.plot_precision_recall(evaluation.precision_recall_table(labels, scores))
    expected = [f"{x:.3f}\n({y:.3f})" for x, y in zip(table["average_precision"], labels.mean(), strict=True)]
    assert [texts(ax)[0] for ax in axes] == expected


def test_calibration_draws_each_finding(predictions):
    labels, scores, _ = predictions
    axes = plots.plot_calibration(calibration.calibration_table(labels, scores))
    assert [ax.get_title(loc="left").split("\n")[0] for ax in axes][-2:] == ["Pleural Thickening", "Hernia"]


def test_throughput_beside_the_articles(measured):
    prediction = predicted([1, 2, 4])
    ours, article = plots.plot_throughput(measured, published.published_scaling(), prediction=prediction)
    assert texts(ours) == ["100%", "90%"]
    assert texts(article) == ["100%", "85%", "76%", "80%", "75%", "69%", "65%"]
    ideal = next(line for line in ours.lines if line.get_label().startswith("ideal"))
    assert ideal.get_ydata()[-1] == pytest.approx(14.0 * 4)
    assert len(plots.plot_throughput(measured)) == 1
    assert_apart(article.texts, article.figure)


def test_time_to_train_writes_the_times(measured):
    ours, article = plots.plot_time_to_train(measured, published.published_scaling())
    assert texts(ours) == ["83.3 min", "46.3 min"]
    assert (texts(article)[0], texts(article)[-1]) == ("70.1 min", "6.8 min")


@pytest.mark.parametrize(("seconds", "text"), [(12, "12 s"), (600, "10.0 min"), (7200, "2.0 h")])
def test_durations_are_in_a_fitting_unit(measured, seconds, text):
    (ax,) = plots.plot_time_to_train(measured.head(1).assign(seconds=seconds))
    assert texts(ax) == [text]


def test_efficiency_holds_both_series(measured):
    ax = plots.plot_efficiency(measured, published.published_scaling())
    assert [text.get_text() for text in ax.get_legend().get_texts()][1:] == [
        "Measured here", "The article: up to 16 V100 GPUs"
    ]  # fmt: skip
    assert texts(ax) == ["100%", "90%"]


def test_a_prediction_shows_its_interval_as_a_band(measured):
    told = predicted([1, 2, 4])
    ours, article = plots.plot_throughput(measured, published.published_scaling(), prediction=told)
    (band,) = ours.collections[:1]
    reached = band.get_paths()[0].vertices[:, 1]
    assert reached.max() == pytest.approx(told["high"].max())
    assert "its 95 % interval" in [text.get_text() for text in ours.get_legend().get_texts()]
    assert "its 95 % interval" not in [text.get_text() for text in article.get_legend().get_texts()]
    # Where nothing is known of the noise there is a line and no band.
    unsure = told.assign(low=np.nan, high=np.nan)
    (ours,) = plots.plot_throughput(measured, prediction=unsure)
    assert "its 95 % interval" not in [text.get_text() for text in ours.get_legend().get_texts()]


def test_a_step_s_parts_are_stacked_to_the_step():
    columns = {"compute": [0.2, 0.2], "input wait": [0.01, 0.02], "waiting for the slowest": [0, 0.03]}
    parts = pd.DataFrame(columns | {"exposed communication": [0, 0.05]}, index=["1 worker", "2 workers"])
    ax = plots.plot_step_parts(parts)
    ends = [patch.get_x() + patch.get_width() for patch in ax.patches]
    assert max(ends) == pytest.approx(300)
    assert ax.get_xlabel() == "milliseconds of a step"
    assert {"210 ms", "300 ms", "95%", "67%", "17%"} <= set(texts(ax))
    assert_apart(ax.texts, ax.figure)


def test_a_forecast_holds_every_curve_and_its_points(measured):
    table = predicted([1, 16, 256, 4096])
    ax = plots.plot_forecast({"Ours": table, "Theirs": table}, {"Ours": measured})
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["Ours", "Theirs"]
    assert len(ax.collections) == 2
    assert [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "o"] == [[1, 2]]


def test_charts_draw_on_the_axes_they_are_given(prevalence, measured):
    _, (left, right) = plt.subplots(1, 2)
    assert plots.plot_prevalence(prevalence, ax=left) is left
    assert plots.plot_efficiency(measured, ax=right) is right
    assert list(plots.plot_throughput(measured, published.published_scaling(), ax=[left, right])) == [
        left,
        right,
    ]


def test_a_comparison_says_which_differences_are_sure(predictions):
    labels, scores, patients = predictions
    images = pd.Series([f"{n}.png" for n in range(len(labels))])
    worse = scores.copy()
    worse["Mass"] = 1 - worse["Mass"]
    labels = labels.assign(Hernia=0)
    table = comparison.compare_predictions(
        (labels, worse, images, patients), (labels, scores, images, patients), resamples=50
    )
    ax = plots.plot_comparison(table, first="one-run", second="another-run")
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows[0] == "Mass"
    assert rows[-1] == "mean"
    assert "undefined: one class absent" in texts(ax)
    assert f"{table.loc['Mass', 'difference']:+.3f}" in " ".join(texts(ax))
    assert_apart(ax.get_yticklabels() + ax.texts, ax.figure)


def test_operating_points_and_subgroups_name_every_row(predictions):
    labels, scores, patients = predictions
    chosen = thresholds.fit_thresholds(labels, scores)
    table = thresholds.score_thresholds(chosen, labels, scores, patients, resamples=20)
    axes = plots.plot_operating_points(table)
    assert len(axes) == 4
    assert len(axes[0].get_yticklabels()) == len(table)
    assert_apart(axes[0].get_yticklabels(), axes[0].figure)
    groups = pd.DataFrame({"sex": np.where(patients % 2, "female", "male")})
    told = subgroups.subgroup_table(labels, scores, patients, groups, resamples=20)
    ax = plots.plot_subgroups(told)
    assert [label.get_text().split("\n")[0] for label in ax.get_yticklabels()] == ["female", "male"]
    assert_apart(ax.get_yticklabels() + ax.texts, ax.figure)


def test_heat_maps_glow_over_the_radiographs_and_under_the_boxes():
    images = np.full((3, 64, 64), 120, np.uint8)
    maps = np.zeros((3, 4, 4), np.float32)
    maps[0, 1, 2] = maps[1, 0, 0] = 1
    boxes = [[(30, 15, 20, 20, "Pleural_Thickening")], [], []]
    axes = plots.plot_heat_maps(images, maps, ["Pleural_Thickening", "b", "c"], boxes=boxes, columns=3)
    radiograph, glow = axes[0].images
    assert np.asarray(radiograph.get_array()).max() == 120
    hottest = np.unravel_index(np.argmax(glow.get_array()), (64, 64))
    assert abs(hottest[0] - 23.5) <= 1
    assert abs(hottest[1] - 39.5) <= 1
    assert glow.get_cmap()(0.0)[3] == 0, "cold places are clear"
    assert radiograph.get_zorder() < glow.get_zorder() < axes[0].patches[0].get_zorder()
    assert "no heat" in axes[2].get_title()
    assert "no heat" not in axes[1].get_title()
    assert_apart([ax.title for ax in axes], axes[0].figure)


def test_localisation_shows_pointing_beside_its_chance():
    table = pd.DataFrame({"boxes": 30, "images": 28, "pointing": np.linspace(0, 1, 14)}, index=FINDINGS)
    table = table.assign(pointing_low=table["pointing"] * 0.9, pointing_high=table["pointing"] * 0.9 + 0.1, chance=0.07)
    for least in (0.1, 0.25, 0.5, 0.75):
        table = table.assign(**{f"iobb_{least}": 1 - least, f"false_positives_{least}": 1 + least})
    pointing, found = plots.plot_localisation(table)
    assert pointing.get_yticklabels()[0].get_text() == "Hernia  (28)"
    assert list(pointing.lines[0].get_xdata()) == sorted(table["pointing"], reverse=True)
    assert set(pointing.lines[1].get_xdata()) == {0.07}
    legend = [text.get_text() for text in found.get_legend().get_texts()]
    assert legend[:2] == ["IoBB ≥ 0.1: 1.1 false an image", "IoBB ≥ 0.25: 1.2 false an image"]
    assert_apart(pointing.get_yticklabels(), pointing.figure)
    assert_apart([found.xaxis.label, *found.get_legend().get_texts()], found.figure)
    plots.plot_localisation(table.head(1))
