"""How ranks are started in each kind of place: the words of mpiexec, their environment, a job's script.

`LAUNCHING[site.kind](config, site, folder, workers, threads, variables)` writes it into the configuration of
ipyparallel's launchers, which `workbench.training.cluster` then uses.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from traitlets.config import Config

from workbench import WorkbenchError
from workbench.training import guard, hosts, slurm
from workbench.training.sites import Site

ENGINE_ENVIRONMENT = {
    # Open MPI refuses root unless told twice; containers are root more often than not.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # Without this a waiting rank spins on the core that another thread computes on: 60 % of the speed.
    "OMPI_MCA_mpi_yield_when_idle": "1",
    # Horovod: a rank that never comes ends the wait for it.
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "60",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "600",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# The ranks of one host talk through its memory; their TCP ports would be open to the whole network.
ONE_HOST = {"OMPI_MCA_btl": "^tcp"}
ENGINE = [sys.executable, "-m", "ipyparallel.engine"]
# A host that is cut off ends its ranks after 20 s of silence and three questions of 5 s, instead of after minutes.
KEEPALIVE = {"oob_tcp_keepalive_time": "20", "oob_tcp_keepalive_intvl": "5", "oob_tcp_keepalive_probes": "3"}
SUBMITTING = "sbatch.err"  # what sbatch says, in the cluster's folder
# What ssh has to take to other hosts of this process's environment (Slurm takes it all); the key is not among it.
FORWARDED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "IPP_CLUSTER_ID", "IPP_PROFILE_DIR")


def guarded(folder: str) -> list[str]:
    """The words before a command that is to end when this process does, and that leave `folder` removed."""
    return [sys.executable, "-m", "workbench.training.guard", str(os.getpid()), folder]


def _mpiexec() -> str:
    own = Path(sys.executable).with_name("mpiexec")
    found = str(own) if own.exists() else shutil.which("mpiexec")
    if found is None:
        raise WorkbenchError("There is no `mpiexec` beside this Python nor on PATH: install the environment again.")
    return found


def _here(config: Config, site: Site, folder: str, workers: int, threads: int, variables: dict) -> None:
    cores = len(os.sched_getaffinity(0))
    each = threads or max(1, cores // workers)
    # Horovod: every rank gets its own cores; `distributed.start` takes as many threads. Hardware threads are
    # what the affinity mask counts, so Open MPI is told to count them too.
    bound = ["--use-hwthread-cpus", "--map-by", f"slot:PE={each}", "--bind-to", "hwthread"]
    if workers * each > cores:
        bound = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    launcher = config.MPIEngineSetLauncher
    launcher.mpi_cmd = [*guarded(folder), _mpiexec()]
    # Tagged, so that each line of the log tells whose it is.
    launcher.mpi_args = ["--output", "tag", *bound]
    launcher.environment = ONE_HOST | variables


def _on_hosts(config: Config, site: Site, folder: str, workers: int, threads: int, variables: dict) -> None:
    hosts.check(site, Path(folder))
    slots = ",".join(f"{host}:{slots}" for host, slots in site.hosts.items())
    ssh = ["--prtemca", "plm_ssh_agent", shlex.join(hosts.command(site))]
    launcher = config.MPIEngineSetLauncher
    launcher.mpi_cmd = [*guarded(folder), _mpiexec()]
    variables, arguments = _over_the_network(site, threads, variables)
    forwarded = [word for name in (*FORWARDED, *variables) for word in ("-x", name)]
    launcher.mpi_args = ["--host", slots, *ssh, *arguments, *forwarded]
    launcher.environment = variables
    launcher.engine_cmd = ENGINE
    if site.before:
        launcher.engine_cmd = ["bash", "-lc", "\n".join([*site.before, 'exec "$@"']), "worker", *ENGINE]


def _in_job(config: Config, site: Site, folder: str, workers: int, threads: int, variables: dict) -> None:
    name, log = Path(folder).name, Path(folder, "log", "workers.log")
    log.parent.mkdir()
    variables, arguments = _over_the_network(site, threads, variables)
    told = {"workers": workers, "name": name, "log": log, "mpiexec": [_mpiexec(), *arguments]}
    script = slurm.write_script(site, **told, command=f"{shlex.join(ENGINE)} --mpi")
    print(script, flush=True)
    # Should this process be killed, the controller's guard cancels the job by its name, known before its number.
    Path(folder, guard.ON_END).write_text(json.dumps(slurm.cancelling(name)))
    launcher = config.SlurmEngineSetLauncher
    # ipyparallel formats it; nothing in it is to be replaced.
    launcher.batch_template = script.replace("{", "{{").replace("}", "}}")
    launcher.submit_command = slurm.quietly("sbatch", Path(folder, SUBMITTING))
    launcher.delete_command = slurm.quietly("scancel", Path(os.devnull))
    launcher.environment = variables
    launcher.output_file = str(log)
    launcher.batch_file_name = str(Path(folder, "job.sh"))


def _over_the_network(site: Site, threads: int, variables: dict) -> tuple[dict[str, str], list[str]]:
    """The ranks' environment, and the arguments of mpiexec, where they are on several hosts."""
    # Horovod: ranks that are not bound share their host's cores out among themselves.
    bound = ["--map-by", f"slot:PE={threads}", "--bind-to", "hwthread", "--use-hwthread-cpus"]
    if not threads:
        bound, variables = ["--map-by", "slot", "--bind-to", "none"], variables | {"WORKBENCH_UNBOUND": "1"}
    if site.interface:
        variables = variables | {"OMPI_MCA_btl_tcp_if_include": site.interface}
        bound += ["--prtemca", "prte_if_include", site.interface]
    bound += [word for name, value in KEEPALIVE.items() for word in ("--prtemca", name, value)]
    return variables, ["--output", "tag", "--prefix", sys.prefix, *bound]


LAUNCHING = {"local": _here, "hosts": _on_hosts, "slurm": _in_job}
