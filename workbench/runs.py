"""A run's folder under results/, its record, and all runs as one table.

Every experiment owns one folder, `results/<run>/`, and nobody writes over it: a name that is taken is refused.
Files appear whole: they are written beside their place and renamed into it.

    from workbench import runs
    root = runs.project_root()
    folder = runs.create_run(root, "first-try", recipe="synthetic", parameters={"epochs": 6})
    runs.update_run(folder, status="finished")
    runs.list_runs(root)
"""

from __future__ import annotations

import contextlib
import csv
import importlib.metadata
import itertools
import json
import os
import platform
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from workbench import WorkbenchError, one_line, provenance
from workbench.files import held, is_held, written_whole

# What entries of a record are, where they are there; those who read it count on that.
_RECORD = {
    "recipe": str,
    "status": str,
    "started": str,
    "parameters": dict,
    "stages": dict,
    "versions": dict,
    "hosts": list,
    "world_size": int,
    "best_epoch": int,
    "images_per_second": float,
}
# Held by the process that carries a recipe through the notebooks, and by the rank that trains and writes.
RUN_LOCK, TRAINING_LOCK = ".run.lock", ".training.lock"
# Held by the process that watches a training for others, and writes PROGRESS.
PROGRESS_LOCK, PROGRESS = ".progress.lock", "progress.json"
VERSIONS_OF = ("tensorflow-cpu", "tensorflow", "keras", "horovod", "openmpi", "ipyparallel", "numpy", "workbench")
VERSIONS_OF += ("kornia-rs", "pandas", "pillow", "scikit-learn", "scipy")


def project_root() -> Path:
    """The project's top folder: where notebooks/, data/ and results/ lie. Relative paths start here.

    It is the folder that holds this package, unless the environment variable WORKBENCH_ROOT names another.
    """
    return Path(os.environ.get("WORKBENCH_ROOT") or Path(__file__).parents[1]).resolve()


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN is refused, since JSON has none."""
    text = json.dumps(value, indent=2, allow_nan=False, default=str) + "\n"
    with written_whole(path) as part:
        part.write_text(text)


def read_json(path: str | os.PathLike, mend: str) -> Any:
    """Read what `write_json` wrote.

    Raises:
        FileNotFoundError: it is not there.
        WorkbenchError: it cannot be read, or could not be written again; its sentence ends with `mend`.
    """
    try:
        value = json.loads(Path(path).read_text())
        json.dumps(value, allow_nan=False)
    except FileNotFoundError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise WorkbenchError(f"{path} cannot be read ({error}): {mend}.") from None
    return value


def create_run(
    root: str | os.PathLike, name: str = "", *, label: str = "", recipe: str = "", parameters: Mapping | None = None
) -> Path:
    """Make `results/<name>/` with its record `run.json` and return the folder.

    Args:
        root: the project's top folder.
        name: letters, digits, dot, dash and underscore; it becomes the folder's name. Empty for a new one.
        label: what a new name begins with, before the time; empty for the recipe.
        recipe: which recipe the run follows; empty for a run by hand.
        parameters: the parameters of all its notebooks, kept in the record.

    Raises:
        WorkbenchError: the name is not a folder name, is taken, or results/ cannot be written.
    """
    if name:
        check_name(name)
    results = Path(root) / "results"
    try:
        results.mkdir(parents=True, exist_ok=True)
        for free in _free_names(name, label or recipe or "notebook"):
            folder = results / free
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                break
        else:
            raise WorkbenchError(
                f"The run `{name}` exists already ({folder}): choose another name, a run is never overwritten."
            )
        (folder / "figures").mkdir()
        (folder / "notebooks").mkdir()
    except OSError as error:
        raise WorkbenchError(
            f"Cannot make the run's folder in {results} ({error.strerror}): check that results/ can be written."
        ) from None
    provenance.keep_changes(root, folder)
    write_json(
        folder / "run.json",
        {
            "name": folder.name,
            "recipe": recipe,
            "status": "running",
            "started": now(),
            "ended": None,
            "parameters": dict(parameters or {}),
            "stages": {},
            "versions": versions(),
            "git": git_commit(root),
            "hosts": [socket.gethostname()],
        }
        | provenance.describe(root),
    )
    return folder


def check_name(name: str) -> None:
    """Raise a WorkbenchError if a name cannot be one of a run."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise WorkbenchError(
            f"`{name}` cannot name a run: use letters, digits, dots, dashes and underscores, beginning with a "
            "letter or a digit."
        )


def _free_names(name: str, label: str) -> Iterator[str]:
    """The name that is asked for, or else label and local time, with a number where several start in one second."""
    if name:
        yield name
        return
    name = f"{label}-{datetime.now():%Y%m%d-%H%M%S}"
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def read_run(folder: str | os.PathLike) -> dict:
    """Read a run's record.

    Raises:
        WorkbenchError: there is no record, or it is not one of a run.
    """
    path = Path(folder) / "run.json"
    try:
        record = read_json(path, "it was changed by hand; copy it again, or move the run's folder away")
    except FileNotFoundError:
        raise WorkbenchError(f"There is no run in {folder}: `workbench runs` lists those there are.") from None
    try:
        _check_record(record)
    except (TypeError, ValueError) as error:
        raise WorkbenchError(
            f"The run's record {path} is not one ({error}): it was changed by hand; copy it again, or move the run's "
            "folder away."
        ) from None
    return record


