"""Heat maps against boxes: worked by hand, in the right pixels, and on the real boxes."""

import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage, stats

from workbench import WorkbenchError
from workbench.analysis import localisation, resampling
from workbench.data import chestxray14, radiographs
from workbench.data.pipeline import crop_centre

NIH = Path(__file__).resolve().parents[1].parent / "shared" / "nih"


def boxes_of(*rows):
    return pd.DataFrame(rows, columns=["image", "finding", "x", "y", "width", "height"])


def heat_of(*rows, image_size=8, stored_size=8):
    table = pd.DataFrame([(image, finding, 0.5) for image, finding, _ in rows], columns=["image", "finding", "score"])
    maps = np.array([heat for *_, heat in rows], np.float32)
    return localisation.HeatMaps(table, maps, image_size, stored_size)


def spot(*cells, shape=(8, 8)):
    heat = np.zeros(shape, np.float32)
    for row, column, value in cells:
        heat[row, column] = value
    return heat


def test_boxes_are_scaled_and_cropped_as_the_radiographs_are():
    boxes = boxes_of(("a", "Mass", 256, 512, 128, 64), ("b", "Mass", 0, 900, 100, 124), ("c", "Mass", 0, 0, 60, 600))
    scaled = localisation.scale_boxes(boxes, stored_size=256, image_size=224)
    # A quarter of the size, then 16 pixels less at the left and the top.
    assert scaled.iloc[0, 2:].tolist() == [48, 112, 32, 16]
    assert scaled.iloc[1, 2:].tolist() == [0, 209, 9, 15]  # cut off at the left and below
    assert scaled.iloc[2, 2:].tolist() == [0, 0, 0, 134]  # outside, at the left
    assert scaled[["image", "finding"]].equals(boxes[["image", "finding"]])
    same = localisation.scale_boxes(boxes, stored_size=1024, image_size=1024)
    pd.testing.assert_frame_equal(same, boxes, check_dtype=False)


@pytest.mark.parametrize(("stored", "seen"), [(256, 224), (72, 64), (71, 64), (64, 64)])
def test_a_box_stays_on_its_pixels(stored, seen):
    """A bright rectangle, resized and cropped by the functions that make the batches, against its scaled box."""
    original = np.zeros((1024, 1024), np.uint8)
    original[320:640, 448:704] = 255
    resized = radiographs.resize_radiograph(original, stored)[None]
    bright = crop_centre(resized, image_size=seen)[0, ..., 0] > 127
    box = localisation.scale_boxes(
        boxes_of(("a", "Mass", 448, 320, 256, 320)), stored_size=stored, image_size=seen
    ).iloc[0]
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    measured = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    np.testing.assert_allclose(box[2:].to_numpy(float), measured, atol=1)


def test_a_crop_larger_than_what_is_stored_is_a_sentence():
    with pytest.raises(WorkbenchError, match=r"image_size=64 of stored_size=36: expected a crop that fits inside"):
        localisation.scale_boxes(boxes_of(), stored_size=36, image_size=64)


@pytest.mark.parametrize(("shape", "size"), [((7, 7), 224), ((2, 2), 64), ((5, 3), 30), ((8, 8), 8), ((1, 1), 6)])
def test_enlarging_is_scipy_s(shape, size):
    maps = np.random.default_rng(0).random((3, *shape))
    zoom = (size / shape[0], size / shape[1])
    expected = [ndimage.zoom(heat, zoom, order=1, mode="nearest", grid_mode=True) for heat in maps]
    np.testing.assert_allclose(localisation.upsample(maps, size), expected, atol=1e-6)


def test_the_hottest_point_is_the_centre_of_its_cell():
    assert localisation.hottest_point(spot((2, 5, 1.0)), image_size=64) == (44, 20)
    # At the edge too, where an enlargement has its maximum on a whole strip.
    assert localisation.hottest_point(spot((0, 0, 1.0)), image_size=64) == (4, 4)
    assert localisation.hottest_point(spot((1, 0, 1.0), shape=(2, 4)), image_size=64) == (8, 48)
    assert localisation.hottest_point(spot(), image_size=64) is None


def test_boxes_are_put_round_each_region_at_each_cut():
    heat = spot((1, 1, 1.0), (1, 2, 0.5), (5, 6, 0.3), (6, 5, 0.3))
    found = localisation.detect_boxes(heat, image_size=8)
    # At 60 of 255 three regions, since corners do not join; at 180 of 255 the hottest cell.
    assert sorted(map(tuple, found)) == [(1, 1, 1, 1), (1, 1, 2, 1), (5, 6, 1, 1), (6, 5, 1, 1)]
    # A region that is alike at both cuts is one detection.
    assert len(localisation.detect_boxes(spot((3, 3, 1.0)), image_size=8)) == 1
    assert localisation.detect_boxes(spot(), image_size=8).shape == (0, 4)


