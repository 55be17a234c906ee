"""Runs a command and ends it, with all its descendants, when the process that wanted it is gone.

`workbench.training.cluster` starts the controller and mpiexec through this, so that a kernel that is killed
leaves no engines behind. It adopts what its command leaves behind as well: the engines of an mpiexec that was
killed, the schedulers of a controller that was. Not for use by hand:

    python -m workbench.training.guard PARENT_PID FOLDER COMMAND [ARGUMENT ...]

FOLDER is the cluster's own, with its keys and logs; it is removed when the process that should have done that is gone.
A command in its file `on_end.json` is run before: what cancels a job elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ON_END = "on_end.json"
GRACE = 3.0  # seconds between asking and killing; less than the launcher's own patience
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of Linux's prctl(2)


def main(parent: int, folder: str, command: list[str]) -> int:
    """Run `command` until it ends, this process is asked to end, or `parent` is no longer its parent."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: asked.append(received))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # And should this process be killed itself, its command is asked to end.
    child = subprocess.Popen(command, preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0))
    while child.poll() is None:
        if asked or os.getppid() != parent:
            end(child.pid)
            child.wait()
            break
        time.sleep(0.1)
    for orphan in psutil.Process().children():
        end(orphan.pid, grace=0.0)
    if os.getppid() != parent:
        with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
            subprocess.run(json.loads(Path(folder, ON_END).read_text()), timeout=60, capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def end(pid: int, *, grace: float = GRACE) -> None:
    """Ask a process to end, and after that, or after `grace` seconds, kill what is left of it and its descendants."""
    try:
        top = psutil.Process(pid)
        family = [top, *top.children(recursive=True)]
        top.terminate()
    except psutil.NoSuchProcess:
        return
    # mpiexec and controllers end after what they started; whoever outlives them waits for nobody (ipyparallel's
    # nannies for an answer of the controller).
    psutil.wait_procs([top], timeout=grace)
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