def _check_record(record: Any) -> None:
    """Raise a TypeError or ValueError if those who read a run's record could not count on it."""
    _require(record, dict, "it")
    for name in ("status", "started", "parameters", "stages"):
        if name not in record:
            raise ValueError(f"{name} is missing")
    for name, kind in _RECORD.items():
        if name in record:
            _require(record[name], kind, name)
    for name, stage in record["stages"].items():
        _require(stage, dict, name)
        _require(stage.get("status"), str, f"the status of {name}")
        _require(stage.get("seconds"), float, f"the seconds of {name}")
    for host in record.get("hosts", []):
        _require(host, str, "a host")
    for name in ("started", "ended"):
        if record.get(name) is not None and datetime.fromisoformat(record[name]).tzinfo is None:
            raise ValueError(f"{name} has no time zone")


def _require(value: Any, kind: type, name: str) -> None:
    """Raise a TypeError for a value of another kind; whole numbers pass as numbers, but for enormous ones."""
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, int) and abs(value) >= 2**63):
        kinds = {dict: "an object", list: "a list", str: "a text", int: "a whole number", float: "a number"}
        raise TypeError(f"{name} is not {kinds[kind]}")


def update_run(folder: str | os.PathLike, **changes: Any) -> dict:
    """Change entries of a run's record and return the record. Dictionaries are merged one level deep."""
    record = read_run(folder)
    for key, value in changes.items():
        record[key] = record.get(key, {}) | value if isinstance(value, dict) else value
    write_json(Path(folder) / "run.json", record)
    return record


def locked(folder: str | os.PathLike):
    """Hold a run for the time of a block, so that no second process carries it on. Raises as `files.held`."""
    return held(Path(folder) / RUN_LOCK, f"The run {Path(folder).name}")


def is_written(folder: str | os.PathLike) -> bool:
    """Whether a process is carrying a run on now; one that says `running` without this was broken off."""
    return any(is_held(Path(folder) / name) for name in (RUN_LOCK, TRAINING_LOCK))


def has_checkpoint(folder: str | os.PathLike) -> bool:
    """Whether a run can be resumed in the middle of its training."""
    return any(Path(folder).glob("checkpoint/*.npz"))


def how_to_resume(folder: str | os.PathLike) -> str:
    """What to do when the training of a run was broken off, as a sentence."""
    name = Path(folder).name
    return f"Complete epochs are kept: go on with `workbench run --resume {name}`, or here with `resume` and `run` set."


def open_run(
    root: str | os.PathLike, name: str = "", *, resume: bool = False, parameters: Mapping | None = None
) -> Path:
    """The folder for notebook 03 to train into: the run that is named, or a new one.

    A batch run exists already and has no history yet. A run that has one is only given out to `resume` it.

    Raises:
        WorkbenchError: the run has been trained already and is not to be resumed, or there is none to resume.
    """
    folder = Path(root) / "results" / name
    if resume:
        folder = find_run(root, name, having="checkpoint")
        if not has_checkpoint(folder):
            raise WorkbenchError(f"The run `{folder.name}` has no complete epoch to resume from: start a new run.")
        return folder
    if not name or not os.path.exists(folder / "run.json"):  # unlike Path's, False for what can be no path
        return create_run(root, name, parameters=parameters)
    if (folder / "history.csv").exists():
        raise WorkbenchError(f"The run `{name}` has been trained already: choose another name, or set `resume`.")
    return folder


def find_run(root: str | os.PathLike, name: str = "", *, having: str = "run.json") -> Path:
    """The folder of the run that is named, or of the newest run that has the file `having`.

    Raises:
        WorkbenchError: no such run, or it lacks that file.
    """
    results = Path(root) / "results"
    if name:
        folder = results / name
        read_run(folder)
        if not (folder / having).exists():
            raise WorkbenchError(f"The run `{name}` has no {having} yet: run the earlier notebooks on it first.")
        return folder
    found = {}
    for path in results.glob("*/run.json"):
        with contextlib.suppress(WorkbenchError):  # a broken record hides no other run
            started = read_run(path.parent).get("started")
            if isinstance(started, str) and (path.parent / having).exists():
                found[path.parent] = started
    if not found:
        raise WorkbenchError(
            f"No run under {results} has {having}: run notebook 03_train first, or `workbench run synthetic`."
        )
    return max(found, key=found.get)


