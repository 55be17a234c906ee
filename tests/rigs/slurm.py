"""A Slurm of one controller and two nodes, all on this host, under a folder of its own.

`n1` and `n2` have two CPUs each, in the partitions `debug` (the default) and `short` (jobs of one minute at most).
munged has its own key and socket, so that neither /etc nor /var is touched. Needs root. What it starts ends with the
process that started it, even one that is killed; jobs are cancelled by `running`.

    with slurm.running() as rig:
        subprocess.run(["sbatch", "-N2", "--wait", "job.sh"], env=os.environ | rig.environment, check=True)

    python tests/rigs/slurm.py    # until Ctrl-C; prints the line that a shell needs
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sinfo", "setpriv")
NODES = ("n1", "n2")
CPUS = 2  # of each node; more than the host has in all
CONFIGURATION = """\
ClusterName=rig
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
# A job over its limit is told at once and killed two seconds later; a node that is silent for ten is down.
KillWait=2
OverTimeLimit=0
SlurmdTimeout=10
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=n1,n2 MaxTime=1 DefaultTime=1 State=UP
"""


@dataclass
class Slurm:
    """A running Slurm: `environment` lets sbatch, squeue and the others find it."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def call(self, *command: str, timeout: float = 30) -> str:
        """Run one of Slurm's commands; returns what it prints. Raises CalledProcessError, TimeoutExpired."""
        environment = os.environ | self.environment
        done = subprocess.run(command, env=environment, timeout=timeout, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    def states(self) -> dict[str, str]:
        """The state of each node, in sinfo's words, such as idle, mixed, allocated, drained or down."""
        return dict(line.split() for line in self.call("sinfo", "-h", "-N", "-p", "debug", "-o", "%N %T").splitlines())

    def wait_for(self, state: str, *nodes: str, timeout: float = 30) -> None:
        """Wait until the nodes (all, if none is named) are in that state. Raises TimeoutError."""
        until, seen = time.monotonic() + timeout, {}
        while time.monotonic() < until:
            try:
                seen = self.states()
            except subprocess.CalledProcessError:  # the controller does not listen yet
                seen = {}
            if seen and all(seen.get(node) == state for node in nodes or NODES):
                return
            time.sleep(0.1)
        raise TimeoutError(f"nodes are {seen}, not {state}, after {timeout:g} s:\n{self.log()}")

    def drain(self, *nodes: str) -> None:
        """Let no new job start on these nodes (all, if none is named): jobs stay PENDING."""
        self.call("scontrol", "update", f"NodeName={','.join(nodes or NODES)}", "State=DRAIN", "Reason=test")

    def fail(self, node: str) -> None:
        """End a node: its slurmd and all that its jobs run there are killed, and the controller is told."""
        self._kill_steps(node)
        _end(self.daemons.pop(node), signal.SIGKILL)
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def resume(self, *nodes: str) -> None:
        """Bring nodes (all, if none is named) back that were drained or failed, and wait until they are idle."""
        for node in nodes or NODES:
            if node not in self.daemons:
                self.start_node(node)
            # Slurm refuses it for a node that came back by itself, as one does when its slurmd registers.
            with suppress(subprocess.CalledProcessError):
                self.call("scontrol", "update", f"NodeName={node}", "State=RESUME")
        self.wait_for("idle", *nodes)

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._start(node, "slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])

    def log(self) -> str:
        """The last lines of every daemon's log."""
        return "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in sorted(self.folder.glob("*.log")))

    def _start(self, name: str, program: str, *arguments: str) -> None:
        # A daemon outlives a test run that is killed, unless the kernel ends it.
        command = ["setpriv", "--pdeathsig", "KILL", _find(program), *arguments]
        with open(self.folder / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.folder, start_new_session=True,
                env=os.environ | self.environment,
            )  # fmt: skip

    def _kill_steps(self, node: str = "") -> None:
        """Kill what jobs run (on one node, or anywhere); a slurmstepd leads its own session, and so does each task."""
        for pid in _processes_with(f"SLURM_CONF={self.environment['SLURM_CONF']}", node):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _processes_with(variable: str, node: str) -> list[int]:
    """Processes of jobs: their environment holds this rig's configuration and the node's name."""
    wanted = {variable.encode(), *([f"SLURMD_NODENAME={node}".encode()] if node else [])}
    found = []
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if wanted <= set(environment) and any(word.startswith(b"SLURM_JOB_ID=") for word in environment):
            found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


@contextmanager
def running() -> Iterator[Slurm]:
    """Start Slurm and wait until both nodes are idle (about 3 s); end it with its jobs when the block ends.

    Raises:
        TimeoutError: the nodes did not come up; says what the daemons logged.
    """
    # munged wants everybody to reach its socket, which a temporary folder of one's own may not let them.
    folder = Path(tempfile.mkdtemp(prefix="workbench-slurm-", dir="/tmp"))
    folder.chmod(0o711)
    (folder / "state").mkdir()
    configuration = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    configuration.write_text(CONFIGURATION.format(host=host, folder=folder, ports=_free_ports(3), cpus=CPUS))
    rig = Slurm(folder, {"SLURM_CONF": str(configuration)})
    try:
        _start_munged(rig)
        rig._start("slurmctld", "slurmctld", "-D", "-f", str(configuration))
        for node in NODES:
            rig.start_node(node)
        rig.wait_for("idle")
        yield rig
    finally:
        _stop(rig)


def _start_munged(rig: Slurm) -> None:
    key, sock = rig.folder / "munge.key", rig.folder / "munge.socket"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))
    places = {"key-file": key, "socket": sock}
    places |= {f"{name}-file": rig.folder / f"munged.{name}" for name in ("log", "pid", "seed")}
    rig._start("munged", "munged", "--foreground", *(f"--{name}={place}" for name, place in places.items()))
    until = time.monotonic() + 10
    while not sock.exists():
        if time.monotonic() > until or rig.daemons["munged"].poll() is not None:
            raise TimeoutError(f"munged did not start: {(rig.folder / 'munged.out').read_text()}")
        time.sleep(0.02)


def _stop(rig: Slurm) -> None:
    try:
        rig.call("scancel", "--user=root", timeout=5)
        rig.call("scancel", "--user=root", "--signal=KILL", timeout=5)
    except (subprocess.SubprocessError, OSError):  # no controller: what runs is killed below
        pass
    for name in ("n1", "n2", "slurmctld", "munged"):
        if name in rig.daemons:
            _end(rig.daemons[name], signal.SIGTERM)
    rig._kill_steps()
    shutil.rmtree(rig.folder, ignore_errors=True)


def _end(daemon: subprocess.Popen, number: int) -> None:
    daemon.send_signal(number)
    try:
        daemon.wait(5)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait(5)


def _find(program: str) -> str:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or program


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    with running() as slurm:
        print(f"export SLURM_CONF={slurm.environment['SLURM_CONF']}", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()
