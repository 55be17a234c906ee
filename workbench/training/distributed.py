"""Horovod for Keras 3: averaged gradients, broadcast, gathered predictions, equal batch-norm statistics.

Horovod 0.28's own Keras wrappers override hooks that Keras 3 never calls, so gradients silently stay unaveraged;
this module does the same work over Horovod's TensorFlow collectives. Without MPI everything here is the identity
of a world of one, so that the same code trains in a single process.

    world = start()                                   # Horovod, GPU, threads
    optimizer = averaging(keras.optimizers.Adam())    # averages gradients in apply()
    broadcast(model.variables + optimizer.variables)  # everybody begins as rank 0
    scores = gather(scores)                           # rows of all ranks, in rank order
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import keras
import numpy as np
import tensorflow as tf

from workbench import WorkbenchError
from workbench.training.config import COMPRESSIONS, precision_for
from workbench.training.pulse import exchange, uncounted


@dataclass(frozen=True)
class World:
    """Where this process stands among the ranks: its number, their number, the same on its host, its threads."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    threads: int = 1


_world: World | None = None
_hvd = None
_clock: tf.Variable | None = None  # of this rank's own time and that in exchanges, see `exchange_seconds`


def start(threads: int = 0) -> World:
    """Initialise Horovod if MPI started this process, pin the GPU, set the threads. Later calls change nothing.

    Args:
        threads: TensorFlow threads of this rank; 0 means as many as it was given cores, or, where ranks are not bound
            to any, its share of the host's.
    """
    global _world, _hvd
    if _world is not None:
        return _world
    _compute_alike()
    sharing = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1)) if os.environ.get("WORKBENCH_UNBOUND") else 1
    threads = threads or max(1, len(os.sched_getaffinity(0)) // sharing)
    # In a process where TensorFlow has computed already its threads are what they are.
    with contextlib.suppress(RuntimeError):
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    world = World(threads=threads)
    if launched_ranks() > 1:
        # Horovod: imported only where MPI runs, so that one process needs neither.
        import horovod.tensorflow as hvd

        with exchange(), uncounted():
            hvd.init()
        _hvd = hvd
        world = World(hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size(), threads)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # in which NVML numbers them too
    gpus = tf.config.list_physical_devices("GPU")
    if 0 < len(gpus) < world.local_size:
        raise WorkbenchError(
            f"{world.local_size} workers on a host with {len(gpus)} GPUs: ask for at most {len(gpus)} `workers` a host."
        )
    if gpus:
        # Horovod: one GPU per rank on each host, and only the memory it comes to need.
        gpu = gpus[world.local_rank]
        tf.config.set_visible_devices(gpu, "GPU")
        tf.config.experimental.set_memory_growth(gpu, True)
    _world = world
    return world


def settle_precision(precision: str) -> str:
    """The precision that all ranks use; "auto" becomes what the oldest of their GPUs is made for."""
    if precision != "auto":
        return precision
    capability = (0, 0)
    if gpus := tf.config.get_visible_devices("GPU"):
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", capability)
    # Horovod: ranks of different precision would hold different variables, and wait for each other for ever.
    return precision_for(min(map(tuple, gather(np.array([capability])).tolist())))


def measure_gpu() -> dict[str, float]:
    """What this rank's GPU does; empty without one.

    Returns:
        `gpu_memory`, the bytes that TensorFlow holds of it, and, where NVIDIA's NVML tells it, `gpu_use`, the share of
        about the last second in which it computed, 0 to 1.
    """
    gpus = tf.config.get_visible_devices("GPU")
    if not gpus:
        return {}
    use = _gpu_use(int(gpus[0].name.rpartition(":")[2]))
    memory = {"gpu_memory": tf.config.experimental.get_memory_info("GPU:0")["current"]}
    return memory if use is None else memory | {"gpu_use": use}


def _gpu_use(number: int) -> float | None:
    try:
        import pynvml  # which only the environment for GPUs has
    except ImportError:
        return None
    try:
        return pynvml.nvmlDeviceGetUtilizationRates(_gpu_handle(number)).gpu / 100
    except (pynvml.NVMLError, IndexError):  # such as of a part of a GPU (MIG), or by a name that was shortened
        return None


@lru_cache
def _gpu_handle(number: int):
    import pynvml

    pynvml.nvmlInit()
    # NVML counts all GPUs of the host, TensorFlow those that this process may use.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = visible.split(",")[number].strip() if visible else str(number)
    if name.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(name))
    return pynvml.nvmlDeviceGetHandleByUUID(name)


