"""The five notebooks, executed whole: by the command, and one by one as JupyterLab's kernel would run them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
from nbclient import NotebookClient
from sklearn.metrics import roc_auc_score

from workbench import batch, runs
from workbench.data import chestxray14, shards

ROOT = runs.project_root()
TIMES = ["seconds", "images_per_second", "input_wait_share"]
# The same notebooks, on a data set and a network that take seconds.
QUICK = {
    "synthetic_patients": 120,
    "image_size": 32,
    "shard_margin": 4,
    "network": "Tiny",
    "batch_size": 8,
    "epochs": 3,
    "learning_rate": 0.003,
    "measured_steps": 5,
    "resamples": 200,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project's notebooks, with data and results of its own."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return root


def workbench(project, *arguments, **settings):
    options = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    return subprocess.run(
        [sys.executable, "-m", "workbench", *arguments, *options],
        env=os.environ | {"WORKBENCH_ROOT": str(project)},
        capture_output=True,
        text=True,
        timeout=580,
    )


@pytest.fixture(scope="module")
def finished(project):
    """A run of the recipe `synthetic` through all five notebooks, with the quick settings."""
    told = workbench(project, "run", "synthetic", "--name", "quick", **QUICK)
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stderr == ""
    return told.stdout, project / "results" / "quick"


pytestmark = [pytest.mark.notebooks, pytest.mark.mpi]


def test_the_command_tells_where_it_is_and_how_it_went(finished):
    said, folder = finished
    for number, stage in enumerate(batch.STAGES, 1):
        assert f"[{number}/5] {stage}: {batch.STAGES[stage]}" in said
        assert f"[{number}/5] {stage}: done in" in said
    assert "epoch  3/3" in said
    lines = said.splitlines()
    assert lines[-1] == str(folder)
    assert any(line.startswith("mean test AUROC 0.") for line in lines[-4:])
    assert any("images/s in training on 2 workers" in line for line in lines[-4:])


def test_the_run_s_folder_holds_what_is_promised(finished):
    _, folder = finished
    for name in (
        "run.json",
        "history.csv",
        "predictions-val.csv",
        "predictions-test.csv",
        "metrics.json",
        "scaling.csv",
        "model.keras",
        "split.json",
        "calibration.json",
        "heatmaps.npz",
        "predictions-test-flip.csv",
        "checkpoint/last.npz",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert {path.stem for path in (folder / "notebooks").glob("*.ipynb")} == set(batch.STAGES)
    figures = {path.stem[:2] for path in (folder / "figures").glob("*.png")}
    assert figures == {"01", "02", "03", "04", "05"}
    assert not list(folder.rglob(".*.part*"))
    record = runs.read_run(folder)
    assert (record["status"], record["world_size"]) == ("finished", 2)
    assert list(pd.read_csv(folder / "scaling.csv")["workers"]) == [1, 2]


def test_the_auroc_in_the_metrics_is_scikit_learn_s(finished):
    _, folder = finished
    metrics = json.loads((folder / "metrics.json").read_text())["test"]
    table = pd.read_csv(folder / "predictions-test.csv")
    for name, told in metrics["per_finding"].items():
        if told["auroc"] is not None:
            assert told["auroc"] == pytest.approx(roc_auc_score(table[name], table[f"{name}_score"]), abs=1e-9)
    defined = [told["auroc"] for told in metrics["per_finding"].values() if told["auroc"] is not None]
    assert metrics["mean_auroc"] == pytest.approx(np.mean(defined), abs=1e-9)
    assert len(defined) == metrics["findings"]


def test_every_test_image_is_predicted_exactly_once(finished, project):
    _, folder = finished
    expected = shards.read_images(project / "data" / "shards" / "synthetic").query("split == 'test'")
    assert list(pd.read_csv(folder / "predictions-test.csv")["image"]) == sorted(expected["image"])


def test_a_name_that_is_taken_is_refused(finished, project):
    told = workbench(project, "run", "synthetic", "--name", "quick", **QUICK)
    assert told.returncode == 1
    assert told.stderr == (
        f"workbench: The run `quick` exists already ({project / 'results' / 'quick'}): choose another name, a run is "
        "never overwritten.\n"
    )


@pytest.mark.parametrize("stage", ["01_explore_dataset", "02_write_shards", "03_train"])
def test_a_notebook_runs_by_itself_with_nothing_but_smaller_values(finished, project, stage, monkeypatch):
    """As in JupyterLab, where 03 makes a run of its own; 04 and 05 are run in a browser."""
    monkeypatch.setenv("WORKBENCH_ROOT", str(project))
    monkeypatch.delenv("WORKBENCH_PLAIN_PROGRESS", raising=False)
    notebook = nbformat.read(project / "notebooks" / f"{stage}.ipynb", as_version=4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in (QUICK | {"epochs": 1}).items():
        if f"{name} = " in parameters.source:
            parameters.source += f"\n{name} = {value!r}"
    NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(project / "notebooks")}},
    ).execute()
    if stage == "03_train":
        panels = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
        assert any("val AUROC" in str(output["data"].get("text/html", "")) for output in panels)


@pytest.fixture
def spoilt(project, finished, tmp_path):
    """Copies of the data set and of the shards, to be broken in one way or another."""
    data, stored = tmp_path / "data", tmp_path / "shards"
    shutil.copytree(project / "data" / "synthetic", data)
    shutil.copytree(project / "data" / "shards" / "synthetic", stored)
    return data, stored


def without_a_column(data, stored):
    table = data / "Data_Entry_2017_v2020.csv"
    table.write_text(table.read_text().replace("Patient ID", "Patient Number"))
    return {}


def a_patient_on_two_sides(data, stored):
    table = pd.read_csv(data / "Data_Entry_2017_v2020.csv")
    shared = table[table["Patient ID"].duplicated(keep=False)]["Image Index"].iloc[:2]
    for split, names in (
        ("train", [shared.iloc[0]]),
        ("val", [shared.iloc[1]]),
        ("test", table["Image Index"].iloc[-1:]),
    ):
        (data / f"{split}.txt").write_text("\n".join(names))
    return {"split": "lists", "train_list": "train.txt", "val_list": "val.txt", "test_list": "test.txt"}


def a_truncated_image(data, stored):
    image = sorted((data / "images").iterdir())[7]
    image.write_bytes(image.read_bytes()[:500])
    return {"shard_folder": str(stored.with_name("new"))}


def a_truncated_shard(data, stored):
    shard = sorted(stored.glob("train-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    return {}


def shards_of_other_findings(data, stored):
    return {"findings": ["Edema"]}


def a_folder_that_cannot_be_written(data, stored):
    return {"shard_folder": "/proc/shards"}


@pytest.mark.parametrize(
    ("spoil", "stage", "said"),
    [
        (without_a_column, "01", "Patient ID"),
        (a_patient_on_two_sides, "01", "patient"),
        (a_truncated_image, "02", "_00"),
        (a_folder_that_cannot_be_written, "02", "/proc/shards"),
        (a_truncated_shard, "03", "train-00000"),
        (shards_of_other_findings, "03", "Edema"),
    ],
)
def test_spoilt_data_ends_in_one_sentence(project, spoilt, spoil, stage, said):
    data, stored = spoilt
    settings = QUICK | {"data_folder": str(data), "shard_folder": str(stored), "synthetic_patients": 0}
    settings |= spoil(data, stored)
    told = workbench(project, "run", "synthetic", "--name", spoil.__name__, "--from", stage, **settings)
    assert told.returncode == 1, told.stdout
    assert told.stderr.startswith(f"workbench: {stage}_")
    assert said in told.stderr
    assert "Traceback" not in told.stdout + told.stderr
    assert told.stderr.count("\n") == 1
    assert runs.read_run(project / "results" / spoil.__name__)["status"] == "failed"
    assert not (stored.with_name("new") / "info.json").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data_folder": "nowhere", "synthetic_patients": 0}, "nowhere"),
        ({"findings": ["Broken_Rib"]}, "Broken_Rib"),
        ({"batch_size": 5000}, "fewer than one global batch"),
        ({"workers": 64, "batch_size": 1}, "`workers` 64 cannot be started on this machine"),
    ],
)
def test_bad_settings_end_in_one_sentence(finished, project, settings, said):
    name = "bad-" + "-".join(settings)
    stage = "01" if {"data_folder", "findings"} & set(settings) else "03"
    told = workbench(project, "run", "synthetic", "--name", name, "--from", stage, **QUICK | settings)
    assert told.returncode == 1
    assert told.stderr.startswith(f"workbench: {stage}_")
    assert said in told.stderr
    assert told.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"network": "AlexNet"}, "`network` is 'AlexNet'"),
        ({"workers": -1}, "`workers` of synthetic is -1: it has to be 0 or more"),
        ({"epoch": 3}, "`epoch` of synthetic is no parameter (did you mean `epochs`?)"),
        ({"worker_counts": ["two"]}, "`worker_counts` of synthetic is ['two']: expected a list"),
    ],
)
def test_what_training_would_refuse_is_refused_before_a_run_is_made(project, settings, said):
    told = workbench(project, "run", "synthetic", "--name", "never", **settings)
    assert told.returncode == 1
    assert said in told.stderr
    assert told.stderr.count("\n") == 1
    assert not (project / "results" / "never").exists()


def test_the_report_is_one_page_of_all_five(finished):
    _, folder = finished
    page = (folder / "report.html").read_text()
    for title in ("1 · Explore", "2 · ", "3 · Train", "4 · Evaluate", "5 · Scaling"):
        assert title in page
    assert page.count("data:image/png;base64") >= 10
    assert "plateau_patience" in page
    assert "read_csv" not in page  # the code itself stays in the notebooks


@pytest.mark.skipif(not (ROOT / ".docs" / ".ready").exists(), reason="no builder of the site: `make .docs/.ready`")
@pytest.mark.timeout(1200)
def test_the_site_is_built_of_the_run_without_a_warning(finished, project, tmp_path):
    command = [ROOT / ".docs" / "bin" / "python", ROOT / "docs" / "build.py", "quick", tmp_path / "site"]
    place = os.environ | {"WORKBENCH_ROOT": str(project)}
    told = subprocess.run(command, env=place, capture_output=True, text=True, timeout=580)
    assert told.returncode == 0, told.stdout + told.stderr
    html = tmp_path / "site" / "html"
    pages = {path.relative_to(html).as_posix(): path.read_text() for path in html.rglob("*.html")}
    for stage in (*batch.STAGES, "06_read_radiographs"):
        assert "output" in pages[f"notebooks/{stage}.html"], stage
    assert pages["notebooks/04_evaluate.html"].count("<img") >= 8
    assert "Area under the ROC curve" in pages["reference/workbench.analysis.evaluation-module.html"]
    assert 'id="workbench.training.cluster.Workers.run"' in pages["reference/workbench.training.cluster-module.html"]
    for name, page in pages.items():
        assert str(project) not in page, name
        # It is read without a network.
        assert not re.findall(r"<(?:script|link)[^>]+(?:src|href)=.?(?:https?:)?//", page), name


def disturb(project, number: int, after: str, *arguments, **settings):
    """Start the command, send it a signal once it has printed `after`; (status, what it said, its processes that live).

    A killed command takes a few seconds to end what it started, so that is waited for.
    """
    options = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    command = [sys.executable, "-m", "workbench", "run", *arguments, *options]
    place = os.environ | {"WORKBENCH_ROOT": str(project)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=place, **streams) as running:
        said = ""
        while after not in said and (line := running.stdout.readline()):
            said += line
        family = psutil.Process(running.pid).children(recursive=True)
        running.send_signal(number)
        said += running.communicate(timeout=120)[0]
    _, alive = psutil.wait_procs(family, timeout=20)
    return running.returncode, said, [process for process in alive if process.is_running()]


def test_a_run_that_is_interrupted_and_killed_ends_as_the_undisturbed_one(finished, project):
    """Ctrl-C in the second epoch, resumed, killed in the third, resumed: not a digit differs."""
    _, undisturbed = finished
    folder = project / "results" / "disturbed"
    beginning = ("synthetic", "--name", "disturbed", "--from", "03")
    settings = QUICK | {"worker_counts": [1]}  # of notebook 05, by which nothing is compared here
    status, said, left = disturb(project, signal.SIGINT, "epoch  1/3", *beginning, **settings)
    assert status == 130, said
    assert left == []
    assert said.splitlines()[-1].startswith("workbench: Interrupted before ")
    assert said.splitlines()[-1].endswith("go on with `workbench run --resume disturbed`.")
    assert runs.read_run(folder)["status"] == "interrupted"
    status, said, left = disturb(project, signal.SIGKILL, "epoch  2/3", "--resume", "disturbed")
    assert status == -signal.SIGKILL
    assert left == []
    assert "[rank 0] going on after epoch 1 of 3" in said
    assert runs.list_runs(project).set_index("run").loc["disturbed", "status"] == "broken off"
    told = workbench(project, "run", "--resume", "disturbed")
    assert told.returncode == 0, told.stderr
    assert "01_explore_dataset" not in told.stdout
    for name in ("metrics.json", "predictions-test.csv", "predictions-val.csv", "split.json"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    timeless = [pd.read_csv(run / "history.csv").drop(columns=TIMES) for run in (folder, undisturbed)]
    pd.testing.assert_frame_equal(*timeless, check_exact=True)


def test_a_run_is_carried_on_by_one_process_only(finished, project):
    with runs.locked(project / "results" / "quick"):
        told = workbench(project, "run", "--resume", "quick", "--from", "04")
    assert told.returncode == 1
    assert f"The run quick is being written by process {os.getpid()} on" in told.stderr
    assert told.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def two_images(finished, project):
    """Two test images of the run, with what it predicted for them."""
    _, folder = finished
    told = pd.read_csv(folder / "predictions-test.csv").head(2).set_index("image")
    frame = chestxray14.read_dataset(project / "data" / "synthetic").set_index("image")
    return list(frame.loc[told.index, "path"]), told


def test_predict_gives_the_scores_of_the_run(project, two_images, tmp_path):
    files, expected = two_images
    (tmp_path / "no.png").write_text("no image")
    answer = workbench(
        project, "predict", "quick", *files, str(tmp_path / "no.png"), "--csv", str(tmp_path / "out.csv"),
        "--heat-maps", str(tmp_path / "heat"),
    )  # fmt: skip
    assert answer.returncode == 1
    assert answer.stderr.count("\n") == 1
    assert "no.png` cannot be decoded" in answer.stderr
    assert "not a medical device" in answer.stdout
    assert len(list((tmp_path / "heat").glob("*.png"))) == 2
    table = pd.read_csv(tmp_path / "out.csv").pivot(index="file", columns="finding", values="score")
    for file, (_, row) in zip(files, expected.iterrows(), strict=True):
        for finding in table:
            assert table.loc[file, finding] == pytest.approx(row[f"{finding}_score"], abs=1e-5)


def test_a_run_is_compared_with_itself_and_with_an_ensemble(finished, project):
    _, folder = finished
    answer = workbench(project, "compare", "quick", "quick+quick", "--resamples", "50")
    assert answer.returncode == 0, answer.stderr
    assert "difference +0.0000 (95 % interval +0.0000 to +0.0000)" in answer.stdout
    assert (folder / "figures" / "compare-quick.png").exists()
    wrong = workbench(project, "compare", "quick", "nowhere")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("workbench: There is no run in")


def test_all_runs_as_a_page(finished, project):
    answer = workbench(project, "runs", "--html")
    assert answer.returncode == 0
    assert "quick/report.html" in (project / "results" / "index.html").read_text()


def test_the_sixth_notebook_reads_radiographs(finished, project, monkeypatch):
    monkeypatch.setenv("WORKBENCH_ROOT", str(project))
    notebook = nbformat.read(project / "notebooks" / "06_read_radiographs.ipynb", as_version=4)
    place = {"metadata": {"path": str(project / "notebooks")}}
    NotebookClient(notebook, timeout=200, kernel_name="python3", resources=place).execute()
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "4 of 4 files read" in said
    assert (
        sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])) == 1
    )
