"""Start, use, watch and stop the MPI ranks that train: an ipyparallel cluster here, over ssh, or in a Slurm job.

An ipyparallel controller and `mpiexec` with one engine per rank are started and stopped again when the block ends,
however it ends; they also end when this process is killed. The controller is on this host, on loopback unless
workers run elsewhere. Results come in the order of the MPI ranks, which is not that of ipyparallel's engine ids. The
client imports no TensorFlow: functions are named.

    with cluster.start(workers=2) as workers:
        summaries = workers.run("workbench.training.trainer.train", config, folder, watch=progress.watch())
    with cluster.start(workers=16, site=sites.read_site(root, "gpu")) as workers:
        ...
"""

from __future__ import annotations

import collections
import importlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import ipyparallel
import psutil
from traitlets.config import Config
from traitlets.log import get_logger

from workbench import Interrupted, WorkbenchError
from workbench.training import hosts, launch, postmortem, pulse, slurm
from workbench.training.sites import Site

DRIVER = Path("/proc/driver/nvidia/gpus")  # where NVIDIA's driver lists its devices
READY = "-- ready --"  # what a rank says before is ipyparallel's
POLL = 0.1  # seconds between two looks at the workers
HANG_LIMIT = 45.0  # seconds; with what ending takes, a user learns within a minute
LEAST_HANG_LIMIT = 5.0  # seconds; signs come every second, and a busy machine delays them
# An engine is let in at the next beat but one: at ipyparallel's own pace, of three seconds, starting takes 7 s, not 3.
# It is given up after the same half minute of silence.
HEARTBEAT = ("period=500", "max_heartmonitor_misses=60")
# Horovod: in the environment of ranks that are to record timelines. Not of all: told so, it keeps a thread on rank 0
# that never sleeps, and takes half a core wherever ranks are idle or share their cores.
RECORDING = {"HOROVOD_TIMELINE": "DYNAMIC"}
STOPPING = 20.0  # seconds that an interrupted run gets to come to the end of its step


class WorkerError(WorkbenchError):
    """A function failed on a worker: says which rank, and carries the worker's traceback."""

    def __init__(self, message: str, traceback: str = ""):
        super().__init__(message)
        self.traceback = traceback

    def _render_traceback_(self) -> list[str]:
        return [*self.traceback.splitlines(), f"{type(self).__name__}: {self}"]


