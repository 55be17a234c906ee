"""What a run was made with is recorded, differences are told, and a run is repeated from its folder alone."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from workbench import WorkbenchError, batch, cli, provenance, rerun, runs
from workbench.data import chestxray14, shards
from workbench.training.config import TrainConfig

ROOT = runs.project_root()
TODAY = {
    "versions": {"python": "3.11.7", "numpy": "2.0.2"},
    "code_sha256": {"workbench/data": "aa", "notebooks/03_train.ipynb": "bb"},
    "hardware": {"cpu": "A processor", "cores": 2, "gpus": []},
    "settings": {"OMP_NUM_THREADS": "2"},
    "git": "0123456789ab",
    "world_size": 2,
}
# The same notebooks, on a data set and a network that take seconds.
QUICK = {
    "synthetic_patients": 40,
    "image_size": 32,
    "shard_margin": 4,
    "network": "Tiny",
    "batch_size": 8,
    "epochs": 2,
    "learning_rate": 0.003,
    "resamples": 20,
    "heat_maps": 0,
}


# What is recorded


def git(folder, *command):
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    told = subprocess.run(["git", "-C", folder, *who, *command], capture_output=True, text=True, timeout=30, check=True)
    return told.stdout


@pytest.fixture
def repository(tmp_path):
    """A project under git with a package, a notebook and a file of secrets, all committed."""
    for name in ("workbench/module.py", "notebooks/01.ipynb", "secrets.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("as committed\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def test_changes_are_kept_so_that_git_apply_brings_them_back(repository):
    (repository / "workbench" / "module.py").write_text("as committed\nand changed\n")
    folder = runs.create_run(repository, "first")
    git(repository, "checkout", "-q", "workbench")
    assert (repository / "workbench" / "module.py").read_text() == "as committed\n"
    git(repository, "apply", str(folder / "changes.patch"))
    assert (repository / "workbench" / "module.py").read_text() == "as committed\nand changed\n"
    assert runs.read_run(folder)["git"].endswith("+changes")


def test_nothing_but_tracked_files_of_the_code_goes_into_the_changes(repository):
    git(repository, "remote", "add", "origin", "ssh://git@host.example/me/secret-project")
    (repository / "secrets.txt").write_text("password-1\n")
    (repository / "workbench" / "token.py").write_text("password-2\n")
    (repository / "notebooks" / "01.ipynb").write_text("changed\n")
    folder = runs.create_run(repository, "first")
    assert "+changed" in (folder / "changes.patch").read_text()
    everything = "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    assert "password" not in everything
    assert "secret-project" not in everything


def test_no_changes_no_patch_and_too_large_ones_are_not_kept(repository):
    assert not (runs.create_run(repository, "clean") / "changes.patch").exists()
    (repository / "notebooks" / "01.ipynb").write_text("a picture\n" * 200_000)
    assert not (runs.create_run(repository, "large") / "changes.patch").exists()


def test_outside_git_a_run_is_made_all_the_same(tmp_path):
    folder = runs.create_run(tmp_path, "first")
    assert runs.read_run(folder)["git"] is None
    assert not (folder / "changes.patch").exists()


def test_the_record_says_on_what_and_with_which_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    monkeypatch.setenv("SOME_API_TOKEN", "password")
    record = runs.read_run(runs.create_run(tmp_path, "first"))
    assert record["hardware"]["cores"] == len(os.sched_getaffinity(0))
    assert record["hardware"]["cpu"] in Path("/proc/cpuinfo").read_text()
    assert record["settings"]["TF_ENABLE_ONEDNN_OPTS"] == "0"
    assert "password" not in json.dumps(record)


def test_gpus_are_called_by_name(tmp_path, monkeypatch):
    for number in range(2):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
        told = "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 1\n"
        (tmp_path / f"0000:0{number}:00.0" / "information").write_text(told)
    monkeypatch.setattr(provenance, "GPUS", tmp_path)
    assert provenance.describe_hardware()["gpus"] == ["NVIDIA H100 80GB HBM3"] * 2


def test_code_is_another_when_a_cell_changes_and_not_when_a_notebook_was_run(tmp_path):
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks" / "03_train.ipynb"
    cell = {"cell_type": "code", "source": ["a = 1\n", "a"], "outputs": [], "execution_count": None, "metadata": {}}
    path.write_text(json.dumps({"cells": [cell]}))
    before = provenance.hash_code(tmp_path)
    path.write_text(json.dumps({"cells": [cell | {"source": "a = 1\na", "outputs": ["1"], "execution_count": 7}]}))
    assert provenance.hash_code(tmp_path) == before
    path.write_text(json.dumps({"cells": [cell | {"source": "a = 2\na"}]}))
    after = provenance.hash_code(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {"notebooks/03_train.ipynb"}
    assert "workbench/training" in after


def test_data_is_what_the_shards_hold_wherever_they_lie(shard_folder, tmp_path):
    info = shards.read_info(shard_folder)
    told = provenance.describe_data(info)
    assert told["table_sha256"] == hashlib.sha256((shard_folder / "images.csv").read_bytes()).hexdigest()
    shutil.copytree(shard_folder, tmp_path / "elsewhere")
    assert provenance.describe_data(shards.read_info(tmp_path / "elsewhere")) == told
    info["splits"]["val"]["shards"][0]["sha256"] = "0" * 64
    assert provenance.describe_data(info)["shards_sha256"] != told["shards_sha256"]
    (tmp_path / "start.h5").write_bytes(b"weights")
    weighed = provenance.describe_data(info, tmp_path / "start.h5")
    assert weighed["weights_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert "weights_sha256" not in provenance.describe_data(info, "imagenet")


@pytest.mark.parametrize("spoilt", [{"splits": []}, {"splits": {"train": {}}}, {"splits": {}, "split": "official"}])
def test_shards_without_hashes_are_refused_in_a_sentence(spoilt):
    with pytest.raises(WorkbenchError, match=r"info\.json lacks their hashes: write the shards again"):
        provenance.describe_data(spoilt)


def test_shards_written_again_have_the_same_hashes(dataset, shard_folder, tmp_path):
    frame = chestxray14.read_dataset(dataset, validation_fraction=0.25)
    info = shards.write_shards(frame, tmp_path / "again", image_size=36, images_per_shard=16, progress=False)
    assert provenance.describe_data(info) == provenance.describe_data(shards.read_info(shard_folder))


def test_sources_are_the_files_that_the_split_is_read_from(dataset, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    official = chestxray14.hash_sources(folder)
    table = "Data_Entry_2017_v2020.csv"
    assert set(official) == {table, "BBox_List_2017.csv", "train_val_list.txt", "test_list.txt"}
    assert official[table] == hashlib.sha256((folder / table).read_bytes()).hexdigest()
    assert set(chestxray14.hash_sources(folder, split="random")) == {table, "BBox_List_2017.csv"}
    (folder / "mine.txt").write_text("00000001_000.png\n")
    lists = {"train_list": "mine.txt", "val_list": "test_list.txt", "test_list": ""}
    assert set(chestxray14.hash_sources(folder, split="lists", **lists)) == {
        table, "BBox_List_2017.csv", "mine.txt", "test_list.txt",
    }  # fmt: skip
    (folder / "test_list.txt").write_text("another\n")
    changed = chestxray14.hash_sources(folder)
    assert {name for name in changed if changed[name] != official[name]} == {"test_list.txt"}
    (folder / "test_list.txt").unlink()
    with pytest.raises(WorkbenchError, match=r"test_list\.txt` cannot be read .*: put it there again"):
        chestxray14.hash_sources(folder)


# What differs


def test_nothing_differs_from_itself():
    assert provenance.differences(TODAY, TODAY) == []


@pytest.mark.parametrize(
    ("then", "told"),
    [
        ({"versions": {"python": "3.11.2", "numpy": "2.0.2"}}, "version of python: 3.11.2 then, 3.11.7 now"),
        ({"versions": {"python": "3.11.7"}}, "version of numpy: none then, 2.0.2 now"),
        ({"versions": TODAY["versions"] | {"horovod": "0.28.1"}}, "version of horovod: 0.28.1 then, none now"),
        ({"git": "ffffffffffff+changes"}, "git commit: ffffffffffff+changes then, 0123456789ab now"),
        ({"git": None}, "git commit: none then, 0123456789ab now"),
        ({"world_size": 16}, "number of workers: 16 then, 2 now"),
        ({"hardware": {"cpu": "A processor", "cores": 8, "gpus": []}}, "hardware: cores: 8 then, 2 now"),
        ({"hardware": TODAY["hardware"] | {"gpus": ["V100", "V100"]}}, "hardware: gpus: V100, V100 then, none now"),
        ({"settings": {}}, "environment variable OMP_NUM_THREADS: none then, 2 now"),
        ({"code_sha256": TODAY["code_sha256"] | {"workbench/data": "cc"}}, "code of workbench/data: not what it was"),
        ({"code_sha256": {"workbench/data": "aa"}}, "code of notebooks/03_train.ipynb: new since"),
    ],
)
def test_each_difference_is_told_with_both_values(then, told):
    assert provenance.differences(TODAY | then, TODAY) == [told]


@pytest.mark.parametrize("name", TODAY)
def test_what_an_old_record_lacks_is_told_as_not_recorded(name):
    then = {key: value for key, value in TODAY.items() if key != name}
    (told,) = provenance.differences(then, TODAY)
    assert told.endswith(": not recorded then")


def test_a_record_of_other_kinds_is_told_and_raises_nothing():
    then = {"versions": ["numpy"], "hardware": 3, "settings": None, "code_sha256": "aa", "git": 5, "world_size": "two"}
    assert len(provenance.differences(then, TODAY)) == len(TODAY)


DATA = {"plan_sha256": "1", "table_sha256": "2", "shards_sha256": "3", "sources": {"a.csv": "4", "b.txt": "5"}}


@pytest.mark.parametrize(
    ("now", "told"),
    [
        ({}, []),
        ({"plan_sha256": "9"}, []),
        ({"table_sha256": "9"}, ["data: the images, patients, splits or labels in the shards are not what they were"]),
        ({"shards_sha256": "9"}, ["data: the contents of the shards are not what they were (3 then, 9 now)"]),
        ({"weights_sha256": "9"}, ["data: the file of weights is not what it was (none then, 9 now)"]),
        ({"sources": {"a.csv": "9", "b.txt": "5"}}, ["data: a.csv is not what it was (4 then, 9 now)"]),
        ({"sources": {"a.csv": "4"}}, ["data: b.txt is not what it was (5 then, none now)"]),
        ({"sources": {}}, ["data: the tables and lists the shards were split from: not recorded"]),
    ],
)
def test_other_data_is_told_by_name(now, told):
    said = provenance.data_differences(DATA, DATA | now)
    assert len(said) == len(told)
    assert all(phrase.startswith(start) for phrase, start in zip(said, told, strict=True))


@pytest.mark.parametrize("then", [None, {}, [], "data", {"sources": {}}])
def test_data_that_was_not_recorded_is_told_so(then):
    assert provenance.data_differences(then, DATA) == ["data: not recorded then"]


# What came out


def write_results(folder, *, loss=0.5, score=0.25, auroc=0.8, validation=0.1 + 0.2, seconds=3.0, split="here"):
    folder.mkdir(exist_ok=True)
    history = {"epoch": [1, 2], "loss": [0.7, loss], "seconds": [seconds] * 2, "val_auroc": [np.nan, validation]}
    pd.DataFrame(history).to_csv(folder / "history.csv", index=False)
    table = {"image": ["a.png", "b.png"], "patient": [1, 2], "Mass": [0, 1], "Mass_score": [0.125, score]}
    pd.DataFrame(table).to_csv(folder / "predictions-test.csv", index=False)
    metrics = {"test": {"mean_auroc": auroc, "per_finding": {"Mass": {"auroc": None}}}, "split": {"folder": split}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_the_same_results_are_the_same_whatever_time_they_took(tmp_path):
    first, second = write_results(tmp_path / "a"), write_results(tmp_path / "b", seconds=4.0, split="there")
    assert provenance.compare_results(first, second) == {
        "same": True,
        "compared": ["history.csv", "predictions-test.csv", "metrics.json"],
        "told": [],
        "largest_score_difference": 0.0,
        "auroc_difference": 0.0,
    }


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"loss": np.nextafter(0.5, 1)}, "history.csv: another loss from epoch 2 on"),
        ({"validation": 0.3}, "history.csv: another val_auroc from epoch 2 on"),
        ({"score": np.nextafter(0.25, 1)}, "predictions-test.csv: scores differ by up to 5.55e-17"),
        ({"auroc": 0.81}, "metrics.json: 1 of 2 figures differ, such as test.mean_auroc; mean test AUROC by +0.01"),
    ],
)
def test_the_last_digit_counts(tmp_path, changed, told):
    result = provenance.compare_results(write_results(tmp_path / "a"), write_results(tmp_path / "b", **changed))
    assert not result["same"]
    assert result["told"] == [told]
    assert result["auroc_difference"] == pytest.approx(0.01 if "auroc" in changed else 0)
    assert (result["largest_score_difference"] > 0) == ("score" in changed)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("history.csv", "epoch,loss\n1,0.7\n", "history.csv: 2 epochs then, 1 now"),
        ("history.csv", "", "history.csv: cannot be read"),
        ("predictions-test.csv", "image,Mass_score\nc.png,0.1\n", "predictions-test.csv: of other images or findings"),
        ("predictions-test.csv", "image,patient,Mass,Mass_score\na.png,1,1,0.125\nb.png,2,1,0.25\n", "other labels"),
        ("predictions-test.csv", b"\xff\xfe\x00", "predictions-test.csv: cannot be read"),
        ("metrics.json", "[1]", "metrics.json: cannot be read"),
        ("metrics.json", "[" * 100_000, "metrics.json: cannot be read"),
        ("metrics.json", '{"test": {"mean_auroc": NaN}}', "metrics.json: cannot be read"),
        (
            "predictions-test.csv",
            "image,patient,Mass,Mass_score\na.png,1,0,inf\nb.png,2,1,0.25\n",
            "predictions-test.csv: cannot be read",
        ),
        ("metrics.json", '{"test": {"mean_auroc": null}}', "metrics.json: 2 of 2 figures differ"),
        ("metrics.json", None, "metrics.json: only one of the two runs has it"),
    ],
)
def test_results_of_another_shape_are_told_and_raise_nothing(tmp_path, name, content, told):
    first, second = write_results(tmp_path / "a"), write_results(tmp_path / "b")
    (second / name).unlink()
    if content is not None:
        (second / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for result in (provenance.compare_results(first, second), provenance.compare_results(second, first)):
        assert not result["same"]
        assert len(result["told"]) == 1
    assert told in provenance.compare_results(first, second)["told"][0]


def test_two_runs_without_results_are_not_called_the_same(tmp_path):
    result = provenance.compare_results(tmp_path, tmp_path)
    assert not result["same"]
    assert "nothing to compare" in result["told"][0]


# A run again


@pytest.fixture
def project(tmp_path, dataset, shard_folder, monkeypatch):
    """The project's notebooks with a data set, its shards, and a run that says it was trained on them."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(shard_folder, root / "data" / "shards" / "mine")
    shutil.copytree(dataset, root / "data" / "mine")
    info = json.loads((root / "data" / "shards" / "mine" / "info.json").read_text())
    info["split"]["sources"] = chestxray14.hash_sources(dataset)
    (root / "data" / "shards" / "mine" / "info.json").write_text(json.dumps(info))
    chosen = {"shard_folder": "data/shards/mine", "data_folder": "data/mine", "workers": 1, "synthetic_patients": 0}
    parameters = batch.check_parameters(root, QUICK | chosen, where="here")
    folder = runs.create_run(root, "first", recipe="synthetic", parameters=parameters)
    stages = {name: {"status": "finished", "seconds": 1.0} for name in batch.STAGES}
    runs.update_run(folder, status="finished", stages=stages, world_size=1, data=provenance.describe_data(info))
    monkeypatch.setenv("WORKBENCH_ROOT", str(root))
    return root


