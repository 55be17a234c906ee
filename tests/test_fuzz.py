"""Whatever stands in a file or a setting, reading it ends in success or in one sentence of ours.

Small valid files are broken by bytes (flipped, cut, spliced, encoded anew) and by fields (columns, values, records,
features). After each case: no other exception, no hang, no changed input, nothing half-written, and a sentence
that is one line and names the file or the setting. By default the cases are few and the same every time; the long mode
draws new ones and prints how many each reader had:

    FUZZ_CASES=200 python -m pytest tests/test_fuzz.py        # so many cases a reader; a fifth where one takes long
"""

import contextlib
import copy
import csv
import gzip
import io
import json
import os
import shutil
import signal
import tempfile
import time
import zipfile
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from workbench import WorkbenchError, batch, cli, provenance, report, rerun, runs
from workbench.analysis import calibration, comparison, evaluation, localisation, manifest, predictions
from workbench.data import chestxray14, damage, pipeline, radiographs, shards, synthetic, verify
from workbench.training.config import TrainConfig, better, decay_after

CASES = int(os.environ.get("FUZZ_CASES", "0"))
# The watchdog of a case is an alarm, so the test's own is a thread: it also ends a test that hangs outside Python.
pytestmark = [pytest.mark.timeout(7200 if CASES else 600, method="thread"), pytest.mark.filterwarnings("ignore")]
SECONDS = 60  # that one case may take, on a busy machine
LONGEST = 2100  # characters of a sentence
COUNTED: dict[str, dict[Path, bool]] = {}  # reader -> the folder of each case, and whether it was refused


def cases(quick: int, *, slow: bool = False):
    """So many cases in the quick mode; in the long mode as many as are asked for, or a fifth."""
    return settings(
        max_examples=(max(CASES // 5, 1) if slow else CASES) if CASES else quick,
        derandomize=not CASES,
        print_blob=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],  # the files are small as they are, and making them smaller takes minutes
        suppress_health_check=list(HealthCheck),
    )


# What is put in the place of a value.
# fmt: off
TEXTS = [
    "", " ", "nan", "inf", "-1", "0", "0.5", "1e400", "1e30", "-9223372036854775809", "9" * 30, "9" * 5000, "1_0", "٣",
    "ä€", "\u202e", "a\nb", "\r", "\t", "\0", "\x1b[31m", '"', "'", ",", "|", "x" * 20_000, "../../x", "None", "true",
]
ODD = [
    None, True, -1, 0, 0.5, 1e308, 10**30, 10**400, float("nan"), float("inf"), [], {}, [[]], {"a": {"b": [1]}}, [None],
    "", "nan", "2001-99-99", "1e400", "a\nb", "\0", "\x1b[31m", "\ud800", "ä€", "x" * 20_000, "../../x", [1, "a"],
    ["Edema"],
]
# Nine aliases of nine aliases of ...: a few hundred bytes that are 400 million values when they are written out.
BOMB = "[&a [x]" + "".join(f", &{b} [{','.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghij")) + "]"
YAML = [
    "*a", "&a [*a]", "{? [a] : b}", "{? {a: b} : c}", "!!python/object/apply:os.system [echo]", "!!binary x",
    "!!int ''", "!!float x", "2001-99-99", "2001-01-01", "0x" + "f" * 5000, "9" * 5000, "1:99:99", ".nan", ".inf",
    "-.inf", "~", "|\n  a\n  b", "%", "@", "`", "\t- a", "!!set {a, b}", "!!omap [a: 1]", "<<: {a: 1}", "[" * 3000, "'",
    "1e-3", "yes", "!!timestamp x", "{<<: [1]}", "{<<: x}",
    '"\\ud800"', '"\\0"', '"\\x1b[31m"', "[[Edema]]", "[Edema, 3]",
    "[.nan]", "- a\n- b", "!", "!!null x", "!!bool x", BOMB, BOMB,
]
TAGS = [
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel", "PixelRepresentation",
    "WindowCenter", "PhotometricInterpretation", "NumberOfFrames", "RescaleSlope", "RescaleIntercept",
    "WindowWidth", "PixelData", "VOILUTFunction", "WindowCenter",
]
TABLE_CHANGES = [
    "cell", "cell", "cell", "drop", "double", "rename", "swap", "row", "lost", "long", "short", "empty",
]
ODD_TAGS = [
    0, 1, 2, 3, 7, 8, 65535, "", "nan", "inf", "-1", "1e300", "0", "1\\2", "MONOCHROME1", "RGB", "SIGMOID", b"", None,
]
# fmt: on
DEEP = "[" * 100_000


def _place(draw, size: int) -> int:
    """A position, often near an end, where formats keep what matters."""
    near = draw(st.sampled_from(["start", "end", "any"]))
    if near == "any":
        return draw(st.integers(0, size))
    return min(draw(st.integers(0, 64)), size) if near == "start" else max(size - draw(st.integers(0, 64)), 0)


