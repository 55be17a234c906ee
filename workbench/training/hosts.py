"""Hosts that are reached by ssh: whether each answers and has what workers need, and how they reach this one.

hosts.check(site, folder)               # WorkbenchError names the host, and what ssh said
hosts.own_address(site)                 # "10.0.0.1"
"""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from workbench import WorkbenchError
from workbench.training.sites import FILE, Site

CONNECTING = 8  # seconds that a host gets to answer
OPTIONS = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECTING}", "-o", "ServerAliveInterval=5"]


def command(site: Site) -> list[str]:
    """The words of the ssh command that asks for nothing and does not wait for ever."""
    return [*shlex.split(site.ssh), *OPTIONS]


def check(site: Site, folder: Path) -> None:
    """Go to every host at once, and look for this Python and for the folder with the keys.

    Raises:
        WorkbenchError: a host does not answer, lets nobody in, or lacks one of them.
    """
    seen = f"test -x {shlex.quote(sys.executable)} || exit 3; test -d {shlex.quote(str(folder))} || exit 4"

    def look(host: str) -> str:
        try:
            done = subprocess.run(
                [*command(site), host, seen], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=3 * CONNECTING,
            )  # fmt: skip
        except FileNotFoundError:
            return f"there is no command `{shlex.split(site.ssh)[0]}` here"
        except subprocess.TimeoutExpired:
            return f"no answer within {3 * CONNECTING} s"
        said = " ".join(done.stderr.split())[-300:] or f"ended with status {done.returncode}"
        return {
            0: "",
            3: f"it has no {sys.executable}: the environment has to be at the same place on all hosts",
            4: f"it does not see {folder}: name a `folder` in {FILE} that all hosts share",
        }.get(done.returncode, f"ssh says: {said.rstrip('.')}")

    with ThreadPoolExecutor(max_workers=64) as pool:
        for host, wrong in zip(site.hosts, pool.map(look, site.hosts), strict=True):
            if wrong:
                raise WorkbenchError(f"Host {host} of cluster {site.name} cannot be used: {wrong}.")


def own_address(site: Site) -> str:
    """The address of this host that the workers' hosts can reach.

    Raises:
        WorkbenchError: it cannot be found out.
    """
    if site.address:
        return site.address
    found = _towards(_real_name(site, next(iter(site.hosts)))) if site.hosts else _of_name()
    if not found or found.startswith("127."):
        raise WorkbenchError(
            f"The address by which workers of cluster {site.name} reach this host cannot be found out"
            f"{f' ({found} is of this host alone)' if found else ''}: set `address` in {FILE}."
        )
    return found


def _real_name(site: Site, host: str) -> str:
    """The name or address that ssh's configuration gives for a host."""
    done = subprocess.run([*shlex.split(site.ssh), "-G", host], capture_output=True, text=True, timeout=CONNECTING)
    names = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("hostname ")]
    return names[0] if names else host


def _towards(host: str) -> str:
    """This host's own address on the way to another one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return ""
        return probe.getsockname()[0]


def _of_name() -> str:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""
