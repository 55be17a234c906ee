"""The network: what goes in, what comes out, and that what is saved is plain Keras."""

import json
import sys
import types
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

from workbench import WorkbenchError
from workbench.training import fast, network
from workbench.training.config import PRECISIONS


@pytest.fixture
def radiographs():
    return np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), np.uint8)


@pytest.mark.parametrize("name", ["DenseNet121", "ResNet50", "VGG16", "MobileNetV2", "Tiny"])
def test_uint8_in_probabilities_out(name, radiographs):
    model = network.build_network(name, findings=3, image_size=32, weights=None)
    assert model.input_shape == (None, 32, 32, 1)
    assert model.inputs[0].dtype == "uint8"
    scores = model(radiographs).numpy()
    assert scores.shape == (4, 3)
    assert ((scores > 0) & (scores < 1)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_is_that_of_the_layers_and_the_scores_stay_float32(precision, radiographs):
    model = network.build_network("Tiny", findings=2, image_size=32, weights=None, precision=precision)
    assert (
        next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)).dtype_policy.name == precision
    )
    assert model(radiographs).dtype == tf.float32
    assert all(v.dtype == "float32" for v in model.trainable_variables)
    assert keras.config.dtype_policy().name == "float32"


def test_what_is_saved_is_plain_keras_and_scores_alike(tmp_path, radiographs):
    model = network.build_network("Tiny", findings=3, image_size=32, weights=None)
    compute = fast.forward(model)
    for _ in range(3):
        compute(radiographs, training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    assert {type(layer).__module__.split(".")[0] for layer in loaded.layers} == {"keras"}
    np.testing.assert_allclose(loaded(radiographs), compute(radiographs), atol=1e-6)


def test_weights_come_from_a_local_file(tmp_path, radiographs):
    model = network.build_network("Tiny", findings=3, image_size=32, weights=None)
    model.save(tmp_path / "model.keras")
    again = network.build_network("Tiny", findings=3, image_size=32, weights=str(tmp_path / "model.keras"))
    np.testing.assert_array_equal(again(radiographs), model(radiographs))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "AlexNet"}, "no network `AlexNet`: choose one of DenseNet121"),
        ({"precision": "int8"}, "no precision `int8`"),
        ({"image_size": 16}, "`image_size` 16 is too small"),
        ({"weights": "imagenet"}, "no ImageNet weights for Tiny"),
        ({"weights": "nowhere.keras"}, "nowhere.keras does not exist"),
    ],
)
def test_bad_settings_are_one_sentence(settings, said):
    chosen = {"name": "Tiny", "findings": 2, "image_size": 32, "weights": None} | settings
    with pytest.raises(WorkbenchError, match=said):
        network.build_network(chosen.pop("name"), **chosen)


def test_imagenet_weights_that_cannot_be_fetched_are_a_sentence(monkeypatch):
    def offline(*_, **__):
        raise Exception("URL fetch failure on https://example.org/weights.h5: None -- timed out")  # as Keras does

    for module in [name for name in sys.modules if name.endswith("applications.vgg16")]:
        monkeypatch.setattr(sys.modules[module], "file_utils", types.SimpleNamespace(get_file=offline), raising=False)
    said = r"The ImageNet weights of VGG16 cannot be had \(URL fetch failure.*\): go online once"
    with pytest.raises(WorkbenchError, match=said):
        network.build_network("VGG16", findings=2, image_size=32, weights="imagenet")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    model = network.build_network("Tiny", findings=3, image_size=32, weights=None)
    model.save(tmp_path / "model.keras")
    with pytest.raises(WorkbenchError, match=r"do not fit Tiny with 5 findings"):
        network.build_network("Tiny", findings=5, image_size=32, weights=str(tmp_path / "model.keras"))
    (tmp_path / "broken.keras").write_bytes(b"not a model")
    with pytest.raises(WorkbenchError, match=r"broken\.keras do not fit"):
        network.build_network("Tiny", findings=5, image_size=32, weights=str(tmp_path / "broken.keras"))


@pytest.mark.parametrize(
    "told",
    [
        "null",
        "{",
        {"findings": "Mass"},
        {"findings": [3]},
        {"image_size": "64"},
        {"stored_size": 10**30},
        {"stored_size": 8},
        {"encoding": None},
    ],
)
def test_a_model_with_a_wrong_description_is_named(tmp_path, told):
    path = tmp_path / "model.keras"
    whole = {"findings": ["Mass"], "image_size": 64, "stored_size": 72, "encoding": "raw"}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("workbench.json", told if isinstance(told, str) else json.dumps(whole | told))
    with pytest.raises(WorkbenchError, match=r"model\.keras cannot be read"):
        network.describe_network(path)


@pytest.mark.parametrize("member", ["config.json", "model.weights.h5", "metadata.json"])
def test_a_model_with_a_broken_member_is_named(tmp_path, member):
    path, findings = tmp_path / "model.keras", ["Mass"]
    model = network.build_network("Tiny", findings=1, image_size=32, weights=None)
    network.write_network(model, path, findings=findings, stored_size=32, encoding="raw")
    with zipfile.ZipFile(path) as file:
        at = file.getinfo(member).header_offset
    encoded = bytearray(path.read_bytes())
    encoded[at : at + 4] = b"PK\0\0"  # where zipfile has an error of its own
    path.write_bytes(encoded)
    with pytest.raises(WorkbenchError, match=r"model\.keras cannot be read"):
        network.read_network(path, findings=findings, image_size=32)
    with pytest.raises(WorkbenchError, match=r"The weights in .*model\.keras do not fit"):
        network.build_network("Tiny", findings=1, image_size=32, weights=str(path))
