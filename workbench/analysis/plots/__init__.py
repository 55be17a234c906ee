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

from workbench.analysis.plots.dataset import (
    plot_cooccurrence,
    plot_demographics,
    plot_images_per_patient,
    plot_prevalence,
    plot_split_shift,
)
from workbench.analysis.plots.evaluation import plot_auroc, plot_precision_recall, plot_roc
from workbench.analysis.plots.judgement import (
    plot_calibration,
    plot_comparison,
    plot_operating_points,
    plot_subgroups,
)
from workbench.analysis.plots.localisation import plot_localisation
from workbench.analysis.plots.scaling import (
    plot_efficiency,
    plot_forecast,
    plot_step_parts,
    plot_throughput,
    plot_time_to_train,
)
from workbench.analysis.plots.sweep import plot_sweep
from workbench.analysis.plots.training import plot_history
from workbench.analysis.plots.walls import plot_heat_maps, plot_radiographs

__all__ = [
    "plot_auroc",
    "plot_calibration",
    "plot_comparison",
    "plot_cooccurrence",
    "plot_demographics",
    "plot_efficiency",
    "plot_forecast",
    "plot_heat_maps",
    "plot_history",
    "plot_images_per_patient",
    "plot_localisation",
    "plot_operating_points",
    "plot_precision_recall",
    "plot_prevalence",
    "plot_radiographs",
    "plot_roc",
    "plot_split_shift",
    "plot_step_parts",
    "plot_subgroups",
    "plot_sweep",
    "plot_throughput",
    "plot_time_to_train",
]