def change_record(project, **changes):
    """Change the run's record, dictionaries by their entries; None removes what it names."""
    folder = project / "results" / "first"
    record = runs.read_run(folder)
    for name, value in changes.items():
        if value is None:
            del record[name]
        else:
            record[name] = record[name] | value if isinstance(value, dict) and value else value
    runs.write_json(folder / "run.json", record)


def test_check_tells_that_nothing_differs_and_makes_nothing(project, capsys):
    before = sorted(project.rglob("*"))
    assert cli.main(["rerun", "first", "--check"]) == 0
    assert capsys.readouterr().out.startswith("Nothing differs from the run first, started 20")
    assert sorted(project.rglob("*")) == before


def test_check_tells_all_that_differs_and_ends_with_one(project, capsys):
    parameters = {"epochs": 3, "momentum": 0.9}
    change_record(project, versions={"numpy": "1.26.4"}, git="ffffffffffff", parameters=parameters, world_size=2)
    (project / "data" / "mine" / "BBox_List_2017.csv").write_text("Image Index,Finding Label,Bbox [x,y,w,h],,,\n")
    assert cli.main(["rerun", "first", "--check", "--set", "epochs=4"]) == 1
    said = capsys.readouterr().out
    for phrase in (
        f"version of numpy: 1.26.4 then, {np.__version__} now",
        "git commit: ffffffffffff then, none now",
        "number of workers: 2 then, 1 now",
        "parameter momentum: 0.9 then, and no notebook knows it now, so it is left out",
        "parameter epochs: 3 then, 4 now, as you say",
        "data: BBox_List_2017.csv is not what it was",
    ):
        assert f"  {phrase}" in said
    assert len(said.splitlines()) == 7


