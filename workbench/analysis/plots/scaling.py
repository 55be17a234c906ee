"""Charts of throughput and time to train by number of workers."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from workbench.analysis.plots.style import BLUE, GREY, INK, ORANGE, VERMILLION, WIDTH, dress, one_panel, panels


def plot_throughput(
    scaling: pd.DataFrame,
    article: pd.DataFrame | None = None,
    *,
    prediction: pd.DataFrame | None = None,
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Draw images per second by workers, with the ideal line and each point's efficiency.

    Args:
        scaling: `scaling.scaling_table`'s answer.
        article: the same for the article's GPUs, drawn in a panel of its own: its scale is another.
        prediction: columns `workers`, `images_per_second`, drawn as a dashed line beside ours.
        ax: one axes, two with the article.

    Returns:
        An array of one or two axes.
    """
    tables = _sides(scaling, article)
    axes = panels(ax, len(tables), height=4.3, width=WIDTH if article is not None else 6.5)
    for panel, (title, table, colour) in zip(axes, tables, strict=True):
        workers, rate = table["workers"], table["images_per_second"]
        reach = np.array([0.0, workers.max()])
        if prediction is not None and panel is axes[0]:
            reach[1] = max(reach[1], prediction["workers"].max())
            panel.plot(
                prediction["workers"], prediction["images_per_second"],
                color=ORANGE, linestyle=(0, (5, 2)), linewidth=1.6, label="model",
            )  # fmt: skip
        ideal = rate.iloc[0] / workers.iloc[0] / table["efficiency"].iloc[0]
        panel.plot(reach, ideal * reach, color=GREY, linewidth=1.2, label="ideal: in proportion")
        _draw_spread(panel, table, colour)
        panel.plot(workers, rate, color=colour, marker="o", markersize=6, linewidth=1.8, label="measured")
        top = ideal * reach[1]
        apart = _apart(workers[rate > 0.05 * top], 0.06 * reach[1])
        for n, y, efficiency in zip(workers, rate, table["efficiency"], strict=True):
            _label(panel, f"{efficiency:.0%}" if n in apart else "", n, y, (6, -11), colour)
        panel.set_ylim(0, 1.06 * top)
        panel.set_xlim(0, reach[1] * 1.1)
        panel.set_xticks(_apart([*workers, reach[1]], 0.04 * reach[1]))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        panel.legend(frameon=False, loc="upper left")
        dress(panel, title, xlabel="workers", ylabel="images per second (% = efficiency)", grid="both")
    return axes


def plot_time_to_train(
    scaling: pd.DataFrame, article: pd.DataFrame | None = None, *, ax: Sequence[Axes] | None = None
) -> np.ndarray:
    """Draw the time that the whole training takes by workers; a line across each bar marks the ideal.

    Args:
        scaling: `scaling.scaling_table`'s answer.
        article: the same for the article's GPUs, drawn in a panel of its own.
        ax: one axes, two with the article.

    Returns:
        An array of one or two axes.
    """
    tables = _sides(scaling, article)
    ratios = [max(len(table), 3) for _, table, _ in tables]
    width = WIDTH if article is not None else 6.5
    axes = panels(ax, len(tables), height=3.8, width=width, width_ratios=ratios)
    for panel, (title, table, colour) in zip(axes, tables, strict=True):
        unit, name = _time_unit(table["seconds"].max())
        x = np.arange(len(table))
        bars = panel.bar(x, table["seconds"] / unit, color=colour, width=0.62)
        panel.bar_label(bars, [_duration(s) for s in table["seconds"]], padding=3, fontsize=9, color=INK)
        ideal = table["seconds"] * table["efficiency"] / unit
        panel.hlines(ideal, x - 0.31, x + 0.31, color="white", linewidth=3.5)
        panel.hlines(ideal, x - 0.36, x + 0.36, color=INK, linewidth=1.5)
        panel.set_xticks(x, [f"{n:.0f}" for n in table["workers"]])
        panel.set_xlim(-0.7, len(table) - 0.3)
        panel.margins(y=0.08)
        dress(panel, title, xlabel="workers", ylabel=f"{name} to train (black line: ideal)")
    return axes


def plot_efficiency(
    scaling: pd.DataFrame,
    article: pd.DataFrame | None = None,
    *,
    prediction: pd.DataFrame | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the efficiency by workers, 100 % being throughput in proportion to the workers.

    Args:
        scaling: `scaling.scaling_table`'s answer.
        article: the same for the article's GPUs; a share has no scale, so it stands in the same panel.
        prediction: columns `workers`, `efficiency`, drawn as a dashed line.
        ax: where to draw.
    """
    ax = one_panel(ax, height=3.8)
    counts = [1]
    ax.axhline(1, color=GREY, linewidth=1.2, label="ideal: in proportion")
    if prediction is not None:
        looks = {"color": ORANGE, "linestyle": (0, (5, 2)), "linewidth": 1.6}
        ax.plot(prediction["workers"], prediction["efficiency"], label="model", **looks)
        counts += list(prediction["workers"])
    for (title, table, colour), marker, order in zip(_sides(scaling, article), "os", (4, 3), strict=False):
        looks = {"color": colour, "marker": marker, "linewidth": 1.8, "zorder": order}
        ax.plot(table["workers"], table["efficiency"], label=title, **looks)
        counts += list(table["workers"])
    for n, efficiency in zip(scaling["workers"], scaling["efficiency"], strict=True):
        _label(ax, f"{efficiency:.0%}", n, efficiency, (6, 5), BLUE)
    ax.set_xticks(_apart(sorted(set(counts)), 0.04 * max(counts)))
    ax.set_ylim(0, max(1.1, 1.08 * scaling["efficiency"].max()))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(frameon=False, loc="lower left")
    dress(ax, "Efficiency", xlabel="workers", ylabel="speed-up / workers", grid="both")
    return ax


def _sides(scaling: pd.DataFrame, article: pd.DataFrame | None) -> list[tuple[str, pd.DataFrame, str]]:
    sides = [("Measured here", scaling.sort_values("workers"), BLUE)]
    if article is not None:
        sides.append(("The article: up to 16 V100 GPUs", article.sort_values("workers"), VERMILLION))
    return sides


def _draw_spread(ax: Axes, table: pd.DataFrame, colour: str) -> None:
    if {"spread_low", "spread_high"} <= set(table.columns):
        rate = table["images_per_second"]
        spread = np.clip([rate - table["spread_low"], table["spread_high"] - rate], 0, None)
        ax.errorbar(table["workers"], rate, yerr=spread, fmt="none", color=colour, capsize=7, elinewidth=1.2)


def _label(ax: Axes, text: str, x: float, y: float, offset: tuple[float, float], colour: str) -> None:
    ax.annotate(text, (x, y), xytext=offset, textcoords="offset points", fontsize=8.5, color=colour)


def _apart(numbers: Sequence[float], distance: float) -> list[float]:
    """Those of the rising numbers that can be labelled without touching the one before."""
    kept: list[float] = []
    for n in numbers:
        if not kept or n - kept[-1] >= distance:
            kept.append(n)
    return kept


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds >= 3 * 3600:
        return 3600.0, "hours"
    return (60.0, "minutes") if seconds >= 180 else (1.0, "seconds")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