class Workers:
    """The ranks of a running cluster."""

    def __init__(self, client: ipyparallel.Client, told: list[dict], cluster: _Processes, hang_limit: float):
        told = sorted(told, key=lambda engine: engine["rank"])
        self.hosts = [engine["host"] for engine in told]
        self._client = client
        self._engine_ids = [engine["id"] for engine in told]  # in rank order
        self._cluster = cluster
        self._hang_limit = hang_limit
        self._ended = ""
        self._stops = 0

    def __len__(self) -> int:
        return len(self._engine_ids)

    def run(
        self,
        function: str,
        *args: Any,
        watch: Callable[[dict], None] | None = None,
        advice: str = "",
        **kwargs: Any,
    ) -> list:
        """Call a function on all ranks at once and wait for all of them.

        Whatever ends it early ends all ranks with it. An interrupt (Ctrl-C, JupyterLab's stop button) lets rank 0 come
        to its next `pulse.beat`, a second one does not wait for that.

        Args:
            function: its full name, such as "workbench.training.trainer.train", imported on the workers.
            *args: for the function, on every rank; anything that can be pickled.
            watch: called here, while waiting, with each new state of rank 0's progress: all that the function
                has given to its `report` argument so far, the newest of each name, under "history" every row; and
                under "ranks" what each rank measured of itself (see `pulse.told`), at least every other second.
            advice: how to go on, added to the error of a rank that went or hangs, and to `Interrupted`.
            **kwargs: for the function as well.

        Returns:
            What the function returned, in rank order.

        Raises:
            WorkbenchError: the function raised one, on the rank that is named.
            WorkerError: the function raised something else, a worker died, or one hangs: it has given no sign of life
                for the cluster's `hang_limit`, or all stand still for that long and do not compute.
            Interrupted: the user asked to stop.
        """
        if self._ended:
            raise WorkbenchError(f"These workers have ended ({self._ended}): start others.")
        call = (function, args, kwargs, watch is not None)
        pending = {rank: self._client[engine].apply_async(_call, *call) for rank, engine in enumerate(self._engine_ids)}
        following = _Following(pending, pulse.Watch(limit=self._hang_limit), watch)
        give_up = None
        try:
            while following.waiting:
                try:
                    self._look(following)
                    if give_up and time.monotonic() > give_up:
                        raise Interrupted(f"Interrupted; rank 0 did not come to a step's end in {STOPPING:.0f} s.")
                    time.sleep(POLL)
                except KeyboardInterrupt:
                    self.stop()
                if self._stops > 1:
                    raise Interrupted("Interrupted twice, and ended at once.")
                if self._stops and not give_up:
                    give_up = time.monotonic() + STOPPING
                    print("Stopping at the next step; interrupt once more to end at once.", flush=True)
                    # Rank 0 writes all files; the others only wait for it, so they can be ended anywhere.
                    self._client.send_signal(signal.SIGINT, targets=self._engine_ids[0], block=False)
            return [pending[rank].get() for rank in sorted(pending)]
        except BaseException as error:
            self._ended = str(error).split(":")[0] or type(error).__name__
            self._cluster.end()
            if advice and isinstance(error, WorkerError | Interrupted):
                error.args = (f"{error} {advice}",)
            raise

    def stop(self) -> None:
        """Ask what runs to end at its next step, as an interrupt does; from any thread. Twice: at once."""
        self._stops += 1

    def _look(self, following: _Following) -> None:
        """One look at all ranks; raises what is wrong."""
        failed = following.take()
        if failed is not None:
            raise self._error_of(failed, following.pending)
        if not following.waiting:
            return
        gone = self._cluster.gone()
        if gone == "workers":
            raise self._death_of(None)
        if gone:
            raise WorkerError(f"The {gone} of the workers died: nobody passes their messages on, so they were ended.")
        fault = following.find_fault()
        if fault is not None:
            rank, wrong = fault
            who = f"Rank {rank} on {self.hosts[rank]}" if rank is not None else "Every rank"
            raise WorkerError(f"{who} {wrong}. All ranks were ended (`hang_limit` is {self._hang_limit:g} s).")

    def _error_of(self, rank: int, pending: dict) -> WorkbenchError:
        error = pending[rank].exception()
        if isinstance(error, ipyparallel.error.CompositeError):
            error = error.elist[0]
        name, value = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
        if name == "WorkbenchError":
            return WorkbenchError(f"{value.rstrip('.')} (rank {rank}).")
        if name == "Interrupted":
            return Interrupted(f"Interrupted {value}.")
        if name == "EngineError":
            return self._death_of(rank)
        return WorkerError(f"Rank {rank} failed with {name}: {value}", getattr(error, "traceback", "") or "")

    def _death_of(self, rank: int | None) -> WorkerError:
        """What is known of a worker that died; mpiexec knows best, since it ends the others after the first."""
        which, how, words = self._cluster.last_words(rank)
        if which is None and not words:
            return WorkerError(how)
        who = f"Rank {which} on {self.hosts[which]} died" if which is not None else "The workers are gone"
        return WorkerError(f"{who}: {how}{words}")


class _Following:
    """What has come so far of a call on all ranks."""

    def __init__(self, pending: dict, signs: pulse.Watch, watch: Callable[[dict], None] | None):
        self.pending, self.waiting = pending, dict(pending)
        self._signs, self._watch = signs, watch
        self._seen, self._shown, self._told = None, collections.Counter(), 0.0

    def take(self) -> int | None:
        """Pass on what is new, forget who is done; returns the rank that failed first, if one did."""
        done = {rank: result for rank, result in self.waiting.items() if result.ready()}
        now = time.monotonic()
        for rank, result in self.waiting.items():
            if rank in done:
                result.wait_for_output(2)  # it comes by another way than the result, and may come later
            for stream in ("stdout", "stderr"):
                text = getattr(result, stream)[self._shown[rank, stream] :]
                self._shown[rank, stream] += _show_output(rank, text, final=rank in done)
            self._signs.hear(rank, dict(result.data or {}).get("sign"), now)
        progress = dict(self.pending[0].data or {}).get("progress")
        if self._watch and progress and (progress != self._seen or now - self._told > 2 * pulse.EVERY):
            self._seen, self._told = progress, now
            self._watch(progress | {"ranks": self._signs.measured()})
        failed = [rank for rank, result in done.items() if not result.successful()]
        if failed:
            return min(failed, key=lambda rank: self.pending[rank].completed or 0)
        self.waiting = {rank: result for rank, result in self.waiting.items() if rank not in done}
        return None

    def find_fault(self) -> tuple[int | None, str] | None:
        return self._signs.find_fault(self.waiting, time.monotonic())


