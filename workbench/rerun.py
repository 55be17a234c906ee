"""A run again, from its folder alone: what differs from then is told first, the results are compared afterwards.

The parameters are those of the run's record, the notebooks those of today, and the new run is a run of its own.
Differences do not stop it; what makes it impossible is refused before anything is made.

    from workbench import rerun, runs
    plan = rerun.plan_rerun(runs.project_root(), "first-try")
    plan.differences                                       # [] if everything is as it was
    folder = rerun.rerun(runs.project_root(), "first-try", name="again")
    runs.read_run(folder)["rerun"]["result"]["same"]
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import WorkbenchError, batch, one_line, provenance, runs
from workbench.data import chestxray14, shards
from workbench.training import cluster, sites


@dataclass(frozen=True)
class Plan:
    """How a run would be repeated here.

    Attributes:
        source: the folder of the run that is repeated.
        record: its `run.json`.
        parameters: of all notebooks, as they will be given.
        stages: those that will be run, in order.
        differences: a phrase for each thing that is not as it was.
        notes: a phrase for each thing to know that is no difference.
    """

    source: Path
    record: dict
    parameters: dict[str, Any]
    stages: list[str]
    differences: list[str]
    notes: list[str]


def rerun(root: Path, run: str, *, overrides: Mapping[str, Any] | None = None, name: str = "") -> Path:
    """Repeat a run in a new one, telling what differs before, and comparing the results after.

    Args:
        root: the project's top folder.
        run: a run's name under results/, or the path of a run's folder.
        overrides: parameters that replace the recorded ones.
        name: the new run's name; empty for the old one's and the time.

    Returns:
        The new run's folder. Its record has `rerun`: the source, what differed, and the comparison as `result`.

    Raises:
        WorkbenchError: it cannot be repeated here, the name is taken, or a stage failed.
    """
    plan = plan_rerun(root, run, overrides=overrides)
    tell(plan)
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", plan.source.name).lstrip("._-") or "run"
    recipe = plan.record.get("recipe") or ""
    folder = runs.create_run(root, name, label=f"{label}-again", recipe=recipe, parameters=plan.parameters)
    about = {"of": plan.source.name, "folder": str(plan.source), "differences": plan.differences}
    runs.update_run(folder, rerun=about)

    def hold_data_against(stage: str) -> None:
        if stage == "02_write_shards":
            _tell_data(folder, plan.record.get("data"), _data_of(root, plan.parameters))

    batch.execute(root, folder, plan.parameters, plan.stages, after=hold_data_against)
    finish(folder)
    return folder


def plan_rerun(root: Path, run: str, *, overrides: Mapping[str, Any] | None = None) -> Plan:
    """Look at what a run was made with, at what there is today, and say how it would be repeated. Makes nothing.

    Raises:
        WorkbenchError: there is no such run, its record lacks the parameters, or this machine or its data cannot do it.
    """
    source = find_source(root, run)
    record = runs.read_run(source)
    recorded = record.get("parameters")
    if not isinstance(recorded, dict) or not recorded.get("shard_folder"):
        raise WorkbenchError(
            f"The record {source / 'run.json'} holds no parameters of a training, so the run cannot be repeated: start "
            "it again with `workbench run RECIPE`."
        )
    stages, (parameters, differences) = _stages(source, record), _parameters(root, source, recorded, overrides or {})
    unrecorded = [name for stage in stages for name in batch.known_parameters(root)[stage] if name not in recorded]
    unrecorded = [name for name in dict.fromkeys(unrecorded) if name not in (*batch.OWN, *(overrides or {}))]
    if unrecorded:
        today = ", ".join(f"{name} {parameters[name]!r}" for name in unrecorded)
        differences.append(f"parameters that were not recorded then, or are new: {today} now")
    if record.get("status") != "finished":
        differences.append(f"the run is not finished but {record.get('status', 'without a status')}")

    world_size = _check_machine(root, parameters)
    now = provenance.describe(root) | {"versions": runs.versions(), "git": runs.git_commit(root)}
    machine = provenance.differences(record, now | {"world_size": world_size})
    stages, data, notes = _check_data(root, record.get("data"), parameters, stages)
    if any(phrase.startswith("code of") for phrase in machine):
        notes += _back_to(record.get("git"), source)
    return Plan(source, record, parameters, stages, [*machine, *differences, *data], notes)


def find_source(root: Path, run: str) -> Path:
    """The folder of a run by its name under results/, or by its path. Raises a WorkbenchError if there is none."""
    if re.fullmatch(r"[^/\0]+", run) and (root / "results" / run / "run.json").exists():
        return root / "results" / run
    if run and "\0" not in run and (Path(run) / "run.json").exists():
        return Path(run).resolve()
    raise WorkbenchError(
        f"There is no run `{run}`, neither under {root / 'results'} nor as a folder with a run.json: `workbench runs` "
        "lists those there are."
    )


def tell(plan: Plan) -> None:
    """Print what differs from then, and what else there is to know."""
    started = str(plan.record.get("started") or "at an unknown time")[:16].replace("T", " ")
    if plan.differences:
        print(f"What differs from the run {plan.source.name}, started {started}:")
    else:
        print(f"Nothing differs from the run {plan.source.name}, started {started}.")
    for phrase in plan.differences:
        print(f"  {one_line(phrase)}")
    for phrase in plan.notes:
        print(f"  ({one_line(phrase)})", flush=True)


def finish(folder: Path) -> None:
    """Compare a repeated run that is finished with the one it repeats; print and record it. Of other runs nothing."""
    record = runs.read_run(folder)
    about = record.get("rerun")
    if not isinstance(about, dict) or record.get("status") != "finished":
        return
    source = Path(str(about.get("folder")))
    try:
        then = runs.read_run(source)
    except WorkbenchError:
        print(f"The run that was repeated is no longer in {source}: nothing to compare with.")
        return
    if "data" not in about:  # the shards were there already, or the run was taken up again after they were written
        _tell_data(folder, then.get("data"), record.get("data") or {})
    result = provenance.compare_results(source, folder)
    runs.update_run(folder, rerun={"result": result})
    if result["same"]:
        print(f"The same as {source.name} to the last digit: {', '.join(result['compared'])}.")
        return
    print(f"What came out differently from {source.name}:")
    for phrase in result["told"]:
        print(f"  {phrase}")


def _tell_data(folder: Path, then: Any, now: Mapping[str, Any]) -> None:
    phrases = provenance.data_differences(then, now)
    runs.update_run(folder, rerun={"data": phrases})
    for phrase in phrases or ["data: the same shards as then, by their hashes"]:
        print(f"        {phrase}", flush=True)


def _stages(source: Path, record: Mapping[str, Any]) -> list[str]:
    """The stages that the run had; of a run by hand the training and what left its files behind."""
    told = record.get("stages")
    if isinstance(told, dict) and set(told) & set(batch.STAGES):
        return [stage for stage in batch.STAGES if stage in told]
    left = {"04_evaluate": "metrics.json", "05_scaling": "scaling.csv"}
    return ["03_train", *(stage for stage, file in left.items() if (source / file).exists())]


def _parameters(root: Path, source: Path, recorded: dict, overrides: Mapping) -> tuple[dict[str, Any], list[str]]:
    """All parameters as they will be given, checked, and a phrase for each that differs from then."""
    known = batch.known_parameters(root)
    today = {name: value for stage in known.values() for name, value in stage.items()}
    chosen = {name: value for name, value in recorded.items() if name in today and name not in batch.OWN}
    parameters = batch.check_parameters(root, chosen | dict(overrides), where=f"the run {source.name}")
    told = []
    for name, value in recorded.items():
        if name not in today and name not in batch.OWN:
            told.append(f"parameter {name}: {value!r} then, and no notebook knows it now, so it is left out")
        elif name in overrides and parameters[name] != value:
            told.append(f"parameter {name}: {value!r} then, {parameters[name]!r} now, as you say")
    defaults = {name: value for stage in known for name, value in _defaults(source, stage).items()}
    for name, value in defaults.items():
        if name in today and name in chosen and today[name] != value and name not in overrides:
            used = parameters[name]
            told.append(f"parameter {name}: the notebooks' own value was {value!r}, is {today[name]!r}; used: {used!r}")
    return parameters, told


def _defaults(source: Path, stage: str) -> dict[str, Any]:
    """The notebook's own parameters as its executed copy has them, read without running them; {} without a copy."""
    try:
        cells = json.loads((source / "notebooks" / f"{stage}.ipynb").read_text())["cells"]
        code = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
        lines = [node for node in ast.parse(code).body if isinstance(node, ast.Assign)]
        return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration, SyntaxError, RecursionError):
        return {}


