"""Where workers can run, by name: what `clusters.yml` says, checked.

It starts nothing: `workbench.training.cluster` does.

    site = sites.read_site(root, "gpu")
    site.kind, site.slots                   # "slurm", 16
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from workbench import WorkbenchError

FILE = "clusters.yml"
EVERYWHERE = ("kind",)
REMOTE = ("address", "interface", "folder", "modules", "setup")
SETTINGS = {
    "local": EVERYWHERE,
    "hosts": (*EVERYWHERE, "hosts", "ssh", "cpus_per_task", *REMOTE),
    "slurm": (
        *(*EVERYWHERE, "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "time", "partition", "account"),
        *("qos", "options", "queue_limit", *REMOTE),
    ),
}
TIME = r"\d+(-\d+(:\d+){0,2}|(:\d+){0,2})"  # minutes, hours:minutes:seconds, days-hours and the like, as Slurm takes


@dataclass(frozen=True)
class Site:
    """A place where workers run.

    Attributes:
        name: as `clusters.yml` calls it.
        kind: "local" (MPI on this host), "hosts" (Open MPI over ssh) or "slurm" (a job).
        hosts: of hosts: the name of each, as ssh knows it, and how many workers it takes.
        ssh: of hosts: the command that opens a session on them, such as "ssh -p 2222"; it may ask for nothing.
        nodes, tasks_per_node: of slurm: how many hosts, and workers on each.
        gpus_per_node: of slurm: GPUs that are asked for on each node; 0: none.
        cpus_per_task: cores that each worker is bound to; 0: unbound, those of its host shared out evenly.
        time: of slurm: the longest the job may take, such as "08:00:00"; empty: what the partition gives.
        partition, account, qos: of slurm; empty: what Slurm takes for this user.
        options: of slurm: further options of sbatch, such as "--mem=64G".
        queue_limit: of slurm: minutes that the job may wait in the queue; 0: any time.
        address: of this host, as workers reach it; empty: found out.
        interface: the network that MPI uses between hosts, by name (ib0) or address (10.0.0.0/16); empty: any.
        folder: where the connection's keys lie while workers run; all hosts have to see it, and no other user.
        modules: what `module load` gets on each host before a worker starts.
        setup: lines of shell that each host runs before, such as the activation of an environment.
    """

    name: str = "local"
    kind: str = "local"
    hosts: Mapping[str, int] = field(default_factory=dict)
    ssh: str = "ssh"
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    options: tuple[str, ...] = ()
    queue_limit: float = 0
    address: str = ""
    interface: str = ""
    folder: str = "~/.cache/workbench/clusters"
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()

    @property
    def slots(self) -> int:
        """How many workers it takes; 0 for this host, whose cores and GPUs tell."""
        return {"local": 0, "hosts": sum(self.hosts.values()), "slurm": self.nodes * self.tasks_per_node}[self.kind]

    @property
    def before(self) -> list[str]:
        """Lines of a login shell, which knows `module`, that prepare a host; a module that is not there ends it."""
        return [f"module load {shlex.quote(module)} || exit 1" for module in self.modules] + list(self.setup)

    def check_workers(self, workers: int) -> None:
        """Refuse more workers than this place takes.

        Raises:
            WorkbenchError: there are more, or fewer than one.
        """
        if self.slots and not 1 <= workers <= self.slots:
            of = ", ".join(f"{host} {slots}" for host, slots in self.hosts.items())
            of = of or f"{self.nodes} nodes of {self.tasks_per_node}"
            raise WorkbenchError(
                f"`workers` is {workers}, and the cluster {self.name} takes 1 to {self.slots} ({of}): ask for fewer, "
                f"or change {FILE}."
            )


def read_site(root: Path, name: str) -> Site:
    """The place of that name in `clusters.yml` of the project's folder `root`; "local" is there without the file.

    Raises:
        WorkbenchError: there is no such name, or the file says something about it that cannot be.
    """
    path = root / FILE
    try:
        told = yaml.safe_load(path.read_text()) if path.exists() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise WorkbenchError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None
    told = {"local": {"kind": "local"}} | _mapping(told or {}, path, "names of clusters, each with its settings")
    if name not in told:
        known = ", ".join(map(str, told))
        raise WorkbenchError(f"There is no cluster `{name}` in {path}: choose one of {known}, or describe it there.")
    return make_site(name, _mapping(told[name], f"{path}, cluster {name}", "settings such as `kind: slurm`"), path)


def make_site(name: str, settings: Mapping[str, Any], where: Any = FILE) -> Site:
    """The place that these settings describe; `where` they stand is for errors."""
    kind = settings.get("kind")
    if kind not in SETTINGS:
        raise WorkbenchError(f"{where}, cluster {name}: `kind` is {kind!r}: it has to be one of {', '.join(SETTINGS)}.")
    for key, value in settings.items():
        if key not in SETTINGS[kind]:
            known = ", ".join(SETTINGS[kind])
            raise WorkbenchError(f"{where}, cluster {name}: there is no setting `{key}` of {kind}: there are {known}.")
        expected = _wrong(key, value)
        if expected:
            raise WorkbenchError(f"{where}, cluster {name}: `{key}` is {value!r}: it has to be {expected}.")
    if kind == "hosts" and not settings.get("hosts"):
        raise WorkbenchError(
            f"{where}, cluster {name}: `hosts` is missing: name each host and how many workers it takes."
        )
    lists = {key: tuple(value) for key, value in settings.items() if isinstance(value, list)}
    return Site(name=name, **{**settings, **lists})


def _wrong(key: str, value: Any) -> str:
    """What a setting has to be, if it is something else."""
    if key == "hosts":
        whole = isinstance(value, dict) and value
        if not whole or not all(_is_word(host) and _is_whole(slots, 1) for host, slots in value.items()):
            return "names of hosts, each with a number of workers, such as {gpu1: 4, gpu2: 4}"
    elif key in ("modules", "setup", "options"):
        if not isinstance(value, list) or not all(isinstance(line, str) and "\n" not in line for line in value):
            return "a list of texts of one line each"
        if key == "modules" and not all(_is_word(line) for line in value):
            return "a list of names of modules"
    elif key in ("nodes", "tasks_per_node"):
        return "" if _is_whole(value, 1) else "a whole number, 1 or more"
    elif key in ("gpus_per_node", "cpus_per_task"):
        return "" if _is_whole(value, 0) else "a whole number, 0 or more"
    elif key == "queue_limit":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return "" if number and 0 <= value < 1e9 else "a number of minutes, 0 or more"
    elif key == "time":
        # Without quotes YAML reads 8:00 as a number of seconds or minutes, silently another one.
        if not isinstance(value, str) or not re.fullmatch(TIME, value):
            return 'a time in quotes, as Slurm takes it, such as "08:00:00"'
    elif key in ("ssh", "folder"):
        return "" if isinstance(value, str) and value.strip() and "\n" not in value else "a text"
    elif key != "kind" and value != "" and not _is_word(value):
        return "a name without spaces"
    return ""


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_word(value: Any) -> bool:
    """A name that is nothing but that to a shell, to sbatch and to ssh: no space, no quote, no leading dash."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_./:@+=,][A-Za-z0-9_./:@+=,-]*", value) is not None


def _mapping(value: Any, where: Any, expected: str) -> dict:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise WorkbenchError(f"{where} has to hold {expected}.")
    return value
