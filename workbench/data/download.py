"""NIH ChestX-ray14's archives of images: fetched, resumed, verified and unpacked.

Twelve archives come to `images_001/images/*.png` ... `images_012/images/*.png`, several at a time. A folder
appears when its archive is whole and its MD5 right, and what is there is not fetched again, so a download that
was broken off goes on by calling it once more. NIH's tables have no lasting links and are not fetched: the
last messages tell which are missing, and whether those that are there fit the images.

    from workbench.data.download import download
    missing = download("data/nih")                  # the tables still to be fetched by hand
    download("data/nih", jobs=6, keep_archives=True)
"""

import errno
import fcntl
import hashlib
import os
import shutil
import sys
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from itertools import chain
from pathlib import Path, PurePosixPath
from threading import Event

import requests
from tqdm import tqdm

from workbench import WorkbenchError

PAGE = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
TABLES = ("Data_Entry_2017_v2020.csv", "train_val_list.txt", "test_list.txt", "BBox_List_2017.csv")
CHUNK = 1 << 16  # bytes; a connection that breaks loses at most one chunk
LONGEST_PAUSE = 60.0  # seconds between two tries
LONGEST_WAIT = 600.0  # seconds between two tries, when the server asks for so many
GZIP = b"\x1f\x8b"  # every gzip file begins so, and no web page does
UNPACKED = 1.1  # bytes of images per byte of archive; PNG files hardly shrink


@dataclass(frozen=True)
class Archive:
    """One archive: the name it gets here, its address, and the MD5 it has to have."""

    name: str
    url: str
    md5: str

    @property
    def folder(self) -> str:
        """The folder that it is unpacked into."""
        return self.name.removesuffix(".tar.gz")


# Links as on NIH's page (batch_download_zips.py), MD5 from question 07 of its FAQ.
_LINKS = """
vfk49d74nhbxq3nqjg0900w5nvkorp5c fe8ed0a6961412fddcbb3603c11b3698
i28rlmbvmfjbl8p2n3ril0pptcmcu9d1 ab07a2d7cbe6f65ddd97b4ed7bde10bf
f1t00wrtdk94satdfb9olcolqx20z2jp 2301d03bde4c246388bad3876965d574
0aowwzs5lhjrceb3qp67ahp0rd1l1etg 9f1b7f5aae01b13f4bc8e2c44a4b8ef6
v5e3goj22zr6h8tzualxfsqlqaygfbsn 1861f3cd0ef7734df8104f2b0309023b
asi7ikud9jwnkrnkj99jnpfkjdes7l6l 456b53a8b351afd92a35bc41444c58c8
jn1b4mw4n6lnh74ovmcjb8y48h8xj07n 1075121ea20a137b87f290d6a4a5965e
tvpxmn7qyrgl0w8wfh9kqfjskv6nmm1j b61f34cec3aa69f295fbb593cbd9d443
upyy3ml7qdumlgk2rfcvlb9k6gvqq2pj 442a3caa61ae9b64e61c561294d1e183
l6nilvfa9cg3s28tqv1qc1olm3gnz54p 09ec81c4c31e32858ad8cf965c494b74
hhq8fkdgvcari67vfhs7ppg2w6ni4jze 499aefc67207a5a97692424cf5dbeed5
ioqwiy20ihqwyr8pf4c24eazhh281pbu dc9fda1757c2de0032b63347a7d2895c
"""
ARCHIVES = tuple(
    Archive(f"images_{number:03}.tar.gz", f"https://nihcc.box.com/shared/static/{link}.gz", md5)
    for number, (link, md5) in enumerate(map(str.split, _LINKS.split("\n")[1:-1]), start=1)
)


