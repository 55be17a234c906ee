"""Shows a training run while it runs: a live panel in JupyterLab, plain lines everywhere else, in any process.

    with progress.watch(folder) as watching:        # where the training was started
        workers.run("workbench.training.trainer.train", config, folder, watch=watching)
    progress.follow(folder)                         # in any other notebook, or `workbench watch RUN`

`watch` keeps what is known in the run's `progress.json`, about once a second, and holds a lock as long as it does:
a run that says it is running without that lock was broken off. `follow` needs no more than the two.
"""

from __future__ import annotations

import html
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workbench import Interrupted, WorkbenchError, one_line
from workbench.files import held, is_held, written_whole
from workbench.runs import PROGRESS, PROGRESS_LOCK, now

PLAIN = "WORKBENCH_PLAIN_PROGRESS"  # set by batch runs, whose notebooks nobody watches
EVERY = 15  # seconds between two plain lines within an epoch
SHOWN = 20  # epochs in the panel's table: it is sent to the page anew each second
WRITTEN = 1.0  # seconds between two writings of progress.json
POINTS = 200  # of the loss within epochs, at most; then every other one is left out
ENDS = {"finished": "The training has ended", "interrupted": "It was stopped", "failed": "It failed"}

View = Callable[[dict], None]


def view(stop: Callable[[], None] | None = None) -> View:
    """The view that suits where this runs; in JupyterLab a panel appears, with a button that calls `stop` if given."""
    if not looked_at():
        return lines()
    from workbench.training import panel

    return panel.panel(stop)


def looked_at() -> bool:
    """Whether this runs in a notebook that somebody looks at, and no batch run."""
    if os.environ.get(PLAIN):
        return False
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    return type(get_ipython()).__name__ == "ZMQInteractiveShell"


@contextmanager
def watch(folder: str | os.PathLike, *, show: View | None = None) -> Iterator[Callable[[dict], None]]:
    """Show a training, and write it into the run's `progress.json` for others to follow.

    Args:
        folder: the run's folder.
        show: a view that is there already, as `view` made it.

    Yields:
        What `cluster.Workers.run` takes as `watch`: a function of the state of progress.
    """
    folder, show, began = Path(folder), show or view(), time.monotonic()
    told = {"run": folder.name, "status": "running", "said": "", "progress": {"history": []}, "losses": []}
    wrote = -math.inf

    def tell(*, at_once: bool = False) -> None:
        nonlocal wrote
        told.update(seconds=time.monotonic() - began, written=now())
        if at_once or time.monotonic() - wrote >= WRITTEN:
            wrote = time.monotonic()
            # A view that cannot be written is no reason to end what it shows.
            with suppress(WorkbenchError), written_whole(folder / PROGRESS, lasting=False) as part:
                part.write_text(json.dumps(_plain(told), allow_nan=False))
        show(told)

    def take(progress: dict) -> None:
        told["progress"] = progress
        if "step" in progress:
            at = progress["epoch"] - 1 + progress["step"] / progress["steps"]
            if not told["losses"] or at > told["losses"][-1][0]:
                told["losses"].append((at, progress["loss"]))
            if len(told["losses"]) > POINTS:
                del told["losses"][1::2]
        tell()

    with held(folder / PROGRESS_LOCK, f"The progress of {folder.name}", wait=30):
        try:
            tell(at_once=True)
            yield take
        except BaseException as error:
            told["status"] = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
            told["said"] = one_line(str(error)) or type(error).__name__
            raise
        else:
            told["status"] = "finished"
        finally:
            tell(at_once=True)


def read(folder: str | os.PathLike) -> dict:
    """What is known of a run's training now.

    Returns:
        `run`, `status` (running, finished, interrupted, failed or broken off), `said` (the error's sentence, if any),
        `seconds` since it was asked for, `progress` as `cluster.Workers.run` tells it, and `losses`: pairs of where in
        which epoch, as a fraction, and the training loss there.

    Raises:
        WorkbenchError: the run has no progress yet, or the file cannot be read.
    """
    path = Path(folder) / PROGRESS
    running = is_held(path.with_name(PROGRESS_LOCK))  # before it is read: the last word is written under the lock
    try:
        told = json.loads(path.read_text())
        told["run"], told["said"], told["seconds"], told["losses"], told["progress"]["history"]
    except FileNotFoundError:
        raise WorkbenchError(f"The run {path.parent} has no {PROGRESS}: its training has not begun.") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WorkbenchError(f"{path} cannot be read ({error}): remove it; the run itself is not touched.") from None
    if told["status"] == "running" and not running:
        told["status"] = "broken off"
    return told


