"""Damaged records of shards: which one stopped the reading, and shards without them for one run. Changes no input.

Ranks share `scan_shards`, and each makes for itself, with `write_without`, a folder that `pipeline` reads as any other:
links to the whole shards, and copies of the good records of the others. Knows no MPI; rank and size are passed in.

    damaged = [record for _, found in damage.scan_shards("data/shards/nih-256") for record in found]
    damage.write_without("data/shards/nih-256", damaged, "/tmp/mine/nih-256")
    for images, labels in damage.each_batch(batches, "data/shards/nih-256", "train"): ...
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from workbench import WorkbenchError
from workbench.data import records, shards

COLUMNS = ("shard", "record", "split", "image", "damage")


def each_batch(batches: Iterable, folder: str | Path, split: str) -> Iterator:
    """The batches of a split one by one; what TensorFlow raises while reading becomes a sentence.

    Raises:
        WorkbenchError: naming the shard's file, the record (from 1) and, if images.csv can be read, the image.
    """
    import tensorflow as tf

    try:
        yield from batches
    except tf.errors.OpError as error:
        raise WorkbenchError(_explain(Path(folder), split, records.core_of(error))) from None


def scan_shards(folder: str | Path, *, rank: int = 0, size: int = 1) -> Iterator[tuple[str, list[dict]]]:
    """Check every shard, or every `size`-th of them, against its SHA-256, and read those that differ record by record.

    Yields:
        Each shard's file, and a dictionary for each record in it that cannot be used: `shard` (file), `record` (from
        1), `split`, `image` (empty where it cannot be known) and `damage`.

    Raises:
        WorkbenchError: images.csv or a shard is missing, or images.csv has changed, so that nobody knows what is what.
    """
    folder, info = Path(folder), shards.read_info(folder)
    if fault := shards.fault_of_table(folder, info):
        raise WorkbenchError(f"`{folder / 'images.csv'}` {fault}: write the shards again, or copy this file again.")
    every = [(split, shard) for split, told in info["splits"].items() for shard in told["shards"]]
    # All of them on every rank, so that none is left waiting for another.
    for _, shard in every:
        if not (folder / shard["file"]).is_file():
            raise WorkbenchError(f"`{folder / shard['file']}` is missing: copy it again, or write the shards again.")
    table = shards.read_images(folder)
    for split, shard in every[rank::size]:
        damaged = []
        if shards.differs(folder / shard["file"], shard["sha256"]):
            expected = table[table["shard"] == shard["file"]]
            names = expected["image"].tolist() if len(expected) == shard["images"] else [""] * shard["images"]
            for number, wrong in shards.examine_shard(folder, info, shard, expected).items():
                values = shard["file"], number + 1, split, names[number], wrong
                damaged.append(dict(zip(COLUMNS, values, strict=True)))
        yield shard["file"], damaged


def in_order(damaged: list[dict]) -> list[dict]:
    """The records that `scan_shards` found, on whatever ranks, in the order of splits, shards and records."""
    return sorted(damaged, key=lambda one: (shards.SPLITS.index(one["split"]), one["shard"], one["record"]))


def write_without(folder: str | Path, damaged: list[dict], target: str | Path) -> None:
    """Make a folder of shards without some records: links to the whole ones, copies of the others, counts that fit.

    Args:
        folder: of the shards.
        damaged: as `scan_shards` finds them, of all ranks.
        target: the new folder; its parent exists.

    Raises:
        WorkbenchError: there is no room for the copies, or a record is damaged that was not before.
    """
    folder, target = Path(folder).resolve(), Path(target)
    info = shards.read_info(folder)
    leave_out: dict[str, set[int]] = {}
    for record in damaged:
        leave_out.setdefault(record["shard"], set()).add(record["record"] - 1)
    try:
        target.mkdir()
        (target / "images.csv").symlink_to(folder / "images.csv")
        for told in info["splits"].values():
            # Draws belong to rows of images.csv, of which there are as many as before.
            told["rows"] = told["images"]
            told["shards"] = [_replace(folder, target, shard, leave_out.get(shard["file"])) for shard in told["shards"]]
            told["images"] = sum(shard["images"] for shard in told["shards"])
        info |= {"copied_from": str(folder), "skipped": damaged}
        (target / "info.json").write_text(json.dumps(info))
    except OSError as error:
        raise WorkbenchError(
            f"The copies of damaged shards cannot be written into {target} ({error.strerror}): name a folder with more "
            "room in the variable TMPDIR."
        ) from None


def _replace(folder: Path, target: Path, shard: dict, leave_out: set[int] | None) -> dict:
    source, new = folder / shard["file"], target / shard["file"]
    # One that is too long may hold all its records, and something behind them.
    if leave_out is None and source.stat().st_size == shard["bytes"]:
        new.symlink_to(source)
        return shard
    images = records.copy_records(source, new, shard["images"], leave_out or set())
    return shard | {"images": images, "bytes": new.stat().st_size}


def _explain(folder: Path, split: str, said: str) -> str:
    """Which record it was that TensorFlow could not read, in a sentence."""
    info = shards.read_info(folder)
    for shard in info["splits"][split]["shards"]:
        path = folder / shard["file"]
        offset = re.search(r"record at (\d+)", said)
        number = records.number_at(path, int(offset.group(1))) if offset and path.is_file() else None
        # TensorFlow names the place, not the file: the first one that has a damaged record there is it. So a record is
        # read of each file, not all of the gigabytes, while the other ranks wait.
        if number is not None and records.is_damaged(path, number):
            return _sentence(folder, shard, {number: "fails its checksum"})
    for shard in info["splits"][split]["shards"]:
        if shards.differs(folder / shard["file"], shard["sha256"]) and (
            wrong_ones := shards.examine_shard(folder, info, shard, None)
        ):
            return _sentence(folder, shard, wrong_ones)
    return f"The {split} shards in {folder} could not be read ({said}): check them with `workbench verify {folder}`."


def _sentence(folder: Path, shard: dict, wrong_ones: dict[int, str]) -> str:
    try:
        table = shards.read_images(folder)
        names = table.loc[table["shard"] == shard["file"], "image"].tolist()
    except WorkbenchError:
        names = []
    told = shards.describe_records(wrong_ones, shard["images"], names if len(names) == shard["images"] else None)
    return (
        f"`{(folder / shard['file']).resolve()}` is damaged: {told}; copy the file again or write the shards again, or "
        "set `damaged_records` to skip, to go on without such records."
    )