@st.composite
def broken_bytes(draw, original: bytes, other: bytes = b"") -> bytes:
    """One to four changes of single bytes or spans, or a piece of another file."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at, kind = (
            _place(draw, len(content)),
            draw(st.sampled_from(["flip", "flip", "set", "insert", "delete", "cut", "repeat", "splice"])),
        )
        length = draw(st.sampled_from([1, 2, 4, 16, 300]))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            content[at : at + length] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f", b"\x80"])) * length
        elif kind == "insert":
            content[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "delete":
            del content[at : at + length]
        elif kind == "cut":
            del content[at:]
        elif kind == "repeat":
            content[at:at] = content[at : at + length] * 2
        elif kind == "splice" and other:
            start = draw(st.integers(0, len(other)))
            content[at : at + length] = other[start : start + length]
    return bytes(content)


@st.composite
def encoded(draw, text: str) -> bytes:
    """A text as bytes: most often UTF-8, else as other programs write it."""
    how = draw(st.sampled_from(["utf-8"] * 5 + ["utf-8-sig", "utf-16", "latin-1", "crlf", "cr", "nul", "rest"]))
    if how == "crlf":
        return text.replace("\n", "\r\n").encode(errors="replace")
    if how == "cr":
        return text.replace("\n", "\r").encode(errors="replace")
    if how in ("nul", "rest"):
        return text.encode(errors="replace") + (b"\0" * 20 if how == "nul" else b"\n,}]\x80")
    return text.encode(how, errors="replace")


@st.composite
def broken_table(draw, original: bytes) -> bytes:
    """A CSV file with other columns, cells or rows."""
    rows = list(csv.reader(io.StringIO(original.decode())))
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(TABLE_CHANGES))
        width = min(map(len, rows), default=0)
        if not width:
            break
        at, line = draw(st.integers(0, width - 1)), draw(st.integers(0, len(rows) - 1))
        if kind == "cell":
            rows[line][at] = draw(st.sampled_from(TEXTS))
        elif kind == "drop":
            rows = [row[:at] + row[at + 1 :] for row in rows]
        elif kind == "double":
            rows = [[*row, row[at]] for row in rows]
        elif kind == "rename":
            rows[0][at] = draw(st.sampled_from([*TEXTS, *rows[0]]))
        elif kind == "swap":
            rows = [[*row[at:], *row[:at]] for row in rows]
        elif kind == "row":
            rows.insert(line, list(rows[draw(st.integers(0, len(rows) - 1))]))
        elif kind == "lost":
            del rows[line]
        elif kind == "long":
            rows[line] = rows[line] + [draw(st.sampled_from(TEXTS))] * draw(st.sampled_from([1, 40]))
        elif kind == "short":
            rows[line] = rows[line][:at]
        else:
            del rows[draw(st.integers(0, 1)) :]
    file = io.StringIO()
    with contextlib.suppress(csv.Error):
        quoting = draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE]))
        csv.writer(file, quoting=quoting, escapechar="\\", lineterminator="\n").writerows(rows)
    return draw(encoded(file.getvalue()))


def _paths(value, at=()):
    yield at
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _paths(inner, (*at, key))


@st.composite
def broken_tree(draw, original):
    """A nested value of which some parts are gone, renamed, replaced, wrapped or exchanged."""
    tree = [copy.deepcopy(original)]
    for _ in range(draw(st.integers(1, 3))):
        # The upper levels are few among all paths, and decide most.
        paths = [path for path in _paths(tree) if path]
        depth = draw(st.integers(1, max(map(len, paths))))
        *above, key = draw(st.sampled_from([path for path in paths if len(path) == depth]))
        parent = tree
        for step in above:
            parent = parent[step]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename", "wrap", "borrow"]))
        if kind == "replace":
            parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif kind == "drop" and len(above):
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[str(draw(st.sampled_from(TEXTS)))] = parent.pop(key)
        elif kind == "wrap":
            parent[key] = [parent[key]]
        elif kind == "borrow":
            lender = tree
            for step in draw(st.sampled_from(paths)):
                lender = lender[step]
            parent[key] = copy.deepcopy(lender)
    return tree[0] if tree else None


@st.composite
def broken_json(draw, original: bytes) -> bytes:
    """JSON with other fields, with other bytes, or nested without end."""
    kind = draw(st.sampled_from(["fields", "fields", "fields", "fields", "bytes", "deep"]))
    if kind == "deep":
        return draw(
            st.sampled_from([DEEP, '{"a":' * 100_000, "", "null", "[]", "3", '"x"', "NaN", "9" * 5000])
        ).encode()
    if kind == "bytes":
        return draw(broken_bytes(original, b'}{][":,0123456789eNaN\\u0000'))
    with contextlib.suppress(ValueError):  # whole numbers of too many digits are not written
        return draw(encoded(json.dumps(draw(broken_tree(json.loads(original))))))
    return b"{}"


@st.composite
def broken_archive(draw, original: bytes, fields: str = "") -> bytes:
    """A zip file broken by bytes, or with members lost, exchanged or broken; `fields`: a JSON member."""
    kind = draw(st.sampled_from(["bytes", "lost", "swapped", "member", "member", "fields" if fields else "member"]))
    if kind == "bytes":
        return draw(broken_bytes(original, original))
    with zipfile.ZipFile(io.BytesIO(original)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name, other = draw(st.sampled_from(sorted(members))), draw(st.sampled_from(sorted(members)))
    if kind == "lost":
        del members[name]
    elif kind == "swapped":
        members[name], members[other] = members[other], members[name]
    elif kind == "member":
        members[name] = draw(broken_bytes(members[name], members[other]))
    else:
        members[fields] = draw(broken_json(members[fields]))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as file:
        for member, content in members.items():
            file.writestr(member, content)
    return target.getvalue()


class _HungError(BaseException):
    """Not an Exception, so that no reader takes it for an error of its file."""


@contextlib.contextmanager
def _bounded():
    def ring(*_):
        raise _HungError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def ends_well(reader: str, folder: Path, read, *, named, may_write: bool = False):
    """Call `read` and hold it to the promise; returns what it returned, or None after a sentence.

    Args:
        reader: under which name the case is counted.
        folder: whose files may not change.
        read: the reader, without arguments.
        named: texts of which a sentence has to hold one.
        may_write: the reader writes files of its own: then only what was there is compared.
    """
    before, said, began = _contents(folder), None, time.monotonic()
    counted = COUNTED.setdefault(reader, {})
    counted.setdefault(folder, False)
    try:
        with _bounded():
            answer = read()
    except WorkbenchError as error:
        said = str(error)
    except _HungError:
        pytest.fail(f"no end after {SECONDS} s")
    assert time.monotonic() - began < SECONDS
    after = _contents(folder)
    assert {path: after.get(path) for path in before} == before, "an input was changed"
    assert may_write or after.keys() == before.keys(), "something was left behind"
    assert not [path for path in after if ".part" in path.name], "something half-written was left behind"
    if said is None:
        return answer
    assert said.strip()
    assert said.isprintable(), "not one line"
    assert len(said) <= LONGEST, "too long for a sentence"
    assert said.rstrip().endswith((".", ")", "?")), said
    assert any(name in said for name in named), said
    counted[folder] = True
    return None


@pytest.fixture(scope="module", autouse=True)
def _told(request):
    """Say at the end of the long mode how many cases every reader had."""
    yield
    if CASES:
        lines = [f"{len(seen):6,} {name} ({sum(seen.values()):,} refused)" for name, seen in sorted(COUNTED.items())]
        total = len({folder for seen in COUNTED.values() for folder in seen})
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("", *lines, f"{total:6,} cases in all", sep="\n")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A function that gives a case a folder of its own, filled with files (name -> bytes), and removes it."""
    base = tmp_path_factory.mktemp("cases")

    @contextlib.contextmanager
    def filled(files):
        folder = Path(tempfile.mkdtemp(dir=base))
        try:
            for name, content in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
            yield folder
        finally:
            shutil.rmtree(folder)

    return filled