def test_a_run_is_found_by_name_and_by_path(project, tmp_path, monkeypatch):
    shutil.copytree(project / "results" / "first", tmp_path / "usb" / "copied run")
    assert rerun.find_source(project, "first") == project / "results" / "first"
    assert rerun.find_source(project, str(tmp_path / "usb" / "copied run")) == tmp_path / "usb" / "copied run"
    monkeypatch.chdir(tmp_path / "usb" / "copied run")
    assert rerun.find_source(project, ".") == tmp_path / "usb" / "copied run"
    assert rerun.plan_rerun(project, str(tmp_path / "usb" / "copied run")).differences == []
    for name in ("second", "", "..", "a\0b", "results"):
        with pytest.raises(WorkbenchError, match=r"There is no run `.*`, neither under .* nor as a folder"):
            rerun.find_source(project, name)


def test_an_old_record_is_told_as_not_recorded_and_can_be_repeated(project):
    change_record(project, data=None, hardware=None, settings=None, code_sha256=None)
    differences = rerun.plan_rerun(project, "first").differences
    assert sorted(differences) == [
        "code: not recorded then",
        "data: not recorded then",
        "hardware: not recorded then",
        "settings: not recorded then",
    ]


def test_values_that_the_notebooks_have_anew_or_changed_are_told(project):
    source = project / "results" / "first"
    executed = json.loads((project / "notebooks" / "03_train.ipynb").read_text())
    for cell in executed["cells"]:
        cell["source"] = "".join(cell["source"]).replace("plateau_factor = 0.1", "plateau_factor = 0.2")
    (source / "notebooks" / "03_train.ipynb").write_text(json.dumps(executed))
    record = runs.read_run(source)
    del record["parameters"]["heat_maps"], record["parameters"]["seed"]
    runs.write_json(source / "run.json", record)
    assert rerun.plan_rerun(project, "first").differences == [
        "parameter plateau_factor: the notebooks' own value was 0.2, is 0.1; used: 0.1",
        "parameters that were not recorded then, or are new: seed 0, heat_maps 64 now",
    ]


