"""A recipe through the five notebooks, headless, by papermill.

A recipe is a flat YAML file over the names in the notebooks' cells tagged `parameters`; what it leaves out keeps
the notebooks' own values. Executed notebooks, figures and the record go to the run's folder.

    from workbench import batch, runs
    folder = batch.run_recipe(runs.project_root(), "synthetic", overrides={"epochs": 3}, name="short")
    folder = batch.resume_run(runs.project_root(), "short")       # after a break or a failed stage
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import logging
import math
import os
import reprlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError

from workbench import Interrupted, WorkbenchError, provenance, report, runs
from workbench.training import sites
from workbench.training.config import TrainConfig

# What each notebook is for, as the progress line says it.
STAGES = {
    "01_explore_dataset": "what is in the data",
    "02_write_shards": "images to shards",
    "03_train": "train on MPI ranks",
    "04_evaluate": "AUROC and curves",
    "05_scaling": "throughput by number of workers",
}
# Of notebook 04; the modules that use them check them again.
CHOICES = {
    "threshold_rule": ("youden", "sensitivity", "f1"),
    "calibration_method": ("platt", "temperature"),
    "averaged_views": ("flip", "ten-crop"),
}
# Set by the stages themselves, not by recipes.
OWN = ("run", "resume")


def run_recipe(
    root: Path, recipe: str, *, overrides: Mapping[str, Any] | None = None, name: str = "", first: str = ""
) -> Path:
    """Carry a recipe through the notebooks in a new run.

    Args:
        root: the project's top folder.
        recipe: a name in notebooks/recipes/, or the path of a YAML file.
        overrides: parameters that replace the recipe's.
        name: the run's name; empty for recipe and time.
        first: the stage to begin with, such as "03_train" or "03" (shards must be there); empty for all.

    Returns:
        The run's folder.

    Raises:
        WorkbenchError: an unknown recipe, key or stage, a value of another kind, a taken name, a failed stage.
    """
    label, chosen = read_recipe(root, recipe)
    parameters = check_parameters(root, chosen | dict(overrides or {}), where=label)
    stages = _from(first)
    folder = runs.create_run(root, name, recipe=label, parameters=parameters)
    return execute(root, folder, parameters, stages)


def resume_run(root: Path, name: str, *, overrides: Mapping[str, Any] | None = None, first: str = "") -> Path:
    """Go on with a run from its first stage that is not finished, or from the stage that is named.

    Training goes on after its last complete epoch. Raises and returns as `run_recipe`, and a WorkbenchError if another
    process is carrying the run on now.
    """
    folder = runs.find_run(root, name)
    name, record = folder.name, runs.read_run(folder)
    parameters = check_parameters(root, record["parameters"] | dict(overrides or {}), where=f"the run {name}")
    left = next((stage for stage, told in record["stages"].items() if told["status"] != "finished"), None)
    if not first and left is None and record["status"] == "finished":
        raise WorkbenchError(f"The run `{name}` is finished: nothing is left to resume, unless you say --from STAGE.")
    now = provenance.describe(root) | {"versions": runs.versions(), "git": runs.git_commit(root)}
    for phrase in provenance.differences(record, now):
        print(f"not as when the run began: {phrase}")
    # A run that was killed before its first stage begins with that; one after its last, with nothing but its end.
    stages = _from(first or left or "") if first or left or not record["stages"] else []
    return execute(root, folder, parameters, stages)


def read_recipe(root: Path, recipe: str) -> tuple[str, dict]:
    """A recipe's name and its parameters, read safely from YAML. Raises a WorkbenchError if it is none."""
    path = Path(recipe) if recipe.endswith((".yml", ".yaml")) else root / "notebooks" / "recipes" / f"{recipe}.yml"
    if not os.path.isfile(path):  # unlike Path's, False for what can be no path
        raise WorkbenchError(
            f"There is no recipe `{recipe}`: choose one of {', '.join(recipes(root))}, or a .yml file."
        )
    try:
        content = yaml.safe_load(path.read_text())
    except Exception as error:  # besides its own, PyYAML lets pass what a value's type raises
        raise WorkbenchError(f"The recipe {path} is not YAML ({error}): write `name: value`, one a line.") from None
    if content is None:
        content = {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise WorkbenchError(f"The recipe {path} is not a list of `name: value` lines: it has to be flat YAML.")
    return path.stem, content


def recipes(root: Path) -> dict[str, str]:
    """The recipes that come with the workbench: name -> the first line of its head comment."""
    found = {}
    for path in sorted((root / "notebooks" / "recipes").glob("*.yml")):
        found[path.stem] = path.read_text().splitlines()[0].lstrip("# ").strip()
    return found


def known_parameters(root: Path) -> dict[str, dict[str, Any]]:
    """Every notebook's parameters with their values as committed: stage -> {name: value}."""
    known = {}
    for stage in STAGES:
        cells = nbformat.read(root / "notebooks" / f"{stage}.ipynb", as_version=4).cells
        source = next(cell.source for cell in cells if "parameters" in cell.metadata.get("tags", []))
        # Assignments of literals: read, never executed.
        known[stage] = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(source).body}
    return known


