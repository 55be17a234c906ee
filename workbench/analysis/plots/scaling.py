"""Charts of throughput, time and efficiency by number of workers, measured and predicted, and of a step's parts."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from workbench.analysis.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    WIDTH,
    dress,
    one_panel,
    panels,
)

# Parts of a step, as `scaling_model.PARTS` names them.
PART_COLOURS = {
    "compute": BLUE,
    "input wait": SKY,
    "waiting for the slowest": ORANGE,
    "exposed communication": VERMILLION,
}


def plot_throughput(
    scaling: pd.DataFrame,
    article: pd.DataFrame | None = None,
    *,
    strong: pd.DataFrame | None = None,
    prediction: pd.DataFrame | None = None,
    article_prediction: pd.DataFrame | None = None,
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Draw images per second by workers, with the ideal line and each point's efficiency.

    Args:
        scaling: `scaling.scaling_table`'s answer.
        article: the same for the article's GPUs, drawn in a panel of its own: its scale is another.
        strong: the same for a global batch that workers share, drawn beside ours.
        prediction: `scaling.predict`'s answer, drawn as a dashed line beside ours, with its interval as a band.
        article_prediction: the same for the article's panel.
        ax: one axes, two with the article.

    Returns:
        An array of one or two axes.
    """
    tables = _sides(scaling, article)
    axes = panels(ax, len(tables), height=4.3, width=WIDTH if article is not None else 6.5)
    predictions = (prediction, article_prediction)[: len(tables)]
    for panel, (title, table, colour), told in zip(axes, tables, predictions, strict=True):
        workers, rate = table["workers"], table["images_per_second"]
        reach = np.array([0.0, workers.max()])
        if told is not None:
            reach[1] = max(reach[1], told["workers"].max())
            _draw_prediction(panel, told, "images_per_second", "low", "high")
        ideal = rate.iloc[0] / workers.iloc[0] / table["efficiency"].iloc[0]
        panel.plot(reach, ideal * reach, color=GREY, linewidth=1.2, label="ideal: in proportion")
        _draw_spread(panel, table, colour)
        panel.plot(workers, rate, color=colour, marker="o", markersize=6, linewidth=1.8, label="measured")
        if strong is not None and panel is axes[0]:
            _draw_spread(panel, strong, GREEN)
            looks = {"color": GREEN, "marker": "D", "markersize": 5, "linewidth": 1.4}
            panel.plot(strong["workers"], strong["images_per_second"], label="measured, shared batch", **looks)
        top = ideal * reach[1]
        apart = _apart(workers[rate > 0.05 * top], 0.06 * reach[1])
        for n, y, efficiency in zip(workers, rate, table["efficiency"], strict=True):
            _label(panel, f"{efficiency:.0%}" if n in apart else "", n, y, (6, -11), colour)
        panel.set_ylim(0, 1.06 * top)
        panel.set_xlim(0, reach[1] * 1.1)
        doubled = [n for n in 2 ** np.arange(12) if workers.max() < n <= reach[1]]
        panel.set_xticks(_apart([*workers, *doubled], 0.04 * reach[1]))
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
    strong: pd.DataFrame | None = None,
    prediction: pd.DataFrame | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the efficiency by workers, 100 % being throughput in proportion to the workers.

    Args:
        scaling: `scaling.scaling_table`'s answer.
        article: the same for the article's GPUs; a share has no scale, so it stands in the same panel.
        strong: the same for a global batch that workers share.
        prediction: `scaling.predict`'s answer, drawn as a dashed line, with its interval as a band.
        ax: where to draw.
    """
    ax = one_panel(ax, height=3.8)
    counts = [1.0]
    ax.axhline(1, color=GREY, linewidth=1.2, label="ideal: in proportion")
    if prediction is not None:
        _draw_prediction(ax, prediction, "efficiency", "efficiency_low", "efficiency_high")
        counts += [n for n in 2.0 ** np.arange(12) if n <= prediction["workers"].max()]
    for (title, table, colour), marker, order in zip(_sides(scaling, article), "os", (4, 3), strict=False):
        looks = {"color": colour, "marker": marker, "linewidth": 1.8, "zorder": order}
        ax.plot(table["workers"], table["efficiency"], label=title, **looks)
        counts += list(table["workers"])
    if strong is not None:
        looks = {"color": GREEN, "marker": "D", "markersize": 5, "linewidth": 1.4, "zorder": 3}
        ax.plot(strong["workers"], strong["efficiency"], label="Measured here, shared batch", **looks)
    for n, efficiency in zip(scaling["workers"], scaling["efficiency"], strict=True):
        _label(ax, f"{efficiency:.0%}", n, efficiency, (6, 5), BLUE)
    ax.set_xticks(_apart(sorted(set(counts)), 0.04 * max(counts)))
    ax.set_ylim(0, max(1.1, 1.08 * scaling["efficiency"].max()))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    dress(ax, "Efficiency", xlabel="workers", ylabel="speed-up / workers", grid="both")
    return ax


def plot_step_parts(parts: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw what a step's time goes to, a stacked bar for each row.

    Args:
        parts: index of labels ("2 workers"), a column of seconds for each of `scaling_model.PARTS`.
        ax: where to draw.
    """
    ax = one_panel(ax, height=1.4 + 0.42 * len(parts))
    total = parts[list(PART_COLOURS)].sum(axis=1)
    unit, name, short = (1e-3, "milliseconds", "ms") if total.max() < 2 else (1.0, "seconds", "s")
    y, left = np.arange(len(parts)), np.zeros(len(parts))
    for part, colour in PART_COLOURS.items():
        width = parts[part].to_numpy() / unit
        ax.barh(y, width, left=left, height=0.66, color=colour, label=part, edgecolor="white", linewidth=0.6)
        for row, (start, length) in enumerate(zip(left, width, strict=True)):
            share = length * unit / total.iloc[row]
            if length * unit > 0.06 * total.max():
                # White is read on the dark colours only.
                ink = "white" if colour in (BLUE, VERMILLION) else "black"
                ax.text(start + length / 2, row, f"{share:.0%}", ha="center", va="center", fontsize=8.5, color=ink)
        left = left + width
    for row, length in enumerate(left):
        told = f"{length:,.0f} {short}" if length >= 100 else f"{length:.3g} {short}"
        ax.annotate(told, (length, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_yticks(y, parts.index)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.1 * left.max())
    ax.legend(frameon=False, fontsize=9, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.1)
    dress(ax, "", xlabel=f"{name} of a step", grid="x")
    return ax


def plot_forecast(
    curves: Mapping[str, pd.DataFrame], measured: Mapping[str, pd.DataFrame] | None = None, *, ax: Axes | None = None
) -> Axes:
    """Draw the efficiency that is predicted for large numbers of workers, on a scale that doubles.

    Args:
        curves: name -> `scaling.predict`'s answer; intervals are drawn as bands.
        measured: name -> `workers`, `efficiency`: points, in the colour of the curve of the same name.
        ax: where to draw.
    """
    ax = one_panel(ax, height=4.2)
    ax.axhline(0.8, color=GREY, linewidth=1, linestyle=":")
    looks = zip(curves.items(), (BLUE, VERMILLION, GREEN, PURPLE, ORANGE), ("-", "--", "-.", ":", "-"), strict=False)
    for (name, table), colour, line in looks:
        ax.plot(table["workers"], table["efficiency"], color=colour, linestyle=line, linewidth=1.8, label=name)
        ax.fill_between(
            table["workers"], table["efficiency_low"], table["efficiency_high"], color=colour, alpha=0.13, linewidth=0
        )
        points = (measured or {}).get(name)
        if points is not None:
            ax.plot(points["workers"], points["efficiency"], "o", color=colour, markersize=6, markeredgecolor="white")
    most = max(table["workers"].max() for table in curves.values())
    ax.set_xscale("log", base=2)
    ax.set_xticks([n for n in 2 ** np.arange(0, 14, 2) if n <= most])
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.set_ylim(0, 1.1)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    dress(ax, "On paper: efficiency with many workers", xlabel="workers", ylabel="speed-up / workers", grid="both")
    return ax


def _draw_prediction(ax: Axes, table: pd.DataFrame, value: str, low: str, high: str) -> None:
    looks = {"color": ORANGE, "linestyle": (0, (5, 2)), "linewidth": 1.6}
    ax.plot(table["workers"], table[value], label="predicted", **looks)
    if table[low].notna().all():
        band = {"color": ORANGE, "alpha": 0.18, "linewidth": 0, "zorder": 0.5}
        ax.fill_between(table["workers"], table[low], table[high], label="its 95 % interval", **band)


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
