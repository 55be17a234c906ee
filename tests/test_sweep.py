"""Sweeps: the grid, points that fail and are killed, and a sweep that is killed itself and goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from workbench import WorkbenchError, batch, cli, runs, sweep
from workbench.analysis import plots
from workbench.files import held

ROOT = runs.project_root()
# What a point does in place of training: it writes what its settings make, and is spoilt where the project says so.
TRAIN = """
import json, os, signal, time
from workbench import WorkbenchError, runs
folder = runs.find_run(runs.project_root(), run)
if (folder.parent / "spoilt").exists():
    if rate == 0.2: raise WorkbenchError("the loss is not finite: choose a smaller rate.")
    if rate == 0.3: os.kill(os.getppid(), signal.SIGKILL)
time.sleep(wait)
"""
EVALUATE = """
auroc = {"mean_auroc": 0.5 + rate / 4 + seed / 100, "ci_low": 0.4, "ci_high": 0.9}
runs.update_run(folder, best_epoch=1, images_per_second=10.0)
runs.write_json(folder / "metrics.json", {"test": auroc, "val": auroc})
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project of five notebooks that train nothing."""
    (tmp_path / "notebooks" / "recipes").mkdir(parents=True)
    for stage in batch.STAGES:
        cells = [new_code_cell('run = ""\nrate = 0.5\nseed = 0\nwait = 0.0', metadata={"tags": ["parameters"]})]
        if stage == "02_write_shards":
            cells[0].source += '\nshard_folder = "data/shards/mine"\nsize = 8'
        if stage == "03_train":
            cells += [new_code_cell(TRAIN), new_code_cell(EVALUATE)]
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / f"{stage}.ipynb")
    (tmp_path / "notebooks" / "recipes" / "mine.yml").write_text("# My recipe.\nrate: 2\n")
    (tmp_path / "results").mkdir()
    monkeypatch.setenv("WORKBENCH_ROOT", str(tmp_path))
    return tmp_path


def start(root, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "workbench", "sweep", *arguments],
        env=os.environ | {"WORKBENCH_ROOT": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_training(root, name):
    """Whether a run has come to its training."""
    if not (root / "results" / name / "run.json").exists():
        return False
    stages = runs.read_run(root / "results" / name)["stages"]
    return next((stage for stage, told in stages.items() if told["status"] != "finished"), "") == "03_train"


def living(family):
    _, alive = psutil.wait_procs(family, timeout=60)
    return [process for process in alive if process.is_running()]


# The grid


def test_the_grid_is_the_product_and_names_are_the_same_every_time(root):
    grid = sweep.parse_grid(["rate=1e-3,0.5", "seed=0,1"])
    points = sweep.plan_sweep(root, "mine", grid, overrides={"wait": 1}, name="s")
    assert [point.name for point in points] == [
        "s-rate-0.001-seed-0", "s-rate-0.001-seed-1", "s-rate-0.5-seed-0", "s-rate-0.5-seed-1",
    ]  # fmt: skip
    assert points[1].setting == {"rate": 0.001, "seed": 1}
    assert points[1].parameters["wait"] == 1
    assert not list((root / "results").iterdir())


def test_what_decides_the_shards_gives_them_a_folder_of_their_own_and_what_does_not_shares_one(root):
    points = sweep.plan_sweep(root, "mine", sweep.parse_grid(["size=8,16", "wait=1,2"]))
    folders = [point.parameters["shard_folder"] for point in points]
    # `wait` is one of notebook 02 here as well, as every parameter that could decide them.
    assert len(set(folders)) == 4
    assert sweep.plan_sweep(ROOT, "synthetic", {"learning_rate": [0.1, 0.2]})[0].parameters["shard_folder"] == (
        "data/shards/synthetic"
    )
    points = sweep.plan_sweep(ROOT, "synthetic", {"learning_rate": [0.1, 0.2], "seed": [0, 1]})
    folders = [point.parameters["shard_folder"] for point in points]
    assert folders == ["data/shards/synthetic-seed-0", "data/shards/synthetic-seed-1"] * 2


def test_values_that_are_no_names_are_told_apart(root):
    names = sweep.plan_sweep(ROOT, "synthetic", {"findings": [["Edema"], ["Mass"]], "train_list": ["a/b", "a b"]})
    assert len({point.name for point in names}) == 4
    for point in names:
        runs.check_name(point.name)
    long = sweep.plan_sweep(ROOT, "synthetic", {"train_list": ["x" * 300, "x" * 301]})
    assert len({point.name for point in long}) == 2
    assert all(len(point.name) < 200 for point in long)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--grid", "rat=1"],
            r"`rat` of mine is no parameter \(did you mean `rate`\?\); the parameters are rate, seed",
        ),
        (["--grid", "rate="], "`--grid rate=` has an empty or unreadable value"),
        (["--grid", "rate=1,,2"], "`--grid rate=1,,2` has an empty or unreadable value"),
        (["--grid", "rate"], "`--grid rate` is not of the form KEY=VALUE,VALUE"),
        (["--grid", "rate=1,fast"], "`rate` of mine is 'fast': expected a number"),
        (["--grid", "seed=0.5"], "`seed` of mine is 0.5: expected a whole number"),
        (["--grid", "rate=0.001,1e-3"], "The grid has the point rate=0.001 twice"),
        (["--grid", "rate=1", "rate=2"], "`rate` stands twice in --grid"),
        (["--grid", "rate=1", "--set", "rate=2"], "`rate` stands in --grid and in --set"),
        (["--grid", "run=a"], "`run` of mine is no parameter"),
        (["--grid", "rate=1", "--name", "a/b"], "`a/b` cannot name a run"),
        (["--grid", "rate=1", "--at-once", "0"], "`--at-once 0`: at least one"),
    ],
)
def test_a_bad_grid_is_a_sentence_before_anything_starts(root, capsys, arguments, said):
    assert cli.main(["sweep", "mine", *arguments]) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    with pytest.raises(WorkbenchError, match=said):
        raise WorkbenchError(told)
    assert not list((root / "results").iterdir())


def test_a_run_of_other_parameters_is_not_taken_for_a_point(root, capsys):
    first = sweep.plan_sweep(root, "mine", {"rate": [1.0]}, name="s")[0]
    runs.create_run(root, first.name, parameters=first.parameters | {"wait": 3.0})
    assert cli.main(["sweep", "mine", "--grid", "rate=1", "--name", "s"]) == 1
    assert "The run `s-rate-1.0` exists with wait=3.0, not 0.0: choose another --name" in capsys.readouterr().err
    assert cli.main(["sweep", "mine", "--grid", "rate=1", "--name", "s", "--set", "wait=3", "--dry-run"]) == 0
    assert capsys.readouterr().out == "s-rate-1.0: rate=1.0, broken off\n"


def test_seeds_are_averaged_with_their_spread_and_the_best_on_validation_comes_first():
    rows = [(0.1, 0, 0.70, 0.60), (0.1, 1, 0.80, 0.70), (0.2, 0, 0.9, 0.5), (0.2, 1, 0.9, 0.7)]
    table = pd.DataFrame(rows, columns=["rate", "seed", "val_auroc", "test_auroc"])
    table = table.assign(status="finished", images_per_second=1.0, minutes=2.0, ci_low=0.4, ci_high=0.9)
    table.loc[len(table)] = {"rate": 0.3, "seed": 0, "status": "failed"}
    means = sweep.over_seeds(table, ["rate", "seed"])
    assert list(means["rate"]) == [0.2, 0.1]
    assert list(means["seeds"]) == [2, 2]
    assert list(means["val_auroc"]) == pytest.approx([0.9, 0.75])
    assert list(means["test_auroc_sd"]) == pytest.approx([0.2 / 2**0.5, 0.1 / 2**0.5])
    assert len(sweep.over_seeds(table, ["seed"])) == 1
    axes = plots.plot_sweep(table, ["rate", "seed"])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rate 0.1", "rate 0.2"]


# Running it


@pytest.mark.notebooks
def test_points_that_fail_and_crash_stop_no_other_and_are_tried_again(root):
    (root / "results" / "spoilt").touch()
    command = ("mine", "--grid", "rate=0.1,0.2,0.3,0.4", "--name", "s", "--at-once", "2")
    running = start(root, *command)
    said = running.communicate(timeout=240)[0]
    assert running.returncode == 1, said
    log = root / "results" / "s-rate-0.2" / "run.log"
    last = said.splitlines()[-1]
    assert last.startswith("workbench: 2 of 4 points failed: `s-rate-0.2`, `s-rate-0.3`. Look at run.log")
    assert str(log) in last
    assert "[2/4] rate=0.2: failed: 03_train failed: the loss is not finite: choose a smaller rate." in said
    assert "[3/4] rate=0.3: broken off: its process was ended by SIGKILL, perhaps for lack of memory" in said
    assert "workbench: 03_train failed: the loss is not finite" in log.read_text()
    assert (root / "results" / "s-rate-0.2" / "notebooks" / "03_train.ipynb").exists()
    table = pd.read_csv(root / "results" / "sweeps" / "s.csv")
    assert list(table["rate"]) == [0.4, 0.1, 0.2, 0.3]
    assert list(table["status"]) == ["finished", "finished", "failed", "broken off"]
    assert list(table["test_auroc"].dropna()) == pytest.approx([0.6, 0.525])
    assert (root / "results" / "sweeps" / "s.png").stat().st_size > 0
    (root / "results" / "spoilt").unlink()
    running = start(root, *command)
    said = running.communicate(timeout=240)[0]
    assert running.returncode == 0, said
    assert "[1/4] rate=0.1: was finished; AUROC 0.5250 on validation" in said
    assert "[2/4] rate=0.2: resumes, was failed" in said
    assert list(pd.read_csv(root / "results" / "sweeps" / "s.csv")["rate"]) == [0.4, 0.3, 0.2, 0.1]


@pytest.mark.notebooks
def test_ctrl_c_ends_what_runs_and_says_how_to_go_on(root):
    command = ("mine", "--grid", "seed=0,1", "--name", "s", "--set", "wait=60")
    with start(root, *command) as running:
        wait_for(lambda: is_training(root, "s-seed-0"))
        family = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=120)[0]
    assert running.returncode == 130, said
    assert said.splitlines()[-1] == "workbench: Interrupted, 2 of 2 points are left; go on with the same command."
    assert living(family) == []
    assert runs.read_run(root / "results" / "s-seed-0")["status"] == "interrupted"
    assert not (root / "results" / "s-seed-1").exists()


@pytest.mark.notebooks
def test_a_killed_sweep_takes_its_points_with_it(root):
    with start(root, "mine", "--grid", "seed=0", "--name", "s", "--set", "wait=300") as running:
        wait_for(lambda: is_training(root, "s-seed-0"))
        family = psutil.Process(running.pid).children(recursive=True)
        running.kill()
    assert len(family) >= 2
    assert living(family) == []


def test_a_sweep_is_carried_on_by_one_process_only(root, capsys):
    (root / "results" / "sweeps").mkdir()
    with held(root / "results" / "sweeps" / ".s.lock", "the test"):
        assert cli.main(["sweep", "mine", "--grid", "seed=0", "--name", "s"]) == 1
    assert f"The sweep s is being written by process {os.getpid()}" in capsys.readouterr().err
    assert not (root / "results" / "s-seed-0").exists()


# The real thing: as small as training gets.
TINY = {
    "synthetic_patients": 120, "image_size": 32, "shard_margin": 4, "network": "Tiny", "batch_size": 8, "epochs": 2,
    "measured_steps": 3, "resamples": 100, "heat_maps": 0, "worker_counts": [1], "workers": 1,
}  # fmt: skip


@pytest.mark.notebooks
@pytest.mark.mpi
@pytest.mark.timeout(1200)
def test_a_killed_sweep_leaves_no_process_and_goes_on_to_the_undisturbed_one_s_table(tmp_path):
    settings = [word for key, value in TINY.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    command = ("synthetic", "--grid", "learning_rate=0.003,0.001", "--name", "s", "--at-once", "2", *settings)
    tables = []
    for name in ("undisturbed", "killed"):
        project = tmp_path / name
        shutil.copytree(ROOT / "notebooks", project / "notebooks")
        measuring = project / "notebooks" / "05_scaling.ipynb"  # takes long, and nothing here depends on it
        notebook = nbformat.read(measuring, as_version=4)
        notebook.cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        nbformat.write(notebook, measuring)
        if name == "killed":
            with start(project, *command) as running:
                wait_for(lambda: is_training(project, "s-learning_rate-0.003"), 300)  # noqa: B023
                wait_for(lambda: (project / "results" / "s-learning_rate-0.001" / "run.json").exists())  # noqa: B023
                family = psutil.Process(running.pid).children(recursive=True)
                assert len(family) >= 2
                running.kill()
                running.communicate(timeout=60)
            assert living(family) == []
        running = start(project, *command)
        said = running.communicate(timeout=500)[0]
        assert running.returncode == 0, said
        tables.append(
            pd.read_csv(project / "results" / "sweeps" / "s.csv").drop(columns=["minutes", "images_per_second"])
        )
    assert said.count(": resumes, was ") == 2
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    # Written once, by the first of the points that share them.
    assert [path.name for path in (tmp_path / "killed" / "data" / "shards").glob("[!.]*")] == ["synthetic"]
