"""What this machine can do for the workbench, and what it lacks: the command `workbench doctor`.

Every check is really made: TensorFlow is imported, and two ranks average a gradient of DenseNet-121's size. All
of that happens in other processes, so that importing this module stays light and a crash or a hang there is a
finding here.

    from workbench import doctor
    doctor.main()                                   # prints them one by one; 0 if training can run
    [check for check in doctor.checks() if check.status != "ok"]
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

INSTALL = "install the environment again: make clean, then make test (on a GPU cluster: environment.yml)"
TIMEOUT = 120.0  # seconds for TensorFlow's first import from a slow disk, and for two ranks to meet
DRIVER = Path("/proc/driver/nvidia/gpus")  # where NVIDIA's driver lists its devices, whoever uses them
MPI_ENVIRONMENT = {
    # Open MPI refuses root unless told twice; containers are root more often than not.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # Without this a waiting rank spins on the core that the other one needs.
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

_LOOK_AT_TENSORFLOW = """
import json, keras, tensorflow as tf
print(json.dumps({"tensorflow": tf.__version__, "keras": keras.__version__, "cuda": tf.test.is_built_with_cuda(),
    "gpus": [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
             for gpu in tf.config.list_physical_devices("GPU")]}))
"""
_LOOK_AT_KERNELS = """
import json
from workbench.training import kernels
print(json.dumps({"library": kernels.build().name}))
"""
_LOOK_AT_HOROVOD = """
import json, horovod, horovod.tensorflow as hvd
print(json.dumps({"horovod": horovod.__version__, "mpi": bool(hvd.mpi_built()), "nccl": int(hvd.nccl_built())}))
"""
# 7.0 million float32 numbers are DenseNet-121's gradient.
_ALLREDUCE = """
import json, statistics, time
import horovod.tensorflow as hvd
import tensorflow as tf
hvd.init()
def seconds(values, name, times):
    took = []
    for _ in range(times):
        start = time.perf_counter()
        total = hvd.allreduce(values, op=hvd.Sum, name=name)
        took.append(time.perf_counter() - start)
    return statistics.median(took[2:]), float(total[0])
with tf.device("/cpu:0"):
    latency, total = seconds(tf.fill([1], hvd.rank() + 1.0), "one", 50)
    gradient, _ = seconds(tf.fill([7_000_000], hvd.rank() + 1.0), "gradient", 12)
if hvd.rank() == 0:
    print(json.dumps({"size": hvd.size(), "sum": total, "latency": latency, "bandwidth": 28e6 / gradient}))
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `status` is "ok", "warning" (it works, but) or "failed" (training cannot run)."""

    name: str
    status: str
    found: str
    advice: str = ""


def checks(*, folder: str | os.PathLike = ".", timeout: float = TIMEOUT) -> list[Check]:
    """Look at everything, in about half a minute.

    Args:
        folder: where data and results will lie; its free space is looked at.
        timeout: seconds after which a process that was started counts as hanging, and is ended.
    """
    return list(_look(Path(folder), timeout))


def main(*, folder: str | os.PathLike = ".", timeout: float = TIMEOUT) -> int:
    """Print each check as it is made, with what to do about it; return 0 if training can run, else 1."""
    print("Looking at this machine, which takes about half a minute.", flush=True)
    failed = []
    for check in _look(Path(folder), timeout):
        print(f"{check.status:<8} {check.name:<11} {check.found}", flush=True)
        if check.advice:
            print(f"{'':<8} {'':<11} -> {check.advice}", flush=True)
        failed += [check.name] if check.status == "failed" else []
    print(f"Training cannot run: {', '.join(failed)}." if failed else "Training can run here.")
    return 1 if failed else 0


def _look(folder: Path, timeout: float) -> Iterator[Check]:
    yield _python()
    yield _cores()
    yield _memory()
    yield _disk(folder)
    tensorflow = _run_python(_LOOK_AT_TENSORFLOW, timeout)
    yield _tensorflow(tensorflow)
    yield _gpus(tensorflow)
    if not tensorflow.get("gpus") and "error" not in tensorflow:
        yield _kernels(_run_python(_LOOK_AT_KERNELS, timeout))
    horovod = _run_python(_LOOK_AT_HOROVOD, timeout)
    yield _horovod(horovod, gpus=bool(tensorflow.get("gpus")))
    mpiexec = find_mpiexec()
    yield _mpiexec(mpiexec)
    if mpiexec and "error" not in horovod:
        yield _allreduce(mpiexec, timeout)


def find_mpiexec() -> Path | None:
    """The environment's own mpiexec, else the first on PATH, else None."""
    own = Path(sys.executable).with_name("mpiexec")
    found = own if own.exists() else shutil.which("mpiexec")
    return Path(found) if found else None


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    found = f"{version}, {sys.prefix}"
    if sys.version_info[:2] != (3, 11):
        return Check("Python", "failed", found, f"the packages are pinned for Python 3.11: {INSTALL}")
    return Check("Python", "ok", found)


def _cores() -> Check:
    usable = min(len(os.sched_getaffinity(0)), _granted_cores())
    found = f"{usable:g} for this process, of {os.cpu_count()} in the machine"
    if usable < 2:
        return Check("Cores", "warning", found, "two ranks on one core take turns: ask for more cores")
    return Check("Cores", "ok", found)


def _memory() -> Check:
    available = _available_memory()
    found = f"{available / 1e9:.1f} GB available"
    if available < 4e9:
        return Check(
            "Memory", "warning", found, "each rank takes about 2 GB: train with fewer, or close other programs"
        )
    return Check("Memory", "ok", found)


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    found = f"{free / 1e9:.0f} GB free in {folder.resolve()}"
    if free < 5e9:
        return Check("Disk", "warning", found, "a run with its data takes a few GB: make room")
    return Check("Disk", "ok", found)


