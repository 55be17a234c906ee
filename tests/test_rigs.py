"""The rigs themselves: a real Slurm of two nodes, and two real ssh hosts, with MPI ranks across each."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rigs import hosts, slurm

ALLREDUCE = Path(__file__).parent / "rigs" / "allreduce.py"
MPIEXEC = Path(sys.executable).with_name("mpiexec")
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}


def told(output: str) -> set[str]:
    """The lines of the ranks, without what mpiexec may add."""
    return {line for line in output.splitlines() if line.startswith("node=")}


@pytest.mark.slurm
@pytest.mark.mpi
def test_slurm_runs_jobs_on_both_nodes(slurm_rig):
    assert slurm_rig.states() == {"n1": "idle", "n2": "idle"}
    names = slurm_rig.call("srun", "-N2", "-n4", "--ntasks-per-node=2", "printenv", "SLURMD_NODENAME")
    assert sorted(names.split()) == ["n1", "n1", "n2", "n2"]


@pytest.mark.slurm
@pytest.mark.mpi
def test_slurm_nodes_fail_and_come_back(slurm_rig):
    job = slurm_rig.call("sbatch", "--parsable", "-N2", "--no-requeue", "-o", "/dev/null", "--wrap", "sleep 60").strip()
    try:
        slurm_rig.wait_for("mixed")
        slurm_rig.fail("n2")
        assert slurm_rig.states()["n2"] == "down"
        ended = slurm_rig.call("squeue", "-h", "-t", "all", "-o", "%T", "-j", job).strip()
        assert ended in ("NODE_FAIL", "COMPLETING")
    finally:
        slurm_rig.call("scancel", job)
        slurm_rig.resume()
    slurm_rig.drain("n2")
    try:
        job = slurm_rig.call("sbatch", "--parsable", "-N2", "-o", "/dev/null", "--wrap", "true").strip()
        assert slurm_rig.call("squeue", "-h", "-o", "%T", "-j", job).strip() == "PENDING"
    finally:
        slurm_rig.call("scancel", job)
        slurm_rig.resume()


@pytest.mark.slurm
@pytest.mark.mpi
def test_mpi_ranks_span_the_nodes_of_slurm(slurm_rig, tmp_path):
    job, output = tmp_path / "job.sh", tmp_path / "job.out"
    job.write_text(f"#!/bin/sh\nexec {MPIEXEC} -n 2 {sys.executable} {ALLREDUCE}\n")
    command = ["sbatch", "--parsable", "-N2", "-n2", "-o", str(output), str(job)]
    environment = os.environ | AS_ROOT | slurm_rig.environment
    number = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    # `sbatch --wait` looks seldom, and a job in the queue is the only one that squeue lists.
    until = time.monotonic() + 180
    while slurm_rig.call("squeue", "-h", "-j", number) and time.monotonic() < until:
        time.sleep(0.2)
    expected = {f"node={node} rank={rank} local=0 size=2 sum=3" for rank, node in enumerate(slurm.NODES)}
    assert told(output.read_text()) == expected, output.read_text()


@pytest.mark.ssh
@pytest.mark.mpi
def test_ssh_hosts_have_names_of_their_own_and_see_each_other(ssh_rig):
    assert [ssh_rig.ssh(name, "hostname").strip() for name in hosts.NAMES] == list(hosts.NAMES)
    assert ssh_rig.ssh("node1", "echo > /dev/tcp/node2/22 && echo open").strip() == "open"
    for name in hosts.NAMES:
        assert str(ssh_rig.addresses[name]) in ssh_rig.ssh(name, "hostname", "-I").split()


@pytest.mark.ssh
@pytest.mark.mpi
def test_ssh_hosts_go_and_come_back(ssh_rig):
    ssh_rig.stop("node2", silently=True)
    try:
        with pytest.raises(subprocess.CalledProcessError):
            ssh_rig.ssh("node2", "true")
    finally:
        ssh_rig.start("node2")
    assert ssh_rig.ssh("node2", "hostname").strip() == "node2"
    ssh_rig.unplug("node2")
    try:
        with pytest.raises(subprocess.CalledProcessError):
            ssh_rig.ssh("node2", "true")
    finally:
        ssh_rig.plug("node2")
    assert ssh_rig.ssh("node2", "hostname").strip() == "node2"


@pytest.mark.ssh
@pytest.mark.mpi
def test_mpi_ranks_span_ssh_hosts_over_tcp(ssh_rig):
    # No shared memory: what two ranks of one host say to each other goes over TCP as well.
    environment = os.environ | AS_ROOT | ssh_rig.environment | {"OMPI_MCA_btl": "tcp,self"}
    command = [MPIEXEC, "--host", "node1:2,node2:2", "-n", "4", "--bind-to", "none", sys.executable, ALLREDUCE]
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    expected = {f"node=node{rank // 2 + 1} rank={rank} local={rank % 2} size=4 sum=10" for rank in range(4)}
    assert told(done.stdout) == expected, done.stdout
