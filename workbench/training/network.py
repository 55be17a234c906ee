"""The network: uint8 radiographs in, one probability per finding out.

Grey to three channels, the normalisation its weights were trained with, the convolutional network and the
sigmoid head are ONE Keras model of stock layers, so that training and inference cannot differ, and a saved
`model.keras` loads in plain Keras anywhere. `fast` computes what the model computes, in less time.

    model = build_network("DenseNet121", findings=14, image_size=224, weights="imagenet")
    scores = model(radiographs)          # (B, 224, 224, 1) uint8 -> (B, 14) float32 in [0, 1]
    model.save("model.keras")
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import keras

from workbench import WorkbenchError
from workbench.data.radiographs import ENCODINGS
from workbench.training.config import PRECISIONS

_DESCRIPTION = "workbench.json"  # inside the model's file, which is an archive; Keras passes it over

# Mean and variance, per channel and on the scale 0..255, that keras.applications' ImageNet weights expect.
_TORCH = ([123.675, 116.28, 103.53], [58.395**2, 57.12**2, 57.375**2])
_CAFFE = ([103.939, 116.779, 123.68], [1.0, 1.0, 1.0])
_SYMMETRIC = ([127.5] * 3, [127.5**2] * 3)


def _tiny(*, input_tensor, **_) -> keras.Model:
    """Four strided convolutions with batch normalisation: for tests and quick trials, not for results."""
    x = input_tensor
    for channels in (16, 32, 64, 128):
        x = keras.layers.Conv2D(channels, 3, strides=2, padding="same", use_bias=False)(x)
        x = keras.layers.Activation("relu")(keras.layers.BatchNormalization(momentum=0.9)(x))
    return keras.Model(keras.utils.get_source_inputs(input_tensor), keras.layers.GlobalAveragePooling2D()(x))


NETWORKS: dict[str, tuple[Callable, tuple]] = {
    "DenseNet121": (keras.applications.DenseNet121, _TORCH),
    "DenseNet169": (keras.applications.DenseNet169, _TORCH),
    "DenseNet201": (keras.applications.DenseNet201, _TORCH),
    "ResNet50": (keras.applications.ResNet50, _CAFFE),
    "ResNet101": (keras.applications.ResNet101, _CAFFE),
    "VGG16": (keras.applications.VGG16, _CAFFE),
    "MobileNetV2": (keras.applications.MobileNetV2, _SYMMETRIC),
    "Tiny": (_tiny, _TORCH),
}


def build_network(
    name: str = "DenseNet121",
    *,
    findings: int,
    image_size: int,
    weights: str | None = "imagenet",
    precision: str = "float32",
) -> keras.Model:
    """Build a network for training.

    Args:
        name: one of `NETWORKS`, families of keras.applications (Tiny is ours, for tests).
        findings: width of the sigmoid head, 1 or more.
        image_size: side of the square radiographs in pixels, 32 or more.
        weights: "imagenet" (Keras downloads them once), a local file (`.keras` of this workbench,
            `.weights.h5`, or keras.applications' `*_notop.h5`), or None for a random start.
        precision: one of `PRECISIONS`. The output is float32 in each.

    Returns:
        A model from (B, image_size, image_size, 1) uint8 in 0..255 to (B, findings) float32 in [0, 1].

    Raises:
        WorkbenchError: an unknown name or precision, an image too small, weights that are not there or do not fit.
    """
    check_settings(name, precision=precision)
    if image_size < 32:
        raise WorkbenchError(f"`image_size` {image_size} is too small for {name}: use 32 pixels or more.")
    family, (mean, variance) = NETWORKS[name]
    from_imagenet = weights == "imagenet"
    if from_imagenet and name == "Tiny":
        raise WorkbenchError("There are no ImageNet weights for Tiny: set `weights` to none.")
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        radiographs = keras.Input((image_size, image_size, 1), dtype="uint8", name="radiograph")
        grey = keras.layers.Rescaling(1.0, dtype="float32", name="to_float")(radiographs)
        colour = keras.layers.Concatenate(dtype="float32", name="grey_to_rgb")([grey, grey, grey])
        normal = keras.layers.Normalization(mean=mean, variance=variance, dtype="float32", name="imagenet_scale")
        features = family(include_top=False, weights=None, input_tensor=normal(colour), pooling="avg")
        head = keras.layers.Dense(findings, activation="sigmoid", dtype="float32", name="findings")
        model = keras.Model(radiographs, head(features.output), name=name)
    finally:
        keras.config.set_dtype_policy(previous)
    if from_imagenet:
        features.set_weights(_imagenet_weights(name))
    elif weights:
        _load_local(model, features, Path(weights))
    return model


def check_settings(name: str, *, precision: str = "float32") -> None:
    """Raise a WorkbenchError if there is no such network or precision."""
    if name not in NETWORKS:
        raise WorkbenchError(f"There is no network `{name}`: choose one of {', '.join(NETWORKS)}.")
    if precision not in PRECISIONS:
        raise WorkbenchError(f"There is no precision `{precision}`: choose one of {', '.join(PRECISIONS)}.")


def write_network(
    model: keras.Model, path: str | os.PathLike, *, findings: Sequence[str], stored_size: int, encoding: str
) -> None:
    """Save a model in one file that also says by name what it finds, and what its radiographs were read like.

    Args:
        model: to save, in Keras's own format; plain Keras loads it anywhere and ignores what is added.
        path: ends in `.keras`.
        findings: names of the outputs, in order.
        stored_size: side in pixels to which radiographs were brought before the centre was cut out.
        encoding: how they were stored: "raw", "png" or "jpeg".
    """
    model.save(path)
    told = {"findings": list(findings), "stored_size": stored_size, "encoding": encoding}
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(_DESCRIPTION, json.dumps(told | {"image_size": model.input_shape[1]}))


def describe_network(path: str | os.PathLike) -> dict:
    """What `write_network` added: findings, image_size, stored_size, encoding. Raises a WorkbenchError without it."""
    try:
        with zipfile.ZipFile(path) as file:
            if _DESCRIPTION not in file.namelist():
                raise WorkbenchError(
                    f"{path} does not say what it finds, so its outputs could be taken for others: use a model that "
                    "the workbench trained."
                )
            told = json.loads(file.read(_DESCRIPTION))
        _check_description(told)
    except FileNotFoundError:
        raise WorkbenchError(f"There is no trained model at {path}: train one first (notebook 03).") from None
    except WorkbenchError:
        raise
    except Exception as error:  # of a broken file zipfile, zlib and JSON each have their own
        raise WorkbenchError(f"{path} cannot be read ({_first_line(error)}): train again, or copy it again.") from None
    return told


def _check_description(told) -> None:
    """Raise one of many kinds for what `write_network` does not write."""
    if not isinstance(told["findings"], list) or not all(isinstance(name, str) for name in told["findings"]):
        raise ValueError("`findings` are not names")
    for name in ("image_size", "stored_size"):
        if type(told[name]) is not int or not 0 < told[name] < 2**15:
            raise ValueError(f"`{name}` is no size in pixels")
    if told["encoding"] not in ENCODINGS or told["stored_size"] < told["image_size"]:
        raise ValueError("`encoding` or `stored_size` is none")


def read_network(path: str | os.PathLike, *, findings: Sequence[str], image_size: int) -> keras.Model:
    """Read a trained `model.keras` and check that it fits the findings and the size of the radiographs.

    Raises:
        WorkbenchError: the file is not there or cannot be read, or the model has another input or other findings, be it
            the same ones in another order.
    """
    told = describe_network(path)
    if told["findings"] != list(findings):
        raise WorkbenchError(
            f"{path} finds {', '.join(told['findings'])}, but asked for were {', '.join(findings)}: use the findings, "
            "in the order, that it was trained with."
        )
    try:
        # safe_mode: a model file from elsewhere must not run code.
        model = keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras lets pass what zipfile, h5py and JSON raise
        raise WorkbenchError(f"{path} cannot be read ({_first_line(error)}): train again, or copy it again.") from None
    made_for = (model.input_shape[1:], model.output_shape[-1])
    if made_for != ((image_size, image_size, 1), len(findings)):
        raise WorkbenchError(
            f"{path} reads radiographs of {made_for[0][0]} pixels for {made_for[1]} findings, but asked for were "
            f"{image_size} pixels and {len(findings)} findings: use the settings and shards it was trained with."
        )
    return model


def _imagenet_weights(name: str) -> list:
    """The weights of keras.applications' own network, which downloads them once."""
    try:
        return NETWORKS[name][0](include_top=False, weights="imagenet", pooling="avg").get_weights()
    except Exception as error:  # Keras raises a bare Exception when a download fails
        raise WorkbenchError(
            f"The ImageNet weights of {name} cannot be had ({_first_line(error)}): go online once, or give `weights` a "
            "local file, or none for a random start."
        ) from None


def _load_local(model: keras.Model, features: keras.Model, path: Path) -> None:
    if not path.is_file():
        raise WorkbenchError(f"The weights file {path} does not exist: give `weights` imagenet, none or a file.")
    try:
        if path.suffix == ".keras":
            # safe_mode: a model file from elsewhere must not run code.
            model.set_weights(keras.models.load_model(path, compile=False, safe_mode=True).get_weights())
        elif path.name.endswith("_notop.h5"):
            features.load_weights(path)
        else:
            model.load_weights(path)
    except Exception as error:  # Keras lets pass what zipfile, h5py and JSON raise
        raise WorkbenchError(
            f"The weights in {path} do not fit {model.name} with {model.output_shape[-1]} findings "
            f"({_first_line(error)}): give weights of the same network, or none."
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
