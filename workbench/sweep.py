"""A grid of settings, one run a point: goes on after any break, and tables the results.

Each point is an ordinary run under results/, named by the sweep and its settings, in a `workbench run` process of its
own: one that fails, crashes or is killed for memory stops no other. The same call again leaves what is finished,
resumes what broke off and begins what is missing.

    from workbench import runs, sweep
    root, grid = runs.project_root(), sweep.parse_grid(["learning_rate=0.001,0.0003", "seed=0,1,2"])
    points = sweep.plan_sweep(root, "synthetic", grid, name="rates")
    table = sweep.run_sweep(root, "rates", points, at_once=2)       # also results/sweeps/rates.csv and .png
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from workbench import Interrupted, WorkbenchError, batch, one_line, runs
from workbench.data import synthetic
from workbench.files import held, written_whole
from workbench.training.guard import PR_SET_PDEATHSIG

LOG = "run.log"  # in a run's folder: what its process said
PATIENCE = 120.0  # seconds for a process of a sweep that was killed to leave its run
# Of notebook 02, but without influence on what the shards hold.
NOT_IN_SHARDS = ("run", "shard_folder", "processes", "missing_images")


@dataclass(frozen=True)
class Point:
    """A point of the grid: its recipe, its run's name, what the grid says of it, and all parameters, checked."""

    recipe: str
    name: str
    setting: dict[str, Any]
    parameters: dict[str, Any]

    def __str__(self) -> str:
        return " ".join(f"{name}={_text(value)}" for name, value in self.setting.items())


def parse_grid(words: Sequence[str]) -> dict[str, list]:
    """`["learning_rate=0.001,0.0003", "seed=0,1"]` -> a dictionary of lists; values are YAML, separated by commas.

    Raises:
        WorkbenchError: a word is not of that form, has no value, or a name stands twice.
    """
    grid: dict[str, list] = {}
    for word in words:
        name, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not name:
            raise WorkbenchError(f"`--grid {word}` is not of the form KEY=VALUE,VALUE, such as `--grid seed=0,1,2`.")
        try:
            values = yaml.safe_load(f"[{text}]")
        except Exception:  # besides its own, PyYAML lets pass what a value's type raises
            values = None
        if not isinstance(values, list) or not values or None in values:
            raise WorkbenchError(f"`--grid {word}` has an empty or unreadable value: write {name}=VALUE,VALUE.")
        if name in grid:
            raise WorkbenchError(f"`{name}` stands twice in --grid: give all its values at once, separated by commas.")
        grid[name] = values
    return grid


def name_of(recipe: str) -> str:
    """What a sweep is called that is given no name."""
    return f"{Path(recipe).stem}-sweep"


def plan_sweep(
    root: Path, recipe: str, grid: Mapping[str, list], *, overrides: Mapping[str, Any] | None = None, name: str = ""
) -> list[Point]:
    """The points of a grid, each checked, none begun; the last name of the grid changes first.

    Where the grid changes what shards hold (`image_size`, or `seed`, which also draws the validation patients), each
    such setting gets a shard folder of its own, which the points that agree in it share.

    Raises:
        WorkbenchError: what `batch.check_parameters` refuses, a name that --set has too, two equal points, or a run of
            a point's name with other parameters.
    """
    label, chosen = batch.read_recipe(root, recipe)
    chosen |= dict(overrides or {})
    name = name or name_of(recipe)
    runs.check_name(name)
    if not grid:
        raise WorkbenchError("The grid is empty: name a parameter and its values, as in `--grid seed=0,1,2`.")
    if both := sorted(set(grid) & set(overrides or {})):
        raise WorkbenchError(f"`{both[0]}` stands in --grid and in --set: leave it out of one of the two.")
    known = batch.known_parameters(root)
    in_shards = known["02_write_shards"].keys() - set(NOT_IN_SHARDS)
    numbers = {key for stage in known.values() for key, value in stage.items() if isinstance(value, float)}
    points: list[Point] = []
    for values in itertools.product(*grid.values()):
        parameters = batch.check_parameters(root, chosen | dict(zip(grid, values, strict=True)), where=label)
        # One number, one name, however it was written.
        setting = {key: float(parameters[key]) if key in numbers else parameters[key] for key in grid}
        parameters |= setting
        if "shard_folder" not in grid and (own := {key: setting[key] for key in grid if key in in_shards}):
            parameters["shard_folder"] = _name(parameters.get("shard_folder", ""), own)
        if "synthetic_patients" in grid and "data_folder" not in grid:
            own = {"synthetic_patients": setting["synthetic_patients"]}
            parameters["data_folder"] = _name(parameters["data_folder"], own)
        point = Point(label, _name(name, setting), setting, parameters)
        if equal := next((other for other in points if other.setting == setting), None):
            raise WorkbenchError(f"The grid has the point {equal} twice: give each value once.")
        _check_unchanged(root, point)
        points.append(point)
    return points


