"""How long a user waits: seconds.

python start_up.py --of cluster        # from nothing to the first collective on two MPI ranks
python start_up.py --of run            # `workbench run synthetic`, all five notebooks, installed before
python start_up.py --of notebook-01    # notebook 01 on a table of 112,120 rows, every image there
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_files import image_files
from data_tables import write_tables
from party import serve

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--of", choices=("cluster", "run", "notebook-01"), default="cluster")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if asked.of == "notebook-01":
            write_data(folder)
        else:
            folder = ROOT
        start = {"cluster": start_cluster, "run": run_recipe, "notebook-01": run_notebook}[asked.of]

        serve(lambda: start(folder))


def start_cluster(_: Path) -> float:
    from workbench.training import cluster

    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    began = time.perf_counter()
    with cluster.start(2) as workers:
        assert workers.run("start_up.average_ranks") == [0.5, 0.5]
        return time.perf_counter() - began


def average_ranks() -> float:
    """On the workers: the smallest of collectives, right only if both ranks take part."""
    from workbench.training import distributed

    world = distributed.start()
    return distributed.average({"rank": float(world.rank)})["rank"]


def run_recipe(root: Path) -> float:
    began = time.perf_counter()
    name = f"bench-{time.time_ns()}"
    command = [sys.executable, "-m", "workbench", "run", "synthetic", "--name", name]
    try:
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=root)
        return time.perf_counter() - began
    finally:
        shutil.rmtree(root / "results" / name, ignore_errors=True)


def write_data(folder: Path) -> None:
    from workbench.data import chestxray14

    write_tables(folder)
    (folder / "images").mkdir()
    (folder / "originals").mkdir()
    originals = image_files(256, folder / "originals")
    for number, image in enumerate(chestxray14.read_table(folder)["image"]):
        os.symlink(originals[number % len(originals)], folder / "images" / image)


def run_notebook(folder: Path) -> float:
    began = time.perf_counter()
    notebook, parameters = ROOT / "notebooks" / "01_explore_dataset.ipynb", ["-p", "data_folder", str(folder)]
    command = [sys.executable, "-m", "papermill", str(notebook), str(folder / "01.ipynb"), *parameters]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
