"""Heat maps: equal to their closed form, in every network and precision, and the same from any number of ranks."""

import keras
import numpy as np
import pytest

from workbench import WorkbenchError
from workbench.data import chestxray14, shards
from workbench.training import gradcam, network


@pytest.fixture(scope="module")
def radiographs():
    return np.random.default_rng(0).integers(0, 256, (5, 64, 64, 1), np.uint8)


def class_activation_maps(model, radiographs, columns):
    """Zhou et al. 2016: the features weighted by the dense layer, which Grad-CAM is if pooling is an average."""
    last = [layer for layer in model.layers if len(layer.output.shape) == 4][-1]
    features = np.asarray(keras.Model(model.inputs[0], last.output)(radiographs), np.float64)
    maps = np.einsum("nijc,cn->nij", features, np.asarray(model.layers[-1].kernel)[:, columns]).clip(0)
    top = maps.max(axis=(1, 2), keepdims=True)
    return maps / np.where(top > 0, top, 1)


# One of each family: the others have the same layers more often.
@pytest.mark.parametrize("name", ["DenseNet121", "ResNet50", "VGG16", "MobileNetV2", "Tiny"])
def test_every_network_s_map_is_its_class_activation_map(name, radiographs):
    keras.utils.set_random_seed(1)
    model = network.build_network(name, findings=3, image_size=64, weights=None)
    columns = [0, 1, 2, 0, 1]
    maps, scores = gradcam.explain(model, radiographs, columns, batch_size=2)
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, class_activation_maps(model, radiographs, columns), atol=1e-3)
    assert maps.max() == 1, "the test needs a finding that something speaks for"
    np.testing.assert_allclose(scores, model(radiographs).numpy()[range(5), columns], atol=1e-5)


@pytest.mark.parametrize(("name", "precision"), [("DenseNet121", "mixed_bfloat16"), ("ResNet50", "mixed_float16")])
def test_mixed_precision_is_close_to_float32(name, precision, radiographs):
    keras.utils.set_random_seed(0)
    exact = network.build_network(name, findings=3, image_size=64, weights=None)
    mixed = network.build_network(name, findings=3, image_size=64, weights=None, precision=precision)
    mixed.set_weights(exact.get_weights())
    columns = [2, 1, 0, 2, 1]
    maps = gradcam.heat_maps(mixed, radiographs, columns)
    assert maps.dtype == np.float32
    assert maps.any(axis=(1, 2)).sum() > 1
    np.testing.assert_allclose(maps, gradcam.heat_maps(exact, radiographs, columns), atol=0.05)