class _Processes:
    """The controller and mpiexec of a cluster, with all that they started on this host, and the job, if it has one."""

    def __init__(self, made: ipyparallel.Cluster, folder: str, site: Site):
        self._made, self._folder, self._site = made, folder, site
        self._job: slurm.Job | None = None
        self._client = None
        self._family: dict[int, psutil.Process] = {}
        self._controller: list[psutil.Process] = []
        self._killed_for_memory = postmortem.killed_for_memory()

    def connect(
        self, workers: int, timeout: float, hang_limit: float, look: Callable[[], None]
    ) -> tuple[ipyparallel.Client, list[dict]]:
        """Start everything, wait for all ranks, and return the client and what each rank says of itself."""
        deadline = time.monotonic() + timeout
        self._made.start_cluster_sync()
        with _signing_unasked():
            self._client = client = self._made.connect_client_sync()
        if self._site.kind == "slurm":
            self._job = slurm.Job(self._made.engine_set.job_id, self._site)
            self._job.wait_in_queue(look)
            deadline = time.monotonic() + timeout
        stopped_since: dict[int, float] = {}
        answers: dict[int, ipyparallel.AsyncResult] = {}
        while len(answers) < workers or not all(answer.ready() for answer in answers.values()):
            look()
            now = time.monotonic()
            for process in self._gather():
                if not postmortem.is_stopped(process):
                    stopped_since.pop(process.pid, None)
                elif now - stopped_since.setdefault(process.pid, now) > hang_limit:
                    raise WorkbenchError(
                        f"{postmortem.role(process)} was stopped from outside while the workers started, and did not "
                        f"go on for {hang_limit:g} s: everything was ended; start again."
                    )
            if gone := self.gone():
                raise ipyparallel.error.EngineError(f"the {gone} ended")
            if now > deadline:
                raise TimeoutError(self._who_did_not_come(workers, answers))
            for engine in set(client.ids) - answers.keys():
                answers[engine] = client[engine].apply_async(_introduce)
            time.sleep(POLL)
        told = [answer.get() | {"id": engine} for engine, answer in answers.items()]
        self._gather()
        controller = psutil.Process(self._made.controller.pid)
        self._controller = [controller, *controller.children(recursive=True)]
        return client, told

    def _who_did_not_come(self, workers: int, answers: dict[int, ipyparallel.AsyncResult]) -> str:
        """Which ranks of this host have not registered or not answered, as far as it is known."""
        came = {answer.get()["rank"] for answer in answers.values() if answer.ready() and answer.successful()}
        started = {postmortem.rank_of(process) for process in self._gather()} - {None}
        late = ", ".join(map(str, sorted(started - came))) or "none of them was started"
        return f"{len(came)} of {workers} came, waited for ranks: {late}"

    def gone(self) -> str:
        """ "workers" or "controller" when these processes have ended, else nothing."""
        if not self._workers_alive():
            return "workers"
        return "" if all(postmortem.alive(process.pid) for process in self._controller) else "controller"

    def _workers_alive(self) -> bool:
        return self._job.state().running if self._job else postmortem.alive(self._made.engine_set.pid)

    def last_words(self, rank: int | None) -> tuple[int | None, str, str]:
        """Which rank died first, how, and what it said last: (rank or None, how, words)."""
        # The engine's death is known before mpiexec has written about it.
        deadline = time.monotonic() + 10
        while self._workers_alive() and time.monotonic() < deadline:
            time.sleep(POLL)
        if self._job and self._job.end_of(10).word in slurm.ENDED_BY_SLURM:
            return None, self._job.explain(), ""
        lines = postmortem.log_lines(self._made.engine_set)
        if self._job and slurm.NODE_FAILURE in " ".join(lines):
            return None, self._job.explain("NODE_FAIL"), ""
        if host := postmortem.lost_host(lines):
            return None, f"Host {host} was lost: it was switched off, or its connection ended.", ""
        which, how = postmortem.read_mpiexec(lines, rank)
        if postmortem.killed_for_memory() > self._killed_for_memory:
            how += ", because this host ran out of memory (use a smaller `batch_size` or fewer `workers`)"
        said = [text for number, text in postmortem.tagged(lines) if number == which]
        said = said[said.index(READY) + 1 :] if READY in said else said
        return which, how, f". Its last words: {' / '.join(said[-3:])[:300]}." if said else "."

    def why_not(self, workers: int, timeout: float, error: Exception) -> str:
        """Why the workers did not start, as a sentence."""
        if self._job and not self._job.state().running and self._job.end_of(10).word in slurm.ENDED_BY_SLURM:
            return self._job.explain()
        refused = Path(self._folder, launch.SUBMITTING)
        if not self._job and refused.exists() and (said := refused.read_text(errors="replace")):
            return slurm.refusal(said, self._site)
        engines = self._made.engine_set
        lines = postmortem.log_lines(engines) if engines is not None else []
        which, how = postmortem.read_mpiexec(lines, None)
        words = [text for number, text in postmortem.tagged(lines) if which in (None, number)]
        said = " ".join(words)
        if which is not None:
            said = ": ".join(filter(None, [f"rank {which}: {how}", " / ".join(words[-3:])]))
        said = said[:400] or " ".join(line for line in lines if not line.startswith("["))[:400]
        late = f"did not come up within {timeout:.0f} s" if isinstance(error, TimeoutError) else "did not start"
        return f"The {workers} workers {late} ({said or error}): run `workbench doctor`, or ask for fewer."

    def end(self) -> None:
        """Stop everything that was started; whatever still lives afterwards is killed by its own id."""
        if self._client is not None:
            self._client.close(linger=0)
        with _uninterrupted():
            self._gather()
            try:
                self._made.stop_cluster_sync()
            except Exception as error:  # whatever it was, what is left is ended below
                logging.getLogger(__name__).debug("stopping the cluster: %r", error)
            if self._site.kind == "slurm":
                slurm.cancel(Path(self._folder).name)
                if self._job:
                    self._job.end_of(15)
            self._made.shutdown_atexit = False
            for process in self._family.values():
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(self._family.values(), timeout=10)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _gather(self) -> list[psutil.Process]:
        """All processes that were seen so far, with those that are new; a child outlives the parent that names it."""
        for launcher in (self._made.engine_set, self._made.controller):
            try:
                top = psutil.Process(launcher.pid)
                family = [top, *top.children(recursive=True)]
            except (AttributeError, TypeError, ValueError, psutil.NoSuchProcess):  # not started, or ended already
                continue
            for process in family:
                self._family.setdefault(process.pid, process)
        return list(self._family.values())


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
        look: called again and again until all ranks have come; what it raises ends the start.

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
    processes = _Processes(made, folder, site)
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


