"""Asks the machine: commands, cores, memory, disks, GPU driver, Slurm. Says what is there, never whether it is enough.

Commands get a bound in time, and what they started ends with them. Imports nothing heavy; `doctor` and `preflight`
judge what is told here.

    from workbench import machine
    machine.usable_cores(), machine.available_memory()
    machine.read_speed(["data/shards/nih/train-00000-of-00305.tfrecord"]).bytes_per_second
    machine.run_python("import json; print(json.dumps({'answer': 42}))", timeout=10)["answer"]
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia")  # NVIDIA's driver: its version, and its devices, whoever uses them
TOPOLOGY = Path("/sys/devices/system/cpu")
MPI_ENVIRONMENT = {
    # Open MPI refuses root unless told twice; containers are root more often than not.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # Without this a waiting rank spins on the core that the other one needs.
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Reading:
    """How fast files were read: bytes, seconds, and the share of them that this host's cache still held before."""

    bytes: int
    seconds: float
    cached: float

    @property
    def bytes_per_second(self) -> float:
        """The speed."""
        return self.bytes / max(self.seconds, 1e-9)


@dataclass(frozen=True)
class Partition:
    """A partition of Slurm, as `sinfo` tells it: how many nodes are in which state, and its limit of time."""

    name: str
    default: bool
    up: bool
    limit: str
    nodes: dict[str, int]
    cores: int  # of one node
    gpus: str  # of one node, as Slurm names them; empty: none


def find_mpiexec() -> Path | None:
    """The environment's own mpiexec, else the first on PATH, else None."""
    own = Path(sys.executable).with_name("mpiexec")
    found = own if own.exists() else shutil.which("mpiexec")
    return Path(found) if found else None


def run_python(code: str, *given: str, timeout: float, before: Sequence[str] = ()) -> dict:
    """The JSON that this code prints last, run by this Python; or {"error": why there is none}.

    Args:
        code: what `python -c` executes.
        *given: its `sys.argv[1:]`.
        timeout: seconds.
        before: a command that starts it, such as mpiexec with its arguments.
    """
    done = run([*before, sys.executable, "-c", code, *given], timeout)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": last_line(done)}


def run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command, and end it with all that it started when the time is over or this process is interrupted."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | MPI_ENVIRONMENT,
        start_new_session=True,
    ) as process:
        try:
            out, told = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 124, "", f"no answer within {timeout:g} s")
        finally:
            if process.poll() is None:
                _end(process)
    return subprocess.CompletedProcess(command, process.returncode, out, told)


def _end(process: subprocess.Popen) -> None:
    # mpiexec ends its ranks when it is asked to; they stand in process groups of their own.
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a failed command said last; of Python's errors that is the line that counts."""
    lines = [line for line in done.stderr.splitlines() if line.strip(" -*")]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return (errors or lines or [f"ended with status {done.returncode} and said nothing"])[-1].strip()


def usable_cores() -> float:
    """Hardware threads that this process may use; a fraction where a container or a batch job grants one."""
    return min(len(os.sched_getaffinity(0)), granted_cores())


def granted_cores() -> float:
    """The cores that a container or a batch job grants by its control groups; infinite without a limit."""
    limits = [limit.split() for limit in _cgroup("cpu.max")]
    return min((int(quota) / int(period) for quota, period in limits if quota != "max"), default=float("inf"))


def is_busy() -> bool:
    """Whether other programs keep this host's cores busy, so that what is timed takes longer than it would alone."""
    return os.getloadavg()[0] > 1.25 * (os.cpu_count() or 1)


def physical_cores() -> int | None:
    """Cores behind the hardware threads that this process may use; None where the kernel does not say."""
    try:
        siblings = {
            (TOPOLOGY / f"cpu{number}" / "topology" / "thread_siblings_list").read_text()
            for number in os.sched_getaffinity(0)
        }
    except OSError:
        return None
    return len(siblings)


