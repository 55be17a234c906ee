"""Workers on other hosts: over real ssh, and in jobs of a real Slurm; what goes wrong there is a sentence each."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest
from rigs import hosts as ssh_hosts

from workbench import WorkbenchError, estimate, preflight, rollcall, runs
from workbench.training import cluster, postmortem, sites

LIMIT = 10.0  # seconds of silence


@pytest.fixture
def two_hosts(ssh_rig, monkeypatch):
    """A function from settings to a site of both hosts."""
    for name, value in ssh_rig.environment.items():
        monkeypatch.setenv(name, value)
    own = {"kind": "hosts", "hosts": {"node1": 2, "node2": 2}}
    return lambda **settings: sites.make_site("pair", own | settings)


@pytest.fixture
def job(slurm_rig, monkeypatch):
    """A function from settings to a site of a job on both nodes."""
    for name, value in slurm_rig.environment.items():
        monkeypatch.setenv(name, value)
    own = {"kind": "slurm", "nodes": 2, "tasks_per_node": 1, "address": "127.0.0.1", "time": "10"}
    return lambda **settings: sites.make_site("batch", own | settings)


def refusal(workers, site, **settings):
    """The sentence with which starting ends, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(WorkbenchError) as error, cluster.start(workers, site=site, **settings):
        pass
    return str(error.value), time.monotonic() - began


def broken(strike, workers, site):
    """The sentence with which waiting for workers ends after `strike` was called."""
    with cluster.start(workers, site=site, hang_limit=LIMIT) as ranks:
        threading.Timer(1.0, strike).start()
        with pytest.raises(WorkbenchError) as error:
            ranks.run("time.sleep", 200)
    return str(error.value)


def weights_after_training(config, folder, **settings):
    """The digest of the weights that two ranks end with, and where they were."""
    with cluster.start(2, **settings) as ranks:
        told = ranks.run("workbench.training.trainer.train", config, runs.create_run(folder, "trial"))
        assert len({rank["weights_sha256"] for rank in told}) == 1
        return told[0]["weights_sha256"], ranks.hosts


@pytest.fixture
def module(tmp_path):
    """A module of the hosts' environment-modules that sets a variable; the path is a name that `module load` takes."""
    if subprocess.run(["bash", "-lc", "type module"], capture_output=True).returncode:
        pytest.skip("environment-modules not found: run tests/rigs/install")
    path = tmp_path / "fabric"
    path.write_text("#%Module\nsetenv FROM_MODULE yes\n")
    return str(path)


@pytest.fixture(scope="module")
def here(tiny_config, tmp_path_factory):
    """What two ranks on this host end with, of one thread each."""
    folder = tmp_path_factory.mktemp("here")
    return weights_after_training(replace(tiny_config, threads=1), folder, threads=1, oversubscribe=True)[0]


def of_hosts(rig):
    """The processes of the workbench on both hosts, this one's aside."""
    family = [process for host in rig.running.values() for process in psutil.Process(host.pid).children(recursive=True)]
    lines = []
    for process in family:
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.NoSuchProcess:
            continue
    return [line for line in lines if "ipyparallel" in line or "prted" in line]


def wait_until(holds, seconds, what):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not within {seconds} s: {what()}"
        time.sleep(0.2)


def killed_client(site_name, folder, ready):
    """Start a client with a cluster of that name, kill it when `ready` says so."""
    code = (
        "import sys, pathlib\nfrom workbench.training import cluster, sites\n"
        "site = sites.read_site(pathlib.Path(sys.argv[1]), sys.argv[2])\n"
        "with cluster.start(2, site=site) as ranks:\n    ranks.run('time.sleep', 300)\n"
    )
    command = [sys.executable, "-c", code, str(folder), site_name]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as client:
        try:
            wait_until(lambda: client.poll() is not None or ready(), 180, lambda: "the workers do not run")
            assert client.poll() is None, "the client has ended"
        finally:
            client.send_signal(signal.SIGKILL)


