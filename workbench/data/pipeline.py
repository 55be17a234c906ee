"""Shards -> batches for one worker: shuffled and augmented for training, in order for evaluation.

Who reads what is planned in plain Python (`plan_epoch`), without files and without TensorFlow; tf.data then
reads it. All randomness is a function of the seed, the epoch and the image, so that the same seed gives the
same batches, and an image is augmented alike however many workers there are. Nothing here knows MPI: rank
and size are passed in, and one worker is simply rank 0 of 1.

    from workbench.data import pipeline
    batches = pipeline.build_training("data/shards/nih-256", image_size=224, batch_size=16, seed=0, epoch=0)
    for images, labels in batches: ...            # uint8 (16, 224, 224, 1), float32 (16, 14)
    test = pipeline.build_evaluation("data/shards/nih-256", "test", image_size=224, batch_size=16)
    for images, labels, rows in test: ...         # rows of images.csv, int64
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workbench import WorkbenchError
from workbench.data.shards import check_sizes, read_info

if TYPE_CHECKING:
    import tensorflow as tf

Piece = tuple[int, int, int]  # (shard, start, stop): records start to stop of a shard

INTERLEAVED_SHARDS = 4
CORES = len(os.sched_getaffinity(0))
SHUFFLED_RECORDS = 1024  # encoded records in memory from which the next one is drawn: 64 MiB of raw 256×256 images
CONTRAST = 26  # ± of 256, so ±10 %
BRIGHTNESS = 13  # ± grey levels, so ±5 %


def steps_per_epoch(images: int, *, batch_size: int, size: int) -> int:
    """Steps that every worker does in an epoch: whole global batches, the same number everywhere.

    Raises:
        WorkbenchError: there are fewer images than one global batch.
    """
    if batch_size < 1 or size < 1:
        raise WorkbenchError(f"batch_size={batch_size} on {size} workers: expected at least 1 each.")
    # Horovod: unequal numbers of steps would hang the all-reduce for ever.
    steps = images // (batch_size * size)
    if steps == 0:
        raise WorkbenchError(
            f"{images:,} training images are fewer than one global batch of {batch_size * size:,} "
            f"(batch_size={batch_size} on {size} workers): use a smaller batch, fewer workers or more images."
        )
    return steps


def plan_epoch(
    shard_images: Sequence[int], *, batch_size: int, seed: int, epoch: int, rank: int, size: int
) -> list[Piece]:
    """Plan which records of which shards one worker reads in an epoch.

    The shards stand in an order drawn by (seed, epoch), and worker r of n reads the r-th of n equal slices
    of that stream. What does not fill a global batch is left out: a window that moves on by its own length
    every epoch, so that no image is left out twice running.
    """
    _check_rank(rank, size)
    total = sum(shard_images)
    share = steps_per_epoch(total, batch_size=batch_size, size=size) * batch_size
    left_out = total - share * size
    first = (int(np.random.default_rng(seed).integers(total)) + epoch * left_out) % total
    last = first + left_out
    kept = [(0, first), (last, total)] if last <= total else [(last - total, first)]

    offsets = np.cumsum([0, *shard_images])
    stream = []
    for shard in np.random.default_rng([seed, epoch]).permutation(len(shard_images)).tolist():
        low, high = int(offsets[shard]), int(offsets[shard + 1])
        stream += [(shard, max(start, low) - low, min(stop, high) - low) for start, stop in kept]
    # Horovod: each worker reads another slice of the same stream.
    return _slice(stream, rank * share, (rank + 1) * share)


def plan_evaluation(shard_images: Sequence[int], *, rank: int, size: int) -> list[Piece]:
    """Plan which records one worker evaluates: slices that, joined in the order of ranks, are the stream."""
    _check_rank(rank, size)
    total = sum(shard_images)
    stream = [(shard, 0, images) for shard, images in enumerate(shard_images)]
    # Horovod: the slices differ by one image at most; no image is evaluated twice.
    return _slice(stream, rank * total // size, (rank + 1) * total // size)


def build_training(
    folder: str | Path,
    *,
    image_size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    size: int = 1,
    augment: bool = True,
    threads: int | None = None,
) -> "tf.data.Dataset":
    """Build one worker's batches of one epoch: uint8 (B, H, W, 1) and float32 labels (B, K).

    Exactly `steps_per_epoch` batches, all full. With `augment`, each image is shifted, flipped, and changed a
    little in contrast and brightness, by draws that depend on seed, epoch and image only; without, it is the
    centre crop.

    Args:
        folder: written by `shards.write_shards`.
        image_size: height and width of the batches; the stored margin around it is the room for the shift.
        batch_size: images per worker and step.
        seed: of the order and of the augmentation.
        epoch: 0-based; another epoch is another order and other draws.
        rank: of this worker, 0 to size - 1.
        size: number of workers.
        augment: False reads the same images in the same order, unchanged.
        threads: for reading and augmenting; by default as many as this process has cores.

    Raises:
        WorkbenchError: too few images, images stored too small, or a shard that is not as it was written.
    """
    import tensorflow as tf

    info, counts = _open(folder, "train", image_size)
    pieces = plan_epoch(counts, batch_size=batch_size, seed=seed, epoch=epoch, rank=rank, size=size)
    steps = steps_per_epoch(sum(counts), batch_size=batch_size, size=size)
    margin = info["image_size"] - image_size
    # A row of draws for every row of images.csv, also for those that are left out of this run as damaged.
    drawn = info["splits"]["train"].get("rows", sum(counts))
    draws = tf.constant(draw_augmentation(drawn, margin=margin, seed=seed, epoch=epoch))

    def prepare(records):
        images, labels, rows = _parse(records, info)
        if augment:
            return change_images(images, tf.gather(draws, rows), image_size=image_size), labels
        return crop_centre(images, image_size=image_size), labels

    # Horovod: rank and size are in the seed, so workers do not mix their slices in the same pattern.
    mix = np.random.SeedSequence([seed, epoch, rank, size]).generate_state(2).astype(np.int64)
    records = _read(folder, info["splits"]["train"]["shards"], pieces, cycle=INTERLEAVED_SHARDS)
    batches = _shuffle(records, mix).batch(batch_size, drop_remainder=True)
    batches = batches.map(prepare, num_parallel_calls=threads or CORES)
    return _finish(batches.apply(tf.data.experimental.assert_cardinality(steps)), threads)


def build_evaluation(
    folder: str | Path,
    split: str,
    *,
    image_size: int,
    batch_size: int,
    rank: int = 0,
    size: int = 1,
    threads: int | None = None,
) -> "tf.data.Dataset":
    """Build one worker's part of a split, each image once and unchanged but for the centre crop.

    Batches are uint8 (B, H, W, 1), float32 labels (B, K) and int64 rows of `images.csv` (B,); the last may be
    short. The parts of all workers, joined in the order of ranks, are the split in the order of `images.csv`.
    """

    info, counts = _open(folder, split, image_size)
    pieces = plan_evaluation(counts, rank=rank, size=size)

    def prepare(records):
        images, labels, rows = _parse(records, info)
        return crop_centre(images, image_size=image_size), labels, rows

    batches = _read(folder, info["splits"][split]["shards"], pieces, cycle=1).batch(batch_size)
    return _finish(batches.map(prepare, num_parallel_calls=threads or CORES), threads)


def draw_augmentation(images: int, *, margin: int, seed: int, epoch: int) -> np.ndarray:
    """Draw the changes of every training image in an epoch: int32 (images, 5).

    Columns: top and left of the crop (0 to margin), flip (0/1), contrast (256 is none), brightness (grey
    levels). Row i belongs to row i of `images.csv`, whichever worker reads it.
    """
    # 1 keeps this stream apart from that of the order of shards.
    generator = np.random.default_rng([seed, epoch, 1])
    low = [0, 0, 0, 256 - CONTRAST, -BRIGHTNESS]
    high = [margin, margin, 1, 256 + CONTRAST, BRIGHTNESS]
    return generator.integers(low, high, size=(images, 5), endpoint=True, dtype=np.int32)


def change_images(images: "tf.Tensor", draws: "tf.Tensor", *, image_size: int) -> "tf.Tensor":
    """Crop, flip, and change contrast and brightness: uint8 (B, S, S) -> uint8 (B, size, size, 1).

    Every intermediate value is a whole number of 256ths that float32 holds exactly, so the bytes are the same
    eagerly, inside tf.data and on every machine.

    Args:
        images: as stored.
        draws: int32 (B, 5), rows of `draw_augmentation`.
        image_size: height and width wanted.
    """
    import tensorflow as tf

    def crop(image_and_draw):
        image, draw = image_and_draw
        part = tf.slice(image, draw[:2], [image_size, image_size])
        return tf.cond(draw[2] > 0, lambda: tf.reverse(part, [1]), lambda: part)

    # One by one: a gather of the whole batch costs six times as much.
    one = tf.TensorSpec([image_size, image_size], tf.uint8)
    parts = tf.cast(tf.map_fn(crop, (images, draws), fn_output_signature=one)[..., None], tf.float32)
    contrast, brightness = (tf.cast(draws[:, i, None, None, None], tf.float32) for i in (3, 4))
    contrast /= 256
    # Contrast turns about the middle grey, 128; the last half rounds.
    return tf.saturate_cast(parts * contrast + (128 + brightness - 128 * contrast + 0.5), tf.uint8)


def crop_centre(images: "tf.Tensor", *, image_size: int) -> "tf.Tensor":
    """Cut out the centre, as evaluation and inference see it: uint8 (B, S, S) -> uint8 (B, size, size, 1)."""
    edge = (images.shape[1] - image_size) // 2
    return images[:, edge : edge + image_size, edge : edge + image_size, None]


def _check_rank(rank: int, size: int) -> None:
    if not 0 <= rank < size:
        raise WorkbenchError(f"rank={rank} of size={size}: expected 0 <= rank < size.")


def _slice(stream: list[Piece], start: int, stop: int) -> list[Piece]:
    """Positions start to stop of the joined pieces."""
    pieces, position = [], 0
    for shard, first, last in stream:
        begin, end = first + max(start - position, 0), min(last, first + stop - position)
        if begin < end:
            pieces.append((shard, begin, end))
        position += max(last - first, 0)
    return pieces


def _open(folder: str | Path, split: str, image_size: int) -> tuple[dict, list[int]]:
    """The folder's info and the images of each shard of the split, after the checks that are cheap."""
    info = read_info(folder)
    check_sizes(folder, info, [split])
    if info["image_size"] < image_size:
        raise WorkbenchError(
            f"`{folder}` holds images of {info['image_size']} pixels, fewer than image_size={image_size}: "
            "write shards of at least that size, better with a margin, or choose a smaller image_size."
        )
    return info, [shard["images"] for shard in info["splits"][split]["shards"]]


def _read(folder: str | Path, shards: list[dict], pieces: list[Piece], *, cycle: int) -> "tf.data.Dataset":
    """The encoded records of the pieces, `cycle` shards in turn."""
    import tensorflow as tf

    files = [str(Path(folder) / shard["file"]) for shard in shards]
    plan = (
        tf.constant([files[shard] for shard, _, _ in pieces], tf.string),
        tf.constant([start for _, start, _ in pieces], tf.int64),
        tf.constant([stop - start for _, start, stop in pieces], tf.int64),
    )
    return tf.data.Dataset.from_tensor_slices(plan).interleave(
        lambda file, start, count: tf.data.TFRecordDataset(file).skip(start).take(count),
        cycle_length=cycle,
        num_parallel_calls=cycle,
        deterministic=True,
    )


def _shuffle(records: "tf.data.Dataset", seed: Sequence[int]) -> "tf.data.Dataset":
    """Mix a stream of encoded records, each with the thousand around it; records are moved, not copied.

    What `Dataset.shuffle` is made of, since the order of that one also depends on TensorFlow's global seed.
    """
    import tensorflow as tf

    shuffled = tf.raw_ops.ShuffleDataset(
        input_dataset=tf.data.experimental.to_variant(records),
        buffer_size=SHUFFLED_RECORDS,
        seed=seed[0],
        seed2=seed[1],
        output_types=[tf.string],
        output_shapes=[[]],
        reshuffle_each_iteration=False,
    )
    return tf.data.experimental.from_variant(shuffled, records.element_spec)


def _parse(records: "tf.Tensor", info: dict) -> tuple["tf.Tensor", "tf.Tensor", "tf.Tensor"]:
    """Encoded records (B,) -> uint8 (B, S, S), float32 (B, K), int64 (B,)."""
    import tensorflow as tf

    size, text = info["image_size"], tf.io.FixedLenFeature([], tf.string)
    parsed = tf.io.parse_example(records, {"image": text, "labels": text, "row": tf.io.FixedLenFeature([], tf.int64)})
    if info["encoding"] == "raw":
        images = tf.io.decode_raw(parsed["image"], tf.uint8)
    else:
        images = tf.map_fn(
            lambda encoded: tf.io.decode_image(encoded, channels=1, expand_animations=False),
            parsed["image"],
            fn_output_signature=tf.TensorSpec([size, size, 1], tf.uint8),
        )
    labels = tf.cast(tf.io.decode_raw(parsed["labels"], tf.uint8), tf.float32)
    return (
        tf.reshape(images, [-1, size, size]),
        tf.reshape(labels, [-1, len(info["findings"])]),
        parsed["row"],
    )


def _finish(batches: "tf.data.Dataset", threads: int | None) -> "tf.data.Dataset":
    import tensorflow as tf

    options = tf.data.Options()
    options.deterministic = True
    # Its tuning thread gains nothing here, takes time from the rank's one core, and holds up the end of an
    # epoch: destroying the iterator waits for the model it is working out, for 2 to 40 s on a busy machine.
    options.autotune.enabled = False
    # Horovod: files are divided by the plan; tf.data must not divide them again.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    if threads:
        options.threading.private_threadpool_size = threads
    return batches.prefetch(2).with_options(options)
