"""The download against a real HTTP server on loopback that breaks off, stalls, lies and refuses."""

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

from workbench import WorkbenchError
from workbench.data import download as module
from workbench.data.download import ARCHIVES, TABLES, Archive, check_tables, download, missing_tables, unpack

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
        if callable(act):  # something that happens on the server before it answers
            act()
            content = self.server.files[self.path]
        if isinstance(act, int):
            return self.answer(act, b"busy")
        if isinstance(act, tuple):
            return self.answer(act[0], b"", act[1])
        tag = f'"{hashlib.md5(content).hexdigest()}"' if self.server.tags else ""
        if self.headers.get("If-Range", tag) != tag:
            asked = None
        start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", asked).groups() if asked else (0, "")
        start, end = int(start), int(end) if end else len(content) - 1
        if act == "page":
            return self.answer(200, b"<html>sign in</html>", {"Content-Type": "text/html; charset=utf-8"})
        if asked and act == "no ranges":
            asked, start = None, 0
        if act == "wrong":
            content = content[:1000] + b"x" + content[1001:]
        if act == "plain page":
            return self.answer(200, b"sign in, " * 20_000)
        if act == "shifted":
            start += 1
        if start >= len(content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers = {"Content-Range": f"bytes {start}-{end}/{len(content)}"} if asked else {}
        headers |= {"ETag": tag} if tag else {}
        if act == "garbled":
            headers["Content-Range"] = "bytes all of them"
        if act == "packed":
            headers["Content-Encoding"] = "gzip"
        short = slice(start, (start + end) // 2) if act in ("break", "stall", "short") else slice(start, end + 1)
        length = len(content[short]) if act == "short" else end + 1 - start
        self.answer(206 if asked else 200, content[short], headers, length=length)
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


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        pass  # clients that go away are what this is about


@contextmanager
def serving():
    server = Server(("127.0.0.1", 0), Handler)
    server.files, server.plan, server.asked, server.tags = {}, defaultdict(list), defaultdict(list), False
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


@pytest.mark.parametrize("act", [503, 429, "wrong", "page", "plain page"])
def test_tries_again(act, nih, tmp_path):
    nih.server.plan["/images_001.tar.gz"] = [act]
    nih.get(tmp_path)
    check_images(tmp_path)
    assert ranges(nih, 1) == [None, None]


@pytest.mark.parametrize("act", ["shifted", "garbled"])
def test_begins_again_after_a_range_that_was_not_asked_for(act, nih, tmp_path):
    nih.server.plan["/images_001.tar.gz"] = ["break", act]
    nih.get(tmp_path)
    check_images(tmp_path)
    assert ranges(nih, 1)[2] is None


def test_what_is_named_packed_is_the_archive_itself(nih, tmp_path):
    nih.server.plan["/images_001.tar.gz"] = ["packed"]
    nih.get(tmp_path)
    check_images(tmp_path)
    assert len(ranges(nih, 1)) == 1


def test_goes_on_after_less_than_was_promised(nih, tmp_path):
    nih.server.plan["/images_001.tar.gz"] = ["break", "short"]
    nih.get(tmp_path)
    check_images(tmp_path)
    starts = [int(each[6:-1]) for each in ranges(nih, 1)[1:]]
    assert 0 < starts[0] < starts[1]


def test_a_web_page_does_not_take_the_place_of_what_was_fetched(nih, tmp_path):
    nih.server.plan["/images_001.tar.gz"] = ["break", "page", "plain page"]
    nih.get(tmp_path, attempts=5)
    check_images(tmp_path)
    begun, *later = ranges(nih, 1)
    assert begun is None
    assert len(set(later)) == 1  # the same range each time: nothing was thrown away
    assert len(later) == 3


def test_a_file_that_changes_meanwhile_is_fetched_from_its_beginning(nih, tmp_path):
    path, server = "/images_001.tar.gz", nih.server
    changed, server.files[path] = server.files[path], pack({"images/old.png": image(77), "images/too.png": image(78)})
    server.tags = True
    server.plan[path] = ["break", lambda: server.files.update({path: changed})]
    nih.get(tmp_path)
    check_images(tmp_path)
    # The second answer is whole already, and needs no third.
    assert len(ranges(nih, 1)) == 2


def test_the_server_says_when_to_come_again(nih, tmp_path, capfd):
    nih.server.plan["/images_001.tar.gz"] = [(429, {"Retry-After": "1"})]
    nih.server.plan["/images_002.tar.gz"] = [(503, {"Retry-After": formatdate(time.time() + 2.5, usegmt=True)})]
    began = time.monotonic()
    nih.get(tmp_path, progress=True, pause=0.01)
    assert time.monotonic() - began > 1
    check_images(tmp_path)
    told = capfd.readouterr().err
    assert "images_001.tar.gz: the server answered 429 Too Many Requests, 0.0 MB are here; next try in 1 s." in told
    assert re.search(r"images_002\.tar\.gz: the server answered 503 .*; next try in [12] s\.", told)


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        ("7", 7),
        ("86400", module.LONGEST_WAIT),
        ("Fri, 31 Dec 2100 23:59:59 GMT", module.LONGEST_WAIT),
        ("Fri, 31 Dec 1999 23:59:59 GMT", 0),
        ("-5", 0),
        ("soon", 0),
        ("9" * 400, module.LONGEST_WAIT),
        ("", 0),
    ],
)
def test_how_long_to_wait_is_bounded(told, seconds):
    assert module._retry_after(SimpleNamespace(headers={"Retry-After": told})) == seconds


