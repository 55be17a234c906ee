"""Test-time augmentation: the views are what they are called, and ranks average what one would by hand."""

from dataclasses import replace

import keras
import numpy as np
import pandas as pd
import pytest

from workbench import WorkbenchError
from workbench.data import chestxray14, shards
from workbench.training import augmented, network


@pytest.fixture
def trained(tiny_config, new_run):
    """A run with a model (random weights will do), and the model."""
    folder = new_run()
    keras.utils.set_random_seed(0)
    model = network.build_network("Tiny", findings=14, image_size=tiny_config.image_size, weights=None)
    network.write_network(model, folder / "model.keras", findings=chestxray14.FINDINGS, stored_size=36, encoding="raw")
    return folder, model


def test_ten_views_are_four_corners_and_the_centre_and_their_mirror_images():
    stored = np.arange(2 * 6 * 6, dtype=np.uint8).reshape(2, 6, 6, 1)
    views = [np.asarray(view) for view in augmented.cut_views(stored, "ten-crop", image_size=4)]
    assert len(views) == 10
    corners = [(1, 1), (0, 0), (0, 2), (2, 0), (2, 2)]
    for view, mirrored, (top, left) in zip(views[:5], views[5:], corners, strict=True):
        np.testing.assert_array_equal(view, stored[:, top : top + 4, left : left + 4])
        np.testing.assert_array_equal(mirrored, view[:, :, ::-1])


def test_a_flip_is_the_centre_and_its_mirror_image():
    stored = np.arange(36, dtype=np.uint8).reshape(1, 6, 6, 1)
    centre, mirrored = augmented.cut_views(stored, "flip", image_size=4)
    np.testing.assert_array_equal(centre, stored[:, 1:5, 1:5])
    np.testing.assert_array_equal(mirrored[0, :, :, 0], np.fliplr(stored[0, 1:5, 1:5, 0]))


@pytest.mark.mpi
@pytest.mark.parametrize("kind", augmented.KINDS)
def test_two_ranks_average_what_one_would_by_hand(ranks, kind, trained, tiny_config, shard_folder):
    folder, model = trained
    config = replace(tiny_config, batch_size=5)
    told = ranks(2).run("workbench.training.augmented.predict_augmented", config, folder, "test", kind)
    rows = shards.read_images(shard_folder).query("split == 'test'")
    images = shards.read_radiographs(shard_folder, list(rows["image"]))
    # 32 of 36 pixels: corners begin at 0 or 4, the centre at 2.
    places = [(2, 2)] if kind == "flip" else [(2, 2), (0, 0), (0, 4), (4, 0), (4, 4)]
    crops = [images[:, top : top + 32, left : left + 32, None] for top, left in places]
    expected = np.mean([model(view).numpy() for crop in crops for view in (crop, np.flip(crop, 2))], axis=0)
    table = pd.read_csv(folder / f"predictions-test-{kind}.csv").set_index("image").loc[rows["image"]]
    findings = shards.read_info(shard_folder)["findings"]
    np.testing.assert_allclose(table[[f"{name}_score" for name in findings]], expected, atol=1e-5)
    np.testing.assert_array_equal(table[findings], rows[findings])
    assert [part["images"] for part in told] == [len(rows)] * 2
    assert told[0]["views"] == 2 * len(places)
    assert told[0]["mean_auroc"] == told[1]["mean_auroc"]
    plain = model(crops[0]).numpy()
    assert np.abs(plain - expected).max() > 1e-4, "the test needs views that score differently"


def test_ten_crops_without_a_margin_are_a_sentence(trained, tiny_config):
    folder, _ = trained
    said = r"hold images of 36 pixels, no larger than the network's 36, so all crops are the same: .* choose flip"
    with pytest.raises(WorkbenchError, match=said):
        augmented.predict_augmented(replace(tiny_config, image_size=36), folder, "test", "ten-crop")


def test_an_unknown_kind_is_a_sentence(trained, tiny_config):
    with pytest.raises(WorkbenchError, match="There is no test-time augmentation `mirror`: choose one of flip, ten-cr"):
        augmented.predict_augmented(tiny_config, trained[0], "test", "mirror")
