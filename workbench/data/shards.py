"""TFRecord shards: planned, written once at the size that training needs, verified and described.

A folder of shards holds `train-00003-of-00128.tfrecord` and the like, `images.csv` (one row per image, in
the order of the records) and `info.json`, which is written last: where it stands, the folder is whole. The
findings stand in it in the order of the labels. Batches are made of shards by `pipeline`, not here.

    from workbench.data import chestxray14, shards
    frame = chestxray14.read_dataset("data/nih")
    info = shards.write_shards(frame, "data/shards/nih-256", image_size=256)
    shards.verify_shards("data/shards/nih-256")
    images, rows = shards.read_examples("data/shards/nih-256", "test", 8)
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
from tqdm import tqdm

from workbench import WorkbenchError
from workbench.data.chestxray14 import SPLITS, findings_of
from workbench.data.processes import in_order
from workbench.data.radiographs import ENCODINGS, decode_radiograph, encode_radiographs
from workbench.data.records import NOT_OURS, count_records, import_tensorflow, parse_record, read_records, walk_records
from workbench.files import made_by_one, written_whole

FORMAT = 1
MOST_IMAGES = 1_000_000  # of a shard, so that nobody counts for ever what a changed info.json claims
MOST_TOLD = 5  # groups of damaged records that are told of one shard
IMAGES_PER_PROCESS = 1000  # fewer are done sooner than another process is started


def plan_shards(images: int, *, images_per_shard: int = 256) -> list[tuple[int, int]]:
    """Plan (start, stop) rows of each shard; the last one may be shorter and is there all the same."""
    if images_per_shard < 1:
        raise WorkbenchError(f"images_per_shard={images_per_shard}: expected at least 1.")
    return [(start, min(start + images_per_shard, images)) for start in range(0, images, images_per_shard)]


def write_shards(
    frame: pd.DataFrame,
    folder: str | Path,
    *,
    image_size: int,
    encoding: str = "raw",
    images_per_shard: int = 256,
    processes: int | None = None,
    seed: int = 0,
    split: dict | None = None,
    progress: bool = True,
) -> dict:
    """Write the images and labels of a frame of `chestxray14.read_dataset` and return the folder's info.

    Every image is made grey and brought to `image_size` squared once, averaged over areas. Training images
    are shuffled once, so that a shard is no run of one patient; val and test stay sorted by name. A folder
    that is whole and holds the same is left as it is; what an interrupted call finished is kept.

    Args:
        frame: one row per image: `path`, the columns before `split`, `split`, then the findings.
        folder: where the shards go; created.
        image_size: stored height and width: what the network sees plus the margin of the random shift.
        encoding: "raw" (8,000 augmented images/s per core), "png" (as exact, 0.42 of the size, 1,300 images/s) or
            "jpeg" (quality 95, 48 dB, 0.23 of the size, 3,800 images/s).
        images_per_shard: of all shards but the last of each split.
        processes: that decode and resize; by default (or 0) one per core, fewer for few images.
        seed: of the shuffle.
        split: where the split came from, noted as `info["split"]`.
        progress: show a bar.

    Raises:
        WorkbenchError: an image cannot be decoded, or the folder holds something else.
    """
    if encoding not in ENCODINGS:
        raise WorkbenchError(f"encoding={encoding!r} is not known: choose from {', '.join(ENCODINGS)}.")
    if image_size < 1:
        raise WorkbenchError(f"image_size={image_size}: expected at least 1 pixel.")
    folder = Path(folder)
    table, paths, shards = _plan_folder(frame, images_per_shard=images_per_shard, seed=seed)
    settings = _settings(findings_of(frame), image_size, encoding, images_per_shard)
    plan = _fingerprint(settings, table, paths)
    if not (folder / "info.json").exists():
        # A second run that needs the same shards waits until they are there.
        with made_by_one(folder):
            if not (folder / "info.json").exists():
                origin = {"split": split or {}, "seed": seed, "plan_sha256": plan}
                return _write_folder(folder, (table, paths, shards), settings, origin, processes, progress)
    return _return_same(folder, plan)


def hash_plan(
    frame: pd.DataFrame, *, image_size: int, encoding: str = "raw", images_per_shard: int = 256, seed: int = 0
) -> str:
    """The `plan_sha256` of what `write_shards` would write; another one than in a folder's info is refused there."""
    table, paths, _ = _plan_folder(frame, images_per_shard=images_per_shard, seed=seed)
    return _fingerprint(_settings(findings_of(frame), image_size, encoding, images_per_shard), table, paths)