def test_follows_one_address_to_the_next(nih, tmp_path):
    nih.server.files["/elsewhere"] = nih.server.files["/images_001.tar.gz"]
    nih.server.plan["/images_001.tar.gz"] = [(302, {"Location": "/elsewhere"})]
    nih.get(tmp_path)
    check_images(tmp_path)


def test_addresses_in_a_circle_are_given_up(nih, tmp_path):
    nih.server.plan["/images_001.tar.gz"] = [(302, {"Location": "/images_001.tar.gz"})] * 100
    with pytest.raises(
        WorkbenchError, match=r"images_001\.tar\.gz: the server sends from one address to the next .*; 2 tr"
    ):
        nih.get(tmp_path, attempts=2)
    check_images(tmp_path, numbers=(2, 3))


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


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize(("left", "when"), [(300_000, "fetching"), (1_500_000, "unpacking")])
def test_a_full_disk_ends_everything_with_one_sentence(left, when, nih, small_disk):
    def fill():
        other = os.statvfs(small_disk)
        (small_disk / "other").write_bytes(b"x" * (other.f_bavail * other.f_frsize - left))

    nih.server.plan["/images_002.tar.gz"] = [fill]
    with pytest.raises(WorkbenchError) as told:
        nih.get(small_disk, jobs=1)
    assert str(told.value) == (
        f"2 of 3 archives could not be fetched: The disk of {small_disk} is full (No space left on device): make room. "
        "What was fetched is kept, and the same call goes on from there."
    )
    check_images(small_disk, numbers=[1])
    kept = {path.name: path.stat().st_size for path in small_disk.glob("images_00*.gz*")}
    content = nih.server.files["/images_002.tar.gz"]
    if when == "unpacking":
        assert kept == {"images_002.tar.gz": len(content)}
    else:
        assert kept.keys() == {"images_002.tar.gz.part"}
        assert kept["images_002.tar.gz.part"] > 200_000
    (small_disk / "other").unlink()
    nih.get(small_disk, jobs=1)
    check_images(small_disk)
    assert ranges(nih, 2)[1:] == ([] if when == "unpacking" else [f"bytes={kept['images_002.tar.gz.part']}-"])


def start_download(nih, folder, *, first="", **settings):
    """The download in a process of its own, which can be killed; `first` is run before it."""
    archives = [(archive.name, archive.url, archive.md5) for archive in nih.archives]
    code = (
        "import json, sys\n"
        "from workbench.data.download import Archive, download\n"
        "folder, archives = sys.argv[1], [Archive(*each) for each in json.loads(sys.argv[2])]\n"
        f"{first}\n"
        "download(folder, archives=archives, progress=False, pause=0.01, jobs=1)\n"
    )
    return subprocess.Popen([sys.executable, "-c", code, folder, json.dumps(archives)], **settings)