def available_memory() -> int:
    """Bytes that can still be taken in the machine, or all that a container or a batch job grants if that is less."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    return min([available, *(int(limit) for limit in _cgroup("memory.max") if limit != "max")])


def _cgroup(name: str) -> Iterator[str]:
    """What this file says in this process's control group and in those above it, where there is one."""
    own = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    for group in [Path(own[0]), *Path(own[0]).parents] if own else []:
        with suppress(OSError):
            yield (Path("/sys/fs/cgroup") / group.relative_to("/") / name).read_text().strip()


def gpus_present() -> int:
    """GPUs in the machine by NVIDIA's driver, whether or not this process may use them."""
    devices = DRIVER / "gpus"
    return len(list(devices.iterdir())) if devices.is_dir() else 0


def driver_version() -> str:
    """The version of NVIDIA's driver, such as "550.54.15"; empty where there is none, or it does not say."""
    try:
        told = (DRIVER / "version").read_text(errors="replace")
    except OSError:
        return ""
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", told)
    return found[1] if found else ""


def existing_folder(path: str | os.PathLike) -> Path:
    """The path itself if it is a folder, else the nearest one above it: where a folder to come will lie."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def read_speed(paths: Sequence[str | os.PathLike], *, most: int = 256 * 2**20, seconds: float = 5.0) -> Reading:
    """Read files from the disk, as training does: one after the other, from begin to end.

    Their pages are put out of this host's cache first (`posix_fadvise`), which not every file system does, so what is
    still held is told. A file server's own cache is out of reach.

    Args:
        paths: files; as many are read as fit.
        most: bytes to read.
        seconds: after which no further piece is read.

    Raises:
        OSError: a file cannot be read.
    """
    total, held, took = 0, 0, 0.0
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            # What is not on the disk yet cannot be put out of the cache.
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            held += cached_bytes(handle)
            began = time.perf_counter()
            while total < most and took + time.perf_counter() - began < seconds:
                piece = os.read(handle, 2**20)
                if not piece:
                    break
                total += len(piece)
            took += time.perf_counter() - began
        finally:
            os.close(handle)
        if total >= most or took >= seconds:
            break
    return Reading(total, took, min(held / total, 1.0) if total else 0.0)


def cached_bytes(handle: int) -> int:
    """How many bytes of an open file this host's page cache holds; all of them where the kernel does not tell us."""
    size = os.fstat(handle).st_size
    if not size:
        return 0
    pages = -(-size // mmap.PAGESIZE)
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    library.munmap.argtypes = library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.mincore.argtypes = [*library.mincore.argtypes, ctypes.c_char_p]
    # Python's own mmap gives no address of a mapping that is only to be read.
    address = library.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        return size
    told = ctypes.create_string_buffer(pages)
    failed = library.mincore(address, size, told)
    library.munmap(address, size)
    return size if failed else min(sum(page & 1 for page in told.raw) * mmap.PAGESIZE, size)


def read_partitions(timeout: float = 15.0) -> list[Partition] | str | None:
    """Slurm's partitions by `sinfo`; None where there is no Slurm, a text of what went wrong where it does not answer.

    See https://slurm.schedmd.com/sinfo.html for the fields.
    """
    sinfo = shutil.which("sinfo")
    if sinfo is None:
        return None
    done = run([sinfo, "--noheader", "--format=%P|%a|%l|%D|%T|%c|%G"], timeout)
    if done.returncode:
        return last_line(done)
    found: dict[str, Partition] = {}
    for line in filter(None, map(str.strip, done.stdout.splitlines())):
        name, up, limit, count, state, cores, gpus = [part.strip() for part in line.split("|", 6)]
        plain = name.rstrip("*")
        nodes = dict(found[plain].nodes) if plain in found else {}
        # A mark behind the state says more of it, such as `*` for a node that does not answer.
        nodes[state] = nodes.get(state, 0) + int(count)
        found[plain] = Partition(
            name=plain,
            default=name.endswith("*"),
            up=up == "up",
            limit=limit,
            nodes=nodes,
            cores=int(cores.rstrip("+") or 0),
            gpus="" if gpus in ("(null)", "N/A") else gpus,
        )
    return list(found.values())