def test_a_changed_notebook_is_told_with_how_to_have_the_old_one_back(project):
    path = project / "notebooks" / "03_train.ipynb"
    path.write_text(path.read_text().replace("digests[0][:16]", "digests[0][:12]"))
    change_record(project, git="ffffffffffff")
    plan = rerun.plan_rerun(project, "first")
    assert "code of notebooks/03_train.ipynb: not what it was" in plan.differences
    assert plan.notes == ["`git checkout ffffffffffff` brings the code of then back"]
    change_record(project, git="ffffffffffff+changes")
    assert "with changes that were not kept" in rerun.plan_rerun(project, "first").notes[0]
    (project / "results" / "first" / "changes.patch").write_text("a patch")
    assert "`git apply " in rerun.plan_rerun(project, "first").notes[0]


def test_a_run_by_hand_is_repeated_from_its_training_on(project):
    record = runs.read_run(project / "results" / "first")
    names = [field.name for field in fields(TrainConfig)]
    names += ["cluster_name", "workers", "hang_limit", "background"]
    record["parameters"] = {name: record["parameters"][name] for name in names}
    runs.write_json(project / "results" / "first" / "run.json", record | {"stages": {}})
    assert rerun.plan_rerun(project, "first").stages == ["03_train"]
    assert rerun.plan_rerun(project, "first").differences == []
    (project / "results" / "first" / "metrics.json").write_text("{}")
    plan = rerun.plan_rerun(project, "first")
    assert plan.stages == ["03_train", "04_evaluate"]
    assert "resamples 1000" in plan.differences[0]


