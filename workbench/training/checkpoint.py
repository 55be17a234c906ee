"""The state of training after an epoch, in one file, so that its parts cannot come from different epochs.

write(folder, "Tiny, 14 findings", history, model, optimizer, best_weights)
history, best_weights = restore(folder, "Tiny, 14 findings", model, optimizer)
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import keras
import numpy as np

from workbench import WorkbenchError
from workbench.runs import written_whole


def write(
    folder: Path, description: str, history: list[dict], model: keras.Model, optimizer, best_weights: list[np.ndarray]
) -> None:
    """Write `checkpoint/last.npz`, whole or not at all.

    Args:
        folder: the run's folder.
        description: what the state belongs to, in words; only the same may be restored from it.
        history: a row for every epoch so far.
        model: as it is after the last epoch.
        optimizer: its optimizer, built.
        best_weights: `model.get_weights()` of the best epoch so far.
    """
    state = {"description": np.array(description), "history": np.array(json.dumps(history))}
    for kind, values in _parts(model, optimizer).items():
        state |= {f"{kind}_{i:04d}": np.array(value) for i, value in enumerate(values)}
    state |= {f"best_{i:04d}": value for i, value in enumerate(best_weights)}
    (folder / "checkpoint").mkdir(exist_ok=True)
    with written_whole(folder / "checkpoint" / "last.npz") as part:
        np.savez(part, **state)


def restore(folder: Path, description: str, model: keras.Model, optimizer) -> tuple[list[dict], list[np.ndarray]]:
    """Set model and optimizer to the state of the last complete epoch.

    Returns:
        The history, and the weights of the best epoch so far.

    Raises:
        WorkbenchError: there is no checkpoint, it is damaged, or it belongs to something else.
    """
    path = folder / "checkpoint" / "last.npz"
    if not path.exists():
        raise WorkbenchError(f"There is nothing to resume: {path} does not exist, no epoch was completed.")
    try:
        # allow_pickle stays off: a checkpoint must not run code.
        with np.load(path) as file:
            state = {name: file[name] for name in file.files}
        history, belongs_to = json.loads(str(state["history"])), str(state["description"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise WorkbenchError(f"The checkpoint {path} is damaged ({error}): start a new run.") from None
    if belongs_to != description:
        raise WorkbenchError(
            f"The checkpoint {path} belongs to {belongs_to}, and cannot be resumed with {description}: use the same "
            "settings, or start a new run."
        )
    for kind, variables in _parts(model, optimizer).items():
        for i, variable in enumerate(variables):
            variable.assign(state[f"{kind}_{i:04d}"])
    return history, [state[name] for name in sorted(state) if name.startswith("best_")]


def _parts(model: keras.Model, optimizer) -> dict[str, list]:
    return {"model": model.variables, "optimizer": optimizer.variables}
