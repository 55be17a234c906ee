"""What a run was made with and of: recorded in its folder, held against today, and results held against results.

Nothing secret is recorded: of the environment only the settings named here, of git no remote, and of a changed
working tree only what `git diff` says about tracked files of workbench/ and notebooks/. `rerun` makes runs again.

    from workbench import provenance, runs
    now = provenance.describe(runs.project_root())                 # hardware, settings, hashes of the code
    provenance.differences(runs.read_run(folder), now | {"versions": runs.versions()})
    provenance.compare_results(folder, another)["same"]
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench import WorkbenchError

GPUS = Path("/proc/driver/nvidia/gpus")  # where NVIDIA's driver lists its devices
# Environment variables that change what the same code computes.
SETTINGS = (
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "TF_DETERMINISTIC_OPS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
)
LARGEST_PATCH = 1_000_000  # bytes; a larger difference is a notebook's pictures
TIMED = ("seconds", "images_per_second", "input_wait_share")  # columns of history.csv that no two runs share
# What of a run's record is held against today, and how it is called.
PARTS = {
    "versions": "version of",
    "code_sha256": "code of",
    "hardware": "hardware:",
    "settings": "environment variable",
}


def describe(root: str | os.PathLike) -> dict[str, dict]:
    """The machine, the settings and the code, for a run's record.

    Args:
        root: the project's top folder, which holds the notebooks.

    Returns:
        `hardware` (cpu in words, cores of this process, gpus by name), `settings` (those of SETTINGS that are set) and
        `code_sha256` (a hash for each folder of the package and for each notebook's code cells).
    """
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    return {"hardware": describe_hardware(), "settings": settings, "code_sha256": hash_code(root)}


def describe_hardware() -> dict[str, Any]:
    """The processor in words, the cores that this process may use, and the names of the GPUs."""
    models = _values_of(Path("/proc/cpuinfo"), "model name")
    gpus = [_values_of(path / "information", "Model") for path in sorted(GPUS.iterdir())] if GPUS.is_dir() else []
    return {
        "cpu": models[0] if models else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [names[0] if names else "unknown" for names in gpus],
    }


def hash_code(root: str | os.PathLike) -> dict[str, str]:
    """SHA-256 of the package's sources, folder by folder, and of each notebook's code cells without outputs."""
    package, parts = Path(__file__).parent, {}
    for path in sorted(package.rglob("*")):
        if path.suffix in (".py", ".cc"):
            text = f"{path.name}\0{path.read_text(errors='replace')}\0"
            parts.setdefault(str(path.parent.relative_to(package.parent)), []).append(text)
    for path in sorted((Path(root) / "notebooks").glob("*.ipynb")):
        parts[f"notebooks/{path.name}"] = [_code_of(path)]
    return {name: hashlib.sha256("".join(texts).encode()).hexdigest() for name, texts in parts.items()}


def keep_changes(root: str | os.PathLike, folder: Path) -> None:
    """Write `changes.patch` into a run's folder if tracked files of workbench/ or notebooks/ differ from the commit.

    `git apply` brings them back. Outside git, or where it is larger than LARGEST_PATCH, none is written.
    """
    command = ["git", "-C", str(root), "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD", "--"]
    try:
        told = subprocess.run([*command, "workbench", "notebooks"], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return
    if 0 < len(told.stdout) <= LARGEST_PATCH:
        part = folder / ".changes.part.patch"
        part.write_bytes(told.stdout)
        os.replace(part, folder / "changes.patch")


def describe_data(info: Mapping[str, Any], weights: str | os.PathLike = "") -> dict[str, Any]:
    """What a run is trained on, for its record.

    Args:
        info: the shards' `info.json`.
        weights: the parameter: a file of weights, which is hashed; or "imagenet", "none" or nothing.

    Returns:
        `plan_sha256` and `table_sha256` as in info.json, `shards_sha256` over the hashes of all shards, `sources`
        (file name -> SHA-256 of the tables and lists they were split from; empty for older shards), and
        `weights_sha256` if `weights` is a file.

    Raises:
        WorkbenchError: info.json names no shards with their hashes.
    """
    try:
        hashes = {shard["file"]: shard["sha256"] for told in info["splits"].values() for shard in told["shards"]}
        sources = dict(info.get("split", {}).get("sources", {}))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise WorkbenchError("The shards' info.json lacks their hashes: write the shards again.") from None
    joined = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    told = {name: info.get(name) for name in ("plan_sha256", "table_sha256")}
    told |= {"shards_sha256": hashlib.sha256(joined.encode()).hexdigest(), "sources": sources}
    if weights and Path(weights).is_file():
        with open(weights, "rb") as file:
            told["weights_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return told


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One phrase for each thing that is another now than in a run's record; what it lacks is called not recorded.

    Args:
        then: the run's record.
        now: `describe` of today, with `versions`, `git` and `world_size`.
    """
    told = []
    for part, words in PARTS.items():
        before, after = then.get(part), now.get(part, {})
        if not isinstance(before, Mapping):
            told.append(f"{part.removesuffix('_sha256')}: not recorded then")
            continue
        for name in [*before, *(name for name in after if name not in before)]:
            if before.get(name) != after.get(name) and part.endswith("sha256"):
                told.append(f"{words} {name}: not what it was" if name in before else f"{words} {name}: new since")
            elif before.get(name) != after.get(name):
                told.append(f"{words} {name}: {_shown(before.get(name))} then, {_shown(after.get(name))} now")
    for name, words in (("git", "git commit"), ("world_size", "number of workers")):
        if name not in then:
            told.append(f"{words}: not recorded then")
        elif then[name] != now.get(name):
            told.append(f"{words}: {_shown(then[name])} then, {_shown(now.get(name))} now")
    return told


def data_differences(then: Any, now: Mapping[str, Any]) -> list[str]:
    """One phrase for each part of the data that is another now; both as of `describe_data`.

    Where the shards and their table are the same, `plan_sha256` does not count: it also holds the sizes of the images'
    files, which another version of a PNG encoder changes without changing a pixel.
    """
    if not isinstance(then, Mapping) or not then.get("shards_sha256"):
        return ["data: not recorded then"]
    told = []
    for name, words in (
        ("table_sha256", "the images, patients, splits or labels in the shards are not what they were"),
        ("shards_sha256", "the contents of the shards are not what they were"),
        ("weights_sha256", "the file of weights is not what it was"),
    ):
        if then.get(name) != now.get(name):
            told.append(f"data: {words} ({_short(then.get(name))} then, {_short(now.get(name))} now)")
    return told + source_differences(then, now.get("sources") or {})


def source_differences(then: Any, sources: Mapping[str, str]) -> list[str]:
    """One phrase for each table or list that is another now: file name -> SHA-256, as `describe_data` gives them."""
    before = then.get("sources") if isinstance(then, Mapping) else None
    if not isinstance(before, Mapping) or not before or not sources:
        return ["data: the tables and lists the shards were split from: not recorded"]
    names = [*before, *(name for name in sources if name not in before)]
    return [
        f"data: {name} is not what it was ({_short(before.get(name))} then, {_short(sources.get(name))} now)"
        for name in names
        if before.get(name) != sources.get(name)
    ]


def compare_results(first: str | os.PathLike, second: str | os.PathLike) -> dict[str, Any]:
    """Hold two runs' history, predictions and metrics against each other.

    Returns:
        `same`: whether everything that was compared is equal to the last digit; `compared`: the files; `told`: a phrase
        for each difference; `largest_score_difference` (0 to 1) and `auroc_difference` (mean test AUROC, second minus
        first), None where the files are not there to say it.
    """
    first, second = Path(first), Path(second)
    predictions = sorted({path.name for folder in (first, second) for path in folder.glob("predictions-*.csv")})
    compared, told, gaps, auroc = [], [], [], None
    for name in ("history.csv", *predictions, "metrics.json"):
        missing = [folder for folder in (first, second) if not (folder / name).is_file()]
        if len(missing) == 2:
            continue
        if missing:
            told.append(f"{name}: only one of the two runs has it")
            continue
        compared.append(name)
        try:
            if name == "history.csv":
                told += _compare_histories(first / name, second / name)
            elif name == "metrics.json":
                said, auroc = _compare_metrics(first / name, second / name)
                told += said
            else:
                said, gap = _compare_predictions(first / name, second / name)
                told += said
                gaps += [gap] if gap is not None else []
        except (ValueError, OSError, TypeError, KeyError, AttributeError, RecursionError):
            told.append(f"{name}: cannot be read in one of the two runs")
    if not compared:
        told.append("nothing to compare: one of the two runs has no results")
    largest = max(gaps) if gaps else None
    return {
        "same": not told,
        "compared": compared,
        "told": told,
        "largest_score_difference": largest,
        "auroc_difference": auroc,
    }


def _compare_histories(first: Path, second: Path) -> list[str]:
    before, after = (_read_texts(path).drop(columns=list(TIMED), errors="ignore") for path in (first, second))
    if before.shape != after.shape or list(before) != list(after):
        return [f"history.csv: {len(before)} epochs then, {len(after)} now"]
    unequal = before != after
    other = [name for name in before if unequal[name].any()]
    if not other:
        return []
    return [f"history.csv: another {', '.join(other)} from epoch {unequal.any(axis=1).idxmax() + 1} on"]


def _compare_predictions(first: Path, second: Path) -> tuple[list[str], float | None]:
    before, after, name = _read_texts(first), _read_texts(second), first.name
    if list(before) != list(after) or not before["image"].equals(after["image"]):
        return [f"{name}: of other images or findings ({len(before):,} images then, {len(after):,} now)"], None
    scores = [column for column in before if column.endswith("_score")]
    told = [] if before.drop(columns=scores).equals(after.drop(columns=scores)) else [f"{name}: other labels"]
    if before[scores].equals(after[scores]):
        return told, 0.0
    gap = _finite((before[scores].map(float) - after[scores].map(float)).abs().max(skipna=False).max(skipna=False))
    return [*told, f"{name}: scores differ by up to {gap:.3g}"], gap


def _compare_metrics(first: Path, second: Path) -> tuple[list[str], float | None]:
    before, after = (json.loads(path.read_text()) for path in (first, second))
    # Where the shards lie is no result; that they are the same ones is looked at elsewhere.
    old, new = ({name: value for name, value in _leaves(told) if name[:1] != ("split",)} for told in (before, after))
    other = [name for name in {**old, **new} if name not in old or name not in new or old[name] != new[name]]
    means = [told["test"]["mean_auroc"] for told in (before, after)]
    gap = None if None in means else _finite(means[1] - means[0])
    if not other:
        return [], gap
    told = f"metrics.json: {len(other)} of {len({**old, **new})} figures differ, such as {'.'.join(map(str, other[0]))}"
    return [told + ("" if gap is None else f"; mean test AUROC by {gap:+.3g}")], gap


def _finite(number: float) -> float:
    """The number as a record may hold it; a ValueError for what no score or AUROC is."""
    if not math.isfinite(number):
        raise ValueError("not finite")
    return float(number)


def _leaves(value: Any, name: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every number, text or nothing in a JSON value with its path; dictionaries of findings may hold dots."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        yield name, value
    else:
        for key, below in inner:
            yield from _leaves(below, (*name, key))


def _read_texts(path: Path):
    """A CSV file with its numbers as they are written: each has all its digits, and no reader rounds them."""
    import pandas as pd  # only needed here, and slow to import

    return pd.read_csv(path, dtype=str, keep_default_na=False)


def _code_of(path: Path) -> str:
    text = path.read_text(errors="replace")
    try:
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        return json.dumps(["".join(cell["source"]) for cell in cells])
    except (ValueError, TypeError, KeyError):
        return text


def _values_of(path: Path, name: str) -> list[str]:
    """The values of the lines `name: value` in a file of /proc; none where there is no such file."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _short(digest: Any) -> str:
    return str(digest)[:12] if digest else "none"
