"""Two ssh hosts on this one, `node1` and `node2`, with a network, a host name and processes of their own.

Each is a set of namespaces (network, UTS, PID, mount) whose first process is an sshd that accepts one key; a bridge
joins them to this host, the head. Only files are shared, as on a cluster with one file system,
and home and temporary folder are each host's own. Nothing is written to
/etc: the nodes have an /etc/hosts mounted over, the head has a wrapper of ssh that knows the names. Needs root. What
is started ends with the process that started it, even one that is killed: a host's processes end with its sshd.

    with hosts.running() as rig:
        subprocess.run(["ssh", "node1", "hostname"], env=os.environ | rig.environment, check=True)

    python tests/rigs/hosts.py    # until Ctrl-C; prints the lines that a shell needs
"""

from __future__ import annotations

import os
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

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "ip", "unshare", "nsenter", "setpriv")
NAMES = ("node1", "node2")
NETWORKS = 16  # rigs that can run on one machine at the same time: 10.77.0.0/24, 10.77.1.0/24, ...
SSHD = """\
ListenAddress {address}
HostKey {folder}/{name}/host_key
AuthorizedKeysFile {folder}/key.pub
PidFile none
AuthenticationMethods publickey
PermitRootLogin prohibit-password
UsePAM no
UseDNS no
# The key lies below /tmp, in which everybody may write.
StrictModes no
# MPI's daemon names its folder by its process id, which two hosts with one /tmp may both have. And a shell reads what
# root's own home tells it to run, which a host that is killed may leave locked.
SetEnv TMPDIR=/run/tmp HOME=/run/home
"""
SSH = """\
Host {name}
    HostName {address}
    HostKeyAlias {name}
"""
SSH_FOR_ALL = """\
Host *
    User root
    IdentityFile {folder}/key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    BatchMode yes
    StrictHostKeyChecking yes
    ConnectTimeout 3
"""
# The namespace's first process: what it mounts, nobody else sees. The head moves eth0 into it.
BOOT = """\
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
mkdir -m 1777 /run/tmp /run/home
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip link set lo up
ip address add {address}/24 dev eth0
ip link set eth0 up
exec {sshd} -D -e -f {folder}/{name}/sshd_config
"""


@dataclass
class Hosts:
    """Running hosts: `environment` puts the ssh that knows them first on PATH.

    Attributes:
        folder: everything of the rig: `ssh_config`, `known_hosts`, `key`, and a folder of each host with `sshd.log`.
        environment: for the processes of the head that reach the hosts.
        addresses: of `head` and of each host.
        bridge: the head's network interface to them.
    """

    folder: Path
    environment: dict[str, str]
    addresses: dict[str, str]
    bridge: str
    running: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def ssh_config(self) -> Path:
        """For `ssh -F`."""
        return self.folder / "ssh_config"

    def ssh(self, name: str, *command: str, timeout: float = 20) -> str:
        """Run a command on a host; returns what it prints. Raises CalledProcessError, TimeoutExpired."""
        return subprocess.run(
            ["ssh", name, *command],
            env=os.environ | self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=timeout,
            check=True,
            text=True,
        ).stdout

    def unplug(self, name: str) -> None:
        """Cut a host's cable: its processes run on, and nobody gets an answer from it."""
        _ip("link", "set", self._cable(name), "down")

    def plug(self, name: str) -> None:
        """Put the cable back, and wait until the host is reached again. Raises TimeoutError."""
        _ip("link", "set", self._cable(name), "up")
        self._wait_for(name)

    def stop(self, name: str, *, silently: bool = False) -> None:
        """End a host with all its processes; silently, as without power: no connection is closed."""
        if silently:
            self.unplug(name)
        _end(self.running.pop(name))

    def start(self, name: str) -> None:
        """Start a host, and wait until its sshd answers. Raises TimeoutError with sshd's log."""
        log = self.folder / name / "sshd.log"
        # --kill-child: with unshare all of the host ends; the kernel ends unshare when this process is gone.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--pid", "--mount", "--mount-proc"]
        command += ["--fork", "--kill-child=KILL", "bash", "-e", str(self.folder / name / "boot")]
        with log.open("ab") as out:
            host = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        self.running[name] = host
        inside = _child_of(host)
        cable = self._cable(name)
        with suppress(subprocess.CalledProcessError):  # of an earlier start; the kernel may still be removing it
            _ip("link", "delete", cable)
        # The same hardware address at every start, which the others may still remember.
        hardware = f"02:00:00:00:00:{NAMES.index(name) + 2:02x}"
        peer = ["peer", "name", "eth0", "address", hardware, "netns", str(inside)]
        _ip("link", "add", cable, "type", "veth", *peer)
        _ip("link", "set", cable, "master", self.bridge, "up")
        self._wait_for(name)

    def _wait_for(self, name: str) -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until and self.running[name].poll() is None:
            with suppress(OSError), socket.create_connection((self.addresses[name], 22), timeout=1):
                return
            time.sleep(0.02)
        raise TimeoutError(f"{name} is not reached:\n{(self.folder / name / 'sshd.log').read_text()}")

    def _cable(self, name: str) -> str:
        return f"{self.bridge}-{name}"


