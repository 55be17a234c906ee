"""A table of one's own: what is read, what is refused, and shards of it."""

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbclient import NotebookClient
from PIL import Image

from workbench import WorkbenchError, runs
from workbench.data import chestxray14, own, shards

ROOT = runs.project_root()
ROWS = [f"a/{number:02d}.png,P-{number // 2:02d},{number % 2},{number % 3 // 2}" for number in range(24)]


@pytest.fixture
def ours(tmp_path):
    """Twelve patients of two images each, in a folder below images/, with a table of two findings."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    for number in range(24):
        Image.new("L", (40, 40), 10 * number).save(tmp_path / "images" / "a" / f"{number:02d}.png")
    write(tmp_path, "image,patient,Edema,Mass", ROWS)
    return tmp_path


def write(folder, header, rows, name="ours.csv"):
    (folder / name).write_text("\n".join([header, *rows]) + "\n")


def test_the_frame_is_as_nih_s(ours):
    frame = chestxray14.read_dataset(ours, table="ours.csv", split="random", seed=1)
    front = ["image", "path", "patient", "follow_up", "age", "sex", "view", "no_finding", "split"]
    assert list(frame.columns) == [*front, "Edema", "Mass"]
    assert frame.dtypes[["Edema", "Mass"]].eq(np.uint8).all()
    row = frame.set_index("image").loc["a/05.png"]
    assert (row["patient"], row["Edema"], row["Mass"], row["no_finding"]) == (2, 1, 1, False)
    assert row["path"] == str(ours / "images" / "a" / "05.png")
    assert (row["sex"], row["view"]) == ("not known", "not known")
    assert np.isnan(row["age"])
    assert frame["no_finding"].sum() == 8
    assert frame.groupby("patient")["split"].nunique().eq(1).all()
    assert list(chestxray14.read_dataset(ours, table="ours.csv", split="random", findings=["Mass"]).columns[9:]) == [
        "Mass"
    ]


def test_the_order_of_rows_and_columns_and_the_case_of_names_do_not_matter(ours):
    write(
        ours,
        " Mass,PATIENT,Image,Edema",
        [",".join(np.array(row.split(","))[[3, 1, 0, 2]]) for row in ROWS[::-1]],
        "b.csv",
    )
    frames = [chestxray14.read_dataset(ours, table=name, split="random") for name in ("ours.csv", "b.csv")]
    pd.testing.assert_frame_equal(*frames, check_like=True)


def test_details_and_its_own_split_are_read(ours):
    sides = ["train"] * 16 + ["VAL"] * 4 + ["test"] * 2 + [""] * 2
    rows = [f"{ROWS[n]},{side},{40 + n},{'Female' if n % 2 else 'm'},AP" for n, side in enumerate(sides)]
    write(ours, "image,patient,Edema,Mass,split,age,sex,view", rows)
    frame = chestxray14.read_dataset(ours, table="ours.csv", split="table")
    assert frame["split"].value_counts().to_dict() == {"train": 16, "val": 4, "test": 2}
    assert list(frame["age"][:2]) == [40, 41]
    assert list(frame["sex"][:2]) == ["M", "F"]
    rows[15] = rows[15].replace("train", "test")
    write(ours, "image,patient,Edema,Mass,split,age,sex,view", rows)
    with pytest.raises(WorkbenchError, match=r"1 patients \(such as 7\) stand in test and train"):
        chestxray14.read_dataset(ours, table="ours.csv", split="table")


def test_one_column_of_labels_is_as_good(ours):
    named = {"00": "No Finding", "10": "Edema", "01": " Mass", "11": "Mass|Edema"}
    rows = [",".join([*row.split(",")[:2], named[row.split(",")[2] + row.split(",")[3]]]) for row in ROWS]
    write(ours, "image,patient,labels", rows, "labels.csv")
    frames = [chestxray14.read_dataset(ours, table=name, split="random") for name in ("ours.csv", "labels.csv")]
    pd.testing.assert_frame_equal(*frames)


def test_its_shards_are_written_and_verified(ours, tmp_path):
    frame = chestxray14.read_dataset(ours, table="ours.csv", split="random")
    shards.write_shards(frame, tmp_path / "shards", image_size=36, images_per_shard=8, processes=1, progress=False)
    assert shards.verify_shards(tmp_path / "shards")["images"].sum() == 24
    images = shards.read_images(tmp_path / "shards").set_index("image").sort_index()
    assert list(images["Mass"]) == list(frame["Mass"])
    pixels = shards.read_radiographs(tmp_path / "shards", ["a/07.png"])
    assert (pixels == 70).all()


def test_the_table_is_hashed_in_place_of_nih_s(ours):
    before = chestxray14.hash_sources(ours, table="ours.csv")
    assert set(before) == {"ours.csv"}
    write(ours, "image,patient,Edema,Mass", ROWS[1:])
    assert chestxray14.hash_sources(ours, table="ours.csv") != before


@pytest.mark.parametrize(
    ("header", "row", "said"),
    [
        ("file,patient,Edema", "x,1,0", "has no column `image` .but `file`, `patient`, `Edema`.: rename"),
        ("image,Edema", "x,0", "has no column `patient`"),
        ("image,patient", "x,1", "has no finding: give it a column of 0 and 1"),
        ("image,patient,Edema,Edema ", "x,1,0,0", "has the column `Edema` twice"),
        ("image,patient,Edema", "x,,0", "has in line 26 `` no patient: give every row one"),
        ("image,patient,Edema", "a/03.png,1,0", "has in line 26 `a/03.png` twice"),
        ("image,patient,Edema", "x,1,-1", "has in line 26 `-1` as `Edema`: expected 0 or 1; decide what is uncertain"),
        ("image,patient,Edema", "x,1,", "has in line 26 `` as `Edema`: expected 0 or 1"),
        ("image,patient,Edema_score", "x,1,0", "has a finding `Edema_score`, a name that is taken"),
        ("image,patient,Edema,age", "x,1,0,old", "has in line 26 `old` as age: expected a number"),
        ("image,patient,Edema,split", "x,1,0,later", "has in line 26 `later` as split: expected train, val, test"),
        ("image,patient,Edema", "x,1,0", r"1 images \(such as `x`\) of 25 are not on the disk"),
        ("image,patient,Edema", "../secret.png,1,0", r"such as `../secret.png`\) of 25 are not on the disk"),
    ],
)
def test_a_table_that_is_none_is_refused_in_a_sentence(ours, header, row, said):
    Image.new("L", (40, 40)).save(ours / "secret.png")
    values = {"age": "50", "split": "train"}
    rows = []
    for image, patient, *_ in (line.split(",") for line in ROWS):
        of_row = values | {"image": image, "file": image, "patient": patient}
        rows.append(",".join(of_row.get(name, "0") for name in header.split(",")))
    write(ours, header, [*rows, row])
    with pytest.raises(WorkbenchError, match=said):
        chestxray14.read_dataset(ours, table="ours.csv", split="random")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"table": "no.csv"}, "There is no table `.*no.csv`"),
        ({"split": "official"}, 'split="official" is NIH\'s, and .*: choose "table", "random" or "lists"'),
        ({"split": "table"}, 'split="table" needs a column `split`'),
        ({"findings": ["Hernia"]}, "has no finding `Hernia`: choose from Edema, Mass"),
        ({"findings": []}, "expected at least one"),
    ],
)
def test_options_that_do_not_fit_the_table_are_refused(ours, options, said):
    with pytest.raises(WorkbenchError, match=said):
        chestxray14.read_dataset(ours, **{"table": "ours.csv", "split": "random"} | options)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'image,patient,"', b"\x00" * 50, b"image,patient\na,1,0\n"])
def test_bytes_that_are_no_table_are_refused(ours, content):
    (ours / "ours.csv").write_bytes(content)
    with pytest.raises(WorkbenchError):
        own.read_table(ours / "ours.csv")


@pytest.mark.notebooks
@pytest.mark.parametrize("stage", ["01_explore_dataset", "02_write_shards"])
def test_the_notebooks_read_it(ours, stage, monkeypatch):
    """Without age, sex and view, of which notebook 01 draws charts."""
    monkeypatch.setenv("WORKBENCH_ROOT", str(ours))
    notebook = nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f'\ndata_folder, table, split = {str(ours)!r}, "ours.csv", "random"'
    if stage == "02_write_shards":
        parameters.source += '\nimage_size, shard_margin, shard_folder = 32, 4, "shards"'
    NotebookClient(notebook, timeout=200, kernel_name="python3").execute()
    assert "24 images" in str(notebook.cells)
    if stage == "02_write_shards":
        info = shards.read_info(ours / "shards")
        assert info["findings"] == ["Edema", "Mass"]
        assert info["split"]["table"] == "ours.csv"
        assert set(info["split"]["sources"]) == {"ours.csv"}
