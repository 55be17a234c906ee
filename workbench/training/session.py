"""A training from start to end on a cluster of its own, while the cell waits or in the background.

training = await session.train(config, root, workers=2)    # the cell waits; with `background=True` it returns at once
training.folder, training.stop()                           # in any later cell
summaries = await training.wait()                          # what each rank returned, when it has ended

The work is done in a thread, and a cell awaits it: a kernel that awaits answers the panel's button, and a page that is
reloaded, which one that blocks does not.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from workbench import Interrupted, WorkbenchError, one_line, runs
from workbench.training import cluster, progress
from workbench.training.config import TrainConfig
from workbench.training.sites import Site


class StillTraining(WorkbenchError):
    """It trains in the background, and the kernel that it would be waited for in is wanted for other cells."""


class Training:
    """A training that runs or has run; `folder` is the run's as soon as the workers are there."""

    def __init__(self, *, background: bool = False):
        self.folder: Path | None = None
        self._background = background
        self._ranks: cluster.Workers | None = None
        self._stops, self._over = 0, threading.Event()
        self._shown = False  # whether the run's progress tells the view how it ends
        self._summaries: list[dict] = []
        self._error: BaseException | None = None

    def stop(self) -> None:
        """Have it end at its next step, as the stop button does; a second time, at once."""
        self._stops += 1
        if self._ranks is not None:
            self._ranks.stop()

    async def wait(self) -> list[dict]:
        """Wait for its end and return what each rank returned; an interrupt stops it.

        In JupyterLab a training in the background is not waited for, since other cells would wait as well.

        Raises:
            StillTraining: it is in the background, somebody looks, and it has not ended.
            What `cluster.Workers.run` does, and WorkbenchError if the workers did not start.
        """
        if self._background and progress.looked_at() and not self._over.is_set():
            raise StillTraining(
                "The training goes on in the background, and the panel above shows it, in a page that is reloaded too. "
                "When it has ended, run this cell and those below: Run, then Run Selected Cell and All Below."
            )
        with _on_interrupt(self.stop):
            while not self._over.is_set():
                try:
                    await asyncio.sleep(0.2)
                except asyncio.CancelledError:  # an interrupt that came before this waited
                    self.stop()
        if self._error is not None:
            raise self._error
        return self._summaries

    def _look(self) -> None:
        """Ends the start of the workers, which may wait for hours in a queue."""
        if self._stops:
            raise Interrupted("Interrupted before the first step: nothing was written.")

    def _run(self, config, root, run, resume, where, record, facts, show) -> None:
        with cluster.start(**where, environment=config.horovod_environment(), look=self._look) as ranks:
            self._ranks = ranks
            self._look()
            self.folder = runs.open_run(root, run, resume=resume, parameters=record)
            runs.update_run(self.folder, **facts)
            hosts = ", ".join(sorted(set(ranks.hosts)))
            print(f"{len(ranks)} ranks on {hosts}, into {self.folder.relative_to(root)}", flush=True)
            with progress.watch(self.folder, show=show) as watching:
                self._shown = True
                if self._stops:
                    raise Interrupted(f"Interrupted before the first step. {runs.how_to_resume(self.folder)}")
                self._summaries = ranks.run(
                    "workbench.training.trainer.train",
                    config,
                    self.folder,
                    resume=resume,
                    watch=watching,
                    advice=runs.how_to_resume(self.folder),
                )

    def _run_aside(self, *settings, show) -> None:
        began = time.monotonic()
        try:
            self._run(*settings, show)
        except BaseException as error:  # whoever waits gets it
            self._error = error
            if not self._shown:
                status, said = "interrupted" if isinstance(error, Interrupted) else "failed", one_line(str(error))
                nothing = {
                    "run": self.folder.name if self.folder else "training",
                    "progress": {"history": []},
                    "losses": [],
                }
                show(nothing | {"status": status, "said": said, "seconds": time.monotonic() - began})
            if self._background:
                print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            self._over.set()


@contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """Have SIGINT (Ctrl-C, JupyterLab's stop button) call this, each time, instead of breaking off what awaits."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


async def train(
    config: TrainConfig,
    root: str | os.PathLike,
    *,
    run: str = "",
    resume: bool = False,
    workers: int,
    threads: int = 0,
    hang_limit: float = cluster.HANG_LIMIT,
    site: Site | None = None,
    record: Mapping | None = None,
    facts: Mapping | None = None,
    background: bool = False,
) -> Training:
    """Start workers, open the run, train on it, show it, and stop the workers.

    Args:
        config: the settings of the training.
        root: the project's top folder.
        run, resume: as for `runs.open_run`.
        workers, threads, hang_limit, site: as for `cluster.start`.
        record: the parameters that a new run's record keeps.
        facts: entries of the run's record, known before it begins.
        background: return at once, and leave the kernel to other cells.

    Raises:
        What `Training.wait` does, unless it is in the background.
    """
    training = Training(background=background)
    # Displayed by the cell that asks, whoever keeps it up to date.
    show = progress.view(training.stop)
    where = {"workers": workers, "threads": threads, "hang_limit": hang_limit, "site": site}
    settings = (config, Path(root), run, resume, where, record, dict(facts or {}))
    aside = {"target": training._run_aside, "args": settings, "kwargs": {"show": show}}
    threading.Thread(**aside, name="training", daemon=True).start()
    if not background:
        await training.wait()
    return training