def check_parameters(root: Path, chosen: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """All parameters of all notebooks: the chosen ones checked for name and kind, the rest as committed."""
    defaults: dict[str, Any] = {}
    for stage in known_parameters(root).values():
        defaults |= stage
    checked = dict(chosen)
    for name, value in chosen.items():
        if name not in defaults or (name in OWN and value not in ("", False, defaults[name])):
            names = sorted(set(defaults) - set(OWN))
            close = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean `{close[0]}`?)" if close else ""
            raise WorkbenchError(f"`{name}` of {where} is no parameter{hint}; the parameters are {', '.join(names)}.")
        expected = type(defaults[name])
        value = checked[name] = _number(value) if expected is float else value
        if not _fits(value, defaults[name]):
            raise WorkbenchError(
                f"`{name}` of {where} is {_short(value)}: expected {_kind(expected)}, such as {defaults[name]!r}."
            )
    # What the training would refuse is refused before the shards are written.
    if defaults.keys() >= {"shard_folder", "workers"}:
        TrainConfig.from_parameters(defaults | checked)
        for name, least in (("workers", 0), ("measured_steps", 1), ("hang_limit", 5)):
            if (value := (defaults | checked)[name]) < least:
                raise WorkbenchError(f"`{name}` of {where} is {value}: it has to be {least} or more.")
        site = sites.read_site(root, (defaults | checked).get("cluster_name", "local"))
        site.check_workers((defaults | checked)["workers"] or site.slots)
    # And what the evaluation would refuse, before hours of training.
    for name, choices in CHOICES.items():
        if (value := checked.get(name, choices[0])) not in choices:
            raise WorkbenchError(f"`{name}` of {where} is {value!r}: choose from {', '.join(choices)}.")
    return defaults | checked


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a notebook's own, and such that JSON and a notebook can hold it."""
    if isinstance(default, list):
        like = default[0] if default else ""
        return isinstance(value, list) and (bool(value) or not default) and all(_fits(item, like) for item in value)
    if isinstance(default, str):
        return isinstance(value, str) and value.isprintable()
    if isinstance(default, bool):
        return isinstance(value, bool)
    if type(value) is int:
        return -(2**63) <= value < 2**63
    return isinstance(default, float) and type(value) is float and math.isfinite(value)


def _short(value: Any) -> str:
    """A value as it is written, cut short: through aliases a few lines of YAML make one of gigabytes."""
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxstring, shown.maxother = 2, 200, 200
    try:
        return shown.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _number(value: Any) -> Any:
    """YAML 1.1 takes `1e-3`, without a point, for a text; here it is the number that was meant."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`["epochs=3", "findings=[Edema]"]` -> a dictionary; values are YAML. Raises a WorkbenchError without `=`."""
    parsed = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise WorkbenchError(f"`--set {setting}` is not of the form KEY=VALUE, such as `--set epochs=3`.")
        try:
            parsed[name.strip()] = yaml.safe_load(value) if value.strip() else ""
        except Exception:  # as above
            raise WorkbenchError(f"The value of `--set {setting}` cannot be read: quote it.") from None
    return parsed