def _name(before: str, setting: Mapping[str, Any]) -> str:
    """The name that a setting makes: the same every time, readable where that is short, else told apart by a hash."""
    parts = [before]
    for key, value in setting.items():
        text = _text(value)
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:30]
        parts += [key, plain if plain == text else f"{plain}_{_digest(text)}"]
    name = "-".join(parts)
    return name if len(name) <= 150 else f"{before}-{_digest(name)}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _check_unchanged(root: Path, point: Point) -> None:
    folder = root / "results" / point.name
    if not (folder / "run.json").exists():
        return
    had = runs.read_run(folder)["parameters"]
    changed = [key for key, value in point.parameters.items() if had.get(key, value) != value]
    if changed:
        key = changed[0]
        raise WorkbenchError(
            f"The run `{point.name}` exists with {key}={_text(had[key])}, not {_text(point.parameters[key])}: choose "
            "another --name, a run is never overwritten."
        )


def status_of(root: Path, point: Point) -> str:
    """What has become of a point: "missing", "finished", "running", "failed", "interrupted" or "broken off"."""
    folder = root / "results" / point.name
    if not (folder / "run.json").exists():
        return "missing"
    status = runs.read_run(folder)["status"]
    return "broken off" if status == "running" and not runs.is_written(folder) else status


def run_sweep(root: Path, name: str, points: Sequence[Point], *, at_once: int = 1) -> pd.DataFrame:
    """Begin or resume every point that is not finished, and write and return the table of all.

    Args:
        root: the project's top folder.
        name: the sweep's, of its table and picture in results/sweeps/.
        points: of `plan_sweep`.
        at_once: how many points may run at a time; with a Slurm cluster, how many jobs may wait or run.

    Raises:
        Interrupted: on Ctrl-C, when the points that ran have ended.
        WorkbenchError: points failed, which are named; or another process is carrying this sweep on.
    """
    if at_once < 1:
        raise WorkbenchError(f"`--at-once {at_once}`: at least one point has to run at a time.")
    sweeps = root / "results" / "sweeps"
    try:
        sweeps.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkbenchError(f"{sweeps} cannot be made ({error.strerror}): allow writing in results/.") from None
    with held(sweeps / f".{name}.lock", f"The sweep {name}"):
        _make_data(root, points)
        told = _run_points(root, points, at_once)
        table = table_of(root, points)
        _write(sweeps / name, table, list(points[0].setting))
    if told["stopped"]:
        left = (table["status"] != "finished").sum()
        raise Interrupted(f"Interrupted, {left} of {len(points)} points are left; go on with the same command.")
    if failed := [point for point in points if status_of(root, point) != "finished"]:
        named = ", ".join(f"`{point.name}`" for point in failed)
        raise WorkbenchError(
            f"{len(failed)} of {len(points)} points failed: {named}. Look at {LOG} and notebooks/ in the run's folder, "
            f"such as {root / 'results' / failed[0].name / LOG}; the same command tries them again."
        )
    return table


