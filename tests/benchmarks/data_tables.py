"""Reading a table of NIH's 112,120 rows, splitting it by patient, finding the files and planning the shards: seconds.

    python data_tables.py

The tables are NIH's own from the sample beside the project, else made-up ones of the same size; the images are empty
files under their names, since nothing here opens them.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
from data_files import NIH
from party import serve

from workbench.data import chestxray14, shards, synthetic

TABLES = ("Data_Entry_2017_v2020.csv", "train_val_list.txt", "test_list.txt")


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_tables(folder)
        (folder / "images").mkdir()
        for image in chestxray14.read_table(folder)["image"]:
            (folder / "images" / image).touch()

        def measure() -> float:
            began = time.perf_counter()
            frame = chestxray14.read_dataset(folder)
            shards._plan_folder(frame, images_per_shard=256, seed=0)
            assert len(frame) == 112_120
            return time.perf_counter() - began

        serve(measure)


def write_tables(folder: Path) -> None:
    if NIH.is_dir():
        for name in TABLES:
            (folder / name).symlink_to(NIH / name)
        return
    rng = np.random.default_rng(0)
    patients = np.sort(rng.integers(1, 30_806, 112_120))
    images = [f"{patient:08d}_{number % 1000:03d}.png" for number, patient in enumerate(patients)]
    labels = rng.choice(["No Finding", "Effusion", "Mass|Nodule", "Infiltration"], 112_120)
    rows = [f"{image},{label},0,{int(image[:8])},50,F,PA,,,," for image, label in zip(images, labels, strict=True)]
    (folder / TABLES[0]).write_text("\n".join([synthetic.HEADER, *rows]))
    (folder / TABLES[1]).write_text("\n".join(image for image in images if int(image[:8]) % 5))
    (folder / TABLES[2]).write_text("\n".join(image for image in images if not int(image[:8]) % 5))


if __name__ == "__main__":
    main()
