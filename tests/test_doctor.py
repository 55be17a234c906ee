"""The doctor's findings: the real ones of this machine, and those of machines that lack something."""

import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import rigs
from rigs import slurm

from workbench import doctor, machine
from workbench.findings import Check, reading_check, show

CPU = {"tensorflow": "2.18.1", "keras": "3.15.1", "cuda": False, "gpus": []}
GPU = CPU | {"cuda": True, "gpus": ["NVIDIA H100", "NVIDIA H100"]}
CORES = len(os.sched_getaffinity(0))
HOROVOD = {"horovod": "0.28.1", "mpi": True, "nccl": 0}


@pytest.mark.mpi
def test_this_machine_can_train(capfd, tmp_path):
    assert doctor.main(folder=tmp_path) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "Training can run here."
    found = {line[9:20].strip(): line for line in lines[1:-1] if line[:8].strip()}
    assert list(found) == [
        *("Python", "Cores", "Ranks", "Memory", "Disk", "Shards", "TensorFlow", "GPUs", "Kernels", "Horovod"),
        *("mpiexec", "All-reduce", "Slurm"),
    ]
    assert "starts" in found["Ranks"]
    assert "2.18.1" in found["TensorFlow"]
    assert "built with MPI" in found["Horovod"]
    assert str(Path(sys.executable).with_name("mpiexec")) in found["mpiexec"]
    assert found["All-reduce"].startswith("ok")
    assert " GB/s" in found["All-reduce"]


def test_checks_are_a_list_and_a_missing_tensorflow_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "_LOOK_AT_TENSORFLOW", "import tensorflow_of_nowhere")
    monkeypatch.setattr(doctor, "_LOOK_AT_HOROVOD", "raise ImportError('libmpi.so.40: cannot open')")
    found = {check.name: check for check in doctor.checks()}
    assert found["TensorFlow"].status == "failed"
    assert found["TensorFlow"].found == "ModuleNotFoundError: No module named 'tensorflow_of_nowhere'"
    assert found["Horovod"].found == "ImportError: libmpi.so.40: cannot open"
    assert "make clean" in found["Horovod"].advice
    assert "All-reduce" not in found


def test_long_findings_are_folded_to_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    path = "/data/" + "long/" * 20
    show([Check("Disk", "warning", "words " * 30 + path, "and so " * 20)])
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("warning  Disk        words words")
    assert any(path in line for line in lines)
    assert all(len(line) <= 80 for line in [*lines, last] if path not in line)
    assert sum("->" in line for line in [*lines, last]) == 1


def test_main_names_what_failed(monkeypatch, capfd):
    made = [Check("Horovod", "failed", "none", "install it"), Check("Memory", "warning", "1.0 GB", "close something")]
    monkeypatch.setattr(doctor, "_look", lambda *_: iter(made))
    assert doctor.main() == 1
    out = capfd.readouterr().out
    assert "failed   Horovod     none\n" in out
    assert "-> install it" in out
    assert out.endswith("Training cannot run: Horovod.\n")


@pytest.mark.parametrize(
    ("look", "gpus", "status", "told"),
    [
        (HOROVOD, False, "ok", "0.28.1, built with MPI"),
        (HOROVOD, True, "warning", "built with MPI"),
        (HOROVOD | {"nccl": 22105}, True, "ok", "built with MPI and NCCL 2.21.5"),
        (HOROVOD | {"mpi": False}, False, "failed", "built with neither MPI nor NCCL"),
    ],
)
def test_what_horovod_was_built_with(look, gpus, status, told):
    check = doctor._horovod(look, gpus=gpus)
    assert check.status == status
    assert told in check.found
    assert bool(check.advice) == (status != "ok")


def test_kernels_that_cannot_be_compiled_are_a_warning():
    check = doctor._kernels({"error": "RuntimeError: g++ is missing."})
    assert check.status == "warning"
    assert "training is slower: RuntimeError: g++ is missing." in check.found
    assert "g++" in check.advice


def test_gpus(monkeypatch, tmp_path):
    assert doctor._gpus(GPU) == Check("GPUs", "ok", "2: NVIDIA H100")
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "none")
    assert doctor._gpus(CPU).status == "ok"
    assert doctor._ranks().found == f"`workers: 0` starts {CORES}, one a core, with 1 thread each"
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    assert doctor._ranks().found.startswith(f"`workers: 0` starts 1, one a GPU, with {CORES} thread")
    assert "make setup-gpu, or environment.yml" in doctor._gpus(CPU).advice
    assert "CUDA_VISIBLE_DEVICES" in doctor._gpus(GPU | {"gpus": []}).advice


@pytest.mark.parametrize(
    ("told", "status", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024", "ok", "550.54.15"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC 12.3.0",
            *("ok", "580.95.05"),
        ),
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.82.01  Wed Oct 27 21:21:55 UTC 2021",
            "failed",
            "470.82.01",
        ),
        ("nothing known", "warning", "unknown"),
    ],
)
def test_the_driver(told, status, version, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "DRIVER", tmp_path)
    assert machine.driver_version() == ""
    (tmp_path / "version").write_text(told)
    check = doctor._driver()
    assert (check.status, bool(check.advice)) == (status, status != "ok")
    assert version in check.found