def test_what_data_is_here_decides_where_a_rerun_begins(project):
    whole = rerun.plan_rerun(project, "first")
    assert whole.stages == list(batch.STAGES)
    (project / "data" / "mine").rename(project / "data" / "gone")
    from_shards = rerun.plan_rerun(project, "first")
    assert from_shards.stages == list(batch.STAGES)[2:]
    assert from_shards.differences == []
    assert "so it begins with 03_train" in from_shards.notes[0]
    shutil.rmtree(project / "data" / "shards")
    with pytest.raises(WorkbenchError, match=r"Neither the shards .* nor the data set .* is here: put one of them"):
        rerun.plan_rerun(project, "first")
    made_up = rerun.plan_rerun(project, "first", overrides={"synthetic_patients": 40})
    assert made_up.stages == list(batch.STAGES)
    assert made_up.differences == ["parameter synthetic_patients: 0 then, 40 now, as you say"]
    assert "their hashes then held against the run's" in made_up.notes[0]


def test_a_run_from_its_training_on_gets_its_shards_written_if_they_are_gone(project):
    change_record(project, stages={})
    change_record(project, stages={"03_train": {"status": "finished", "seconds": 1.0}})
    assert rerun.plan_rerun(project, "first").stages == ["03_train"]
    shutil.rmtree(project / "data" / "shards")
    assert rerun.plan_rerun(project, "first").stages == ["02_write_shards", "03_train"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": None}, "parameters is missing"),
        ({"parameters": {"shard_folder": ""}}, "holds no parameters of a training"),
        ({"parameters": {"workers": 64}}, "The run had 64 workers of 1 cores or more, and this machine has"),
        ({"parameters": {"weights": "data/start.h5"}}, r"The weights .*start\.h5 are not here: put them there, or"),
        ({"parameters": {"epochs": "six"}}, "`epochs` of the run first is 'six': expected a whole number, such as 6"),
        ({"parameters": {"network": "AlexNet"}}, "`network` is 'AlexNet': it has to be one of"),
        ({"data": {"plan_sha256": "0" * 64}}, "holds other shards than the run was trained on: keep them and say"),
    ],
)
def test_what_cannot_be_repeated_is_refused_in_a_sentence_before_anything_is_made(project, capsys, changes, said):
    change_record(project, **changes)
    for more in ([], ["--check"]):
        assert cli.main(["rerun", "first", *more]) == 1
        told = capsys.readouterr().err
        assert re.search(said, told)
        assert told.count("\n") == 1
    assert [path.name for path in (project / "results").iterdir()] == ["first"]


