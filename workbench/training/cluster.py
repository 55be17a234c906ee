"""Start, use, watch and stop the MPI ranks that train: an ipyparallel cluster on this host.

An ipyparallel controller and `mpiexec` with one engine per rank are started on loopback and stopped again when
the block ends, however it ends; they also end when this process is killed. Results come in the order of the MPI
ranks, which is not that of ipyparallel's engine ids. The client imports no TensorFlow: functions are named.

    with cluster.start(workers=2) as workers:
        summaries = workers.run("workbench.training.trainer.train", config, folder, watch=progress.watch())
"""

from __future__ import annotations

import collections
import importlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ipyparallel
import psutil
from traitlets.config import Config

from workbench import WorkbenchError

DRIVER = Path("/proc/driver/nvidia/gpus")  # where NVIDIA's driver lists its devices
POLL = 0.1  # seconds between two looks at the workers
ENGINE_ENVIRONMENT = {
    # Open MPI refuses root unless told twice; containers are root more often than not.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # Without this a waiting rank spins on the core that another thread computes on: 60 % of the speed.
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # Horovod: a rank that never comes ends the wait for it.
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "60",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "600",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


class WorkerError(WorkbenchError):
    """A function failed on a worker: says which rank, and carries the worker's traceback."""

    def __init__(self, message: str, traceback: str = ""):
        super().__init__(message)
        self.traceback = traceback

    def _render_traceback_(self) -> list[str]:
        return [*self.traceback.splitlines(), f"{type(self).__name__}: {self}"]


class Workers:
    """The ranks of a running cluster."""

    def __init__(self, client: ipyparallel.Client, engine_ids: list[int], hosts: list[str], launcher):
        self._client = client
        self._engine_ids = engine_ids  # in rank order
        self._launcher = launcher
        self.hosts = hosts

    def __len__(self) -> int:
        return len(self._engine_ids)

    def run(self, function: str, *args: Any, watch: Callable[[dict], None] | None = None, **kwargs: Any) -> list:
        """Call a function on all ranks at once and wait for all of them.

        Args:
            function: its full name, such as "workbench.training.trainer.train", imported on the workers.
            *args: for the function, on every rank; anything that can be pickled.
            watch: called here, while waiting, with each new state of rank 0's progress: all that the function
                has given to its `report` argument so far, the newest of each name, under "history" every row.
            **kwargs: for the function as well.

        Returns:
            What the function returned, in rank order.

        Raises:
            WorkbenchError: the function raised one, on the rank that is named.
            WorkerError: the function raised something else, or a worker died; the cluster is of no more use.
        """
        call = (function, args, kwargs, watch is not None)
        pending = {rank: self._client[engine].apply_async(_call, *call) for rank, engine in enumerate(self._engine_ids)}
        waiting, seen, shown = dict(pending), None, collections.Counter()
        while waiting:
            done = {rank: result for rank, result in waiting.items() if result.ready()}
            for rank, result in waiting.items():
                if rank in done:
                    result.wait_for_output(2)  # it comes by another way than the result, and may come later
                for stream in ("stdout", "stderr"):
                    text = getattr(result, stream)[shown[rank, stream] :]
                    shown[rank, stream] += _show_output(rank, text, final=rank in done)
            progress = dict(pending[0].data or {}).get("progress")
            if watch and progress and progress != seen:
                seen = progress
                watch(progress)
            failed = [rank for rank, result in done.items() if not result.successful()]
            if failed:
                raise self._error_of(min(failed, key=lambda rank: pending[rank].completed or 0), pending)
            waiting = {rank: result for rank, result in waiting.items() if rank not in done}
            if waiting and not _alive(self._launcher.pid):
                raise WorkerError(f"The workers are gone: {self._last_words()}")
            if waiting:
                time.sleep(POLL)
        return [pending[rank].get() for rank in sorted(pending)]

    def _error_of(self, rank: int, pending: dict) -> WorkbenchError:
        error = pending[rank].exception()
        if isinstance(error, ipyparallel.error.CompositeError):
            error = error.elist[0]
        name, value = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
        if name == "WorkbenchError":
            return WorkbenchError(f"{value.rstrip('.')} (rank {rank}).")
        if name == "EngineError":
            return WorkerError(f"Rank {rank} died: {self._last_words()}")
        return WorkerError(f"Rank {rank} failed with {name}: {value}", getattr(error, "traceback", "") or "")

    def _last_words(self) -> str:
        """What mpiexec said about a worker that died, on one line."""
        # The engine's death is known before mpiexec has written about it.
        deadline = time.monotonic() + 10
        while _alive(self._launcher.pid) and time.monotonic() < deadline:
            time.sleep(POLL)
        lines = _told(self._launcher)
        about = [line for line in lines if "signal" in line or "exit" in line]
        return " ".join(about[-2:] or lines[-3:])[:500] or "its log is empty."


def default_workers() -> int:
    """One worker per GPU of this host, or per core where there is none.

    Measured on two cores: two ranks of one thread train 1.18 times as fast as one process of two.
    """
    gpus = len(list(DRIVER.iterdir())) if DRIVER.is_dir() else 0
    return gpus or len(os.sched_getaffinity(0))


@contextmanager
def start(workers: int, *, threads: int = 0, oversubscribe: bool = False, timeout: float = 120) -> Iterator[Workers]:
    """Start MPI ranks on this host, and stop them when the block ends.

    Args:
        workers: number of ranks.
        threads: cores that each rank is bound to; 0 shares the machine's cores out evenly.
        oversubscribe: allow more ranks than there are cores (unbound; for tests, not for speed).
        timeout: seconds that starting may take.

    Raises:
        WorkbenchError: the machine has not that many cores, or the ranks did not come up in time.
    """
    cores = len(os.sched_getaffinity(0))
    if threads > cores and not oversubscribe:
        raise WorkbenchError(f"`threads` {threads} is more than the {cores} cores of this machine: use 0 to {cores}.")
    if workers < 1 or (workers * max(threads, 1) > cores and not oversubscribe):
        each = f" of {threads} cores each" if threads > 1 else ""
        raise WorkbenchError(
            f"`workers` {workers}{each} cannot be started on this machine with {cores} cores: ask for "
            f"1 to {cores // max(threads, 1)}."
        )
    folder = tempfile.mkdtemp(prefix="workbench-cluster-")
    made = ipyparallel.Cluster(
        n=workers,
        engines="mpi",
        controller_ip="127.0.0.1",
        profile_dir=folder,
        load_profile=False,
        cluster_file="",
        delay=0,
        engine_timeout=int(timeout),
        log=_quiet_log(),
        config=_launch_config(cores, workers, threads, oversubscribe),
    )
    client, processes = None, []
    try:
        try:
            client = made.start_and_connect_sync()
            told = client[:].apply_async(_introduce).get(timeout=timeout)
        except (TimeoutError, ipyparallel.error.IPythonError, OSError, RuntimeError) as error:
            raise WorkbenchError(_why_not(made, workers, timeout, error)) from None
        # An engine's id is the order in which it registered; its rank is what MPI says.
        engines = sorted(zip([t["rank"] for t in told], client.ids, [t["host"] for t in told], strict=True))
        here = socket.gethostname()
        processes = [psutil.Process(t["pid"]) for t in told if t["host"] == here and psutil.pid_exists(t["pid"])]
        yield Workers(client, [engine for _, engine, _ in engines], [host for *_, host in engines], made.engine_set)
    finally:
        _stop(made, client, processes)
        shutil.rmtree(folder, ignore_errors=True)


def _launch_config(cores: int, workers: int, threads: int, oversubscribe: bool) -> Config:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    found = str(mpiexec) if mpiexec.exists() else shutil.which("mpiexec")
    if found is None:
        raise WorkbenchError("There is no `mpiexec` beside this Python nor on PATH: install the environment again.")
    guard = [sys.executable, "-m", "workbench.training.guard", str(os.getpid())]
    each = threads or max(1, cores // workers)
    config = Config()
    config.MPIEngineSetLauncher.mpi_cmd = [*guard, found]
    if workers * each > cores:
        config.MPIEngineSetLauncher.mpi_args = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    else:
        # Horovod: every rank gets its own cores; `distributed.start` takes as many threads. Hardware threads are
        # what the affinity mask counts, so Open MPI is told to count them too.
        bound = ["--use-hwthread-cpus", "--map-by", f"slot:PE={each}", "--bind-to", "hwthread"]
        config.MPIEngineSetLauncher.mpi_args = bound
    config.MPIEngineSetLauncher.environment = ENGINE_ENVIRONMENT
    config.LocalControllerLauncher.controller_cmd = [*guard, sys.executable, "-m", "ipyparallel.controller"]
    return config


def _introduce() -> dict:
    """Runs on an engine: who it is."""
    import os
    import socket

    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or "0"
    return {"rank": int(rank), "host": socket.gethostname(), "pid": os.getpid()}


def _call(function: str, args: tuple, kwargs: dict, reporting: bool) -> Any:
    """Runs on an engine: import a function by name and call it, publishing what it reports."""
    from ipyparallel.datapub import publish_data

    module, name = function.rsplit(".", 1)
    state: dict = {"history": []}

    def report(progress: dict) -> None:
        # The client keeps only the last message, so that each carries the whole state.
        history = state["history"] + ([progress["history"]] if "history" in progress else [])
        state.update(progress, history=history)
        publish_data({"progress": dict(state)})

    if reporting:
        kwargs = kwargs | {"report": report}
    return getattr(importlib.import_module(module), name)(*args, **kwargs)


def _show_output(rank: int, text: str, *, final: bool) -> int:
    """Print the whole lines of a worker's new output, each with its rank; returns the characters used."""
    whole = text if final else text[: text.rfind("\n") + 1]
    for line in whole.splitlines():
        print(f"[rank {rank}] {line}", flush=True)
    return len(whole)


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _told(launcher) -> list[str]:
    """The lines of an engine set's log that are not ipyparallel's own: mpiexec's and the operating system's."""
    path = Path(launcher.output_file)
    # ipyparallel removes the log of an engine set that has stopped, and keeps its text.
    text = path.read_text(errors="replace") if path.exists() else launcher.get_output()
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if set(line) - set("-=* ") and "IPEngine" not in line and "Nanny" not in line]


def _why_not(made: ipyparallel.Cluster, workers: int, timeout: float, error: Exception) -> str:
    said = " ".join(_told(made.engine_set))[:400] if made.engine_set is not None else ""
    late = f"did not come up within {timeout:.0f} s" if isinstance(error, TimeoutError) else "did not start"
    return f"The {workers} workers {late} ({said or error}): run `workbench doctor`, or ask for fewer."


def _stop(made: ipyparallel.Cluster, client, processes: list[psutil.Process]) -> None:
    """Stop everything that was started; whatever still lives afterwards is killed by its own id."""
    if client is not None:
        client.close(linger=0)
    for launcher in (made.engine_set, made.controller):
        if launcher is not None and getattr(launcher, "pid", -1) > 0 and psutil.pid_exists(launcher.pid):
            processes = [*processes, psutil.Process(launcher.pid)]
            processes += processes[-1].children(recursive=True)
    try:
        made.stop_cluster_sync()
    except Exception as error:  # whatever it was, what is left is ended below
        logging.getLogger(__name__).debug("stopping the cluster: %r", error)
    made.shutdown_atexit = False
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)


def _quiet_log() -> logging.Logger:
    log = logging.getLogger("workbench.cluster")
    log.setLevel(logging.CRITICAL)  # what matters is raised; the rest would only fill the notebook
    return log
