"""What a run was trained, chosen and tested on: a manifest of its splits, checked and hashed.

from workbench.analysis import manifest

told = manifest.split_manifest(images, findings, kind="official")     # images.csv of the shards
told["shared_patients"], told["splits"]["test"]["sha256"]
manifest.prevalence_shift(told)
"""

import hashlib
from collections.abc import Sequence

import pandas as pd

from workbench import WorkbenchError

SPLITS = ("train", "val", "test")


def split_manifest(table: pd.DataFrame, findings: Sequence[str], *, kind: str) -> dict:
    """Count, check and hash the splits.

    Args:
        table: one row per image: `image`, `patient`, `split`, and each finding as 0 or 1.
        findings: the names of the findings.
        kind: where the split comes from: "official", "random" or "lists".

    Returns:
        `kind`; `shared_patients`, 0; `splits`: for each of train, val and test that has images `images`,
        `patients`, `positives` and `prevalence` (0 to 1) by finding, and `sha256` of its image names, sorted, one a
        line: two runs with the same hash were scored on the same images.

    Raises:
        WorkbenchError: a patient stands in two splits, or a split is of another name.
    """
    findings = list(findings)
    unknown = sorted(set(table["split"]) - set(SPLITS))
    if unknown:
        raise WorkbenchError(f"`{unknown[0]}` is no split: expected {', '.join(SPLITS)}; write the shards again.")
    sides = table.groupby("patient")["split"].agg(lambda names: sorted(set(names)))
    shared = sides[sides.str.len() > 1]
    if len(shared):
        raise WorkbenchError(
            f"{len(shared)} patients stand in more than one split, such as patient {shared.index[0]} in "
            f"{' and '.join(shared.iloc[0])}: split by patient, or every score is too high."
        )
    splits = {}
    for split in SPLITS:
        part = table[table["split"] == split]
        if part.empty:
            continue
        names = "".join(f"{name}\n" for name in sorted(part["image"]))
        splits[split] = {
            "images": len(part),
            "patients": int(part["patient"].nunique()),
            "positives": {name: int(part[name].sum()) for name in findings},
            "prevalence": {name: float(part[name].mean()) for name in findings},
            "sha256": hashlib.sha256(names.encode()).hexdigest(),
        }
    return {"kind": kind, "shared_patients": len(shared), "splits": splits}


def manifest_table(manifest: dict) -> pd.DataFrame:
    """Images, patients, positives per finding and the hash's first digits, one column per split."""
    columns = {
        split: {"images": told["images"], "patients": told["patients"]}
        | told["positives"]
        | {"sha256": told["sha256"][:12]}
        for split, told in manifest["splits"].items()
    }
    return pd.DataFrame(columns)


def prevalence_shift(manifest: dict) -> pd.DataFrame:
    """How much commoner each finding is in test than in training.

    Returns:
        Index `finding`; `train` and `test` (prevalence, 0 to 1), `difference` and `ratio` (test over train; NaN where
        training has none).
    """
    table = pd.DataFrame({split: manifest["splits"][split]["prevalence"] for split in ("train", "test")})
    ratio = table["test"] / table["train"].where(table["train"] > 0)
    return table.assign(difference=table["test"] - table["train"], ratio=ratio).rename_axis("finding")
