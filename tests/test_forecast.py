"""Answers about more workers: by hand where that can be done, and in one sentence where a wish cannot be met."""

import numpy as np
import pytest

from workbench import WorkbenchError
from workbench.analysis import forecast, published, scaling
from workbench.analysis.scaling_model import FABRICS, LIMIT, Exchange, Fabric, StepModel

NOTHING = Exchange(1, Fabric(LIMIT, 0, 0, 1e15, 1e15), cycle=0)


def given(jitter=0.0, exchange=NOTHING, draws=()):
    """A model of 64 images in 0.64 s: a worker does a hundred a second."""
    models = [StepModel(0.01, share, 64, exchange) for share in (jitter, *draws)]
    return scaling.Fit(models[0], (), tuple(models[1:]), "given")


@pytest.fixture(scope="module")
def article():
    table = published.published_scaling()
    exchange = Exchange(28e6, FABRICS["4 V100, EDR InfiniBand"])
    return scaling.fit_step_model(table[table["workers"] <= 4], exchange=exchange, batch_size=64, resamples=60)


def test_workers_for_a_wanted_time():
    assert forecast.workers_for(given(), seconds=10.01, images=10_000).best == 10
    assert forecast.workers_for(given(), seconds=9.9, images=10_000).best == 11
    assert forecast.workers_for(given(), seconds=1e9, images=1).best == 1


def test_the_interval_is_that_of_the_draws():
    told = forecast.workers_for(given(draws=[0.0] * 10 + [0.5] * 10), seconds=1.0001, images=10_000)
    slower = forecast.workers_for(given(0.5), seconds=1.0001, images=10_000)
    assert (told.best, told.low, told.high) == (100, 100, slower.best)
    assert str(told) == f"100 (100 to {slower.best})"
    assert str(forecast.workers_for(given(), seconds=1.0001, images=10_000)) == "100, interval unknown"
    unsure = forecast.workers_for(given(draws=[0.0, 9.0]), seconds=1.0001, images=200_000)
    assert str(unsure) == "2,000 (2,000 to more than 4,096)"


def test_a_time_that_no_number_of_workers_reaches_is_one_sentence():
    said = r"No number of workers up to 4,096 gets 1,000,000 images through in 2 seconds: the best, 4,096, takes 2.44"
    with pytest.raises(WorkbenchError, match=said):
        forecast.workers_for(given(), seconds=2, images=1_000_000)
    with pytest.raises(WorkbenchError, match=r"up to 64 gets .* in 1 seconds: the best, 64, takes 2.6 minutes"):
        forecast.workers_for(given(), seconds=1, images=1_000_000, global_batch=64)
    with pytest.raises(WorkbenchError, match="`seconds` is 0"):
        forecast.workers_for(given(), seconds=0, images=1)


def test_where_efficiency_falls_is_where_the_prediction_crosses():
    fit = given(0.2)
    found = forecast.where_efficiency_falls(fit, below=0.8).best
    before, at = scaling.predict(fit, [found - 1, found])["efficiency"]
    assert at < 0.8 <= before
    with pytest.raises(WorkbenchError, match="does not fall under 80% up to 4,096 workers: it is 100% at its lowest"):
        forecast.where_efficiency_falls(given())
    with pytest.raises(WorkbenchError, match="`below` is 80"):
        forecast.where_efficiency_falls(fit, below=80)


def test_a_global_batch_loses_efficiency_sooner():
    fit = given(0.05, Exchange(28e6, FABRICS["4 V100, 10 Gb Ethernet"]))
    weak = forecast.where_efficiency_falls(fit, below=0.8)
    assert forecast.where_efficiency_falls(fit, below=0.8, global_batch=64).best < weak.best


def test_what_fp16_and_a_faster_fabric_bring():
    slow = given(exchange=Exchange(64e6, Fabric(1, 0, 0, 1e8, 1e8), cycle=0))
    # Two workers: 64 MB at 100 MB/s are as long as the 0.64 s of computing.
    halved = forecast.what_if(slow, [1, 2], compression="fp16")
    assert halved["gain"].tolist() == pytest.approx([0, 1.28 / 0.96 - 1])
    faster = forecast.what_if(slow, [2], fabric=Fabric(1, 0, 0, 1e15, 1e15))
    assert faster["changed"].tolist() == pytest.approx([200], rel=1e-5)
    assert faster["gain"].tolist() == pytest.approx([1], rel=1e-5)
    assert faster[["gain_low", "gain_high"]].isna().all(axis=None)


def test_the_article_loses_to_waiting_and_not_to_its_network(article):
    fp16 = forecast.what_if(article, [16], compression="fp16").iloc[0]
    assert 0 < fp16["gain"] < 0.02
    assert fp16["gain_low"] <= fp16["gain"] <= fp16["gain_high"]
    ethernet = forecast.what_if(article, [16], fabric=FABRICS["4 V100, 10 Gb Ethernet"]).iloc[0]
    assert ethernet["gain"] < -0.03


def test_answers_hold_a_number_or_a_sentence_for_every_question(article):
    told = forecast.answers(article, images=778_720, wanted=[3600, 0.001], fabrics=dict(list(FABRICS.items())[2:3]))
    answers = dict(zip(told["question"], told["answer"], strict=True))
    assert answers["workers for 60 minutes"].startswith("2 (")
    assert answers["workers for 0.001 seconds"].startswith("No number of workers up to 4,096")
    assert answers["workers at which efficiency falls under 80 %"].split(" (")[0] == "4"
    assert answers["gradients in fp16"].startswith("throughput +0.")
    assert "at 4,096 workers" in answers["fabric: 4 V100, 10 Gb Ethernet"]
    assert not told.isna().any(axis=None)
    assert np.isfinite(scaling.predict(article, [1, LIMIT])["images_per_second"]).all()
