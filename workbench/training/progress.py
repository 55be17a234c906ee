"""Shows a training run while it runs: a live panel in JupyterLab, plain lines everywhere else.

    watch = progress.watch()
    workers.run("workbench.training.trainer.train", config, folder, watch=watch)

`watch` is called with the state that rank 0 last reported: phase, epoch, step, loss, images per second, and under
"history" a row per finished epoch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

PLAIN = "WORKBENCH_PLAIN_PROGRESS"  # set by batch runs, whose notebooks nobody watches
EVERY = 15  # seconds between two plain lines within an epoch


def watch() -> Callable[[dict], None]:
    """The watcher that suits where this runs."""
    return lines() if os.environ.get(PLAIN) or not _in_notebook() else panel()


def lines() -> Callable[[dict], None]:
    """A watcher that prints one line per epoch, and within long epochs one every 15 seconds."""
    began = time.monotonic()
    state = {"told": began, "epochs": 0, "phase": ""}

    def show(progress: dict) -> None:
        for row in progress["history"][state["epochs"] :]:
            print(_epoch_line(row, progress["epochs"]), flush=True)
            state["told"] = time.monotonic()
        state["epochs"] = len(progress["history"])
        phase, now = progress.get("phase", ""), time.monotonic()
        if phase == "training" and now - state["told"] > EVERY:
            state["told"] = now
            print(f"  {_step_line(progress)}", flush=True)
        elif phase not in ("", "training", "validating", state["phase"]):
            print(f"{phase} ...", flush=True)
        state["phase"] = phase

    return show


def panel() -> Callable[[dict], None]:
    """A watcher that keeps one panel up to date in the notebook: bars, time left, a row per epoch."""
    from IPython.display import HTML, display

    began = time.monotonic()
    handle = display(HTML("<i>starting …</i>"), display_id=True)

    def show(progress: dict) -> None:
        handle.update(HTML(render(progress, seconds=time.monotonic() - began)))

    return show


def render(progress: dict, *, seconds: float) -> str:
    """The panel's HTML for a state of progress, `seconds` after training was asked for."""
    history, epochs = progress["history"], progress.get("epochs", 0)
    done = len(history)
    share = progress["step"] / progress["steps"] if progress.get("phase") == "training" else 0.0
    parts = [f"<b>{progress.get('phase', '')}</b>, {_duration(seconds)} so far"]
    if progress.get("phase") == "training":
        parts.append(_step_line(progress))
    if history and epochs > done:
        # The last epoch tells best what the next will take; the first holds the compilation.
        parts.append(f"about {_duration(history[-1]['seconds'] * (epochs - done - share))} of training left")
    bars = _bar("epochs", done + share, epochs) + (_bar("this epoch", share, 1) if share else "")
    return f"<div>{' · '.join(parts)}{bars}{_table(history)}</div>"


def _bar(label: str, value: float, top: float) -> str:
    return (
        f'<div><progress value="{value:.3f}" max="{top or 1}" style="width:24em"></progress> '
        f"{label} {100 * value / (top or 1):.0f} %</div>"
    )


def _table(history: list[dict]) -> str:
    if not history:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("epoch", "loss", "val loss", "val AUROC", "rate", "images/s", "s"))
    rows = ""
    best = max((row["epoch"] for row in history if row["best"]), default=0)
    for row in history:
        cells = (
            f"{row['epoch']}{' ★' if row['epoch'] == best else ''}",
            f"{row['loss']:.4f}",
            f"{row['val_loss']:.4f}",
            f"{row['val_auroc']:.4f}",
            f"{row['learning_rate']:.1e}",
            f"{row['images_per_second']:.1f}",
            f"{row['seconds']:.0f}",
        )
        rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return f"<table><tr>{head}</tr>{rows}</table>"


def _epoch_line(row: dict, epochs: int) -> str:
    return (
        f"epoch {row['epoch']:>2}/{epochs}  loss {row['loss']:.4f}  val loss {row['val_loss']:.4f}  "
        f"val AUROC {row['val_auroc']:.4f}  rate {row['learning_rate']:.1e}  {row['images_per_second']:.1f} images/s  "
        f"{row['seconds']:.0f} s{'  best so far' if row['best'] else ''}"
    )


def _step_line(progress: dict) -> str:
    return (
        f"epoch {progress['epoch']}/{progress['epochs']}, step {progress['step']}/{progress['steps']}, "
        f"loss {progress['loss']:.4f}, {progress['images_per_second']:.1f} images/s"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _in_notebook() -> bool:
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return type(get_ipython()).__name__ == "ZMQInteractiveShell"
