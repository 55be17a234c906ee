"""Charts of what a model's scores are worth: calibration, thresholds, subgroups, and one run against another."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from workbench.analysis.plots.style import BLUE, GREY, INK, VERMILLION, dress, one_panel, panels, readable


def plot_calibration(
    table: pd.DataFrame, corrected: pd.DataFrame | None = None, *, ax: Sequence[Axes] | None = None
) -> np.ndarray:
    """Draw the observed share of each finding against the mean score, in groups of images, one panel a finding.

    Args:
        table: `calibration.calibration_table`'s answer for the scores as they are.
        corrected: the same for corrected scores.
        ax: one axes per finding.
    """
    findings = list(dict.fromkeys(table["finding"]))
    columns = min(5, len(findings))
    axes = panels(ax, len(findings), height=2.55 * -(-len(findings) // columns) + 0.7, columns=columns)
    sides = [("as the network gives them", table, GREY, "s")]
    if corrected is not None:
        sides.append(("corrected", corrected, BLUE, "o"))
    for panel, finding in zip(axes, findings, strict=True):
        parts = [side[side["finding"] == finding] for _, side, _, _ in sides]
        top = max(max(part["high"].max(), part["predicted"].max()) for part in parts) * 1.04
        panel.plot([0, top], [0, top], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        for part, (_, _, colour, marker) in zip(parts, sides, strict=True):
            panel.vlines(part["predicted"], part["low"], part["high"], color=colour, alpha=0.45, linewidth=1.5)
            panel.plot(part["predicted"], part["observed"], color=colour, marker=marker, markersize=4, linewidth=1.2)
        panel.set(xlim=(0, top), ylim=(0, top), box_aspect=1)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0 if top > 0.06 else 1))
            axis.set_major_locator(MaxNLocator(3))
        positives, images = parts[0]["positives"].sum(), parts[0]["images"].sum()
        dress(panel, f"{readable([finding])[0]}\n{positives:,} of {images:,} images", grid="both", small=True)
    looks = [Line2D([], [], color=c, marker=m, markersize=4, label=f"scores {name}") for name, _, c, m in sides]
    figure = axes[0].figure
    figure.legend(handles=looks, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    figure.supxlabel("mean score of a tenth of the images", fontsize=9.5, color=INK)
    figure.supylabel("share of them with the finding, 95% interval", fontsize=9.5, color=INK)
    return axes


def plot_operating_points(table: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw sensitivity, specificity, PPV and NPV of each finding at its threshold, with intervals.

    Args:
        table: `thresholds.score_thresholds`'s answer.
        ax: four axes.
    """
    names = {"sensitivity": "Sensitivity", "specificity": "Specificity", "ppv": "PPV", "npv": "NPV"}
    axes = panels(ax, 4, height=0.31 * len(table) + 1.2)
    rows = np.arange(len(table))
    for panel, (name, title) in zip(axes, names.items(), strict=True):
        panel.hlines(rows, table[f"{name}_low"], table[f"{name}_high"], color=BLUE, linewidth=3, alpha=0.5)
        panel.plot(table[name], rows, color=BLUE, marker="o", linestyle="none", markersize=6, markeredgecolor="white")
        panel.set(xlim=(-0.02, 1.02), ylim=(len(table) - 0.5, -0.5))
        panel.set_xticks([0, 0.5, 1], ["0", "50%", "100%"])
        panel.set_yticks(rows, [])
        dress(panel, title, grid="both")
    labels = [
        f"{name}  (from {threshold:.2g})" if np.isfinite(threshold) else f"{name}  (none)"
        for name, threshold in zip(readable(table.index), table["threshold"], strict=True)
    ]
    axes[0].set_yticks(rows, labels)
    for row in np.flatnonzero(table["threshold"].isna()):
        axes[0].text(0.02, row, "one class absent in validation", fontsize=7.5, color=INK, va="center")
    return axes