def _compute_alike() -> None:
    """Have every process compute the same numbers, to the last bit.

    TensorFlow's memory optimiser adds gradients up in an order that differs from process to process (seen in 2.18 as
    differences of 1e-7 in DenseNet-121's), and saves nothing here. There is no public way to leave it alone out.
    """
    from tensorflow.python.eager import context

    options = tf.compat.v1.ConfigProto()
    rewriting = options.graph_options.rewrite_options
    rewriting.memory_optimization = rewriting.NO_MEM_OPT
    context.context()._config = options


def launched_ranks() -> int:
    """How many ranks the MPI launcher started, read from its environment; 1 without a launcher."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 1


def averaging(optimizer: keras.optimizers.Optimizer, *, compression: str = "none") -> keras.optimizers.Optimizer:
    """The same optimizer, whose `apply` first averages the gradients over all ranks.

    Works in a loop of one's own and in `fit`. Wrap a `LossScaleOptimizer` whole, not its inner one: scaled
    gradients are averaged first, so that all ranks agree on whether a step has overflowed.

    Args:
        optimizer: any Keras 3 optimizer that has not been built.
        compression: "fp16" halves what travels, at fp16's range; "none" sends gradients as they are.
    """
    if compression not in COMPRESSIONS:
        raise WorkbenchError(f"There is no compression `{compression}`: choose one of {', '.join(COMPRESSIONS)}.")
    if _hvd is None:
        return optimizer
    base = type(optimizer)
    clock = _begin_clock()

    def apply(self, grads, trainable_variables=None):
        ready = _now_after(grads)
        averaged = _average_gradients(list(grads), compression)
        over = _now_after(averaged)
        # Seconds since the exchange before, by myself and in this one, summed up; and when this one was over.
        clock.assign(tf.stack([clock[0] + ready - clock[2], clock[1] + over - ready, over]))
        return base.apply(self, averaged, trainable_variables)

    averaged = type(f"Averaging{base.__name__}", (base,), {"apply": apply})
    return averaged.from_config(optimizer.get_config())


def _begin_clock() -> tf.Variable:
    global _clock
    with tf.device("CPU:0"):
        _clock = tf.Variable([0.0, 0.0, 0.0], dtype=tf.float64, trainable=False)
    return _clock


def _now_after(gradients: list) -> tf.Tensor:
    """The time at which all of these are computed, as float64 seconds; on a GPU as well, whose work comes later."""
    held = [gradient for gradient in gradients if gradient is not None]
    with tf.control_dependencies([tf.convert_to_tensor(gradient) for gradient in held]):
        # A number that has to come to the host cannot come before what the GPU was given to do earlier.
        last = tf.reshape(tf.convert_to_tensor(held[-1]), [-1])[0]
    with tf.device("CPU:0"):
        last = tf.identity(last)
        with tf.control_dependencies([last]):
            return tf.timestamp()


def begin_steps() -> None:
    """Have the time since the last step, in which something else was done, count as no step's."""
    if _clock is not None:
        _clock[2].assign(tf.timestamp())


def exchange_seconds() -> tuple[float, float]:
    """How long this rank has computed by itself, and how long it was in exchanges of gradients, since it began.

    Its own time of a step is from the end of one exchange to where its gradients are ready for the next: the optimizer,
    the input, forward and backward. In synchronous training all ranks do as many steps a second, and the slowest one
    is the one that takes longest by itself: the others wait for it in the exchange. Without MPI there is no exchange,
    and both are 0.
    """
    if _clock is None:
        return 0.0, 0.0
    own, exchanging, _ = _clock.numpy().tolist()
    return own, exchanging