def execute(
    root: Path, folder: Path, parameters: dict, stages: list[str], *, after: Callable[[str], None] | None = None
) -> Path:
    """Carry a run that has been made through these stages; `after` is called with each one that is done."""
    with runs.locked(folder):
        runs.update_run(folder, status="running", ended=None, parameters=parameters)
        with _unwatched():
            _execute(root, folder, parameters, stages, after)
        runs.update_run(folder, status="finished", ended=runs.now())
        report.write_report(folder)
    return folder


@contextlib.contextmanager
def _unwatched() -> Iterator[None]:
    """What kernels that nobody looks at are started with; afterwards this process is as it was."""
    # The kernel of this environment, whatever kernels the user has installed elsewhere.
    wanted = {"WORKBENCH_PLAIN_PROGRESS": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    # A kernel that is shut down while its last message arrives is no error, but tornado would print it as one.
    log = logging.getLogger("tornado.general")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _execute(root: Path, folder: Path, parameters: dict, stages: list[str], after: Callable | None) -> None:
    known = known_parameters(root)
    done = runs.read_run(folder)["stages"]
    planned = {stage: {"status": "planned", "seconds": 0.0} for stage in stages}
    runs.update_run(folder, stages={name: (done | planned)[name] for name in STAGES if name in done | planned})
    print(f"run {folder.name}: {len(stages)} notebooks, into {folder}", flush=True)
    # One for all stages: what is asked for between two of them is heard by the next.
    with _interrupts() as interrupts:
        for stage in stages:
            given = {name: parameters[name] for name in known[stage] if name in parameters} | {"run": folder.name}
            if "resume" in known[stage]:
                given["resume"] = runs.has_checkpoint(folder)
            # What an attempt before this one took counts as well.
            _execute_stage(root, folder, stage, given, interrupts, took=done.get(stage, {}).get("seconds", 0.0))
            if after:
                after(stage)


def _execute_stage(root: Path, folder: Path, stage: str, given: dict, interrupts: _Interrupts, *, took: float) -> None:
    """Execute one notebook and record how that ended, with the seconds that it `took` before and now."""
    shown, began = f"[{list(STAGES).index(stage) + 1}/{len(STAGES)}] {stage}", time.monotonic()
    print(f"{shown}: {STAGES[stage]}", flush=True)

    def record(how: str, **run: Any) -> float:
        seconds = round(took + time.monotonic() - began, 1)
        runs.update_run(folder, **run, stages={stage: {"status": how, "seconds": seconds}})
        return seconds

    try:
        interrupts.check()
        _execute_notebook(root, folder, stage, given, interrupts)
    except BaseException as error:
        stopped = bool(interrupts.asked)
        if isinstance(error, OSError) and not stopped:
            # A full disk, most often, on which the record could not be changed either.
            raise WorkbenchError(
                f"{stage} cannot be written ({error.strerror or error}): make room or allow writing in {folder}, "
                f"and go on with `workbench run --resume {folder.name}`."
            ) from None
        status = "interrupted" if stopped else "failed"
        record(status, status=status, ended=runs.now())
        if stopped:
            raise Interrupted(_interruption(folder, stage, error)) from None
        if not isinstance(error, PapermillExecutionError | DeadKernelError):
            raise
        raise WorkbenchError(_failure(folder, stage, error)) from None
    print(f"{shown}: done in {record('finished'):.0f} s", flush=True)


class _Interrupts:
    """What happens on Ctrl-C, and on a batch system's SIGTERM, while a notebook is executed.

    The first one interrupts the notebook, as JupyterLab's stop button does; the second ends its kernel, and with it
    everything that it started.
    """

    def __init__(self):
        self.asked, self.kernel = 0, None  # how often; the process of the kernel that runs now, if one does

    def ask(self, _number, _frame) -> None:
        self.asked += 1
        if self.asked > (2 if self.kernel else 1):
            raise KeyboardInterrupt
        # A kernel that has ended in the meantime is told by its absence.
        with contextlib.suppress(ProcessLookupError):
            if self.kernel:
                os.kill(self.kernel, signal.SIGINT if self.asked == 1 else signal.SIGKILL)

    def check(self) -> None:
        """Between two cells a kernel does not listen, and between two notebooks there is none."""
        if self.asked:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _interrupts() -> Iterator[_Interrupts]:
    interrupts = _Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.signal(number, interrupts.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _execute_notebook(root: Path, folder: Path, stage: str, given: dict, interrupts: _Interrupts) -> None:
    try:
        papermill.execute_notebook(
            root / "notebooks" / f"{stage}.ipynb",
            folder / "notebooks" / f"{stage}.ipynb",
            parameters=given,
            cwd=root / "notebooks",
            kernel_name="python3",
            engine_name="announcing",
            before_cell=interrupts.check,
            progress_bar=False,
            # What the kernel's own log says (its transport, the interrupt at its end) is nothing to the reader.
            extra_arguments=["--log-level=CRITICAL"],
            stdout_file=_Indented(sys.stdout),
            kernel_manager_class=_logged_kernel(folder / "notebooks" / f"{stage}.log", interrupts),
        )
    finally:
        interrupts.kernel = None


def _logged_kernel(path: Path, interrupts: _Interrupts) -> type[AsyncKernelManager]:
    """Kernels whose own stderr goes to a file: what libraries say while a kernel ends is nothing to the reader."""

    class LoggedKernel(AsyncKernelManager):
        async def start_kernel(self, **settings):
            with path.open("wb") as log:
                await super().start_kernel(**settings, stderr=log)
            interrupts.kernel = self.provisioner.pid

    return LoggedKernel


class _AnnouncingEngine(NBClientEngine):
    """papermill's own engine, which also prints each section's heading as the notebook reaches it."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, before_cell, **settings):
        start_cell = nb_man.cell_start

        def announcing(cell, cell_index=None, **rest):
            before_cell()
            if cell.cell_type == "markdown" and cell.source.startswith("## "):
                print(f"      {cell.source.splitlines()[0].lstrip('# ')}", flush=True)
            start_cell(cell, cell_index, **rest)

        nb_man.cell_start = announcing
        return super().execute_managed_notebook(nb_man, kernel_name, **settings)


papermill_engines.register("announcing", _AnnouncingEngine)


class _Indented:
    """A text stream that sets what notebooks print in from the stages' own lines."""

    def __init__(self, stream):
        self._stream, self._fresh = stream, True

    def write(self, text: str) -> None:
        # A progress bar that draws over itself becomes a line each time.
        for line in text.replace("\r", "\n").splitlines(keepends=True):
            if line == "\n" and self._fresh:
                continue
            self._stream.write(("        " if self._fresh and line.strip() else "") + line)
            self._fresh = line.endswith("\n")

    def flush(self) -> None:
        self._stream.flush()


def _from(first: str) -> list[str]:
    if not first:
        return list(STAGES)
    matching = [stage for stage in STAGES if stage.startswith(first) or stage[3:].startswith(first)]
    if len(matching) != 1:
        raise WorkbenchError(f"There is no stage `{first}`: choose one of {', '.join(STAGES)}.")
    return list(STAGES)[list(STAGES).index(matching[0]) :]


def _interruption(folder: Path, stage: str, error: BaseException) -> str:
    said = str(getattr(error, "evalue", "")) if getattr(error, "ename", "") == "Interrupted" else "Interrupted."
    said = said.split(" Complete epochs are kept")[0].rstrip(".")
    return f"{said}, in {stage}; what was done is kept, go on with `workbench run --resume {folder.name}`."


def _failure(folder: Path, stage: str, error: PapermillExecutionError | DeadKernelError) -> str:
    if isinstance(error, DeadKernelError):
        error.ename, error.evalue = "WorkbenchError", "its kernel died, perhaps for lack of memory"
    said = str(error.evalue).strip().rstrip(".") or error.ename
    if not error.ename.endswith(("WorkbenchError", "WorkerError")):
        said = f"{error.ename}: {said}"
    said = said.split(" Complete epochs are kept")[0]  # which ends with what is said here as well
    return (
        f"{stage} failed: {said.rstrip('.')}. The notebook up to there is {folder / 'notebooks' / f'{stage}.ipynb'}; "
        f"go on with `workbench run --resume {folder.name}`."
    )


def _kind(expected: type) -> str:
    return {str: "a text of one line", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}[
        expected
    ]
