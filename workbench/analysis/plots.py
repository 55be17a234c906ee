"""Every chart of the workbench: tables in, matplotlib axes out.

Each function draws one table that another module made; it computes nothing beyond what the drawing needs,
reads no files and changes no global style. Charts of one panel take `ax`, an axes, and return it; charts of
several panels take a sequence of axes and return an array of them. Without `ax` a figure of notebook width
is made. Colours are Okabe and Ito's, which people with colour-blindness can tell apart; markers and labels
repeat what colour says.

    from workbench.analysis import evaluation, plots, published

    labels, scores, images, patients = evaluation.read_predictions("results/first/predictions-test.csv")
    table = evaluation.auroc_table(labels, scores, patients)
    plots.plot_auroc(table, published.published_auroc())
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter
from matplotlib.transforms import offset_copy

from workbench.analysis.published import SOURCES

BLUE, VERMILLION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
INK, GREY, PALE = "#333333", "#8C8C8C", "#E6E6E6"
WIDTH = 10.0  # inches: a notebook's column
DPI = 110


# The data set


def plot_prevalence(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how many images show each finding.

    Args:
        table: index finding ("No Finding" may be among them), columns `images` and `share` (0 to 1).
        ax: where to draw.
    """
    ax = _axes(ax, height=0.31 * len(table) + 1.0)
    table = table.sort_values("images")
    colours = [GREY if name == "No Finding" else BLUE for name in table.index]
    bars = ax.barh(_readable(table.index), table["images"], color=colours, height=0.72)
    labels = [f"{n:,.0f}  ({share:.1%})" for n, share in zip(table["images"], table["share"], strict=True)]
    ax.bar_label(bars, labels, padding=4, fontsize=9, color=INK)
    ax.set_xlim(0, max(table["images"].max(), 1) * 1.15)
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    _dress(ax, "Images with each finding (one image may show several)", xlabel="images", grid="x")
    return ax


