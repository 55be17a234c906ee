"""Charts of how well a model reads."""

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import offset_copy

from workbench.analysis.plots.style import BLUE, GREY, INK, PALE, VERMILLION, dress, one_panel, panels, readable
from workbench.analysis.published import SOURCES


def plot_auroc(
    table: pd.DataFrame,
    published: pd.DataFrame | None = None,
    *,
    reference: str | None = None,
    mean: dict | None = None,
    split: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Draw the AUROC of each finding with its interval, and published figures beside it.

    Every source is named with its kind of split (see `published.KINDS`). Those of the run's own kind are filled, those
    of another hollow, and the comparison on the right says of which kind it is.

    Args:
        table: index finding, columns `auroc`, `ci_low`, `ci_high`.
        published: index finding, one column per source (see `published.SOURCES`).
        reference: the published column that the figures on the right compare with; None: the last complete one of the
            run's own kind of split, if there is one.
        mean: `evaluation.mean_auroc`'s answer, drawn as a last row.
        split: the run's own kind of split: "official", "random" or another; empty: not known.
        ax: where to draw.
    """
    rows = table[["auroc", "ci_low", "ci_high"]].sort_values("auroc", ascending=False, na_position="last")
    if mean is not None:
        rows = pd.concat([rows, pd.DataFrame({"mean": mean}).T[rows.columns].astype(float)])
    published = pd.DataFrame(index=rows.index) if published is None else published.reindex(rows.index)
    if mean is not None and len(published.columns):
        same = rows.index[:-1][rows["auroc"].iloc[:-1].notna()]  # a mean over other findings would not compare
        published.loc["mean"] = published.loc[same].mean(skipna=False)
    ax = one_panel(ax, height=0.36 * len(rows) + 1.5 + 0.25 * (len(published.columns) > 0))
    y = np.arange(len(rows))
    for row in y[::2]:
        ax.axhspan(row - 0.5, row + 0.5, color="#F6F6F6", zorder=0)
    if mean is not None:
        ax.axhline(len(rows) - 1.5, color=GREY, linewidth=0.8)
    handles = []
    kinds = {column: SOURCES.get(column, {}).get("split", "unknown") for column in published.columns}
    for column, marker in zip(published.columns, "sD^vP<>" * 3, strict=False):
        same = kinds[column] == split
        colour = VERMILLION if same else GREY
        looks = {"marker": marker, "markerfacecolor": colour if same else "none", "markeredgecolor": colour}
        looks |= {"markersize": 6.5, "linestyle": "none", "markeredgewidth": 1.3}
        ax.plot(published[column], y, zorder=2, alpha=0.9, **looks)
        handles.append(Line2D([], [], label=_with_kind(column, kinds[column]), **looks))
    ax.hlines(y, rows["ci_low"], rows["ci_high"], color=BLUE, linewidth=3, alpha=0.55, zorder=3)
    ours = {"color": BLUE, "marker": "o", "markersize": 8, "markeredgecolor": "white"}
    ax.plot(rows["auroc"], y, linestyle="none", zorder=4, **ours)
    whose = _with_kind("this run, with 95% interval", split) if split else "this run, with 95% interval"
    handles.insert(0, Line2D([], [], label=whose, linewidth=3, **ours))
    if reference is None:
        alike = [name for name, kind in kinds.items() if kind == split and published[name].notna().all()]
        reference = alike[-1] if alike else None
    compare = reference is not None and reference in published
    named = _with_kind(reference, kinds[reference]) if compare else None
    _write_figures(ax, rows, published[reference] if compare else None, named)
    ax.set_yticks(y, readable(rows.index))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    below = offset_copy(ax.transAxes, ax.figure, y=-40, units="points")  # clear of the axis's label
    ax.legend(
        handles=handles, frameon=False, fontsize=8.5, ncols=2 if len(handles) > 2 else 1, loc="upper left",
        borderaxespad=0, bbox_to_anchor=(0, 0), bbox_transform=below,
    )  # fmt: skip
    dress(ax, "Area under the ROC curve, test images", xlabel="AUROC (0.5 = chance, 1 = perfect)", grid="x")
    return ax


def _with_kind(name: str, kind: str) -> str:
    return name if f"{kind} split" in name else f"{name}, {kind} split"


def plot_roc(table: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw each finding's ROC curve in a small panel of its own, the others pale behind it.

    Args:
        table: long, columns `finding`, `false_positive_rate`, `true_positive_rate`, in curve order.
        ax: one axes per finding.
    """
    x, y = "false_positive_rate", "true_positive_rate"
    axes = _small_multiples(ax, table, x, y, "false-positive rate", "true-positive rate")
    for panel, (_, curve) in zip(axes, table.groupby("finding", sort=False), strict=True):
        panel.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        panel.text(
            0.97, 0.05, f"{np.trapezoid(curve[y], curve[x]):.3f}",
            ha="right", transform=panel.transAxes, fontsize=9.5, color=BLUE,
        )  # fmt: skip
    axes[0].figure.suptitle("ROC curves; the figure is the area", x=0.01, ha="left", fontsize=11, color=INK)
    return axes


def plot_precision_recall(table: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw each finding's precision by recall in a small panel; the dashed line is its prevalence.

    Args:
        table: long, columns `finding`, `recall`, `precision`, recall rising.
        ax: one axes per finding.
    """
    axes = _small_multiples(ax, table, "recall", "precision", "recall", "precision")
    for panel, (_, curve) in zip(axes, table.groupby("finding", sort=False), strict=True):
        prevalence = curve["precision"].iloc[-1]  # everything called positive
        average = np.sum(np.diff(curve["recall"]) * curve["precision"].to_numpy()[1:])
        panel.axhline(prevalence, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        panel.text(
            0.96, 0.93, f"{average:.3f}\n({prevalence:.3f})", linespacing=1.3,
            ha="right", va="top", transform=panel.transAxes, fontsize=9.5, color=BLUE,
        )  # fmt: skip
    title = "Precision and recall; the figures are average precision and, in brackets, prevalence (dashed)"
    axes[0].figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    return axes


def _small_multiples(ax, table: pd.DataFrame, x: str, y: str, xlabel: str, ylabel: str) -> np.ndarray:
    curves = {name: curve for name, curve in table.groupby("finding", sort=False)}
    axes = panels(ax, len(curves), columns=5, height=2.05 * -(-len(curves) // 5) + 0.4)
    pale = [curve.iloc[:: max(1, len(curve) // 150)] for curve in curves.values()]
    for panel, (finding, curve) in zip(axes, curves.items(), strict=True):
        for other in pale:
            panel.plot(other[x], other[y], color=PALE, linewidth=0.8, zorder=0)
        panel.plot(curve[x], curve[y], color=BLUE, linewidth=1.6, zorder=2)
        panel.set(xlim=(0, 1), ylim=(0, 1.01), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], box_aspect=1)
        panel.set_xticklabels(["0", "0.5", "1"])
        panel.set_yticklabels(["0", "0.5", "1"])
        dress(panel, readable([finding])[0], grid="both", small=True)
    axes[0].figure.supxlabel(xlabel, fontsize=9.5, color=INK)
    axes[0].figure.supylabel(ylabel, fontsize=9.5, color=INK)
    return axes


def _write_figures(ax: Axes, rows: pd.DataFrame, reference: pd.Series | None, name: str | None) -> None:
    """Write each row's figures in columns to the right of the axes."""
    place = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 8.5, "color": INK}
    head = place | {"va": "bottom", "fontweight": "bold"}
    ax.text(1.015, -0.6, "AUROC  [95%]", **head)
    if reference is not None:
        ax.text(1.32, -0.6, fill(f"vs {name}", 14), ha="right", **head)
    for y, (finding, row) in enumerate(rows.iterrows()):
        known = np.isfinite(row["auroc"])
        interval = f"{row['auroc']:.3f}  [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
        ax.text(1.015, y, interval if known else "undefined: one class absent", **place)
        if known and reference is not None and np.isfinite(reference[finding]):
            ax.text(1.30, y, f"{row['auroc'] - reference[finding]:+.3f}".replace("-", "−"), ha="right", **place)
