"""Charts of a training."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from workbench.analysis.plots.style import BLUE, GREEN, GREY, ORANGE, dress, panels


def plot_history(history: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw a training's loss, validation AUROC and learning rate by epoch, with the kept epoch marked.

    Args:
        history: one row per epoch: `epoch`, `loss`, `val_loss`, `val_auroc`, `learning_rate`, `best` (0/1).
        ax: three axes to draw on.
    """
    axes = panels(ax, 3, height=3.3)
    epochs = history["epoch"]
    looks = {"marker": "o", "markersize": 4, "linewidth": 1.8}
    for column, colour, name in (("loss", BLUE, "training"), ("val_loss", ORANGE, "validation")):
        axes[0].plot(epochs, history[column], color=colour, label=name, **looks)
    axes[0].legend(frameon=False)
    axes[1].plot(epochs, history["val_auroc"], color=ORANGE, **looks)
    axes[2].plot(epochs, history["learning_rate"], color=GREY, drawstyle="steps-post", **looks)
    axes[2].set_yscale("log")
    axes[2].yaxis.set_minor_locator(NullLocator())
    titles = ("Loss (binary cross-entropy)", "Mean AUROC on validation", "Learning rate (log scale)")
    for panel, title in zip(axes, titles, strict=True):
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        dress(panel, title, xlabel="epoch", grid="both")
    best = history[history["best"] == 1].tail(1)
    if len(best):
        epoch, auroc = best["epoch"].item(), best["val_auroc"].item()
        for panel in axes:
            panel.axvline(epoch, color=GREEN, linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
        axes[1].plot(epoch, auroc, marker="*", markersize=14, color=GREEN, zorder=3)
        axes[1].margins(y=0.12)
        # Towards the middle of the panel, so that it never runs into the next one.
        side = "left" if 2 * epoch < epochs.min() + epochs.max() else "right"
        label = axes[1].annotate(
            f"best {auroc:.3f}", (epoch, auroc), xytext=(0, 9), textcoords="offset points", ha=side,
            fontsize=9, color=GREEN, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        label.set_in_layout(False)
    return axes
