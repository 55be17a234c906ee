"""NIH's layout, both releases, splits by patient: on tables made here, and on the real ones where they are."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from workbench import WorkbenchError
from workbench.data import chestxray14
from workbench.data.chestxray14 import FINDINGS, read_dataset

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
# Not sorted, as the real table is not.
ROWS = [
    ("00000002_000.png", "No Finding", 0, 2, 80, "M", "PA"),
    ("00000001_000.png", "Cardiomegaly", 0, 1, 57, "M", "PA"),
    ("00000001_001.png", "Cardiomegaly|Emphysema", 1, 1, 58, "M", "AP"),
    ("00000003_000.png", "Hernia|Infiltration", 0, 3, 74, "F", "PA"),
    ("00000004_000.png", "Pleural_Thickening", 0, 4, 5, "F", "AP"),
    ("00000005_000.png", "No Finding", 0, 5, 33, "F", "PA"),
]
NIH = Path(__file__).resolve().parents[1].parent / "shared" / "nih"


@pytest.fixture
def nih_sample():
    if not NIH.is_dir():
        pytest.skip(f"no sample of real radiographs at {NIH}")
    return NIH


@pytest.fixture
def small(tmp_path):
    folder = tmp_path / "nih"
    (folder / "images").mkdir(parents=True)
    write_table(folder)
    for name, *_ in ROWS:
        Image.new("L", (8, 8), 100).save(folder / "images" / name)
    (folder / "train_val_list.txt").write_text("\n".join(f"0000000{p}_000.png" for p in (2, 3, 5)))
    (folder / "test_list.txt").write_text("00000001_000.png\r\n00000001_001.png\r\n00000004_000.png\r\n\r\n")
    return folder


def write_table(folder, rows=ROWS, header=HEADER):
    lines = [header, *(",".join(map(str, row)) + ",2682,2749,0.143,0.143" for row in rows)]
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines) + "\n")


def write_lists(folder, **lists):
    paths = {}
    for side, patients in lists.items():
        names = [name for name, *_ in ROWS if int(name[:8]) in patients]
        paths[f"{side}_list"] = folder / f"my-{side}.txt"
        paths[f"{side}_list"].write_text("\n".join(names))
    return paths


def test_frame_columns_types_and_order(small):
    frame = read_dataset(small)
    front = ["image", "path", "patient", "follow_up", "age", "sex", "view", "no_finding", "split"]
    assert list(frame.columns) == [*front, *FINDINGS]
    assert chestxray14.findings_of(frame) == list(FINDINGS)
    assert frame["image"].is_monotonic_increasing
    assert (frame[list(FINDINGS)].dtypes == np.uint8).all()
    assert frame.dtypes[["patient", "follow_up", "age"]].eq(np.int64).all()
    row = frame.set_index("image").loc["00000001_001.png"]
    assert row[list(FINDINGS)].sum() == 2
    assert row["Cardiomegaly"] == row["Emphysema"] == 1
    assert (row["age"], row["sex"], row["view"], row["no_finding"]) == (58, "M", "AP", False)
    assert row["path"] == str((small / "images" / "00000001_001.png").absolute())
    assert frame["no_finding"].sum() == 2


def test_no_finding_means_none_of_the_fourteen_whatever_was_chosen(small):
    frame = read_dataset(small, findings=["Hernia", "Mass"])
    assert chestxray14.findings_of(frame) == ["Hernia", "Mass"]
    assert frame.loc[frame["no_finding"], "image"].tolist() == ["00000002_000.png", "00000005_000.png"]


def test_first_release_reads_like_the_newer_one(small, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(small, old)
    (old / "Data_Entry_2017_v2020.csv").unlink()
    lines = [f"{HEADER},\r"]
    for image, labels, follow_up, patient, age, sex, view in ROWS:
        written = f"{age * 12 + 3:03d}M" if age == 5 else f"{age:03d}Y"
        lines.append(f"{image},{labels},{follow_up:03d},{patient:08d},{written},{sex},{view},2682,2749,0.143,0.143\r")
    with gzip.open(old / "Data_Entry_2017.csv.gz", "wt", newline="") as file:
        file.write("\n".join(lines) + "\n")
    pd.testing.assert_frame_equal(chestxray14.read_table(old), chestxray14.read_table(small))


def test_newest_release_is_preferred(small):
    (small / "Data_Entry_2017.csv").write_text("Image Index\n")
    assert len(chestxray14.read_table(small)) == len(ROWS)


def test_images_in_the_folders_of_the_archives(small):
    for number, patients in ((1, "123"), (12, "45")):
        part = small / f"images_{number:03d}" / "images"
        part.mkdir(parents=True)
        for path in sorted((small / "images").glob("*.png")):
            if path.name[7] in patients:
                path.rename(part / path.name)
    frame = read_dataset(small)
    assert frame["path"].str.contains("images_012/images/00000005_000.png").sum() == 1
    assert all(Path(path).exists() for path in frame["path"])


def test_images_folder_may_hold_jpegs_and_a_png_is_preferred(small, tmp_path):
    other = tmp_path / "jpegs"
    other.mkdir()
    for name, *_ in ROWS:
        Image.new("L", (8, 8)).save(other / name.replace(".png", ".jpg"))
    Image.new("L", (8, 8)).save(other / ROWS[0][0])
    paths = read_dataset(small, images_folder=other).set_index("image")["path"].map(Path)
    assert paths[ROWS[0][0]] == other / ROWS[0][0]
    assert sorted(path.suffix for path in paths) == [".jpg"] * 5 + [".png"]


def test_missing_images_are_an_error_or_counted(small):
    (small / "images" / "00000004_000.png").unlink()
    (small / "images" / "00000005_000.png").unlink()
    with pytest.raises(WorkbenchError, match=r"2 images \(such as `00000004_000.png`\) of 6 .* missing=\"skip\""):
        read_dataset(small)
    frame = read_dataset(small, missing="skip")
    assert len(frame) == 4
    assert frame.attrs["missing"] == 2
    shutil.rmtree(small / "images")
    with pytest.raises(WorkbenchError, match="6 images"):
        read_dataset(small, missing="skip")


def test_the_split_does_not_depend_on_what_is_on_the_disk(small):
    whole = read_dataset(small, validation_fraction=0.34).set_index("image")["split"]
    (small / "images" / "00000002_000.png").unlink()
    part = read_dataset(small, validation_fraction=0.34, missing="skip").set_index("image")["split"]
    assert (whole == "val").sum() == 1
    assert part.eq(whole[part.index]).all()


@pytest.mark.parametrize("split", ["official", "random"])
def test_splits_are_by_patient_seeded_and_of_the_size_asked_for(tmp_path, split):
    rows = [
        (f"{p:08d}_{f:03d}.png", "No Finding", f, p, 50, "F", "PA") for p in range(1, 201) for f in range(p % 4 + 1)
    ]
    write_table(tmp_path, rows)
    (tmp_path / "train_val_list.txt").write_text("\n".join(row[0] for row in rows if row[3] > 40))
    (tmp_path / "test_list.txt").write_text("\n".join(row[0] for row in rows if row[3] <= 40))
    (tmp_path / "images").mkdir()
    for row in rows:
        (tmp_path / "images" / row[0]).touch()
    frames = [read_dataset(tmp_path, split=split, validation_fraction=0.25, seed=seed) for seed in (3, 3, 4)]
    pd.testing.assert_frame_equal(frames[0], frames[1])
    assert not frames[0]["split"].equals(frames[2]["split"])
    patients = chestxray14.split_table(frames[0])["patients"]
    assert patients.to_dict() == {
        "train": 120 if split == "official" else 110,
        "val": 40 + 10 * (split == "random"),
        "test": 40,
    }
    assert frames[0].groupby("patient")["split"].nunique().eq(1).all()
    if split == "official":
        assert set(frames[2].loc[frames[2]["split"] == "test", "patient"]) == set(range(1, 41))


def test_lists_of_the_user(small):
    lists = write_lists(small, train=[1, 2], val=[3], test=[4])
    # Published lists carry the labels behind the name.
    lists["test_list"].write_text("00000004_000.png 0 0 1 0\n")
    frame = read_dataset(small, split="lists", **lists)
    assert frame["split"].tolist() == ["train", "train", "train", "val", "test"]
    lists["val_list"].write_text("00000003_000\n")
    with pytest.raises(WorkbenchError, match=r"my-val.txt` names 1 images .*`00000003_000`"):
        read_dataset(small, split="lists", **lists)
    with pytest.raises(WorkbenchError, match="needs `val_list`"):
        read_dataset(small, split="lists", **lists | {"val_list": None})


def test_an_image_in_two_lists_is_refused(small):
    lists = write_lists(small, train=[1, 2], val=[2], test=[4])
    with pytest.raises(WorkbenchError, match=r"`00000002_000.png`.*my-val.txt"):
        read_dataset(small, split="lists", **lists)
    (small / "test_list.txt").write_text("\n".join(row[0] for row in ROWS))
    with pytest.raises(WorkbenchError, match=r"3 images .*train_val_list.txt"):
        read_dataset(small)


def test_a_patient_on_two_sides_is_refused(small):
    lists = write_lists(small, train=[2], val=[3], test=[4])
    lists["train_list"].write_text("00000001_000.png\n")
    lists["test_list"].write_text("00000001_001.png\n")
    with pytest.raises(WorkbenchError, match=r"1 patients \(such as 1\) stand in test and train"):
        read_dataset(small, split="lists", **lists)
    frame = read_dataset(small)
    frame.loc[frame["image"] == "00000001_001.png", "split"] = "train"
    with pytest.raises(WorkbenchError, match="such as 1"):
        chestxray14.split_table(frame)


def test_official_lists_have_to_cover_the_table(small):
    (small / "test_list.txt").write_text("00000001_000.png\n00000001_001.png\n")
    with pytest.raises(WorkbenchError, match=r"1 images \(such as `00000004_000.png`\)"):
        read_dataset(small)
    (small / "test_list.txt").unlink()
    with pytest.raises(WorkbenchError, match=r"test_list.txt` is no file"):
        read_dataset(small)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"findings": ["Mass", "Cough"]}, "`Cough` is not a finding: choose from Atelectasis"),
        ({"findings": []}, "expected at least one"),
        ({"findings": ["Mass", "Mass"]}, "each only once"),
        ({"split": "offical"}, "split='offical' is not known"),
        ({"missing": "ignore"}, "missing='ignore' is not known"),
        ({"validation_fraction": 1.5}, r"validation_fraction=1.5 is not a share"),
        ({"split": "random", "test_fraction": 0.9}, "leave none of 5 patients"),
    ],
)
def test_wrong_settings_are_told(small, options, message):
    with pytest.raises(WorkbenchError, match=message):
        read_dataset(small, **options)


def test_wrong_tables_are_told(small):
    write_table(small, [(*ROWS[0][:1], "Mass|Cough", *ROWS[0][2:])])
    with pytest.raises(WorkbenchError, match=r"label `Cough` \(in `Mass|Cough`\)"):
        read_dataset(small)
    write_table(small, [(*ROWS[0][:4], "old", "M", "PA")])
    with pytest.raises(WorkbenchError, match=r"age `old` for `00000002_000.png`"):
        read_dataset(small)
    write_table(small, [ROWS[0], ROWS[0]])
    with pytest.raises(WorkbenchError, match=r"has `00000002_000.png` twice"):
        read_dataset(small)
    write_table(small, header=HEADER.replace("Patient Age", "Age"))
    with pytest.raises(WorkbenchError, match="has no column `Patient Age`"):
        read_dataset(small)
    (small / "Data_Entry_2017_v2020.csv").write_text("")
    with pytest.raises(WorkbenchError, match=r"v2020.csv` cannot be read"):
        read_dataset(small)
    write_table(small, [])
    with pytest.raises(WorkbenchError, match=r"v2020.csv` has no row"):
        read_dataset(small)
    (small / "Data_Entry_2017_v2020.csv").unlink()
    with pytest.raises(WorkbenchError, match=r"holds no Data_Entry_2017_v2020.csv"):
        read_dataset(small)


def test_damaged_tables_and_lists_are_named(small):
    table = (small / "Data_Entry_2017_v2020.csv").read_bytes()
    packed = bytearray(gzip.compress(table))
    packed[20:60] = b"\xff" * 40
    (small / "Data_Entry_2017_v2020.csv").unlink()
    (small / "Data_Entry_2017_v2020.csv.gz").write_bytes(packed)
    with pytest.raises(WorkbenchError, match=r"Data_Entry_2017_v2020\.csv\.gz` cannot be read"):
        read_dataset(small)
    (small / "Data_Entry_2017_v2020.csv.gz").unlink()
    write_table(small, [(*row[:3], "1e30", *row[4:]) for row in ROWS[:1]])  # too large for what it would become
    with pytest.raises(
        WorkbenchError, match=r"has the patient `1e30` for `00000002_000\.png`: expected a whole number"
    ):
        read_dataset(small)
    write_table(small)
    (small / "test_list.txt").write_text("00000001_000.png\n", encoding="utf-16")
    with pytest.raises(WorkbenchError, match=r"test_list\.txt` cannot be read .*UTF-8"):
        read_dataset(small)


@pytest.mark.parametrize("line", ["00000004_000.png,Mass,1,2,3", "00000004_000.png,Mass,1,2,inf,4", ",Mass,1,2,3,4"])
def test_a_box_without_its_numbers_is_refused(small, line):
    header = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n"
    (small / "BBox_List_2017.csv").write_text(f"{header}00000004_000.png,Mass,1,2,3,4\n{line}\n")
    with pytest.raises(WorkbenchError, match=r"BBox_List_2017\.csv` is not .*line 3 lacks a value"):
        chestxray14.read_boxes(small)


def test_tables_for_the_charts(small):
    frame = read_dataset(small)
    prevalence = chestxray14.prevalence_table(frame)
    assert prevalence.index.tolist() == [*FINDINGS, "No Finding"]
    assert prevalence.columns.tolist() == ["images", "share", "train", "val", "test"]
    assert prevalence.loc["Cardiomegaly", ["images", "share", "test"]].tolist() == [2, 2 / 6, 2 / 3]
    assert prevalence.loc["No Finding", "images"] == 2
    together = chestxray14.cooccurrence_table(frame)
    assert together.shape == (14, 14)
    assert together.loc["Cardiomegaly", "Emphysema"] == together.loc["Hernia", "Infiltration"] == 1
    assert together.loc["Cardiomegaly", "Cardiomegaly"] == 2
    table = chestxray14.split_table(frame)
    assert table.loc["test", ["images", "patients", "Cardiomegaly"]].tolist() == [3, 2, 2]


def test_boxes(small):
    assert chestxray14.read_boxes(small).empty
    (small / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000001_000.png,Infiltrate,10.5,20,300,40.25\n"
    )
    boxes = chestxray14.read_boxes(small)
    assert boxes.to_dict("records") == [
        {"image": "00000001_000.png", "finding": "Infiltration", "x": 10.5, "y": 20, "width": 300, "height": 40.25}
    ]
    (small / "BBox_List_2017.csv").write_text("Image Index,Finding Label\n00000001_000.png,Mass\n")
    with pytest.raises(WorkbenchError, match="is not NIH's list of boxes"):
        chestxray14.read_boxes(small)


@pytest.mark.nih
def test_both_real_releases(nih_sample, tmp_path):
    with gzip.open(nih_sample / "Data_Entry_2017.csv.gz", "rb") as packed:
        (tmp_path / "Data_Entry_2017.csv").write_bytes(packed.read())
    new, old = chestxray14.read_table(nih_sample), chestxray14.read_table(tmp_path)
    assert new.dtypes.equals(old.dtypes)
    assert new["image"].equals(old["image"])
    assert len(new) == 112_120
    assert new["patient"].nunique() == 30_805
    assert new["age"].between(0, 95).all()
    assert old.loc[0, "age"] == 58
    assert (old["age"] == 0).sum() > 0  # ages in months and days
    assert (new["no_finding"].sum(), old["no_finding"].sum()) == (60_361, 60_412)
    assert (new["Pneumonia"].sum(), old["Pneumonia"].sum()) == (1_431, 1_353)


@pytest.mark.nih
def test_the_real_official_split_and_boxes(nih_sample):
    frame = read_dataset(nih_sample, images_folder=nih_sample / "images_256", missing="skip")
    assert len(frame) == 1_155
    assert frame.attrs["missing"] == 110_965
    assert frame["split"].eq("test").sum() == 189
    table = chestxray14.read_table(nih_sample)
    sides = chestxray14._split_official(table, nih_sample, 0.1, 0)
    assert sides.isin(["train", "val"]).sum() == 86_524
    assert sides.eq("test").sum() == 25_596
    boxes = chestxray14.read_boxes(nih_sample)
    assert len(boxes) == 984
    assert boxes["image"].nunique() == 880
    assert set(boxes["finding"]) <= set(FINDINGS)
    assert sides[table["image"].isin(boxes["image"])].eq("test").all()