def _settings(findings: list[str], image_size: int, encoding: str, images_per_shard: int) -> dict:
    return {
        "format": FORMAT,
        "findings": findings,
        "image_size": image_size,
        "encoding": encoding,
        "images_per_shard": images_per_shard,
    }


def _write_folder(
    folder: Path, planned: tuple, settings: dict, origin: dict, processes: int | None, progress: bool
) -> dict:
    """Write what `_plan_folder` planned, or what is left of it, and return the folder's info."""
    table, paths, shards = planned
    findings, image_size, encoding = settings["findings"], settings["image_size"], settings["encoding"]
    todo = [shard for shard in shards if count_records(folder / shard[0]) != shard[2] - shard[1]]
    _claim_folder(
        folder, origin["plan_sha256"], _pixels_of(settings, table, paths, shards), [name for name, *_ in todo]
    )

    labels = table[findings].to_numpy(np.uint8)
    jobs = [(paths[start:stop], image_size, encoding) for _, start, stop in todo]
    with tqdm(total=len(table), unit=" images", disable=not progress, mininterval=5, file=sys.stdout) as bar:
        bar.update(len(table) - sum(stop - start for _, start, stop in todo))
        for (name, start, stop), images in zip(todo, _encode_shards(jobs, processes), strict=True):
            _write_shard(folder / name, images, labels[start:stop], range(start, stop))
            bar.update(stop - start)

    _write_bytes(folder / "images.csv", table.to_csv(index=False).encode())
    info = settings | {
        **origin,
        "table_sha256": _sha256(folder / "images.csv"),
        "splits": {name: _describe_split(folder, table, name) for name in SPLITS},
    }
    _write_bytes(folder / "info.json", json.dumps(info, indent=1, default=str).encode())
    (folder / "plan.json").unlink()
    return info


def read_info(folder: str | Path, *, findings: Sequence[str] | None = None) -> dict:
    """Read and check `info.json`; with `findings`, that these are the labels, in this order."""
    path = Path(folder) / "info.json"
    if not path.is_file():
        unfinished = (Path(folder) / "plan.json").exists()
        raise WorkbenchError(
            f"`{folder}` holds no whole set of shards (no info.json"
            + ("; its writing was interrupted" if unfinished else "")
            + "): write it with notebook 02."
        )
    try:
        info = json.loads(path.read_text())
        if not isinstance(info, dict):
            raise ValueError(f"it holds a {type(info).__name__}")
    except (ValueError, OSError, RecursionError) as error:
        raise WorkbenchError(f"`{path}` cannot be read ({error}): write the shards again.") from None
    missing = {"format", "findings", "image_size", "encoding", "splits"} - info.keys()
    if missing or info["format"] != FORMAT:
        raise WorkbenchError(
            f"`{path}` is not of format {FORMAT} (format {info.get('format')}, missing {sorted(missing)}): "
            "write the shards again."
        )
    if wrong := _wrong_entry(info):
        raise WorkbenchError(f"`{path}` holds no {wrong}: it was changed by hand, write the shards again.")
    if findings is not None and list(findings) != info["findings"]:
        raise WorkbenchError(
            f"`{path}` has the findings {', '.join(info['findings'])}, but asked for were "
            f"{', '.join(findings)}: choose the same ones in the same order, or write other shards."
        )
    return info


def read_images(folder: str | Path) -> pd.DataFrame:
    """Read `images.csv`: row, image, patient, …, split, shard, then the findings; in the records' order.

    Raises:
        WorkbenchError: it is missing, cannot be read, or lacks a column; or a row of it is none that was written.
    """
    path, info = Path(folder) / "images.csv", read_info(folder)
    findings, files = info["findings"], [shard["file"] for split in SPLITS for shard in info["splits"][split]["shards"]]
    if not path.is_file():
        raise WorkbenchError(f"`{path}` is missing: write the shards again, or copy this file again.")
    kinds = {"row": np.int64, "image": str, "sex": str, "view": str} | dict.fromkeys(findings, np.uint8)
    try:
        table = pd.read_csv(path, dtype=kinds)
    except (ValueError, OverflowError, OSError) as error:
        raise WorkbenchError(f"`{path}` cannot be read ({error}): write the shards again.") from None
    absent = [name for name in ("row", "image", "patient", "split", "shard", *findings) if name not in table]
    if absent:
        raise WorkbenchError(f"`{path}` has no column `{absent[0]}`: write the shards again, or copy this file again.")
    for wrong, told in (
        (table["image"].isna() | table["image"].duplicated(), "no name, or one that another row has"),
        (table["row"] != np.arange(len(table)), "another `row` than its place, counted from 0"),
        (~table["split"].isin(SPLITS) | ~table["shard"].isin(files), "a split or a shard that is not in info.json"),
        ((table[findings] > 1).any(axis=1), "a label other than 0 and 1"),
    ):
        if wrong.any():
            line = int(wrong.argmax()) + 2
            raise WorkbenchError(
                f"`{path}` has in line {line} {told}: write the shards again, or copy this file again."
            )
    for name in ("patient", "age"):
        if name in table and not pd.api.types.is_numeric_dtype(table[name]):
            raise WorkbenchError(f"`{path}` has a {name} that is no number: write the shards again, or copy this file.")
    return table