@contextmanager
def running() -> Iterator[Hosts]:
    """Start both hosts (about 1 s), and end them with all that runs there when the block ends.

    Raises:
        TimeoutError: a host did not come up; says what its sshd logged.
    """
    folder = Path(tempfile.mkdtemp(prefix="workbench-hosts-"))
    with _own_network() as number:
        bridge, network = f"wb{number}", f"10.77.{number}"
        addresses = {name: f"{network}.{place}" for place, name in enumerate(("head", *NAMES), start=1)}
        path = f"{folder}/bin:{os.environ.get('PATH', '')}"
        rig = Hosts(folder, {"PATH": path}, addresses, bridge)
        try:
            _write_files(rig)
            with suppress(subprocess.CalledProcessError):  # left by a rig that was killed
                _ip("link", "delete", bridge)
            _ip("link", "add", bridge, "type", "bridge")
            _ip("address", "add", f"{addresses['head']}/24", "dev", bridge)
            _ip("link", "set", bridge, "up")
            for name in NAMES:
                rig.start(name)
            yield rig
        finally:
            for host in rig.running.values():
                _end(host)
            with suppress(subprocess.CalledProcessError):
                _ip("link", "delete", bridge)
            shutil.rmtree(folder, ignore_errors=True)


def _write_files(rig: Hosts) -> None:
    folder = rig.folder
    _make_key(folder / "key")
    known, config = [], []
    for name in NAMES:
        place = {"folder": folder, "name": name, "address": rig.addresses[name], "sshd": _find("sshd")}
        (folder / name).mkdir()
        _make_key(folder / name / "host_key")
        (folder / name / "sshd_config").write_text(SSHD.format(**place))
        (folder / name / "boot").write_text(BOOT.format(**place))
        known.append(f"{name} {(folder / name / 'host_key.pub').read_text()}")
        config.append(SSH.format(**place))
    (folder / "known_hosts").write_text("".join(known))
    rig.ssh_config.write_text("".join(config) + SSH_FOR_ALL.format(folder=folder))
    names = "".join(f"{address} {name}\n" for name, address in rig.addresses.items())
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    wrapper = folder / "bin" / "ssh"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {_find("ssh")} -F {rig.ssh_config} "$@"\n')
    wrapper.chmod(0o755)


def _make_key(file: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "rig", "-f", str(file)], check=True)


@contextmanager
def _own_network() -> Iterator[int]:
    """A number that no other rig on this machine has; the kernel gives it back when the process ends."""
    for number in range(NETWORKS):
        with socket.socket(socket.AF_UNIX) as lock:
            try:
                lock.bind(f"\0workbench-hosts-{number}")
            except OSError:
                continue
            yield number
            return
    raise TimeoutError(f"all {NETWORKS} networks are in use by other rigs")


def _child_of(process: subprocess.Popen) -> int:
    """The process that unshare forked, which is the first of the new namespaces."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 5
    while time.monotonic() < until and process.poll() is None:
        found = children.read_text().split()
        if found:
            return int(found[0])
        time.sleep(0.01)
    raise TimeoutError("unshare started nothing")


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait(10)


def _ip(*arguments: str) -> None:
    subprocess.run([_find("ip"), *arguments], check=True, capture_output=True, timeout=10)


def _find(program: str) -> str:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or program


if __name__ == "__main__":
    with running() as hosts:
        print(f"export PATH={hosts.folder}/bin:$PATH", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()
