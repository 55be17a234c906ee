"""A run's folder is never overwritten, its files appear whole, and its record can be read."""

import contextlib
import json
import os
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest

from workbench import WorkbenchError, cli, runs


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
    one, two = ({"status": status, "seconds": 1.0} for status in ("finished", "failed"))
    runs.update_run(folder, stages={"01": one})
    record = runs.update_run(folder, stages={"02": two}, status="failed")
    assert record["stages"] == {"01": one, "02": two}
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


WHOLE = {
    "name": "bad",
    "recipe": "mine",
    "status": "finished",
    "started": "2026-01-01T00:00:00+00:00",
    "ended": None,
    "parameters": {},
    "stages": {},
}


@pytest.mark.parametrize(
    ("record", "metrics", "status"),
    [
        ("", None, "unreadable"),
        ("[]", None, "unreadable"),
        ("null", None, "unreadable"),
        ("[" * 100_000, None, "unreadable"),
        (b"\xff\xfe", None, "unreadable"),
        ("{}", None, "unreadable"),
        ({"started": 5}, None, "unreadable"),
        ({"recipe": None, "status": ["odd"]}, None, "unreadable"),
        ({"ended": "2026-01-01T00:00:00"}, None, "unreadable"),
        ({"ended": "yesterday"}, None, "unreadable"),
        ({"ended": "2026-01-01T00:00:00+00:00", "stages": {"01": {}}}, None, "unreadable"),
        ({"world_size": "two"}, None, "unreadable"),
        ({"world_size": 1e30}, None, "unreadable"),
        ({"world_size": 2.5}, None, "unreadable"),
        ({"images_per_second": {}}, None, "unreadable"),
        ({}, "", "unreadable"),
        ({}, "[1]", "unreadable"),
        ({}, '{"test": [1]}', "unreadable"),
        ({}, '{"test": {"mean_auroc": "high"}}', "unreadable"),
        ({}, '{"test": {"mean_auroc": 0.8, "ci_low": "low", "ci_high": 1}}', "unreadable"),
        ({}, '{"val": {}}', "finished"),
    ],
)
def test_a_broken_run_is_shown_and_hides_no_other(tmp_path, monkeypatch, capsys, record, metrics, status):
    runs.create_run(tmp_path, "whole")
    folder = tmp_path / "results" / "bad"
    folder.mkdir()
    text = json.dumps(WHOLE | record) if isinstance(record, dict) else record
    (folder / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    if metrics is not None:
        (folder / "metrics.json").write_text(metrics)
    (tmp_path / "results" / "no-run").mkdir()
    (tmp_path / "results" / "a-file.json").touch()
    assert runs.list_runs(tmp_path).set_index("run")["status"].to_dict() == {"whole": "broken off", "bad": status}
    monkeypatch.setenv("WORKBENCH_ROOT", str(tmp_path))
    for more in ([], ["--html"]):
        assert cli.main(["runs", *more]) == 0
    assert "bad" in capsys.readouterr().out
    assert "bad" in (tmp_path / "results" / "index.html").read_text()


@pytest.mark.parametrize("content", ["", "[1]", '{"test": [1]}', "[" * 100_000])
def test_broken_metrics_are_one_sentence(tmp_path, content):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(WorkbenchError, match=r"metrics\.json .*: run notebook 04 on this run again\."):
        runs.read_metrics(tmp_path)


def test_what_another_user_keeps_closed_is_shown_or_passed_over(tmp_path):
    """As a user without root's rights, for whom the folders above are closed: paths are relative to the root."""
    for name in ("whole", "closed-file", "closed-folder"):
        runs.create_run(tmp_path, name)
    tmp_path.chmod(0o755)
    (tmp_path / "results" / "closed-file" / "run.json").chmod(0)
    (tmp_path / "results" / "closed-folder").chmod(0)
    code = (
        "import json, os\nfrom pathlib import Path\nimport pandas\nfrom workbench import runs\n"
        "os.geteuid() or os.setuid(65534)\n"
        "print(json.dumps(runs.list_runs(Path()).set_index('run')['status'].to_dict()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    (tmp_path / "results" / "closed-folder").chmod(0o755)
    assert done.stderr == ""
    assert json.loads(done.stdout) == {"whole": "broken off", "closed-file": "unreadable"}


def test_find_passes_over_broken_records(tmp_path):
    for name, content in (("a", "[]"), ("b", "{}"), ("c", '{"started": 5}'), ("d", "")):
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "run.json").write_text(content)
    with pytest.raises(WorkbenchError, match=r"No run under .* has run\.json"):
        runs.find_run(tmp_path)
    runs.create_run(tmp_path, "whole")
    assert runs.find_run(tmp_path).name == "whole"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": None}, "parameters is not an object"),
        ({"stages": {"03_train": None}}, "03_train is not an object"),
        ({"stages": {"03_train": {"status": "failed", "seconds": "5"}}}, "the seconds of 03_train is not a number"),
        ({"started": "yesterday"}, "Invalid isoformat string"),
        ({"ended": "2026-01-01T00:00:00"}, "ended has no time zone"),
        ({"world_size": 10**30}, "world_size is not a whole number"),
        ({"hosts": [None]}, "a host is not a text"),
    ],
)
def test_a_record_with_wrong_entries_is_one_sentence_and_hides_no_other_run(tmp_path, changes, said):
    folder = runs.create_run(tmp_path, "first")
    runs.create_run(tmp_path, "second")
    (folder / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | changes))
    with pytest.raises(WorkbenchError, match=rf"run\.json is not one \({said}"):
        runs.read_run(folder)
    assert runs.list_runs(tmp_path).set_index("run")["status"]["first"] == "unreadable"


