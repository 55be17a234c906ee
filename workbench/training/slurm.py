"""A job of Slurm in which workers run: its script, how it stands, why it was refused or has ended.

The job is sent and cancelled by ipyparallel's launcher, see `workbench.training.cluster`.

    script = slurm.write_script(site, workers=8, name="workbench-1", log=log, command="ipengine --mpi")
    job = slurm.Job("17", site)
    job.state()                             # State("PENDING", "Resources"), asked at most every two seconds
"""

from __future__ import annotations

import getpass
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from workbench import WorkbenchError
from workbench.training.sites import FILE, Site

PATIENCE = 30.0  # seconds that one of Slurm's commands may take
EVERY = 2.0  # seconds between two questions about a job: many users ask the same controller
UNANSWERED = 60.0  # seconds for which Slurm may know nothing of a job, such as while its controller starts again
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SUSPENDED")
RUNNING = ("RUNNING", "STAGE_OUT", "SIGNALING")
ENDED_BY_SLURM = ("TIMEOUT", "CANCELLED", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")
NOT_SAID = 30.0  # seconds after which a reason is Slurm's last word that it also gives before it has looked closer
# Reasons for which a job waits for ever.
NEVER = ("PartitionTimeLimit", "PartitionNodeLimit", "BadConstraints", "AccountNotAllowed", "QOSNotAllowed",
         "InvalidAccount", "InvalidQOS", "QOSMaxNodePerUserLimit", "AssocMaxJobsLimit", "JobHeldAdmin")  # fmt: skip
# What every job that cannot begin at once is given first; it stays where no node fits, and nothing more is said.
AT_FIRST = "PartitionConfig"
UNKNOWN = "UNKNOWN"
NODE_FAILURE = "DUE TO NODE FAILURE"  # what srun says, some seconds before the job's state does


@dataclass(frozen=True)
class State:
    """How a job stands: Slurm's word for it, the reason it gives, and the nodes."""

    word: str
    reason: str = ""
    nodes: str = ""

    @property
    def queued(self) -> bool:
        """Whether it has not begun."""
        return self.word in QUEUED

    @property
    def running(self) -> bool:
        """Whether it has begun and not ended."""
        return self.word in RUNNING

    def told(self) -> str:
        """In a few words, for a user who waits."""
        if self.running:
            return f"running on {self.nodes}"
        return f"{self.word.lower()}{f' ({self.reason})' if self.reason not in ('', 'None') else ''}"


def write_script(site: Site, *, workers: int, name: str, log: Path, mpiexec: Sequence[str], command: str) -> str:
    """The job's script: what it asks for, how a host is set up, and mpiexec, which starts a worker for each task.

    Args:
        site: of kind "slurm".
        workers: ranks; as many nodes as they need are asked for, of those that the site has.
        name: the job's, by which it can be cancelled.
        log: the file that gets what the workers say; all nodes have to see it.
        mpiexec: the words of that command, without the number of ranks.
        command: what each rank runs, already quoted for a shell.
    """
    nodes = -(-workers // site.tasks_per_node)
    asked = {
        "job-name": name,
        "output": log,
        "nodes": nodes,
        "ntasks": workers,
        "ntasks-per-node": min(workers, site.tasks_per_node),
        "cpus-per-task": site.cpus_per_task,
        "gpus-per-node": site.gpus_per_node,
        "time": site.time,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in asked.items() if value not in ("", 0)]
    # A job that began anew would find its workers' connection gone.
    lines += ["#SBATCH --no-requeue", *(f"#SBATCH {option}" for option in site.options)]
    shell = "#!/bin/bash -l" if site.modules else "#!/bin/bash"
    return "\n".join([shell, *lines, *site.before, f"exec {shlex.join(mpiexec)} -n {workers} {command}", ""])


def refusal(said: str, site: Site) -> str:
    """What sbatch said to a job that it did not take, as a sentence with what to do."""
    lines = [line.strip().rstrip(".") for line in said.splitlines() if line.startswith("sbatch: error: ")]
    lines = dict.fromkeys(line.removeprefix("sbatch: error: ") for line in lines)
    there = " ".join(_call(["sinfo", "-h", "-o", "%P"]).stdout.split())
    partitions = f" Its partitions are {there.replace('*', ' (the default)')}." if there else ""
    return (
        f"Slurm refuses the job of cluster {site.name}: {'; '.join(lines) or said.strip() or 'it does not say why'}."
        f"{partitions} Change the cluster's settings in {FILE}."
    )


def quietly(command: str, errors: Path) -> list[str]:
    """One of Slurm's commands, whose errors go to a file instead of the user.

    Raises:
        WorkbenchError: there is no Slurm here.
    """
    if shutil.which(command) is None:
        raise WorkbenchError(f"There is no `{command}` here: start from a host on which Slurm's commands are.")
    return ["sh", "-c", f'exec {command} "$@" 2>"$0"', str(errors)]


class Job:
    """A job that was sent."""

    def __init__(self, number: str, site: Site):
        self.number, self.site = number, site
        self._state, self._asked, self._known = State("PENDING"), 0.0, time.monotonic()

    def state(self) -> State:
        """How it stands."""
        now = time.monotonic()
        if now - self._asked >= EVERY:
            state, self._asked = _read_state(self.number), now
            if state.word != UNKNOWN:
                self._known = now
            if state.word != UNKNOWN or now - self._known > UNANSWERED:
                self._state = state
        return self._state

    def wait_in_queue(self, look: Callable[[], None] = lambda: None) -> None:
        """Print how it stands until it runs, or has run; `look` is called again and again, and may raise.

        Raises:
            WorkbenchError: it never will, has ended, or waits longer than the cluster's `queue_limit`.
        """
        began, told = time.monotonic(), ""
        # One that has ended by itself ran, if only for a moment: what it said is in its log.
        while not (state := self.state()).running and state.word not in ("COMPLETED", "FAILED"):
            look()
            waited = time.monotonic() - began
            if not state.queued or state.reason in NEVER or (state.reason == AT_FIRST and waited > NOT_SAID):
                raise WorkbenchError(self.explain())
            if state.told() != told:
                told = state.told()
                print(f"Slurm's job {self.number} is {told}", flush=True)
            limit = self.site.queue_limit * 60
            if limit and waited > limit:
                raise WorkbenchError(
                    f"Slurm's job {self.number} of cluster {self.site.name} was {told} for {self.site.queue_limit:g} "
                    f"minutes, and was cancelled: ask for less, or for a longer `queue_limit` in {FILE}."
                )
            time.sleep(EVERY / 4)
        print(f"Slurm's job {self.number} is {state.told()}", flush=True)

    def end_of(self, seconds: float) -> State:
        """Wait until it has ended, `seconds` at most."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            state = self.state()
            if not state.running and not state.queued and state.word != "COMPLETING":
                break
            time.sleep(EVERY / 4)
        return self.state()

    def explain(self, word: str = "") -> str:
        """Why it does not run, as a sentence, with what to do; `word` where more is known than Slurm says yet."""
        state = self.state()
        return _explain(self.number, replace(state, word=word or state.word), self.site)


def cancelling(name: str) -> list[str]:
    """The command that cancels all jobs of this name."""
    return ["scancel", f"--name={name}", f"--user={getpass.getuser()}"]


def cancel(name: str) -> None:
    """Cancel all jobs of this name; none is no error."""
    _call(cancelling(name))


def _read_state(job: str) -> State:
    done = _call(["squeue", "-h", "-j", job, "-o", "%T|%r|%N"])
    if done.returncode == 0 and done.stdout.strip():
        return State(*done.stdout.strip().splitlines()[0].split("|"))
    # Of a job that has ended Slurm knows for some minutes more.
    done = _call(["scontrol", "-o", "show", "job", job])
    told = dict(part.split("=", 1) for part in done.stdout.split() if "=" in part)
    return State(told.get("JobState", UNKNOWN), told.get("Reason", ""), told.get("NodeList", ""))


def _explain(job: str, state: State, site: Site) -> str:
    which = f"Slurm's job {job} of cluster {site.name}"
    on = f" on {state.nodes}" if state.nodes not in ("", "(null)", "None assigned") else ""
    if state.queued:
        return f"{which} would wait for ever ({state.reason}): change its settings in {FILE}."
    return {
        "TIMEOUT": f"{which} was over its time limit: ask for more `time` in {FILE}.",
        "CANCELLED": f"{which} was cancelled from outside.",
        "PREEMPTED": f"{which} had to make room for another: start it again, or choose another partition or QOS.",
        "NODE_FAIL": f"{which} lost a node{on}: start it again, Slurm will choose others.",
        "OUT_OF_MEMORY": f"{which} ran out of memory{on}: ask for more by `options`, or for fewer workers on a node.",
        "COMPLETED": f"{which} has ended, and its workers with it.",
        UNKNOWN: f"{which} is gone, and Slurm does not know it any more.",
    }.get(state.word, f"{which} ended: {state.word.lower().replace('_', ' ')} ({state.reason}){on}.")


def _call(command: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
    """One of Slurm's commands, with what it prints.

    Raises:
        WorkbenchError: there is no such command, or it gives no answer.
    """
    if shutil.which(command[0]) is None:
        raise WorkbenchError(f"There is no `{command[0]}` here: start from a host on which Slurm's commands are.")
    try:
        return subprocess.run(command, input=text, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise WorkbenchError(f"Slurm gives no answer to `{' '.join(command)}` within {PATIENCE:g} s.") from None