def _make_data(root: Path, points: Sequence[Point]) -> None:
    """Write the made-up data by the first point that wants it, so that the order of running does not decide it."""
    for point in points:
        given = point.parameters
        if given.get("synthetic_patients") and not given.get("table") and not (root / given["data_folder"]).exists():
            synthetic.write_synthetic(
                root / given["data_folder"], patients=given["synthetic_patients"], seed=given["seed"], progress=False
            )


def _run_points(root: Path, points: Sequence[Point], at_once: int) -> dict:
    number = {point.name: f"[{place}/{len(points)}] {point}" for place, point in enumerate(points, 1)}
    waiting, running, began = deque(points), {}, time.monotonic()
    with _stopping(running) as asked:
        try:
            while running or (waiting and not asked):
                for _ in range(len(waiting) if len(running) < at_once and not asked else 0):
                    point = waiting.popleft()
                    status = status_of(root, point)
                    if status == "running" and time.monotonic() - began < PATIENCE:
                        waiting.append(point)  # of a sweep that was killed: its process is about to end
                    elif status == "finished":
                        print(f"{number[point.name]}: was finished; {_results(root, point)}", flush=True)
                    elif process := _start(root, point, status, number[point.name]):
                        running[point.name] = process
                        break
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    process, point = running.pop(name), next(point for point in points if point.name == name)
                    told = _ending(root, point, process.returncode)
                    print(f"{number[name]}: {told}{_time_left(root, points, at_once)}", flush=True)
                time.sleep(0.1)
        finally:
            # Empty, unless this raised.
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    return {"stopped": bool(asked)}


@contextlib.contextmanager
def _stopping(running: dict[str, subprocess.Popen]) -> Iterator[list]:
    """On Ctrl-C and SIGTERM ask every point to end, as Ctrl-C would; a second one ends its notebook at once."""
    asked: list[int] = []

    def ask(number: int, _frame) -> None:
        if not asked:
            print("ending what runs; what is complete is kept ...", flush=True)
        asked.append(number)
        for process in list(running.values()):
            process.terminate()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(root: Path, point: Point, status: str, shown: str) -> subprocess.Popen | None:
    folder = root / "results" / point.name
    try:
        if status == "missing":
            # Without a record it is what a killed process left of making it, or nobody's run.
            if folder.exists() and not any(path.is_file() for path in folder.rglob("*") if path.suffix != ".patch"):
                shutil.rmtree(folder)
            runs.create_run(root, point.name, recipe=point.recipe, parameters=point.parameters)
        log = (folder / LOG).open("ab")
    except (WorkbenchError, OSError) as error:
        print(f"{shown}: failed: {one_line(str(error))}", flush=True)
        return None
    print(f"{shown}: {'begins' if status == 'missing' else f'resumes, was {status}'}; {folder / LOG}", flush=True)
    prctl, parent = ctypes.CDLL(None, use_errno=True).prctl, os.getpid()

    def end_with_parent() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    command = [sys.executable, "-m", "workbench", "run", "--resume", point.name]
    with log:
        # A session of its own: Ctrl-C in the terminal comes once, through this process.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=end_with_parent,
        )  # fmt: skip


def _ending(root: Path, point: Point, returned: int) -> str:
    """How the process of a point ended, as its progress line says it."""
    status = status_of(root, point)
    if status == "finished":
        return f"finished in {_minutes(root, point):.1f} minutes, {_results(root, point)}"
    if returned < 0:
        said = f"its process was ended by {signal.Signals(-returned).name}, perhaps for lack of memory"
    else:
        with (root / "results" / point.name / LOG).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            lines = log.read().decode(errors="replace").split("\n")
        said = next((one_line(line.strip()) for line in reversed(lines) if line.strip()), "it said nothing")
    return f"{status}: {said.removeprefix('workbench: ')} ({root / 'results' / point.name / LOG})"


def _results(root: Path, point: Point) -> str:
    row = _row(root, point)
    if pd.isna(row["test_auroc"]):
        return "without a score"
    return (
        f"AUROC {row['val_auroc']:.4f} on validation, {row['test_auroc']:.4f} [{row['ci_low']:.4f}, "
        f"{row['ci_high']:.4f}] on test"
    )


