"""The download against a real HTTP server on loopback that breaks off, stalls, lies and refuses."""

import errno
import hashlib
import io
import os
import re
import tarfile
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from workbench import WorkbenchError
from workbench.data import download as module
from workbench.data.download import ARCHIVES, TABLES, Archive, download, missing_tables, unpack

SIZE = 600_000  # bytes of each image, several chunks


def pack(files: dict[str, bytes], *others: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in others:
            tar.addfile(member)
    return buffer.getvalue()


def image(number: int) -> bytes:
    return np.random.default_rng(number).bytes(SIZE)  # does not shrink, as PNG does not


class Handler(BaseHTTPRequestHandler):
    """Serves server.files with byte ranges, and does to each request what server.plan holds for its path.

    The request for the first byte, by which sizes are asked, is always answered.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path not in self.server.files:
            return self.answer(404, b"")
        content, asked = self.server.files[self.path], self.headers.get("Range")
        self.server.asked[self.path].append(asked)
        plan = self.server.plan[self.path]
        act = plan.pop(0) if plan and asked != "bytes=0-0" else "whole"
        if isinstance(act, int):
            return self.answer(act, b"busy")
        start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups() if asked else (0, "")
        start, end = int(start), int(end) if end else len(content) - 1
        if act == "page":
            return self.answer(200, b"<html>sign in</html>", {"Content-Type": "text/html; charset=utf-8"})
        if asked and act == "no ranges":
            asked, start = None, 0
        if act == "wrong":
            content = content[:1000] + b"x" + content[1001:]
        if act == "shifted":
            start += 1
        if start >= len(content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers = {"Content-Range": f"bytes {start}-{end}/{len(content)}"} if asked else {}
        short = slice(start, (start + end) // 2) if act in ("break", "stall") else slice(start, end + 1)
        self.answer(206 if asked else 200, content[short], headers, length=end + 1 - start)
        if act == "stall":
            self.server.released.wait(20)
        self.close_connection = act in ("break", "stall")

    def answer(self, status, content, headers=None, length=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length if length is not None else len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.plan, server.asked = {}, defaultdict(list), defaultdict(list)
    server.released = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join(10)


@pytest.fixture
def nih(monkeypatch):
    """A server with three archives of two images; `archives` describes them, `get` downloads without long pauses."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        archives = []
        for number in (1, 2, 3):
            name = f"images_{number:03}.tar.gz"
            content = pack({f"images/{number:08}_{i:03}.png": image(10 * number + i) for i in (0, 1)})
            server.files[f"/{name}"] = content
            url = f"http://127.0.0.1:{server.server_port}/{name}"
            archives.append(Archive(name, url, hashlib.md5(content).hexdigest()))

        def get(folder, **options):
            settings = {"archives": archives, "progress": False, "timeout": 1.0, "attempts": 3, "pause": 0.01}
            return download(folder, **settings | options)

        yield SimpleNamespace(server=server, archives=archives, get=get)


def check_images(folder, numbers=(1, 2, 3)):
    for number in numbers:
        images = sorted((folder / f"images_{number:03}" / "images").iterdir())
        assert [path.name for path in images] == [f"{number:08}_{i:03}.png" for i in (0, 1)]
        assert [path.read_bytes() for path in images] == [image(10 * number + i) for i in (0, 1)]


def ranges(nih, number):
    """The byte ranges that the archive itself was asked for, without the request for its size."""
    asked = nih.server.asked[f"/images_{number:03}.tar.gz"]
    return [each for each in asked if each != "bytes=0-0"]


def test_nih_archives_are_the_twelve():
    assert [archive.name for archive in ARCHIVES] == [f"images_{number:03}.tar.gz" for number in range(1, 13)]
    assert ARCHIVES[0].url == "https://nihcc.box.com/shared/static/vfk49d74nhbxq3nqjg0900w5nvkorp5c.gz"
    assert ARCHIVES[0].md5 == "fe8ed0a6961412fddcbb3603c11b3698"
    assert ARCHIVES[11].url.endswith("/ioqwiy20ihqwyr8pf4c24eazhh281pbu.gz")
    assert ARCHIVES[11].md5 == "dc9fda1757c2de0032b63347a7d2895c"
    assert len({archive.md5 for archive in ARCHIVES} | {archive.url for archive in ARCHIVES}) == 24


def test_fetches_unpacks_and_tells_of_the_tables(nih, tmp_path, capfd):
    assert nih.get(tmp_path / "new" / "nih", progress=True) == list(TABLES)
    check_images(tmp_path / "new" / "nih")
    assert sorted(path.name for path in (tmp_path / "new" / "nih").iterdir()) == [
        "images_001",
        "images_002",
        "images_003",
    ]
    told = capfd.readouterr().err
    assert "images_002.tar.gz: 2 files unpacked into " in told
    assert "All 3 archives are unpacked" in told
    assert re.search(r"3 archives: 100%.*3\.6\dM/3\.6\dM .*B/s", told)
    assert re.search(r"Still missing in .*: Data_Entry_2017_v2020.csv, .* by hand from https://nihcc\.app\.box", told)


def test_what_is_there_is_not_fetched_again(nih, tmp_path):
    nih.get(tmp_path, archives=nih.archives[:1])
    nih.server.asked.clear()
    nih.get(tmp_path)
    check_images(tmp_path)
    assert ranges(nih, 1) == []
    nih.server.asked.clear()
    nih.get(tmp_path)
    assert not nih.server.asked


def test_kept_archives_are_unpacked_without_fetching(nih, tmp_path):
    nih.get(tmp_path, keep_archives=True)
    for archive in nih.archives:
        assert hashlib.md5((tmp_path / archive.name).read_bytes()).hexdigest() == archive.md5
    (tmp_path / "images_002").rename(tmp_path / "elsewhere")
    nih.server.asked.clear()
    nih.get(tmp_path, keep_archives=True)
    check_images(tmp_path)
    assert ranges(nih, 2) == []


def test_goes_on_where_the_connection_broke(nih, tmp_path, capfd):
    nih.server.plan["/images_001.tar.gz"] = ["break", "break"]
    nih.get(tmp_path, progress=True)
    check_images(tmp_path)
    first, second, third = ranges(nih, 1)
    assert first is None
    starts = [int(re.fullmatch(r"bytes=(\d+)-", each).group(1)) for each in (second, third)]
    assert 0 < starts[0] < starts[1] < len(nih.server.files["/images_001.tar.gz"])
    assert re.search(r"images_001\.tar\.gz: the connection broke, 0\.\d MB are here; next try", capfd.readouterr().err)


def test_goes_on_after_a_stall(nih, tmp_path):
    nih.server.plan["/images_002.tar.gz"] = ["stall"]
    start = time.monotonic()
    nih.get(tmp_path)
    assert time.monotonic() - start < 10
    check_images(tmp_path)
    assert ranges(nih, 2)[1].startswith("bytes=")


def test_begins_again_where_the_server_knows_no_ranges(nih, tmp_path):
    nih.server.plan["/images_001.tar.gz"] = ["break", "no ranges"]
    nih.get(tmp_path)
    check_images(tmp_path)


@pytest.mark.parametrize("act", [503, 429, "wrong", "page"])
def test_tries_again(act, nih, tmp_path):
    nih.server.plan["/images_001.tar.gz"] = [act]
    nih.get(tmp_path)
    check_images(tmp_path)
    assert ranges(nih, 1) == [None, None]


def test_begins_again_after_a_range_that_was_not_asked_for(nih, tmp_path):
    nih.server.plan["/images_001.tar.gz"] = ["break", "shifted"]
    nih.get(tmp_path)
    check_images(tmp_path)
    assert ranges(nih, 1)[2] is None


@pytest.mark.parametrize("there", ["part", "archive"])
def test_takes_up_what_another_call_or_hand_left(there, nih, tmp_path):
    content = nih.server.files["/images_001.tar.gz"]
    name = "images_001.tar.gz" + (".part" if there == "part" else "")
    (tmp_path / name).write_bytes(content[:500_000])
    nih.get(tmp_path)
    check_images(tmp_path)
    assert ranges(nih, 1) == ["bytes=500000-"]


def test_a_part_that_is_whole_or_too_long(nih, tmp_path):
    for name, surplus in (("images_001.tar.gz", b""), ("images_002.tar.gz", b"surplus")):
        (tmp_path / f"{name}.part").write_bytes(nih.server.files[f"/{name}"] + surplus)
    nih.get(tmp_path)
    check_images(tmp_path)
    assert len(ranges(nih, 1)) == 1
    assert ranges(nih, 2)[1] is None


def test_wrong_bytes_twice_are_an_error_and_the_others_are_fetched(nih, tmp_path):
    nih.server.plan["/images_001.tar.gz"] = ["wrong", "wrong"]
    with pytest.raises(
        WorkbenchError, match=r"1 of 3 archives .*images_001\.tar\.gz came twice with the MD5 [0-9a-f]{32}"
    ):
        nih.get(tmp_path)
    check_images(tmp_path, numbers=(2, 3))
    assert not (tmp_path / "images_001").exists()
    assert not (tmp_path / "images_001.tar.gz").exists()
    nih.get(tmp_path)
    check_images(tmp_path)


def test_gives_up_when_nothing_new_comes(nih, tmp_path):
    nih.server.plan["/images_003.tar.gz"] = ["break", 503, 503, 503]
    with pytest.raises(WorkbenchError, match=r"images_003\.tar\.gz: the server answered 503 .*; 3 tries in a row"):
        nih.get(tmp_path)
    check_images(tmp_path, numbers=(1, 2))
    assert (tmp_path / "images_003.tar.gz.part").stat().st_size > 0


def test_an_archive_that_is_gone_is_asked_for_once(nih, tmp_path):
    nih.server.plan["/images_002.tar.gz"] = [403]
    gone = Archive("images_004.tar.gz", nih.archives[0].url.replace("001", "004"), "0" * 32)
    told = r"2 of 4 archives .*images_00[24]\.tar\.gz is not to be had: http://127.0.0.1:.* answered 40[34] .*nihcc"
    with pytest.raises(WorkbenchError, match=told):
        nih.get(tmp_path, archives=[gone, *nih.archives])
    assert len(ranges(nih, 2)) == 1
    check_images(tmp_path, numbers=(1, 3))


def test_no_server(nih, tmp_path):
    gone = [Archive("images_001.tar.gz", "http://127.0.0.1:9/images_001.tar.gz", "0" * 32)]
    with pytest.raises(WorkbenchError, match=r"images_001\.tar\.gz: there is no connection; 3 tries in a row"):
        nih.get(tmp_path, archives=gone)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_soon_and_leaves_what_came(nih, tmp_path, monkeypatch):
    nih.server.plan["/images_001.tar.gz"] = ["stall"]

    def interrupt(tasks):
        while not any(path.stat().st_size > SIZE // 2 for path in tmp_path.glob("images_001.tar.gz.part")):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "as_completed", interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        nih.get(tmp_path)
    assert time.monotonic() - start < 10
    monkeypatch.undo()
    nih.get(tmp_path)
    check_images(tmp_path)
    assert ranges(nih, 1)[1] != "bytes=0-"


def test_space_is_checked_first(nih, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=6_000_000))
    with pytest.raises(WorkbenchError, match=r"has 0\.0 GB of free space, and 0\.0 GB are needed: make room"):
        nih.get(tmp_path, keep_archives=True)  # 3.6 MB of archives and 4.0 MB of images
    assert list(tmp_path.iterdir()) == []
    nih.get(tmp_path, jobs=1)  # one archive at a time, 1.2 MB, and 4.0 MB of images
    check_images(tmp_path)


def test_a_full_disk_ends_everything_with_one_sentence(nih, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module._Run, "count", full)
    with pytest.raises(WorkbenchError, match=r"cannot be written in .*: No space left on device"):
        nih.get(tmp_path)
    monkeypatch.undo()
    nih.get(tmp_path)
    check_images(tmp_path)


def test_two_downloads_into_one_folder_are_refused(nih, tmp_path):
    with module._alone_in(tmp_path), pytest.raises(WorkbenchError, match=r"Another download into .* is running"):
        nih.get(tmp_path)
    nih.get(tmp_path)


def test_wrong_settings_are_named(nih, tmp_path):
    with pytest.raises(WorkbenchError, match="`jobs` is 0"):
        nih.get(tmp_path, jobs=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkbenchError, match="file cannot be made: File exists"):
        nih.get(tmp_path / "file")


def test_missing_tables(tmp_path):
    assert missing_tables(tmp_path / "nowhere") == list(TABLES)
    for name in ("Data_Entry_2017.csv.gz", "test_list.txt"):
        (tmp_path / name).write_text("")
    assert missing_tables(tmp_path) == ["train_val_list.txt", "BBox_List_2017.csv"]


def member(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pack({"images/1.png": b"1", "../evil": b"2"}), r"holds `\.\./evil`, which lies outside its folder"),
        (pack({"images/../../evil": b"2"}), "lies outside its folder"),
        (pack({"/tmp/evil": b"2"}), "lies outside its folder"),
        (pack({}, member("images", tarfile.SYMTYPE, "/tmp")), "holds `images`, which is no plain file"),
        (pack({"a": b"1"}, member("b", tarfile.LNKTYPE, "a")), "holds `b`, which is no plain file"),
        (pack({}, member("pipe", tarfile.FIFOTYPE)), "is no plain file"),
        (pack({}, member("null", tarfile.CHRTYPE)), "is no plain file"),
        (pack({"1.png": image(1)})[:300_000], "cannot be unpacked"),
        (b"not an archive", "cannot be unpacked"),
    ],
    ids=["parent", "inner parent", "absolute", "symlink", "hard link", "pipe", "device", "truncated", "no archive"],
)
def test_unpack_refuses(content, told, tmp_path):
    archive = tmp_path / "here" / "archive.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(content)
    with pytest.raises(WorkbenchError, match=told):
        unpack(archive, tmp_path / "here" / "images_001")
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "archive.tar.gz"]


def test_unpack_begins_anew_after_an_interruption(tmp_path):
    archive, target = tmp_path / "archive.tar.gz", tmp_path / "images_001"
    archive.write_bytes(pack({"images/1.png": b"one", "images/2.png": b"two"}, member("images/more", tarfile.DIRTYPE)))
    left = tmp_path / "images_001.part" / "images" / "1.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"o")
    assert unpack(archive, target) == 2
    assert (target / "images" / "1.png").read_bytes() == b"one"
    assert not left.exists()