class _Files(dict):
    """Name -> bytes; short where a failure shows it."""

    def __repr__(self):
        return f"<{len(self)} files>"


def _files(folder: Path) -> dict[str, bytes]:
    return _Files({str(path.relative_to(folder)): content for path, content in _contents(folder).items()})


# What is read before training: tables, lists, boxes, image files.


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A made-up data set's own files, and where its images lie."""
    folder = tmp_path_factory.mktemp("raw") / "made-up"
    synthetic.write_synthetic(folder, patients=10, image_size=32, seed=1, progress=False)
    files = _Files({name: content for name, content in _files(folder).items() if not name.startswith("images/")})
    return files, folder / "images"


def _sound_frame(frame):
    assert {"image", "patient", "age", "split"} <= set(frame.columns)
    assert frame["image"].is_unique
    assert frame["age"].between(0, 10**6).all()
    assert (frame["patient"].abs() < 2**53).all()


@cases(25)
@given(data=st.data())
def test_a_broken_table_is_told_in_a_sentence(raw, place, data):
    files, images = dict(raw[0]), raw[1]
    table = files.pop("Data_Entry_2017_v2020.csv")
    name = data.draw(st.sampled_from(chestxray14.TABLES))
    if not name.startswith("Data_Entry_2017_v2020"):  # the first release wrote ages with a unit
        rows = list(csv.reader(io.StringIO(table.decode())))
        at = rows[0].index("Patient Age")
        text = "\n".join(",".join([*row[:at], f"{int(row[at]):03d}Y", *row[at + 1 :]]) for row in rows[1:])
        table = (",".join(rows[0]) + "\n" + text + "\n").encode()
    zipped = name.endswith(".gz") and data.draw(st.booleans())
    table = gzip.compress(table, mtime=0) if zipped else table
    table = data.draw(broken_bytes(table, table) if zipped else st.one_of(broken_table(table), broken_bytes(table)))
    files[name] = gzip.compress(table, mtime=0) if name.endswith(".gz") and not zipped else table
    split = data.draw(st.sampled_from(["official", "random"]))
    with place(files) as folder:
        frame = ends_well(
            "NIH's table",
            folder,
            lambda: chestxray14.read_dataset(folder, images_folder=images, split=split, missing="skip"),
            named=[name, "on the disk", "stand in", "are in neither"],
        )
        if frame is not None:
            _sound_frame(frame)
            ends_well("NIH's table", folder, lambda: chestxray14.split_table(frame), named=[])
        _verified("NIH's table", folder)


@cases(40)
@given(data=st.data())
def test_a_broken_table_of_one_s_own_is_told_in_a_sentence(raw, place, data):
    own = b"image,patient,age,sex,view,split,Edema,Mass\n" + b"".join(
        f"{path.name},P{number // 3},{40 + number},F,PA,{side},{number % 2},0\n".encode()
        for number, (path, side) in enumerate(zip(sorted(raw[1].iterdir()), ["train", "val", "test"] * 3, strict=False))
    )
    own = data.draw(st.one_of(broken_table(own), broken_bytes(own)))
    split = data.draw(st.sampled_from(["table", "random"]))
    with place({"ours.csv": own}) as folder:
        frame = ends_well(
            "a table of one's own",
            folder,
            lambda: chestxray14.read_dataset(
                folder, table="ours.csv", images_folder=raw[1], split=split, missing="skip", test_fraction=0.4
            ),
            named=["ours.csv", "on the disk", "stand in", "leave none"],
        )
        if frame is not None:
            _sound_frame(frame.assign(age=frame["age"].fillna(0)))
            assert frame[chestxray14.findings_of(frame)].isin([0, 1]).all(axis=None)


@cases(20)
@given(data=st.data())
def test_a_broken_list_is_told_in_a_sentence(raw, place, data):
    files, images = dict(raw[0]), raw[1]
    official = data.draw(st.booleans())
    if not official:
        names = files["train_val_list.txt"].splitlines()
        files["mine-train.txt"] = b"\n".join(names[4:])
        files["mine-val.txt"] = b""
    name = data.draw(st.sampled_from(["train_val_list.txt" if official else "mine-train.txt", "test_list.txt"]))
    lines = files[name].decode().splitlines()
    for _ in range(data.draw(st.integers(0, 2))):
        lines.insert(data.draw(st.integers(0, len(lines))), data.draw(st.sampled_from([*TEXTS, *lines])))
    text = data.draw(encoded("\n".join(lines)))
    files[name] = data.draw(st.one_of(st.just(text), broken_bytes(text, files["test_list.txt"])))
    chosen = {"split": "official"}
    if not official:
        chosen = {
            "split": "lists",
            "val_list": "mine-val.txt",
            "train_list": "mine-train.txt",
            "test_list": "test_list.txt",
        }
    with place(files) as folder:
        frame = ends_well(
            "train, test and users' lists",
            folder,
            lambda: chestxray14.read_dataset(folder, images_folder=images, missing="skip", **chosen),
            named=[name, "mine-", "_list", "on the disk", "stand in"],
        )
        if frame is not None:
            _sound_frame(frame)


