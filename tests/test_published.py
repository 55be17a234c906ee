"""The published figures: complete, consistent with the means and ratios their sources give."""

import numpy as np
import pytest

from workbench.analysis import published


def test_every_column_has_its_source():
    table = published.published_auroc()
    assert list(table.columns) == list(published.SOURCES)
    assert all(source["split"] in published.KINDS for source in published.SOURCES.values())
    assert all(source["reference"] and source["note"] for source in published.SOURCES.values())


def test_the_article_s_figures_are_not_passed_off_as_a_split_by_patient():
    kinds = {name: source["split"] for name, source in published.SOURCES.items()}
    assert [name for name, kind in kinds.items() if kind == "leaky"] == [
        "Dell EMC (article's repository, names corrected)"
    ]
    assert [name for name, kind in kinds.items() if kind == "official"] == ["DenseNet-121, official split (gathierry)"]


@pytest.mark.parametrize(
    ("column", "mean"),
    [
        ("Wang 2017", 0.7381),
        ("Yao 2017", 0.8027),
        ("CheXNet v3", 0.8414),
        ("DenseNet-121, official split (gathierry)", 0.8136),
    ],
)
def test_means_are_those_published(column, mean):
    assert published.published_auroc()[column].mean() == pytest.approx(mean, abs=6e-5)


def test_only_what_is_known_is_given():
    table = published.published_auroc()
    assert table.shape == (14, 5)
    assert table.iloc[:, :4].notna().all().all()
    dell = table.iloc[:, 4].dropna()
    assert dell.to_dict() == {"Pneumonia": 0.6950, "Pneumothorax": 0.8328}
    # Pneumothorax is the easier of the two everywhere; the article had the names the wrong way round.
    assert (table.loc["Pneumothorax"] > table.loc["Pneumonia"]).all()


def test_the_articles_scaling_is_consistent():
    table = published.published_scaling()
    images = table["images_per_second"] * table["seconds"] / published.ARTICLE_EPOCHS
    assert np.ptp(images) / images.mean() < 0.001  # the same images per epoch at every number of GPUs
    assert table["speed_up"].iloc[-1] == pytest.approx(10.33, abs=0.005)
    assert (table["efficiency"] * 100).round().tolist() == [100, 85, 76, 80, 75, 69, 65]
