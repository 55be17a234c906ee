"""What the scores of single radiographs say: calibrated probabilities, and yes or no by the run's thresholds.

from workbench.analysis import predictions

files = predictions.find_files(["chest.dcm", "ward-7/"])
predictions.judge_scores(scores, "results/first")        # a row a file and finding
"""

import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from workbench import WorkbenchError, runs
from workbench.analysis import calibration

SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")


def find_files(named: Sequence[str | os.PathLike]) -> list[str]:
    """Files, and of folders the images in them by name; raises a WorkbenchError for a folder without any."""
    found = []
    for name in named:
        if not os.path.isdir(name):  # unlike Path's, False for what can be no path
            found.append(str(name))
            continue
        try:
            inside = sorted(str(path) for path in Path(name).iterdir() if path.suffix.lower() in SUFFIXES)
        except OSError as error:
            raise WorkbenchError(
                f"The folder {name} cannot be read ({error.strerror}): check its permissions."
            ) from None
        if not inside:
            raise WorkbenchError(
                f"The folder {name} holds no {', '.join(SUFFIXES)} files: name files, or another folder."
            )
        found += inside
    return found


def judge_scores(scores: pd.DataFrame, run_folder: str | os.PathLike) -> pd.DataFrame:
    """What a run says about scores of single radiographs.

    Args:
        scores: (n, K) in [0, 1], as the network gives them, by file and finding.
        run_folder: the run; its `calibration.json` and the thresholds in its `metrics.json` are used where they are
        there.

    Returns:
        One row per file and finding: `file`, `finding`, `score`, `probability` (the score, corrected where the run has
        a calibration), `threshold` (of the score; NaN where the run has none) and `positive` (None without a
        threshold).

    Raises:
        WorkbenchError: the run's calibration is of other findings.
    """
    folder = Path(run_folder)
    corrected = scores
    if (folder / "calibration.json").exists():
        corrected = calibration.apply_calibration(calibration.read_calibration(folder / "calibration.json"), scores)
    told = runs.read_metrics(folder).get("test", {}).get("per_finding", {})
    chosen = pd.Series({name: (told.get(name) or {}).get("threshold") for name in scores.columns}, dtype=float)
    table = scores.rename_axis(index="file", columns="finding").stack().rename("score").reset_index()
    table["probability"] = corrected.stack().to_numpy()
    table["threshold"] = table["finding"].map(chosen)
    positive = (table["score"] >= table["threshold"]).astype(object)
    return table.assign(positive=positive.where(table["threshold"].notna(), None))


def format_judgement(rows: pd.DataFrame) -> str:
    """Some rows of `judge_scores`'s answer as text."""
    said = rows["positive"].map({True: "above its threshold", False: ""}).fillna("no threshold")
    return rows.assign(says=said)[["finding", "probability", "says"]].to_string(
        index=False, header=False, formatters={"probability": "{:.3f}".format}
    )


def describe_judgement(table: pd.DataFrame) -> str:
    """One or two sentences on how the numbers came about."""
    corrected = (table["score"] != table["probability"]).any()
    how = "Probabilities are corrected by the run's calibration." if corrected else "Probabilities are not calibrated."
    return how + (" Thresholds were chosen on the run's validation images." if table["threshold"].notna().any() else "")