@pytest.mark.parametrize("content", ["", "[]", "3", '"run"', "null", "{}", '{"parameters": [1]}', "\udcff"])
def test_a_broken_record_is_refused_in_a_sentence(project, capsys, content):
    (project / "results" / "first" / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    assert cli.main(["rerun", "first", "--check"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("workbench: ")
    assert told.count("\n") == 1


def test_a_name_that_is_taken_is_refused(project, capsys):
    assert cli.main(["rerun", "first", "--name", "first"]) == 1
    assert "`first` exists already" in capsys.readouterr().err


def test_a_repeated_run_is_compared_once_it_is_finished_and_other_runs_never(project, capsys):
    rerun.finish(project / "results" / "first")
    source = write_results(project / "results" / "first")
    folder = runs.create_run(project, "again")
    write_results(folder, auroc=0.75)
    runs.update_run(
        folder, rerun={"of": "first", "folder": str(source), "differences": []}, data={"shards_sha256": "0"}
    )
    rerun.finish(folder)
    assert capsys.readouterr().out == ""
    runs.update_run(folder, status="finished")
    rerun.finish(folder)
    said = capsys.readouterr().out
    assert "mean test AUROC by -0.05" in said
    told = runs.read_run(folder)["rerun"]
    assert told["result"]["auroc_difference"] == pytest.approx(-0.05)
    assert "contents of the shards are not what they were" in " ".join(told["data"])
    shutil.rmtree(source)
    rerun.finish(folder)
    assert "nothing to compare with" in capsys.readouterr().out


def workbench(root, *arguments, **settings):
    options = [word for name, value in settings.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    told = subprocess.run(
        [sys.executable, "-m", "workbench", *arguments, *options],
        env=os.environ | {"WORKBENCH_ROOT": str(root)},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stderr == ""
    return told.stdout


@pytest.mark.notebooks
@pytest.mark.mpi
def test_a_run_repeated_elsewhere_from_its_folder_alone_is_the_same_to_the_last_digit(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for root in (here, there):
        shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    monkeypatch.setenv("WORKBENCH_ROOT", str(here))
    parameters = batch.check_parameters(here, QUICK, where="here")
    folder = runs.create_run(here, "quick", recipe="synthetic", parameters=parameters)
    batch.execute(here, folder, parameters, ["02_write_shards", "03_train", "04_evaluate"])
    folder.rename(tmp_path / "copied")

    said = workbench(there, "rerun", str(tmp_path / "copied"), "--name", "again")
    assert "Nothing differs from the run copied" in said
    assert "data: the same shards as then, by their hashes" in said
    assert "The same as copied to the last digit: history.csv, predictions-test.csv, predictions-val.csv, m" in said
    again = there / "results" / "again"
    told = runs.read_run(again)["rerun"]
    assert (told["differences"], told["data"], told["result"]["same"]) == ([], [], True)
    assert (again / "metrics.json").read_bytes() == (tmp_path / "copied" / "metrics.json").read_bytes()
    assert not (there / "results" / "quick").exists()

    # Of other data and shorter; the training alone, so that the test does not take as long again.
    record = runs.read_run(tmp_path / "copied")
    record["stages"] = {key: {"status": "finished", "seconds": 1.0} for key in ("02_write_shards", "03_train")}
    record["parameters"] |= {"seed": 1, "shard_folder": "data/other", "data_folder": "data/made-up"}
    runs.write_json(tmp_path / "copied" / "run.json", record)
    said = workbench(there, "rerun", str(tmp_path / "copied"), "--name", "other", epochs=1)
    assert "parameter epochs: 2 then, 1 now, as you say" in said
    assert "data: the contents of the shards are not what they were" in said
    assert "What came out differently from copied:" in said
    told = runs.read_run(there / "results" / "other")["rerun"]
    assert len(told["data"]) >= 3
    assert "history.csv: 2 epochs then, 1 now" in told["result"]["told"]
