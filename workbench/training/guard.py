"""Runs a command and ends it, with all its descendants, when the process that wanted it is gone.

`workbench.training.cluster` starts the controller and mpiexec through this, so that a kernel that is killed
leaves no engines behind. Not for use by hand:

    python -m workbench.training.guard PARENT_PID COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil

GRACE = 3.0  # seconds between asking and killing; less than the launcher's own patience


def main(parent: int, command: list[str]) -> int:
    """Run `command` until it ends, this process is asked to end, or `parent` is no longer its parent."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: asked.append(received))
    child = subprocess.Popen(command)
    while child.poll() is None:
        if asked or os.getppid() != parent:
            end(child.pid)
            child.wait()
            break
        time.sleep(0.1)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def end(pid: int) -> None:
    """Ask a process to end, and after `GRACE` seconds kill what is left of it and its descendants."""
    try:
        top = psutil.Process(pid)
        family = [top, *top.children(recursive=True)]
        top.terminate()
    except psutil.NoSuchProcess:
        return
    _, alive = psutil.wait_procs(family, timeout=GRACE)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