def kill_when(process, happened):
    """Stop the process at the moment something has happened, and kill it where it stands."""
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_goes_on_after_being_killed_while_fetching(nih, tmp_path):
    part = tmp_path / "images_001.tar.gz.part"
    nih.server.plan["/images_001.tar.gz"] = ["stall"]
    kill_when(start_download(nih, tmp_path), lambda: part.exists() and part.stat().st_size > SIZE // 2)
    kept = part.stat().st_size
    nih.get(tmp_path)
    check_images(tmp_path)
    assert ranges(nih, 1) == [None, f"bytes={kept}-"]


def test_goes_on_after_being_killed_while_unpacking(nih, tmp_path, monkeypatch):
    names = [f"images/{number:05}.png" for number in range(5000)]
    nih.server.files["/images_001.tar.gz"] = content = pack({name: name.encode() for name in names})
    nih.archives[0] = Archive("images_001.tar.gz", nih.archives[0].url, hashlib.md5(content).hexdigest())
    unpacking = tmp_path / ".images_001.part"
    kill_when(start_download(nih, tmp_path), lambda: (unpacking / names[50]).exists())
    assert unpacking.exists()
    assert not (tmp_path / "images_001").exists()
    asked, sight = len(ranges(nih, 1)), []

    def disk_usage(_):
        sight.append(unpacking.exists())
        return SimpleNamespace(free=1 << 30)

    monkeypatch.setattr(module.shutil, "disk_usage", disk_usage)
    nih.get(tmp_path)
    assert sight == [False]  # what the killed process left takes no room from this one
    assert len(ranges(nih, 1)) == asked
    found = {f"images/{path.name}": path.read_bytes() for path in (tmp_path / "images_001" / "images").iterdir()}
    assert found == {name: name.encode() for name in names}
    check_images(tmp_path, numbers=(2, 3))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("mode", "told"), [(0o700, "cannot be read: Permission denied"), (0o755, "cannot be written in")]
)
def test_a_folder_of_somebody_else_is_told(mode, told, nih, tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "theirs").mkdir(mode=mode)
    # With all modules loaded, since another user may not be allowed to read this Python; and below a folder that is
    # entered before, since the folders of tests are root's own.
    become_another = (
        "import os; download(folder + '/../ours', archives=archives[1:], progress=False)\n"
        "os.chdir(folder + '/..'); folder = 'theirs'; os.setgroups([]); os.setgid(65534); os.setuid(65534)"
    )
    process = start_download(nih, tmp_path / "theirs", first=become_another, stderr=subprocess.PIPE, text=True)
    said = process.communicate(timeout=60)[1]
    assert re.search(rf"^workbench\.WorkbenchError: .*{told}", said, re.MULTILINE)
    assert list((tmp_path / "theirs").iterdir()) == []


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


def write_tables(folder, images, *, test=(), drop=""):
    """NIH's four tables over the images, the official lists from `test`."""
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
    rows = [f"{name},No Finding,0,{name[:8]},50,F,PA" for name in images]
    contents = {
        TABLES[0]: [header, *rows],
        "train_val_list.txt": [name for name in images if name not in test],
        "test_list.txt": list(test),
        "BBox_List_2017.csv": ["Image Index,Finding Label,Bbox [x,y,w,h],,,", f"{images[0]},Mass,1,2,3,4,,,"],
    }
    for name, lines in contents.items():
        if name != drop:
            (folder / name).write_text("".join(f"{line}\n" for line in lines))


IMAGES = [f"{number:08}_{i:03}.png" for number in (1, 2, 3) for i in (0, 1)]


def test_tables_that_fit_are_summarised(nih, tmp_path, capfd):
    write_tables(tmp_path, IMAGES, test=IMAGES[4:])
    assert nih.get(tmp_path, progress=True) == []
    told = capfd.readouterr().err
    assert "NIH's table has 6 rows, and there are 6 images." in told
    assert "train_val_list.txt has 4 images." in told
    assert "test_list.txt has 2 images." in told
    assert "BBox_List_2017.csv has 1 boxes." in told


def test_missing_tables_are_no_error_and_the_others_are_checked(nih, tmp_path):
    write_tables(tmp_path, IMAGES, test=IMAGES[4:], drop="test_list.txt")
    assert nih.get(tmp_path) == ["test_list.txt"]
    (tmp_path / TABLES[0]).unlink()
    assert check_tables(tmp_path)[1] == []
    (tmp_path / "train_val_list.txt").write_text("00000009_000.png\n")
    assert check_tables(tmp_path)[1] == [
        "1 names of train_val_list.txt are no image of the table (such as 00000009_000.png)"
    ]