@pytest.mark.parametrize(
    "text", ["null", "[]", "{}", '{"status": "failed"}', "[" * 100_000, '{"a": NaN}', '{"a": 1e400}']
)
def test_a_record_of_another_form_is_one_sentence(tmp_path, text):
    folder = runs.create_run(tmp_path, "first")
    (folder / "run.json").write_text(text)
    with pytest.raises(WorkbenchError, match=r"The run's record .*run\.json is not one|run\.json cannot be read"):
        runs.read_run(folder)
    assert list(runs.list_runs(tmp_path)["status"]) == ["unreadable"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "null",
        '{"test": []}',
        '{"test": {"mean_auroc": "0.8"}}',
        '{"test": {"per_finding": {"Mass": 3}}}',
        '{"test": {"per_finding": {"Mass": {"threshold": []}}}}',
        '{"test": {"undefined": [1]}}',
    ],
)
def test_metrics_that_are_none_are_one_sentence_and_hide_no_run(tmp_path, text):
    folder = runs.create_run(tmp_path, "first")
    (folder / "metrics.json").write_text(text)
    with pytest.raises(WorkbenchError, match=r"metrics\.json (cannot be read|is not one)"):
        runs.read_metrics(folder)
    assert len(runs.list_runs(tmp_path)) == 1


def test_a_name_too_long_for_a_folder_is_told(tmp_path):
    with pytest.raises(WorkbenchError, match="Cannot make the run's folder"):
        runs.open_run(tmp_path, "x" * 300)
    with pytest.raises(WorkbenchError, match="cannot be read"):
        runs.find_run(tmp_path, "x" * 300)


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


@pytest.mark.parametrize("content", [b"\xff\xfe", b"shard,record\nx,1\n", b"shard,image\nx\n"])
def test_a_list_of_skipped_images_that_is_none_is_named(tmp_path, content):
    assert runs.skipped_images(tmp_path) == []
    (tmp_path / "skipped.csv").write_bytes(b"shard,image\nx,a.png\n")
    assert runs.skipped_images(tmp_path) == ["a.png"]
    (tmp_path / "skipped.csv").write_bytes(content)
    with pytest.raises(WorkbenchError, match=r"skipped\.csv cannot be read"):
        runs.skipped_images(tmp_path)


def test_a_record_moves_no_cursor(tmp_path):
    runs.create_run(tmp_path, "first", recipe="\x1b[2Jmine")
    assert runs.list_runs(tmp_path)["recipe"][0] == " [2Jmine"