def test_iobb_divides_by_the_detected_area():
    detected = [(0, 0, 4, 4), (2, 2, 2, 2), (6, 6, 2, 2)]
    drawn = [(2, 2, 4, 4), (0, 0, 8, 8)]
    np.testing.assert_allclose(localisation.iobb(detected, drawn), [[4 / 16, 1], [1, 1], [0, 1]])


def test_a_table_worked_by_hand():
    heat = heat_of(
        ("a", "Mass", spot((2, 2, 1.0))),  # in its box
        ("b", "Mass", spot((0, 7, 1.0), (4, 4, 0.3), (4, 5, 0.3))),  # hottest outside; a cooler region half inside
        ("c", "Mass", spot()),  # nothing found
        ("a", "Nodule", spot((6, 1, 1.0))),  # two boxes, one of them hit
        ("d", "Nodule", spot((6, 1, 1.0))),  # no box: passed over
    )
    boxes = boxes_of(
        ("a", "Mass", 1, 1, 4, 4),
        ("b", "Mass", 3, 3, 2, 2),
        ("c", "Mass", 0, 0, 8, 8),
        ("a", "Nodule", 0, 0, 2, 2),
        ("a", "Nodule", 1, 5, 2, 3),
        ("e", "Hernia", 1, 5, 2, 3),  # no map
    )
    table = localisation.localisation_table(heat, boxes)
    assert list(table.index) == ["Mass", "Nodule"]
    mass, nodule = table.loc["Mass"], table.loc["Nodule"]
    assert (mass["boxes"], mass["images"], nodule["boxes"], nodule["images"]) == (3, 3, 2, 1)
    assert mass["pointing"] == pytest.approx(1 / 3)
    assert nodule["pointing"] == 1
    assert (mass["blank"], nodule["blank"]) == (pytest.approx(1 / 3), 0)
    assert mass["chance"] == pytest.approx((16 / 64 + 4 / 64 + 1) / 3)
    assert nodule["chance"] == pytest.approx((4 + 6) / 64)
    assert mass["iobb_0.5"] == pytest.approx(2 / 3)  # a's, and b's half
    assert mass["iobb_0.75"] == pytest.approx(1 / 3)
    assert mass["false_positives_0.5"] == pytest.approx(1 / 3)  # b's hottest
    assert mass["false_positives_0.75"] == pytest.approx(2 / 3)
    assert nodule["iobb_0.1"] == 0.5
    assert nodule["false_positives_0.1"] == 0
    assert table.attrs["boxes_without_map"] == 1


def test_tolerance_widens_the_boxes_and_the_chance():
    heat, boxes = heat_of(("a", "Mass", spot((0, 0, 1.0)))), boxes_of(("a", "Mass", 2, 2, 2, 2))
    strict = localisation.localisation_table(heat, boxes).loc["Mass"]
    wide = localisation.localisation_table(heat, boxes, tolerance=1.5).loc["Mass"]
    assert (strict["pointing"], wide["pointing"]) == (0, 1)
    assert (strict["chance"], wide["chance"]) == (4 / 64, 36 / 64)  # centres of pixels from 0.5 to 5.5


def test_a_box_outside_the_crop_is_a_miss():
    boxes = localisation.scale_boxes(boxes_of(("a", "Mass", 0, 0, 60, 600)), stored_size=256, image_size=224)
    table = localisation.localisation_table(heat_of(("a", "Mass", spot((0, 0, 1.0))), image_size=224), boxes)
    row = table.loc["Mass"]
    assert (row["boxes"], row["pointing"], row["chance"], row["iobb_0.1"]) == (1, 0, 0, 0)


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (5, 5), (3, 10), (81, 263)])
def test_wilson_s_interval_is_scipy_s(successes, trials):
    expected = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    np.testing.assert_allclose(resampling.wilson_interval(successes, trials), expected, atol=1e-6)


def test_random_pointing_hits_by_chance():
    """The chance level is what it says: 4,000 maps that are hot anywhere."""
    generator = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(4000)]
    heat = heat_of(*((name, "Mass", spot((*generator.integers(8, size=2), 1.0))) for name in names))
    corners = generator.integers(0, 5, (4000, 2))
    boxes = pd.DataFrame(corners, columns=["x", "y"]).assign(image=names, finding="Mass", width=3, height=4)
    row = localisation.localisation_table(heat, boxes).loc["Mass"]
    assert row["chance"] == pytest.approx(12 / 64)
    assert row["pointing_low"] < row["chance"] < row["pointing_high"]