@cases(15)
@given(data=st.data())
def test_a_broken_list_of_boxes_is_told_in_a_sentence(raw, place, data):
    boxes = raw[0]["BBox_List_2017.csv"]
    boxes = data.draw(st.one_of(broken_table(boxes), broken_bytes(boxes, boxes)))
    with place({"BBox_List_2017.csv": boxes}) as folder:
        table = ends_well("boxes", folder, lambda: chestxray14.read_boxes(folder), named=["BBox_List_2017.csv"])
        if table is not None:
            assert list(table.columns) == ["image", "finding", "x", "y", "width", "height"]
            assert np.isfinite(table[["x", "y", "width", "height"]].to_numpy(float)).all()


@cases(10)
@given(data=st.data())
def test_a_broken_mark_of_a_made_up_data_set_is_told_in_a_sentence(raw, place, data):
    mark = data.draw(broken_json(raw[0]["synthetic.json"]))
    with place({"made-up/synthetic.json": mark, "made-up/other.txt": b"precious"}) as folder:
        ends_well(
            "synthetic.json",
            folder,
            lambda: synthetic.write_synthetic(folder / "made-up", patients=10, image_size=32, seed=1, progress=False),
            named=["made-up"],
        )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The same picture as files of several kinds: suffix -> bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20), np.uint8)
    image = Image.fromarray(pixels)
    found = _Files()
    for name, kind, how in (
        ("grey.png", image, {}),
        ("rgba.png", image.convert("RGBA"), {}),
        ("palette.png", image.convert("P"), {}),
        ("deep.png", Image.fromarray(pixels.astype(np.uint16) * 256), {}),
        ("grey.jpg", image, {"quality": 90}),
        ("progressive.jpg", image.convert("RGB"), {"progressive": True}),
        ("print.jpg", image.convert("CMYK"), {}),
        ("one.png", image.resize((1, 1)), {}),
    ):
        file = io.BytesIO()
        kind.save(file, "png" if name.endswith("png") else "jpeg", **how)
        found[name] = file.getvalue()
    found["chest.dcm"] = _dicom_bytes(_dicom(pixels))
    return found


def _dicom(pixels: np.ndarray) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.DigitalXRayImageStorageForPresentation, "1.2.3.4"
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.SamplesPerPixel, dataset.PixelRepresentation = 15, 1, 0
    dataset.PhotometricInterpretation, dataset.NumberOfFrames = "MONOCHROME2", 1
    dataset.RescaleSlope, dataset.RescaleIntercept = "1", "0"
    dataset.WindowCenter, dataset.WindowWidth = "30000", "40000"
    dataset.PixelData = (pixels.astype(np.uint16) * 256).tobytes()
    return dataset


def _dicom_bytes(dataset: pydicom.Dataset) -> bytes:
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


@st.composite
def broken_dicom(draw, original: bytes) -> bytes:
    """A DICOM file with other attributes, or without some."""
    dataset = pydicom.dcmread(io.BytesIO(original))
    for _ in range(draw(st.integers(1, 3))):
        tag, value = draw(st.sampled_from(TAGS)), draw(st.sampled_from(ODD_TAGS))
        before = copy.deepcopy(dataset)
        try:
            if value is None and tag in dataset:
                delattr(dataset, tag)
            elif value is not None:
                setattr(dataset, tag, value)
            _dicom_bytes(dataset)
        except Exception:  # pydicom refuses to write it
            dataset = before
    return _dicom_bytes(dataset)


@cases(60)
@given(data=st.data())
def test_a_broken_image_file_is_told_in_a_sentence(pictures, place, data):
    name = data.draw(st.sampled_from(sorted(pictures)))
    content = pictures[name]
    other = pictures[data.draw(st.sampled_from(sorted(pictures)))]
    if name.endswith("dcm") and data.draw(st.booleans()):
        content = data.draw(broken_dicom(content))
    elif name.endswith("png") and data.draw(st.booleans()):
        content = data.draw(broken_chunks(content))
    else:
        content = data.draw(broken_bytes(content, other))
    suffix = data.draw(st.sampled_from([Path(name).suffix, ".png", ".dcm", ".jpg"]))
    name = Path(name).stem + suffix
    with place({name: content}) as folder:
        pixels = ends_well(
            "image files", folder, lambda: radiographs.read_radiograph(folder / name), named=[str(folder / name)]
        )
        if pixels is not None:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 2
            assert pixels.size
            assert radiographs.resize_radiograph(pixels, 16).shape == (16, 16)
        ends_well("image files", folder, lambda: radiographs.refuse_colour(folder / name), named=[str(folder / name)])