def _time_left(root: Path, points: Sequence[Point], at_once: int) -> str:
    """The time that is left, at the mean of those that are finished."""
    states = {point.name: status_of(root, point) for point in points}
    left = sum(status in ("missing", "running") for status in states.values())
    took = [_minutes(root, point) for point in points if states[point.name] == "finished"]
    if not left:
        return ""
    about = f", about {left * sum(took) / len(took) / at_once:.1f} minutes" if took else ""
    return f"; {left} left{about}"


def _minutes(root: Path, point: Point) -> float:
    return runs.minutes(runs.read_run(root / "results" / point.name)) or 0.0


def _row(root: Path, point: Point) -> dict[str, Any]:
    folder = root / "results" / point.name
    record = runs.read_run(folder) if (folder / "run.json").exists() else {}
    metrics = runs.read_metrics(folder)
    test = metrics.get("test", {})
    return {
        "best_epoch": record.get("best_epoch"),
        "val_auroc": metrics.get("val", {}).get("mean_auroc"),
        "test_auroc": test.get("mean_auroc"),
        "ci_low": test.get("ci_low"),
        "ci_high": test.get("ci_high"),
        "images_per_second": record.get("images_per_second"),
        "minutes": runs.minutes(record),
    }


def table_of(root: Path, points: Sequence[Point]) -> pd.DataFrame:
    """The results of all points, the best validation AUROC first: choosing by the test split would flatter it.

    Returns:
        A row a point: `run`, a column for each name of the grid, `status`, `best_epoch`, `val_auroc`, `test_auroc` with
        its 95 % interval `ci_low` to `ci_high`, `images_per_second`, `minutes`; NaN where a point has not come so far.
    """
    rows = []
    for point in points:
        # A list has no place in a cell.
        shown = {key: _text(value) if isinstance(value, list) else value for key, value in point.setting.items()}
        rows.append({"run": point.name} | shown | {"status": status_of(root, point)} | _row(root, point))
    table = pd.DataFrame(rows)
    numbers = list(table.columns[table.columns.get_loc("status") + 1 :])
    table[numbers] = table[numbers].apply(pd.to_numeric)
    return table.astype({"best_epoch": "Int64"}).sort_values(
        "val_auroc", ascending=False, kind="stable", ignore_index=True
    )


def over_seeds(table: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Mean and spread over the seeds of each setting: a row a setting, the best mean on validation first.

    Args:
        table: of `table_of`.
        names: the grid's, with `seed` among them.

    Returns:
        The other names' columns, `seeds` (finished ones), and `val_auroc`, `test_auroc`, `images_per_second`,
        `minutes`, each with its sample standard deviation `…_sd` (NaN for one seed).
    """
    others = [name for name in names if name != "seed"]
    done = table[table["status"] == "finished"]
    groups = done.groupby(others, sort=False) if others else done.groupby(lambda _: "all")
    answer = groups.agg(seeds=("seed", "size"))
    for name in ("val_auroc", "test_auroc", "images_per_second", "minutes"):
        answer = answer.assign(**{name: groups[name].mean(), f"{name}_sd": groups[name].std()})
    return answer.sort_values("val_auroc", ascending=False, kind="stable").reset_index(drop=not others)


def _write(path: Path, table: pd.DataFrame, names: list[str]) -> None:
    """Write and print the tables, and draw them, where points have come so far."""
    tables = {path.with_name(f"{path.name}.csv"): table}
    if "seed" in names and (table["status"] == "finished").any():
        tables[path.with_name(f"{path.name}-over-seeds.csv")] = over_seeds(table, names)
    for place, content in tables.items():
        with written_whole(place) as part:
            content.to_csv(part, index=False)
        print(f"\n{content.to_string(index=False, na_rep='', float_format=lambda value: f'{value:.4g}')}\n{place}")
    if table["test_auroc"].notna().any():
        from workbench.analysis import plots

        runs.save_chart(plots.plot_sweep(table, names), path.with_name(f"{path.name}.png"))
        print(path.with_name(f"{path.name}.png"), flush=True)
