"""The controller and mpiexec of one cluster, or its job in Slurm: started, waited for, looked after and ended.

processes = Processes(made, folder, site)        # an ipyparallel.Cluster that is not started yet
client, told = processes.connect(workers, timeout, hang_limit, look)
processes.gone()                                 # "workers" or "controller" when these have ended
processes.end()                                  # nothing of it is left
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ipyparallel
import psutil
from traitlets.log import get_logger

from workbench import WorkbenchError
from workbench.training import launch, postmortem, slurm
from workbench.training.sites import Site

READY = "-- ready --"  # what a rank says before is ipyparallel's
POLL = 0.1  # seconds between two looks at the workers


class Processes:
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
        look()
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


def _introduce() -> dict:
    """Runs on an engine: who it is. From here on the engine ends with mpiexec, and says where it crashes."""
    import faulthandler

    from workbench.training import pulse

    pulse.end_with_parent()
    faulthandler.enable(sys.__stderr__)
    print(READY, file=sys.__stderr__, flush=True)
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or "0"
    return {"rank": int(rank), "host": socket.gethostname(), "pid": os.getpid()}


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
