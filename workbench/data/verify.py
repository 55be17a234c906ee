"""Checks of a whole folder, shards or raw data in NIH's layout, that name each bad file and go on.

found = verify.verify_folder("data/nih")        # prints a line per bad file, and a summary
found["bad"]                                    # how many
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pandas as pd
from tqdm import tqdm

from workbench import WorkbenchError, one_line
from workbench.data import chestxray14, radiographs, shards
from workbench.data.processes import in_order

IMAGES_PER_JOB = 16  # at 1024² a job takes a tenth of a second
MOST_ABSENT = 20  # absent images that are named one by one: of an unfinished download a hundred thousand are
BOX_SIZE = 1024  # boxes are in pixels of the originals, 1024 squared


def verify_folder(
    folder: str | Path, *, processes: int = 0, tell: Callable[[str], None] = tqdm.write, progress: bool = True
) -> dict:
    """Check a folder and tell each bad file, what was remarkable, and at the end a summary, each in a line.

    Args:
        folder: of shards (with info.json or, unfinished, plan.json), or raw data in NIH's layout.
        processes: that decode raw images; 0: one per core.
        tell: called with each line.
        progress: draw a bar on stderr.

    Returns:
        `kind` ("shards" or "raw"), `bad` and `remarks`, the numbers of lines told.

    Raises:
        WorkbenchError: the folder is not there, or holds neither.
    """
    folder, bar = Path(folder), sys.stderr if progress else None
    if processes < 0:
        raise WorkbenchError(f"processes={processes}: expected 0 or more.")
    if not folder.is_dir():
        raise WorkbenchError(f"`{folder}` is no folder: name one of shards, or of raw data in NIH's layout.")
    if (folder / "info.json").exists() or (folder / "plan.json").exists():
        kind, lines = "shards", _check_shards(folder, bar)
    elif any((folder / name).exists() for name in chestxray14.TABLES):
        kind, lines = "raw", _check_raw(folder, processes or len(os.sched_getaffinity(0)), bar)
    else:
        raise WorkbenchError(
            f"`{folder}` holds neither shards (info.json) nor raw data ({chestxray14.TABLES[0]}): name another folder."
        )
    counts = {"bad": 0, "remark": 0}
    for sort, line in lines:
        if sort == "checked":
            checked = line
            continue
        counts[sort] += 1
        tell(one_line(line if sort == "bad" else f"remark: {line}"))
    tell(f"{folder}: {checked} checked, {counts['bad']:,} bad{'' if counts['bad'] else '; all is well'}")
    return {"kind": kind, "bad": counts["bad"], "remarks": counts["remark"]}


def _check_shards(folder: Path, bar: TextIO | None) -> Iterator[tuple[str, str]]:
    """Yields (sort, line), the sort "bad", "remark" or, last, "checked"."""
    if not (folder / "info.json").exists():
        yield "bad", f"`{folder}` is half-written (plan.json, no info.json): run notebook 02 again to finish it"
        yield "checked", "no shards"
        return
    try:
        info = shards.read_info(folder)
        for path, fault in shards.find_faults(folder, bar=bar):
            yield "bad", f"`{path}` {fault}"
    except WorkbenchError as error:
        yield "bad", str(error)
        yield "checked", "no shards"
        return
    for name in ("plan.json", *sorted(path.name for path in folder.glob(".*.part*"))):
        if (folder / name).exists():
            yield "remark", f"`{folder / name}` is left over from the writing and can be removed"
    count = sum(len(told["shards"]) for told in info["splits"].values())
    images = sum(told["images"] for told in info["splits"].values())
    yield "checked", f"{count:,} shards of {images:,} images"


def _check_raw(folder: Path, processes: int, bar: TextIO | None) -> Iterator[tuple[str, str]]:
    """Yields (sort, line), the sort "bad", "remark" or, last, "checked"."""
    try:
        table = chestxray14.read_table(folder)
    except WorkbenchError as error:
        yield "bad", str(error)
        yield "checked", "no images"
        return
    yield from _check_lists(folder, table)
    yield from _check_boxes(folder, table)
    folders, files = chestxray14.find_images(folder)
    paths = table["image"].str.rsplit(".", n=1).str[0].map(files)
    absent = list(table.loc[paths.isna(), "image"])
    yield from (("bad", f"`{image}` of the table is not on the disk") for image in absent[:MOST_ABSENT])
    if more := absent[MOST_ABSENT:]:
        yield (
            "bad",
            f"{len(more):,} more images of the table, from `{more[0]}` to `{more[-1]}`, are not on the disk either",
        )
    others = len(files) - paths.nunique()
    if others:
        where = ", ".join(f"`{searched}`" for searched in folders if searched.is_dir())
        yield "remark", f"{others:,} images in {where} are not in the table, and nothing will use them"
    there = paths.dropna().tolist()
    jobs = [(there[start : start + IMAGES_PER_JOB],) for start in range(0, len(there), IMAGES_PER_JOB)]
    with tqdm(total=len(there), unit=" images", disable=bar is None, mininterval=5, file=bar) as shown:
        # Fewer images are read sooner than another process is started.
        count = min(processes, len(there) // shards.IMAGES_PER_PROCESS + 1)
        for (job,), faults in zip(jobs, in_order(radiographs.find_faults, jobs, count=count), strict=True):
            yield from (("bad", fault) for fault in faults if fault)
            shown.update(len(job))
    yield "checked", f"{len(there):,} images of {len(table):,} in the table"


def _check_lists(folder: Path, table: pd.DataFrame) -> Iterator[tuple[str, str]]:
    names = ("train_val_list.txt", "test_list.txt")
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        yield "remark", f"`{folder}` has no {' and no '.join(absent)}, which the official split needs"
        return
    lists = {}
    for name in names:
        try:
            lists[name] = set(chestxray14.read_list(folder / name))
        except (WorkbenchError, OSError, ValueError) as error:
            yield (
                "bad",
                str(error) if isinstance(error, WorkbenchError) else f"`{folder / name}` cannot be read ({error})",
            )
            return
        if more := lists[name] - set(table["image"]):
            yield (
                "remark",
                f"`{folder / name}` names {len(more):,} images that are not in the table, such as `{min(more)}`",
            )
    first, second = (lists[name] for name in names)
    if both := first & second:
        yield "bad", f"`{folder / names[1]}` has {len(both):,} images that are in {names[0]} too, such as `{min(both)}`"
    if neither := set(table["image"]) - first - second:
        yield "bad", f"`{folder / names[0]}` and {names[1]} lack {len(neither):,} images, such as `{min(neither)}`"
    sides = [set(table.loc[table["image"].isin(side), "patient"]) for side in (first, second)]
    if shared := sides[0] & sides[1]:
        yield "bad", f"`{folder / names[0]}` and {names[1]} share {len(shared):,} patients, such as {min(shared)}"


def _check_boxes(folder: Path, table: pd.DataFrame) -> Iterator[tuple[str, str]]:
    path = folder / "BBox_List_2017.csv"
    try:
        boxes = chestxray14.read_boxes(folder)
    except (WorkbenchError, OSError) as error:
        yield "bad", str(error) if isinstance(error, WorkbenchError) else f"`{path}` cannot be read ({error})"
        return
    corners = boxes[["x", "y", "width", "height"]]
    # Half a pixel: NIH's own boxes are rounded.
    inside = (corners[["x", "y"]] >= -0.5).all(axis=1) & (corners[["width", "height"]] > 0).all(axis=1)
    inside &= (boxes["x"] + boxes["width"] <= BOX_SIZE + 0.5) & (boxes["y"] + boxes["height"] <= BOX_SIZE + 0.5)
    checks = {
        "have an image that the table does not have": ~boxes["image"].isin(table["image"]),
        "have a finding that is none of NIH's": ~boxes["finding"].isin(chestxray14.FINDINGS),
        f"lie outside {BOX_SIZE} × {BOX_SIZE} pixels or are no numbers": ~inside,
    }
    for said, wrong in checks.items():
        if wrong.any():
            lines = boxes.index[wrong]
            yield "bad", f"`{path}`: {len(lines):,} boxes {said}, the first in line {lines[0] + 2}"
