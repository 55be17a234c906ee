"""A table of one's own in place of NIH's: image, patient, labels; any CSV file that has these.

Splits, and the frame that comes of it, are those of `chestxray14.read_dataset`, which reads its table here when it is
given one. Columns, in any order and in capitals or not:

- `image`: the file, as a path inside the folder of images, suffix included or not; PNG, JPEG or DICOM.
- `patient`: a number or a text. Texts are numbered, in the order of the alphabet, so no name comes into shards or runs.
- labels: a column of 0 and 1 per finding, or one column `labels` of findings joined by `|`, as NIH has it.
- optional: `split` (train, val, test; without one an image is left out), `age` (years), `sex` (F, M), `view` (PA, AP),
  `follow_up`. A column `no_finding` or `No Finding` is worked out instead of read.

        image,patient,age,Edema,Mass
        a/0001.png,P-17,61,0,1
        a/0002.png,P-17,62,1,0

    from workbench.data import chestxray14
    frame = chestxray14.read_dataset("data/ours", table="ours.csv", split="random")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from workbench import WorkbenchError

DETAILS = ("split", "age", "sex", "view", "follow_up")
# What the frame, shards and predictions call their other columns.
TAKEN = ("row", "path", "shard", "finding", "file")
SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".dcm")
UNKNOWN = "not known"


def read_table(path: str | Path, *, findings: Sequence[str] | None = None) -> tuple[pd.DataFrame, pd.Series | None]:
    """Read a table into the columns of `chestxray14.read_table`, sorted by image name, and its split, if it has one.

    Ages that are not given are NaN; `no_finding` is true where no finding of the table is 1.

    Args:
        path: the CSV file, in UTF-8.
        findings: the columns that are findings, in this order; None: all that are nothing else, in the table's order.

    Raises:
        WorkbenchError: the table cannot be read, lacks a column, or has a value that is none; the line is named.
    """
    path = Path(path)
    try:
        raw = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        if not isinstance(raw.index, pd.RangeIndex):  # pandas would take the first columns for names of the rows
            raise ValueError("its rows have more fields than the header has names")
    except FileNotFoundError:
        raise WorkbenchError(f"There is no table `{path}`: name a CSV file inside data_folder in `table`.") from None
    except (ValueError, OSError) as error:
        raise WorkbenchError(f"`{path}` cannot be read ({error}): save it as CSV in UTF-8.") from None
    known = {"image", "patient", "labels", "no_finding", *DETAILS}
    lower = {name: name.strip().lower().replace(" ", "_") for name in raw.columns}
    raw = raw.rename(columns={name: low if low in known else name.strip() for name, low in lower.items()})
    raw = raw.drop(columns="no_finding", errors="ignore").apply(lambda column: column.str.strip())
    if absent := [name for name in ("image", "patient") if name not in raw]:
        raise WorkbenchError(
            f"`{path}` has no column `{absent[0]}` (but {_quote(raw.columns)}): rename the one that holds it."
        )
    if repeated := [name for name in raw.columns if (raw.columns == name).sum() > 1]:
        raise WorkbenchError(f"`{path}` has the column `{repeated[0]}` twice: remove one of the two.")
    if raw.empty:
        raise WorkbenchError(f"`{path}` has no row: expected one per image.")
    raw.index += 2  # as lines of the file, the header's first
    for name in ("image", "patient"):
        _refuse(path, raw[name], raw[name] == "", f"no {name}", "give every row one")
    _refuse(path, raw["image"], raw["image"].duplicated(), "twice", "expected one row per image")
    labels = _read_labels(raw, path, findings)
    frame = pd.DataFrame(
        {
            "image": raw["image"],
            "patient": _number_patients(raw["patient"]),
            "follow_up": _read_numbers(raw, "follow_up", path).fillna(0).astype(np.int64),
            "age": _read_numbers(raw, "age", path),
            "sex": _detail(raw, "sex").str.upper().str[:1].where(lambda sex: sex.isin(["F", "M"]), UNKNOWN),
            "view": _detail(raw, "view").replace("", UNKNOWN),
            "no_finding": ~labels.any(axis=1),
        }
    ).join(labels[list(findings) if findings is not None else list(labels)])
    split = None
    if "split" in raw:
        split = raw["split"].str.lower().replace({"valid": "val", "validation": "val", "": None})
        wrong = split.notna() & ~split.isin(["train", "val", "test"])
        _refuse(path, raw["split"], wrong, "as split", "expected train, val, test, or nothing to leave an image out")
    order = frame["image"].argsort(kind="stable")
    return tuple(part if part is None else part.iloc[order].reset_index(drop=True) for part in (frame, split))


def find_images(images: pd.Series, folder: str | Path) -> pd.Series:
    """The absolute path of each image in a folder of images, NaN where there is none."""
    folder = os.path.abspath(folder)
    paths = {}
    for name in images:
        tried = (os.path.join(folder, name + suffix) for suffix in SUFFIXES)
        # Nothing outside the folder, whatever the table says.
        inside = (path for path in tried if os.path.normpath(path).startswith(folder + os.sep))
        paths[name] = next((path for path in inside if os.path.isfile(path)), None)
    return images.map(paths)


def _read_labels(raw: pd.DataFrame, path: Path, findings: Sequence[str] | None) -> pd.DataFrame:
    """One column of 0 and 1, uint8, per finding of the table."""
    names = [name for name in raw.columns if name not in ("image", "patient", "labels", *DETAILS)]
    if "labels" in raw:
        sets = raw["labels"].str.split("|").map(lambda words: {word.strip() for word in words} - {"", "No Finding"})
        names = sorted(set().union(*sets))
        labels = pd.DataFrame({name: sets.map(lambda words, name=name: name in words) for name in names}, raw.index)
    else:
        labels = raw[names]
    if findings is not None:
        if absent := [name for name in findings if name not in names]:
            raise WorkbenchError(f"`{path}` has no finding `{absent[0]}`: choose from {', '.join(names)}.")
        if not findings or len(set(findings)) < len(findings):
            raise WorkbenchError(f"findings={list(findings)}: expected at least one, and each only once.")
        labels = labels[list(findings)]
    if not len(labels.columns):
        raise WorkbenchError(f"`{path}` has no finding: give it a column of 0 and 1 for each, or a column `labels`.")
    for name in labels:
        if name in TAKEN or name.endswith("_score") or not name.isprintable():
            raise WorkbenchError(f"`{path}` has a finding `{name}`, a name that is taken: rename the column.")
        if "labels" not in raw:
            wrong = ~labels[name].isin(["0", "1", "0.0", "1.0"])
            say = "expected 0 or 1; decide what is uncertain or empty, or name in `findings` which columns count"
            _refuse(path, labels[name], wrong, f"as `{name}`", say)
    # The floats first: "1.0" is no whole number to a text.
    return labels.astype(float).astype(np.uint8)


def _number_patients(patients: pd.Series) -> pd.Series:
    if patients.str.fullmatch(r"\d{1,15}").all():
        return patients.astype(np.int64)
    codes, _ = pd.factorize(patients, sort=True)
    return pd.Series(codes.astype(np.int64), patients.index)


def _read_numbers(raw: pd.DataFrame, name: str, path: Path) -> pd.Series:
    """A column of numbers from 0 on, NaN where a field is empty or there is no such column."""
    given = _detail(raw, name)
    numbers = pd.to_numeric(given.where(given != ""), errors="coerce")
    wrong = (given != "") & ~numbers.between(0, 10_000)
    _refuse(path, given, wrong, f"as {name}", "expected a number, or nothing")
    return numbers.astype(float)


def _detail(raw: pd.DataFrame, name: str) -> pd.Series:
    return raw[name] if name in raw else pd.Series("", raw.index)


def _refuse(path: Path, column: pd.Series, wrong: pd.Series, what: str, mend: str) -> None:
    """Name the first wrong value of a column, with its line."""
    if wrong.any():
        line = wrong.idxmax()
        raise WorkbenchError(f"`{path}` has in line {line} `{column[line]}` {what}: {mend}.")


def _quote(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
