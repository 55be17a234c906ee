"""Subgroups: the same AUROC as of the part alone, small ones marked, images matched by name."""

import numpy as np
import pandas as pd
import pytest
from test_evaluation import make_predictions

from workbench import WorkbenchError
from workbench.analysis import evaluation, subgroups


@pytest.fixture
def predicted():
    labels, scores, patients = make_predictions()
    generator = np.random.default_rng(1)
    sex = np.array(["F", "M"])[patients % 2]
    table = pd.DataFrame(
        {
            "image": [f"{n}.png" for n in range(len(labels))],
            "sex": sex,
            "age": generator.integers(1, 95, len(labels)),
            "view": generator.choice(["PA", "AP"], len(labels)),
        }
    )
    return labels, scores, patients, table


def test_groups_are_matched_by_name(predicted):
    *_, table = predicted
    images = table["image"].sample(frac=1, random_state=0)
    groups = subgroups.group_images(images, table)
    expected = table.set_index("image").loc[images]
    assert (groups["sex"].to_numpy() == expected["sex"].map({"F": "female", "M": "male"})).all()
    with pytest.raises(WorkbenchError, match=r"1 predicted images are not in the shards' table, such as other\.png"):
        subgroups.group_images(pd.Series(["other.png"]), table)


def test_age_bands_hold_their_lower_end():
    table = pd.DataFrame({"image": list("abcdef"), "sex": "F", "view": "PA", "age": [0, 19, 20, 79, 80, 120]})
    ages = subgroups.group_images(table["image"], table)["age"].tolist()
    assert ages == ["under 20", "under 20", "20 to 39", "60 to 79", "80 and over", "80 and over"]
    unknown = subgroups.group_images(table["image"], table.assign(sex=None, age=np.nan))
    assert set(unknown["sex"]) == set(unknown["age"]) == {"not known"}


def test_a_group_s_auroc_is_that_of_its_images(predicted):
    labels, scores, patients, table = predicted
    groups = subgroups.group_images(table["image"], table)
    told = subgroups.subgroup_table(labels, scores, patients, groups, resamples=20, fewest=1)
    women = (table["sex"] == "F").to_numpy()
    row = told.query("group == 'female' and finding == 'Mass'").iloc[0]
    assert row["auroc"] == evaluation.auroc(labels["Mass"][women], scores["Mass"][women])
    assert row["images"] == women.sum()
    mean = told.query("group == 'female' and finding == 'mean'").iloc[0]
    assert mean["auroc"] == pytest.approx(told.query("group == 'female' and finding != 'mean'")["auroc"].mean())
    for _, part in told[told["finding"] == "Mass"].groupby("by"):
        assert part["images"].sum() == len(labels)
        assert part["positives"].sum() == labels["Mass"].sum()


def test_small_groups_are_marked_and_stay_out_of_the_mean(predicted):
    labels, scores, patients, table = predicted
    labels = labels.copy()
    women = (table["sex"] == "F").to_numpy()
    labels.loc[women, "Hernia"] = 0
    labels.loc[np.flatnonzero(women)[:3], "Hernia"] = 1
    groups = subgroups.group_images(table["image"], table)[["sex"]]
    told = subgroups.subgroup_table(labels, scores, patients, groups, resamples=20, fewest=5).set_index("finding")
    female = told[told["group"] == "female"]
    assert female["small"].to_dict() == {"Mass": False, "Edema": False, "Hernia": True, "mean": True}
    assert female.loc["mean", "findings"] == 2
    assert female.loc["mean", "auroc"] == pytest.approx(female.loc[["Mass", "Edema"], "auroc"].mean())