@st.composite
def broken_chunks(draw, original: bytes) -> bytes:
    """A PNG whose chunks are lost, doubled or changed, with checksums that are right."""
    import struct
    import zlib

    chunks, at = [], 8
    while at < len(original):
        (length,) = struct.unpack(">I", original[at : at + 4])
        chunks.append((original[at + 4 : at + 8], original[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(draw(st.integers(1, 2))):
        number = draw(st.integers(0, len(chunks) - 1))
        kind, content = chunks[number]
        what = draw(st.sampled_from(["lost", "doubled", "changed", "changed", "sizes", "named"]))
        if what == "lost" and len(chunks) > 1:
            del chunks[number]
        elif what == "doubled":
            chunks.insert(number, chunks[number])
        elif what == "changed":
            chunks[number] = (kind, draw(broken_bytes(content, original)))
        elif what == "sizes" and chunks[0][0] == b"IHDR":
            sides = [draw(st.sampled_from([0, 1, 21, 5000, 2**31 - 1, 2**32 - 1])) for _ in range(2)]
            form = bytes(draw(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16])) for _ in range(2))
            chunks[0] = (b"IHDR", struct.pack(">II", *sides) + form + chunks[0][1][10:])
        else:
            chunks[number] = (
                draw(st.sampled_from([b"IDAT", b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"gAMA", b"acTL"])),
                content,
            )
    body = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return original[:8] + body


# Recipes, settings and names.


@pytest.fixture(scope="module")
def parameters():
    """The names and values of all notebooks' parameters."""
    return {
        name: value for stage in batch.known_parameters(runs.project_root()).values() for name, value in stage.items()
    }


@st.composite
def recipe_text(draw, parameters: dict) -> str:
    """A recipe of a few lines over the parameters, some of which hold what they should not."""
    lines = []
    for _ in range(draw(st.integers(0, 5))):
        name = draw(st.sampled_from([*sorted(parameters), "epoch", "", "a b", "*x", "? [a]"]))
        kind = draw(st.sampled_from(["own", "own", "odd", "yaml", "text"]))
        if kind == "own":
            value = json.dumps(parameters.get(name, 3))
        elif kind == "odd":
            value = json.dumps(draw(st.sampled_from(ODD)))
        else:
            value = draw(st.sampled_from(YAML if kind == "yaml" else TEXTS))
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


def _checked(root: Path, chosen: dict, where: str) -> None:
    """All that is done with parameters before the first notebook runs."""
    parameters = batch.check_parameters(runs.project_root(), chosen, where=where)
    folder = runs.create_run(root, "mine", recipe=where, parameters=parameters)
    # As a reader of the record sees them, and as papermill writes them into notebooks.
    assert runs.read_run(folder)["parameters"].keys() == parameters.keys()
    repr(parameters).encode()
    shutil.rmtree(root / "results")


@cases(60)
@given(data=st.data())
def test_a_broken_recipe_is_told_in_a_sentence(parameters, place, data):
    text = data.draw(recipe_text(parameters))
    content = data.draw(st.one_of(encoded(text), broken_bytes(text.encode(errors="replace"), b"\t:-{}[]*&!|>%@`\n")))
    with place({"mine.yml": content}) as folder:

        def read():
            label, chosen = batch.read_recipe(runs.project_root(), str(folder / "mine.yml"))
            _checked(folder, chosen, label)

        ends_well("recipes", folder, read, named=["mine", *parameters])


@cases(40)
@given(data=st.data())
def test_a_broken_setting_is_told_in_a_sentence(parameters, place, data):
    name = data.draw(st.sampled_from([*sorted(parameters), "epoch", "", " "]))
    value = data.draw(st.one_of(st.sampled_from(YAML), st.sampled_from(TEXTS), st.text(max_size=20)))
    setting = name + data.draw(st.sampled_from(["=", "=", "=", "", "==", " = "])) + value
    with place({}) as folder:
        ends_well(
            "--set",
            folder,
            lambda: _checked(folder, batch.parse_settings([setting]), "--set"),
            named=["--set", *parameters],
        )


@cases(20)
@given(data=st.data())
def test_a_name_that_is_none_is_told_in_a_sentence(place, data):
    name = data.draw(st.one_of(st.sampled_from([*TEXTS, "..", "first", "a/../first"]), st.text(max_size=20)))
    with place({}) as root:
        runs.create_run(root, "first")
        (root / "notebooks").mkdir()
        said = [name[:20].strip(), "run", "recipe", "stage", "No"]
        ends_well("names", root, lambda: runs.find_run(root, name), named=said)
        ends_well("names", root, lambda: batch.read_recipe(root, name), named=said)
        ends_well("names", root, lambda: batch.read_recipe(root, f"{name}.yml"), named=said)
        ends_well("names", root, lambda: batch._from(name), named=said)
        ends_well("names", root, lambda: radiographs.read_radiograph(root / name), named=["/"])
        ends_well("names", root, lambda: predictions.find_files([str(root / name)]), named=["folder"])
        ends_well("names", root, lambda: runs.open_run(root, name, resume=True), named=said)
        made = ends_well("names", root, lambda: runs.open_run(root, name), named=said, may_write=True)
        assert made is None or made.parent == root / "results"


# Shards.


@pytest.fixture(scope="module")
def stored(raw, tmp_path_factory):
    """The files of small shards, raw and PNG: encoding -> {name: bytes}."""
    base, found = tmp_path_factory.mktemp("stored"), _Files()
    frame = chestxray14.read_dataset(raw[1].parent, validation_fraction=0.25)
    for encoding in ("raw", "png"):
        shards.write_shards(
            frame, base / encoding, image_size=24, encoding=encoding, images_per_shard=16, processes=1, progress=False
        )
        found[encoding] = _files(base / encoding)
    return found


def _as_written(files: dict, name: str, content: bytes) -> None:
    """Put a file in and let info.json say that this is what was written, as a careless tool would."""
    import hashlib

    files[name] = content
    info = json.loads(files["info.json"])
    told = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if name == "images.csv":
        info["table_sha256"] = told["sha256"]
    for split in info["splits"].values():
        for shard in split["shards"]:
            if shard["file"] == name:
                shard |= told
    files["info.json"] = json.dumps(info).encode()


@st.composite
def broken_records(draw, folder: Path, content: bytes) -> bytes:
    """A shard whose records are lost, doubled or hold other features, with checksums that are right."""
    import tensorflow as tf

    path = folder / "records"
    path.write_bytes(content)
    records = [tf.train.Example.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(path))]
    record = records[draw(st.integers(0, len(records) - 1))]
    name = draw(st.sampled_from(["image", "labels", "row"]))
    kind = draw(st.sampled_from(["lost", "doubled", "feature", "number", "text", "short", "text"]))
    feature = record.features.feature
    if kind == "lost":
        records.remove(record)
    elif kind == "doubled":
        records.append(record)
    elif kind == "feature":
        del feature[name]
    elif kind == "number":
        feature[name].CopyFrom(
            tf.train.Feature(int64_list=tf.train.Int64List(value=[draw(st.sampled_from([-1, 2**40]))]))
        )
    elif kind == "short":
        feature[name].CopyFrom(tf.train.Feature())
    else:
        value = draw(st.sampled_from([b"", b"\0", b"\2" * 14, b"x" * 600, feature["image"].bytes_list.value[0][:100]]))
        feature[name].CopyFrom(tf.train.Feature(bytes_list=tf.train.BytesList(value=[value])))
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record.SerializeToString())
    try:
        return path.read_bytes()
    finally:
        path.unlink()


@st.composite
def broken_shards(draw, stored: dict, place) -> tuple[str, dict]:
    """A folder of shards, a file of which is broken; half of the time info.json holds the hash of the broken one."""
    files = dict(stored[draw(st.sampled_from(sorted(stored)))])
    broken = [name for name in files if name.endswith("tfrecord")]
    name = draw(st.sampled_from(["info.json", "info.json", "images.csv", "images.csv", *broken]))
    content, signed = files[name], draw(st.booleans())
    if name == "info.json":
        changed, signed = draw(broken_json(content)), False
    elif name == "images.csv":
        changed = draw(st.one_of(broken_table(content), broken_bytes(content, content)))
    elif signed and draw(st.booleans()):
        with place({}) as folder:
            changed = draw(broken_records(folder, content))
    else:
        changed = draw(broken_bytes(content, content))
    files[name] = changed
    if signed:
        _as_written(files, name, changed)
    return name if name in ("info.json", "images.csv") else "shard files", files


@cases(14, slow=True)
@given(data=st.data())
def test_broken_shards_are_told_in_a_sentence(stored, place, data):
    name, files = data.draw(broken_shards(stored, place))
    with place(files) as folder:
        said = [str(folder)]
        info = ends_well(name, folder, lambda: shards.read_info(folder), named=said)
        table = ends_well(name, folder, lambda: shards.read_images(folder), named=said)
        ends_well(name, folder, lambda: shards.verify_shards(folder), named=said)
        split = data.draw(st.sampled_from(chestxray14.SPLITS))
        seen = ends_well(name, folder, lambda: shards.read_examples(folder, split, 3), named=said)
        if info and seen:
            assert seen[0].shape[1:] == (info["image_size"], info["image_size"])
        if info and table is not None and len(table):
            ends_well(name, folder, lambda: shards.check_sizes(folder, info), named=said)
            some = list(table["image"][:2])
            ends_well(name, folder, lambda: shards.read_radiographs(folder, some), named=said)
            splits = ends_well(
                name, folder, lambda: manifest.split_manifest(table, info["findings"], kind="official"), named=["split"]
            )
            if splits:
                manifest.manifest_table(splits)
        _verified(name, folder)


def _verified(name: str, folder: Path) -> None:
    """`workbench verify` tells every line whole, and never stops at one."""
    lines = []
    ends_well(
        name, folder, lambda: verify.verify_folder(folder, tell=lines.append, progress=False), named=[str(folder)]
    )
    assert all(line.isprintable() and len(line) <= LONGEST for line in lines), lines


@cases(8, slow=True)
@given(data=st.data())
def test_training_on_broken_shards_ends_in_batches_or_a_sentence(stored, place, data):
    name, files = data.draw(broken_shards(stored, place))
    with place(files) as folder, place({}) as room:
        split, skip = data.draw(st.sampled_from(chestxray14.SPLITS)), data.draw(st.booleans())

        def read():
            source, size = folder, min(shards.read_info(folder)["image_size"], 24)
            if skip:
                found = [record for _, records in damage.scan_shards(folder) for record in records]
                source = room / "shards"
                damage.write_without(folder, found, source)
            if split == "train":
                batches = pipeline.build_training(source, image_size=size, batch_size=2, seed=0, epoch=0, threads=1)
            else:
                batches = pipeline.build_evaluation(source, split, image_size=size, batch_size=2, threads=1)
            for images, labels, *_ in damage.each_batch(batches, source, split):
                assert images.shape[1:] == (size, size, 1)
                assert len(labels) == len(images)

        ends_well(f"{name}, in training", folder, read, named=[str(folder), str(room), "training images"])


@cases(15)
@given(data=st.data())
def test_shards_are_not_written_over_a_broken_folder(raw, stored, place, data):
    frame = chestxray14.read_dataset(raw[1].parent, validation_fraction=0.25).head(4)
    files = dict(stored["raw"])
    if data.draw(st.booleans()):
        files["info.json"] = data.draw(broken_json(files["info.json"]))
    else:
        del files["info.json"]
        files["plan.json"] = data.draw(broken_json(b'{"plan_sha256": "abc"}'))
    with place(files) as folder:
        ends_well(
            "shards to be written again",
            folder,
            lambda: shards.write_shards(frame, folder, image_size=24, processes=1, progress=False),
            named=[str(folder)],
        )


# What a run leaves.


FINDINGS = ["Edema", "Mass"]


