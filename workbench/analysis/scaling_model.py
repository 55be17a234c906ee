"""What a data-parallel training step takes: computing, exchanging gradients, waiting for the slowest rank.

Physics on paper: it fits nothing (`scaling.py` does) and answers nothing (`forecast.py` does).

    step = (compute + input) * (1 + jitter * m(n)) + max(exchange - overlap * compute, last bucket)

m(n) is the expected largest of n standard normals. It rises about as sqrt(2 ln n), which is why efficiency keeps
falling long after a ring's (n - 1) / n has levelled off.

    from workbench.analysis.scaling_model import FABRICS, Exchange, StepModel

    exchange = Exchange(gradient_bytes=28e6, fabric=FABRICS["4 V100, EDR InfiniBand"])
    StepModel(per_image=0.005, jitter=0.1, batch_size=64, exchange=exchange).seconds([1, 4, 16])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
from scipy.special import log_ndtr

from workbench import WorkbenchError

LIMIT = 4096  # the most workers that anything here speaks of
ALGORITHMS = ("ring", "hierarchical")
BYTES_SENT = {"none": 1.0, "fp16": 0.5}  # of each byte of a float32 gradient, by compression
PARTS = ("compute", "input wait", "waiting for the slowest", "exposed communication")


@dataclass(frozen=True)
class Fabric:
    """What workers talk over.

    Attributes:
        workers_per_node: 1 or more.
        latency_within, latency_between: seconds until a message begins to arrive, on one node and between two.
        bandwidth_within: bytes per second that a worker sends to its neighbour on the node.
        bandwidth_between: bytes per second that a node sends, all its workers together.
    """

    workers_per_node: int
    latency_within: float
    latency_between: float
    bandwidth_within: float
    bandwidth_between: float

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not value >= (0 if field.name.startswith("latency") else 1):
                raise WorkbenchError(f"`{field.name}` of a fabric is {value}: it has to be a positive number.")


# Line rates as sold, latencies as MPI and NCCL commonly reach them: on paper, to be replaced by what is measured.
FABRICS = {
    # As measured on a virtual machine of two cores: a gradient of 28 MB in 14 ms.
    "shared memory": Fabric(LIMIT, 2e-5, 2e-5, 2e9, 2e9),
    # The article's: four V100 SXM2 with NVLink and one EDR adapter a server (Dell knowledge base 000124384).
    "4 V100, EDR InfiniBand": Fabric(4, 5e-6, 1e-5, 100e9, 12.5e9),
    "4 V100, 10 Gb Ethernet": Fabric(4, 5e-6, 5e-5, 100e9, 1.25e9),
    "8 H100, 8 NDR InfiniBand": Fabric(8, 5e-6, 1e-5, 450e9, 400e9),
}


def find_fabric(name: str) -> Fabric:
    """A fabric of `FABRICS` by its name; an unknown one is a WorkbenchError that lists them."""
    if name not in FABRICS:
        raise WorkbenchError(f"There is no fabric `{name}`: choose one of {'; '.join(FABRICS)}.")
    return FABRICS[name]


@dataclass(frozen=True)
class Exchange:
    """How gradients are averaged over all workers in every step.

    The costs are those of a ring, 2 (n - 1) messages of 1/n of a bucket each (Patarasuk, Yuan: Bandwidth optimal
    all-reduce algorithms for clusters of workstations, 2009), whose slowest link sets the pace. "hierarchical" reduces
    and gathers within each node, and runs rings between nodes over what is left (Sergeev, Del Balso: Horovod,
    arXiv:1802.05799, 2018).

    Attributes:
        gradient_bytes: of all gradients in float32.
        fabric: what they travel over.
        algorithm: "ring" or "hierarchical".
        compression: "none", or "fp16", which sends half of the bytes.
        fusion_bytes: size of Horovod's fusion buffer; gradients travel in as few equal buckets as fit into it.
        overlap: share of computing during which buckets can travel already, 0 to 1. This workbench sends all gradients
            as one group when the last one is there, so its share is 0; tensor by tensor it is about two thirds, the
            backward pass's.
        cycle: seconds between two looks of Horovod for work; half of it is waited per bucket.
    """

    gradient_bytes: float
    fabric: Fabric
    algorithm: str = "ring"
    compression: str = "none"
    fusion_bytes: float = 128 * 2**20
    overlap: float = 0.0
    cycle: float = 1e-3

    def __post_init__(self):
        if self.algorithm not in ALGORITHMS:
            raise WorkbenchError(f"There is no all-reduce `{self.algorithm}`: choose one of {', '.join(ALGORITHMS)}.")
        if self.compression not in BYTES_SENT:
            raise WorkbenchError(
                f"There is no compression `{self.compression}`: choose one of {', '.join(BYTES_SENT)}."
            )
        if not 0 <= self.overlap <= 1:
            raise WorkbenchError(f"`overlap` is {self.overlap}: it has to be a share between 0 and 1.")
        for name, least in (("gradient_bytes", 1), ("fusion_bytes", 1), ("cycle", 0)):
            if not getattr(self, name) >= least:
                raise WorkbenchError(f"`{name}` is {getattr(self, name)}: it has to be {least} or more.")

    @property
    def buckets(self) -> int:
        """In how many messages the gradients travel."""
        return int(np.ceil(self.gradient_bytes * BYTES_SENT[self.compression] / self.fusion_bytes))

    def bucket_seconds(self, workers: Sequence[int] | np.ndarray) -> np.ndarray:
        """Seconds to average one bucket over n workers; 0 for one worker."""
        n, fabric = np.asarray(workers, dtype=float), self.fabric
        size = self.gradient_bytes * BYTES_SENT[self.compression] / self.buckets
        crosses = n > fabric.workers_per_node
        if self.algorithm == "ring":
            latency = np.where(crosses, max(fabric.latency_between, fabric.latency_within), fabric.latency_within)
            slowest = min(fabric.bandwidth_between, fabric.bandwidth_within)
            seconds = _ring(n, size, latency, np.where(crosses, slowest, fabric.bandwidth_within))
        else:
            nodes = np.ceil(n / fabric.workers_per_node)
            within = np.minimum(n, fabric.workers_per_node)
            seconds = _ring(within, size, fabric.latency_within, fabric.bandwidth_within)
            seconds = seconds + _ring(nodes, size, fabric.latency_between, fabric.bandwidth_between)
        return np.where(n > 1, seconds + self.cycle / 2, 0.0)

    def exposed(self, workers: Sequence[int] | np.ndarray, compute: np.ndarray | float) -> np.ndarray:
        """Seconds of the exchange that no computing hides: at least those of the last bucket."""
        bucket = self.bucket_seconds(workers)
        return np.maximum(self.buckets * bucket - self.overlap * np.asarray(compute), bucket)


@dataclass(frozen=True)
class StepModel:
    """What a step takes.

    Attributes:
        per_image: seconds that a worker computes for each image.
        jitter: standard deviation of a rank's time for its own part of a step, as a share of that time; ranks vary
            independently. Whatever grows with the workers and is no communication is read as jitter, too: workers that
            share a host's memory or disk.
        batch_size: images per worker and step.
        exchange: how gradients are averaged.
        overhead: seconds of a step that do not depend on its images.
        input_per_image: seconds that a worker waits for each image.
    """

    per_image: float
    jitter: float
    batch_size: int
    exchange: Exchange
    overhead: float = 0.0
    input_per_image: float = 0.0

    def parts(self, workers: Sequence[int] | np.ndarray, batch: np.ndarray | float | None = None) -> dict:
        """Seconds of each of `PARTS`, arrays as long as `workers`; `batch` is images per worker, else as fitted."""
        n = np.asarray(workers, dtype=int)
        batch = np.broadcast_to(np.asarray(self.batch_size if batch is None else batch, dtype=float), n.shape)
        compute, wait = self.overhead + self.per_image * batch, self.input_per_image * batch
        late = (compute + wait) * self.jitter * expected_maximum(n)
        return dict(zip(PARTS, (compute, wait, late, self.exchange.exposed(n, compute)), strict=True))

    def seconds(self, workers: Sequence[int] | np.ndarray, batch: np.ndarray | float | None = None) -> np.ndarray:
        """Seconds per step at each number of workers."""
        return sum(self.parts(workers, batch).values())


def expected_maximum(workers: Sequence[int] | np.ndarray) -> np.ndarray:
    """The expected largest of n independent standard normals, n from 1 to `LIMIT` 0, 0.56, 0.85, 1.03 for 1 to 4.

    David, Nagaraja: Order Statistics, 3rd edition, 2003. sqrt(2 ln n), its limit, is too high: 4.1 for 3.6 at 4,096.
    """
    n = np.asarray(workers, dtype=int)
    if n.size and not 1 <= n.min() <= n.max() <= LIMIT:
        wrong = n.min() if n.min() < 1 else n.max()
        raise WorkbenchError(f"`workers` is {wrong}: the model speaks of 1 to {LIMIT:,}.")
    return _maxima()[n - 1]


@lru_cache(maxsize=1)
def _maxima() -> np.ndarray:
    x, step = np.linspace(-10, 10, 801, retstep=True)
    below = np.exp(np.arange(1, LIMIT + 1)[:, None] * log_ndtr(x))  # that the largest is below x
    # The mean of what has that distribution: the integral of 1 - F above 0, less that of F below 0.
    return np.maximum((np.heaviside(x, 0.5) - below).sum(axis=1) * step, 0.0)


def _ring(n: np.ndarray, size: float, latency: np.ndarray | float, bandwidth: np.ndarray | float) -> np.ndarray:
    return 2 * (n - 1) * (latency + size / (n * bandwidth))
