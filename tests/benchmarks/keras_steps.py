"""Training steps of the workbench, or of Keras 3 as it comes, on images in memory.

python keras_steps.py --of workbench --precision mixed_bfloat16 --size 224 --batch 16 --steps 3 --threads 2
mpiexec -n 2 python keras_steps.py --of workbench --threads 1          # Horovod: all ranks, one answer
python keras_steps.py --of keras                                       # stock layers, Adam and train_on_batch
"""

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import numpy as np
import tensorflow as tf
from party import serve
from stock_keras import build_stock, describe

from workbench.training import distributed, trainer
from workbench.training.config import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--of", choices=("workbench", "keras"), default="workbench")
    for name, default in (("size", 224), ("batch", 16), ("steps", 3), ("threads", 2), ("core", -1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--predict", action="store_true", help="predict instead of training")
    parser.add_argument("--compression", default="none")
    parser.add_argument("--xla", action="store_true", help="the workbench's `xla`")
    asked = parser.parse_args()
    if asked.core >= 0:
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[asked.core]})
    world = distributed.start(asked.threads)

    rng = np.random.default_rng(world.rank)
    radiographs = tf.constant(rng.integers(0, 256, (asked.batch, asked.size, asked.size, 1), np.uint8))
    labels = tf.constant((rng.random((asked.batch, 14)) < 0.1).astype(np.float32))
    if asked.of == "workbench":
        config = TrainConfig(
            "", weights="none", image_size=asked.size, precision=asked.precision, compression=asked.compression
        )
        model, optimizer = trainer._build(config, 14, world)
        step = trainer.build_train_step(model, optimizer, xla=asked.xla)
        if asked.predict:
            predict = trainer.build_predict_step(model)
            step = lambda radiographs, labels: predict(radiographs)[:1, :1]  # noqa: E731
    else:
        model = build_stock(size=asked.size, precision=asked.precision)
        step = model.train_on_batch

    def measure() -> dict:
        began = time.perf_counter()
        for _ in range(asked.steps):
            loss = step(radiographs, labels)
        float(np.asarray(loss).reshape(-1)[0])
        rate = asked.steps * asked.batch * world.size / (time.perf_counter() - began)
        return {"value": rate, "with": describe()}

    for _ in range(2):
        step(radiographs, labels)
    # Horovod: the first rank talks with the runner and tells the others what it was told.
    follow = (lambda more: bool(distributed.gather(np.array([more]))[0])) if world.size > 1 else None
    serve(measure, asks=world.rank == 0, follow=follow)


if __name__ == "__main__":
    main()
