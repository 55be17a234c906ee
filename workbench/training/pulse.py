"""A rank's signs of life: what it is doing, how far it has come, whether it computes.

A rank counts its steps with `beat`; a thread of its own passes that on every second, so that a rank that is stopped
falls silent and one that hangs says so. `Watch` gets the signs of all ranks and finds out which one the others wait
for. A beat is also where a rank that was asked to stop does so: nothing is half done there.

    pulse.beat("step 3 of epoch 1")              # on the rank, wherever it gets on
    with pulse.told(publish):                    # publish(sign) is called every second
        ...
    watch = pulse.Watch(limit=45)                # on the client
    watch.hear(rank, sign, now)
    watch.find_fault(waiting, now)               # None, or (rank or None, what is wrong with it)
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from workbench import Interrupted

PACKAGE = str(Path(__file__).parents[1])
EVERY = 1.0  # seconds between two signs
BUSY = 0.15  # cores, in user mode, from which on a rank computes, however slowly; less where others want them too
PATIENCE = 10  # times the limit, for a rank that computes, or that said it would take long
STARTING = {"number": 0, "beats": 0, "doing": "starting", "patience": PATIENCE, "exchanging": False, "measured": {}}
UNHEARD = STARTING | {"at": "before its first sign", "cpu": 0.0, "load": 1.0}

_state, _asked_to_stop = dict(STARTING), False
_uncounted: set[str] = set()  # ids of threads


def beat(doing: str, *, patience: int = 1, stops: bool = True) -> None:
    """Say that this rank gets on, and what it does now.

    Args:
        doing: in words, such as "step 3 of epoch 1".
        patience: how many times the usual limit this may take without the processor, such as for a download.
        stops: whether a rank that was asked to stop does so here; False where little is left to be kept.

    Raises:
        Interrupted: this rank was asked to stop.
    """
    if _asked_to_stop and stops:
        raise Interrupted(f"before {doing}")
    _state.update(beats=_state["beats"] + 1, doing=doing, patience=patience)


def measure(**measured: float) -> None:
    """Have the next signs carry figures of this rank, such as its images per second, beside the ones before."""
    _state["measured"] = _state["measured"] | measured


@contextmanager
def exchange() -> Iterator[None]:
    """Mark a block in which this rank may have to wait for the others: who is in one is not who is waited for."""
    before, _state["exchanging"] = _state["exchanging"], True
    try:
        yield
    finally:
        _state["exchanging"] = before


@contextmanager
def uncounted() -> Iterator[None]:
    """Leave the threads that are begun in this block out of what a rank computes.

    Horovod's thread looks around a thousand times a second while the rank hangs or waits: seen as 0.01 to 0.2 cores,
    which is as much as a rank that computes on a busy machine.
    """
    before = set(os.listdir("/proc/self/task"))
    try:
        yield
    finally:
        _uncounted.update(set(os.listdir("/proc/self/task")) - before)


@contextmanager
def told(publish: Callable[[dict], None]) -> Iterator[None]:
    """Publish a sign at once and every second until the block ends.

    A sign has `number` (of the sign), `beats` (so far), `doing`, `patience`, `at` (file, line and function of this
    package that the calling thread is in), `cpu` (user seconds, without `uncounted` threads), `load` (how many want
    each core of the host, 1 or more) and `measured`: what `measure` was given, and `memory`, the bytes that this
    process holds of the host's. While the block runs, SIGINT asks this rank to stop at its next beat.
    """
    global _asked_to_stop
    ended, here = threading.Event(), threading.get_ident()
    # A function that never beats is given all the patience there is.
    _state.update(STARTING)
    _asked_to_stop = False

    def tell() -> None:
        while True:
            _state["number"] += 1
            measured = _state["measured"] | {"memory": psutil.Process().memory_info().rss}
            publish(_state | {"at": _place(here), "cpu": _computed(), "load": _load(), "measured": measured})
            if ended.wait(EVERY):
                return

    thread = threading.Thread(target=tell, name="pulse", daemon=True)
    thread.start()
    before = signal.signal(signal.SIGINT, _ask_to_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        ended.set()
        thread.join()


def _computed() -> float:
    """User seconds of this process, without those of its uncounted threads."""
    without = 0.0
    for thread in _uncounted:
        try:
            told = Path(f"/proc/self/task/{thread}/stat").read_text()
        except OSError:  # it has ended
            continue
        without += int(told.rpartition(")")[2].split()[11]) / os.sysconf("SC_CLK_TCK")
    return os.times().user - without


def _load() -> float:
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def _ask_to_stop(_number, _frame) -> None:
    global _asked_to_stop
    _asked_to_stop = True


@dataclass
class _Heard:
    """What is known of one rank; times are seconds of a clock that is never set."""

    sign: dict
    at: float  # when its newest sign came
    moved: float  # when its beats last changed
    cpu: float  # its processor time then

    def still(self, now: float) -> float:
        return now - self.moved

    def busy(self, now: float) -> bool:
        return self.sign["cpu"] - self.cpu > BUSY * self.still(now) / self.sign["load"]

    def told(self) -> str:
        return f"{self.sign['doing']} ({self.sign['at']})"


@dataclass
class Watch:
    """Judges the signs of life of some ranks.

    Attributes:
        limit: seconds that a rank may be silent, or stand still without computing.
    """

    limit: float
    _heard: dict[int, _Heard] = field(default_factory=dict)
    _looked: float | None = None

    def hear(self, rank: int, sign: dict | None, now: float) -> None:
        """Take the newest sign of a rank, or None as long as it has given none, at `now` (monotonic seconds)."""
        known = self._heard.setdefault(rank, _Heard(UNHEARD, now, now, 0.0))
        if sign is None or sign["number"] == known.sign["number"]:
            return
        if sign["beats"] != known.sign["beats"]:
            known.moved, known.cpu = now, sign["cpu"]
        known.sign, known.at = sign, now

    def measured(self) -> list[dict]:
        """What each rank measured of itself, in rank order: see `told`; empty where it has given no sign yet."""
        return [self._heard[rank].sign.get("measured", {}) for rank in sorted(self._heard)]

    def find_fault(self, waiting: Iterable[int], now: float) -> tuple[int | None, str] | None:
        """Which of the ranks that are waited for keeps everybody waiting, and what is wrong; None if all is well.

        The rank is None where the signs do not tell them apart.
        """
        since, self._looked = now - (self._looked or now), now
        if since > self.limit / 3:
            # It is us who were away: a stopped notebook, a laptop that slept. Everybody begins anew.
            for known in self._heard.values():
                known.at, known.moved, known.cpu = now, now, known.sign["cpu"]
            return None
        ranks = {rank: self._heard[rank] for rank in waiting}
        silent = {rank: known for rank, known in ranks.items() if now - known.at > self.limit}
        if silent:
            rank = min(silent, key=lambda rank: silent[rank].at)
            if len(silent) == len(ranks) > 1:
                rank = None
            seconds = now - min(known.at for known in silent.values())
            last = "" if rank is None else f", last at {silent[rank].told()}"
            return rank, f"has given no sign of life for {seconds:.0f} s: stopped, or its host cannot be reached{last}"
        if not ranks:
            return None
        # Who waits in an exchange has done its part, even if waiting takes its processor.
        behind = {rank: known for rank, known in ranks.items() if not known.sign["exchanging"]} or ranks
        still = min(known.still(now) for known in ranks.values())
        busy = any(known.busy(now) for known in behind.values())
        patience = PATIENCE if busy else max(known.sign["patience"] for known in behind.values())
        if still <= self.limit * patience:
            return None
        # Of the others, who has come least far.
        least = min(known.sign["beats"] for known in behind.values())
        behind = {rank: known for rank, known in behind.items() if known.sign["beats"] == least}
        rank = next(iter(behind)) if len(behind) == 1 < len(ranks) else None
        where = "; ".join(f"rank {rank} in {known.told()}" for rank, known in behind.items())
        return rank, f"has not moved for {still:.0f} s, {where}"


def end_with_parent() -> None:
    """End this process within a second of its parent's end: a launcher that is killed takes nobody along."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(EVERY)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def _place(thread: int) -> str:
    """The innermost place in this package, or else anywhere, where a thread is now."""
    frame = sys._current_frames().get(thread)
    found = frame
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    found = frame or found
    if found is None:
        return "nowhere"
    return f"{Path(found.f_code.co_filename).name}:{found.f_lineno}, {found.f_code.co_name}"