def verify_shards(folder: str | Path, *, progress: bool = False) -> pd.DataFrame:
    """Read every shard again and return one row each: split, shard, images, bytes.

    Raises:
        WorkbenchError: naming the first file that is not what it was; `find_faults` names each.
    """
    for path, fault in find_faults(folder, bar=sys.stdout if progress else None):
        raise WorkbenchError(f"`{path}` {fault}: write the shards again, or copy this file again.")
    info = read_info(folder)
    rows = [{"split": split} | shard for split in SPLITS for shard in info["splits"][split]["shards"]]
    return pd.DataFrame(rows)[["split", "file", "images", "bytes"]].rename(columns={"file": "shard"})


def find_faults(folder: str | Path, *, bar: TextIO | None = None) -> Iterator[tuple[Path, str]]:
    """Read a whole folder of shards again and tell each file that is not what was written: its path and what is wrong.

    Sizes, SHA-256, the checksums of every record, labels and rows against images.csv, files that are missing and shards
    that nobody wrote. A progress bar is drawn on `bar`.

    Raises:
        WorkbenchError: there is no info.json, or it cannot be read.
    """
    folder, info = Path(folder), read_info(folder)
    shards = [shard for split in SPLITS for shard in info["splits"][split]["shards"]]
    expected = None
    if fault := fault_of_table(folder, info):
        yield folder / "images.csv", fault
    else:
        expected = read_images(folder)
    named = {shard["file"] for shard in shards}
    for path in sorted(folder.glob("[!.]*.tfrecord")):
        if path.name not in named:
            yield path, "is not in info.json"
    for shard in tqdm(shards, unit=" shards", disable=bar is None, mininterval=5, file=bar):
        rows = None if expected is None else expected[expected["shard"] == shard["file"]]
        if fault := _fault_of(folder, info, shard, rows):
            yield folder / shard["file"], fault


def examine_shard(
    folder: str | Path, info: dict, shard: dict, expected: pd.DataFrame | None, *, decode: bool = True
) -> dict[int, str]:
    """Read every record of a shard: number from 0 -> what is wrong, for those that cannot be used.

    Args:
        folder: of the shards.
        info: its `read_info`.
        shard: one of its shards, as info.json describes it.
        expected: the shard's rows of images.csv, with which rows and labels have to agree; None: not compared.
        decode: decode every image as well.
    """
    wrong_ones = {}
    rows = labels = None
    if expected is not None and len(expected) == shard["images"]:
        rows, labels = expected["row"].tolist(), expected[info["findings"]].to_numpy(np.uint8)
    for number, record, wrong in walk_records(Path(folder) / shard["file"], shard["images"]):
        parsed = None if record is None else parse_record(record)
        if record is not None and parsed is None:
            wrong = NOT_OURS
        elif parsed is not None:
            image, its_labels, row = parsed
            if rows is not None and row != rows[number]:
                wrong = f"holds row {row} instead of row {rows[number]} of images.csv"
            elif len(its_labels) != len(info["findings"]):
                wrong = f"holds {len(its_labels)} labels instead of {len(info['findings'])}"
            elif labels is not None and its_labels != labels[number].tobytes():
                wrong = "holds other labels than images.csv"
            elif decode:
                try:
                    _decode(Path(folder) / shard["file"], image, info)
                except WorkbenchError:
                    wrong = "holds an image that cannot be decoded"
        if wrong:
            wrong_ones[number] = wrong
    return wrong_ones


