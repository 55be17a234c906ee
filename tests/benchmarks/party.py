"""One side of a benchmark: a process, or several, that measures when told to and stands still in between.

The script of a side imports `serve` and gives it a function that measures once; the runner starts the side as a
`Party` and asks it, in turns with the others. While one side measures, the processes of the others are stopped
(SIGSTOP): MPI ranks that wait would otherwise poll, and take time from the one that is measured.

    # in the side's own script, in whichever environment        # in the runner
    serve(lambda: 100 / seconds_for(100))                       ours = Party("ours", [[python, "side.py"]])
                                                                ours.measure()
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence

MARK = "measured: "


def serve(measure: Callable[[], float | dict], *, asks: bool = True, follow: Callable[[bool], bool] | None = None):
    """Answer the runner until it has enough; called once everything is loaded, compiled and warm.

    Args:
        measure: measures once: a number, or a dictionary with "value" and whatever else should be kept.
        asks: whether this process talks with the runner. Of several MPI ranks the first one does.
        follow: with MPI: hands the first rank's True or False to all ranks.
    """
    if asks:
        print(MARK + "null", flush=True)
    while True:
        more = bool(sys.stdin.readline().strip()) if asks else True
        if follow:
            more = follow(more)
        if not more:
            return
        value = measure()
        if asks:
            print(MARK + json.dumps(value), flush=True)


class Party:
    """The processes of one side. With several, each measures at the same time and the numbers are added up."""

    def __init__(self, name: str, commands: Sequence[Sequence[str]], *, environment: Mapping[str, str] | None = None):
        self.name = name
        # A log of what the side says besides its numbers, shown only when it fails.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        surroundings = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_", "OMPI_"))}
        surroundings |= {"TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONUNBUFFERED": "1"} | dict(environment or {})
        self._processes = [
            subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env=surroundings,
                start_new_session=True,
            )
            for command in commands
        ]
        self._listen()
        self._send_signal(signal.SIGSTOP)

    def measure(self) -> list:
        """Let the side go on, measure once, and stop it again: one answer per process."""
        self._send_signal(signal.SIGCONT)
        for process in self._processes:
            process.stdin.write("more\n")
            process.stdin.flush()
        answers = self._listen()
        self._send_signal(signal.SIGSTOP)
        return answers

    def close(self) -> None:
        """End the side's processes, by their own ids."""
        self._send_signal(signal.SIGCONT)
        for process in self._processes:
            process.stdin.close()
        deadline = time.monotonic() + 20
        for process in self._processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._send_signal(signal.SIGKILL)
                process.wait()
        self._log.close()

    def _listen(self) -> list:
        answers = []
        for process in self._processes:
            while not (line := process.stdout.readline()).startswith(MARK):
                if not line:
                    self._fail()
            answers.append(json.loads(line.removeprefix(MARK)))
        return answers

    def _fail(self):
        self._log.seek(0)
        said = self._log.read()[-3000:]
        self._send_signal(signal.SIGKILL)
        raise SystemExit(f"The side `{self.name}` of a benchmark ended before it had measured:\n{said}")

    def _send_signal(self, number: int) -> None:
        for process in self._processes:
            # mpiexec's ranks are in process groups, and perhaps sessions, of their own.
            for pid in [process.pid, *_descendants(process.pid)]:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue


def _descendants(pid: int) -> list[int]:
    try:
        import psutil
    except ModuleNotFoundError:  # where `gpu.py` runs with nothing but a framework
        return []
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
