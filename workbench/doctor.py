"""What this machine can do for the workbench, and what it lacks: the command `workbench doctor`.

Every check is really made: TensorFlow is imported, two ranks average a gradient of DenseNet-121's size, and shards
are read from the disk. All of that happens in other processes, so that importing this module stays light and a crash
or a hang there is a finding here. What a recipe needs is looked at by `preflight`.

    from workbench import doctor
    doctor.main()                                   # prints them one by one; 0 if training can run
    [check for check in doctor.checks() if check.status != "ok"]
"""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from workbench import machine
from workbench.findings import Check, reading_check, show

INSTALL = "install the environment again: make clean, then make test (with GPUs make setup-gpu)"
TIMEOUT = 120.0  # seconds for TensorFlow's first import from a slow disk, and for two ranks to meet
OLDEST_DRIVER = 525  # of NVIDIA: the first whose minor version compatibility covers CUDA 12


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


def checks(*, folder: str | os.PathLike = ".", timeout: float = TIMEOUT) -> list[Check]:
    """Look at everything, in about half a minute.

    Args:
        folder: where data and results lie or will lie: its free space and the shards in its data/shards are looked at.
        timeout: seconds after which a process that was started counts as hanging, and is ended.
    """
    return list(_look(Path(folder), timeout))


def main(*, folder: str | os.PathLike = ".", timeout: float = TIMEOUT) -> int:
    """Print each check as it is made, with what to do about it; return 0 if training can run, else 1."""
    print("Looking at this machine, which takes about half a minute.", flush=True)
    failed = show(_look(Path(folder), timeout))
    print(f"Training cannot run: {', '.join(failed)}." if failed else "Training can run here.")
    return 1 if failed else 0


def _look(folder: Path, timeout: float) -> Iterator[Check]:
    yield _python()
    yield _cores()
    yield _ranks()
    yield _memory()
    yield _disk(folder)
    yield _shards(folder / "data" / "shards")
    tensorflow = machine.run_python(_LOOK_AT_TENSORFLOW, timeout=timeout)
    yield _tensorflow(tensorflow)
    gpus = bool(tensorflow.get("gpus"))
    yield _gpus(tensorflow)
    if machine.gpus_present():
        yield _driver()
    if not gpus and "error" not in tensorflow:
        yield _kernels(machine.run_python(_LOOK_AT_KERNELS, timeout=timeout))
    horovod = machine.run_python(_LOOK_AT_HOROVOD, timeout=timeout)
    yield _horovod(horovod, gpus=gpus)
    mpiexec = machine.find_mpiexec()
    yield _mpiexec(mpiexec)
    if mpiexec and "error" not in horovod:
        yield _allreduce(mpiexec, timeout, gpus=gpus)
    yield _slurm(machine.read_partitions())


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    found = f"{version}, {sys.prefix}"
    if sys.version_info[:2] != (3, 11):
        return Check("Python", "failed", found, f"the packages are pinned for Python 3.11: {INSTALL}")
    return Check("Python", "ok", found)


def _cores() -> Check:
    usable, physical, masked = machine.usable_cores(), machine.physical_cores(), len(os.sched_getaffinity(0))
    found = f"{usable:g} for this process, of {os.cpu_count()} in the machine"
    if physical and physical < masked:
        found += f"; {masked} hardware threads on {physical} cores"
    if usable < masked:
        # MPI binds by the affinity mask, which does not know of this limit.
        advice = f"ranks on more than {usable:g} cores take turns: train with `workers` {max(int(usable), 1)}"
        return Check("Cores", "warning", found, advice)
    if machine.is_busy():
        found += f"; load {os.getloadavg()[0]:.1f}"
        return Check("Cores", "warning", found, "other programs keep them busy, so that training takes longer")
    if usable < 2:
        return Check("Cores", "warning", found, "two ranks on one core take turns: ask for more cores")
    return Check("Cores", "ok", found)