class _Again(Exception):
    """A try that failed, where another may not, though not before `wait` seconds."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


class _Stopped(Exception):
    """Another thread asked this one to end."""


def download(
    folder: str | os.PathLike,
    *,
    archives: Sequence[Archive] = ARCHIVES,
    jobs: int = 3,
    keep_archives: bool = False,
    progress: bool = True,
    timeout: float = 30.0,
    attempts: int = 8,
    pause: float = 2.0,
) -> list[str]:
    """Fetch NIH's archives and unpack them, whatever of it is not done yet.

    Args:
        folder: where the images go; made if it is not there.
        archives: what to fetch.
        jobs: how many archives at a time.
        keep_archives: leave each archive beside its folder of images, instead of removing it.
        progress: tell on stderr what is done, at which rate, and how long it will take.
        timeout: seconds without a byte after which a connection counts as broken.
        attempts: tries in a row that bring nothing new before an archive is given up.
        pause: seconds before the second try; each further pause is twice as long, up to a minute.

    Returns:
        The names of NIH's tables that are missing in the folder.

    Raises:
        WorkbenchError: too little space, an archive that cannot be had or is not what NIH made, or tables that do not
            fit the images. Whole archives and parts of archives stay for the next call.
    """
    folder = Path(folder)
    if jobs < 1:
        raise WorkbenchError(f"`jobs` is {jobs}: at least one archive has to be fetched at a time.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkbenchError(f"The folder {folder} cannot be made: {error.strerror}; choose another.") from None
    with _alone_in(folder):
        waiting = [archive for archive in archives if not (folder / archive.folder).is_dir()]
        for archive in waiting:
            # What a killed process had unpacked is unpacked again, and takes room from it.
            shutil.rmtree(_unpacking(folder / archive.folder), ignore_errors=True)
        run = _Run(folder, keep_archives, progress, timeout, attempts, pause)
        if waiting:
            run.fetch(waiting, jobs)
        run.say(f"All {len(archives)} archives are unpacked in {folder}.")
    missing = missing_tables(folder)
    if missing:
        run.say(
            f"Still missing in {folder}: {', '.join(missing)}. "
            f"They have no lasting links: fetch them by hand from {PAGE} and put them there."
        )
    told, wrong = check_tables(folder)
    for line in told:
        run.say(line)
    if wrong:
        raise WorkbenchError(
            f"The tables in {folder} do not fit the images ({'; '.join(wrong)}): fetch the tables again from {PAGE}, "
            "or remove the folder of images that lacks some and call again."
        )
    return missing


def missing_tables(folder: str | os.PathLike) -> list[str]:
    """Which of NIH's tables are not in the folder; any release of Data_Entry_2017, packed or not, will do."""
    folder = Path(folder)
    entries, *others = TABLES
    missing = [] if any(folder.glob("Data_Entry_2017*.csv*")) else [entries]
    return missing + [name for name in others if not (folder / name).is_file()]


def check_tables(folder: str | os.PathLike) -> tuple[list[str], list[str]]:
    """Hold NIH's tables, as far as they are there, against the images in the folder.

    Returns:
        What there is, and what does not fit (nothing, if all is well), a line each, with counts and examples.
    """
    from workbench.data import chestxray14

    folder = Path(folder)
    _, *lists, boxes = TABLES
    images = {path.name for path in chain(folder.glob("images/*.png"), folder.glob("images_*/images/*.png"))}
    told, wrong = [], []

    def differ(names: set[str], what: str) -> None:
        if names:
            wrong.append(f"{len(names):,} {what} (such as {min(names)})")

    rows = None
    if any((folder / name).is_file() for name in chestxray14.TABLES):
        try:
            rows = set(chestxray14.read_table(folder)["image"])
        except WorkbenchError as error:
            wrong.append(str(error).rstrip("."))
    if rows is not None:
        told.append(f"NIH's table has {len(rows):,} rows, and there are {len(images):,} images.")
        differ(rows - images, "rows of the table have no image")
        differ(images - rows, "images have no row in the table")
    known = images if rows is None else rows
    named = {name: _names_in(folder / name) for name in lists if (folder / name).is_file()}
    for name, names in named.items():
        told.append(f"{name} has {len(names):,} images.")
        differ(names - known, f"names of {name} are no image of the table")
    if len(named) == len(lists):
        first, second = named.values()
        differ(known - first - second, f"images are neither in {lists[0]} nor in {lists[1]}")
        differ(first & second, f"images are both in {lists[0]} and in {lists[1]}")
    if (folder / boxes).is_file():
        try:
            drawn = chestxray14.read_boxes(folder)
        except WorkbenchError as error:
            wrong.append(str(error).rstrip("."))
        else:
            told.append(f"{boxes} has {len(drawn):,} boxes.")
            differ(set(drawn["image"].astype(str)) - known, f"images of {boxes} are not in the table")
    return told, wrong