def plot_cooccurrence(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw which findings come together: of the images with the row's finding, the share with the column's.

    Args:
        table: K x K counts of images, findings on both sides, the diagonal being each finding's own count.
        ax: where to draw.
    """
    ax = _axes(ax, height=0.42 * len(table) + 1.9)
    order = pd.Series(np.diag(table), index=table.index).sort_values(ascending=False)
    counts = table.loc[order.index, order.index].to_numpy(float)
    share = np.divide(counts, order.to_numpy()[:, None], out=np.zeros_like(counts), where=counts > 0)
    sns.heatmap(
        100 * share, mask=np.eye(len(order), dtype=bool), annot=True, fmt=".0f", cmap="Blues", vmin=0,
        linewidths=1, linecolor="white", annot_kws={"fontsize": 8.5}, cbar=False, ax=ax,
    )  # fmt: skip
    ax.set_facecolor(PALE)
    ax.set_xticks(np.arange(len(order)) + 0.5, _readable(order.index), rotation=40, ha="right")
    rows = [f"{name}  ({n:,.0f})" for name, n in zip(_readable(order.index), order, strict=True)]
    ax.set_yticks(np.arange(len(order)) + 0.5, rows, rotation=0)
    _dress(ax, "Of the images with the row's finding, % that also show the column's", grid=None)
    ax.tick_params(length=0)
    return ax


def plot_demographics(frame: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw the images by age and sex, and by view and sex, in two panels.

    Args:
        frame: one row per image with `age` (years), `sex` ("F", "M") and `view` ("PA", "AP").
        ax: two axes to draw on.
    """
    axes = _panels(ax, 2, height=3.7, width_ratios=[2, 1])
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
    _dress(axes[0], "Images by age", xlabel="age at the examination, years (groups of 5)", ylabel="images")
    views = pd.crosstab(frame["view"], frame["sex"]).reindex(index=["PA", "AP"], columns=["F", "M"]).fillna(0)
    for shift, sex in ((-0.2, "F"), (0.2, "M")):
        bars = axes[1].bar(np.arange(2) + shift, views[sex], width=0.36, color=colours[sex], alpha=0.85)
        axes[1].bar_label(bars, [f"{n:,.0f}" for n in views[sex]], padding=2, fontsize=9, color=INK)
    axes[1].set_xticks([0, 1], ["PA\n(standing)", "AP\n(mostly bedside)"])
    axes[1].margins(y=0.1)
    _dress(axes[1], "Images by view", ylabel="images")
    for panel in axes:
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return axes


def plot_images_per_patient(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw how patients and images spread over patients with few and with many images.

    Args:
        frame: one row per image with `patient`.
        ax: where to draw.
    """
    ax = _axes(ax, height=3.7)
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
    _dress(
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
    ax = _axes(ax, height=0.34 * len(table) + 1.3)
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
    ax.set_yticks(rows, _readable(table.index))
    ticks = [t for t in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if _within(t, shares)]
    ticks = [t for t in ticks if not lacking or t > 1.5 * nothing]
    ax.set_xticks([nothing] * lacking + ticks, ["0%"] * lacking + [_percent(t) for t in ticks])
    ax.minorticks_off()
    ax.legend(frameon=False, loc="lower right", title="split")
    _dress(ax, "How common each finding is, by split", xlabel="share of the split's images (log scale)", grid="x")
    return ax


def plot_radiographs(
    images: Sequence[np.ndarray] | np.ndarray,
    titles: Sequence[str],
    *,
    boxes: Sequence[Sequence[tuple]] | None = None,
    columns: int = 4,
) -> np.ndarray:
    """Hang radiographs on a wall, with a title over each and boxes drawn in.

    Args:
        images: n grey images, uint8, (height, width) or (height, width, 1).
        titles: n titles; long ones are wrapped.
        boxes: for each image a sequence of (x, y, width, height, name) in pixels of the image shown.
        columns: images per row.

    Returns:
        The n axes.
    """
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    # A small wall keeps a small width: two radiographs blown up to the page show nothing more.
    width = min(WIDTH, 3.2 * columns)
    side = width / columns
    letters = max(8, int(side * 13.5))
    named = [re.sub(r"(?<=[a-z])_(?=[A-Z])", " ", str(title)) for title in titles]  # Pleural_Thickening
    texts = ["\n".join(fill(line, letters) for line in title.split("\n")) for title in named]
    height = rows * (side + 0.17 * max(text.count("\n") + 1 for text in texts))
    axes = _panels(None, len(images), columns=columns, width=width, height=height)
    for index, (panel, image, text) in enumerate(zip(axes, images, texts, strict=True)):
        pixels = np.asarray(image)
        pixels = pixels[..., 0] if pixels.ndim == 3 else pixels
        panel.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        panel.set_title(text, fontsize=9, color=INK, pad=3)
        panel.set_axis_off()
        taken = []
        for x, y, box_width, box_height, name in boxes[index] if boxes is not None else ():
            panel.add_patch(Rectangle((x, y), box_width, box_height, fill=False, color=ORANGE, linewidth=1.5))
            inside = y < 0.08 * pixels.shape[0]  # no room above the box
            right = x > 0.6 * pixels.shape[1]  # no room to the right of its corner
            corner = (x + box_width if right else x, y)
            # Boxes often share a corner; then the later name hangs from the lower edge.
            hidden = any(np.abs(np.subtract(corner, other) / pixels.shape[::-1]).max() < 0.08 for other in taken)
            taken.append(corner)
            panel.text(
                corner[0], y + box_height if hidden else y, _readable([name])[0], fontsize=8, color="black",
                ha="right" if right else "left", va="top" if inside or hidden else "bottom",
                bbox={"facecolor": ORANGE, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    return axes


# Training


def plot_history(history: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw a training's loss, validation AUROC and learning rate by epoch, with the kept epoch marked.

    Args:
        history: one row per epoch: `epoch`, `loss`, `val_loss`, `val_auroc`, `learning_rate`, `best` (0/1).
        ax: three axes to draw on.
    """
    axes = _panels(ax, 3, height=3.3)
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
        _dress(panel, title, xlabel="epoch", grid="both")
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


# Evaluation


def plot_auroc(
    table: pd.DataFrame,
    published: pd.DataFrame | None = None,
    *,
    reference: str | None = "CheXNet v3",
    mean: dict | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the AUROC of each finding with its interval, and published figures beside it.

    Published figures from NIH's official split are filled, those from random splits hollow: the two kinds
    must not be compared without that in mind.

    Args:
        table: index finding, columns `auroc`, `ci_low`, `ci_high`.
        published: index finding, one column per source (see `published.SOURCES`).
        reference: the published column that the figures on the right compare with; None: no comparison.
        mean: `evaluation.mean_auroc`'s answer, drawn as a last row.
        ax: where to draw.
    """
    rows = table[["auroc", "ci_low", "ci_high"]].sort_values("auroc", ascending=False, na_position="last")
    if mean is not None:
        rows = pd.concat([rows, pd.DataFrame({"mean": mean}).T[rows.columns].astype(float)])
    published = pd.DataFrame(index=rows.index) if published is None else published.reindex(rows.index)
    if mean is not None and len(published.columns):
        same = rows.index[:-1][rows["auroc"].iloc[:-1].notna()]  # a mean over other findings would not compare
        published.loc["mean"] = published.loc[same].mean(skipna=False)
    ax = _axes(ax, height=0.36 * len(rows) + 1.5 + 0.25 * (len(published.columns) > 0))
    y = np.arange(len(rows))
    for row in y[::2]:
        ax.axhspan(row - 0.5, row + 0.5, color="#F6F6F6", zorder=0)
    if mean is not None:
        ax.axhline(len(rows) - 1.5, color=GREY, linewidth=0.8)
    handles = []
    for column, marker in zip(published.columns, "sD^vP<>" * 3, strict=False):
        official = SOURCES.get(column, {}).get("split") == "official"
        colour = VERMILLION if official else GREY
        looks = {
            "marker": marker,
            "markerfacecolor": colour if official else "none",
            "markeredgecolor": colour,
        }
        looks |= {"markersize": 6.5, "linestyle": "none", "markeredgewidth": 1.3}
        ax.plot(published[column], y, zorder=2, alpha=0.9, **looks)
        kind = "" if "split" in column or column not in SOURCES else f", {SOURCES[column]['split']} split"
        handles.append(Line2D([], [], label=column + kind, **looks))
    ax.hlines(y, rows["ci_low"], rows["ci_high"], color=BLUE, linewidth=3, alpha=0.55, zorder=3)
    ours = {"color": BLUE, "marker": "o", "markersize": 8, "markeredgecolor": "white"}
    ax.plot(rows["auroc"], y, linestyle="none", zorder=4, **ours)
    handles.insert(0, Line2D([], [], label="this run, with 95% interval", linewidth=3, **ours))
    compare = reference is not None and reference in published
    _write_figures(ax, rows, published[reference] if compare else None, reference)
    ax.set_yticks(y, _readable(rows.index))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    below = offset_copy(ax.transAxes, ax.figure, y=-40, units="points")  # clear of the axis's label
    ax.legend(
        handles=handles, frameon=False, fontsize=8.5, ncols=2 if len(handles) > 2 else 1, loc="upper left",
        borderaxespad=0, bbox_to_anchor=(0, 0), bbox_transform=below,
    )  # fmt: skip
    _dress(ax, "Area under the ROC curve, test images", xlabel="AUROC (0.5 = chance, 1 = perfect)", grid="x")
    return ax


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


def plot_calibration(table: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw the observed share of each finding by the mean score, group by group of images.

    Args:
        table: long, columns `finding`, `predicted`, `observed`, `images`.
        ax: one axes per finding.
    """
    findings = table.groupby("finding", sort=False)
    axes = _panels(ax, findings.ngroups, columns=5, height=2.05 * -(-findings.ngroups // 5) + 0.4)
    for panel, (finding, groups) in zip(axes, findings, strict=True):
        top = 1.08 * max(groups["predicted"].max(), groups["observed"].max(), 1e-3)
        panel.plot([0, top], [0, top], color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
        panel.plot(groups["predicted"], groups["observed"], color=BLUE, marker="o", markersize=4, linewidth=1.4)
        panel.set(xlim=(0, top), ylim=(0, top), box_aspect=1)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(3))
            axis.set_major_formatter(PercentFormatter(1, decimals=0 if top > 0.06 else 1))
        _dress(panel, _readable([finding])[0], grid="both", small=True)
    figure = axes[0].figure
    figure.suptitle("Calibration: ideal on the dashed line", x=0.01, ha="left", fontsize=11, color=INK)
    figure.supxlabel("mean score", fontsize=9.5, color=INK)
    figure.supylabel("images with the finding", fontsize=9.5, color=INK)
    return axes


# Scaling


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
    axes = _panels(ax, len(tables), height=4.3, width=WIDTH if article is not None else 6.5)
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
        _dress(panel, title, xlabel="workers", ylabel="images per second (% = efficiency)", grid="both")
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
    axes = _panels(ax, len(tables), height=3.8, width=width, width_ratios=ratios)
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
        _dress(panel, title, xlabel="workers", ylabel=f"{name} to train (black line: ideal)")
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
    ax = _axes(ax, height=3.8)
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
    _dress(ax, "Efficiency", xlabel="workers", ylabel="speed-up / workers", grid="both")
    return ax


# Shared by the charts above


def _axes(ax: Axes | None, *, height: float, width: float = WIDTH) -> Axes:
    return _panels(None, 1, height=height, width=width)[0] if ax is None else ax


def _panels(ax, count: int, *, height: float, width: float = WIDTH, columns: int | None = None, **grid):
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


def _dress(ax: Axes, title: str, *, xlabel="", ylabel="", grid: str | None = "y", small: bool = False) -> None:
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


def _small_multiples(ax, table: pd.DataFrame, x: str, y: str, xlabel: str, ylabel: str) -> np.ndarray:
    curves = {name: curve for name, curve in table.groupby("finding", sort=False)}
    axes = _panels(ax, len(curves), columns=5, height=2.05 * -(-len(curves) // 5) + 0.4)
    pale = [curve.iloc[:: max(1, len(curve) // 150)] for curve in curves.values()]
    for panel, (finding, curve) in zip(axes, curves.items(), strict=True):
        for other in pale:
            panel.plot(other[x], other[y], color=PALE, linewidth=0.8, zorder=0)
        panel.plot(curve[x], curve[y], color=BLUE, linewidth=1.6, zorder=2)
        panel.set(xlim=(0, 1), ylim=(0, 1.01), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], box_aspect=1)
        panel.set_xticklabels(["0", "0.5", "1"])
        panel.set_yticklabels(["0", "0.5", "1"])
        _dress(panel, _readable([finding])[0], grid="both", small=True)
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


def _readable(names) -> list[str]:
    return [str(name).replace("_", " ") for name in names]


def _percent(share: float) -> str:
    if 0 < share < 0.0005:
        return "<0.1%"
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}"


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low}–{high}"


def _within(tick: float, shares: pd.DataFrame) -> bool:
    positive = shares.where(shares > 0)
    return 0.7 * positive.min().min() <= tick <= 1.4 * positive.max().max()
