"""A job of Slurm in which workers run: its script, whether Slurm takes it, how it stands, why it ended.

The job itself is sent and cancelled by ipyparallel's launcher, see `workbench.training.cluster`.

    script = slurm.write_script(site, workers=8, name="workbench-1", log=log, command="ipengine --mpi")
    slurm.check(script)                     # WorkbenchError if Slurm would refuse it
    slurm.read_state("17")                  # State("PENDING", "Resources")
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workbench import WorkbenchError
from workbench.training.sites import FILE, Site

PATIENCE = 30.0  # seconds that one of Slurm's commands may take
QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SUSPENDED")
RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING")
# Reasons for which a job waits for ever.
NEVER = ("PartitionTimeLimit", "PartitionNodeLimit", "BadConstraints", "AccountNotAllowed", "QOSNotAllowed",
         "InvalidAccount", "InvalidQOS", "QOSMaxNodePerUserLimit", "AssocMaxJobsLimit", "JobHeldAdmin")  # fmt: skip
UNKNOWN = "UNKNOWN"


@dataclass(frozen=True)
class State:
    """How a job stands: Slurm's word for it, the reason it gives, and the nodes."""

    word: str
    reason: str = ""
    nodes: str = ""

    @property
    def queued(self) -> bool:
        return self.word in QUEUED

    @property
    def running(self) -> bool:
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
    lines += [f"module load {shlex.quote(module)}" for module in site.modules] + list(site.setup)
    return "\n".join(["#!/bin/bash", *lines, f"exec {shlex.join(mpiexec)} -n {workers} {command}", ""])


def check(script: str, site: Site) -> None:
    """Ask Slurm whether it would take this job.

    Raises:
        WorkbenchError: it would not, it does not answer, or there is no Slurm here.
    """
    done = _call(["sbatch", "--test-only"], script)
    if done.returncode == 0:
        return
    said = [line.removeprefix("sbatch: error: ").removeprefix("allocation failure: ") for line in done.stderr.split("\n")]
    said = [line.strip().rstrip(".") for line in said if line.strip() and not line.startswith("sbatch: Job")]
    there = " ".join(_call(["sinfo", "-h", "-o", "%P"]).stdout.split())
    partitions = f" Its partitions are {there.replace('*', ' (the default)')}." if there else ""
    raise WorkbenchError(
        f"Slurm refuses the job of cluster {site.name}: {'; '.join(dict.fromkeys(said)) or 'it does not say why'}."
        f"{partitions} Change the cluster's settings in {FILE}."
    )


def read_state(job: str) -> State:
    """How a job stands; of one that has ended Slurm knows it for some minutes more."""
    done = _call(["squeue", "-h", "-j", job, "-o", "%T|%r|%N"])
    if done.returncode == 0 and done.stdout.strip():
        return State(*done.stdout.strip().splitlines()[0].split("|"))
    done = _call(["scontrol", "-o", "show", "job", job])
    told = dict(part.split("=", 1) for part in done.stdout.split() if "=" in part)
    return State(told.get("JobState", UNKNOWN), told.get("Reason", ""), told.get("NodeList", ""))


def explain(job: str, state: State, site: Site) -> str:
    """Why a job that should run does not, as a sentence, with what to do."""
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
