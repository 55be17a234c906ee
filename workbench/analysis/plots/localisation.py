"""How well heat maps find what radiologists marked."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import offset_copy

from workbench.analysis.plots.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILLION, dress, panels, readable


def plot_localisation(table: pd.DataFrame, *, ax: Sequence[Axes] | None = None) -> np.ndarray:
    """Draw the pointing game beside its chance level, and the share of boxes found by least IoBB.

    Args:
        table: one row per finding, from `localisation.localisation_table`.
        ax: two axes.

    Returns:
        The two axes.
    """
    rows = table.sort_values("pointing", ascending=False, kind="stable")
    left, right = panels(ax, 2, height=0.36 * len(rows) + 1.75, width_ratios=[3, 2])
    y = np.arange(len(rows))
    for panel in (left, right):
        for row in y[::2]:
            panel.axhspan(row - 0.5, row + 0.5, color="#F6F6F6", zorder=0)
    left.hlines(y, rows["pointing_low"], rows["pointing_high"], color=BLUE, linewidth=3, alpha=0.55, zorder=3)
    left.plot(
        rows["pointing"], y, linestyle="none", marker="o", markersize=8, color=BLUE, markeredgecolor="white", zorder=4,
        label="pointing, with 95% interval",
    )  # fmt: skip
    left.plot(
        rows["chance"], y, linestyle="none", marker="|", markersize=15, markeredgewidth=2.5, color=VERMILLION, zorder=2,
        label="chance: the boxes' share of the image",
    )  # fmt: skip
    names = zip(readable(rows.index), rows["images"], strict=True)
    left.set_yticks(y, [f"{name}  ({images:,})" for name, images in names])
    looks = zip((BLUE, GREEN, ORANGE, PURPLE, GREY) * 3, "osD^v" * 3, strict=True)
    overlaps = [name.removeprefix("iobb_") for name in rows.columns if name.startswith("iobb_")]
    # One below the other, since many are 0 at once.
    places = np.linspace(-0.27, 0.27, len(overlaps))
    for least, place, (colour, marker) in zip(overlaps, places, looks, strict=False):
        false = np.average(rows[f"false_positives_{least}"], weights=rows["images"])
        right.plot(
            rows[f"iobb_{least}"], y + place, linestyle="none", marker=marker, markersize=5, color=colour, zorder=3,
            label=f"IoBB ≥ {least}: {false:.1f} false an image", clip_on=False,
        )  # fmt: skip
    right.set_yticks(y, [f"({boxes:,})" for boxes in rows["boxes"]])
    for panel in (left, right):
        panel.set(xlim=(-0.02, 1.02), ylim=(len(rows) - 0.5, -0.5))
        panel.xaxis.set_major_formatter(PercentFormatter(1))
    dress(left, "Pointing game: is the hottest point in a box?", xlabel="images (number in brackets)", grid="x")
    dress(right, "Boxes found, by least IoBB", xlabel="boxes (number in brackets)", grid="x")
    for panel in (left, right):
        below = offset_copy(panel.transAxes, panel.figure, y=-40, units="points")  # clear of the axis's label
        panel.legend(
            frameon=False, fontsize=8.5, labelcolor=INK, loc="upper left", borderaxespad=0, bbox_to_anchor=(0, 0),
            bbox_transform=below,
        )  # fmt: skip
    return np.array([left, right])
