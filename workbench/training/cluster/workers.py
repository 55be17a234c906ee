"""The ranks of a running cluster: call a function on all of them at once, watch it, and learn who failed.

with cluster.start(workers=2) as ranks:          # a Workers
    summaries = ranks.run("workbench.training.trainer.train", config, folder, watch=shown)
"""

from __future__ import annotations

import collections
import importlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import ipyparallel

from workbench import Interrupted, WorkbenchError
from workbench.training import pulse
from workbench.training.cluster.lifetime import POLL, Processes

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

    def __init__(self, client: ipyparallel.Client, told: list[dict], cluster: Processes, hang_limit: float):
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
