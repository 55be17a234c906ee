"""Reads the timeline that Horovod writes on rank 0: what became of each gradient, and how long it took.

Only the exchange is in it, no computing. Horovod writes an event for every tensor, which slows steps with many tensors
down, so its times say how an exchange divides up rather than how fast it would be unwatched.

    events = timeline.read_timeline("timeline-2.json")
    phases = timeline.exchange_phases(events)                                  # one row per step
    timeline.step_parts(0.35, 0.002, phases)                                   # computing, waiting, exchanging
"""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pandas as pd

from workbench import WorkbenchError
from workbench.analysis.scaling_model import PARTS

PHASES = ("negotiation", "queue", "copy in", "all-reduce", "copy out")


def read_timeline(path: str | os.PathLike) -> pd.DataFrame:
    """The activities of a timeline; https://horovod.readthedocs.io/en/stable/timeline_include.html says what they are.

    A file that ends in the middle, as one does whose writer was ended, is read as far as it goes.

    Returns:
        One row per activity that came to its end, as they began: `tensor`, `activity` (such as "NEGOTIATE_ALLREDUCE",
        "ALLREDUCE", and within that "MEMCPY_IN_FUSION_BUFFER", "MPI_ALLREDUCE"), `start` and `end` in seconds.

    Raises:
        WorkbenchError: the file cannot be read, or is no timeline.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError as error:
        raise WorkbenchError(f"The timeline {path} cannot be read ({error.strerror}): measure again.") from None
    tensors: dict[int, str] = {}
    open_ones: dict[int, list[tuple[str, float]]] = {}
    rows = []
    for event in _events(text, path):
        kind, where = event.get("ph"), event.get("pid")
        if kind == "M" and "name" in event.get("args", {}):
            tensors[where] = event["args"]["name"]
        elif kind == "B":
            open_ones.setdefault(where, []).append((event["name"], event["ts"]))
        elif kind == "E" and open_ones.get(where):
            name, began = open_ones[where].pop()
            rows.append((tensors.get(where, ""), name, began / 1e6, event["ts"] / 1e6))
    table = pd.DataFrame(rows, columns=["tensor", "activity", "start", "end"])
    return table.sort_values("start", kind="stable", ignore_index=True)


def exchange_phases(events: pd.DataFrame) -> pd.DataFrame:
    """How long each step's exchange of gradients took, by phase.

    Tensors travel together, so a phase lasts as long as any tensor is in it, and the n-th all-reduce of every tensor
    belongs to the n-th step.

    Args:
        events: `read_timeline`'s answer. Only grouped all-reduces count, which gradients alone use here.

    Returns:
        One row per whole step, columns `PHASES`, in seconds: "negotiation" from the first rank that has its gradients
        to the last one; then "queue" for what is neither copied nor sent, "copy in" to the fusion buffer, "all-reduce",
        "copy out". A single tensor is not copied. No rows where nothing was exchanged.
    """
    gradients = events[events["tensor"].str.contains("GroupedAllreduce", regex=False)]
    order = gradients.assign(step=gradients.groupby(["tensor", "activity"]).cumcount())
    whole = order[order["activity"] == "ALLREDUCE"].groupby("step")["tensor"].nunique()
    rows = []
    for step in whole.index[whole == gradients["tensor"].nunique()]:
        of_step = order[order["step"] == step]
        wait = of_step[of_step["activity"] == "NEGOTIATE_ALLREDUCE"]
        total = of_step[of_step["activity"] == "ALLREDUCE"]
        copy_in = _covered(of_step[of_step["activity"].str.startswith("MEMCPY_IN")])
        copy_out = _covered(of_step[of_step["activity"].str.startswith("MEMCPY_OUT")])
        sent = _covered(of_step[of_step["activity"].str.contains(r"^(?:MPI|NCCL|GLOO|CCL)_\w*", regex=True)])
        # From the last rank's readiness to the last tensor's return; copies may overlap with sending.
        span = total["end"].max() - wait["end"].max()
        rows.append((_covered(wait), max(0.0, span - copy_in - sent - copy_out), copy_in, sent, copy_out))
    return pd.DataFrame(rows, columns=list(PHASES), dtype=float)


def step_parts(step_seconds: float, input_seconds: float, phases: pd.DataFrame) -> dict[str, float]:
    """What a measured step is made of: seconds of each of `scaling_model.PARTS`, which add up to the step.

    Waiting for the slowest rank is half of the negotiation, which lasts from the first rank to the last: where ranks
    vary alike, that is what they wait in the mean. Computing is what is left, the update of the weights and, without
    phases, everything but the input included.

    Args:
        step_seconds: of a step.
        input_seconds: that a rank waits for images in it, in the mean.
        phases: `exchange_phases`' answer; empty for one worker.
    """
    typical = phases.median() if len(phases) else pd.Series(0.0, index=list(PHASES))
    late = typical["negotiation"] / 2
    exchange = typical[list(PHASES[1:])].sum()
    # Recorded steps are slower than those that were timed, so that on a busy machine the parts could exceed the whole.
    fits = min(1.0, max(0.0, step_seconds - input_seconds) / max(late + exchange, 1e-12))
    parts = (step_seconds - input_seconds - fits * (late + exchange), input_seconds, fits * late, fits * exchange)
    return dict(zip(PARTS, map(float, parts), strict=True))


def _covered(activities: pd.DataFrame) -> float:
    """Seconds during which at least one of the activities runs."""
    if activities.empty:
        return 0.0
    ordered = activities.sort_values("start")
    start, end = ordered["start"].to_numpy(), ordered["end"].to_numpy()
    before = np.concatenate([[-np.inf], np.maximum.accumulate(end)[:-1]])
    return float(np.maximum(0, end - np.maximum(start, before)).sum())


def _events(text: str, path: str | os.PathLike) -> list[dict]:
    try:
        events = json.loads(text)
    except ValueError:
        # No closing bracket, or an event cut off: Horovod's events hold at most one level of braces within.
        events = [_event(found) for found in re.findall(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)?\}", text)]
        if not text.lstrip().startswith("[") and text.strip():
            events = None
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise WorkbenchError(f"{path} is no timeline of Horovod: it has to be a list of events in JSON.")
    return events


def _event(text: str) -> dict:
    try:
        return json.loads(text)
    except ValueError:
        return {}