def test_reading_is_cold_and_told_against_what_training_needs(tmp_path):
    file = tmp_path / "train-00000-of-00001.tfrecord"
    file.write_bytes(os.urandom(20 * 2**20 + 100))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        # A file system in memory cannot let go of its pages.
        lets_go = machine.cached_bytes(opened.fileno()) == 0
        opened.read()
    reading = machine.read_speed([file], seconds=60)
    assert reading.cached == (0 if lets_go else 1)
    assert reading.bytes == file.stat().st_size
    assert machine.read_speed([file], most=2**20, seconds=60).bytes == 2**20
    with file.open("rb") as opened:
        opened.read()
        assert machine.cached_bytes(opened.fileno()) == file.stat().st_size
    if lets_go:
        check = reading_check(tmp_path, [file], image_bytes=1000, needed=1)
        assert "MB/s (cold; 21 MB read)" in check.found
        assert "images/s; training takes 1" in check.found
        assert (check.status, check.advice) == ("ok", "")
    slow = reading_check(tmp_path, [file], image_bytes=2**40, needed=10)
    assert (slow.status, "disk of this host" in slow.advice) == ("warning", True)


def test_shards_that_cannot_be_read_are_told(tmp_path):
    gone = reading_check(tmp_path, [tmp_path / "gone.tfrecord"])
    assert (gone.status, gone.found) == ("failed", f"{tmp_path}: No such file or directory")
    (tmp_path / "empty.tfrecord").touch()
    assert reading_check(tmp_path, [tmp_path / "empty.tfrecord"]).status == "failed"


def test_without_slurm_one_line_says_so_without_alarm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.read_partitions() is None
    check = doctor._slurm(None)
    assert (check.status, check.advice) == ("ok", "")
    assert "no `sinfo` on PATH" in check.found


def test_slurm_that_does_not_answer_is_a_warning(monkeypatch, tmp_path):
    if shutil.which("sinfo") is None:
        pytest.skip("there is no sinfo here")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "none.conf"))
    check = doctor._slurm(machine.read_partitions(timeout=1))
    assert (check.status, bool(check.advice)) == ("warning", True)
    assert "sinfo: " in check.found or check.found == "no answer within 1 s"


@pytest.mark.slurm
def test_partitions_of_a_real_slurm(monkeypatch):
    if reason := rigs.why_not(*slurm.PROGRAMS):
        pytest.skip(reason)
    with slurm.running() as rig:
        for name, value in rig.environment.items():
            monkeypatch.setenv(name, value)
        debug, short = machine.read_partitions()
        assert debug == machine.Partition("debug", True, True, "infinite", {"idle": 2}, slurm.CPUS, "")
        assert (short.name, short.default, short.limit) == ("short", False, "1:00")
        rig.drain("n1")
        rig.wait_for("drained", "n1")
        check = doctor._slurm(machine.read_partitions())
        assert check.status == "ok"
        assert "debug (default): 1 drained, 1 idle, 2 cores, no limit; short: " in check.found
        rig.drain("n2")
        rig.wait_for("drained", "n2")
        assert doctor._slurm(machine.read_partitions()).advice.startswith("no node takes jobs")


def test_little_of_everything_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(machine, "available_memory", lambda: 1_500_000_000)
    monkeypatch.setattr(machine, "is_busy", lambda: False)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    assert doctor._cores().found.startswith("1 for this process")
    assert doctor._memory().found == "1.5 GB available"
    assert doctor._disk(tmp_path).found == f"1 GB free in {tmp_path}"
    assert {check.status for check in (doctor._cores(), doctor._memory(), doctor._disk(tmp_path))} == {"warning"}


def test_limits_of_a_container_count(monkeypatch):
    limits = {"cpu.max": ["max 100000", "150000 100000"], "memory.max": ["max", "1000000"]}
    monkeypatch.setattr(machine, "_cgroup", lambda name: iter(limits[name]))
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(8)))
    check = doctor._cores()
    assert check.found.startswith("1.5 for this process")
    assert "`workers` 1" in check.advice
    assert machine.available_memory() == 1_000_000


def test_mpiexec_of_another_place(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._mpiexec(machine.find_mpiexec()).status == "failed"
    other = tmp_path / "other" / "mpiexec"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho 'mpiexec (Open MPI) 4.1.4'\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(other.parent))
    check = doctor._mpiexec(machine.find_mpiexec())
    assert (check.status, check.found) == ("warning", f"mpiexec (Open MPI) 4.1.4, {other}")


def command_lines():
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            yield path.read_text(errors="replace")


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("import time; time.sleep(600)", "two ranks: no answer within 2 s"),
        ("raise ValueError('broken')", "two ranks: ValueError: broken"),
    ],
)
def test_ranks_that_hang_or_fail_are_told_and_ended(code, told, monkeypatch):
    marker = f"'marker {time.time_ns()}'"
    monkeypatch.setattr(doctor, "_ALLREDUCE", f"{marker}; {code}")
    check = doctor._allreduce(machine.find_mpiexec(), 2.0)
    assert (check.status, check.found) == ("failed", told)
    assert check.advice
    assert not [line for line in command_lines() if marker in line]


def test_wrong_sum_and_two_worlds_of_one_are_failures(monkeypatch):
    for look in ({"size": 1, "sum": 1.0}, {"size": 2, "sum": 2.0}):
        monkeypatch.setattr(machine, "run_python", lambda *_, look=look, **__: look)
        check = doctor._allreduce(Path("mpiexec"), 1.0)
        assert check.status == "failed"
        assert check.found == f"{look['size']} ranks added 1 and 2 to {look['sum']:g}"
