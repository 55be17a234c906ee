"""Training steps of Keras 3 as it comes: stock layers, Adam, `train_on_batch`; on whichever backend Keras has.

    python stock_keras.py --precision mixed_bfloat16 --size 224 --batch 16 --steps 3

Where TensorFlow is installed `keras_steps.py --of keras` does the same, with the workbench's devices and threads.
"""

import argparse
import importlib.metadata
import os
import time
from importlib.util import find_spec

if find_spec("tensorflow") is None:
    os.environ.setdefault("KERAS_BACKEND", "torch" if find_spec("torch") else "jax")
import keras
import numpy as np
from party import serve


def build_stock(*, size: int, precision: str) -> keras.Model:
    """DenseNet-121 from grey radiographs of `size` pixels to 14 findings, compiled with Adam."""
    keras.config.set_dtype_policy(precision)
    radiograph = keras.Input((size, size, 1))
    colour = keras.layers.Concatenate()([keras.layers.Rescaling(1 / 58, -2.0)(radiograph)] * 3)
    features = keras.applications.DenseNet121(include_top=False, weights=None, input_tensor=colour, pooling="avg")
    scores = keras.layers.Dense(14, activation="sigmoid", dtype="float32")(features.output)
    model = keras.Model(radiograph, scores)
    model.compile(keras.optimizers.Adam(1e-3), "binary_crossentropy")
    return model


def describe() -> str:
    """Which Keras on what."""
    backend = keras.backend.backend()
    installed = importlib.metadata.packages_distributions().get(backend, [backend])[0]
    return f"Keras {keras.__version__} on {backend} {importlib.metadata.version(installed)}"


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("size", 224), ("batch", 16), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="float32")
    asked = parser.parse_args()
    rng = np.random.default_rng(0)
    radiographs = rng.integers(0, 256, (asked.batch, asked.size, asked.size, 1), np.uint8)
    labels = (rng.random((asked.batch, 14)) < 0.1).astype(np.float32)
    model = build_stock(size=asked.size, precision=asked.precision)

    def measure() -> dict:
        began = time.perf_counter()
        for _ in range(asked.steps):
            loss = model.train_on_batch(radiographs, labels)
        float(loss)
        return {"value": asked.steps * asked.batch / (time.perf_counter() - began), "with": describe()}

    for _ in range(2):
        model.train_on_batch(radiographs, labels)
    serve(measure)


if __name__ == "__main__":
    main()
