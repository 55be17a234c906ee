"""The whole of `train()`: an epoch with all that belongs to it, or the time to the first step.

python train_whole.py --of epoch --size 224        # images/s of an epoch of 50 steps: input, steps, validation
                                                   # of a batch with AUROC, history, checkpoint, best model, progress
python train_whole.py --of first-step --size 224   # seconds from the call of train() to the end of its first step
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
from data_files import image_files
from party import serve

STEPS, VALIDATION = 50, 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--of", choices=("epoch", "first-step", "first-step-once"), default="epoch")
    for name, default in (("size", 224), ("batch", 16), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="mixed_bfloat16")
    asked = parser.parse_args()
    if asked.of == "first-step":
        # In a process of its own each time: only the first call of a process has to compile the step.
        again = [sys.executable, __file__, "--of", "first-step-once", *sys.argv[sys.argv.index("first-step") + 1 :]]
        serve(lambda: json.loads(subprocess.run(again, capture_output=True, text=True, check=True).stdout))
        return

    from workbench import runs
    from workbench.training import trainer
    from workbench.training.config import TrainConfig

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = TrainConfig(
            str(write_shards(folder, asked.size, STEPS * asked.batch)),
            weights="none",
            precision=asked.precision,
            image_size=asked.size,
            batch_size=asked.batch,
            threads=asked.threads,
            epochs=10**6,
            plateau_patience=0,
        )
        told: queue.Queue = queue.Queue()
        go = threading.Semaphore(0)

        def report(progress: dict) -> None:
            if "history" in progress:  # the last word of an epoch
                told.put(time.perf_counter())
                go.acquire()
            elif asked.of == "first-step-once" and "step" in progress:
                print(time.perf_counter() - began, flush=True)
                os._exit(0)

        run = runs.create_run(folder, "run")
        began = time.perf_counter()
        threading.Thread(target=trainer.train, args=(config, run), kwargs={"report": report}, daemon=True).start()
        told.get(timeout=600)  # the first epoch, with the compilation

        def measure() -> dict:
            began = time.perf_counter()
            go.release()
            value = STEPS * asked.batch / (told.get(timeout=600) - began)
            return {"value": value}

        serve(measure)
        os._exit(0)  # the training waits for a word that will not come


def write_shards(folder: Path, size: int, train: int) -> Path:
    import numpy as np
    import pandas as pd

    from workbench.data import chestxray14, shards

    images = train + 2 * VALIDATION
    (folder / "originals").mkdir()
    paths = (image_files(256, folder / "originals") * images)[:images]
    table = {"image": [f"{number:08d}_000.png" for number in range(images)], "path": paths, "patient": range(images)}
    splits = {"split": ["train"] * train + ["val"] * VALIDATION + ["test"] * VALIDATION}
    positives = np.random.default_rng(0).random((images, 14)) < 0.2
    findings = dict(zip(chestxray14.FINDINGS, positives.astype(np.uint8).T, strict=True))
    frame = pd.DataFrame(table | splits | findings)
    shards.write_shards(frame, folder / "shards", image_size=size, processes=1, progress=False)
    return folder / "shards"


if __name__ == "__main__":
    main()