def _check_machine(root: Path, parameters: Mapping[str, Any]) -> int:
    """The number of workers; refuses what `cluster.start` would refuse after the shards are written."""
    site = sites.read_site(root, parameters.get("cluster_name", "local"))
    workers, cores = parameters["workers"] or cluster.default_workers(site), provenance.describe_hardware()["cores"]
    if site.slots:
        site.check_workers(workers)
    elif workers * max(parameters["threads"], 1) > cores:
        raise WorkbenchError(
            f"The run had {workers} workers of {max(parameters['threads'], 1)} cores or more, and this machine has "
            f"{cores} cores: repeat it on a larger one, or with `--set workers=… --set threads=0`."
        )
    return workers


def _check_data(root: Path, then: Any, parameters: dict, stages: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The stages that the data allows or asks for, a phrase for each difference, and notes."""
    folder, data, weights = (root / parameters[name] for name in ("shard_folder", "data_folder", "weights"))
    if parameters["weights"] not in ("", "none", "imagenet") and not weights.is_file():
        raise WorkbenchError(f"The weights {weights} are not here: put them there, or say `--set weights=FILE`.")
    written, notes = (folder / "info.json").exists(), []
    made_up = bool(parameters["synthetic_patients"]) and not data.exists()
    if not written and "02_write_shards" not in stages:
        stages = ["02_write_shards", *stages]
    if stages[0] < "03" and not data.exists() and not made_up:
        if not written:
            raise WorkbenchError(
                f"Neither the shards {folder} nor the data set {data} is here: put one of them there, or say where it "
                "is with `--set shard_folder=DIR` or `--set data_folder=DIR`."
            )
        stages = [stage for stage in stages if stage >= "03"]
        notes.append(f"{data} is not here, so it begins with 03_train, on the shards that are")
    names = ("table", "split", "train_list", "val_list", "test_list")
    reads = stages[0] < "03" and not made_up
    sources = chestxray14.hash_sources(data, **{name: parameters[name] for name in names}) if reads else {}
    if not written:
        notes.append("the shards will be written by notebook 02, and their hashes then held against the run's")
        recorded = isinstance(then, Mapping)
        told = (
            provenance.source_differences(then, sources) if reads else [] if recorded else ["data: not recorded then"]
        )
        return stages, told, notes
    now = _data_of(root, parameters)
    before = then if isinstance(then, Mapping) else {}
    # Of the same tables notebook 02 would write what the run had, and finds something else in its place.
    would_write = before.get("plan_sha256") if sources and sources == before.get("sources") else None
    if "02_write_shards" in stages and would_write and would_write != now["plan_sha256"]:
        raise WorkbenchError(
            f"{folder} holds other shards than the run was trained on: keep them and say `--set shard_folder=DIR`, or "
            "remove them first."
        )
    return stages, provenance.data_differences(then, now | ({"sources": sources} if sources else {})), notes


def _data_of(root: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    info = shards.read_info(root / parameters["shard_folder"])
    return provenance.describe_data(info, root / parameters["weights"])


def _back_to(git: Any, source: Path) -> list[str]:
    """How to have the code of then, where the record says it."""
    if not isinstance(git, str):
        return []
    commit, changes = git.removesuffix("+changes"), source / "changes.patch"
    if commit == git:
        return [f"`git checkout {commit}` brings the code of then back"]
    if changes.exists():
        return [f"`git checkout {commit}` and `git apply {changes}` bring the code of then back"]
    return [f"the code of then was {commit} with changes that were not kept"]
