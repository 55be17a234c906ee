"""The manifest counts what is there, refuses shared patients, and its hashes say what was scored."""

import hashlib

import pandas as pd
import pytest

from workbench import WorkbenchError
from workbench.analysis import manifest


@pytest.fixture
def table():
    return pd.DataFrame(
        {
            "image": ["b.png", "a.png", "c.png", "d.png", "e.png"],
            "patient": [1, 1, 2, 3, 3],
            "split": ["train", "train", "val", "test", "test"],
            "Edema": [1, 0, 0, 1, 1],
            "Hernia": [0, 0, 1, 1, 0],
        }
    )


def test_splits_are_counted_and_hashed(table):
    told = manifest.split_manifest(table, ["Edema", "Hernia"], kind="official")
    assert told["kind"] == "official"
    assert told["shared_patients"] == 0
    assert told["splits"]["train"] == {
        "images": 2,
        "patients": 1,
        "positives": {"Edema": 1, "Hernia": 0},
        "prevalence": {"Edema": 0.5, "Hernia": 0.0},
        "sha256": hashlib.sha256(b"a.png\nb.png\n").hexdigest(),
    }
    shown = manifest.manifest_table(told)
    assert shown.loc["Hernia"].tolist() == [0, 1, 1]


def test_the_shift_is_from_train_to_test(table):
    shift = manifest.prevalence_shift(manifest.split_manifest(table, ["Edema", "Hernia"], kind="random"))
    assert shift.loc["Edema"].to_dict() == {"train": 0.5, "test": 1.0, "difference": 0.5, "ratio": 2.0}
    assert shift["ratio"].isna()["Hernia"]  # none in training


def test_the_order_of_rows_does_not_matter(table):
    one = manifest.split_manifest(table, ["Edema"], kind="official")
    assert manifest.split_manifest(table.iloc[::-1], ["Edema"], kind="official") == one
    other = table.assign(image=table["image"].replace("e.png", "f.png"))
    two = manifest.split_manifest(other, ["Edema"], kind="official")
    assert two["splits"]["test"]["sha256"] != one["splits"]["test"]["sha256"]
    assert two["splits"]["train"] == one["splits"]["train"]


def test_a_shared_patient_is_named(table):
    table.loc[4, "patient"] = 2
    with pytest.raises(
        WorkbenchError, match="1 patients stand in more than one split, such as patient 2 in test and val"
    ):
        manifest.split_manifest(table, ["Edema"], kind="official")


def test_another_split_s_name_is_refused(table):
    table.loc[0, "split"] = "holdout"
    with pytest.raises(WorkbenchError, match="`holdout` is no split"):
        manifest.split_manifest(table, ["Edema"], kind="official")
