"""NIH ChestX-ray14's archives of images: fetched, resumed, verified and unpacked.

Twelve archives come to `images_001/images/*.png` ... `images_012/images/*.png`, several at a time. A folder
appears when its archive is whole and its MD5 right, and what is there is not fetched again, so a download that
was broken off goes on by calling it once more. NIH's tables have no lasting links and are not fetched; the
last message tells which are missing.

    from workbench.data.download import download
    missing = download("data/nih")                  # the tables still to be fetched by hand
    download("data/nih", jobs=6, keep_archives=True)
"""

import fcntl
import hashlib
import os
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from threading import Event

import requests
from tqdm import tqdm

from workbench import WorkbenchError

PAGE = "https://nihcc.app.box.com/v/ChestXray-NIHCC"
TABLES = ("Data_Entry_2017_v2020.csv", "train_val_list.txt", "test_list.txt", "BBox_List_2017.csv")
CHUNK = 1 << 16  # bytes; a connection that breaks loses at most one chunk
LONGEST_PAUSE = 60.0  # seconds between two tries
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
    """A try that failed, where another may not."""


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
        WorkbenchError: too little space, an archive that cannot be had or is not what NIH made. Whole archives
            and parts of archives stay for the next call.
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
    return missing


def missing_tables(folder: str | os.PathLike) -> list[str]:
    """Which of NIH's tables are not in the folder; any release of Data_Entry_2017, packed or not, will do."""
    folder = Path(folder)
    entries, *others = TABLES
    missing = [] if any(folder.glob("Data_Entry_2017*.csv*")) else [entries]
    return missing + [name for name in others if not (folder / name).is_file()]


def unpack(archive: str | os.PathLike, target: str | os.PathLike, *, stop: Event | None = None) -> int:
    """Unpack a tar archive of plain files into a new folder that appears whole, and return the number of files.

    Raises:
        WorkbenchError: something in it is no plain file or would land outside the folder, or it is damaged; then
            nothing is left of it.
    """
    archive, target = Path(archive), Path(target)
    part = target.with_name(target.name + ".part")
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
                plain = member.isfile() or member.isdir()
                if not plain or place.is_absolute() or ".." in place.parts:
                    what = "lies outside its folder" if plain else "is no plain file"
                    raise WorkbenchError(
                        f"{archive} holds `{member.name}`, which {what}: this is not NIH's archive, remove it."
                    )
                if member.isfile():
                    (part / place).parent.mkdir(parents=True, exist_ok=True)
                    with tar.extractfile(member) as source, (part / place).open("xb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                    files += 1
        os.replace(part, target)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise WorkbenchError(f"{archive} cannot be unpacked into {target}: {error}.") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return files


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
            told = " ".join(filter(None, failed.values()))
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
                os.replace(part, whole)
            self.say(f"{archive.name}: whole, its MD5 is right; unpacking ...")
            files = unpack(whole, self.folder / archive.folder, stop=self.stop)
            if not self.keep_archives:
                whole.unlink()
        except OSError as error:
            # Most often a full disk, which the others will meet as well.
            self.stop.set()
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
            except (_Again, requests.RequestException) as error:
                reason = _reason(error)
            reached = _bytes_in(part)
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            self.pause_after(archive, f"{reason}, {reached / 1e6:,.1f} MB are here", failures)

    def transfer(self, archive: Archive, part: Path) -> None:
        """One request for the bytes that the part still lacks, appended to it."""
        have = _bytes_in(part)
        with self.request(archive, start=have) as response:
            total = _total_of(response)
            if response.status_code == 416:  # there is nothing beyond what is here
                if total == have:
                    return
                self.forget(part)
                raise _Again(f"the part had {have} bytes and the archive has {total}")
            if response.status_code == 206 and _start_of(response) != have:
                self.forget(part)
                raise _Again("the server sent other bytes than it was asked for")
            if response.status_code == 200:  # the whole archive, whatever was asked for
                self.forget(part)
            with part.open("ab") as file:
                for chunk in response.iter_content(CHUNK):
                    if self.stop.is_set():
                        raise _Stopped
                    file.write(chunk)
                    self.count(len(chunk))
        if total and _bytes_in(part) != total:
            raise _Again(f"the connection ended after {_bytes_in(part)} of {total} bytes")

    @contextmanager
    def request(self, archive: Archive, *, start: int, end: int | str = "") -> Iterator[requests.Response]:
        # Without `identity` a server may pack the archive again, and byte ranges would count other bytes.
        headers = {"Accept-Encoding": "identity"}
        if start or end != "":
            headers["Range"] = f"bytes={start}-{end}"
        with requests.get(archive.url, headers=headers, stream=True, timeout=self.timeout) as response:
            status = response.status_code
            if status in (408, 429) or status >= 500:
                raise _Again(f"the server answered {status} {response.reason}")
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
                self.pause_after(archive, _reason(error), failures)
            except WorkbenchError:
                return 0  # told when its turn comes, so that the others are fetched before
        raise AssertionError("pause_after gives up after the last attempt")

    def pause_after(self, archive: Archive, reason: str, failures: int) -> None:
        if failures >= self.attempts:
            raise WorkbenchError(
                f"{archive.name}: {reason}; {failures} tries in a row brought nothing new from {archive.url}."
            )
        seconds = min(self.pause * 2 ** (failures - 1), LONGEST_PAUSE)
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
    handle = os.open(folder, os.O_RDONLY)
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


def _reason(error: Exception) -> str:
    """A network error in a few words; what requests says itself fills half a screen."""
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "nothing came any more"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    if isinstance(error, requests.ConnectionError):
        return "there is no connection"
    return str(error)


def _bytes_in(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
