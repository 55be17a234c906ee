"""The doctor's findings: the real ones of this machine, and those of machines that lack something."""

import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from workbench import doctor
from workbench.doctor import Check

CPU = {"tensorflow": "2.18.1", "keras": "3.15.1", "cuda": False, "gpus": []}
GPU = CPU | {"cuda": True, "gpus": ["NVIDIA H100", "NVIDIA H100"]}
HOROVOD = {"horovod": "0.28.1", "mpi": True, "nccl": 0}


@pytest.mark.mpi
def test_this_machine_can_train(capfd):
    assert doctor.main() == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "Training can run here."
    found = {line[9:20].strip(): line for line in lines[1:-1] if line[:8].strip()}
    assert list(found) == [
        *("Python", "Cores", "Memory", "Disk", "TensorFlow", "GPUs", "Kernels", "Horovod", "mpiexec", "All-reduce"),
    ]
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
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "none")
    assert doctor._gpus(CPU).status == "ok"
    monkeypatch.setattr(doctor, "DRIVER", tmp_path)
    (tmp_path / "0000:01:00.0").mkdir()
    assert "environment.yml" in doctor._gpus(CPU).advice
    assert "CUDA_VISIBLE_DEVICES" in doctor._gpus(GPU | {"gpus": []}).advice


def test_little_of_everything_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(doctor, "_available_memory", lambda: 1_500_000_000)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    assert doctor._cores().found.startswith("1 for this process")
    assert doctor._memory().found == "1.5 GB available"
    assert doctor._disk(tmp_path).found == f"1 GB free in {tmp_path}"
    assert {check.status for check in (doctor._cores(), doctor._memory(), doctor._disk(tmp_path))} == {"warning"}


def test_limits_of_a_container_count(monkeypatch):
    limits = {"cpu.max": ["max 100000", "150000 100000"], "memory.max": ["max", "1000000"]}
    monkeypatch.setattr(doctor, "_cgroup", lambda name: iter(limits[name]))
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(8)))
    assert doctor._cores().found.startswith("1.5 for this process")
    assert doctor._available_memory() == 1_000_000


def test_mpiexec_of_another_place(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor._mpiexec(doctor.find_mpiexec()).status == "failed"
    other = tmp_path / "other" / "mpiexec"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\necho 'mpiexec (Open MPI) 4.1.4'\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", str(other.parent))
    check = doctor._mpiexec(doctor.find_mpiexec())
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
    check = doctor._allreduce(doctor.find_mpiexec(), 2.0)
    assert (check.status, check.found) == ("failed", told)
    assert check.advice
    assert not [line for line in command_lines() if marker in line]


def test_wrong_sum_and_two_worlds_of_one_are_failures(monkeypatch):
    for look in ({"size": 1, "sum": 1.0}, {"size": 2, "sum": 2.0}):
        monkeypatch.setattr(doctor, "_run_python", lambda *_, look=look, **__: look)
        check = doctor._allreduce(Path("mpiexec"), 1.0)
        assert check.status == "failed"
        assert check.found == f"{look['size']} ranks added 1 and 2 to {look['sum']:g}"
