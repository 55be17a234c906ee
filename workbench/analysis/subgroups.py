"""AUROC by subgroup of the patients: sex, age and view.

from workbench.analysis import subgroups

groups = subgroups.group_images(images, shards_table)      # sex, age and view of each image, as text
subgroups.subgroup_table(labels, scores, patients, groups)
"""

import numpy as np
import pandas as pd

from workbench import WorkbenchError
from workbench.analysis import evaluation

AGES = (0, 20, 40, 60, 80, np.inf)  # years; each band holds its lower end
AGE_NAMES = ("under 20", "20 to 39", "40 to 59", "60 to 79", "80 and over")
FEWEST = 10  # positives and negatives, below which a group is called small


def group_images(images: pd.Series, table: pd.DataFrame) -> pd.DataFrame:
    """Sex, age band and view of each image.

    Args:
        images: (n,), names.
        table: one row per image: `image`, `sex` ("F", "M"), `age` (years) and `view` ("PA", "AP").

    Returns:
        (n,) rows in the order of `images`; `sex`, `age`, `view` as text.

    Raises:
        WorkbenchError: an image is not in the table.
    """
    known = table.drop_duplicates("image").set_index("image")
    missing = images[~images.isin(known.index)]
    if len(missing):
        raise WorkbenchError(
            f"{len(missing)} predicted images are not in the shards' table, such as {missing.iloc[0]}: give the shards "
            "that the run was trained on."
        )
    rows = known.loc[images]
    band = pd.cut(rows["age"], AGES, right=False, labels=list(AGE_NAMES)).astype(object)
    sex = rows["sex"].map({"F": "female", "M": "male"})
    groups = {"sex": sex.to_numpy(), "age": band.to_numpy(), "view": rows["view"].to_numpy()}
    return pd.DataFrame(groups).fillna("not known")


def subgroup_table(
    labels: pd.DataFrame,
    scores: pd.DataFrame,
    patients: pd.Series,
    groups: pd.DataFrame,
    *,
    resamples: int = 1000,
    seed: int = 0,
    fewest: int = FEWEST,
) -> pd.DataFrame:
    """The AUROC of each finding, and their mean, in every group.

    Args:
        labels: (n, K), 0 or 1.
        scores: (n, K), the same columns.
        patients: (n,), whom each image shows.
        groups: (n, G), each column one way to divide the images, its values the groups' names.
        resamples, seed: as for `evaluation.auroc_table`; patients are drawn within the group.
        fewest: with fewer positives or negatives than this a figure is marked as small.

    Returns:
        One row per way, group and finding, and one with the finding "mean" (over the findings that are defined and not
        small in that group): `by`, `group`, `finding`, `auroc`, `ci_low`, `ci_high`, `positives`, `negatives`,
        `images`, `patients`, `findings` (in the mean, else 1 or 0) and `small`.
    """
    evaluation.check_tables(labels, scores, patients)
    parts = []
    for by in groups.columns:
        for group in _ordered(groups[by]):
            chosen = (groups[by] == group).to_numpy()
            truth, score, who = (table[chosen] for table in (labels, scores, patients))
            table = evaluation.auroc_table(truth, score, who, resamples=resamples, seed=seed)
            table["small"] = table[["positives", "negatives"]].min(axis=1) < fewest
            table["findings"] = table["auroc"].notna().astype(int)
            large = table.index[~table["small"] & table["auroc"].notna()]
            mean = evaluation.mean_auroc(truth[large], score[large], who, resamples=resamples, seed=seed)
            row = {name: mean[name] for name in ("auroc", "ci_low", "ci_high", "findings")}
            row |= {"positives": int(truth[large].to_numpy().sum()), "small": len(large) < len(labels.columns)}
            row |= {"negatives": int((1 - truth[large]).to_numpy().sum())}
            table = pd.concat([table, pd.DataFrame({"mean": row}).T]).rename_axis("finding").reset_index()
            parts.append(table.assign(by=by, group=group, images=len(truth), patients=who.nunique()))
    columns = ["by", "group", "finding", "auroc", "ci_low", "ci_high", "positives", "negatives", "images", "patients"]
    joined = pd.concat(parts, ignore_index=True)[[*columns, "findings", "small"]]
    kinds = dict.fromkeys(["auroc", "ci_low", "ci_high"], float) | {"small": bool}
    return joined.astype(kinds | dict.fromkeys(["positives", "negatives", "images", "patients", "findings"], int))


def _ordered(values: pd.Series) -> list[str]:
    """The groups' names: age bands by age, others by the alphabet, what is not known last."""
    ranks = {name: number for number, name in enumerate(AGE_NAMES)}
    return sorted(values.unique(), key=lambda name: (name == "not known", ranks.get(name, 0), name))