def follow(folder: str | os.PathLike, *, background: bool | None = None) -> None:
    """Show a run's training as long as it runs, from any process that sees its folder, and how it ended.

    Args:
        folder: the run's folder.
        background: return at once and go on showing; None: so in a notebook, where nothing else has to wait then.

    Raises:
        WorkbenchError: the run has no progress yet.
    """
    told, show = read(folder), view()

    def go_on() -> None:
        state = told
        while state["status"] == "running":
            show(state)
            time.sleep(WRITTEN)
            with suppress(WorkbenchError):
                state = read(folder)
        show(state)

    if background or (background is None and looked_at()):
        threading.Thread(target=go_on, name="follow", daemon=True).start()
    else:
        go_on()
        print(end_line(read(folder)), flush=True)


def lines() -> View:
    """A view that prints one line per epoch, and within long epochs one every 15 seconds, each with the ranks."""
    state = {"told": time.monotonic(), "epochs": 0, "phase": ""}

    def show(told: dict) -> None:
        progress = told["progress"]
        for row in progress["history"][state["epochs"] :]:
            print(_epoch_line(row, progress["epochs"]), flush=True)
            state["told"] = time.monotonic()
        state["epochs"] = len(progress["history"])
        phase, moment = progress.get("phase", ""), time.monotonic()
        if phase == "training" and moment - state["told"] > EVERY:
            state["told"] = moment
            print(f"  {step_line(progress)}, {time_left(progress)}", flush=True)
            for line in rank_lines(progress.get("ranks", [])):
                print(f"    {line}", flush=True)
        elif phase not in ("", "training", "validating", state["phase"]):
            print(f"{phase} ...", flush=True)
        state["phase"] = phase

    return show


def find_slowest(ranks: list[dict]) -> int | None:
    """The rank for which the others wait, which waits least itself; None as long as not all have measured it.

    All do as many steps a second, so that the longest time by itself goes with the least in exchanges. Shares, since
    ranks do not measure the same seconds, in which all may be slower or faster.
    """
    shares = [rank.get("exchange_share") for rank in ranks]
    return shares.index(min(shares)) if len(shares) > 1 and None not in shares else None


def rank_lines(ranks: list[dict]) -> list[str]:
    """A line for each rank that has measured something: its own pace, what it waits for, its memory."""
    found, slowest = [], find_slowest(ranks)
    for rank, told in enumerate(ranks):
        parts = [f"{told['memory'] / 2**30:.2f} GiB"] if "memory" in told else []
        if "images_per_second" in told:
            parts[:0] = [
                f"{told['images_per_second']:.1f} images/s by itself",
                f"waits {told['input_wait_share']:.0%} for input",
                f"{told['exchange_share']:.0%} in the exchange",
            ]
        if "gpu_memory" in told:
            parts.append(f"{told['gpu_memory'] / 2**30:.2f} GiB of the GPU")
        if "gpu_use" in told:
            parts.append(f"the GPU computes {told['gpu_use']:.0%} of the time")
        if parts:
            found.append(f"rank {rank}: {', '.join(parts)}{', the slowest' if rank == slowest else ''}")
    return found


def end_line(told: dict) -> str:
    """How a training that no longer runs ended, as a sentence."""
    if told["status"] in ENDS:
        return f"{ENDS[told['status']]}{': ' + told['said'] if told['said'] else '.'}"
    return (
        f"The training was broken off after {len(told['progress']['history'])} complete epochs: "
        f"go on with `workbench run --resume {told['run']}`."
    )


def time_left(progress: dict) -> str:
    """How long the epoch and the training will still take, as far as that is known."""
    if "step" not in progress:
        return "time left not known"
    each = progress["epoch_seconds"] / progress["step"]
    epoch, after = each * (progress["steps"] - progress["step"]), progress["epochs"] - progress["epoch"]
    # The last epoch, its validation included, tells best what the next will take; the first holds the compilation.
    whole = progress["history"][-1]["seconds"] if progress["history"] else each * progress["steps"]
    return f"about {duration(epoch)} of this epoch and {duration(epoch + after * whole)} of training left"


