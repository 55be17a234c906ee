"""Speed-up and efficiency by hand, and the model of a step's time on the article's figures."""

import numpy as np
import pandas as pd
import pytest

from workbench import WorkbenchError
from workbench.analysis import published, scaling


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


def test_model_recovers_what_made_the_figures():
    true = scaling.StepTime(compute=0.3, communication=0.02, batch_size=32)
    fitted = scaling.fit_step_time(scaling.predict(true, [1, 2, 8]), batch_size=32)
    assert (fitted.compute, fitted.communication) == pytest.approx((0.3, 0.02))


def test_model_from_four_gpus_predicts_sixteen():
    article = published.published_scaling()
    few = article[article["workers"].isin([1, 2, 4])]
    model = scaling.fit_step_time(few, batch_size=published.ARTICLE_BATCH)
    many = article[article["workers"] >= 8]
    error = scaling.predict(model, many["workers"])["images_per_second"].to_numpy() / many["images_per_second"] - 1
    assert error.abs().max() < 0.06


def test_communication_is_never_negative():
    model = scaling.fit_step_time(measured([1, 2], [10.0, 21.0]), batch_size=16)
    assert model.communication == 0
    assert scaling.predict(model, [1, 4])["efficiency"].tolist() == [1, 1]


def test_prediction_is_consistent():
    table = scaling.predict(scaling.StepTime(0.5, 0.1, 16), [1, 4])
    assert table["step_seconds"].tolist() == pytest.approx([0.5, 0.7])
    assert table["images_per_second"].tolist() == pytest.approx([32, 64 / 0.7])
    assert table["efficiency"].tolist() == pytest.approx([1, 0.5 / 0.7])
    assert table["speed_up"].tolist() == pytest.approx([1, 4 * 0.5 / 0.7])


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


def test_one_number_of_workers_is_too_few_for_a_model():
    with pytest.raises(WorkbenchError, match=r"One number of workers \(4\)"):
        scaling.fit_step_time(measured([4], [10.0]), batch_size=16)
