"""Checks of whole folders: each bad file is named, good ones are not, and the exit status says which it was."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from odd_images import READ, REFUSED, write_odd_images

from workbench import WorkbenchError, cli
from workbench.data import chestxray14, shards, synthetic, verify


def lines_of(folder, **options):
    told = []
    found = verify.verify_folder(folder, tell=told.append, progress=False, **options)
    assert found["bad"] == sum(not line.startswith("remark: ") for line in told[:-1])
    assert found["remarks"] == sum(line.startswith("remark: ") for line in told[:-1])
    return told


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return synthetic.write_synthetic(
        tmp_path_factory.mktemp("raw") / "small", patients=12, image_size=32, seed=1, progress=False
    )


@pytest.fixture
def raw(small, tmp_path):
    return shutil.copytree(small, tmp_path / "raw")


@pytest.fixture
def stored(shard_folder, tmp_path):
    return shutil.copytree(shard_folder, tmp_path / "stored")


def test_whole_folders_are_well_and_the_command_says_so(raw, stored, capsys):
    images = len(chestxray14.read_table(raw))
    assert cli.main(["verify", str(raw)]) == 0
    assert capsys.readouterr().out == (f"{raw}: {images} images of {images} in the table checked, 0 bad; all is well\n")
    assert cli.main(["verify", str(stored)]) == 0
    assert capsys.readouterr().out.endswith(" images checked, 0 bad; all is well\n")


def test_the_command_names_each_bad_shard_and_ends_with_1(stored):
    before = contents(stored)
    files = sorted(stored.glob("train-*.tfrecord"))
    for path in files[:2]:
        content = bytearray(path.read_bytes())
        content[200] ^= 4
        path.write_bytes(content)
    files[2].unlink()
    (stored / "images.csv").write_bytes(before[stored / "images.csv"] + b"\n")
    before = contents(stored)
    command = [sys.executable, "-m", "workbench", "verify", str(stored)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    *told, summary = done.stdout.splitlines()
    assert [line.split("`")[1] for line in told] == [str(stored / "images.csv"), *map(str, files[:3])]
    for line in told[1:3]:
        assert "has changed since it was written; record 1 of " in line
    assert told[3].endswith(" is missing")
    assert summary.endswith(" images checked, 4 bad")
    assert "Traceback" not in done.stderr
    assert contents(stored) == before


def test_labels_that_differ_from_the_table_are_found_though_every_hash_is_right(stored):
    info = shards.read_info(stored)
    text = (stored / "images.csv").read_text().splitlines()
    text[3] = text[3][:-1] + ("0" if text[3][-1] == "1" else "1")  # the last finding of the third record
    (stored / "images.csv").write_text("\n".join(text) + "\n")
    info["table_sha256"] = shards._sha256(stored / "images.csv")
    (stored / "info.json").write_text(json.dumps(info))
    [line, _] = lines_of(stored)
    assert "record 3 of 16 (" in line
    assert "holds other labels than images.csv" in line


def test_half_written_shards_leftovers_and_a_broken_info(stored):
    (stored / ".train-00000-of-00009.1.part.tfrecord").touch()
    [line, summary] = lines_of(stored)
    assert line.startswith("remark: ")
    assert "can be removed" in line
    assert "all is well" in summary
    info = (stored / "info.json").read_bytes()
    (stored / "info.json").write_text("{")
    assert "info.json` cannot be read" in lines_of(stored)[0]
    (stored / "info.json").unlink()
    (stored / "plan.json").write_text("{}")
    assert "is half-written (plan.json, no info.json): run notebook 02" in lines_of(stored)[0]
    (stored / "info.json").write_bytes(info)
    assert [line[:7] for line in lines_of(stored)[:-1]] == ["remark:"] * 2


@pytest.mark.timeout(120)
@pytest.mark.parametrize("processes", [1, 2])
def test_each_bad_image_is_named_whatever_it_is(raw, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(shards, "IMAGES_PER_PROCESS", 1)  # so that two processes are used for few images
    write_odd_images(tmp_path / "odd")
    images = sorted((raw / "images").iterdir())
    moved, expected = {"gone.png": "is not on the disk", "loop.png": "does not exist"}, {}
    for image, name in zip(images, [*REFUSED, *READ], strict=False):
        image.unlink()
        if os.path.lexists(tmp_path / "odd" / name):
            shutil.move(tmp_path / "odd" / name, image)
        if name in REFUSED:
            expected[image.name] = moved.get(name, REFUSED[name])
    shutil.copy(images[-1], raw / "images" / "99999999_000.png")
    *told, summary = lines_of(raw, processes=processes)
    assert len(expected) == len(REFUSED)
    remarks = [line for line in told if line.startswith("remark: ")]
    assert len(remarks) == 1
    assert "1 images in" in remarks[0]
    bad = {line.split("`")[1].rsplit("/", 1)[-1]: line for line in told if line not in remarks}
    assert bad.keys() == expected.keys()
    for name, said in expected.items():
        assert re.search(said, bad[name])
    assert f"{len(REFUSED)} bad" in summary


def test_lists_boxes_and_table_are_checked(raw):
    table = chestxray14.read_table(raw)
    lists = {name: (raw / name).read_text() for name in ("train_val_list.txt", "test_list.txt")}
    first = lists["test_list.txt"].split()[0]
    (raw / "train_val_list.txt").write_text(lists["train_val_list.txt"] + first + "\nnobody.png\n")
    boxes = (raw / "BBox_List_2017.csv").read_text()
    (raw / "BBox_List_2017.csv").write_text(boxes + f"{first},Cough,1,2,3,4\nnobody.png,Mass,1,2,-3,4\n")
    told = lines_of(raw)
    text = "\n".join(told)
    assert "test_list.txt` has 1 images that are in train_val_list.txt too, such as `" + first in text
    assert "share 1 patients" in text
    assert "remark: `" in text
    assert "names 1 images that are not in the table, such as `nobody.png`" in text
    lines = len(boxes.splitlines())
    assert f"1 boxes have an image that the table does not have, the first in line {lines + 2}" in text
    assert f"1 boxes have a finding that is none of NIH's, the first in line {lines + 1}" in text
    assert f"1 boxes lie outside 1024 × 1024 pixels or are no numbers, the first in line {lines + 2}" in text

    (raw / "train_val_list.txt").write_text("")
    assert f"lack {table['image'].nunique() - len(lists['test_list.txt'].split())} images" in "\n".join(lines_of(raw))
    (raw / "test_list.txt").write_bytes(b"\xff\xfe\x00")
    (raw / "BBox_List_2017.csv").write_text("Image,Finding\na,b\n")
    bad = lines_of(raw)[:-1]
    assert any("test_list.txt` cannot be read" in line for line in bad)
    assert any("is not NIH's list of boxes" in line for line in bad)
    (raw / "test_list.txt").unlink()
    assert any(line.startswith("remark: ") and "no test_list.txt" in line for line in lines_of(raw))
    [path] = [raw / name for name in chestxray14.TABLES if (raw / name).exists()]
    path.write_text("Image Index\n1.png\n")
    assert "has no column" in lines_of(raw)[0]


def test_a_folder_of_neither_is_refused(tmp_path, capsys):
    with pytest.raises(WorkbenchError, match="holds neither shards"):
        verify.verify_folder(tmp_path)
    assert cli.main(["verify", str(tmp_path / "gone")]) == 1
    assert "is no folder" in capsys.readouterr().err


def test_of_many_absent_images_the_first_are_named_and_the_others_counted(raw, monkeypatch):
    monkeypatch.setattr(verify, "MOST_ABSENT", 2)
    images = sorted((raw / "images").iterdir())
    for path in images[-5:]:
        path.unlink()
    lines = [line for line in lines_of(raw) if "on the disk" in line or "not there either" in line]
    assert lines[:2] == [f"`{path.name}` of the table is not on the disk" for path in images[-5:-3]]
    assert lines[2].startswith(f"3 more images of the table, from `{images[-3].name}` to `{images[-1].name}`")
    assert len(lines) == 3


def test_what_a_file_holds_moves_no_cursor(raw):
    path = raw / "train_val_list.txt"
    path.write_text(path.read_text() + "\x1b[2Jghost.png\n")
    told = lines_of(raw)
    assert any("ghost.png" in line for line in told)
    assert all(line.isprintable() for line in told)
