"""The records of a shard file: read, counted without being read, and walked through past those that are damaged.

TensorFlow reads them and checks their checksums (CRC32C of the length and of the data); what a shard holds as a whole
is the business of `shards`. Records are counted from 0 here and from 1 in all that users see.

    for number, record, wrong in records.walk_records("train-00000-of-00003.tfrecord", 256):
        print(number, wrong or records.parse_record(record)[2])
"""

import contextlib
import os
import re
import struct
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from workbench import WorkbenchError

NOT_OURS = "is not a record of a shard"


def read_records(path: Path, count: int = -1) -> list[tuple[bytes, bytes, int]]:
    """Image, labels and row of the first `count` records, by default of all; a WorkbenchError at the first bad one."""
    tf = import_tensorflow()
    try:
        encoded = list(tf.data.TFRecordDataset(str(path)).take(count).as_numpy_iterator())
    except tf.errors.OpError as error:
        raise WorkbenchError(f"`{path}` cannot be read ({core_of(error)}): write the shards again.") from None
    found = [parse_record(record) for record in encoded]
    if None in found:
        raise WorkbenchError(f"`{path}` cannot be read (record {found.index(None) + 1} {NOT_OURS}): write it again.")
    return found


def walk_records(path: Path, images: int) -> Iterator[tuple[int, bytes | None, str]]:
    """The first `images` records of a file, in turn: number, bytes, "". Of a damaged one: number, None, what is wrong.

    A record whose data fails its checksum costs that record alone. Behind one whose length is broken nothing can be
    found, so all the rest is told as damaged, as is all that a file cut short lacks. Nothing is raised.
    """
    tf = import_tensorflow()
    number, said = 0, ""
    while number < images:
        try:
            for record in tf.data.TFRecordDataset(str(path)).skip(number).take(images - number).as_numpy_iterator():
                yield number, record, ""
                number += 1
            yield from ((rest, None, "is missing") for rest in range(number, images))
            return
        except tf.errors.OpError as error:
            core = core_of(error)
            if core == said:  # not a step further: what lies here cannot be passed
                wrong = "lies behind a broken length" if core.startswith("corrupted record") else _what(core)
                yield from ((rest, None, wrong) for rest in range(number, images))
                return
            yield number, None, _what(core)
            number, said = number + 1, core


def parse_record(record: bytes) -> tuple[bytes, bytes, int] | None:
    """Image, labels and row of a record; None if it holds anything else."""
    tf = import_tensorflow()
    try:
        feature = tf.train.Example.FromString(record).features.feature
        image, labels = (feature[name].bytes_list.value[0] for name in ("image", "labels"))
        return image, labels, feature["row"].int64_list.value[0]
    except Exception:  # protobuf's own kind of error, or a field that is not there
        return None


def count_records(path: Path) -> int:
    """Count the records by their lengths alone; -1 if the file is missing or cut short."""
    if not path.is_file():
        return -1
    offsets = list(_offsets(path))
    return len(offsets) - 1 if offsets[-1] == path.stat().st_size else -1


def number_at(path: Path, offset: int) -> int | None:
    """The number of the record that a byte of the file belongs to; None behind the last one."""
    for number, (start, stop) in enumerate(pairwise(_offsets(path))):
        if start <= offset < stop:
            return number
    return None


def is_damaged(path: Path, number: int) -> bool:
    """Read one record with its checksums."""
    tf = import_tensorflow()
    try:
        return not list(tf.data.TFRecordDataset(str(path)).skip(number).take(1))
    except tf.errors.OpError:
        return True


def copy_records(source: Path, target: Path, images: int, leave_out: set[int]) -> int:
    """Copy the first `images` records but some into a new file, byte for byte; returns how many.

    Raises:
        WorkbenchError: another record than those is damaged.
        OSError: the new file cannot be written.
    """
    tf, copied = import_tensorflow(), 0
    try:
        with tf.io.TFRecordWriter(str(target)) as writer:
            for number, record, wrong in walk_records(source, images):
                if number in leave_out:
                    continue
                if record is None:
                    raise WorkbenchError(
                        f"Record {number + 1} of `{source}` {wrong}, and did not a moment ago: check that disk."
                    )
                writer.write(record)
                copied += 1
    except tf.errors.OpError as error:
        raise OSError(None, core_of(error)) from None
    return copied


def core_of(error) -> str:
    """What TensorFlow says, without where in its graph it said it."""
    return re.sub(r"^\{\{.*?\}\} ", "", error.message or "").split(" [")[0].split("\n")[0].strip()


def import_tensorflow():
    """TensorFlow, imported when it is needed: planning and describing shards has to work in a kernel without it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    first = "tensorflow" not in sys.modules
    import tensorflow as tf

    # A notebook that looks at shards must not take the GPU's memory from the workers that train. A worker, which has
    # imported TensorFlow before, must not lose its GPU by looking at shards.
    if first:
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
    return tf


def _what(core: str) -> str:
    if core.startswith("corrupted record"):
        return "fails its checksum"
    return "is cut short" if core.startswith("truncated record") else f"cannot be read ({core})"


def _offsets(path: Path) -> Iterator[int]:
    """Where each record begins, by the lengths alone, and where the last one ends, which may be behind the file."""
    position, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while position < size:
            yield position
            file.seek(position)
            header = file.read(8)
            # A record: its length (8 bytes), a checksum (4), the data, a checksum (4).
            position += 16 + struct.unpack("<Q", header)[0] if len(header) == 8 else size + 1
    yield position
