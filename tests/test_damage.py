"""Whatever byte of a shard is wrong: its record is found, and all the others are read, once each."""

import shutil

import numpy as np
import pytest

from workbench import WorkbenchError
from workbench.data import damage, pipeline, records, shards


def scan(folder, size=1):
    ranks = [damage.scan_shards(folder, rank=rank, size=size) for rank in range(size)]
    return damage.in_order([record for rank in ranks for _, found in rank for record in found])


def rows_read(folder, split):
    batches = pipeline.build_evaluation(folder, split, image_size=32, batch_size=4)
    return [row for _, _, rows in damage.each_batch(batches, folder, split) for row in rows.numpy().tolist()]


@pytest.mark.parametrize("seed", range(12))
def test_a_random_byte_costs_its_record_or_what_lies_behind_a_length(shard_folder, tmp_path, seed):
    rng = np.random.default_rng(seed)
    folder = shutil.copytree(shard_folder, tmp_path / "shards")
    table = shards.read_images(folder)
    path = sorted(folder.glob("*.tfrecord"))[rng.integers(8)]
    content = bytearray(path.read_bytes())
    starts = list(records._offsets(path))
    place = int(rng.integers(len(content)))
    if seed % 3 == 1:
        place = starts[rng.integers(len(starts) - 1)] + int(rng.integers(12))  # a length, or its checksum
    hit = records.number_at(path, place)
    assert starts[hit] <= place < starts[hit + 1]
    content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(content[:place] if seed % 3 == 2 else content)
    behind = seed % 3 == 2 or place - starts[hit] < 12
    lost = range(hit, len(starts) - 1 if behind else hit + 1)
    found = scan(folder, size=1 + seed % 2)
    assert [(record["shard"], record["record"]) for record in found] == [(path.name, number + 1) for number in lost]
    damage.write_without(folder, found, tmp_path / "usable")
    for split in shards.SPLITS:
        expected = table[(table["split"] == split) & ~table["image"].isin([record["image"] for record in found])]
        assert rows_read(tmp_path / "usable", split) == expected["row"].tolist()
    assert path.read_bytes() == (content[:place] if seed % 3 == 2 else bytes(content))


def test_bytes_behind_the_last_record_cost_nothing(shard_folder, tmp_path):
    folder = shutil.copytree(shard_folder, tmp_path / "shards")
    path = folder / "val-00000-of-00002.tfrecord"
    path.write_bytes(path.read_bytes() + b"more")
    assert scan(folder) == []
    damage.write_without(folder, [], tmp_path / "usable")
    assert len(rows_read(tmp_path / "usable", "val")) == shards.read_info(folder)["splits"]["val"]["images"]


def test_what_nobody_can_go_on_without_is_refused(shard_folder, tmp_path):
    folder = shutil.copytree(shard_folder, tmp_path / "shards")
    (folder / "val-00000-of-00002.tfrecord").unlink()
    with pytest.raises(WorkbenchError, match=r"val-00000-of-00002.tfrecord` is missing: copy it again"):
        scan(folder)
    shutil.copy(shard_folder / "val-00000-of-00002.tfrecord", folder)
    with (folder / "images.csv").open("a") as file:
        file.write("\n")
    with pytest.raises(WorkbenchError, match=r"images.csv` has changed since it was written"):
        scan(folder)


def test_a_record_that_goes_bad_after_the_scan_is_named(shard_folder, tmp_path):
    folder = shutil.copytree(shard_folder, tmp_path / "shards")
    path = folder / "test-00000-of-00002.tfrecord"
    damage.write_without(folder, [], tmp_path / "usable")
    content = bytearray(path.read_bytes())
    content[list(records._offsets(path))[8] + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(WorkbenchError, match=rf"`{path.resolve()}` is damaged: record 9 of 16 .*fails its checksum"):
        rows_read(tmp_path / "usable", "test")
    for one in ({"shard": path.name, "record": 1}, {"shard": path.name, "record": 9}):
        target = tmp_path / f"again-{one['record']}"
        if one["record"] == 9:
            damage.write_without(folder, [one], target)
        else:
            with pytest.raises(WorkbenchError, match=rf"Record 9 of `{path.resolve()}` fails its checksum"):
                damage.write_without(folder, [one], target)
