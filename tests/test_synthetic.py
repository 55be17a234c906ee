"""The made-up data set: NIH's layout, NIH's imbalance, whole or not at all, the same again for the same seed."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from workbench import WorkbenchError
from workbench.data import chestxray14, radiographs, synthetic
from workbench.data.chestxray14 import FINDINGS


@pytest.fixture(scope="module")
def default(tmp_path_factory):
    return synthetic.write_synthetic(tmp_path_factory.mktemp("made-up") / "synthetic", progress=False)


@pytest.fixture(scope="module")
def frame(default):
    return chestxray14.read_dataset(default)


def write_small(folder, **settings):
    return synthetic.write_synthetic(folder, **{"patients": 12, "image_size": 32, "progress": False} | settings)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_reads_as_nihs_own(default, frame):
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    assert (default / "Data_Entry_2017_v2020.csv").read_text().startswith(header)
    assert 1_600 <= len(frame) <= 2_000
    assert frame["image"].str.fullmatch(r"\d{8}_\d{3}\.png").all()
    assert set(frame["split"]) == {"train", "val", "test"}
    assert set(frame["sex"]) == {"F", "M"}
    assert set(frame["view"]) == {"AP", "PA"}
    assert frame["age"].between(0, 100).all()
    assert frame.groupby("patient").size().max() > 5
    with Image.open(frame["path"].iloc[0]) as image:
        assert (image.mode, image.size) == ("L", (96, 96))


def test_shares_run_as_nihs_do(frame):
    table = chestxray14.prevalence_table(frame)
    findings = table.drop(index="No Finding")
    assert findings["images"].idxmax() == "Infiltration"
    assert findings["images"].idxmin() == "Hernia"
    assert table.loc["No Finding", "share"] > 0.5
    assert chestxray14.split_table(frame).loc["test", list(FINDINGS)].min() >= 8


def test_findings_come_back_in_the_same_patient(frame):
    first = frame.groupby("patient").nth(0).set_index("patient")[list(FINDINGS)]
    second = frame.groupby("patient").nth(1).set_index("patient")[list(FINDINGS)]
    first = first.loc[second.index]
    again = (first & second).to_numpy().sum() / first.to_numpy().sum()
    assert again > 1.5 * second.to_numpy().mean()


def draw(findings, seed=0, **options):
    return synthetic.draw_radiograph(findings, image_size=64, rng=np.random.default_rng(seed), **options)


def test_every_finding_shows_in_its_own_way():
    grid = np.linspace(-0.5, 0.5, 64)
    drawn = {
        finding: np.abs(synthetic.PATTERNS[finding](grid[None], grid[:, None], 1, np.random.default_rng(3)))
        for finding in FINDINGS
    }
    by_size = {"Cardiomegaly", "Emphysema"}  # they change the heart and the lungs themselves
    assert {finding for finding, change in drawn.items() if change.max() < 0.25} == by_size
    for one, other in combinations(set(FINDINGS) - by_size, 2):
        assert np.corrcoef(drawn[one].ravel(), drawn[other].ravel())[0, 1] < 0.8, (one, other)

    def mean_image(findings):
        return np.mean([draw(findings, seed)[0] for seed in range(30)], axis=0)

    plain = mean_image([])
    assert (mean_image(["Cardiomegaly"]) - plain)[32:48].mean() > 5
    assert (mean_image(["Emphysema"]) - plain)[16:48].mean() < -10


def test_boxes_surround_what_was_drawn():
    for finding in FINDINGS:
        for seed in range(8):
            _, [(name, (x, y, width, height))] = draw([finding], seed)
            assert name == finding
            assert 0 <= x < x + width <= 1024, finding
            assert 0 <= y < y + height <= 1024, finding


def test_boxes_are_of_test_images_with_that_finding(default, frame):
    text = (default / "BBox_List_2017.csv").read_text()
    assert text.startswith("Image Index,Finding Label,Bbox [x,y,w,h],,,\n")
    assert ",Infiltrate," in text
    boxes = chestxray14.read_boxes(default)
    rows = frame.set_index("image").loc[boxes["image"]]
    assert rows["split"].eq("test").all()
    assert all(rows[finding].iloc[i] == 1 for i, finding in enumerate(boxes["finding"]))
    assert 0.2 < boxes["image"].nunique() / (~frame.loc[frame["split"] == "test", "no_finding"]).sum() < 0.7


def test_a_box_is_where_the_mass_is(default, frame):
    boxes = chestxray14.read_boxes(default)
    masses = boxes[boxes["finding"] == "Mass"].merge(frame[["image", "path"]], on="image")
    contrasts = []
    for box in masses.itertuples():
        pixels = radiographs.read_radiograph(box.path).astype(float)
        x, y, w, h = (np.array([box.x, box.y, box.width, box.height]) * 96 / 1024).round().astype(int)
        around = pixels[max(y - h // 2, 0) : y + h + h // 2, max(x - w // 2, 0) : x + w + w // 2]
        contrasts.append(pixels[y : y + h, x : x + w].mean() - around.mean())
    assert len(contrasts) >= 5
    assert np.median(contrasts) > 15


def test_the_same_seed_is_the_same_data_set(tmp_path):
    one, two, other = (write_small(tmp_path / n, seed=s) for n, s in (("one", 1), ("two", 1), ("other", 2)))
    assert contents(one) == contents(two)
    assert contents(one).keys() != contents(other).keys() or contents(one) != contents(other)


def test_an_existing_folder_is_kept_or_refused(tmp_path):
    folder = write_small(tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert write_small(folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(WorkbenchError, match=r"holds the made-up data set of .*choose another folder"):
        write_small(folder, seed=5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(WorkbenchError, match="holds something else"):
        write_small(tmp_path / "other")
    assert (tmp_path / "other" / "mine.txt").read_text() == "mine"
    with pytest.raises(WorkbenchError, match="at least 10 patients"):
        write_small(tmp_path / "few", patients=2)


@pytest.mark.parametrize("mark", ["{", "[" * 100_000, "9" * 5000])
def test_a_folder_whose_mark_cannot_be_read_is_left_alone(tmp_path, mark):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "synthetic.json").write_text(mark)
    with pytest.raises(WorkbenchError, match="holds something else"):
        write_small(tmp_path / "set")
    assert (tmp_path / "set" / "synthetic.json").read_text() == mark


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    drawn = []

    def break_off(*args, **kwargs):
        drawn.append(1)
        if len(drawn) > 5:
            raise KeyboardInterrupt
        return np.zeros((32, 32), np.uint8), []

    monkeypatch.setattr(synthetic, "draw_radiograph", break_off)
    with pytest.raises(KeyboardInterrupt):
        write_small(tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == [".set.lock"]
