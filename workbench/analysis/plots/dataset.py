"""Charts of the data set: findings, patients, views and splits."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter, StrMethodFormatter

from workbench.analysis.plots.style import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    VERMILLION,
    dress,
    one_panel,
    panels,
    readable,
)


def plot_prevalence(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how many images show each finding.

    Args:
        table: index finding ("No Finding" may be among them), columns `images` and `share` (0 to 1).
        ax: where to draw.
    """
    ax = one_panel(ax, height=0.31 * len(table) + 1.0)
    table = table.sort_values("images")
    colours = [GREY if name == "No Finding" else BLUE for name in table.index]
    bars = ax.barh(readable(table.index), table["images"], color=colours, height=0.72)
    labels = [f"{n:,.0f}  ({share:.1%})" for n, share in zip(table["images"], table["share"], strict=True)]
    ax.bar_label(bars, labels, padding=4, fontsize=9, color=INK)
    ax.set_xlim(0, max(table["images"].max(), 1) * 1.15)
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    dress(ax, "Images with each finding (one image may show several)", xlabel="images", grid="x")
    return ax


def plot_cooccurrence(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw which findings come together: of the images with the row's finding, the share with the column's.

    Args:
        table: K x K counts of images, findings on both sides, the diagonal being each finding's own count.
        ax: where to draw.
    """
    ax = one_panel(ax, height=0.42 * len(table) + 1.9)
    order = pd.Series(np.diag(table), index=table.index).sort_values(ascending=False)
    counts = table.loc[order.index, order.index].to_numpy(float)
    share = np.divide(counts, order.to_numpy()[:, None], out=np.zeros_like(counts), where=counts > 0)
    sns.heatmap(
        100 * share, mask=np.eye(len(order), dtype=bool), annot=True, fmt=".0f", cmap="Blues", vmin=0,
        linewidths=1, linecolor="white", annot_kws={"fontsize": 8.5}, cbar=False, ax=ax,
    )  # fmt: skip
    ax.set_facecolor(PALE)
    ax.set_xticks(np.arange(len(order)) + 0.5, readable(order.index), rotation=40, ha="right")
    rows = [f"{name}  ({n:,.0f})" for name, n in zip(readable(order.index), order, strict=True)]
    ax.set_yticks(np.arange(len(order)) + 0.5, rows, rotation=0)
    dress(ax, "Of the images with the row's finding, % that also show the column's", grid=None)
    ax.tick_params(length=0)
    return ax


def plot_demographics(frame: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw the images by age and sex, and by view and sex, in two panels.

    Args:
        frame: one row per image with `age` (years), `sex` ("F", "M") and `view` ("PA", "AP").
        ax: two axes to draw on.
    """
    axes = panels(ax, 2, height=3.7, width_ratios=[2, 1])
    colours = {"F": PURPLE, "M": BLUE}
    names = {"F": "female", "M": "male"}
    ages = frame["age"].clip(upper=100)
    edges = np.arange(0, 105, 5)
    for sex, colour in colours.items():
        counts, _ = np.histogram(ages[frame["sex"] == sex], bins=edges)
        axes[0].stairs(counts, edges, color=colour, linewidth=1.8, label=names[sex])
        axes[0].stairs(counts, edges, color=colour, fill=True, alpha=0.15)
    axes[0].legend(frameon=False)
    axes[0].set_xlim(0, 100)
    dress(axes[0], "Images by age", xlabel="age at the examination, years (groups of 5)", ylabel="images")
    views = pd.crosstab(frame["view"], frame["sex"]).reindex(index=["PA", "AP"], columns=["F", "M"]).fillna(0)
    for shift, sex in ((-0.2, "F"), (0.2, "M")):
        bars = axes[1].bar(np.arange(2) + shift, views[sex], width=0.36, color=colours[sex], alpha=0.85)
        axes[1].bar_label(bars, [f"{n:,.0f}" for n in views[sex]], padding=2, fontsize=9, color=INK)
    axes[1].set_xticks([0, 1], ["PA\n(standing)", "AP\n(mostly bedside)"])
    axes[1].margins(y=0.1)
    dress(axes[1], "Images by view", ylabel="images")
    for panel in axes:
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return axes


def plot_images_per_patient(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how patients and images spread over patients with few and with many images.

    Args:
        frame: one row per image with `patient`.
        ax: where to draw.
    """
    ax = one_panel(ax, height=3.7)
    per_patient = frame.groupby("patient").size()
    top = max(int(np.ceil(np.log2(per_patient.max()))), 1)
    edges = [0, *(2**k for k in range(top + 1))]
    names = [_span(low + 1, high) for low, high in pairwise(edges)]
    group = pd.cut(per_patient, edges, labels=names)
    patients = per_patient.groupby(group, observed=False).size()
    images = per_patient.groupby(group, observed=False).sum()
    for shift, counts, colour, what in ((-0.2, patients, BLUE, "patients"), (0.2, images, ORANGE, "images")):
        share = counts / counts.sum()
        label = f"share of the {counts.sum():,} {what}"
        bars = ax.bar(np.arange(len(names)) + shift, share, width=0.38, color=colour, label=label)
        ax.bar_label(bars, [_percent(x) for x in share], padding=2, fontsize=8.5, color=INK)
    ax.set_xticks(range(len(names)), names)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.margins(y=0.1)
    ax.legend(frameon=False)
    dress(
        ax,
        "Patients and images, by how many images a patient has",
        xlabel="images of one patient",
        ylabel="share",
    )
    return ax


def plot_split_shift(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how common each finding is in each split, to show where the splits differ.

    Args:
        table: a prevalence table: index finding, columns `images`, `share`, then one share per split.
        ax: where to draw.
    """
    ax = one_panel(ax, height=0.34 * len(table) + 1.3)
    table = table.sort_values("share")
    columns = [name for name in table.columns if name not in ("images", "share")]
    shares = table[columns].rename(columns=lambda name: name.removeprefix("share_").removesuffix("_share"))
    # A logarithm has no place for a finding that a split lacks; it stands at the left edge, marked 0 %.
    nothing = shares[shares > 0].min().min() / 2
    lacking = bool((shares == 0).any().any())
    shares = shares.clip(lower=nothing)
    rows = np.arange(len(table))
    ax.hlines(rows, shares.min(axis=1), shares.max(axis=1), color=GREY, linewidth=2, alpha=0.6, zorder=1)
    looks = zip(shares, (BLUE, ORANGE, VERMILLION), ("o", "D", "s"), strict=False)
    for split, colour, marker in looks:
        ax.scatter(shares[split], rows, color=colour, marker=marker, s=38, label=split, zorder=2)
    ax.set_xscale("log")
    ax.set_yticks(rows, readable(table.index))
    ticks = [t for t in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if _within(t, shares)]
    ticks = [t for t in ticks if not lacking or t > 1.5 * nothing]
    ax.set_xticks([nothing] * lacking + ticks, ["0%"] * lacking + [_percent(t) for t in ticks])
    ax.minorticks_off()
    ax.legend(frameon=False, loc="lower right", title="split")
    dress(ax, "How common each finding is, by split", xlabel="share of the split's images (log scale)", grid="x")
    return ax


def _percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}"


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low}–{high}"


def _within(tick: float, shares: pd.DataFrame) -> bool:
    positive = shares.where(shares > 0)
    return 0.7 * positive.min().min() <= tick <= 1.4 * positive.max().max()