def read_examples(folder: str | Path, split: str, count: int) -> tuple[np.ndarray, pd.DataFrame]:
    """Read the first images of a split, to look at: uint8 (n, size, size), and their rows of `images.csv`."""
    folder, info = Path(folder), read_info(folder)
    images, rows = [], []
    for shard in _split_of(info, split)["shards"]:
        for encoded, _, row in read_records(folder / shard["file"], count - len(images)):
            images.append(_decode(folder / shard["file"], encoded, info))
            rows.append(row)
        if len(images) == count:
            break
    table = read_images(folder)
    if not set(rows) <= set(table["row"]):
        raise WorkbenchError(f"`{folder}` holds records that its images.csv does not have: write the shards again.")
    shape = (len(images), info["image_size"], info["image_size"])
    return np.array(images, np.uint8).reshape(shape), table.iloc[rows]


def read_radiographs(folder: str | Path, images: Sequence[str]) -> np.ndarray:
    """Read the radiographs that are named, from any split: uint8 (n, size, size), in the order asked for.

    Raises:
        WorkbenchError: an image is in none of the shards, or damaged; damage to others does not matter.
    """
    folder, info, table = Path(folder), read_info(folder), read_images(folder).set_index("image")
    unknown = [image for image in images if image not in table.index]
    if unknown:
        raise WorkbenchError(f"`{unknown[0]}` is in none of the shards of {folder}: look in its images.csv.")
    wanted = table.loc[list(dict.fromkeys(images))]
    files = {shard["file"]: shard for split in info["splits"].values() for shard in split["shards"]}
    pixels = {}
    for file, rows in wanted.groupby("shard"):
        # Past damaged records, which need not be those that are wanted.
        walked = walk_records(folder / file, files[file]["images"]) if file in files else ()
        parsed = (parse_record(record) for _, record, _ in walked if record is not None)
        found = {one[2]: one[0] for one in parsed if one}
        for name, row in rows["row"].items():
            if row not in found:
                raise WorkbenchError(
                    f"`{name}` is damaged in `{folder / file}`: copy that file again, or write the shards again."
                )
            pixels[name] = _decode(folder / file, found[row], info)
    shape = (len(images), info["image_size"], info["image_size"])
    return np.array([pixels[image] for image in images], np.uint8).reshape(shape)


def check_sizes(folder: str | Path, info: dict, splits: Sequence[str] = SPLITS) -> None:
    """Compare the size of every shard with info.json, which is cheap; name the first that differs."""
    for split in splits:
        for shard in _split_of(info, split)["shards"]:
            path = Path(folder) / shard["file"]
            size = path.stat().st_size if path.exists() else None
            if size != shard["bytes"]:
                state = "is missing" if size is None else f"has {size:,} bytes instead of {shard['bytes']:,}"
                raise WorkbenchError(f"`{path}` {state}: write the shards again, or copy this one again.")


def _plan_folder(
    frame: pd.DataFrame, *, images_per_shard: int, seed: int
) -> tuple[pd.DataFrame, list[str], list[tuple[str, int, int]]]:
    """The rows of images.csv, the paths in the same order, and (file, start, stop) of each shard. Pure."""
    if not set(frame["split"]) & set(SPLITS):
        raise WorkbenchError(f"the frame has {len(frame)} images, none in {', '.join(SPLITS)}: nothing to write.")
    parts, shards, offset = [], [], 0
    for split in SPLITS:
        part = frame[frame["split"] == split]
        if split == "train":
            part = part.iloc[np.random.default_rng(seed).permutation(len(part))]
        plan = plan_shards(len(part), images_per_shard=images_per_shard)
        for number, (start, stop) in enumerate(plan):
            name = f"{split}-{number:05d}-of-{len(plan):05d}.tfrecord"
            shards.append((name, offset + start, offset + stop))
        parts.append(part)
        offset += len(part)
    table = pd.concat(parts, ignore_index=True)
    paths = table.pop("path").tolist()
    names = [name for name, start, stop in shards for _ in range(start, stop)]
    table.insert(table.columns.get_loc("split") + 1, "shard", names)
    table.insert(0, "row", np.arange(len(table)))
    return table, paths, shards