def test_what_cannot_be_scored_is_a_sentence(tmp_path):
    heat = heat_of(("a", "Mass", spot()))
    with pytest.raises(WorkbenchError, match="None of the 1 boxes has a heat map among 1"):
        localisation.localisation_table(heat, boxes_of(("a", "Nodule", 1, 1, 1, 1)))
    with pytest.raises(WorkbenchError, match="There are no heat maps at"):
        localisation.read_heat_maps(tmp_path / "heatmaps.npz")
    (tmp_path / "heatmaps.npz").write_bytes(b"PK not a file of maps")
    with pytest.raises(WorkbenchError, match="is not a file of heat maps"):
        localisation.read_heat_maps(tmp_path / "heatmaps.npz")
    np.savez(tmp_path / "heatmaps.npz", images=np.array([{}], dtype=object))
    with pytest.raises(WorkbenchError, match="is not a file of heat maps"):
        localisation.read_heat_maps(tmp_path / "heatmaps.npz")


@pytest.mark.nih
def test_the_real_boxes_on_real_radiographs(tmp_path):
    """Every real radiograph that has a box, through shards, a network and Grad-CAM to the table."""
    if not NIH.is_dir():
        pytest.skip(f"no sample of real radiographs at {NIH}")
    import keras

    from workbench.data import shards
    from workbench.training import gradcam, network
    from workbench.training.config import TrainConfig

    frame = chestxray14.read_dataset(NIH, images_folder=NIH / "images_256", missing="skip")
    boxes = chestxray14.read_boxes(NIH)
    boxes = boxes[boxes["image"].isin(frame["image"])]
    frame = frame[frame["image"].isin(boxes["image"])].reset_index(drop=True)
    shards.write_shards(frame, tmp_path / "shards", image_size=256, processes=1, progress=False)
    keras.utils.set_random_seed(0)
    model = network.build_network("Tiny", findings=14, image_size=224, weights=None)
    findings = list(chestxray14.FINDINGS)
    network.write_network(model, tmp_path / "model.keras", findings=findings, stored_size=256, encoding="raw")
    config = TrainConfig(shard_folder=str(tmp_path / "shards"), network="Tiny", weights="none", image_size=224)
    gradcam.write_heat_maps(config, tmp_path, boxes[["image", "finding"]].to_numpy().tolist())
    heat = localisation.read_heat_maps(tmp_path / "heatmaps.npz")
    assert (heat.image_size, heat.stored_size, heat.maps.shape[1:]) == (224, 256, (14, 14))
    seen = localisation.scale_boxes(boxes, stored_size=heat.stored_size, image_size=heat.image_size)
    # The boxes of the heart straddle the middle of the chest, a little to the image's right.
    hearts = seen[seen["finding"] == "Cardiomegaly"]
    middle = hearts["x"] + hearts["width"] / 2
    assert middle.between(90, 150).all()
    assert (hearts["y"] + hearts["height"] / 2).median() > 112
    table = localisation.localisation_table(heat, seen)
    assert table["boxes"].sum() == len(boxes) > 20
    assert table["images"].sum() == len(heat.table) <= len(boxes)
    assert table.drop(columns=["boxes", "images"]).notna().all(axis=None)
    assert (table["chance"] > 0).all()
    assert (table["pointing_low"] <= table["pointing"]).all()
    falling = table[[f"iobb_{overlap:g}" for overlap in localisation.OVERLAPS]]
    assert (falling.diff(axis=1).iloc[:, 1:] <= 0).all(axis=None)


@pytest.mark.parametrize("wrong", ["shape", "number", "size", "header"])
def test_a_damaged_file_of_heat_maps_is_named(tmp_path, wrong):
    path = tmp_path / "heatmaps.npz"
    held = {"maps": np.ones((2, 4, 4), np.float32), "images": np.array(["a", "b"]), "findings": np.array(["Mass"] * 2)}
    held |= {"scores": np.array([0.1, 0.2]), "image_size": np.array(8), "stored_size": np.array(8)}
    if wrong == "shape":
        held["maps"] = held["maps"][:1]
    if wrong == "number":
        held["maps"][0, 0, 0] = np.nan
    if wrong == "size":
        held["image_size"] = np.array([8, 8])
    np.savez(path, **held, rectified=np.array(True))
    if wrong == "header":  # numpy reads it as Python source, whose tokenizer has an error of its own
        with zipfile.ZipFile(path) as file:
            members = {name: file.read(name) for name in file.namelist()}
        members["maps.npy"] = members["maps.npy"].replace(b"(2, 4, 4), }", b"(2, 4, 4(, }")
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
    with pytest.raises(WorkbenchError, match=r"heatmaps\.npz is not a file of heat maps"):
        localisation.read_heat_maps(path)
