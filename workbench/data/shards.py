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
import multiprocessing
import os
import struct
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from workbench import WorkbenchError
from workbench.data.chestxray14 import SPLITS, findings_of
from workbench.data.radiographs import ENCODINGS, decode_radiograph, encode_radiographs

FORMAT = 1
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
    findings = findings_of(frame)
    settings = {
        "format": FORMAT,
        "findings": findings,
        "image_size": image_size,
        "encoding": encoding,
        "images_per_shard": images_per_shard,
    }
    plan = _fingerprint(settings, table, paths)
    if (folder / "info.json").exists():
        return _return_same(folder, plan)
    _claim_folder(folder, plan)

    todo = [shard for shard in shards if _count_records(folder / shard[0]) != shard[2] - shard[1]]
    labels = table[findings].to_numpy(np.uint8)
    jobs = [(paths[start:stop], image_size, encoding) for _, start, stop in todo]
    with tqdm(total=len(table), unit=" images", disable=not progress, mininterval=5, file=sys.stdout) as bar:
        bar.update(len(table) - sum(stop - start for _, start, stop in todo))
        for (name, start, stop), images in zip(todo, _encode_shards(jobs, processes), strict=True):
            _write_shard(folder / name, images, labels[start:stop], range(start, stop))
            bar.update(stop - start)

    _write_whole(folder / "images.csv", table.to_csv(index=False).encode())
    info = settings | {
        "split": split or {},
        "seed": seed,
        "plan_sha256": plan,
        "table_sha256": _sha256(folder / "images.csv"),
        "splits": {name: _describe_split(folder, table, name) for name in SPLITS},
    }
    _write_whole(folder / "info.json", json.dumps(info, indent=1, default=str).encode())
    (folder / "plan.json").unlink()
    return info


def read_info(folder: str | Path, *, findings: Sequence[str] | None = None) -> dict:
    """Read and check `info.json`; with `findings`, that these are the labels, in this order."""
    path = Path(folder) / "info.json"
    if not path.exists():
        unfinished = (Path(folder) / "plan.json").exists()
        raise WorkbenchError(
            f"`{folder}` holds no whole set of shards (no info.json"
            + ("; its writing was interrupted" if unfinished else "")
            + "): write it with notebook 02."
        )
    try:
        info = json.loads(path.read_text())
        missing = {"format", "findings", "image_size", "encoding", "splits"} - set(info)
    except (ValueError, TypeError) as error:
        raise WorkbenchError(f"`{path}` cannot be read ({error}): write the shards again.") from None
    if missing or info["format"] != FORMAT:
        raise WorkbenchError(
            f"`{path}` is not of format {FORMAT} (format {info.get('format')}, missing {sorted(missing)}): "
            "write the shards again."
        )
    if findings is not None and list(findings) != info["findings"]:
        raise WorkbenchError(
            f"`{path}` has the findings {', '.join(info['findings'])}, but asked for were "
            f"{', '.join(findings)}: choose the same ones in the same order, or write other shards."
        )
    return info


def read_images(folder: str | Path) -> pd.DataFrame:
    """Read `images.csv`: row, image, patient, …, split, shard, then the findings; in the records' order."""
    labels = dict.fromkeys(read_info(folder)["findings"], np.uint8)
    return pd.read_csv(Path(folder) / "images.csv", dtype={"image": str, "sex": str, "view": str} | labels)


def verify_shards(folder: str | Path, *, progress: bool = False) -> pd.DataFrame:
    """Read every shard again and return one row each: split, shard, images, bytes.

    Raises:
        WorkbenchError: naming the first shard whose size, hash, records or labels are not what they were.
    """
    folder, info = Path(folder), read_info(folder)
    if not (folder / "images.csv").exists() or _sha256(folder / "images.csv") != info["table_sha256"]:
        raise WorkbenchError(f"`{folder / 'images.csv'}` is not what was written: write the shards again.")
    table = read_images(folder)
    check_sizes(folder, info)
    rows = [{"split": split} | shard for split in SPLITS for shard in info["splits"][split]["shards"]]
    for shard in tqdm(rows, unit=" shards", disable=not progress, mininterval=5, file=sys.stdout):
        path = folder / shard["file"]
        if _sha256(path) != shard["sha256"]:
            raise WorkbenchError(f"`{path}` has changed since it was written: write the shards again.")
        expected = table[table["shard"] == shard["file"]]
        records = _read_records(path)
        if len(records) != shard["images"] or len(expected) != shard["images"]:
            raise WorkbenchError(
                f"`{path}` holds {len(records)} images, info.json says {shard['images']} and images.csv "
                f"{len(expected)}: write the shards again."
            )
        truth = expected[info["findings"]].to_numpy(np.uint8)
        for (_, labels, row), its_row, its_labels in zip(records, expected["row"], truth, strict=True):
            if row != its_row or labels != its_labels.tobytes():
                raise WorkbenchError(
                    f"`{path}` holds other labels for row {row} than images.csv: write the shards again."
                )
    return pd.DataFrame(rows)[["split", "file", "images", "bytes"]].rename(columns={"file": "shard"})


def read_examples(folder: str | Path, split: str, count: int) -> tuple[np.ndarray, pd.DataFrame]:
    """Read the first images of a split, to look at: uint8 (n, size, size), and their rows of `images.csv`."""
    folder, info = Path(folder), read_info(folder)
    images, rows = [], []
    for shard in _split_of(info, split)["shards"]:
        for encoded, _, row in _read_records(folder / shard["file"], count - len(images)):
            images.append(decode_radiograph(encoded, info["encoding"], info["image_size"]))
            rows.append(row)
        if len(images) == count:
            break
    shape = (len(images), info["image_size"], info["image_size"])
    return np.array(images, np.uint8).reshape(shape), read_images(folder).iloc[rows]


