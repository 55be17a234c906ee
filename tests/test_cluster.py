"""Clusters of real MPI ranks: order, output, errors, and that nothing is left behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from workbench import WorkbenchError
from workbench.training import cluster, launch

pytestmark = pytest.mark.mpi


def start_two():
    return cluster.start(2, threads=1, oversubscribe=True, timeout=120)


def test_results_come_in_rank_order(ranks):
    told = ranks(3).run("rank_functions.world")
    assert [rank["rank"] for rank in told] == [0, 1, 2]
    assert {rank["size"] for rank in told} == {3}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks with cores of their own need two cores")
def test_each_rank_has_cores_of_its_own_and_as_many_threads():
    with cluster.start(2, timeout=120) as two:
        first, second = two.run("rank_functions.world")
    assert not set(first["cores"]) & set(second["cores"])
    assert first["threads"] == len(first["cores"]) == len(os.sched_getaffinity(0)) // 2


def test_more_threads_than_cores_are_refused():
    cores = len(os.sched_getaffinity(0))
    with (
        pytest.raises(WorkbenchError, match=f"`threads` {cores + 1} is more than"),
        cluster.start(1, threads=cores + 1),
    ):
        pass


def test_output_and_progress_arrive_while_it_runs(ranks, capsys):
    seen = []
    watch = lambda progress: seen.append((time.monotonic(), progress))  # noqa: E731
    assert ranks(2).run("rank_functions.talk", watch=watch) == [0, 1]
    assert seen[-1][0] - seen[0][0] > 0.5
    of_ranks = seen[-1][1].pop("ranks")
    assert [rank["memory"] > 0 for rank in of_ranks] == [True, True]
    assert seen[-1][1] == {"phase": "talking", "step": 2, "history": [{"epoch": 1}]}
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == [f"[rank {rank}] step {step}" for rank in range(2) for step in range(3)]


def test_one_worker_per_gpu_or_else_per_core(monkeypatch, tmp_path):
    monkeypatch.setattr(cluster, "DRIVER", tmp_path / "none")
    assert cluster.default_workers() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(cluster, "DRIVER", tmp_path)
    for number in range(3):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
    assert cluster.default_workers() == 3


def test_more_workers_than_cores_are_refused_at_once():
    cores = len(os.sched_getaffinity(0))
    said = f"`workers` {cores + 1} .* with {cores} cores: ask for 1 to {cores}"
    with pytest.raises(WorkbenchError, match=said), cluster.start(cores + 1):
        pass


def test_a_cluster_that_cannot_start_says_what_mpiexec_said(monkeypatch):
    launch_here = launch.LAUNCHING["local"]

    def impossible(config, *settings):
        launch_here(config, *settings)
        config.MPIEngineSetLauncher.mpi_args = ["--map-by", "slot:PE=4096", "--bind-to", "core"]

    monkeypatch.setitem(launch.LAUNCHING, "local", impossible)
    said = r"The 2 workers did not start \(.*failed to map.*\): run `workbench doctor`"
    with pytest.raises(WorkbenchError, match=said), start_two():
        pass


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("user", WorkbenchError, r"the value 7 is wrong: use 8 \(rank 1\)"),
        ("bug", cluster.WorkerError, "Rank 1 failed with ZeroDivisionError: a bug"),
        ("killed", cluster.WorkerError, r"Rank 1 on .* died: it was ended by signal 9 \(Killed\)"),
    ],
)
def test_the_first_error_of_a_rank_ends_the_run(kind, error, said):
    """The other rank waits for it in a collective, which must not keep anybody waiting."""
    with start_two() as ranks:
        pids = [told["pid"] for told in ranks.run("rank_functions.world")]
        began = time.monotonic()
        with pytest.raises(error, match=said):
            ranks.run("rank_functions.raise_on", 1, kind)
        assert time.monotonic() - began < 60
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_nothing_is_left_when_the_block_ends():
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with start_two() as ranks:
        pids = [told["pid"] for told in ranks.run("rank_functions.world")]
        started = {process.pid for process in psutil.Process().children(recursive=True)} - before
        assert set(pids) <= started
    left = [pid for pid in started if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert left == []


def test_nothing_is_left_when_the_client_is_killed(tmp_path):
    script = tmp_path / "client.py"
    script.write_text(
        "from workbench.training import cluster\n"
        "import time\n"
        "with cluster.start(2, threads=1, oversubscribe=True) as ranks:\n"
        "    print(ranks._cluster._folder)\n"
        "    print(*[told['pid'] for told in ranks.run('rank_functions.world')], flush=True)\n"
        "    time.sleep(600)\n"
    )
    client = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    folder = client.stdout.readline().strip()
    pids = [int(pid) for pid in client.stdout.readline().split()]
    family = [process.pid for process in psutil.Process(client.pid).children(recursive=True)]
    assert set(pids) <= set(family)
    client.send_signal(signal.SIGKILL)
    client.wait()
    client.stdout.close()
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [pid for pid in family if psutil.pid_exists(pid)] == []
    assert not os.path.exists(folder), "its keys and logs"


def test_the_guard_passes_on_the_exit_status():
    command = [
        sys.executable,
        "-m",
        "workbench.training.guard",
        str(os.getpid()),
        "nowhere",
        sys.executable,
        "-c",
        "exit(7)",
    ]
    assert subprocess.run(command, timeout=60).returncode == 7
