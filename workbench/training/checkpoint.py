"""The state of training after an epoch, in one file, so that its parts cannot come from different epochs.

The last two are kept, each with a hash over all it holds: a file that cannot be read, or is not what was written,
leaves the one before it in use. Imports no TensorFlow, and reading one runs no code.

    write(folder, settings, history, model, optimizer, best_weights)
    state = read(folder)
    state.epochs, state.notes                  # what is there; what was wrong with a newer one
    apply(state, settings, model, optimizer)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workbench import WorkbenchError
from workbench.files import sync, written_whole
from workbench.runs import has_checkpoint

LAST, BEFORE = "last.npz", "before.npz"
# What the weights belong to: with another of these they cannot go on.
FIXED = ("network", "precision", "image_size", "findings")


@dataclass(frozen=True)
class State:
    """What a checkpoint holds.

    Attributes:
        settings: the training's settings, the number of workers and the shards' fingerprint, as `write` got them.
        history: a row for every epoch so far.
        arrays: the values of model, optimizer and best weights, by name.
        sha256: of all of it.
        notes: a sentence for each newer checkpoint that cannot be used.
    """

    settings: dict
    history: list[dict]
    arrays: dict[str, np.ndarray]
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def epochs(self) -> int:
        """How many epochs are complete."""
        return len(self.history)

    @property
    def best_weights(self) -> list[np.ndarray]:
        """`model.get_weights()` of the best epoch so far."""
        return self._values("best")

    def _values(self, kind: str) -> list[np.ndarray]:
        return [self.arrays[name] for name in sorted(self.arrays) if name.startswith(f"{kind}_")]


def write(
    folder: Path, settings: Mapping, history: list[dict], model, optimizer, best_weights: list[np.ndarray]
) -> None:
    """Write `checkpoint/last.npz`, whole or not at all; what was the last becomes `checkpoint/before.npz`.

    Args:
        folder: the run's folder.
        settings: plain values that the state belongs to, those of `FIXED` among them.
        history: a row for every epoch so far.
        model: a Keras model as it is after the last epoch.
        optimizer: its optimizer, built.
        best_weights: `model.get_weights()` of the best epoch so far.

    Raises:
        WorkbenchError: it cannot be written; the former ones stay in use.
    """
    arrays = {"settings": np.array(json.dumps(dict(settings))), "history": np.array(json.dumps(history))}
    for kind, variables in _parts(model, optimizer).items():
        arrays |= {f"{kind}_{i:04d}": np.array(variable) for i, variable in enumerate(variables)}
    arrays |= {f"best_{i:04d}": value for i, value in enumerate(best_weights)}
    place = folder / "checkpoint"
    try:
        place.mkdir(exist_ok=True)
        with written_whole(place / LAST) as part:
            np.savez(part, sha256=np.array(_digest(arrays)), **arrays)
            sync(part)
            # Only now, when the new one is on the disk: a break in between leaves this one to be read.
            with suppress(FileNotFoundError):
                os.replace(place / LAST, place / BEFORE)
    except (OSError, WorkbenchError) as error:
        reason = error.__cause__ if isinstance(error, WorkbenchError) else error
        kept = f"epoch {len(history) - 1} is kept" if len(history) > 1 and has_checkpoint(folder) else "nothing is kept"
        raise WorkbenchError(
            f"The checkpoint of epoch {len(history)} cannot be written to {place} "
            f"({getattr(reason, 'strerror', None) or reason}): {kept}; make room or allow writing there, then resume."
        ) from None


def read(folder: Path) -> State:
    """The newest state that is whole.

    Raises:
        WorkbenchError: there is none, or all that are there are damaged.
    """
    place, notes = folder / "checkpoint", []
    for path in (place / LAST, place / BEFORE):
        try:
            # allow_pickle stays off: a checkpoint must not run code.
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
            sha256 = str(arrays.pop("sha256"))
            if sha256 != _digest(arrays):
                raise ValueError("its hash is not that of what it holds")
            settings, history = json.loads(str(arrays.pop("settings"))), json.loads(str(arrays.pop("history")))
            # What is no number, and training counts on, raises here.
            sum(row[name] for row in history for name in ("epoch", "val_loss", "val_auroc", "best"))
            if not (any(row["best"] for row in history) and {*FIXED, "workers", "batch_size"} <= settings.keys()):
                raise ValueError("it holds no training")
        except FileNotFoundError:
            continue
        except Exception as error:  # what a damaged zip or array makes their readers raise has no common name
            notes.append(f"{path} is damaged ({' '.join(str(error).split()) or type(error).__name__})")
            continue
        return State(settings, history, arrays, sha256, tuple(f"{note}, the one before it is used" for note in notes))
    if notes:
        raise WorkbenchError(f"No checkpoint can be used: {', and '.join(notes)}: start a new run.")
    raise WorkbenchError(f"There is nothing to resume: {place / LAST} does not exist, no epoch was completed.")


def apply(state: State, settings: Mapping, model, optimizer) -> None:
    """Set a model and its built optimizer to a state.

    Raises:
        WorkbenchError: the state belongs to another network, precision, image size or other findings.
    """
    for name in FIXED:
        if state.settings[name] != settings[name]:
            raise WorkbenchError(
                f"The checkpoint is of `{name}` {_text(state.settings[name])} and cannot go on with "
                f"{_text(settings[name])}: use the same, or start a new run."
            )
    parts = _parts(model, optimizer)
    for kind, variables in (*parts.items(), ("best", model.weights)):
        values = state._values(kind)
        if [tuple(v.shape) for v in variables] != [value.shape for value in values if value.dtype.kind in "biuf"]:
            raise WorkbenchError(
                f"The checkpoint holds {len(values)} arrays of the {kind} and {len(variables)} of other shapes are "
                "needed: it is of another version of the workbench, start a new run."
            )
    for kind, variables in parts.items():
        for variable, value in zip(variables, state._values(kind), strict=True):
            variable.assign(value)


def describe_changes(before: Mapping, now: Mapping) -> list[str]:
    """What is not as it was in the epochs before, such as "`workers` 2 -> 3", from two settings."""
    names = [name for name in now if name in before and before[name] != now[name]]
    told = [f"`{name}` {_text(before[name])} -> {_text(now[name])}" for name in names]
    if "workers" in names or "batch_size" in names:
        sizes = [settings["batch_size"] * settings["workers"] for settings in (before, now)]
        told.append(f"so a global batch has {sizes[0]} -> {sizes[1]} images, in another order than before")
    return told


def _text(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and bytes of all arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = arrays[name]
        digest.update(f"{name} {value.dtype.str} {value.shape} ".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _parts(model, optimizer) -> dict[str, list]:
    return {"model": model.variables, "optimizer": optimizer.variables}
