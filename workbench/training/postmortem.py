"""What is known of processes that have ended: how, by whose hand, and what they said last.

rank, how = postmortem.read_mpiexec(postmortem.log_lines(launcher), None)
"""

from __future__ import annotations

import re
from pathlib import Path

import psutil


def alive(pid: int) -> bool:
    """Whether a process runs or could: one that has ended and waits to be noticed does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def log_lines(launcher) -> list[str]:
    """The lines of an engine set's log that are not ipyparallel's own: mpiexec's, and those of ranks with their tag."""
    path = Path(launcher.output_file)
    # ipyparallel removes the log of an engine set that has stopped, and keeps its text.
    text = path.read_text(errors="replace") if path.exists() else launcher.get_output()
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if set(line) - set("-=* ") and "IPEngine" not in line and "Nanny" not in line]


def tagged(lines: list[str]) -> list[tuple[int, str]]:
    """(rank, text) of the lines that ranks wrote."""
    found = [re.match(r"\[\d+,(\d+)\]<\w+>: ?(.*)", line) for line in lines]
    return [(int(match[1]), match[2].strip()) for match in found if match and match[2].strip()]


def read_mpiexec(lines: list[str], rank: int | None) -> tuple[int | None, str]:
    """What mpiexec says about the rank that ended first: (rank, how). Its own lines have no tag."""
    said = " ".join(line for line in lines if not re.match(r"\[\d+,\d+\]<", line))
    ended = r"process rank (\d+) with PID \d+ on node \S+ "
    if match := re.search(ended + r"exited on (signal \d+(?: \([^)]*\))?)", said):
        return int(match[1]), f"it was ended by {match[2]}"
    if match := re.search(r"Process name: \[[^\],]*,(\d+)\].*?Exit code: +(\d+)", said):
        return int(match[1]), f"it ended with exit status {match[2]}"
    if match := re.search(ended + "exiting improperly", said):
        return int(match[1]), "it ended without an error in the middle of its work"
    return rank, said[-300:] or "it left no message"


def lost_host(lines: list[str]) -> str:
    """The host whose part of mpiexec ended first, or nothing; it says so where a host is switched off."""
    said = " ".join(line for line in lines if not re.match(r"\[\d+,\d+\]<", line))
    match = re.search(r"lost communication with a remote daemon.*?Remote daemon: .*? on node (\S+)", said)
    match = match or re.search(r"Remote host: +(\S+) .*?Daemon exit status", said)
    return match[1] if match else ""


def killed_for_memory() -> int:
    """How many processes this host's kernel has killed for lack of memory since it started."""
    try:
        counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    except OSError:
        return 0
    return int(counters.get("oom_kill", 0))


def is_stopped(process: psutil.Process) -> bool:
    """Whether a process was stopped from outside, by SIGSTOP or Ctrl-Z."""
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def rank_of(process: psutil.Process) -> int | None:
    """The MPI rank that mpiexec gave a process, or the one that started it; None if it is of no rank."""
    try:
        rank = process.environ().get("OMPI_COMM_WORLD_RANK")
    except psutil.Error:
        return None
    return int(rank) if rank else None


def role(process: psutil.Process) -> str:
    """What a process of a cluster is, for an error."""
    rank = rank_of(process)
    return f"Process {process.pid}" if rank is None else f"Rank {rank} (process {process.pid})"