def plot_subgroups(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the AUROC of each finding in each subgroup; small groups are hollow, and have their interval too.

    Args:
        table: `subgroups.subgroup_table`'s answer.
        ax: where to draw the means, a row a group; the findings are small dots behind them.
    """
    groups = table.drop_duplicates(["by", "group"])[["by", "group", "images", "patients"]]
    gaps = (groups["by"] != groups["by"].shift()).cumsum().to_numpy() - 1
    rows = np.arange(len(groups)) + 0.6 * gaps
    ax = one_panel(ax, height=0.5 * len(groups) + 1.6)
    for y, (_, told) in zip(rows, groups.iterrows(), strict=True):
        part = table[(table["by"] == told["by"]) & (table["group"] == told["group"])]
        single, mean = part[part["finding"] != "mean"], part[part["finding"] == "mean"].iloc[0]
        for small, look in ((False, {"color": GREY}), (True, {"facecolors": "none", "edgecolors": GREY})):
            these = single[single["small"] == small]
            ax.scatter(these["auroc"], np.full(len(these), y + 0.17), s=22, zorder=2, **look)
        ax.hlines(y - 0.1, mean["ci_low"], mean["ci_high"], color=BLUE, linewidth=3, alpha=0.55)
        ax.plot(mean["auroc"], y - 0.1, marker="o", color=BLUE, markersize=8, markeredgecolor="white", zorder=3)
        text = f"{mean['auroc']:.3f}  [{mean['ci_low']:.3f}, {mean['ci_high']:.3f}]"
        text = text if np.isfinite(mean["auroc"]) else "no finding is large enough"
        place = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 8.5, "color": INK}
        ax.text(1.015, y, f"{text}\nof {mean['findings']} findings", **place)
    names = [f"{row.group}\n{row.images:,} images, {row.patients:,} patients" for row in groups.itertuples()]
    ax.set_yticks(rows, names)
    ax.set_ylim(rows[-1] + 0.6, -0.6)
    ax.axvline(0.5, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    looks = [
        Line2D([], [], color=BLUE, marker="o", linewidth=3, markeredgecolor="white", label="mean of the large ones"),
        Line2D([], [], color=GREY, marker="o", markersize=5, linestyle="none", label="a finding"),
        Line2D(
            [], [], markerfacecolor="none", markeredgecolor=GREY, marker="o", markersize=5, linestyle="none",
            label="a finding with fewer than 10 positives or negatives: small",
        ),
    ]  # fmt: skip
    ax.figure.legend(handles=looks, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    dress(ax, "AUROC by subgroup, test images, 95% intervals over patients", xlabel="AUROC (0.5 = chance)", grid="x")
    return ax


def plot_comparison(
    table: pd.DataFrame, *, first: str = "first", second: str = "second", ax: Axes | None = None
) -> Axes:
    """Draw how much better the second run reads each finding than the first, with paired intervals.

    Args:
        table: `comparison.compare_predictions`'s answer.
        first, second: the runs' names.
        ax: where to draw.
    """
    rows = pd.concat([table.drop("mean").sort_values("difference", ascending=False), table.loc[["mean"]]])
    ax = one_panel(ax, height=0.34 * len(rows) + 1.9)
    y = np.arange(len(rows))
    sure = (rows["p_holm"] < 0.05).to_numpy(copy=True)
    sure[-1] = rows["p"].iloc[-1] < 0.05
    ax.axvline(0, color=GREY, linewidth=1)
    ax.axhline(len(rows) - 1.5, color=GREY, linewidth=0.8)
    place = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 8.5, "color": INK}
    ax.text(1.015, -0.9, "difference [95%]", fontweight="bold", **place)
    ax.text(1.345, -0.9, "p (Holm)", fontweight="bold", ha="right", **place)
    for row, (_, told) in enumerate(rows.iterrows()):
        if not np.isfinite(told["difference"]):
            ax.text(1.015, row, "undefined: one class absent", **place)
            continue
        colour, marker = (VERMILLION if told["difference"] < 0 else BLUE, "D") if sure[row] else (GREY, "o")
        ax.hlines(row, told["ci_low"], told["ci_high"], color=colour, linewidth=3, alpha=0.55)
        ax.plot(told["difference"], row, color=colour, marker=marker, markersize=7, markeredgecolor="white")
        numbers = f"{told['difference']:+.3f} [{told['ci_low']:+.3f}, {told['ci_high']:+.3f}]".replace("-", "−")
        ax.text(1.015, row, numbers, **place)
        p = told["p"] if row == len(rows) - 1 else told["p_holm"]
        ax.text(1.345, row, "<0.001" if p < 0.001 else f"{p:.3f}", ha="right", **place)
    ax.set_yticks(y, readable(rows.index))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    reach = 1.08 * np.nanmax(np.abs(rows[["ci_low", "ci_high"]].to_numpy(float)), initial=1e-3)
    ax.set_xlim(-reach, reach)
    looks = [
        Line2D([], [], color=c, marker=m, linestyle="none", label=label)
        for c, m, label in (
            (BLUE, "D", "higher, p < 0.05 after correction"),
            (VERMILLION, "D", "lower, p < 0.05 after correction"),
            (GREY, "o", "not told apart"),
        )
    ]
    ax.figure.legend(handles=looks, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
    title = f"AUROC of {second} less that of {first}\n{len(rows) - 1} findings, the same test images and resamples"
    dress(ax, title, xlabel=f"← {first} is better      difference      {second} is better →", grid="x")
    return ax