def unpack(archive: str | os.PathLike, target: str | os.PathLike, *, stop: Event | None = None) -> int:
    """Unpack a tar archive of plain files into a new folder that appears whole, and return the number of files.

    Raises:
        WorkbenchError: something in it is no plain file, would land outside the folder or upon another file, or it is
            damaged; then nothing is left of it.
        OSError: it cannot be read, or the folder cannot be written; nothing is left either.
    """
    archive, target = Path(archive), Path(target)
    part = _unpacking(target)
    files = 0
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        # As a stream, because seeking in 4 GB of gzip means reading them again.
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                if stop and stop.is_set():
                    raise _Stopped
                place = PurePosixPath(member.name)
                if fault := _fault_of(member, part / place):
                    name = member.name[:100].encode("ascii", "backslashreplace").decode()
                    raise WorkbenchError(
                        f"{archive} holds `{name}`, which {fault}: this is not NIH's archive, remove it."
                    )
                if member.isreg():
                    (part / place).parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as source, (part / place).open("xb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                    files += 1
        # The archive is removed once its folder is there, so all of it has to be on the disk first. One by one, with
        # fsync, ten thousand files would take half a minute.
        os.sync()
        os.replace(part, target)
        _flush(target.parent)
    # Python 3.11.2 answers damaged gzip with an AttributeError of its own.
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError, AttributeError) as error:
        raise WorkbenchError(f"{archive} is damaged and cannot be unpacked ({error}): remove it.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return files


def _fault_of(member: tarfile.TarInfo, place: Path) -> str:
    """Why a member of an archive is not unpacked, or nothing."""
    name = PurePosixPath(member.name)
    if not (member.isreg() or member.isdir()) or member.issparse():
        return "is no plain file"
    if name.is_absolute() or ".." in name.parts:
        return "lies outside its folder"
    if member.isreg() and (place.exists() or any(parent.is_file() for parent in place.parents)):
        return "is there twice"
    return ""


@dataclass
class _Run:
    """One call of `download`: its settings, and what its threads share."""

    folder: Path
    keep_archives: bool
    progress: bool
    timeout: float
    attempts: int
    pause: float

    def __post_init__(self):
        self.stop = Event()
        self.bar = tqdm(disable=True)
        self.etags: dict[str, str] = {}  # of what was fetched so far, by the archive's name

    def fetch(self, archives: Sequence[Archive], jobs: int) -> None:
        with ThreadPoolExecutor(jobs) as pool:
            try:
                self.say(f"Asking for the sizes of {len(archives)} archives ...")
                sizes = list(pool.map(self.size_of, archives))
                there = [self.bytes_of(archive) for archive in archives]
                self.check_space(sizes, there, jobs)
                self.bar = tqdm(
                    desc=f"{len(archives)} archives",
                    total=sum(sizes) or None,
                    initial=sum(there),
                    unit="B",
                    unit_scale=True,
                    mininterval=0.5 if sys.stderr.isatty() else 5.0,  # seconds; a log of hours stays short
                    disable=not self.progress,
                    file=sys.stderr,
                )
                with self.bar:
                    tasks = {pool.submit(self.fetch_one, archive): archive.name for archive in archives}
                    failed = {}
                    for task in as_completed(tasks):
                        try:
                            task.result()
                        except WorkbenchError as error:
                            failed[tasks[task]] = str(error)
                        except _Stopped:
                            failed.setdefault(tasks[task], "")
            except BaseException:
                # An interrupt above all: the threads end at their next chunk, and parts stay for the next call.
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        if failed:
            told = " ".join(dict.fromkeys(filter(None, failed.values())))  # a full disk is told once
            raise WorkbenchError(
                f"{len(failed)} of {len(archives)} archives could not be fetched: {told} "
                "What was fetched is kept, and the same call goes on from there."
            )

    def fetch_one(self, archive: Archive) -> None:
        """From whatever is there of an archive to its folder of images."""
        if self.stop.is_set():
            raise _Stopped
        whole, part = self.folder / archive.name, self.part_of(archive)
        try:
            # An archive that was fetched by hand and broke off is taken for a part, and goes on as one.
            if whole.exists() and _md5(whole) != archive.md5:
                os.replace(whole, part)
            if not whole.exists():
                self.fetch_part(archive, part)
                _flush(part)
                os.replace(part, whole)
                _flush(self.folder)
            self.say(f"{archive.name}: whole, its MD5 is right; unpacking ...")
            files = unpack(whole, self.folder / archive.folder, stop=self.stop)
            if not self.keep_archives:
                whole.unlink()
        except OSError as error:
            self.stop.set()  # the others will meet it as well
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise WorkbenchError(f"The disk of {self.folder} is full ({error.strerror}): make room.") from None
            raise WorkbenchError(f"{archive.name} cannot be written in {self.folder}: {error.strerror}.") from None
        self.say(f"{archive.name}: {files:,} files unpacked into {self.folder / archive.folder}.")

    def fetch_part(self, archive: Archive, part: Path) -> None:
        """Fill the part until it is whole and its MD5 right; pause and try again when that fails."""
        failures = spoiled = 0
        furthest = _bytes_in(part)
        while True:
            try:
                self.transfer(archive, part)
                found = _md5(part)
                if found == archive.md5:
                    return
                self.forget(part)
                spoiled += 1
                if spoiled == 2:
                    raise WorkbenchError(
                        f"{archive.name} came twice with the MD5 {found} instead of {archive.md5}: {archive.url} is "
                        f"no longer what NIH published, or something on the way changes it; compare {PAGE}."
                    )
                reason = f"its MD5 was {found} instead of {archive.md5}"
                wait = 0.0
            except (_Again, requests.RequestException) as error:
                reason, wait = _reason(error), getattr(error, "wait", 0.0)
            reached = _bytes_in(part)
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            self.pause_after(archive, f"{reason}, {reached / 1e6:,.1f} MB are here", failures, wait)

    def transfer(self, archive: Archive, part: Path) -> None:
        """One request for the bytes that the part still lacks, appended to it."""
        have = _bytes_in(part)
        with self.request(archive, start=have) as response:
            total = _total_of(response)
            if response.status_code == 416:  # there is nothing beyond what is here
                if total in (0, have):
                    return
                self.forget(part)
                raise _Again(f"the part had {have} bytes and the archive has {total}")
            if response.status_code == 206 and _start_of(response) != have:
                self.forget(part)
                raise _Again("the server sent other bytes than it was asked for")
            # What names itself packed is the archive, which is; it has to come as it is.
            response.raw.headers.pop("Content-Encoding", None)
            chunks = response.iter_content(CHUNK)
            if response.status_code == 200:  # the whole archive, whatever was asked for
                first = next(chunks, b"")
                if not first.startswith(GZIP):
                    raise _Again("something else came instead of the archive")
                self.forget(part)
                chunks = chain([first], chunks)
            self.etags[archive.name] = response.headers.get("ETag", "")
            self.append(part, chunks)
        if total and _bytes_in(part) != total:
            raise _Again(f"the connection ended after {_bytes_in(part)} of {total} bytes")

    def append(self, part: Path, chunks: Iterable[bytes]) -> None:
        with part.open("ab") as file:
            for chunk in chunks:
                if self.stop.is_set():
                    raise _Stopped
                file.write(chunk)
                self.count(len(chunk))

    @contextmanager
    def request(self, archive: Archive, *, start: int, end: int | str = "") -> Iterator[requests.Response]:
        # Without `identity` a server may pack the archive again, and byte ranges would count other bytes.
        headers = {"Accept-Encoding": "identity"}
        if start or end != "":
            headers["Range"] = f"bytes={start}-{end}"
        # A file that has changed meanwhile comes whole. Weak tags (W/) do not promise the same bytes.
        if start and (tag := self.etags.get(archive.name, "")).startswith('"'):
            headers["If-Range"] = tag
        with requests.get(archive.url, headers=headers, stream=True, timeout=self.timeout) as response:
            status = response.status_code
            if status in (408, 429) or status >= 500:
                raise _Again(f"the server answered {status} {response.reason}", _retry_after(response))
            if status not in (200, 206, 416):
                raise WorkbenchError(
                    f"{archive.name} is not to be had: {archive.url} answered {status} {response.reason}; "
                    f"compare NIH's page {PAGE}."
                )
            if response.headers.get("Content-Type", "").startswith("text/html") and status != 416:
                raise _Again("a web page came instead of the archive")
            yield response

    def size_of(self, archive: Archive) -> int:
        """The archive's bytes; 0 if the server does not say."""
        for failures in range(1, self.attempts + 1):
            try:
                with self.request(archive, start=0, end=0) as response:
                    return _total_of(response)
            except (_Again, requests.RequestException) as error:
                self.pause_after(archive, _reason(error), failures, getattr(error, "wait", 0.0))
            except WorkbenchError:
                return 0  # told when its turn comes, so that the others are fetched before
        raise AssertionError("pause_after gives up after the last attempt")

    def pause_after(self, archive: Archive, reason: str, failures: int, wait: float = 0.0) -> None:
        """Wait as long as the server asked, or twice as long as the last time; give up after the last attempt."""
        if failures >= self.attempts:
            raise WorkbenchError(
                f"{archive.name}: {reason}; {failures} tries in a row brought nothing new from {archive.url}."
            )
        seconds = max(min(self.pause * 2 ** (failures - 1), LONGEST_PAUSE), wait)
        self.say(f"{archive.name}: {reason}; next try in {seconds:.0f} s.")
        if self.stop.wait(seconds):
            raise _Stopped

    def check_space(self, sizes: list[int], there: list[int], jobs: int) -> None:
        lacking = sorted((max(size - have, 0) for size, have in zip(sizes, there, strict=True)), reverse=True)
        archives = sum(lacking if self.keep_archives else lacking[:jobs])
        needed = archives + UNPACKED * sum(sizes)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise WorkbenchError(
                f"{self.folder} has {free / 1e9:.1f} GB of free space, and {needed / 1e9:.1f} GB are needed: "
                "make room or choose another folder."
            )

    def part_of(self, archive: Archive) -> Path:
        return self.folder / f"{archive.name}.part"

    def bytes_of(self, archive: Archive) -> int:
        return _bytes_in(self.folder / archive.name) or _bytes_in(self.part_of(archive))

    def forget(self, part: Path) -> None:
        self.count(-_bytes_in(part))
        part.unlink(missing_ok=True)

    def count(self, size: int) -> None:
        with self.bar.get_lock():
            self.bar.update(size)

    def say(self, message: str) -> None:
        if self.progress:
            tqdm.write(message, file=sys.stderr)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: two downloads into one folder would append to the same parts."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise WorkbenchError(f"The folder {folder} cannot be read: {error.strerror}; choose another.") from None
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise WorkbenchError(f"Another download into {folder} is running: wait for it or stop it.") from None
        yield
    finally:
        os.close(handle)


def _total_of(response: requests.Response) -> int:
    """The whole archive's bytes, by the headers of an answer with all of it, a range, or no range; 0 if unknown."""
    if response.status_code == 200:
        total = response.headers.get("Content-Length", "")
    else:
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else 0


def _start_of(response: requests.Response) -> int:
    start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdigit() else -1


def _retry_after(response: requests.Response) -> float:
    """The seconds that the server asks to wait, by number or date, up to `LONGEST_WAIT`; 0 if it does not."""
    told = response.headers.get("Retry-After", "").strip()
    try:
        seconds = float(told) if told.isdecimal() else parsedate_to_datetime(told).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT)


def _reason(error: Exception) -> str:
    """A network error in a few words; what requests says itself fills half a screen."""
    if isinstance(error, requests.TooManyRedirects):
        return "the server sends from one address to the next and never to the archive"
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "nothing came any more"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    if isinstance(error, requests.ConnectionError):
        return "there is no connection"
    return str(error)


def _bytes_in(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _names_in(path: Path) -> set[str]:
    """The first word of each line, as published lists have labels behind it."""
    return {words[0] for line in path.read_text(errors="replace").splitlines() if (words := line.split())}


def _unpacking(target: Path) -> Path:
    """Where an archive is unpacked before its folder appears; hidden, as it is no folder of images yet."""
    return target.with_name(f".{target.name}.part")


def _flush(path: Path) -> None:
    """Have a file or a folder on the disk before anything relies on it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not do it for folders
            raise
    finally:
        os.close(handle)


def _md5(path: Path) -> str:
    # Where a system forbids MD5 for security it allows it for this: NIH publishes nothing better.
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
