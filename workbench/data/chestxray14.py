"""NIH ChestX-ray14 as one tidy table: metadata, labels, boxes, and splits that keep patients apart.

Reads NIH's own layout (either release of the table, the official lists, the boxes; images in one folder
or in the twelve of the archives) and never writes into it. Pixels come from `radiographs`, one file at a time, and
from `shards` and `pipeline`, in batches.

    from workbench.data import chestxray14, radiographs
    frame = chestxray14.read_dataset("data/nih")                  # one row per image, 14 columns of 0/1
    chestxray14.split_table(frame)                                # images, patients and positives per split
    boxes = chestxray14.read_boxes("data/nih")
    pixels = radiographs.read_radiograph(frame["path"].iloc[0])   # uint8 (height, width)
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from workbench import WorkbenchError
from workbench.data import own

FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
SPLITS = ("train", "val", "test")

# Newest release first: v2020 corrected labels and ages of the first one.
TABLES = (
    "Data_Entry_2017_v2020.csv",
    "Data_Entry_2017_v2020.csv.gz",
    "Data_Entry_2017.csv",
    "Data_Entry_2017.csv.gz",
)
COLUMNS = {
    "Image Index": "image",
    "Finding Labels": "labels",
    "Follow-up #": "follow_up",
    "Patient ID": "patient",
    "Patient Age": "age",
    "Patient Gender": "sex",
    "View Position": "view",
}
DOWNLOAD = "https://nihcc.app.box.com/v/ChestXray-NIHCC"


def read_dataset(
    folder: str | Path,
    *,
    table: str | Path | None = None,
    images_folder: str | Path | None = None,
    findings: Sequence[str] | None = None,
    split: str = "official",
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    train_list: str | Path | None = None,
    val_list: str | Path | None = None,
    test_list: str | Path | None = None,
    missing: str = "error",
) -> pd.DataFrame:
    """Read table, split and image paths into one row per image, sorted by image name.

    Columns: `image`, `path` (absolute), `patient`, `follow_up`, `age` (years), `sex` (F/M), `view` (PA/AP),
    `no_finding` (none of NIH's 14, whatever `findings` holds), `split`, then uint8 0/1, one per finding.

    The split is drawn over the patients of the whole table, so a patient stays on its side whichever images
    are on the disk.

    Args:
        folder: where NIH's table and lists lie; the other paths may be relative to it.
        table: a CSV file in place of NIH's table, see `own`; its ages may be NaN, its sex and view "not known".
        images_folder: PNG or JPEG files directly in it; else `images/` and `images_0NN/images/` of `folder`. With a
            table of one's own: where the images' names begin; else `images/` of `folder`, or `folder`.
        findings: the label columns wanted, in this order; None: all.
        split: "official" (test_list.txt is test, `validation_fraction` of the other patients is val),
            "random" (patients drawn by `seed`), "lists" (text files that begin each line with a name) or, with a table
            of one's own instead of "official", "table" (its column `split`).
        validation_fraction: share of patients, of train_val_list.txt or of all, in val.
        test_fraction: share of all patients in test, for "random".
        seed: of the patients drawn.
        train_list: for "lists", as are `val_list` and `test_list`; images in none of them are left out.
        val_list: see `train_list`.
        test_list: see `train_list`.
        missing: what an image without a file does: "error", or "skip" to leave it out and count it in
            `frame.attrs["missing"]`.

    Raises:
        WorkbenchError: files, columns, findings or images are missing, or a patient stands on two sides.
    """
    folder = Path(folder)
    if missing not in ("error", "skip"):
        raise WorkbenchError(f'missing={missing!r} is not known: choose "error" or "skip".')
    own_table, given = table, None
    if own_table:
        table, given = own.read_table(folder / own_table, findings=findings)
    else:
        table = read_table(folder, findings=FINDINGS if findings is None else findings)
    if own_table and split in ("official", "table"):
        sides = _split_by_column(given, split, folder / own_table)
    elif split == "official":
        sides = _split_official(table, folder, validation_fraction, seed)
    elif split == "random":
        sides = _split_random(table, validation_fraction, test_fraction, seed)
    elif split == "lists":
        lists = {"train": train_list, "val": val_list, "test": test_list}
        sides = _split_lists(table, {name: path and folder / path for name, path in lists.items()})
    else:
        raise WorkbenchError(f'split={split!r} is not known: choose "official", "random" or "lists".')
    table.insert(table.columns.get_loc("no_finding") + 1, "split", sides)
    table = table[table["split"].notna()].reset_index(drop=True)
    _check_patients(table)
    if own_table:
        images = folder / (images_folder or ("images" if (folder / "images").is_dir() else ""))
        return _add_paths(table, own.find_images(table["image"], images), [images], missing)
    folders, files = find_images(folder, images_folder and folder / images_folder)
    return _add_paths(table, table["image"].str.rsplit(".", n=1).str[0].map(files), folders, missing)


def read_table(folder: str | Path, *, findings: Sequence[str] = FINDINGS) -> pd.DataFrame:
    """Read NIH's table (the newest release in `folder`) without paths and split, sorted by image name.

    Both releases give the same columns; ages such as `058Y`, `013M` and `001D` become whole years.
    """
    _check_findings(findings)
    path = _find_table(Path(folder))
    try:
        raw = pd.read_csv(path, usecols=lambda name: name in COLUMNS, dtype=str, keep_default_na=False)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise WorkbenchError(f"`{path}` cannot be read ({error}): put NIH's table there again.") from None
    absent = [name for name in COLUMNS if name not in raw.columns]
    if absent:
        raise WorkbenchError(f"`{path}` has no column {_quote(absent)}: expected NIH's table, with {_quote(COLUMNS)}.")
    if raw.empty:
        raise WorkbenchError(f"`{path}` has no row: expected one per image.")
    raw = raw.rename(columns=COLUMNS).sort_values("image", ignore_index=True)
    repeated = raw.loc[raw["image"].duplicated(), "image"]
    if len(repeated):
        raise WorkbenchError(f"`{path}` has `{repeated.iloc[0]}` twice: expected one row per image.")

    positives = _read_labels(raw["labels"], path)
    frame = pd.DataFrame(
        {
            "image": raw["image"],
            "patient": _read_whole_numbers(raw, "patient", path),
            "follow_up": _read_whole_numbers(raw, "follow_up", path),
            "age": _read_ages(raw, path),
            "sex": raw["sex"],
            "view": raw["view"],
            "no_finding": ~positives.any(axis=1),
        }
    )
    for finding in findings:
        frame[finding] = positives[:, FINDINGS.index(finding)].astype(np.uint8)
    return frame


def read_boxes(folder: str | Path) -> pd.DataFrame:
    """Read the hand-drawn boxes: image, finding, x, y, width, height in pixels of the 1024×1024 original.

    NIH's `Infiltrate` is called Infiltration here, as in the table. A data set without the file has no rows.
    """
    path = Path(folder) / "BBox_List_2017.csv"
    names = ["image", "finding", "x", "y", "width", "height"]
    if not path.is_file():
        return pd.DataFrame({name: pd.Series(dtype=str if name in names[:2] else float) for name in names})
    # By position: the header spreads `Bbox [x,y,w,h]` over four columns and adds three empty ones.
    try:
        boxes = pd.read_csv(path, skiprows=1, header=None, usecols=range(6), index_col=False, dtype={0: str, 1: str})
        boxes = boxes.set_axis(names, axis=1).astype(dict.fromkeys(names[2:], float))
        bad = boxes[names[:2]].isna().any(axis=1) | ~np.isfinite(boxes[names[2:]]).all(axis=1)
        if bad.any():
            raise ValueError(f"the box in line {bad.idxmax() + 2} lacks a value")
    except (ValueError, OSError) as error:
        raise WorkbenchError(
            f"`{path}` is not NIH's list of boxes ({error}): expected image, finding, x, y, width, height."
        ) from None
    boxes["finding"] = boxes["finding"].replace("Infiltrate", "Infiltration")
    return boxes


def hash_sources(
    folder: str | Path,
    *,
    table: str | Path | None = None,
    split: str = "official",
    train_list: str | Path | None = None,
    val_list: str | Path | None = None,
    test_list: str | Path | None = None,
) -> dict[str, str]:
    """SHA-256 of the files that labels, boxes and splits are read from: name -> 64 hexadecimal digits.

    Args:
        folder: where NIH's table and lists lie.
        table: one's own in place of NIH's, as for `read_dataset`.
        split: as for `read_dataset`; with the lists it says which files count.
        train_list: for "lists", as are `val_list` and `test_list`; named in the answer as they are named here.
        val_list: see `train_list`.
        test_list: see `train_list`.

    Raises:
        WorkbenchError: there is no table, or a file cannot be read.
    """
    folder = Path(folder)
    official = () if table else ("train_val_list.txt", "test_list.txt")
    lists = {"official": official, "lists": (train_list, val_list, test_list)}
    boxes = ("BBox_List_2017.csv",) if (folder / "BBox_List_2017.csv").exists() else ()
    hashes = {}
    for name in (table or _find_table(folder).name, *boxes, *filter(None, lists.get(split, ()))):
        try:
            with (folder / name).open("rb") as file:
                hashes[str(name)] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise WorkbenchError(f"`{folder / name}` cannot be read ({error.strerror}): put it there again.") from None
    return hashes


def findings_of(frame: pd.DataFrame) -> list[str]:
    """The findings of a frame: its columns after `split`."""
    return list(frame.columns[frame.columns.get_loc("split") + 1 :])


def prevalence_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Number and share of the images with each finding and with "No Finding", and the share in each split."""
    labels = frame[findings_of(frame)].assign(**{"No Finding": frame["no_finding"]}).astype(float)
    table = pd.DataFrame({"images": labels.sum().astype(int), "share": labels.mean()})
    for split in SPLITS:
        table[split] = labels[frame["split"] == split].mean()
    return table.rename_axis("finding")


def cooccurrence_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Images that have both findings, (K, K); the diagonal counts each finding's images."""
    labels = frame[findings_of(frame)].astype(np.int64)
    return labels.T @ labels


def split_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Images, patients and positives per finding of each split.

    Raises:
        WorkbenchError: a patient stands on two sides.
    """
    _check_patients(frame)
    groups = frame.groupby("split")
    table = pd.DataFrame({"images": groups.size(), "patients": groups["patient"].nunique()})
    table = table.join(groups[findings_of(frame)].sum().astype(int))
    return table.reindex([split for split in SPLITS if split in table.index])


def _find_table(folder: Path) -> Path:
    for name in TABLES:
        if (folder / name).is_file():
            return folder / name
    raise WorkbenchError(
        f"`{folder}` holds no {TABLES[0]} (nor {TABLES[2]}): put NIH's table there, from {DOWNLOAD}, "
        "or write a made-up data set with `workbench synthesize`."
    )


def _check_findings(findings: Sequence[str]) -> None:
    unknown = [finding for finding in findings if finding not in FINDINGS]
    if unknown:
        raise WorkbenchError(f"{_quote(unknown)} is not a finding: choose from {', '.join(FINDINGS)}.")
    if not findings or len(set(findings)) < len(findings):
        raise WorkbenchError(f"findings={list(findings)}: expected at least one, and each only once.")


def _read_labels(labels: pd.Series, path: Path) -> np.ndarray:
    """Label strings such as `Effusion|Mass` -> bool (images, 14)."""
    codes, combinations = pd.factorize(labels)  # some 800 distinct strings in 112,120 rows
    positives = np.zeros((len(combinations), len(FINDINGS)), dtype=bool)
    for row, combination in enumerate(combinations):
        for label in combination.split("|"):
            if label in FINDINGS:
                positives[row, FINDINGS.index(label)] = True
            elif label != "No Finding":
                raise WorkbenchError(
                    f"`{path}` has the label `{label}` (in `{combination}`): expected `No Finding`, or, "
                    f"separated by `|`, some of {', '.join(FINDINGS)}."
                )
    return positives[codes]


def _read_whole_numbers(raw: pd.DataFrame, column: str, path: Path) -> pd.Series:
    numbers = pd.to_numeric(raw[column], errors="coerce")
    bad = numbers.isna() | (numbers % 1 != 0) | (numbers.abs() >= 2**53)
    if bad.any():
        raise WorkbenchError(
            f"`{path}` has the {column} `{raw.loc[bad, column].iloc[0]}` for "
            f"`{raw.loc[bad, 'image'].iloc[0]}`: expected a whole number."
        )
    return numbers.astype(np.int64)


def _read_ages(raw: pd.DataFrame, path: Path) -> pd.Series:
    parts = raw["age"].str.extract(r"^(\d+)([YMD]?)$").set_axis(["age", "unit"], axis=1)
    ages = _read_whole_numbers(raw[["image"]].assign(age=parts["age"].fillna(raw["age"])), "age", path)
    return ages // parts["unit"].map({"": 1, "Y": 1, "M": 12, "D": 365}).astype(np.int64)


def _split_official(table: pd.DataFrame, folder: Path, validation_fraction: float, seed: int) -> pd.Series:
    train_val, test = folder / "train_val_list.txt", folder / "test_list.txt"
    sides = pd.Series(None, index=table.index, dtype=object)
    sides[table["image"].isin(read_list(train_val))] = "train"
    in_test = table["image"].isin(read_list(test))
    _check_overlap(table, sides.notna() & in_test, train_val, test)
    sides[in_test] = "test"
    if sides.isna().any():
        raise WorkbenchError(
            f"{_such_as(table, sides.isna())} of the table are in neither `{train_val}` nor `{test}`: "
            'complete the lists, or choose split="random" or "lists".'
        )
    patients = _draw_patients(table.loc[sides == "train", "patient"], seed)
    chosen = patients[: _count(len(patients), validation_fraction, "validation_fraction")]
    sides[(sides == "train") & table["patient"].isin(chosen)] = "val"
    return sides


def _split_by_column(given: pd.Series | None, split: str, path: Path) -> pd.Series:
    if split == "official":
        raise WorkbenchError(f'split="official" is NIH\'s, and `{path}` is not: choose "table", "random" or "lists".')
    if given is None:
        raise WorkbenchError(
            f'split="table" needs a column `split` in `{path}`: add it, or choose "random" or "lists".'
        )
    for side in SPLITS:
        if side not in set(given):
            raise WorkbenchError(f'`{path}` has no image in the split {side}: add some, or choose "random" or "lists".')
    return given.copy()


def _split_random(table: pd.DataFrame, validation_fraction: float, test_fraction: float, seed: int) -> pd.Series:
    patients = _draw_patients(table["patient"], seed)
    test = _count(len(patients), test_fraction, "test_fraction")
    val = _count(len(patients), validation_fraction, "validation_fraction")
    if test + val >= len(patients):
        raise WorkbenchError(
            f"validation_fraction={validation_fraction} and test_fraction={test_fraction} leave none of "
            f"{len(patients):,} patients for training: choose smaller ones."
        )
    side_of = pd.Series("train", index=patients)
    side_of.iloc[:test] = "test"
    side_of.iloc[test : test + val] = "val"
    return table["patient"].map(side_of).astype(object)


def _split_lists(table: pd.DataFrame, lists: dict[str, str | Path | None]) -> pd.Series:
    absent = [f"{side}_list" for side, path in lists.items() if not path]
    if absent:
        raise WorkbenchError(f'split="lists" needs {_quote(absent)}: a text file of image names each.')
    sides = pd.Series(None, index=table.index, dtype=object)
    for side, path in lists.items():
        names = read_list(Path(path))
        unknown = names[~names.isin(table["image"])]
        if len(unknown):
            raise WorkbenchError(
                f"`{path}` names {len(unknown):,} images that the table does not have (such as "
                f"`{unknown.iloc[0]}`): expected names such as 00000001_000.png."
            )
        chosen = table["image"].isin(names)
        _check_overlap(table, chosen & sides.notna(), path, "another list")
        sides[chosen] = side
    return sides


def read_list(path: Path) -> pd.Series:
    """Read image names, the first word of each line: published lists put labels behind the name."""
    if not path.is_file():
        raise WorkbenchError(f"`{path}` is no file: expected a text file with an image name on each line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (ValueError, OSError) as error:
        raise WorkbenchError(f"`{path}` cannot be read ({error}): save it as text in UTF-8.") from None
    return pd.Series([words[0] for line in lines if (words := line.split())], dtype=str)


def _draw_patients(patients: pd.Series, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(np.unique(patients))


def _count(total: int, fraction: float, name: str) -> int:
    if not 0 <= fraction < 1:
        raise WorkbenchError(f"{name}={fraction} is not a share of the patients: expected 0 <= {name} < 1.")
    return max(round(total * fraction), 1) if fraction else 0


def _check_overlap(table: pd.DataFrame, both: pd.Series, first: str | Path, second: str | Path) -> None:
    if both.any():
        raise WorkbenchError(
            f"{_such_as(table, both)} are in `{first}` and in `{second}`: remove them from one of the two."
        )


def _check_patients(frame: pd.DataFrame) -> None:
    sides = frame[["patient", "split"]].drop_duplicates()
    twice = sides.loc[sides["patient"].duplicated(), "patient"]
    if len(twice):
        where = " and ".join(sorted(sides.loc[sides["patient"] == twice.iloc[0], "split"]))
        raise WorkbenchError(
            f"{twice.nunique():,} patients (such as {twice.iloc[0]}) stand in {where}: put all images of a "
            "patient into one split, since what is learned of a patient is no test."
        )


def find_images(folder: Path, images_folder: str | Path | None = None) -> tuple[list[Path], dict[str, str]]:
    """The folders where images are looked for, and in them the path of each image by its name without suffix."""
    folders = [folder / "images", *sorted(folder.glob("images_*/images"))]
    if images_folder:
        folders = [Path(images_folder)]
    files = {}
    for stem, path in (entry for searched in folders for entry in _list_images(searched)):
        # A PNG beside a JPEG of the same name is the original.
        if stem not in files or path.endswith(".png"):
            files[stem] = path
    return folders, files


def _add_paths(frame: pd.DataFrame, paths: pd.Series, folders: list[Path], missing: str) -> pd.DataFrame:
    gone = paths.isna()
    if gone.any() and (missing == "error" or gone.all()):
        raise WorkbenchError(
            f"{_such_as(frame, gone)} of {len(frame):,} are not on the disk (looked in {_quote(folders)}): "
            'extract all archives, or leave out what is missing with missing="skip".'
        )
    frame.insert(1, "path", paths.astype(str))
    frame = frame[~gone].reset_index(drop=True)
    frame["split"] = frame["split"].astype(str)
    frame.attrs["missing"] = int(gone.sum())
    return frame


def _list_images(folder: Path) -> Iterator[tuple[str, str]]:
    """Stem and absolute path of the images directly in a folder."""
    if not folder.is_dir():
        return
    parent = os.path.abspath(folder)
    for name in sorted(os.listdir(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in (".png", ".jpg", ".jpeg"):
            yield stem, os.path.join(parent, name)


def _such_as(table: pd.DataFrame, chosen: pd.Series) -> str:
    return f"{chosen.sum():,} images (such as `{table.loc[chosen, 'image'].iloc[0]}`)"


def _quote(names: Iterable) -> str:
    return ", ".join(f"`{name}`" for name in names)