def _ranks() -> Check:
    gpus, cores = machine.gpus_present(), len(os.sched_getaffinity(0))
    workers = gpus or cores
    each = max(1, cores // workers)
    kind = "GPU" if gpus else "core"
    words = f"`workers: 0` starts {workers}, one a {kind}, with {each} thread{'s' * (each > 1)} each"
    if workers > cores:
        return Check(
            "Ranks", "warning", words, f"there are {cores} cores for {gpus} GPUs: ask for a core or more a GPU"
        )
    return Check("Ranks", "ok", words)


def _memory() -> Check:
    available = machine.available_memory()
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


def _shards(parent: Path) -> Check:
    folders = [path.parent for path in parent.glob("*/info.json")]
    if not folders:
        return Check("Shards", "ok", f"none in {parent} yet, notebook 02 writes them")
    newest = max(folders, key=lambda folder: (folder / "info.json").stat().st_mtime)
    return reading_check(newest, sorted(newest.glob("*.tfrecord")))


def _tensorflow(look: dict) -> Check:
    if "error" in look:
        return Check("TensorFlow", "failed", look["error"], INSTALL)
    build = "GPU build" if look["cuda"] else "CPU build"
    return Check("TensorFlow", "ok", f"{look['tensorflow']} ({build}), Keras {look['keras']}")


def _gpus(look: dict) -> Check:
    seen = look.get("gpus", [])
    present = machine.gpus_present()
    if seen:
        return Check("GPUs", "ok", f"{len(seen)}: {', '.join(sorted(set(seen)))}")
    if present:
        advice = (
            "CUDA_VISIBLE_DEVICES hides them, or the driver is too old for CUDA 12.5"
            if look.get("cuda")
            else "this is the CPU environment: make setup-gpu, or environment.yml, makes the one for GPUs"
        )
        return Check("GPUs", "warning", f"{present} in the machine, none that TensorFlow sees", advice)
    return Check("GPUs", "ok", "none, training runs on the processor")


def _driver() -> Check:
    version = machine.driver_version()
    if not version:
        return Check("Driver", "warning", "NVIDIA's, of unknown version", "see what `nvidia-smi` says")
    if int(version.split(".")[0]) < OLDEST_DRIVER:
        return Check("Driver", "failed", f"NVIDIA {version}", f"CUDA 12.5 needs {OLDEST_DRIVER}.60 or newer: update it")
    return Check("Driver", "ok", f"NVIDIA {version}")


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
        return Check("Horovod", "warning", found, "GPUs exchange gradients over NCCL: make setup-gpu builds it so")
    return Check("Horovod", "ok", found)


def _mpiexec(mpiexec: Path | None) -> Check:
    if mpiexec is None:
        return Check("mpiexec", "failed", "there is none, here or on PATH", INSTALL)
    done = machine.run([str(mpiexec), "--version"], 30.0)
    if done.returncode:
        return Check("mpiexec", "failed", f"{mpiexec}: {machine.last_line(done)}", INSTALL)
    found = f"{done.stdout.splitlines()[0]}, {mpiexec}"
    if mpiexec.parent != Path(sys.executable).parent:
        return Check("mpiexec", "warning", found, f"it is not the one Horovod was built with: {INSTALL}")
    return Check("mpiexec", "ok", found)


def _allreduce(mpiexec: Path, timeout: float, *, gpus: bool = False) -> Check:
    # A machine of one core, or a batch job of one task, offers one slot.
    command = [str(mpiexec), "-n", "2", "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    look = machine.run_python(_ALLREDUCE, timeout=timeout, before=command)
    name, advice = "All-reduce", "try `mpiexec -n 2 hostname` in this environment, and see what it says"
    if "error" in look:
        advice += "; for NCCL, NCCL_DEBUG=INFO tells more and NCCL_SOCKET_IFNAME picks the network" if gpus else ""
        return Check(name, "failed", f"two ranks: {look['error']}", advice)
    if (look["size"], look["sum"]) != (2, 3.0):
        found = f"{look['size']} ranks added 1 and 2 to {look['sum']:g}"
        return Check(name, "failed", found, f"Horovod and mpiexec are of different MPIs: {INSTALL}")
    where = " through the processor's memory" if gpus else ""
    found = f"two ranks: {look['latency'] * 1e3:.1f} ms for one number, {look['bandwidth'] / 1e9:.1f} GB/s{where}"
    return Check(name, "ok", found)


def _slurm(partitions: list[machine.Partition] | str | None) -> Check:
    if partitions is None:
        return Check("Slurm", "ok", "not here (no `sinfo` on PATH): workers start on this host, or over ssh")
    if isinstance(partitions, str):
        return Check("Slurm", "warning", partitions, "its controller does not answer: try `sinfo`, or ask who runs it")
    if not partitions:
        return Check("Slurm", "warning", "it shows no partition", "ask who runs it for access to one")
    # The default one first, then those with most idle nodes.
    order = sorted(partitions, key=lambda part: (not part.default, -part.nodes.get("idle", 0), part.name))
    told = [_partition(part) for part in order[:4]]
    more = [f"and {len(order) - 4} more, see `sinfo`"] if len(order) > 4 else []
    found = "; ".join([*told, *more])
    if not any(part.up and {"idle", "mixed", "allocated", "completing"} & part.nodes.keys() for part in partitions):
        return Check("Slurm", "warning", found, "no node takes jobs: ask who runs it")
    return Check("Slurm", "ok", found)


def _partition(part: machine.Partition) -> str:
    states = ", ".join(f"{count} {state}" for state, count in part.nodes.items())
    limit = "no limit" if part.limit == "infinite" else f"at most {part.limit}"
    gpus = f", {part.gpus}" if part.gpus else ""
    marks = " (default)" * part.default + " (down)" * (not part.up)
    return f"{part.name}{marks}: {states}, {part.cores} cores{gpus}, {limit}"
