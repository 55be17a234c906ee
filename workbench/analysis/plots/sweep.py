"""The chart of a sweep: how each setting of a grid came out."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from workbench.analysis.plots.style import BLUE, GREY, INK, dress, one_panel


def plot_sweep(table: pd.DataFrame, names: Sequence[str], *, ax: Axes | None = None) -> Axes:
    """Draw the AUROC of every point on validation and on test, a line a setting, the best on validation at the top.

    Without `seed` among the names each test AUROC has its 95 % interval; with it, each seed is a mark of its own, and a
    bar shows the mean over them.

    Args:
        table: `sweep.table_of`'s answer; points without a score are left out.
        names: the grid's.
        ax: one axes.
    """
    table = table[table["test_auroc"].notna()]
    others = [name for name in names if name != "seed"]
    label = table[others].astype(str).apply(lambda row: ", ".join(f"{k} {v}" for k, v in row.items()), axis=1)
    label = label if others else pd.Series("all seeds", index=table.index)
    order = table.groupby(label)["val_auroc"].mean().sort_values()
    ax = one_panel(ax, height=0.42 * len(order) + 1.3)
    place = label.map({name: row for row, name in enumerate(order.index)}).astype(float)
    sides = [("val_auroc", "validation", GREY, "s", 0.14), ("test_auroc", "test", BLUE, "o", -0.14)]
    for column, name, colour, marker, shift in sides:
        ax.scatter(table[column], place + shift, color=colour, marker=marker, s=26, label=name, zorder=3)
        if "seed" in names:
            means = table.groupby(place)[column].mean()
            ax.vlines(means, means.index + shift - 0.12, means.index + shift + 0.12, color=INK, linewidth=2, zorder=4)
    if "seed" not in names:
        ax.hlines(place - 0.14, table["ci_low"], table["ci_high"], color=BLUE, alpha=0.45, linewidth=1.8)
    ax.set_yticks(np.arange(len(order)), order.index)
    ax.set_ylim(-0.6, len(order) - 0.4)
    told = "bars: means over the seeds" if "seed" in names else "lines: 95% intervals on test"
    dress(ax, f"Mean AUROC by setting ({told})", xlabel="mean AUROC over the findings", grid="both")
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax
