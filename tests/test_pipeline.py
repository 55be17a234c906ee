"""Who reads what, and that it is read so: each image at most once in an epoch, exactly once in evaluation."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from workbench import WorkbenchError
from workbench.data import pipeline, shards

SHARDS = ([256, 256, 256, 61], [7], [5, 5, 3], [1] * 9, [40, 2])
COUNTS = {"train": 53, "val": 4, "test": 11}
STORED, SIZE = 20, 16


def rows_of(plan, shard_images):
    """The positions that a plan reads, in its order, counted over all shards."""
    offsets = np.cumsum([0, *shard_images])
    return [int(offsets[shard]) + i for shard, start, stop in plan for i in range(start, stop)]


def plan_all(shard_images, *, batch_size, size, epoch=0, seed=0):
    return [
        rows_of(
            pipeline.plan_epoch(shard_images, batch_size=batch_size, seed=seed, epoch=epoch, rank=rank, size=size),
            shard_images,
        )
        for rank in range(size)
    ]


@pytest.fixture(scope="module", params=["raw", "png"])
def folder(request, tmp_path_factory):
    """Image i has the number i in its corner, and its labels are the bits of i: pixels and labels belong together."""
    root = tmp_path_factory.mktemp("pipeline")
    rng = np.random.default_rng(1)
    rows = []
    for number, split in enumerate(split for split, count in COUNTS.items() for _ in range(count)):
        pixels = rng.integers(60, 200, (STORED, STORED)).astype(np.uint8)
        pixels[6:14, 6:14] = number + 60
        path = root / f"{number:08d}_000.png"
        Image.fromarray(pixels).save(path)
        bits = [number >> bit & 1 for bit in range(7)]
        rows.append([path.name, str(path), number, 0, 40, "F", "PA", not any(bits), split, *bits])
    front = ["image", "path", "patient", "follow_up", "age", "sex", "view", "no_finding", "split"]
    frame = pd.DataFrame(rows, columns=[*front, *(f"bit{i}" for i in range(7))])
    shards.write_shards(
        frame, root / "s", image_size=STORED, encoding=request.param, images_per_shard=8, progress=False
    )
    return root / "s"


def read_training(folder, *, rank=0, size=1, epoch=0, seed=0, batch_size=4, **options):
    batches = pipeline.build_training(
        folder, image_size=SIZE, batch_size=batch_size, seed=seed, epoch=epoch, rank=rank, size=size, **options
    )
    return [(images.numpy(), labels.numpy()) for images, labels in batches]


def numbers_of(batches):
    """The images' numbers, told by their labels."""
    return [int(label @ 2 ** np.arange(7)) for _, labels in batches for label in labels]


@pytest.mark.parametrize("shard_images", SHARDS)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_image_at_most_once_and_equal_counts(shard_images, size, batch_size):
    total = sum(shard_images)
    steps = pipeline.steps_per_epoch(total, batch_size=batch_size, size=size)
    assert steps == total // (batch_size * size)
    former = set()
    for epoch in range(4):
        ranks = plan_all(shard_images, batch_size=batch_size, size=size, epoch=epoch)
        assert [len(rows) for rows in ranks] == [steps * batch_size] * size
        seen = {row for rows in ranks for row in rows}
        assert len(seen) == steps * batch_size * size
        assert seen <= set(range(total))
        left_out = set(range(total)) - seen
        assert len(left_out) == total % (batch_size * size)
        assert not left_out & former, "an image was left out twice running"
        former = left_out


def test_every_image_is_left_out_equally_often():
    left_out = np.zeros(10, int)
    for epoch in range(10):
        [rows] = plan_all([4, 6], batch_size=4, size=1, epoch=epoch)
        left_out[sorted(set(range(10)) - set(rows))] += 1
    assert left_out.tolist() == [2] * 10


def test_the_plan_depends_on_seed_epoch_and_size_only():
    def plan(**options):
        return plan_all(SHARDS[0], **{"batch_size": 16, "size": 2} | options)

    assert plan() == plan()
    assert plan() != plan(epoch=1)
    assert plan() != plan(seed=1)
    assert plan(epoch=3)[0] + plan(epoch=3)[1] == plan(epoch=3, size=1, batch_size=32)[0], "slices of one stream"
    shard_order = [list(dict.fromkeys(row // 256 for row in plan(epoch=e, size=1)[0])) for e in range(6)]
    assert len({tuple(order) for order in shard_order}) > 2


def test_the_plan_is_whole_records_of_real_shards():
    for epoch in range(5):
        for shard, start, stop in pipeline.plan_epoch([7, 9, 4], batch_size=3, seed=1, epoch=epoch, rank=1, size=2):
            assert 0 <= start < stop <= [7, 9, 4][shard]


@pytest.mark.parametrize("shard_images", SHARDS)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_evaluation_slices_joined_are_the_stream(shard_images, size):
    plans = [pipeline.plan_evaluation(shard_images, rank=rank, size=size) for rank in range(size)]
    assert [row for plan in plans for row in rows_of(plan, shard_images)] == list(range(sum(shard_images)))
    counts = [len(rows_of(plan, shard_images)) for plan in plans]
    assert max(counts) - min(counts) <= 1


def test_too_few_images_and_wrong_ranks_are_told():
    with pytest.raises(WorkbenchError, match="15 training images are fewer than one global batch of 16"):
        pipeline.steps_per_epoch(15, batch_size=8, size=2)
    with pytest.raises(WorkbenchError, match="batch_size=0"):
        pipeline.steps_per_epoch(15, batch_size=0, size=2)
    with pytest.raises(WorkbenchError, match="rank=2 of size=2"):
        pipeline.plan_epoch([9], batch_size=1, seed=0, epoch=0, rank=2, size=2)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_training_reads_what_was_planned(folder, size):
    info = shards.read_info(folder)
    counts = [shard["images"] for shard in info["splits"]["train"]["shards"]]
    # Row i of the table is image number table[i], since training images were shuffled.
    numbers = shards.read_images(folder)["patient"].tolist()
    steps = pipeline.steps_per_epoch(53, batch_size=4, size=size)
    seen = []
    for rank in range(size):
        batches = read_training(folder, rank=rank, size=size)
        assert len(batches) == steps
        for images, labels in batches:
            assert (images.shape, images.dtype) == ((4, SIZE, SIZE, 1), np.uint8)
            assert (labels.shape, labels.dtype) == ((4, 7), np.float32)
        plan = pipeline.plan_epoch(counts, batch_size=4, seed=0, epoch=0, rank=rank, size=size)
        assert sorted(numbers_of(batches)) == sorted(numbers[row] for row in rows_of(plan, counts))
        rows = [numbers.index(number) for number in numbers_of(batches)]
        by_shard = [[row for row in rows if row // 8 == shard] for shard in range(7)]
        assert by_shard != [sorted(shard) for shard in by_shard], "in turn from several shards, but not mixed"
        seen += numbers_of(batches)
    assert len(set(seen)) == len(seen) == steps * 4 * size
    assert max(seen) < 53, "validation images in training"


def test_pixels_and_labels_belong_together(folder):
    batches = read_training(folder, augment=False)
    middles = [int(image[7, 7, 0]) - 60 for images, _ in batches for image in images]
    assert middles == numbers_of(batches)


def test_the_same_seed_gives_the_same_bytes_whatever_else_is_set(folder):
    import tensorflow as tf

    tf.random.set_seed(1)
    one = read_training(folder, seed=4, epoch=2, rank=1, size=2)
    tf.random.set_seed(2)
    two = read_training(folder, seed=4, epoch=2, rank=1, size=2, threads=3)
    for (images, labels), (images_again, labels_again) in zip(one, two, strict=True):
        np.testing.assert_array_equal(images, images_again)
        np.testing.assert_array_equal(labels, labels_again)
    assert numbers_of(one) != numbers_of(read_training(folder, seed=5, epoch=2, rank=1, size=2))
    assert numbers_of(one) != numbers_of(read_training(folder, seed=4, epoch=3, rank=1, size=2))


def by_number(batches):
    images = [image for images, _ in batches for image in images]
    return dict(zip(numbers_of(batches), images, strict=True))


def test_augmentation_does_not_depend_on_the_number_of_workers(folder):
    alone = by_number(read_training(folder, seed=3, epoch=1))
    together = {}
    for rank in range(3):
        together |= by_number(read_training(folder, seed=3, epoch=1, rank=rank, size=3))
    both = alone.keys() & together.keys()
    assert len(both) > 40
    for number in both:
        np.testing.assert_array_equal(alone[number], together[number])
    later = by_number(read_training(folder, seed=3, epoch=2))
    assert sum(np.array_equal(alone[n], later[n]) for n in alone.keys() & later.keys()) < 5


def test_augmentation_is_a_crop_a_flip_and_a_little_light(folder):
    stored = {}
    for split, count in COUNTS.items():
        images, rows = shards.read_examples(folder, split, count)
        stored |= dict(zip(rows["patient"], images, strict=True))
    draws = pipeline.draw_augmentation(53, margin=STORED - SIZE, seed=0, epoch=0)
    row_of = {number: row for row, number in enumerate(shards.read_images(folder)["patient"])}
    for number, image in by_number(read_training(folder)).items():
        top, left, flip, contrast, brightness = draws[row_of[number]]
        part = stored[number][top : top + SIZE, left : left + SIZE].astype(float)
        part = part[:, ::-1] if flip else part
        expected = (part - 128) * contrast / 256 + 128 + brightness
        assert np.abs(image[..., 0] - expected.clip(0, 255)).max() <= 0.5


def test_draws_cover_their_ranges_and_nothing_else():
    draws = pipeline.draw_augmentation(5000, margin=4, seed=0, epoch=0)
    assert draws.min(axis=0).tolist() == [0, 0, 0, 230, -13]
    assert draws.max(axis=0).tolist() == [4, 4, 1, 282, 13]
    assert 0.45 < draws[:, 2].mean() < 0.55
    assert not pipeline.draw_augmentation(9, margin=0, seed=0, epoch=0)[:, :2].any()


def test_every_grey_level_under_every_light_is_rounded_exactly():
    levels = np.arange(256).reshape(16, 16)
    light = np.indices((2 * pipeline.CONTRAST + 1, 2 * pipeline.BRIGHTNESS + 1)).reshape(2, -1).T
    draws = np.zeros((len(light), 5), np.int32)
    draws[:, 3:] = light + np.array([256 - pipeline.CONTRAST, -pipeline.BRIGHTNESS])
    images = np.broadcast_to(levels.astype(np.uint8), (len(light), 16, 16))
    contrast, brightness = draws[:, 3, None, None], draws[:, 4, None, None]
    expected = (contrast * (levels - 128) + 256 * (128 + brightness) + 128) // 256
    changed = pipeline.change_images(images, draws, image_size=16)
    np.testing.assert_array_equal(changed[..., 0], expected.clip(0, 255))


def test_augmentation_is_the_same_eagerly_and_inside_tf_data():
    import tensorflow as tf

    images = np.random.default_rng(0).integers(0, 256, (6, STORED, STORED)).astype(np.uint8)
    draws = pipeline.draw_augmentation(6, margin=STORED - SIZE, seed=1, epoch=1)
    eager = pipeline.change_images(tf.constant(images), tf.constant(draws), image_size=SIZE).numpy()
    inside = tf.data.Dataset.from_tensors((images, draws)).map(
        lambda images, draws: pipeline.change_images(images, draws, image_size=SIZE)
    )
    np.testing.assert_array_equal(eager, inside.get_single_element().numpy())
    assert eager.dtype == np.uint8


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_reads_each_image_once_in_order(folder, split, size):
    table = shards.read_images(folder)
    expected = table[table["split"] == split]
    seen, images, labels = [], [], []
    for rank in range(size):
        for batch in pipeline.build_evaluation(folder, split, image_size=SIZE, batch_size=3, rank=rank, size=size):
            assert len(batch[0]) <= 3
            images.append(batch[0].numpy())
            labels.append(batch[1].numpy())
            seen += batch[2].numpy().tolist()
    assert seen == expected["row"].tolist()
    np.testing.assert_array_equal(np.concatenate(labels), expected[[f"bit{i}" for i in range(7)]])
    stored, _ = shards.read_examples(folder, split, len(seen))
    np.testing.assert_array_equal(np.concatenate(images)[..., 0], stored[:, 2:-2, 2:-2])
    assert images[0].dtype == np.uint8


def test_a_worker_without_images_reads_nothing(folder):
    batches = pipeline.build_evaluation(folder, "val", image_size=SIZE, batch_size=3, rank=0, size=8)
    assert list(batches) == []


def test_the_number_of_batches_is_known_beforehand(folder):
    batches = pipeline.build_training(folder, image_size=SIZE, batch_size=4, seed=0, epoch=0, rank=0, size=3)
    assert int(batches.cardinality()) == 4


def test_a_truncated_shard_is_refused_by_name(folder):
    victim = folder / "train-00002-of-00007.tfrecord"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-100])
    try:
        with pytest.raises(WorkbenchError, match=r"train-00002-of-00007.tfrecord` has .* bytes instead of"):
            read_training(folder)
        assert list(pipeline.build_evaluation(folder, "val", image_size=SIZE, batch_size=3))
    finally:
        victim.write_bytes(whole)


def test_images_stored_too_small_are_refused(folder):
    with pytest.raises(WorkbenchError, match=f"images of {STORED} pixels, fewer than image_size=21"):
        pipeline.build_evaluation(folder, "val", image_size=21, batch_size=3)
    whole = pipeline.build_evaluation(folder, "val", image_size=STORED, batch_size=4)
    assert next(iter(whole))[0].shape == (4, STORED, STORED, 1)
    with pytest.raises(WorkbenchError, match="split='dev' is not known"):
        pipeline.build_evaluation(folder, "dev", image_size=SIZE, batch_size=3)


def test_planning_needs_no_tensorflow():
    import subprocess
    import sys

    code = (
        "import sys\nfrom workbench.data import pipeline, shards, chestxray14, synthetic\n"
        "pipeline.plan_epoch([9], batch_size=2, seed=0, epoch=0, rank=0, size=2)\n"
        "shards.plan_shards(9)\nprint('tensorflow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"
