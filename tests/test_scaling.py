"""Speed-up and efficiency by hand, and the fit of a step's time: on the article's figures and on simulated ones."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from workbench import WorkbenchError
from workbench.analysis import published, scaling
from workbench.analysis.scaling_model import FABRICS, PARTS, Exchange, Fabric, StepModel


def measured(workers, rates, **columns):
    return pd.DataFrame({"workers": workers, "images_per_second": rates, **columns})


def test_table_by_hand():
    table = scaling.scaling_table(measured([2, 1], [15.0, 10.0]), images_per_epoch=600, epochs=5)
    assert table["workers"].tolist() == [1, 2]
    assert table["speed_up"].tolist() == [1, 1.5]
    assert table["efficiency"].tolist() == [1, 0.75]
    assert table["seconds"].tolist() == [300, 200]
    assert list(table.columns) == ["workers", "images_per_second", "speed_up", "efficiency", "seconds"]


def test_spread_is_kept():
    given = measured([1], [10.0], spread_low=[9.0], spread_high=[11.0])
    table = scaling.scaling_table(given, images_per_epoch=1, epochs=1)
    assert table[["spread_low", "spread_high"]].iloc[0].tolist() == [9, 11]


def test_without_one_worker_the_smallest_number_is_taken_as_ideal():
    table = scaling.scaling_table(measured([4, 8], [40.0, 60.0]), images_per_epoch=1, epochs=1)
    assert table["speed_up"].tolist() == [4, 6]
    assert table["efficiency"].tolist() == [1, 0.75]


def test_table_of_the_articles_figures_is_the_articles():
    article = published.published_scaling()
    table = scaling.scaling_table(article, images_per_epoch=77_872, epochs=published.ARTICLE_EPOCHS)
    np.testing.assert_allclose(table["speed_up"], article["speed_up"])
    np.testing.assert_allclose(table["seconds"], article["seconds"], rtol=1e-3)


EXCHANGE = Exchange(gradient_bytes=28e6, fabric=FABRICS["4 V100, EDR InfiniBand"])


def repeated(model, points, rng, *, spread=0.03, steps=20):
    """Rows as a measurement gives them: repetitions of points (workers, batch per worker), noisy by a share."""
    rows = [
        {"workers": n, "batch_size": batch, "images_per_second": n * batch / model.seconds([n], batch)[0] / noise}
        for n, batch in points
        for noise in np.exp(spread * rng.standard_normal(steps))
    ]
    return pd.DataFrame(rows)


def test_from_four_gpus_of_the_article_eight_twelve_and_sixteen_are_predicted():
    article = published.published_scaling()
    few = article[article["workers"].isin([1, 2, 4])]
    fit = scaling.fit_step_model(few, exchange=EXCHANGE, batch_size=published.ARTICLE_BATCH)
    many = article[article["workers"] >= 8].reset_index()
    told = scaling.predict(fit, many["workers"])
    assert told["workers"].tolist() == [8, 12, 16]
    assert (told["images_per_second"] / many["images_per_second"] - 1).abs().max() < 0.12
    assert (told["low"] < many["images_per_second"]).all()
    assert (many["images_per_second"] < told["high"]).all()
    assert "scatter of 3 points about 2 parameters" in fit.how


def test_known_parameters_are_recovered_from_weak_and_strong_scaling():
    true = StepModel(0.005, 0.08, 16, EXCHANGE, overhead=0.02)
    points = [(1, 16), (2, 16), (4, 16), (8, 16), (2, 8), (4, 4)]
    exact = repeated(true, points, np.random.default_rng(0), spread=0, steps=1)
    free = ("per_image", "jitter", "overhead")
    fit = scaling.fit_step_model(exact, exchange=EXCHANGE, batch_size=16, free=free, resamples=5)
    assert scaling.parameters(fit)["value"].tolist() == pytest.approx([0.005, 0.08, 0.02], rel=1e-4)


def test_a_bandwidth_between_nodes_is_recovered_from_points_on_several():
    true = StepModel(0.005, 0.05, 64, Exchange(200e6, FABRICS["4 V100, 10 Gb Ethernet"]))
    exact = repeated(true, [(n, 64) for n in (1, 2, 4, 8, 16)], np.random.default_rng(0), spread=0, steps=1)
    given = Exchange(200e6, FABRICS["4 V100, EDR InfiniBand"])
    given = replace(given, fabric=replace(given.fabric, latency_between=5e-5))
    free = ("per_image", "jitter", "bandwidth_between")
    fit = scaling.fit_step_model(exact, exchange=given, batch_size=64, free=free, resamples=5)
    assert fit.model.exchange.fabric.bandwidth_between == pytest.approx(1.25e9, rel=1e-3)


@pytest.mark.parametrize("steps", [1, 12], ids=["one row a point", "twelve rows a point"])
def test_intervals_cover_the_truth_about_as_often_as_they_say(steps):
    """Of 30 intervals at 95 %, 24 or fewer cover it three times in a thousand."""
    true = StepModel(0.005, 0.2, 64, EXCHANGE)
    covered = {"jitter": 0, "throughput": 0}
    for seed in range(30):
        points = repeated(true, [(n, 64) for n in (1, 2, 4, 8)], np.random.default_rng(seed), steps=steps)
        fit = scaling.fit_step_model(points, exchange=EXCHANGE, batch_size=64, resamples=60, seed=seed)
        told, at = scaling.parameters(fit).loc["jitter"], scaling.predict(fit, [32]).iloc[0]
        covered["jitter"] += told["low"] <= 0.2 <= told["high"]
        covered["throughput"] += at["low"] <= 32 * 64 / true.seconds([32])[0] <= at["high"]
    assert min(covered.values()) > 24, covered


def test_nothing_is_known_of_the_noise_without_repetitions_or_further_points():
    fit = scaling.fit_step_model(measured([1, 2], [10.0, 18.0]), exchange=EXCHANGE, batch_size=16)
    assert fit.how.startswith("no interval: 2 points for 2 parameters")
    assert scaling.predict(fit, [4])[["low", "high", "efficiency_low"]].isna().all(axis=None)
    assert scaling.parameters(fit)[["low", "high"]].isna().all(axis=None)


def test_repetitions_give_an_interval_where_points_are_as_many_as_parameters():
    rng = np.random.default_rng(0)
    narrow, wide = (
        scaling.predict(scaling.fit_step_model(points, exchange=EXCHANGE, batch_size=64), [16]).iloc[0]
        for spread in (0.01, 0.04)
        for points in [repeated(StepModel(0.005, 0.2, 64, EXCHANGE), [(1, 64), (2, 64)], rng, spread=spread)]
    )
    assert 2 < (wide["high"] - wide["low"]) / (narrow["high"] - narrow["low"]) < 8


def test_no_parameter_is_negative():
    fit = scaling.fit_step_model(measured([1, 2], [10.0, 21.0]), exchange=EXCHANGE, batch_size=16)
    assert fit.model.jitter == pytest.approx(0, abs=1e-6)
    assert scaling.predict(fit, [4])["efficiency"].iloc[0] <= 1


@pytest.mark.parametrize(
    ("free", "points", "message"),
    [
        (
            ("per_image", "bandwidth_between"),
            [1, 2, 4],
            r"`bandwidth_between` .* at 1, 2, 4 workers: measure more than 4",
        ),
        (("per_image", "bandwidth_within"), [1, 8, 16], r"`bandwidth_within` .* measure 2 to 4 workers on one node"),
        (("per_image", "overhead"), [1, 2, 4], "`overhead` .* another batch per worker"),
        (("per_image", "jitter"), [4], "`jitter` .* at 4 workers: measure two numbers"),
        (("per_image", "jitter", "bandwidth_within"), [1, 2], "2 points, at 1, 2 workers, cannot tell 3 parameters"),
        (("speed",), [1, 2], "`speed` cannot be fitted: choose among per_image"),
    ],
)
def test_what_the_points_say_nothing_about_is_refused(free, points, message):
    table = measured(points, [10.0 * n for n in points])
    with pytest.raises(WorkbenchError, match=message):
        scaling.fit_step_model(table, exchange=EXCHANGE, batch_size=16, free=free)


def test_predictions_of_weak_and_strong_scaling_by_hand():
    alone = Exchange(1, Fabric(8, 0, 0, 1e12, 1e12), cycle=0)
    fit = scaling.Fit(StepModel(0.01, 0.0, 16, alone, overhead=0.04), (), (), "given")
    weak = scaling.predict(fit, [1, 4])
    assert weak["step_seconds"].tolist() == pytest.approx([0.2, 0.2])
    assert weak["images_per_second"].tolist() == pytest.approx([80, 320])
    assert weak["efficiency"].tolist() == pytest.approx([1, 1])
    strong = scaling.predict(fit, [1, 4], global_batch=16)
    assert strong["batch_size"].tolist() == [16, 4]
    assert strong["step_seconds"].tolist() == pytest.approx([0.2, 0.08])
    assert strong["speed_up"].tolist() == pytest.approx([1, 2.5])
    assert strong["efficiency"].tolist() == pytest.approx([1, 0.625])
    with pytest.raises(WorkbenchError, match="17 workers cannot share a global batch of 16 images"):
        scaling.predict(fit, [17], global_batch=16)


def test_parts_add_up_to_the_step():
    fit = scaling.Fit(StepModel(0.01, 0.1, 16, EXCHANGE, input_per_image=0.002), (), (), "given")
    parts = scaling.predict_parts(fit, [1, 2, 64])
    assert parts[list(PARTS)].sum(axis=1).tolist() == pytest.approx(fit.model.seconds([1, 2, 64]).tolist())
    assert parts["input wait"].tolist() == pytest.approx([0.032] * 3)
    assert parts.loc[0, ["waiting for the slowest", "exposed communication"]].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (measured([], []), "no throughput"),
        (measured([1, 1], [10.0, 11.0]), "has 1 workers twice"),
        (measured([1, 2], [10.0, 0.0]), "`images_per_second` is 0.0"),
        (measured([0, 2], [10.0, 5.0]), "`workers` is 0"),
        (measured([1, 2], [10.0, np.nan]), "`images_per_second` is nan"),
    ],
)
def test_impossible_figures_are_refused(table, message):
    with pytest.raises(WorkbenchError, match=message):
        scaling.scaling_table(table, images_per_epoch=1, epochs=1)