def test_tables_that_do_not_fit_are_an_error_with_counts_and_examples(nih, tmp_path, monkeypatch):
    from workbench import cli

    write_tables(tmp_path, ["00000000_000.png", "00000000_001.png", *IMAGES[1:]], test=IMAGES[4:])
    for name, line in (("test_list.txt", IMAGES[1]), ("train_val_list.txt", "00000008_000.png")):
        with (tmp_path / name).open("a") as file:
            file.write(f"{line}\n")
    monkeypatch.setattr(module.download, "__kwdefaults__", module.download.__kwdefaults__ | {"archives": nih.archives})
    assert cli.main(["download", str(tmp_path)]) == 1
    check_images(tmp_path)
    with pytest.raises(WorkbenchError) as told:
        nih.get(tmp_path)
    for said in (
        f"The tables in {tmp_path} do not fit the images (2 rows of the table have no image (such as 00000000_000.png)",
        "; 1 images have no row in the table (such as 00000001_000.png); ",
        "; 1 names of train_val_list.txt are no image of the table (such as 00000008_000.png); ",
        "; 1 images are both in train_val_list.txt and in test_list.txt (such as 00000001_001.png)): fetch the tables",
    ):
        assert said in str(told.value)
    (tmp_path / TABLES[0]).write_bytes(b"\xff\x00nonsense")
    (tmp_path / "BBox_List_2017.csv").write_bytes(b"\xff\x00nonsense")
    wrong = check_tables(tmp_path)[1]
    assert len([line for line in wrong if "Data_Entry" in line or "BBox" in line]) == 2


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
        (pack({}, member("sparse", tarfile.GNUTYPE_SPARSE)), "is no plain file"),
        (pack({"a/1.png": b"1", "a//./1.png": b"2"}), "holds `a//./1.png`, which is there twice"),
        (pack({"a": b"1", "a/1.png": b"2"}), "holds `a/1.png`, which is there twice"),
        (pack({"x" * 300: b"1"}), "File name too long"),
        (pack({"1.png": image(1)})[:300_000], "cannot be unpacked"),
        (b"not an archive", "cannot be unpacked"),
    ],
    ids=[
        "parent",
        "inner parent",
        "absolute",
        "symlink",
        "hard link",
        "pipe",
        "device",
        "sparse",
        "twice",
        "upon a file",
        "long name",
        "truncated",
        "no archive",
    ],
)
def test_unpack_refuses(content, told, tmp_path):
    archive = tmp_path / "here" / "archive.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(content)
    # The download tells an OSError as it tells that of a disk.
    with pytest.raises((WorkbenchError, OSError), match=told):
        unpack(archive, tmp_path / "here" / "images_001")
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "archive.tar.gz"]


def test_unpack_survives_anything(tmp_path):
    """Archives with bytes changed at random: unpacked inside, or refused in a sentence, and nothing of them is left."""
    draw = np.random.default_rng(5)
    whole = bytearray(pack({f"images/{number}.png": b"x" * 700 for number in range(4)}))
    plain = bytearray(gzip.decompress(whole))
    archive, target = tmp_path / "archive.tar.gz", tmp_path / "inside" / "images_001"
    target.parent.mkdir()
    refused = 0
    for case in range(160):
        changed = bytearray(whole if case % 4 == 0 else plain)
        # Mostly in the first header, where name, kind and size stand.
        for _ in range(draw.integers(1, 6)):
            changed[draw.integers(0, len(changed) if case % 4 == 0 or draw.random() < 0.2 else 512)] = draw.integers(
                256
            )
        if case % 4:
            changed[148:156] = b"%06o\0 " % (sum(changed[:148]) + 8 * ord(" ") + sum(changed[156:512]))
            changed = gzip.compress(changed, 1)  # the header's sum is right, so that it is believed
        archive.write_bytes(changed)
        try:
            unpack(archive, target)
        except (WorkbenchError, OSError) as error:
            refused += 1
            str(error).encode()
        shutil.rmtree(target, ignore_errors=True)
        assert list(target.parent.iterdir()) == []
        assert sorted(path.name for path in tmp_path.iterdir()) == ["archive.tar.gz", "inside"]
    assert refused > 30


def test_unpack_begins_anew_after_an_interruption(tmp_path):
    archive, target = tmp_path / "archive.tar.gz", tmp_path / "images_001"
    archive.write_bytes(pack({"images/1.png": b"one", "images/2.png": b"two"}, member("images/more", tarfile.DIRTYPE)))
    left = tmp_path / ".images_001.part" / "images" / "1.png"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"o")
    assert unpack(archive, target) == 2
    assert (target / "images" / "1.png").read_bytes() == b"one"
    assert not left.exists()