def step_line(progress: dict) -> str:
    """Where training is, with its loss and pace."""
    return (
        f"epoch {progress['epoch']}/{progress['epochs']}, step {progress['step']}/{progress['steps']}, "
        f"loss {_number(progress['loss'])}, rate {progress['learning_rate']:.1e}, "
        f"{progress['images_per_second']:.1f} images/s in all, {progress['input_wait_share']:.0%} waiting for input"
    )


def epoch_table(history: list[dict]) -> str:
    """The last finished epochs as an HTML table, and the best one, starred."""
    if not history:
        return ""
    names = ("epoch", "loss", "val loss", "val AUROC", "rate", "images/s", "waiting for input", "s")
    best, rows = max((row["epoch"] for row in history if row["best"]), default=0), []
    for row in [row for row in history[:-SHOWN] if row["epoch"] == best] + history[-SHOWN:]:
        cells = (
            f"{row['epoch']}{' ★' if row['epoch'] == best else ''}",
            _number(row["loss"]),
            _number(row["val_loss"]),
            _number(row["val_auroc"]),
            f"{row['learning_rate']:.1e}",
            f"{row['images_per_second']:.1f}",
            f"{row['input_wait_share']:.1%}",
            f"{row['seconds']:.0f}",
        )
        rows.append(cells)
    left_out = len(history) - len(rows)
    return _table(names, rows) + (f"<i>{left_out} more epochs are in history.csv</i>" if left_out else "")


def rank_table(ranks: list[dict]) -> str:
    """What each rank measures of itself as an HTML table, the slowest one marked."""
    slowest, rows = find_slowest(ranks), []
    names = ["rank", "images/s by itself", "waits for input", "in the exchange", "memory"]
    shown = {
        "gpu_memory": ("GPU memory", lambda held: f"{held / 2**30:.2f} GiB"),
        "gpu_use": ("GPU use", "{:.0%}".format),
    }
    gpu = {name: how for name, how in shown.items() if any(name in told for told in ranks)}
    for rank, told in enumerate(ranks):
        paced = "images_per_second" in told
        cells = [
            f"<b>{rank} ◀ slowest</b>" if rank == slowest else str(rank),
            f"{told['images_per_second']:.1f}" if paced else "",
            f"{told['input_wait_share']:.1%}" if paced else "",
            f"{told['exchange_share']:.1%}" if paced else "",
            f"{told['memory'] / 2**30:.2f} GiB" if "memory" in told else "",
        ]
        rows.append(cells + [write(told[name]) if name in told else "" for name, (_, write) in gpu.items()])
    return _table(names + [title for title, _ in gpu.values()], rows)


def duration(seconds: float) -> str:
    """A time in seconds as words."""
    minutes, rest = divmod(int(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def summary(told: dict) -> str:
    """The head of a panel as HTML: what runs, or how it ended."""
    progress = told["progress"]
    parts = [f"<b>{html.escape(progress.get('phase') or 'starting')}</b>", f"{duration(told['seconds'])} so far"]
    if told["status"] != "running":
        parts = [f"<b>{html.escape(end_line(told))}</b>", f"{duration(told['seconds'])} in all"]
    elif "step" in progress:
        parts += [step_line(progress), time_left(progress)]
    return f"<div style='line-height:1.5'>{html.escape(told['run'])}: {' · '.join(parts)}</div>"


def _table(names, rows) -> str:
    head = "".join(f"<th style='padding:0 8px'>{name}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td style='padding:0 8px;text-align:right'>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _epoch_line(row: dict, epochs: int) -> str:
    return (
        f"epoch {row['epoch']:>2}/{epochs}  loss {_number(row['loss'])}  val loss {_number(row['val_loss'])}  "
        f"val AUROC {_number(row['val_auroc'])}  rate {row['learning_rate']:.1e}  "
        f"{row['images_per_second']:.1f} images/s  {row['input_wait_share']:.0%} waiting for input  "
        f"{row['seconds']:.0f} s{'  best so far' if row['best'] else ''}"
    )


def _number(value: float | None) -> str:
    return "undefined" if value is None or math.isnan(value) else f"{value:.4f}"


def _plain(value):
    """The same without what JSON has not: an undefined AUROC becomes null."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, str | bool | int | None):
        return value
    return float(value) if math.isfinite(value) else None
