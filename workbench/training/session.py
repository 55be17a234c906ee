"""A training from start to end on a cluster of its own, while the cell waits or in the background.

training = session.train(config, root, workers=2, background=True)    # returns at once
training.folder, training.stop()                                      # in any later cell
summaries = training.wait()                                           # what each rank returned, when it has ended
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

from workbench import Interrupted, WorkbenchError, runs
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
        self._summaries: list[dict] = []
        self._error: BaseException | None = None

    def stop(self) -> None:
        """Have it end at its next step, as the stop button does; a second time, at once."""
        self._stops += 1
        if self._ranks is not None:
            self._ranks.stop()

    def wait(self) -> list[dict]:
        """Wait for its end and return what each rank returned; an interrupt stops it.

        In JupyterLab a training in the background is not waited for: a kernel that runs a cell answers neither other
        cells nor a page that was reloaded.

        Raises:
            StillTraining: it is in the background, somebody looks, and it has not ended.
            What `cluster.Workers.run` does, and WorkbenchError if the workers did not start.
        """
        if self._background and progress.looked_at() and not self._over.is_set():
            raise StillTraining(
                "The training goes on in the background, and the panel above shows it, in a page that is reloaded too. "
                "When it has ended, run this cell and those below: Run, then Run Selected Cell and All Below."
            )
        while not self._over.is_set():
            try:
                self._over.wait(0.2)
            except KeyboardInterrupt:
                self.stop()
        if self._error is not None:
            raise self._error
        return self._summaries

    def _run(self, config, root, run, resume, where, record, facts, show) -> None:
        with cluster.start(**where, environment=config.horovod_environment()) as ranks:
            self._ranks = ranks
            if self._stops:
                raise Interrupted("Interrupted before the first step: nothing was written.")
            self.folder = runs.open_run(root, run, resume=resume, parameters=record)
            runs.update_run(self.folder, **facts)
            hosts = ", ".join(sorted(set(ranks.hosts)))
            print(f"{len(ranks)} ranks on {hosts}, into {self.folder.relative_to(root)}", flush=True)
            with progress.watch(self.folder, show=show) as watching:
                self._summaries = ranks.run(
                    "workbench.training.trainer.train",
                    config,
                    self.folder,
                    resume=resume,
                    watch=watching,
                    advice=runs.how_to_resume(self.folder),
                )

    def _run_aside(self, *settings) -> None:
        try:
            self._run(*settings)
        except BaseException as error:  # whoever waits gets it
            self._error = error
            if not isinstance(error, WorkbenchError):
                raise
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            self._over.set()


def train(
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
        background: return at once, and leave the kernel to other cells, and to a page that is reloaded.

    Raises:
        What `Training.wait` does, unless it is in the background.
    """
    training = Training(background=background)
    # Displayed by the cell that asks, whoever keeps it up to date.
    show = progress.view(training.stop)
    where = {"workers": workers, "threads": threads, "hang_limit": hang_limit, "site": site}
    settings = (config, Path(root), run, resume, where, record, dict(facts or {}), show)
    if background:
        threading.Thread(target=training._run_aside, args=settings, name="training", daemon=True).start()
    else:
        try:
            training._run(*settings)
        finally:
            training._over.set()
    return training