@pytest.fixture(scope="module")
def left(parameters, tmp_path_factory):
    """The files of a finished run, with all that later readers look at."""
    root = tmp_path_factory.mktemp("left")
    folder = runs.create_run(root, "first", recipe="synthetic", parameters=parameters)
    stages = {stage: {"status": "finished", "seconds": 3.5} for stage in batch.STAGES}
    runs.update_run(folder, status="finished", ended=runs.now(), stages=stages, world_size=2)
    runs.update_run(folder, images_per_second=10.5, best_epoch=2, scaling=[{"workers": 1, "efficiency": 1.0}])
    rng = np.random.default_rng(0)
    labels = pd.DataFrame(rng.integers(0, 2, (30, 2)), columns=FINDINGS)
    scores = pd.DataFrame(rng.random((30, 2)), columns=FINDINGS)
    images = pd.DataFrame({"image": [f"{row:08d}_000.png" for row in range(30)], "patient": np.arange(30) // 2})
    for split in ("val", "test"):
        table = pd.concat([images, labels, scores.add_suffix("_score")], axis=1)
        table.to_csv(folder / f"predictions-{split}.csv", index=False)
    calibration.write_calibration(folder / "calibration.json", calibration.fit_calibration(labels, scores))
    test = {"mean_auroc": 0.8, "ci_low": 0.7, "ci_high": 0.9, "findings": 2, "undefined": ["Hernia"]}
    test["per_finding"] = {name: {"auroc": 0.8, "threshold": 0.5} for name in FINDINGS}
    runs.write_json(folder / "metrics.json", {"test": test, "val": test, "split": {"split": "official"}, "seed": 0})
    pd.DataFrame({"epoch": [1, 2], "val_loss": [0.5, 0.4], "best": [1, 1]}).to_csv(folder / "history.csv", index=False)
    told = manifest.split_manifest(images.assign(split="test", **labels), FINDINGS, kind="official")
    runs.write_json(folder / "split.json", told)
    new = nbformat.v4
    tags = ("parameters", "injected-parameters")
    cells = [new.new_markdown_cell("# 1 · Title")]
    cells += [new.new_code_cell("epochs = 6", metadata={"tags": [tag]}) for tag in tags]
    cells += [new.new_code_cell("b", outputs=[new.new_output("stream", text="five < six\n")])]
    for stage in ("01_a", "03_train"):
        nbformat.write(new.new_notebook(cells=cells), folder / "notebooks" / f"{stage}.ipynb")
    maps = {"maps": rng.random((2, 4, 4), np.float32), "images": np.array(["a", "b"]), "findings": np.array(FINDINGS)}
    maps |= {"scores": np.array([0.1, 0.2]), "image_size": np.array(32), "stored_size": np.array(36)}
    np.savez(folder / "heatmaps.npz", **maps, rectified=np.array(False))
    return _files(folder)


def _in_run(files: dict, place):
    return place({f"results/first/{name}": content for name, content in files.items()})


@cases(30)
@given(data=st.data())
def test_a_broken_run_is_told_in_a_sentence(left, place, data):
    files = dict(left)
    name = data.draw(st.sampled_from(["run.json", "run.json", "metrics.json", "split.json", "history.csv"]))
    if name == "history.csv":
        files[name] = data.draw(broken_table(files[name]))
    else:
        files[name] = data.draw(broken_json(files[name]))
    with _in_run(files, place) as root:
        folder = root / "results" / "first"
        said = [str(folder / name), "`first`"]
        record = ends_well(name, root, lambda: runs.read_run(folder), named=said)
        # A broken record hides no other run, so it is passed over here.
        ends_well(name, root, lambda: runs.find_run(root), named=[*said, "No run under"])
        ends_well(name, root, lambda: runs.read_metrics(folder), named=said)
        ends_well(name, root, lambda: cli._summarise(folder), named=said)
        table = ends_well(name, root, lambda: runs.list_runs(root), named=[])
        assert list(table["run"]) == ["first"]
        with pytest.raises(WorkbenchError, match=r"has been trained already"):
            runs.open_run(root, "first")
        ends_well(name, root, lambda: report.write_overview(root), named=[], may_write=True)
        if record is not None:
            runs.minutes(record)
            # `workbench run --resume` checks the record's parameters as it would a recipe's.
            ends_well(
                name,
                root,
                lambda: batch.check_parameters(runs.project_root(), record["parameters"], where="the run first"),
                named=["the run first", "`"],
            )
            # And notebooks 04 and 05 make a configuration of them.
            ends_well(name, root, lambda: TrainConfig.from_parameters(record["parameters"], root), named=["`"])
            before = (folder / "run.json").read_bytes()
            runs.update_run(folder, status="running", stages={"03_train": {"status": "failed", "seconds": 0.1}})
            runs.write_json(folder / "run.json", json.loads(before))


@cases(10)
@given(data=st.data())
def test_a_broken_run_is_repeated_or_compared_or_told(left, place, data):
    """What `workbench rerun` reads of a run: its record, its notebooks, and its results beside those of another."""
    files = dict(left)
    names = ["run.json", "metrics.json", "history.csv", "predictions-test.csv", "notebooks/03_train.ipynb"]
    name = data.draw(st.sampled_from(names))
    files[name] = data.draw(broken_table(files[name]) if name.endswith("csv") else broken_json(files[name]))
    whole = {f"results/second/{name}": content for name, content in left.items()}
    with place(whole | {f"results/first/{name}": content for name, content in files.items()}) as root:
        first, second = root / "results" / "first", root / "results" / "second"
        result = ends_well(name, root, lambda: provenance.compare_results(first, second), named=[])
        assert isinstance(result["same"], bool)
        json.dumps(result, allow_nan=False)  # it becomes part of a record
        said = [str(first), "the run first", "The shards", "The run had", "The weights"]
        plan = ends_well(name, root, lambda: rerun.plan_rerun(runs.project_root(), str(first)), named=said)
        if plan:
            ends_well(name, root, lambda: rerun.tell(plan), named=[])


@cases(10)
@given(data=st.data())
def test_a_broken_list_of_skipped_images_is_told_in_a_sentence(left, place, data):
    files = dict(left)
    table = b"shard,record,split,image,damage\ntrain-00000-of-00001.tfrecord,3,train,a.png,fails its checksum\n"
    files["skipped.csv"] = data.draw(st.one_of(broken_table(table), broken_bytes(table)))
    with _in_run(files, place) as root:
        folder = root / "results" / "first"
        said = [str(folder / "skipped.csv")]
        names = ends_well("skipped.csv", root, lambda: runs.skipped_images(folder), named=said)
        assert names is None or all(isinstance(name, str) for name in names)


@cases(6, slow=True)
@given(data=st.data())
def test_a_report_over_broken_files_ends_in_a_page_or_a_sentence(left, place, data):
    files = dict(left)
    name = data.draw(st.sampled_from(["run.json", "metrics.json", "notebooks/01_a.ipynb", "notebooks/01_a.ipynb"]))
    files[name] = data.draw(broken_json(files[name]))
    with _in_run(files, place) as root:
        folder = root / "results" / "first"
        ends_well("report", root, lambda: report.write_report(folder), named=[str(folder / name)], may_write=True)
        page = folder / "report.html"
        assert not page.exists() or page.read_text().endswith("</html>")


@cases(40)
@given(data=st.data())
def test_broken_predictions_are_told_in_a_sentence(left, place, data):
    files = dict(left)
    name = data.draw(st.sampled_from(["predictions-test.csv", "predictions-val.csv"]))
    files[name] = data.draw(st.one_of(broken_table(files[name]), broken_bytes(files[name], files[name])))
    with _in_run(files, place) as root:
        path = root / "results" / "first" / name
        read = ends_well("predictions-*.csv", root, lambda: evaluation.read_predictions(path), named=[str(path)])
        if read:
            # What was taken for predictions can be evaluated and compared.
            assert read[1].to_numpy().min() >= 0
            assert read[1].to_numpy().max() <= 1
            evaluation.auroc_table(*read[:2], read[3], resamples=5)
            other = evaluation.read_predictions(path.with_name("predictions-val.csv"))
            same = "The predictions"
            ends_well(
                "predictions-*.csv",
                root,
                lambda: comparison.compare_predictions(other, read, resamples=5),
                named=[same],
            )


@cases(40)
@given(data=st.data())
def test_a_broken_calibration_or_threshold_is_told_in_a_sentence(left, place, data):
    files = dict(left)
    name = data.draw(st.sampled_from(["calibration.json", "metrics.json"]))
    files[name] = data.draw(broken_json(files[name]))
    scores = pd.DataFrame([[0.0, 1.0], [0.3, 0.6]], index=["a.png", "b.png"], columns=FINDINGS)
    with _in_run(files, place) as root:
        folder = root / "results" / "first"
        told = [str(folder / name), "The calibration"]
        table = ends_well(name, root, lambda: predictions.judge_scores(scores, folder), named=told)
        if table is not None:
            assert table["probability"].between(0, 1).all()
            assert len(table) == 4
            predictions.format_judgement(table)


@cases(25)
@given(data=st.data())
def test_broken_heat_maps_are_told_in_a_sentence(left, place, data):
    with place({"heatmaps.npz": data.draw(broken_archive(left["heatmaps.npz"]))}) as folder:
        path = folder / "heatmaps.npz"
        heat = ends_well("heatmaps.npz", folder, lambda: localisation.read_heat_maps(path), named=[str(path)])
        if heat:
            assert heat.maps.ndim == 3
            assert len(heat.maps) == len(heat.table)
            assert np.isfinite(heat.maps).all()


# Models and checkpoints: Keras is imported here alone.


SETTINGS = {
    "network": "Tiny",
    "precision": "float32",
    "image_size": 32,
    "findings": FINDINGS,
    "workers": 1,
    "batch_size": 4,
}
EPOCH = {"epoch": 1, "loss": 0.6, "val_loss": 0.5, "val_auroc": 0.7, "best": 1, "learning_rate": 0.001}


def _tiny():
    from workbench.training import fast, network

    model = network.build_network("Tiny", findings=2, image_size=32, weights=None)
    optimizer = fast.Adam(1e-3)
    optimizer.build(model.trainable_variables)
    return model, optimizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model's file and a run's checkpoints."""
    from workbench.training import checkpoint, network

    folder, (model, optimizer) = tmp_path_factory.mktemp("trained"), _tiny()
    network.write_network(model, folder / "model.keras", findings=FINDINGS, stored_size=36, encoding="raw")
    for history in ([EPOCH], [EPOCH, EPOCH | {"epoch": 2}]):
        checkpoint.write(folder, SETTINGS, history, model, optimizer, model.get_weights())
    return _files(folder)


@cases(10, slow=True)
@given(data=st.data())
def test_a_broken_model_is_told_in_a_sentence(trained, place, data):
    from workbench.training import network

    with place({"model.keras": data.draw(broken_archive(trained["model.keras"], fields="workbench.json"))}) as folder:
        path = folder / "model.keras"
        told = ends_well("model.keras", folder, lambda: network.describe_network(path), named=[str(path)])
        if told:
            findings, size = told["findings"], told["image_size"]
            model = ends_well(
                "model.keras",
                folder,
                lambda: network.read_network(path, findings=findings, image_size=size),
                named=[str(path)],
            )
            assert model is None or model.output_shape == (None, len(findings))
            ends_well(
                "model.keras",
                folder,
                lambda: network.build_network("Tiny", findings=2, image_size=32, weights=str(path)),
                named=[str(path)],
            )


@st.composite
def broken_checkpoint(draw, original: bytes) -> bytes:
    """A checkpoint whose parts are lost, exchanged or different, with the hash that belongs to them."""
    from workbench.training import checkpoint

    with np.load(io.BytesIO(original)) as file:
        arrays = {name: file[name] for name in file.files if name != "sha256"}
    name, other = draw(st.sampled_from(sorted(arrays))), draw(st.sampled_from(sorted(arrays)))
    kind = draw(st.sampled_from(["lost", "swapped", "shape", "fields", "fields", "fields"]))
    if kind == "lost":
        del arrays[name]
    elif kind == "swapped":
        arrays[name], arrays[other] = arrays[other], arrays[name]
    elif kind == "shape":
        arrays[name] = draw(st.sampled_from([np.zeros(3), np.array("text"), np.array(np.nan), arrays[name][..., None]]))
    else:
        name = draw(st.sampled_from(["settings", "history"]))
        arrays[name] = np.array(draw(broken_json(str(arrays[name]).encode())).decode(errors="replace"))
    target = io.BytesIO()
    np.savez(target, sha256=np.array(checkpoint._digest(arrays)), **arrays)
    return target.getvalue()


@cases(10, slow=True)
@given(data=st.data())
def test_a_broken_checkpoint_is_told_in_a_sentence(trained, place, data):
    from workbench.training import checkpoint

    files = {name: content for name, content in trained.items() if name.startswith("checkpoint/")}
    for name in data.draw(st.sampled_from([["last"], ["before"], ["last", "before"]])):
        content = files[f"checkpoint/{name}.npz"]
        changed = st.one_of(broken_checkpoint(content), broken_archive(content), broken_bytes(content, content))
        files[f"checkpoint/{name}.npz"] = data.draw(changed)
    model, optimizer = _tiny()
    with place(files) as folder:
        said = [str(folder), "The checkpoint"]
        state = ends_well("checkpoints", folder, lambda: checkpoint.read(folder), named=said)
        if state:

            def go_on():
                checkpoint.apply(state, SETTINGS, model, optimizer)
                return state.best_weights

            weights = ends_well("checkpoints", folder, go_on, named=said)
            if weights is not None:
                # What training does with it next.
                model.set_weights(weights)
                best = next(row for row in reversed(state.history) if row["best"])
                better("auroc", EPOCH, best), better("loss", EPOCH, best)
                decay_after(state.history, factor=0.5, patience=1)
                checkpoint.describe_changes(state.settings, SETTINGS)
