"""What all charts share: colours, sizes, axes and how numbers are written."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

BLUE, VERMILLION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
SKY = "#56B4E9"  # on the warm colours of heat
INK, GREY, PALE = "#333333", "#8C8C8C", "#E6E6E6"
WIDTH = 10.0  # inches: a notebook's column
DPI = 110


def one_panel(ax: Axes | None, *, height: float, width: float = WIDTH) -> Axes:
    """The axes that were given, or new ones of a figure of their own; sizes in inches."""
    return panels(None, 1, height=height, width=width)[0] if ax is None else ax


def panels(ax, count: int, *, height: float, width: float = WIDTH, columns: int | None = None, **grid):
    """The axes given, or those of a new figure, as an array of `count`."""
    if ax is not None:
        return np.ravel(np.asarray(ax, dtype=object))
    columns = min(columns or count, count)
    rows = -(-count // columns)
    _, axes = plt.subplots(
        rows, columns, figsize=(width, height), dpi=DPI, layout="constrained", squeeze=False, gridspec_kw=grid
    )
    for unused in axes.flat[count:]:
        unused.remove()
    return axes.flatten()[:count]


def dress(ax: Axes, title: str, *, xlabel="", ylabel="", grid: str | None = "y", small: bool = False) -> None:
    """Give an axes the common look: title at the left, pale grid beneath, no box."""
    ax.set_title(title, loc="left", fontsize=9.5 if small else 11, color=INK)
    ax.set_xlabel(xlabel, fontsize=9.5, color=INK)
    ax.set_ylabel(ylabel, fontsize=9.5, color=INK)
    ax.tick_params(labelsize=8 if small else 9, colors=INK, length=0)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom") and grid is not None)
        spine.set_color(GREY)
    ax.set_axisbelow(True)
    if grid:
        ax.grid(axis=grid, color=PALE, linewidth=0.8)


def readable(names) -> list[str]:
    """Findings as they are read: without underscores."""
    return [str(name).replace("_", " ") for name in names]
