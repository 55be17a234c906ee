"""Shards: what goes in comes out, interrupted writing is taken up, and damage is found and named."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from odd_images import REFUSED, write_odd_images
from PIL import Image

from workbench import WorkbenchError
from workbench.data import radiographs, records, shards

FINDINGS = ["Effusion", "Mass", "Hernia"]
COUNTS = {"train": 23, "val": 7, "test": 10}


def make_frame(folder, counts=COUNTS, size=24):
    """A frame as read_dataset makes it; pixels tell the image's number, so that none can be mistaken."""
    rng = np.random.default_rng(5)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for split, count in counts.items():
        for _ in range(count):
            number = len(rows)
            name = f"{number // 2:08d}_{number % 2:03d}.png"
            pixels = rng.integers(0, 256, (size, size)).astype(np.uint8)
            pixels[:4, :4] = number
            Image.fromarray(pixels).save(folder / name)
            rows.append([name, str(folder / name), number // 2 + 100 * (split == "val"), 0, 40, "F", "PA"])
            labels = rng.integers(0, 2, len(FINDINGS))
            rows[-1] += [not labels.any(), split, *labels.astype(np.uint8)]
    front = ["image", "path", "patient", "follow_up", "age", "sex", "view", "no_finding", "split"]
    frame = pd.DataFrame(rows, columns=[*front, *FINDINGS])
    return frame.astype(dict.fromkeys(FINDINGS, np.uint8)).sort_values("image", ignore_index=True)


@pytest.fixture(scope="module")
def frame(tmp_path_factory):
    return make_frame(tmp_path_factory.mktemp("images") / "images")


def write(frame, folder, **options):
    return shards.write_shards(frame, folder, **{"image_size": 24, "images_per_shard": 8, "progress": False} | options)


@pytest.fixture(scope="module")
def written(frame, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "written"
    write(frame, folder)
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def identities(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("*.tfrecord")}


def test_the_plan_has_every_row_once_and_a_short_last_shard():
    for images in (0, 1, 255, 256, 257, 1000):
        plan = shards.plan_shards(images)
        assert [row for start, stop in plan for row in range(start, stop)] == list(range(images))
        assert all(stop - start == 256 for start, stop in plan[:-1])
    assert shards.plan_shards(600, images_per_shard=250)[-1] == (500, 600)
    with pytest.raises(WorkbenchError, match="images_per_shard=0"):
        shards.plan_shards(3, images_per_shard=0)


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
def test_round_trip(frame, tmp_path, encoding):
    info = write(frame, tmp_path / "s", encoding=encoding, split={"kind": "official"}, seed=3)
    assert info == shards.read_info(tmp_path / "s", findings=FINDINGS)
    assert info["split"] == {"kind": "official"}
    table = shards.read_images(tmp_path / "s")
    assert table["row"].tolist() == list(range(len(frame)))
    for split, count in COUNTS.items():
        images, rows = shards.read_examples(tmp_path / "s", split, 100)
        assert images.shape == (count, 24, 24)
        assert images.dtype == np.uint8
        part = frame[frame["split"] == split].set_index("image")
        assert sorted(rows["image"]) == sorted(part.index)
        pd.testing.assert_frame_equal(
            rows.set_index("image")[["patient", "no_finding", *FINDINGS]],
            part.loc[rows["image"], ["patient", "no_finding", *FINDINGS]],
        )
        originals = np.stack([radiographs.read_radiograph(part["path"][name]) for name in rows["image"]])
        if encoding == "jpeg":
            assert np.abs(images.astype(int) - originals).mean() < 12
        else:
            np.testing.assert_array_equal(images, originals)
    assert len(shards.read_examples(tmp_path / "s", "train", 9)[0]) == 9
    assert shards.verify_shards(tmp_path / "s")["images"].sum() == len(frame)


def test_folder_and_info(frame, written):
    names = sorted(path.name for path in written.iterdir())
    train = [f"train-0000{i}-of-00003.tfrecord" for i in range(3)]
    test = [f"test-0000{i}-of-00002.tfrecord" for i in range(2)]
    assert names == sorted(["images.csv", "info.json", "val-00000-of-00001.tfrecord", *train, *test])
    info = json.loads((written / "info.json").read_text())
    assert [shard["images"] for shard in info["splits"]["train"]["shards"]] == [8, 8, 7]
    assert [shard["images"] for shard in info["splits"]["test"]["shards"]] == [8, 2]
    assert info["splits"]["test"]["images"] == 10
    assert info["splits"]["train"]["patients"] == frame.loc[frame["split"] == "train", "patient"].nunique()
    assert info["table_sha256"] == hashlib.sha256((written / "images.csv").read_bytes()).hexdigest()
    first = info["splits"]["train"]["shards"][0]
    content = (written / first["file"]).read_bytes()
    assert (first["bytes"], first["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    table = shards.read_images(written)
    front = ["row", "image", "patient", "follow_up", "age", "sex", "view", "no_finding", "split", "shard"]
    assert table.columns.tolist() == front + FINDINGS


def test_order_train_shuffled_by_seed_others_by_name(frame, written, tmp_path):
    table = shards.read_images(written)
    assert table["split"].drop_duplicates().tolist() == ["train", "val", "test"]
    for split in ("val", "test"):
        assert table.loc[table["split"] == split, "image"].is_monotonic_increasing
    train = table.loc[table["split"] == "train", "image"].tolist()
    assert train != sorted(train)
    write(frame, tmp_path / "other", seed=1)
    assert shards.read_images(tmp_path / "other")["image"].tolist()[:23] != train


def test_several_processes_write_the_same_bytes(frame, written, tmp_path):
    write(frame, tmp_path / "s", processes=2)
    for path in written.iterdir():
        assert (tmp_path / "s" / path.name).read_bytes() == path.read_bytes(), path.name


def test_interrupted_writing_is_taken_up(frame, written, tmp_path, monkeypatch):
    folder, done = tmp_path / "s", []
    real = shards._write_shard

    def interrupt(path, *args):
        if len(done) == 2:
            path.with_name(f".{path.stem}.1.part{path.suffix}").write_bytes(b"half")
            raise KeyboardInterrupt
        done.append(path.name)
        real(path, *args)

    monkeypatch.setattr(shards, "_write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(frame, folder)
    monkeypatch.setattr(shards, "_write_shard", real)
    before = identities(folder)
    assert sorted(name for name in before if name[0] != ".") == sorted(done)
    with pytest.raises(WorkbenchError, match=r"no whole set of shards .*interrupted"):
        shards.read_info(folder)
    with pytest.raises(WorkbenchError, match="unfinished shards of other"):
        write(frame, folder, encoding="png")

    # A finished shard that was cut short since is written again, the other is kept.
    with open(folder / done[1], "r+b") as file:
        file.truncate(os.path.getsize(file.name) - 3)
    write(frame, folder)
    after = identities(folder)
    assert after[done[0]] == before[done[0]]
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in written.iterdir())
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in written.iterdir())


def test_a_whole_folder_is_returned_at_once_or_refused(frame, copy, monkeypatch):
    monkeypatch.setattr(shards, "_encode_shards", lambda *_: pytest.fail("encoded again"))
    assert write(frame, copy) == shards.read_info(copy)
    for options in ({"image_size": 20}, {"encoding": "png"}, {"images_per_shard": 9}, {"seed": 1}):
        with pytest.raises(WorkbenchError, match="already holds shards of other"):
            write(frame, copy, **options)
    with pytest.raises(WorkbenchError, match="already holds"):
        write(frame.assign(Mass=np.uint8(1)), copy)
    with pytest.raises(WorkbenchError, match="already holds"):
        write(frame[1:], copy)


def test_a_moved_data_set_is_the_same_and_other_pixels_are_not(frame, copy, tmp_path):
    moved = shutil.copytree(os.path.dirname(frame["path"][0]), tmp_path / "elsewhere" / "images")
    assert write(frame.assign(path=[str(moved / name) for name in frame["image"]]), copy)
    for path in moved.iterdir():
        Image.new("L", (48, 48), 7).save(path)
    with pytest.raises(WorkbenchError, match="already holds"):
        write(frame.assign(path=[str(moved / name) for name in frame["image"]]), copy)


def test_a_folder_with_other_things_is_left_alone(frame, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(WorkbenchError, match="something else than shards"):
        write(frame, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_truncated_image_is_named_and_nothing_looks_whole(tmp_path, processes):
    frame = make_frame(tmp_path / "images")
    bad = frame["path"].iloc[30]
    with open(bad, "r+b") as file:
        file.truncate(200)
    with pytest.raises(WorkbenchError, match=f"{os.path.basename(bad)}` cannot be decoded"):
        write(frame, tmp_path / "s", processes=processes)
    assert not (tmp_path / "s" / "info.json").exists()


def test_a_folder_goes_on_when_the_image_that_stopped_it_is_mended(tmp_path):
    frame = make_frame(tmp_path / "images")
    write(frame, tmp_path / "straight")
    # The shards come in the order train, val, test: the last image of test stops the last shard.
    bad = frame.loc[frame["split"] == "test", "path"].iloc[-1]
    with open(bad, "rb") as file:
        whole = file.read()
    with open(bad, "wb") as file:
        file.write(whole[:200])
    with pytest.raises(WorkbenchError, match=f"{os.path.basename(bad)}` cannot be decoded"):
        write(frame, tmp_path / "s")
    before = identities(tmp_path / "s")
    assert len(before) == 5
    with open(bad, "wb") as file:
        file.write(whole)
    write(frame, tmp_path / "s")
    assert {name: identities(tmp_path / "s")[name] for name in before} == before
    for path in (tmp_path / "straight").iterdir():
        assert (tmp_path / "s" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_folder_does_not_go_on_when_an_image_of_a_finished_shard_has_changed(tmp_path):
    frame = make_frame(tmp_path / "images")
    bad = frame.loc[frame["split"] == "test", "path"].iloc[-1]
    os.truncate(bad, 200)
    with pytest.raises(WorkbenchError, match="cannot be decoded"):
        write(frame, tmp_path / "s")
    for path in frame.loc[frame["split"] == "train", "path"]:
        Image.new("L", (48, 48), 7).save(path)
    with pytest.raises(WorkbenchError, match="unfinished shards of other"):
        write(frame, tmp_path / "s")


@pytest.mark.timeout(60)
def test_writing_names_whatever_stands_where_an_image_should(tmp_path):
    write_odd_images(tmp_path / "odd")
    frame = make_frame(tmp_path / "images", {"train": 3, "val": 1, "test": 1})
    for number, (name, said) in enumerate(REFUSED.items()):
        paths = [str(tmp_path / "odd" / name), *frame["path"][1:]]
        with pytest.raises(WorkbenchError, match=f"{name}` .*{said}"):
            write(frame.assign(path=paths), tmp_path / f"s{number}", processes=1)
        assert [path.name for path in (tmp_path / f"s{number}").iterdir()] == ["plan.json"]


def test_verify_names_what_was_truncated_flipped_lost_or_relabelled(copy):
    victim = copy / "test-00001-of-00002.tfrecord"
    whole = victim.read_bytes()
    assert len(shards.verify_shards(copy)) == 6

    victim.write_bytes(whole[:-1])
    with pytest.raises(WorkbenchError, match=r"test-00001-of-00002.tfrecord` has .* bytes instead of"):
        shards.verify_shards(copy)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    victim.write_bytes(flipped)
    with pytest.raises(WorkbenchError, match=r"test-00001-of-00002.tfrecord` has changed"):
        shards.verify_shards(copy)
    victim.unlink()
    with pytest.raises(WorkbenchError, match=r"test-00001-of-00002.tfrecord` is missing"):
        shards.verify_shards(copy)
    victim.write_bytes(whole)

    table = pd.read_csv(copy / "images.csv")
    table.loc[table["shard"] == victim.name, "Mass"] ^= 1
    table.to_csv(copy / "images.csv", index=False)
    with pytest.raises(WorkbenchError, match=r"images.csv` has changed since it was written"):
        shards.verify_shards(copy)
    info = json.loads((copy / "info.json").read_text())
    info["table_sha256"] = hashlib.sha256((copy / "images.csv").read_bytes()).hexdigest()
    (copy / "info.json").write_text(json.dumps(info))
    with pytest.raises(
        WorkbenchError, match=r"test-00001-of-00002.tfrecord` each of the records 1 to 2 of 2 holds other labels"
    ):
        shards.verify_shards(copy)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_every_bad_file_is_named_with_its_records(copy):
    assert list(shards.find_faults(copy)) == []
    size = shards.read_info(copy)["splits"]["train"]["shards"][0]["bytes"] // 8  # of a record
    names = shards.read_images(copy)["image"]
    flip(copy / "train-00000-of-00003.tfrecord", size * 2 + 100)  # data
    flip(copy / "train-00000-of-00003.tfrecord", size * 6 + 100)
    flip(copy / "train-00001-of-00003.tfrecord", size * 4 + 1)  # length
    os.truncate(copy / "train-00002-of-00003.tfrecord", size * 5 + 20)
    (copy / "val-00000-of-00001.tfrecord").unlink()
    shutil.copy(copy / "test-00000-of-00002.tfrecord", copy / "test-00002-of-00003.tfrecord")
    (copy / "test-00000-of-00002.tfrecord").unlink()
    os.mkfifo(copy / "test-00000-of-00002.tfrecord")
    told = {path.name: fault for path, fault in shards.find_faults(copy)}
    assert told == {
        "test-00002-of-00003.tfrecord": "is not in info.json",
        "train-00000-of-00003.tfrecord": "has changed since it was written; "
        f"record 3 of 8 ({names[2]}) fails its checksum; record 7 of 8 ({names[6]}) fails its checksum",
        "train-00001-of-00003.tfrecord": "has changed since it was written; "
        f"record 5 of 8 ({names[12]}) fails its checksum; each of the records 6 to 8 of 8 lies behind a broken length",
        "train-00002-of-00003.tfrecord": f"has {size * 5 + 20:,} bytes instead of {size * 7:,}; "
        "each of the records 6 to 7 of 7 is cut short",
        "val-00000-of-00001.tfrecord": "is missing",
        "test-00000-of-00002.tfrecord": "is no file",
    }


def test_a_damaged_record_does_not_keep_others_from_being_looked_at(copy):
    names = shards.read_images(copy)["image"].tolist()
    whole = shards.read_radiographs(copy, names[:8])
    size = shards.read_info(copy)["splits"]["train"]["shards"][0]["bytes"] // 8
    flip(copy / "train-00000-of-00003.tfrecord", size * 2 + 100)
    np.testing.assert_array_equal(shards.read_radiographs(copy, names[3:8]), whole[3:])
    with pytest.raises(WorkbenchError, match=rf"`{names[2]}` is damaged in `.*train-00000-of-00003.tfrecord`"):
        shards.read_radiographs(copy, names[:8])


def test_a_record_of_something_else_is_named_not_parsed(copy):
    import tensorflow as tf

    path = copy / "val-00000-of-00001.tfrecord"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for content in (b"", b"\xff\xfe", b"\n\x00"):
            writer.write(content)
    with pytest.raises(WorkbenchError, match=r"record 1 is not a record of a shard"):
        records.read_records(path)
    [(_, fault)] = shards.find_faults(copy)
    assert "each of the records 1 to 3 of 7 is not a record of a shard" in fault
    assert "each of the records 4 to 7 of 7 is missing" in fault


def test_looking_at_shards_takes_no_gpu_from_a_worker():
    """A worker has imported TensorFlow before it looks at shards."""
    code = (
        "import tensorflow as tf\nfrom workbench.data import records\nasked = []\n"
        "tf.config.set_visible_devices = lambda *devices: asked.append(devices)\n"
        "records.import_tensorflow()\nprint(asked)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_verify_counts_the_records(copy):
    info = json.loads((copy / "info.json").read_text())
    info["splits"]["val"]["shards"][0]["images"] = 6
    (copy / "info.json").write_text(json.dumps(info))
    with pytest.raises(WorkbenchError, match=r"val-00000-of-00001.tfrecord` holds 7 images, info.json says 6"):
        shards.verify_shards(copy)


def test_read_info_checks(copy, tmp_path):
    with pytest.raises(WorkbenchError, match="has the findings Effusion, Mass, Hernia, but asked for were Mass"):
        shards.read_info(copy, findings=["Mass", "Effusion", "Hernia"])
    with pytest.raises(WorkbenchError, match="holds no whole set of shards"):
        shards.read_info(tmp_path / "nowhere")
    info = json.loads((copy / "info.json").read_text())
    (copy / "info.json").write_text(json.dumps(info | {"format": 2}))
    with pytest.raises(WorkbenchError, match=r"not of format 1 \(format 2"):
        shards.read_info(copy)
    (copy / "info.json").write_text("{")
    with pytest.raises(WorkbenchError, match="cannot be read"):
        shards.read_info(copy)


def test_wrong_settings_are_told(frame, tmp_path):
    with pytest.raises(WorkbenchError, match="encoding='gif'"):
        write(frame, tmp_path / "s", encoding="gif")
    with pytest.raises(WorkbenchError, match="nothing to write"):
        write(frame[:0], tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_read_examples_knows_its_splits(written):
    with pytest.raises(WorkbenchError, match="split='trian' is not known: choose from train, val, test"):
        shards.read_examples(written, "trian", 1)


def test_radiographs_by_name_from_any_split(frame, written):
    names = frame["image"].sample(12, random_state=0).tolist()
    names.append(names[3])
    images = shards.read_radiographs(written, names)
    paths = frame.set_index("image")["path"][names]
    np.testing.assert_array_equal(images, [radiographs.read_radiograph(path) for path in paths])
    with pytest.raises(WorkbenchError, match=r"`nobody.png` is in none of the shards"):
        shards.read_radiographs(written, ["nobody.png"])


def test_a_mutated_info_is_read_as_it_is_or_refused_in_a_sentence(copy):
    """Each value of info.json replaced by one of another kind, and deleted."""
    info = json.loads((copy / "info.json").read_text())

    def places(value, path=()):
        yield path
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield from places(value[key], (*path, key))

    refused = 0
    for path in places(info):
        for other in (None, [], {}, "../../etc/passwd", -1, 2.5, True, [[]]):
            mutated = json.loads(json.dumps(info))
            inside = mutated
            for key in path[:-1]:
                inside = inside[key]
            if path:
                inside[path[-1]] = other
            else:
                mutated = other
            (copy / "info.json").write_text(json.dumps(mutated))
            try:
                found = shards.read_info(copy)
            except WorkbenchError as error:
                assert "info.json` " in str(error)  # noqa: PT017
                refused += 1
            else:
                assert all(
                    (copy / shard["file"]).parent == copy
                    for told in found["splits"].values()
                    for shard in told["shards"]
                )
    assert refused > 150


def test_a_table_that_is_none_is_refused_by_name(copy):
    for content in (b"", b"\xff\xfe\x00", b"row,image\n1,a\n", b"row,image\nx,a\n", b'"'):
        (copy / "images.csv").write_bytes(content)
        with pytest.raises(WorkbenchError, match=r"images.csv` (cannot be read|has no column)"):
            shards.read_images(copy)
        assert next(shards.find_faults(copy))[0].name == "images.csv"
    (copy / "images.csv").unlink()
    with pytest.raises(WorkbenchError, match=r"images.csv` is missing"):
        shards.read_images(copy)


def test_two_who_want_the_same_shards_at_the_same_time_write_them_once(dataset, tmp_path):
    script = (
        "import sys\n"
        "from workbench.data import chestxray14, shards\n"
        "frame = chestxray14.read_dataset(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "input()\n"
        "print(shards.write_shards(frame, sys.argv[2], image_size=36, processes=1, progress=False)['table_sha256'])\n"
    )
    command, streams = [sys.executable, "-c", script, dataset, tmp_path / "set"], {"text": True}
    streams |= dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    both = [subprocess.Popen(command, **streams) for _ in range(2)]
    assert [one.stdout.readline() for one in both] == ["ready\n"] * 2
    for one in both:
        one.stdin.write("go\n")
        one.stdin.flush()
    told = [one.communicate(timeout=60) for one in both]
    assert [one.returncode for one in both] == [0, 0], told
    hashes = [out.splitlines()[-1] for out, _ in told]
    assert hashes[0] == hashes[1]
    # Whether the second one had to wait depends on the machine; that both got the same, whole folder does not.
    shards.verify_shards(tmp_path / "set")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_is_told_and_what_is_finished_is_kept(frame, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", disk], check=True)
    try:
        with pytest.raises(WorkbenchError, match=r"cannot be written \(.*No space left on device"):
            write(frame, disk / "set")
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        write(frame, disk / "set")
        shards.verify_shards(disk / "set")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("0,0", "9,0", "line 2 another `row`"),
        (",train,", ",tray,", "a split or a shard that is not in info.json"),
        ("train-00000-of", "../train-00000-of", "a split or a shard that is not in info.json"),
        (",40,", ",old,", "an? age that is no number"),
        (".png,", ".png\xff,", "cannot be read"),
        ("\n1,", "\n1e30,", "cannot be read"),
    ],
)
def test_a_table_of_images_with_wrong_cells_is_named(copy, before, after, said):
    text = (copy / "images.csv").read_text()
    assert before in text
    (copy / "images.csv").write_text(text.replace(before, after, 1), encoding="latin-1")
    with pytest.raises(WorkbenchError, match=rf"images\.csv` .*{said}"):
        shards.read_images(copy)


@pytest.mark.parametrize("lost", ["image", "row", "pixels", "place"])
def test_records_that_lack_something_are_named(copy, lost):
    import tensorflow as tf

    path = copy / "val-00000-of-00001.tfrecord"
    records = [record.numpy() for record in tf.data.TFRecordDataset(str(path))]
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            example = tf.train.Example.FromString(record)
            if lost == "pixels":
                example.features.feature["image"].bytes_list.value[0] = b"too few"
            elif lost == "place":
                example.features.feature["row"].int64_list.value[0] = 10**9
            else:
                del example.features.feature[lost]
            writer.write(example.SerializeToString())
    with pytest.raises(
        WorkbenchError, match=r"cannot be read|holds an image that cannot be decoded|holds records that"
    ):
        shards.read_examples(copy, "val", 2)
    image = shards.read_images(copy).set_index("split").loc["val", "image"].iloc[0]
    with pytest.raises(WorkbenchError, match=r"is damaged in .*val-00000|val-00000.* holds an image that cannot"):
        shards.read_radiographs(copy, [image])