def read_metrics(folder: str | os.PathLike) -> dict:
    """A run's `metrics.json`, or an empty dictionary as long as it has none.

    Raises:
        WorkbenchError: it is there and cannot be read, or is not one of metrics.
    """
    path = Path(folder) / "metrics.json"
    try:
        metrics = read_json(path, "run notebook 04 on this run again")
    except FileNotFoundError:
        return {}
    try:
        _require(metrics, dict, "it")
        test = metrics.get("test", {})
        for name in ("mean_auroc", "ci_low", "ci_high"):
            if test.get(name) is not None:
                _require(test[name], float, name)
        _require(test.get("findings", 0), int, "findings")
        for finding in test.get("undefined", []):
            _require(finding, str, "undefined")
        for finding, told in test.get("per_finding", {}).items():
            if told and told.get("threshold") is not None:
                _require(told["threshold"], float, f"the threshold of {finding}")
    except (AttributeError, TypeError) as error:
        raise WorkbenchError(f"{path} is not one of metrics ({error}): run notebook 04 on this run again.") from None
    return metrics


def skipped_images(folder: str | os.PathLike) -> list[str]:
    """The images that a run left out of training and predictions, as damaged: those of its `skipped.csv`, if any.

    Raises:
        WorkbenchError: it cannot be read, or has a line without an image.
    """
    path = Path(folder) / "skipped.csv"
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            names = [row.get("image") for row in csv.DictReader(file)]
        if None in names:
            raise ValueError(f"line {names.index(None) + 2} names no image")
    except (ValueError, OSError, csv.Error) as error:
        raise WorkbenchError(f"{path} cannot be read ({error}): copy it again, or train again.") from None
    return names


def list_runs(root: str | os.PathLike):
    """All runs as one table, the newest first.

    Returns:
        A DataFrame with `run`, `recipe`, `status`, `started`, `minutes`, `workers`, `images_per_second` and
        `mean_auroc` (test split; NaN where a run has not come so far).
    """
    import pandas as pd

    rows = []
    for path in Path(root).glob("results/*/run.json"):
        folder = path.parent
        try:
            rows.append(_row(folder))
        except (WorkbenchError, ValueError, TypeError, KeyError, AttributeError):
            rows.append({"run": folder.name, "recipe": "", "status": "unreadable", "started": ""})
    columns = ["run", "recipe", "status", "started", "minutes", "workers", "images_per_second", "mean_auroc"]
    table = pd.DataFrame(rows, columns=columns).sort_values("started", ascending=False, ignore_index=True)
    for name in columns[4:]:
        table[name] = pd.to_numeric(table[name])
    return table.astype({"workers": "Int64"})


def _row(folder: Path) -> dict:
    """A run's row of `list_runs`; raises one of several errors if the record is of other kinds than we write."""
    record, metrics = read_run(folder), read_metrics(folder)
    texts = {name: one_line(str(record.get(name) or "")) for name in ("recipe", "status", "started")}
    if texts["status"] == "running" and not is_written(folder):
        texts["status"] = "broken off"
    numbers = {
        "minutes": minutes(record),
        "workers": record.get("world_size"),
        "images_per_second": record.get("images_per_second"),
        "mean_auroc": metrics.get("test", {}).get("mean_auroc"),
    }
    numbers = {name: None if value is None else float(value) for name, value in numbers.items()}
    if numbers["workers"] not in (None, *range(100_000)):
        raise ValueError("not a number of workers")
    return {"run": folder.name} | texts | numbers


def minutes(record: Mapping) -> float | None:
    """How long a run took: the sum of its stages, or for a run by hand from start to end; None while it runs."""
    if not record.get("ended"):
        return None
    if record.get("stages"):
        return round(sum(stage["seconds"] for stage in record["stages"].values()) / 60, 1)
    took = datetime.fromisoformat(record["ended"]) - datetime.fromisoformat(record["started"])
    return round(max(took.total_seconds(), 0) / 60, 1)  # clocks are set back now and then


def save_figure(axes, folder: str | os.PathLike | None, name: str) -> None:
    """Save the figure of some axes as `<folder>/figures/<name>.png`; with no folder, do nothing.

    Args:
        axes: what a function of `workbench.analysis.plots` returned: axes, an array of axes, or a figure.
        folder: the run's folder, or None when a notebook is used without a run.
        name: the file's name without suffix.
    """
    if folder is None:
        return
    target = Path(folder) / "figures" / f"{name}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    save_chart(axes, target)


def save_chart(axes, path: str | os.PathLike) -> None:
    """Save the figure of some axes as a PNG file, whole or not at all."""
    first = axes if hasattr(axes, "savefig") else getattr(axes, "flat", [axes])[0]
    figure = first if hasattr(first, "savefig") else first.figure
    with written_whole(path) as part:
        figure.savefig(part, dpi=150, bbox_inches="tight")


def versions() -> dict[str, str]:
    """The versions of Python and of the packages a result may depend on, as installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(root: str | os.PathLike) -> str | None:
    """The project's commit, with `+changes` where the working tree differs from it; None outside git."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """The time of day in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