def _average_gradients(gradients: list, compression: str) -> list:
    # Horovod: one grouped all-reduce; a fused message costs one latency instead of hundreds.
    codec = {"none": _hvd.Compression.none, "fp16": _hvd.Compression.fp16}[compression]
    held = [i for i, gradient in enumerate(gradients) if gradient is not None]
    averaged = _hvd.grouped_allreduce(
        [tf.convert_to_tensor(gradients[i]) for i in held], op=_hvd.Average, compression=codec
    )
    for i, gradient in zip(held, averaged, strict=True):
        gradients[i] = gradient
    return gradients


def broadcast(variables: list) -> None:
    """Give every rank rank 0's values of Keras variables (of a model AND its built optimizer)."""
    if _hvd is not None:
        # Horovod: all ranks begin as the same model, whatever their own start or restore was.
        with exchange():
            _hvd.broadcast_variables([variable.value for variable in variables], root_rank=0)


def average(values: dict[str, float]) -> dict[str, float]:
    """Average numbers by name over all ranks, each rank counting the same. Right for means, never for AUROC."""
    if _hvd is None:
        return dict(values)
    # Horovod: float64, so that the average is the same number on every rank to the last bit.
    with exchange():
        total = _hvd.allreduce(tf.constant(list(values.values()), tf.float64), op=_hvd.Average)
    return dict(zip(values, total.numpy().tolist(), strict=True))


def gather(rows: np.ndarray) -> np.ndarray:
    """Concatenate the rows of all ranks in rank order, on every rank. Ranks may hold different numbers of rows."""
    # Horovod: an all-gather along the first axis, which need not be even.
    if _hvd is None:
        return rows
    with exchange():
        return _hvd.allgather(tf.convert_to_tensor(rows)).numpy()


@contextlib.contextmanager
def timeline(path: str | os.PathLike) -> Iterator[None]:
    """Record Horovod's timeline of the block to a file, on rank 0; without other ranks there is nothing to record.

    `workbench.analysis.timeline` reads it. Horovod records only where it was started with `cluster.RECORDING`.
    """
    if _hvd is None:
        yield
        return
    # Horovod: the coordinator writes what all ranks do.
    _hvd.start_timeline(os.fspath(path))
    try:
        yield
    finally:
        _hvd.stop_timeline()


def average_batch_statistics(model: keras.Model) -> None:
    """Average batch normalisation's moving means and variances over all ranks, in place.

    Each rank has seen its own batches; before a model is evaluated or saved, all must hold the same statistics.
    """
    if _hvd is None:
        return
    statistics = [v for v in model.non_trainable_variables if v.name in ("moving_mean", "moving_variance")]
    if not statistics:
        return
    # Horovod: one message for all statistics.
    flat = tf.concat([tf.reshape(tf.cast(v.value, tf.float32), [-1]) for v in statistics], 0)
    with exchange():
        flat = _hvd.allreduce(flat, op=_hvd.Average)
    sizes = [int(np.prod(v.shape)) for v in statistics]
    for variable, part in zip(statistics, tf.split(flat, sizes), strict=True):
        variable.assign(tf.reshape(part, variable.shape))


def measure_exchange(numbers: int = 7_000_000, times: int = 10) -> dict:
    """Time an all-reduce of one number and one of many; their default is DenseNet-121's gradient.

    Returns:
        On every rank: rank, threads, sum (of every rank's number plus one), latency (median seconds for one number) and
        bandwidth (bytes of float32 a second for many); these are nan with one rank alone.
    """
    world = start()
    told = {"rank": world.rank, "threads": world.threads, "sum": 1.0, "latency": np.nan, "bandwidth": np.nan}
    if _hvd is None:
        return told

    def seconds(size: int) -> float:
        took, values = [], tf.fill([size], world.rank + 1.0)
        for _ in range(times):
            began = time.perf_counter()
            with exchange():
                total = _hvd.allreduce(values, op=_hvd.Sum, name=f"measured.{size}")
            took.append(time.perf_counter() - began)
        told["sum"] = float(total[0])
        return float(np.median(took[2:]))

    return told | {"latency": seconds(1), "bandwidth": 4 * numbers / seconds(numbers), "sum": told["sum"]}