def _introduce() -> dict:
    """Runs on an engine: who it is. From here on the engine ends with mpiexec, and says where it crashes."""
    import faulthandler
    import os

    from workbench.training import pulse

    pulse.end_with_parent()
    faulthandler.enable(sys.__stderr__)
    print(READY, file=sys.__stderr__, flush=True)
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or "0"
    return {"rank": int(rank), "host": socket.gethostname(), "pid": os.getpid()}


def _call(function: str, args: tuple, kwargs: dict, reporting: bool) -> Any:
    """Runs on an engine: import a function by name and call it, publishing what it reports and signs of life."""
    from ipyparallel.datapub import publish_data

    module, name = function.rsplit(".", 1)
    # The client keeps only the last message, so that each carries the whole state; two threads send.
    state, lock = {"progress": {"history": []}, "sign": None}, threading.Lock()

    def publish(**news: dict) -> None:
        with lock:
            state.update(news)
            publish_data(dict(state))

    def report(progress: dict) -> None:
        known = state["progress"]
        history = known["history"] + ([progress["history"]] if "history" in progress else [])
        publish(progress=known | progress | {"history": history})

    if reporting:
        kwargs = kwargs | {"report": report}
    with pulse.told(lambda sign: publish(sign=sign)):
        return getattr(importlib.import_module(module), name)(*args, **kwargs)


def _show_output(rank: int, text: str, *, final: bool) -> int:
    """Print the whole lines of a worker's new output, each with its rank; returns the characters used."""
    whole = text if final else text[: text.rfind("\n") + 1]
    for line in whole.splitlines():
        print(f"[rank {rank}] {line}", flush=True)
    return len(whole)


@contextmanager
def _signing_unasked() -> Iterator[None]:
    """Connections that are encrypted and authenticated need no signed messages; jupyter_client warns all the same."""
    log, told = get_logger(), "Message signing is disabled"
    passes = lambda record: told not in record.getMessage()  # noqa: E731
    log.addFilter(passes)
    try:
        yield
    finally:
        log.removeFilter(passes)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Keep Ctrl-C from breaking off what has to be done to the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _quiet_log() -> logging.Logger:
    log = logging.getLogger("workbench.cluster")
    log.setLevel(logging.CRITICAL)  # what matters is raised; the rest would only fill the notebook
    return log