@pytest.mark.mpi
@pytest.mark.ssh
class TestHosts:
    def test_two_hosts_train_the_network_that_one_does(self, two_hosts, here, tiny_config, tmp_path):
        site = two_hosts(hosts={"node1": 1, "node2": 1}, setup=["ulimit -c 0"])
        digest, where = weights_after_training(replace(tiny_config, threads=1), tmp_path, site=site)
        assert where == ["node1", "node2"]
        assert digest == here

    def test_ranks_share_the_cores_of_their_host(self, two_hosts, ssh_rig):
        site = two_hosts(interface=f"{ssh_rig.addresses['head'].rpartition('.')[0]}.0/24")
        with cluster.start(4, site=site) as ranks:
            assert ranks.hosts == ["node1", "node1", "node2", "node2"]
            told = ranks.run("rank_functions.world")
        assert {rank["threads"] for rank in told} == {max(1, len(os.sched_getaffinity(0)) // 2)}
        wait_until(lambda: not of_hosts(ssh_rig), 60, lambda: of_hosts(ssh_rig))

    def test_modules_and_setup_come_before_the_workers(self, two_hosts, module):
        site = {"hosts": {"node1": 1, "node2": 1}, "setup": ["export FROM_SETUP=$FROM_MODULE"]}
        with cluster.start(2, site=two_hosts(modules=[module], **site)) as ranks:
            assert ranks.run("os.getenv", "FROM_SETUP") == ["yes", "yes"]
        sentence, seconds = refusal(2, two_hosts(modules=["nosuch"], **site))
        assert "nosuch" in sentence
        assert seconds < 60
        sentence, _ = refusal(2, two_hosts(hosts={"node1": 1, "node2": 1}, setup=["exit 3"]))
        assert re.search(r"did not start \(rank [01]: it ended with exit status 3\): run", sentence), sentence

    def test_the_doctor_calls_the_roll(self, two_hosts, capsys):
        assert rollcall.main(two_hosts(hosts={"node1": 1, "node2": 1})) == 0
        said = capsys.readouterr().out
        for line in (
            "Workers +2 came within",
            "node1 +ranks of .*: 1; .* GB",
            "All-reduce +2 ranks: .* ms",
            "can run on pair",
        ):
            assert re.search(line, said), said

    def test_a_recipe_is_looked_at_where_its_workers_run(self, two_hosts, ssh_rig, tmp_path, capsys, monkeypatch):
        two_hosts()
        monkeypatch.setattr(estimate, "TRIAL_SECONDS", 2.0)
        shutil.copytree(runs.project_root() / "notebooks", tmp_path / "notebooks")
        folder = f"folder: {tmp_path / 'keys'}"
        (tmp_path / sites.FILE).write_text(f"pair: {{kind: hosts, hosts: {{node1: 1, node2: 1}}, {folder}}}")
        small = {"synthetic_patients": 32, "network": "Tiny", "image_size": 32, "shard_margin": 4, "batch_size": 8}
        small |= {"cluster_name": "pair", "workers": 0, "validation_fraction": 0.25}
        assert preflight.main(tmp_path, "synthetic", overrides=small) == 0
        said = capsys.readouterr().out
        assert "2 workers on the cluster pair." in said
        for line in ("Memory .* a rank measured", r"Time [\s\S]* s to start", "This recipe can run there"):
            assert re.search(line, said), said
        assert not list(tmp_path.glob("workbench-*"))

    def test_what_is_wrong_with_a_host_is_said_at_once(self, two_hosts, ssh_rig, tmp_path):
        # The rig's own key is in its configuration: with another one in its place nobody is let in.
        ssh_hosts._make_key(tmp_path / "key")
        config = ssh_rig.ssh_config.read_text().replace(f"{ssh_rig.folder}/key", f"{tmp_path}/key")
        (tmp_path / "config").write_text(config)
        for settings, said in [
            ({"hosts": {"node1": 1, "nowhere": 1}}, "Host nowhere of cluster pair cannot be used: ssh says: .*resolve"),
            (
                {"folder": "/run"},
                "Host node1 of .*: it does not see /run/workbench-.*: name a `folder` in clusters.yml",
            ),
            ({"ssh": "no-such-ssh"}, "Host node1 of .*: there is no command `no-such-ssh` here"),
            ({"ssh": f"/usr/bin/ssh -F {tmp_path / 'config'}"}, "Host node1 of .*: ssh says: .*Permission denied"),
        ]:
            sentence, seconds = refusal(2, two_hosts(**settings))
            assert re.match(said, sentence)
            assert seconds < 30

    def test_a_host_that_does_not_answer_is_named(self, two_hosts, ssh_rig):
        ssh_rig.unplug("node2")
        try:
            sentence, _ = refusal(4, two_hosts())
        finally:
            ssh_rig.plug("node2")
        assert sentence.startswith("Host node2 of cluster pair cannot be used: ssh says: ssh: connect to host")

    def test_a_rank_that_dies_is_named_with_its_host(self, two_hosts, ssh_rig):
        def kill_one():
            family = psutil.Process(ssh_rig.running["node2"].pid).children(recursive=True)
            next(process for process in family if postmortem.rank_of(process) == 3).kill()

        sentence = broken(kill_one, 4, two_hosts())
        assert sentence.startswith("Rank 3 on node2 died: it was ended by signal 9")
        wait_until(lambda: not of_hosts(ssh_rig), 60, lambda: of_hosts(ssh_rig))

    def test_a_host_that_is_switched_off_is_named(self, two_hosts, ssh_rig):
        try:
            sentence = broken(lambda: ssh_rig.stop("node2"), 4, two_hosts())
        finally:
            ssh_rig.start("node2")
        assert sentence.startswith("Host node2 was lost")
        wait_until(lambda: not of_hosts(ssh_rig), 60, lambda: of_hosts(ssh_rig))

    def test_a_host_that_is_cut_off_is_named_and_ends_its_ranks_by_itself(self, two_hosts, ssh_rig):
        try:
            sentence = broken(lambda: ssh_rig.unplug("node2"), 4, two_hosts())
            assert "on node2 has given no sign of life for 10 s: stopped, or its host cannot be reached" in sentence
            wait_until(lambda: not of_hosts(ssh_rig), 60, lambda: of_hosts(ssh_rig))
        finally:
            ssh_rig.plug("node2")

    def test_a_client_that_is_killed_leaves_nothing_on_any_host(self, two_hosts, ssh_rig, tmp_path):
        two_hosts()
        (tmp_path / sites.FILE).write_text("pair: {kind: hosts, hosts: {node1: 1, node2: 1}}")
        killed_client("pair", tmp_path, lambda: sum("engine --mpi" in line for line in of_hosts(ssh_rig)) > 1)
        wait_until(lambda: not of_hosts(ssh_rig), 60, lambda: of_hosts(ssh_rig))


@pytest.mark.mpi
@pytest.mark.slurm
class TestSlurm:
    def test_a_job_trains_the_network_that_this_host_does(
        self, job, here, slurm_rig, tiny_config, tmp_path, capsys, monkeypatch
    ):
        (tmp_path / "work").mkdir()
        monkeypatch.chdir(tmp_path / "work")
        digest, _ = weights_after_training(replace(tiny_config, threads=1), tmp_path, site=job())
        assert digest == here
        said = capsys.readouterr().out
        assert said.index("#SBATCH --ntasks=2") < said.index("is running on n[1-2]")
        assert not list((tmp_path / "work").iterdir())
        assert not slurm_rig.call("squeue", "-h")

    def test_modules_and_setup_come_before_the_workers(self, job, slurm_rig, module):
        setup = ["export FROM_SETUP=$FROM_MODULE"]
        with cluster.start(2, site=job(modules=[module], setup=setup)) as ranks:
            assert ranks.run("os.getenv", "FROM_SETUP") == ["yes", "yes"]
        sentence, seconds = refusal(2, job(modules=["nosuch"], setup=setup))
        assert "nosuch" in sentence
        assert seconds < 60
        assert not slurm_rig.call("squeue", "-h")

    def test_what_slurm_does_not_take_is_said_at_once(self, job, slurm_rig, capfd):
        for settings, said in [
            ({"partition": "nope"}, "Slurm refuses the job of cluster batch: invalid partition specified: nope;"),
            # Slurm does not always see it when it is asked, and then keeps the job with the reason that it gives first.
            ({"tasks_per_node": 5}, r"CPU count per node can not be satisfied|would wait for ever \(PartitionConfig\)"),
            ({"nodes": 3}, r"of cluster batch would wait for ever \(PartitionNodeLimit\): change its settings"),
            ({"partition": "short"}, r"of cluster batch would wait for ever \(PartitionTimeLimit\)"),
        ]:
            site = job(queue_limit=2, **settings)
            sentence, seconds = refusal(site.slots, site)
            assert re.search(said, sentence), (sentence, slurm_rig.states(), slurm_rig.log())
            assert seconds < 60
        assert not slurm_rig.call("squeue", "-h")
        assert capfd.readouterr().err == ""

    def test_without_slurm_it_says_so(self, job, monkeypatch):
        monkeypatch.setenv("PATH", os.path.dirname(sys.executable))
        assert refusal(2, job())[0] == "There is no `sbatch` here: start from a host on which Slurm's commands are."

    def test_a_job_that_waits_too_long_is_told_why_and_cancelled(self, job, slurm_rig, capsys):
        slurm_rig.drain()
        try:
            sentence, _ = refusal(2, job(queue_limit=0.05))
            assert not slurm_rig.call("squeue", "-h")
        finally:
            slurm_rig.resume()
        assert "was pending (" in sentence
        assert "for 0.05 minutes, and was cancelled" in sentence
        assert "is pending (" in capsys.readouterr().out

    def test_a_job_that_is_cancelled_says_so(self, job, slurm_rig):
        sentence = broken(lambda: slurm_rig.call("scancel", "--user=root"), 2, job())
        assert "of cluster batch was cancelled from outside" in sentence

    def test_a_job_whose_node_fails_says_so(self, job, slurm_rig):
        try:
            sentence = broken(lambda: slurm_rig.fail("n2"), 2, job())
        finally:
            slurm_rig.resume()
        # Whoever sees it first says so: Slurm, or mpiexec, whose end Slurm may take for the job's failure.
        assert re.search("of cluster batch lost a node|Host n2 was lost", sentence), sentence

    def test_a_job_that_is_over_its_time_says_so(self, job, slurm_rig):
        def let_it_be_over():  # Slurm's shortest limit is a minute
            number = slurm_rig.call("squeue", "-h", "-o", "%i").strip()
            soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 2))
            slurm_rig.call("scontrol", "update", f"JobId={number}", f"EndTime={soon}")

        sentence = broken(let_it_be_over, 2, job())
        assert "of cluster batch was over its time limit: ask for more `time` in clusters.yml" in sentence

    def test_a_client_that_is_killed_has_its_job_cancelled(self, job, slurm_rig, tmp_path):
        job()
        text = f"batch: {{kind: slurm, nodes: 2, address: 127.0.0.1, folder: {tmp_path}}}"
        (tmp_path / sites.FILE).write_text(text)
        killed_client("batch", tmp_path, lambda: " R " in slurm_rig.call("squeue", "-h"))
        wait_until(lambda: not slurm_rig.call("squeue", "-h"), 60, lambda: slurm_rig.call("squeue"))
        wait_until(lambda: not list(tmp_path.glob("workbench-*")), 60, lambda: list(tmp_path.glob("*")))
