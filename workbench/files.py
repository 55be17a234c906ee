"""Files that appear whole and stay, and folders that one process writes at a time. Knows nothing of runs or shards.

from workbench import files
with files.written_whole("results/first/history.csv") as part:
    part.write_text("epoch,loss\\n")                      # renamed into its place when the block ends
with files.held("results/first/.lock", "the run `first`"):  # refused while another process holds it
    ...
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workbench import WorkbenchError

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # a file system without locks


@contextmanager
def written_whole(path: str | os.PathLike, *, lasting: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path` and rename it into place if the block ends without an error.

    What was written is on the disk before it gets the name, so that a power cut leaves the old file or the new one;
    but for what is not `lasting`, such as what is written again a second later.

    Yields:
        A `Path` in the same folder, with the same suffix, to be written by the block.

    Raises:
        WorkbenchError: the disk is full or the folder cannot be written; the old file, if any, stays as it was.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        if lasting:
            sync(part)
        os.replace(part, path)
        if lasting:
            sync(path.parent)
    except OSError as error:
        # h5py and zipfile wrap the operating system's error in one of their own without a number.
        raise WorkbenchError(
            f"{path} cannot be written ({error.strerror or error}): "
            f"{'what was there before is unchanged; ' if path.exists() else ''}make room or allow writing, then go on."
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def remove_parts(folder: str | os.PathLike) -> None:
    """Remove what processes that were killed in `written_whole` left below a folder; hold its lock first."""
    for part in Path(folder).rglob(".*.part*"):
        part.unlink(missing_ok=True)


def sync(path: str | os.PathLike) -> None:
    """Have the operating system put a file, or the names in a folder, on the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems know no fsync of folders.
        if error.errno not in NO_LOCKS:
            raise
    finally:
        os.close(handle)


@contextmanager
def held(path: str | os.PathLike, what: str, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file for the time of the block.

    The lock belongs to the open file, so it ends with the process that holds it, however that ends: a lock file
    that is left behind is free. Processes on other hosts are seen as far as the file system shares locks.

    Args:
        path: the lock file, made if it is not there; it says who holds it, and stays.
        what: what is locked, as the error calls it.
        wait: seconds to wait for another holder to go; a long wait is announced.

    Raises:
        WorkbenchError: another process holds it, which is named, or the file cannot be made.
    """
    with _opened(path, what) as handle:
        # `is_held` takes the lock for a moment to look, which is no holder.
        deadline, announced = time.monotonic() + max(wait, 0.3), wait < 60
        while not _lock(handle):
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            if time.monotonic() > deadline:
                raise WorkbenchError(f"{what} is being written by {holder}: wait until that has ended, or end it.")
            if not announced:
                print(f"{what} is being written by {holder}: waiting until that has ended ...", flush=True)
                announced = True
            time.sleep(0.1)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield


@contextmanager
def made_by_one(folder: str | os.PathLike) -> Iterator[None]:
    """Hold a folder that is about to be made, by a lock file beside it, so that two who want the same make it once.

    The second one waits, for up to an hour, and finds it made. What a killed process left half written is removed.
    """
    folder = Path(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkbenchError(f"{folder} cannot be made ({error.strerror}): choose another folder.") from None
    with held(folder.with_name(f".{folder.name}.lock"), str(folder), wait=3600):
        remove_parts(folder)
        yield


def is_held(path: str | os.PathLike) -> bool:
    """Whether some process holds the lock file now."""
    if not os.path.exists(path):
        return False
    try:
        with _opened(path, "") as handle:
            return not _lock(handle)
    except WorkbenchError:  # not ours to open
        return False


@contextmanager
def _opened(path: str | os.PathLike, what: str) -> Iterator[int]:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise WorkbenchError(
            f"{what} cannot be written ({error.strerror}, {path}): allow writing there, or choose another place."
        ) from None
    try:
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
