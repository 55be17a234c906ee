"""Start, use, watch and stop the MPI ranks that train: an ipyparallel cluster here, over ssh, or in a Slurm job.

An ipyparallel controller and `mpiexec` with one engine per rank are started and stopped again when the block ends,
however it ends; they also end when this process is killed. The controller is on this host, on loopback unless
workers run elsewhere. Results come in the order of the MPI ranks, which is not that of ipyparallel's engine ids. The
client imports no TensorFlow: functions are named.

    with cluster.start(workers=2) as workers:
        summaries = workers.run("workbench.training.trainer.train", config, folder, watch=shown)
    with cluster.start(workers=16, site=sites.read_site(root, "gpu")) as workers:
        ...
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CalledProcessError

import ipyparallel
from traitlets.config import Config

from workbench import WorkbenchError
from workbench.training import hosts, launch
from workbench.training.cluster.lifetime import Processes
from workbench.training.cluster.workers import STOPPING, WorkerError, Workers
from workbench.training.sites import Site

__all__ = ["HANG_LIMIT", "RECORDING", "STOPPING", "WorkerError", "Workers", "default_workers", "start"]

DRIVER = Path("/proc/driver/nvidia/gpus")  # where NVIDIA's driver lists its devices
HANG_LIMIT = 45.0  # seconds; with what ending takes, a user learns within a minute
LEAST_HANG_LIMIT = 5.0  # seconds; signs come every second, and a busy machine delays them
# An engine is let in at the next beat but one: at ipyparallel's own pace, of three seconds, starting takes 7 s, not 3.
# It is given up after the same half minute of silence.
HEARTBEAT = ("period=500", "max_heartmonitor_misses=60")
# Horovod: in the environment of ranks that are to record timelines. Not of all: told so, it keeps a thread on rank 0
# that never sleeps, and takes half a core wherever ranks are idle or share their cores.
RECORDING = {"HOROVOD_TIMELINE": "DYNAMIC"}


def default_workers(site: Site | None = None) -> int:
    """As many workers as a place takes; on this host one per GPU, or per core where there is none.

    Measured on two cores: two ranks of one thread train 1.18 times as fast as one process of two.
    """
    if site and site.slots:
        return site.slots
    gpus = len(list(DRIVER.iterdir())) if DRIVER.is_dir() else 0
    return gpus or len(os.sched_getaffinity(0))


@contextmanager
def start(
    workers: int,
    *,
    threads: int = 0,
    oversubscribe: bool = False,
    timeout: float = 120,
    hang_limit: float = HANG_LIMIT,
    site: Site | None = None,
    environment: dict[str, str] | None = None,
    look: Callable[[], None] = lambda: None,
) -> Iterator[Workers]:
    """Start MPI ranks, and stop them when the block ends.

    Of a Slurm job the script is printed before it is sent, and how it stands in the queue while it waits there.

    Args:
        workers: number of ranks.
        threads: cores that each rank is bound to; 0 shares the machine's cores out evenly, or takes the site's own.
        oversubscribe: allow more ranks than this host has cores (unbound; for tests, not for speed).
        timeout: seconds that starting may take, without the time in a queue.
        hang_limit: seconds for which a rank may give no sign of life, or all may stand still without computing.
        site: where they run; None: on this host.
        environment: further variables for the ranks, such as `TrainConfig.horovod_environment()`.
        look: called before anything is started and then until all ranks have come; what it raises ends the start.

    Raises:
        WorkbenchError: there are not that many cores or slots, a host or Slurm says no, or the ranks did not come up in
            time.
    """
    site = site or Site()
    if hang_limit < LEAST_HANG_LIMIT:
        raise WorkbenchError(f"`hang_limit` is {hang_limit}: it has to be {LEAST_HANG_LIMIT} seconds or more.")
    if site.kind == "local":
        _check_cores(workers, threads, oversubscribe)
    site.check_workers(workers)
    folder = _make_folder(site)
    try:
        # Other users of a host can reach its loopback as well, and a network even more: without the key, which is in
        # files that only this user can read, nobody connects.
        config = Config()
        arguments = ["--IPController.enable_curve=True", *(f"--HeartMonitor.{name}" for name in HEARTBEAT)]
        controller = [*launch.guarded(folder), sys.executable, "-m", "ipyparallel.controller", *arguments]
        config.LocalControllerLauncher.controller_cmd = controller
        variables = launch.ENGINE_ENVIRONMENT | {"WORKBENCH_SCRATCH": folder} | (environment or {})
        launch.LAUNCHING[site.kind](config, site, folder, workers, threads or site.cpus_per_task, variables)
        made = ipyparallel.Cluster(
            n=workers,
            engines="slurm" if site.kind == "slurm" else "mpi",
            controller_ip="127.0.0.1" if site.kind == "local" else hosts.own_address(site),
            # Elsewhere the key is read from the shared folder: Slurm and ssh would carry an environment in the open.
            send_engines_connection_env=site.kind == "local",
            profile_dir=folder,
            load_profile=False,
            cluster_file="",
            delay=0,
            engine_timeout=int(timeout),
            log=_quiet_log(),
            config=config,
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    processes = Processes(made, folder, site)
    try:
        try:
            client, told = processes.connect(workers, timeout, hang_limit, look)
        except (TimeoutError, ipyparallel.error.IPythonError, OSError, RuntimeError, CalledProcessError) as error:
            raise WorkbenchError(processes.why_not(workers, timeout, error)) from None
        # An engine's id is the order in which it registered; its rank is what MPI says.
        yield Workers(client, told, processes, hang_limit)
    finally:
        processes.end()


def _check_cores(workers: int, threads: int, oversubscribe: bool) -> None:
    cores = len(os.sched_getaffinity(0))
    if threads > cores and not oversubscribe:
        raise WorkbenchError(f"`threads` {threads} is more than the {cores} cores of this machine: use 0 to {cores}.")
    if workers < 1 or (workers * max(threads, 1) > cores and not oversubscribe):
        each = f" of {threads} cores each" if threads > 1 else ""
        raise WorkbenchError(
            f"`workers` {workers}{each} cannot be started on this machine with {cores} cores: ask for "
            f"1 to {cores // max(threads, 1)}."
        )


def _make_folder(site: Site) -> str:
    """The cluster's own folder, for this user alone; where the workers' hosts see it too."""
    if site.kind == "local":
        return tempfile.mkdtemp(prefix="workbench-cluster-")
    shared = Path(site.folder).expanduser().resolve()
    try:
        shared.mkdir(parents=True, exist_ok=True, mode=0o700)
        return tempfile.mkdtemp(prefix="workbench-", dir=shared)
    except OSError as error:
        raise WorkbenchError(
            f"The `folder` {shared} of cluster {site.name} cannot be used: {error.strerror}."
        ) from None


def _quiet_log() -> logging.Logger:
    log = logging.getLogger("workbench.cluster")
    log.setLevel(logging.CRITICAL)  # what matters is raised; the rest would only fill the notebook
    return log