def _tensorflow(look: dict) -> Check:
    if "error" in look:
        return Check("TensorFlow", "failed", look["error"], INSTALL)
    build = "GPU build" if look["cuda"] else "CPU build"
    return Check("TensorFlow", "ok", f"{look['tensorflow']} ({build}), Keras {look['keras']}")


def _gpus(look: dict) -> Check:
    seen = look.get("gpus", [])
    present = len(list(DRIVER.iterdir())) if DRIVER.is_dir() else 0
    if seen:
        return Check("GPUs", "ok", f"{len(seen)}: {', '.join(sorted(set(seen)))}")
    if present:
        advice = (
            "CUDA_VISIBLE_DEVICES hides them, or the driver is too old for CUDA 12.5"
            if look.get("cuda")
            else "this is the CPU environment: environment.yml makes the one for GPUs"
        )
        return Check("GPUs", "warning", f"{present} in the machine, none that TensorFlow sees", advice)
    return Check("GPUs", "ok", "none, training runs on the processor")


def _kernels(look: dict) -> Check:
    if "error" in look:
        return Check("Kernels", "warning", f"not compiled, training is slower: {look['error']}", "apt-get install g++")
    return Check("Kernels", "ok", f"compiled for this processor ({look['library']})")


def _horovod(look: dict, *, gpus: bool) -> Check:
    if "error" in look:
        return Check("Horovod", "failed", look["error"], INSTALL)
    nccl = f"NCCL {look['nccl'] // 10000}.{look['nccl'] // 100 % 100}.{look['nccl'] % 100}" if look["nccl"] else ""
    built = [name for name in ("MPI" if look["mpi"] else "", nccl) if name]
    found = f"{look['horovod']}, built with {' and '.join(built) or 'neither MPI nor NCCL'}"
    if not look["mpi"]:
        return Check("Horovod", "failed", found, f"ranks start over MPI: {INSTALL}")
    if gpus and not nccl:
        return Check("Horovod", "warning", found, "GPUs exchange gradients over NCCL: build it as environment.yml says")
    return Check("Horovod", "ok", found)


def _mpiexec(mpiexec: Path | None) -> Check:
    if mpiexec is None:
        return Check("mpiexec", "failed", "there is none, here or on PATH", INSTALL)
    done = _run([str(mpiexec), "--version"], 30.0)
    if done.returncode:
        return Check("mpiexec", "failed", f"{mpiexec}: {_last_line(done)}", INSTALL)
    found = f"{done.stdout.splitlines()[0]}, {mpiexec}"
    if mpiexec.parent != Path(sys.executable).parent:
        return Check("mpiexec", "warning", found, f"it is not the one Horovod was built with: {INSTALL}")
    return Check("mpiexec", "ok", found)


def _allreduce(mpiexec: Path, timeout: float) -> Check:
    # A machine of one core, or a batch job of one task, offers one slot.
    command = [str(mpiexec), "-n", "2", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    look = _run_python(_ALLREDUCE, timeout, before=command)
    name, advice = "All-reduce", "try `mpiexec -n 2 hostname` in this environment, and see what it says"
    if "error" in look:
        return Check(name, "failed", f"two ranks: {look['error']}", advice)
    if (look["size"], look["sum"]) != (2, 3.0):
        found = f"{look['size']} ranks added 1 and 2 to {look['sum']:g}"
        return Check(name, "failed", found, f"Horovod and mpiexec are of different MPIs: {INSTALL}")
    return Check(
        name, "ok", f"two ranks: {look['latency'] * 1e3:.1f} ms for one number, {look['bandwidth'] / 1e9:.1f} GB/s"
    )


def _run_python(code: str, timeout: float, *, before: list[str] | None = None) -> dict:
    """The JSON that this code prints last, run by this Python; or {"error": why there is none}."""
    done = _run([*(before or []), sys.executable, "-c", code], timeout)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": _last_line(done)}


def _run(command: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run a command, and end it with all that it started when the time is over or this process is interrupted."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | MPI_ENVIRONMENT,
        start_new_session=True,
    ) as process:
        try:
            out, told = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(command, 124, "", f"no answer within {timeout:g} s")
        finally:
            if process.poll() is None:
                _end(process)
    return subprocess.CompletedProcess(command, process.returncode, out, told)


def _end(process: subprocess.Popen) -> None:
    # mpiexec ends its ranks when it is asked to; they stand in process groups of their own.
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a failed command said last; of Python's errors that is the line that counts."""
    lines = [line for line in done.stderr.splitlines() if line.strip(" -*")]
    errors = [line for line in lines if "Error" in line.split(":")[0]]
    return (errors or lines or [f"ended with status {done.returncode} and said nothing"])[-1].strip()


def _granted_cores() -> float:
    """The cores that a container or a batch job grants by its control groups; infinite without a limit."""
    limits = [limit.split() for limit in _cgroup("cpu.max")]
    return min((int(quota) / int(period) for quota, period in limits if quota != "max"), default=float("inf"))


def _available_memory() -> int:
    """Bytes that can still be taken in the machine, or all that a container or a batch job grants if that is less."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    return min([available, *(int(limit) for limit in _cgroup("memory.max") if limit != "max")])


def _cgroup(name: str) -> Iterator[str]:
    """What this file says in this process's control group and in those above it, where there is one."""
    own = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    for group in [Path(own[0]), *Path(own[0]).parents] if own else []:
        with suppress(OSError):
            yield (Path("/sys/fs/cgroup") / group.relative_to("/") / name).read_text().strip()