def _fingerprint(settings: dict, table: pd.DataFrame, paths: list[str]) -> str:
    """A hash of all that decides what the folder will hold, and that does not change when data moves.

    Pixels are represented by the name of the images' folder and the sizes of up to 100 files.
    """
    some = paths[:: max(1, len(paths) // 100)]
    sizes = [os.path.getsize(path) if os.path.exists(path) else None for path in some]
    source = sorted({os.path.basename(os.path.dirname(path)) for path in paths})
    digest = hashlib.sha256(json.dumps([settings, source, sizes]).encode())
    digest.update(table.to_csv(index=False).encode())
    return digest.hexdigest()


def _return_same(folder: Path, plan: str) -> dict:
    info = read_info(folder)
    if info.get("plan_sha256") != plan:
        raise WorkbenchError(
            f"`{folder}` already holds shards of other images, labels or settings ({info['image_size']} "
            f"pixels, {info['encoding']}, {len(info['findings'])} findings): choose another or remove it."
        )
    check_sizes(folder, info)
    return info


def _pixels_of(settings: dict, table: pd.DataFrame, paths: list[str], shards: list[tuple[str, int, int]]) -> dict:
    """Of each shard a hash of what decides its bytes: settings, its rows, and the sizes of up to four of its images."""
    hashes = {}
    for name, start, stop in shards:
        some = paths[start : stop : -(-(stop - start) // 4)]
        sizes = [os.path.getsize(path) if os.path.exists(path) else None for path in some]
        source = sorted({os.path.basename(os.path.dirname(path)) for path in paths[start:stop]})
        digest = hashlib.sha256(json.dumps([settings, source, sizes]).encode())
        digest.update(table.iloc[start:stop].to_csv(index=False).encode())
        hashes[name] = digest.hexdigest()
    return hashes


def _claim_folder(folder: Path, plan: str, pixels: dict, todo: list[str]) -> None:
    """Mark the folder as ours while unfinished, or take up what the same plan left there.

    An image that stopped the writing may have been mended since: what the finished shards were made of has to be the
    same, not what the others will be made of.
    """
    marker = folder / "plan.json"
    if marker.is_file():
        try:
            left = json.loads(marker.read_text())
            former, finished = left.get("pixels", {}), pixels.keys() - set(todo)
            same = left.get("plan_sha256") == plan or (
                former.keys() == pixels.keys() and all(former[name] == pixels[name] for name in finished)
            )
        except (ValueError, AttributeError, TypeError, RecursionError):
            same = False
        if not same:
            raise WorkbenchError(
                f"`{folder}` holds the unfinished shards of other images, labels or settings: finish those, "
                "choose another folder, or remove this one."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise WorkbenchError(f"`{folder}` holds something else than shards: choose a new or an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    _write_bytes(marker, json.dumps({"plan_sha256": plan, "pixels": pixels}).encode())


def _encode_shards(jobs: list[tuple[list[str], int, str]], processes: int | None) -> Iterator[list[bytes]]:
    """Encode the images of each shard, in order, a few shards ahead at most, so that memory is bounded."""
    if not processes:
        images = sum(len(paths) for paths, _, _ in jobs)
        processes = min(len(os.sched_getaffinity(0)), images // IMAGES_PER_PROCESS)
    yield from in_order(encode_radiographs, jobs, count=min(processes, len(jobs)))


def _write_shard(path: Path, images: list[bytes], labels: np.ndarray, rows: range) -> None:
    tf = import_tensorflow()
    with written_whole(path) as part, _as_os_error(tf), tf.io.TFRecordWriter(str(part)) as writer:
        for image, label, row in zip(images, labels, rows, strict=True):
            feature = {
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
                "labels": tf.train.Feature(bytes_list=tf.train.BytesList(value=[label.tobytes()])),
                "row": tf.train.Feature(int64_list=tf.train.Int64List(value=[row])),
            }
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            # The same bytes from every version of the library, so that shards written again have the same hash.
            writer.write(example.SerializeToString(deterministic=True))


@contextlib.contextmanager
def _as_os_error(tf) -> Iterator[None]:
    """TensorFlow's errors of a full disk or a closed folder as the operating system's."""
    try:
        yield
    except tf.errors.OpError as error:
        raise OSError(error.message) from None


def _describe_split(folder: Path, table: pd.DataFrame, split: str) -> dict:
    part = table[table["split"] == split]
    shards = []
    for name, images in part.groupby("shard").size().items():
        path = folder / name
        shards.append({"file": name, "images": int(images), "bytes": path.stat().st_size, "sha256": _sha256(path)})
    return {"images": len(part), "patients": int(part["patient"].nunique()), "shards": shards}


def _wrong_entry(info: dict) -> str:
    """What of an info.json is not what `write_shards` writes, in words; empty if all is."""

    def is_shard(shard) -> bool:
        # A file's name alone: nothing outside of the folder is ever read.
        return (
            isinstance(shard, dict)
            and isinstance(shard.get("file"), str)
            and shard["file"].endswith(".tfrecord")
            and os.path.basename(shard["file"]) == shard["file"]
            and all(type(shard.get(name)) is int and shard[name] >= 0 for name in ("images", "bytes"))
            and shard["images"] <= MOST_IMAGES
            and isinstance(shard.get("sha256"), str)
        )

    def is_split(told) -> bool:
        return (
            isinstance(told, dict)
            and type(told.get("images")) is int
            and isinstance(told.get("shards"), list)
            and all(map(is_shard, told["shards"]))
        )

    findings, size, splits = info["findings"], info["image_size"], info["splits"]
    if not (isinstance(findings, list) and findings and all(isinstance(name, str) for name in findings)):
        return "list of findings"
    if len(set(findings)) < len(findings):
        return "findings that differ"
    if type(size) is not int or not 0 < size <= 2**14:
        return f"image size but {str(size)[:40]}"
    if info["encoding"] not in ENCODINGS:
        return f"known encoding but {str(info['encoding'])[:40]}"
    if not (isinstance(splits, dict) and splits.keys() == set(SPLITS) and all(map(is_split, splits.values()))):
        return f"list of shards for each of {', '.join(SPLITS)}"
    return "" if isinstance(info.get("split", {}), dict) else "description of the split"


def _fault_of(folder: Path, info: dict, shard: dict, expected: pd.DataFrame | None) -> str:
    """What is wrong with a shard, in words; empty if it is as it was written."""
    path = folder / shard["file"]
    said = differs(path, shard["sha256"])
    if not path.is_file():
        return said
    if (size := path.stat().st_size) != shard["bytes"]:
        said = f"has {size:,} bytes instead of {shard['bytes']:,}"
    wrong_ones = examine_shard(folder, info, shard, expected, decode=bool(said))
    if not said and {held := count_records(path)} != {shard["images"], held if expected is None else len(expected)}:
        in_table = "" if expected is None else f" and images.csv {len(expected)}"
        said = f"holds {held} images, info.json says {shard['images']}{in_table}"
    if not wrong_ones:
        return said
    names = None if expected is None or len(expected) != shard["images"] else expected["image"].tolist()
    return f"{said}{'; ' if said else ''}{describe_records(wrong_ones, shard['images'], names)}"


def describe_records(wrong_ones: dict[int, str], images: int, names: Sequence[str] | None = None) -> str:
    """Damaged records of a shard in words: "record 3 of 256 (00000013_000.png) fails its checksum". Counted from 1."""
    groups: list[list] = []
    for number, wrong in sorted(wrong_ones.items()):
        if groups and groups[-1][1] == number and groups[-1][2] == wrong:
            groups[-1][1] = number + 1
        else:
            groups.append([number, number + 1, wrong])
    said = []
    for start, stop, wrong in groups[:MOST_TOLD]:
        if stop == start + 1:
            said.append(f"record {stop} of {images}{f' ({names[start]})' if names else ''} {wrong}")
        else:
            said.append(f"each of the records {start + 1} to {stop} of {images} {wrong}")
    rest = sum(stop - start for start, stop, _ in groups[MOST_TOLD:])
    return "; ".join([*said, f"and {rest} more"] if rest else said)


def fault_of_table(folder: str | Path, info: dict) -> str:
    """What is wrong with images.csv, in words; empty if it is as it was written."""
    return differs(Path(folder) / "images.csv", info.get("table_sha256"))


def differs(path: Path, sha256: str | None) -> str:
    """In what way a file is not what was written, in words; empty if it is."""
    try:
        if not path.is_file():  # a FIFO would be waited for
            return "is no file" if path.exists() else "is missing"
        return "" if _sha256(path) == sha256 else "has changed since it was written"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _decode(path: Path, image: bytes, info: dict) -> np.ndarray:
    try:
        pixels = decode_radiograph(image, info["encoding"], info["image_size"])
        if pixels.shape != (info["image_size"],) * 2:
            raise ValueError(f"{pixels.shape} pixels")
    except Exception as error:  # Pillow raises many kinds
        raise WorkbenchError(f"`{path}` holds an image that cannot be decoded ({error}): write it again.") from None
    return pixels


def _split_of(info: dict, split: str) -> dict:
    if split not in info["splits"]:
        raise WorkbenchError(f"split={split!r} is not known: choose from {', '.join(info['splits'])}.")
    return info["splits"][split]


def _write_bytes(path: Path, content: bytes) -> None:
    with written_whole(path) as part:
        part.write_bytes(content)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
