"""The live panel of a training in JupyterLab: bars, growing curves, the ranks, a button to stop.

Widgets live in the kernel, which shows them again in a page that is reloaded, unless a cell blocks it: so trainings are
awaited, see `session`. In any other notebook `progress.follow` shows the same. When the training has ended the panel
becomes a picture and tables that are kept in the notebook's file, where widgets would be lost with the kernel.

    show = panel.panel(stop=workers.stop)
    show(told)                              # what progress.read returns, as often as there is news
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable

import ipywidgets as widgets
from IPython.display import HTML, display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from workbench.training import progress

SHARE = 0.03  # of the client's time that drawing curves may take: the ranks need the cores
EVERY = 1.0  # seconds between two updates, whatever the pace of the news: a page has to draw each of them


def panel(stop: Callable[[], None] | None = None) -> Callable[[dict], None]:
    """Display a panel and return the function that keeps it up to date; a button calls `stop`, if one is given."""
    head, ranks, epochs = (widgets.HTML() for _ in range(3))
    wide = widgets.Layout(width="34em")
    overall = widgets.FloatProgress(description="training", max=1.0, layout=wide)
    epoch = widgets.FloatProgress(description="this epoch", max=1.0, layout=wide)
    curves = widgets.Image(format="png", layout=widgets.Layout(max_width="860px", visibility="hidden"))
    button = widgets.Button(description="Stop at the next step", icon="stop", layout=widgets.Layout(width="14em"))
    button.on_click(lambda _: (setattr(button, "disabled", True), stop()))
    tabs = widgets.Tab([ranks, epochs], titles=["ranks", "epochs"])
    inside = [head, overall, epoch, curves, tabs]
    handle = display(widgets.VBox([*inside, button] if stop else inside), display_id=True)
    head.value = "starting the workers …"
    drawn, shown = {"at": 0.0, "took": 0.0, "of": None, "png": b""}, {"at": -EVERY}

    def show(told: dict) -> None:
        state, ended = told["progress"], told["status"] != "running"
        if not ended and time.monotonic() - shown["at"] < EVERY:
            return
        shown["at"] = time.monotonic()
        done, share = len(state["history"]), _share_of_epoch(state)
        head.value, ranks.value = progress.summary(told), progress.rank_table(state.get("ranks", []))
        epochs.value = progress.epoch_table(state["history"])
        overall.value, epoch.value = (done + share) / (state.get("epochs") or 1), share
        what, moment = (done, len(told["losses"]), ended), time.monotonic()
        if what != drawn["of"] and told["losses"] and (ended or moment - drawn["at"] > drawn["took"] / SHARE):
            curves.value = draw_curves(told)
            curves.layout.visibility = "visible"
            drawn.update(at=moment, took=time.monotonic() - moment, of=what, png=curves.value)
        if ended:
            button.disabled = True
            handle.update(HTML(_kept(head.value, drawn["png"], ranks.value, epochs.value)))

    return show


def draw_curves(told: dict) -> bytes:
    """The loss, within epochs too, and the AUROC on validation so far, as a PNG picture."""
    history = told["progress"]["history"]
    # Not pyplot's: this may be drawn in a thread, while other cells draw their own.
    figure = Figure(figsize=(8.6, 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, auroc = figure.subplots(1, 2)
    few = "." if len(told["losses"]) < 3 else ""  # a line of one point is not seen
    loss.plot(*zip(*told["losses"], strict=True), color="#0072B2", linewidth=1.2, marker=few, label="training")
    ends = [row["epoch"] for row in history]
    if history:
        loss.plot(ends, [row["val_loss"] for row in history], "o-", color="#D55E00", markersize=4, label="validation")
        scores = [float("nan") if row["val_auroc"] is None else row["val_auroc"] for row in history]
        auroc.plot(ends, scores, "o-", color="#D55E00", markersize=4)
    loss.legend(frameon=False, fontsize=8)
    for axes, title in ((loss, "Loss"), (auroc, "Mean AUROC on validation")):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("epoch", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.set_xlim(0, 1.03 * max(told["losses"][-1][0], *ends, 0.01))
        axes.xaxis.set_major_locator(MaxNLocator(integer=bool(ends)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    return picture.getvalue()


def _share_of_epoch(state: dict) -> float:
    # A finished epoch is in the history.
    return state["step"] / state["steps"] if len(state["history"]) < state.get("epoch", 0) and "step" in state else 0.0


def _kept(head: str, png: bytes, ranks: str, epochs: str) -> str:
    picture = f'<img alt="curves" src="data:image/png;base64,{base64.b64encode(png).decode()}">' if png else ""
    return f"{head}{picture}{epochs}{ranks}"