def test_small_gradients_do_not_vanish_in_float16():
    """A weight of 1e-4 spread over 64 × 64 places is below float16's range; the map must not turn to zero."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        inputs = keras.Input((64, 64, 1), dtype="uint8")
        x = keras.layers.Conv2D(2, 1, use_bias=False, kernel_initializer="ones")(
            keras.layers.Rescaling(1 / 255)(inputs)
        )
        x = keras.layers.GlobalAveragePooling2D()(x)
        weight = keras.initializers.Constant(1e-4)
        outputs = keras.layers.Dense(1, "sigmoid", kernel_initializer=weight, dtype="float32")(x)
    finally:
        keras.config.set_dtype_policy("float32")
    image = np.arange(64 * 64, dtype=np.uint8).reshape(1, 64, 64, 1)
    np.testing.assert_allclose(
        gradcam.heat_maps(keras.Model(inputs, outputs), image, [0])[0], image[0, ..., 0] / 255, atol=1e-3
    )


def planted(*, nested: bool = False, activation: str = "sigmoid", bias: float = 0.0, flat: bool = False):
    """A network whose first finding is a bright patch, the second a dark one, in squares of 8 pixels."""
    inputs = keras.Input((64, 64, 1), dtype="uint8")
    grey = keras.layers.Rescaling(1 / 255)(inputs)
    inner = keras.Input((64, 64, 1))
    squares = keras.layers.Conv2D(
        2, 8, strides=8, activation="relu", kernel_initializer="ones", bias_initializer=keras.initializers.Constant(-32)
    )
    pool = keras.layers.Flatten() if flat else keras.layers.GlobalAveragePooling2D()
    network_inside = keras.Model(inner, pool(squares(inner)))
    x = network_inside(grey) if nested else pool(squares(grey))
    head = keras.layers.Dense(2, activation, bias_initializer=keras.initializers.Constant(bias))
    outputs = head(keras.layers.Dropout(0.5)(x))
    if activation != "sigmoid":
        outputs = keras.layers.Activation("sigmoid")(outputs)
    head.kernel.assign(np.tile([[1.0, -1.0]], (head.kernel.shape[0], 1)))
    return keras.Model(inputs, outputs)


KINDS = [
    {},
    {"nested": True},
    {"activation": "linear"},
    {"bias": 200.0},
    {"flat": True},
    {"flat": True, "nested": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_map_is_hot_where_the_pattern_is(kind):
    image = np.full((2, 64, 64, 1), 60, np.uint8)
    image[0, 40:48, 16:24] = 255
    image[1, 8:24, 48:56] = 200
    model = planted(**kind)
    calls = [len(layer._inbound_nodes) for layer in model.layers]
    maps = gradcam.heat_maps(model, image, [0, 0])
    expected = np.zeros((2, 8, 8))
    expected[0, 5, 2] = expected[1, 1:3, 6] = 1
    np.testing.assert_allclose(maps, expected, atol=1e-6)
    # Nothing speaks for darkness here: bright patches speak against it, and the rest is silent.
    assert not gradcam.heat_maps(model, image, [1, 1]).any()
    # Looking leaves the model as it was.
    assert model(image).shape == (2, 2)
    assert [len(layer._inbound_nodes) for layer in model.layers] == calls


def test_without_the_rectifier_a_map_says_where_least_speaks_against():
    image = np.full((1, 64, 64, 1), 60, np.uint8)
    image[0, 40:48, 16:24] = 255
    cold = gradcam.heat_maps(planted(), image, [1], rectify=False)[0]
    assert cold[5, 2] == 0
    assert np.delete(cold.ravel(), 5 * 8 + 2).min() == 1
    hot = gradcam.heat_maps(planted(), image, [0], rectify=False)[0]
    np.testing.assert_allclose(hot, 1 - cold, atol=1e-6)
    # Where all places are alike there is nothing to show.
    assert not gradcam.heat_maps(planted(), image[:, :1, :1].repeat(64, 1).repeat(64, 2), [0], rectify=False).any()


def test_a_network_that_is_a_layer_before_the_pooling(radiographs):
    inner = keras.Sequential([keras.Input((64, 64, 1)), keras.layers.Conv2D(4, 3, strides=4, activation="relu")])
    inputs = keras.Input((64, 64, 1), dtype="uint8")
    tail = keras.Sequential([keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)])
    outputs = keras.layers.Activation("sigmoid")(tail(inner(keras.layers.Rescaling(1 / 255)(inputs))))
    maps = gradcam.heat_maps(keras.Model(inputs, outputs), radiographs, [0, 1, 2, 0, 1])
    features = np.asarray(inner(radiographs / 255.0), np.float64)
    expected = np.einsum("nijc,cn->nij", features, np.asarray(tail.layers[-1].kernel)[:, [0, 1, 2, 0, 1]]).clip(0)
    np.testing.assert_allclose(maps, expected / np.maximum(expected.max((1, 2), keepdims=True), 1e-12), atol=1e-4)


def test_a_saved_and_loaded_model_gives_the_same_maps(tmp_path, radiographs):
    model = network.build_network("Tiny", findings=3, image_size=64, weights=None, precision="mixed_bfloat16")
    kept = {"findings": ["a", "b", "c"], "stored_size": 72, "encoding": "raw"}
    network.write_network(model, tmp_path / "model.keras", **kept)
    loaded = network.read_network(tmp_path / "model.keras", findings=["a", "b", "c"], image_size=64)
    columns = [0, 1, 2, 2, 1]
    np.testing.assert_array_equal(
        gradcam.heat_maps(loaded, radiographs, columns), gradcam.heat_maps(model, radiographs, columns)
    )


def test_no_radiographs_are_no_maps(radiographs):
    model = network.build_network("Tiny", findings=3, image_size=64, weights=None)
    assert gradcam.heat_maps(model, radiographs[:0], []).shape == (0, 4, 4)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda x: keras.layers.Dense(2)(keras.layers.Flatten()(x)),
        lambda x: keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(2, 3)(x)),
        lambda x: keras.layers.Dense(2)(
            keras.layers.Concatenate()([keras.layers.GlobalMaxPooling2D()(x), keras.layers.Flatten()(x)])
        ),
    ],
    ids=["no feature map", "no dense layer", "forked"],
)
def test_a_model_without_grad_cam_is_a_sentence(outputs):
    inputs = keras.Input((8, 8, 1))
    with pytest.raises(WorkbenchError, match="no feature map followed by pooling and a dense layer"):
        gradcam.heat_maps(keras.Model(inputs, outputs(inputs)), np.zeros((1, 8, 8, 1)), [0])


@pytest.mark.parametrize("columns", [[0, 1, 2, 3, 0], [0, -1, 0, 0, 0], [0, 1]])
def test_columns_that_do_not_fit_are_a_sentence(radiographs, columns):
    model = network.build_network("Tiny", findings=3, image_size=64, weights=None)
    with pytest.raises(WorkbenchError, match=r"do not fit 5 radiographs and a model of 3 findings"):
        gradcam.heat_maps(model, radiographs, columns)


def test_a_trained_model_that_does_not_fit_is_a_sentence(tmp_path):
    with pytest.raises(WorkbenchError, match="There is no trained model at"):
        network.read_network(tmp_path / "model.keras", findings=["Mass"], image_size=64)
    model = network.build_network("Tiny", findings=3, image_size=64, weights=None)
    model.save(tmp_path / "model.keras")
    with pytest.raises(WorkbenchError, match="does not say what it finds"):
        network.read_network(tmp_path / "model.keras", findings=["a", "b", "c"], image_size=64)
    kept = {"findings": ["a", "b", "c"], "stored_size": 72, "encoding": "raw"}
    network.write_network(model, tmp_path / "model.keras", **kept)
    assert network.describe_network(tmp_path / "model.keras") == kept | {"image_size": 64}
    with pytest.raises(WorkbenchError, match="finds a, b, c, but asked for were b, a, c"):
        network.read_network(tmp_path / "model.keras", findings=["b", "a", "c"], image_size=64)
    with pytest.raises(WorkbenchError, match="finds a, b, c, but asked for were Mass"):
        network.read_network(tmp_path / "model.keras", findings=["Mass"], image_size=64)
    with pytest.raises(WorkbenchError, match=r"asked for were 32 pixels"):
        network.read_network(tmp_path / "model.keras", findings=["a", "b", "c"], image_size=32)
    (tmp_path / "model.keras").write_bytes(b"not a model")
    with pytest.raises(WorkbenchError, match=r"model\.keras cannot be read"):
        network.read_network(tmp_path / "model.keras", findings=["Mass"], image_size=64)


@pytest.fixture(scope="module")
def requests(shard_folder):
    """Nine pairs from all splits, one image twice, one pair repeated, in no order."""
    images = shards.read_images(shard_folder)["image"]
    chosen = images.sample(8, random_state=1).tolist()
    pairs = [(image, ["Mass", "Nodule", "Effusion"][i % 3]) for i, image in enumerate(chosen)]
    return [*pairs, (chosen[0], "Hernia"), pairs[2]]


@pytest.fixture
def trained(tiny_config, shard_folder, new_run):
    """A run with a model: random weights will do."""

    def make(name):
        folder = new_run(name)
        keras.utils.set_random_seed(0)
        model = network.build_network("Tiny", findings=14, image_size=tiny_config.image_size, weights=None)
        network.write_network(
            model, folder / "model.keras", findings=chestxray14.FINDINGS, stored_size=36, encoding="raw"
        )
        return folder, model

    return make


@pytest.mark.mpi
def test_two_ranks_write_what_one_process_writes(ranks, tiny_config, shard_folder, requests, trained):
    folder, model = trained("two")
    told = ranks(2).run("workbench.training.gradcam.write_heat_maps", tiny_config, folder, requests, batch_size=2)
    assert [part["mine"] for part in told] == [4, 5]
    alone, _ = trained("one")
    assert gradcam.write_heat_maps(tiny_config, alone, requests) == {"maps": 9, "height": 2, "width": 2, "mine": 9}
    made, by_one = (dict(np.load(path / "heatmaps.npz", allow_pickle=False)) for path in (folder, alone))
    pairs = requests[:-1]
    assert list(zip(made["images"].tolist(), made["findings"].tolist(), strict=True)) == pairs
    assert (int(made["image_size"]), int(made["stored_size"])) == (32, 36)
    assert made["maps"].dtype == np.float16
    # The same again without shards' order, slices and ranks.
    stored = shards.read_radiographs(shard_folder, [image for image, _ in pairs])
    names = shards.read_info(shard_folder)["findings"]
    columns = [names.index(finding) for _, finding in pairs]
    maps, scores = gradcam.explain(model, stored[:, 2:-2, 2:-2, None], columns)
    for file in (made, by_one):
        np.testing.assert_allclose(file["maps"], maps, atol=1e-3)
        np.testing.assert_allclose(file["scores"], scores, atol=1e-5)
    assert maps.any(axis=(1, 2)).sum() > 2, "the test needs maps that are not all zero"


@pytest.mark.mpi
def test_two_ranks_and_one_request(ranks, tiny_config, requests, trained):
    folder, _ = trained("one")
    told = ranks(2).run("workbench.training.gradcam.write_heat_maps", tiny_config, folder, requests[:1])
    assert [(part["mine"], part["maps"]) for part in told] == [(0, 1), (1, 1)]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ([], "No heat map is requested"),
        ([("00000001_000.png", "Mas")], r"`Mas` is none of the findings of the shards in .*: choose from Atelectasis"),
        ([("nowhere.png", "Mass")], r"`nowhere\.png` is in none of the shards"),
    ],
)
def test_requests_that_cannot_be_met_are_a_sentence(tiny_config, trained, wrong, said):
    folder, _ = trained("wrong")
    with pytest.raises(WorkbenchError, match=said):
        gradcam.write_heat_maps(tiny_config, folder, wrong)
    assert not (folder / "heatmaps.npz").exists()