def read_radiographs(folder: str | Path, images: Sequence[str]) -> np.ndarray:
    """Read the radiographs that are named, from any split: uint8 (n, size, size), in the order asked for.

    Raises:
        WorkbenchError: an image is in none of the shards.
    """
    folder, info, table = Path(folder), read_info(folder), read_images(folder).set_index("image")
    unknown = [image for image in images if image not in table.index]
    if unknown:
        raise WorkbenchError(f"`{unknown[0]}` is in none of the shards of {folder}: look in its images.csv.")
    wanted = table.loc[list(dict.fromkeys(images))]
    pixels = {}
    for shard, rows in wanted.groupby("shard"):
        found = {row: encoded for encoded, _, row in _read_records(folder / shard)}
        pixels |= {
            name: decode_radiograph(found[row], info["encoding"], info["image_size"])
            for name, row in rows["row"].items()
        }
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


def _claim_folder(folder: Path, plan: str) -> None:
    """Mark the folder as ours while unfinished, or take up what the same plan left there."""
    marker = folder / "plan.json"
    if marker.exists():
        if json.loads(marker.read_text()).get("plan_sha256") != plan:
            raise WorkbenchError(
                f"`{folder}` holds the unfinished shards of other images, labels or settings: finish those, "
                "choose another folder, or remove this one."
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise WorkbenchError(f"`{folder}` holds something else than shards: choose a new or an empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(marker, json.dumps({"plan_sha256": plan}).encode())


def _encode_shards(jobs: list[tuple[list[str], int, str]], processes: int | None) -> Iterator[list[bytes]]:
    """Encode the images of each shard, in order, a few shards ahead at most, so that memory is bounded."""
    if not processes:
        images = sum(len(paths) for paths, _, _ in jobs)
        processes = min(len(os.sched_getaffinity(0)), images // IMAGES_PER_PROCESS)
    processes = min(processes, len(jobs))
    if processes <= 1:
        yield from (encode_radiographs(*job) for job in jobs)
        return
    # Spawned, not forked: a fork of a process that runs TensorFlow's threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        pending: deque = deque()
        waiting = iter(jobs)
        try:
            while True:
                while len(pending) < 2 * processes and (job := next(waiting, None)):
                    pending.append(pool.submit(encode_radiographs, *job))
                if not pending:
                    return
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise WorkbenchError(
                "a process that decodes images was killed, perhaps for lack of memory: use fewer processes, "
                "and call again; finished shards are kept."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write_shard(path: Path, images: list[bytes], labels: np.ndarray, rows: range) -> None:
    tf = _import_tensorflow()
    part = path.with_name(path.name + ".part")
    with tf.io.TFRecordWriter(str(part)) as writer:
        for image, label, row in zip(images, labels, rows, strict=True):
            feature = {
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
                "labels": tf.train.Feature(bytes_list=tf.train.BytesList(value=[label.tobytes()])),
                "row": tf.train.Feature(int64_list=tf.train.Int64List(value=[row])),
            }
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            # The same bytes from every version of the library, so that shards written again have the same hash.
            writer.write(example.SerializeToString(deterministic=True))
    os.replace(part, path)


def _read_records(path: Path, count: int = -1) -> list[tuple[bytes, bytes, int]]:
    """Image, labels and row of the first `count` records, by default of all."""
    tf = _import_tensorflow()
    records = []
    try:
        for record in tf.data.TFRecordDataset(str(path)).take(count).as_numpy_iterator():
            feature = tf.train.Example.FromString(record).features.feature
            image, labels = (feature[name].bytes_list.value[0] for name in ("image", "labels"))
            records.append((image, labels, feature["row"].int64_list.value[0]))
    except tf.errors.OpError as error:
        raise WorkbenchError(f"`{path}` cannot be read ({error.message}): write the shards again.") from None
    return records


def _count_records(path: Path) -> int:
    """Count the records by their lengths alone; -1 if the file is missing or cut short."""
    if not path.exists():
        return -1
    count, position, size = 0, 0, path.stat().st_size
    with path.open("rb") as file:
        while position < size:
            file.seek(position)
            header = file.read(8)
            # A record: its length (8 bytes), a checksum (4), the data, a checksum (4).
            position += 16 + struct.unpack("<Q", header)[0] if len(header) == 8 else size
            count += 1
    return count if position == size else -1


def _describe_split(folder: Path, table: pd.DataFrame, split: str) -> dict:
    part = table[table["split"] == split]
    shards = []
    for name, images in part.groupby("shard").size().items():
        path = folder / name
        shards.append({"file": name, "images": int(images), "bytes": path.stat().st_size, "sha256": _sha256(path)})
    return {"images": len(part), "patients": int(part["patient"].nunique()), "shards": shards}


def _split_of(info: dict, split: str) -> dict:
    if split not in info["splits"]:
        raise WorkbenchError(f"split={split!r} is not known: choose from {', '.join(info['splits'])}.")
    return info["splits"][split]


def _write_whole(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _import_tensorflow():
    # Here, not at the top: planning and describing shards has to work in a kernel without TensorFlow.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    # A notebook that looks at shards must not take the GPU's memory from the workers that train.
    with contextlib.suppress(RuntimeError):
        tf.config.set_visible_devices([], "GPU")
    return tf
