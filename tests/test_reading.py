"""Files are read as in training: the same scores as the run's predictions; what cannot be read is named."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from odd_images import READ, REFUSED, write_odd_images
from PIL import Image

from workbench import WorkbenchError
from workbench.analysis import predictions
from workbench.data import chestxray14, radiographs, shards
from workbench.training import network, reading, trainer


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
def test_scores_equal_the_run_s_predictions(dataset, tiny_config, new_run, tmp_path, encoding):
    frame = chestxray14.read_dataset(dataset)
    shards.write_shards(frame, tmp_path / "stored", image_size=36, encoding=encoding, processes=1, progress=False)
    config = dataclasses.replace(tiny_config, shard_folder=str(tmp_path / "stored"), epochs=1)
    folder = new_run()
    trainer.train(config, folder)
    told = pd.read_csv(folder / "predictions-test.csv").head(20).set_index("image")
    files = frame.set_index("image").loc[told.index, "path"]
    answer = reading.read_files(folder, list(files), batch_size=7, heat_maps=True)
    assert answer["refused"] == {}
    assert list(answer["scores"].index) == list(files)
    for name in answer["scores"]:
        np.testing.assert_allclose(answer["scores"][name], told[f"{name}_score"], atol=1e-5)
    assert told.filter(like="_score").std().min() > 1e-4, "the test needs scores that differ"
    assert answer["radiographs"].shape == (20, 32, 32)
    assert answer["maps"].shape[0] == len(answer["mapped"]) == 20


@pytest.fixture
def run(tiny_config, new_run):
    folder = new_run()
    model = network.build_network("Tiny", findings=2, image_size=32, weights=None)
    told = {"findings": ["Pneumonia", "Pneumothorax"], "stored_size": 36, "encoding": "raw"}
    network.write_network(model, folder / "model.keras", **told)
    return folder


def test_files_that_cannot_be_read_are_named_and_the_others_read(run, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (50, 40), np.uint8)
    Image.fromarray(grey).save(tmp_path / "good.png")
    Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "grey-in-rgb.jpg")
    colour = np.zeros((50, 40, 3), np.uint8)
    colour[..., 0] = 200
    Image.fromarray(colour).save(tmp_path / "cat.jpg")
    (tmp_path / "text.png").write_text("no image")
    names = ["good.png", "cat.jpg", "text.png", "none.dcm", "grey-in-rgb.jpg"]
    answer = reading.read_files(run, [tmp_path / name for name in names])
    assert [path.rsplit("/", 1)[1] for path in answer["scores"].index] == ["good.png", "grey-in-rgb.jpg"]
    refused = {path.rsplit("/", 1)[1]: why for path, why in answer["refused"].items()}
    assert "picture in colour" in refused["cat.jpg"]
    assert "cannot be decoded" in refused["text.png"]
    assert "does not exist" in refused["none.dcm"]


@pytest.mark.timeout(60)
def test_a_folder_of_odd_files_is_read_as_far_as_it_can_be_and_the_rest_named(run, tmp_path):
    write_odd_images(tmp_path / "odd")
    answer = reading.read_files(run, predictions.find_files([tmp_path / "odd"]))
    assert sorted(path.rsplit("/", 1)[1] for path in answer["scores"].index) == sorted(READ)
    assert np.isfinite(answer["scores"].to_numpy()).all()
    assert {path.rsplit("/", 1)[1] for path in answer["refused"]} == REFUSED.keys() - {"gone.png"}
    assert all(why.startswith(f"`{path}` ") for path, why in answer["refused"].items())


def test_no_file_at_all(run):
    answer = reading.read_files(run, [], heat_maps=True)
    assert answer["scores"].shape == (0, 2)


def test_exchanged_findings_of_a_model_are_caught(run):
    """What happened to Pneumonia and Pneumothorax in a published table."""
    with pytest.raises(WorkbenchError, match="but asked for were Pneumothorax, Pneumonia"):
        network.read_network(run / "model.keras", findings=["Pneumothorax", "Pneumonia"], image_size=32)
    assert list(reading.read_files(run, [])["scores"].columns) == ["Pneumonia", "Pneumothorax"]


def test_originals_that_are_grey_in_four_channels_pass(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (50, 40), np.uint8)
    Image.fromarray(np.dstack([grey, grey, grey, np.full_like(grey, 255)])).save(tmp_path / "rgba.png")
    radiographs.refuse_colour(tmp_path / "rgba.png")
