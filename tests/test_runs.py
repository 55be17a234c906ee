"""A run's folder is never overwritten, its files appear whole, and its record can be read."""

import contextlib
import json
import os

import matplotlib.pyplot as plt
import numpy as np
import pytest

from workbench import WorkbenchError, runs


def test_a_run_has_a_folder_and_a_record(tmp_path):
    folder = runs.create_run(tmp_path, "first", recipe="synthetic", parameters={"epochs": 3})
    record = runs.read_run(folder)
    assert folder == tmp_path / "results" / "first"
    assert record["status"] == "running"
    assert record["parameters"] == {"epochs": 3}
    assert {"python", "keras", "horovod"} <= set(record["versions"])


def test_a_run_is_never_overwritten(tmp_path):
    folder = runs.create_run(tmp_path, "first")
    (folder / "history.csv").write_text("precious")
    with pytest.raises(WorkbenchError, match="`first` exists already"):
        runs.create_run(tmp_path, "first")
    assert (folder / "history.csv").read_text() == "precious"


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "with space", "-flag"])
def test_a_run_s_name_is_a_folder_name(tmp_path, name):
    with pytest.raises(WorkbenchError, match="cannot name a run"):
        runs.create_run(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "results").write_text("a file where the folder should be")
    with pytest.raises(WorkbenchError, match="check that results/ can be written"):
        runs.create_run(tmp_path, "first")


def test_files_appear_whole_or_not_at_all(tmp_path):
    target = tmp_path / "table.csv"
    target.write_text("old")
    with contextlib.suppress(KeyboardInterrupt), runs.written_whole(target) as part:
        part.write_text("half of the n")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["table.csv"]
    with runs.written_whole(target) as part:
        part.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    with pytest.raises(ValueError, match=r"NaN|nan"):
        runs.write_json(target, {"auroc": float("nan")})
    assert target.read_text() == "new"


def test_update_merges_dictionaries_one_level_deep(tmp_path):
    folder = runs.create_run(tmp_path, "first")
    runs.update_run(folder, stages={"01": "finished"})
    record = runs.update_run(folder, stages={"02": "failed"}, status="failed")
    assert record["stages"] == {"01": "finished", "02": "failed"}
    assert runs.read_run(folder)["status"] == "failed"


def test_find_takes_the_newest_that_has_the_file(tmp_path):
    with pytest.raises(WorkbenchError, match=r"No run under .* has history\.csv"):
        runs.find_run(tmp_path, having="history.csv")
    for name, started in (("b-old", "2026-01-01T00:00:00+00:00"), ("a-new", "2026-02-01T00:00:00+00:00")):
        folder = runs.create_run(tmp_path, name)
        runs.update_run(folder, started=started)
        (folder / "history.csv").touch()
    runs.create_run(tmp_path, "newest-without")
    assert runs.find_run(tmp_path, having="history.csv").name == "a-new"
    assert runs.find_run(tmp_path, "b-old", having="history.csv").name == "b-old"
    with pytest.raises(WorkbenchError, match=r"`newest-without` has no history\.csv yet"):
        runs.find_run(tmp_path, "newest-without", having="history.csv")
    with pytest.raises(WorkbenchError, match=r"There is no run in .*nowhere"):
        runs.find_run(tmp_path, "nowhere")


def test_open_gives_a_trained_run_only_to_be_resumed(tmp_path):
    folder = runs.open_run(tmp_path, "mine")
    assert runs.open_run(tmp_path, "mine") == folder
    (folder / "history.csv").touch()
    with pytest.raises(WorkbenchError, match="`mine` has been trained already"):
        runs.open_run(tmp_path, "mine")
    with pytest.raises(WorkbenchError, match=r"has no checkpoint yet"):
        runs.open_run(tmp_path, "mine", resume=True)
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "last.npz").touch()
    assert runs.open_run(tmp_path, "mine", resume=True) == folder


def test_all_runs_as_a_table(tmp_path):
    assert runs.list_runs(tmp_path).empty
    folder = runs.create_run(tmp_path, "first", recipe="synthetic")
    runs.update_run(
        folder, started="2026-01-01T00:00:00+00:00", ended="2026-01-01T00:06:30+00:00", world_size=2, status="finished"
    )
    runs.write_json(folder / "metrics.json", {"test": {"mean_auroc": 0.81}})
    row = runs.list_runs(tmp_path).loc[0]
    assert (row["run"], row["minutes"], row["workers"], row["mean_auroc"]) == ("first", 6.5, 2, 0.81)


def test_a_broken_record_is_one_sentence_and_hides_no_other_run(tmp_path):
    folder = runs.create_run(tmp_path, "first")
    (folder / "run.json").write_text(json.dumps({"name": "first"})[:-4])
    with pytest.raises(WorkbenchError, match=r"run\.json cannot be read"):
        runs.read_run(folder)
    runs.create_run(tmp_path, "second")
    assert runs.list_runs(tmp_path).set_index("run")["status"].to_dict() == {
        "first": "unreadable",
        "second": "broken off",
    }


def test_minutes_are_those_of_the_stages(tmp_path):
    day_after = {"started": "2026-01-01T00:00:00+00:00", "ended": "2026-01-02T00:00:00+00:00"}
    assert runs.minutes(day_after | {"stages": {"01": {"seconds": 60.0}, "02": {"seconds": 30.0}}}) == 1.5
    assert runs.minutes(day_after | {"stages": {}}) == 24 * 60
    assert runs.minutes(day_after | {"ended": None}) is None


def test_save_figure_takes_axes_arrays_and_figures(tmp_path):
    figure, axes = plt.subplots(1, 2)
    for name, drawn in (("one", axes[0]), ("many", np.array(axes)), ("whole", figure)):
        runs.save_figure(drawn, tmp_path, name)
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    runs.save_figure(axes, None, "nowhere")
    plt.close(figure)
    assert len(list((tmp_path / "figures").iterdir())) == 3


def test_the_project_s_root_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_ROOT", str(tmp_path))
    assert runs.project_root() == tmp_path
    monkeypatch.delenv("WORKBENCH_ROOT")
    assert (runs.project_root() / "workbench" / "runs.py").exists()
