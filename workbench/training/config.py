"""What a training run is asked to do, checked before anything is started. Imports no TensorFlow.

config = TrainConfig(shard_folder="data/shards/synthetic", weights="none", image_size=64, epochs=6)
config.base_rate(size=2) * config.warmup(epoch=0, step=3, steps=60)
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from workbench import WorkbenchError

NETWORKS = (
    "DenseNet121",
    "DenseNet169",
    "DenseNet201",
    "ResNet50",
    "ResNet101",
    "VGG16",
    "MobileNetV2",
    "Tiny",
)
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
SCALINGS = ("none", "linear", "sqrt")
COMPRESSIONS = ("none", "fp16")
CRITERIA = ("auroc", "loss")
POLICIES = ("raise", "skip")
_KINDS = {  # by a field's annotation
    "str": (str, "a text"),
    "int": (int, "a whole number"),
    "float": (int | float, "a number"),
    "bool": (bool, "true or false"),
    "Sequence[str]": (Sequence, "a list of names"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; the defaults are CheXNet's as the article trained it.

    Attributes:
        shard_folder: shards to read, as `workbench.data.shards` wrote them.
        findings: names the shards must hold, in order; empty: whatever they hold.
        network, weights: see `workbench.training.network.build_network`; weights "none" or "" for a random start.
        precision: of the layers' arithmetic; weights stay float32 in each. "auto" goes by the oldest GPU of all workers
            (`precision_for`) and is float32 on CPUs, where the same seed has given the same weights from the beginning.
        image_size: side of the square that the network sees, in pixels.
        batch_size: images per worker and step.
        epochs: the most epochs to train.
        learning_rate: Adam's, for one worker.
        scaling: how it grows with the number of workers n: "none", "linear" (times n) or "sqrt" (times root n);
            Goyal et al. 2017, arXiv:1706.02677.
        warmup_epochs: epochs (fractions allowed) over which the rate climbs linearly from a tenth of itself.
        plateau_factor, plateau_patience: the rate is multiplied by the factor when the validation loss has not
            improved for that many epochs; patience 0 switches this off.
        early_stop_patience: end after so many epochs without a better one; 0 never.
        best_by: "auroc" keeps the epoch of the highest mean validation AUROC, "loss" that of the lowest loss.
        compression: "fp16" halves the gradients' traffic, at fp16's range; "none" leaves them, since between ranks of
            one host it brought nothing (28 MB a step for DenseNet-121), and it changes the numbers. Worth a try between
            hosts on Ethernet.
        hierarchical_allreduce: average within each host by NCCL first, then between hosts by MPI. Off, since NCCL's own
            rings know the hosts, and the step through MPI copies by way of the processors; worth a try with many GPUs
            a host and no InfiniBand. On one host, and without NCCL, Horovod passes it over.
        cycle_time_ms: how long Horovod gathers tensors before it exchanges them, in ms. Its own 1: a step exchanges all
            its gradients as one group, so a longer wait gathers nothing more (10 ms cost 8 % on two cores).
        fusion_mb: the buffer in which it joins small tensors to one message, in MiB; 0: each by itself. Its own 128,
            which takes all gradients of DenseNet-121 (28 MB) in one message.
        xla: compile forward and backward pass with XLA, without `fast`'s compiled operations. Off: on two cores the
            training step was slower with it, and on GPUs it has not been measured yet (`make bench-gpu` does).
        augment: flip, shift and contrast changes on training images.
        seed: of initial weights, data order and augmentation.
        threads: TensorFlow threads of each worker; 0: the cores the worker was given.
        damaged_records: "raise" stops at a record of the shards that fails its checksum and names it; "skip" checks all
            shards first, goes on without such records and lists them in the run's `skipped.csv`.
        damaged_limit: the most records that may be skipped.
    """

    shard_folder: str
    findings: Sequence[str] = ()
    network: str = "DenseNet121"
    weights: str = "imagenet"
    precision: str = "auto"
    image_size: int = 256
    batch_size: int = 64
    epochs: int = 10
    learning_rate: float = 1e-3
    scaling: str = "none"
    warmup_epochs: float = 0.0
    plateau_factor: float = 0.1
    plateau_patience: int = 1
    early_stop_patience: int = 0
    best_by: str = "auroc"
    compression: str = "none"
    hierarchical_allreduce: bool = False
    cycle_time_ms: float = 1.0
    fusion_mb: int = 128
    xla: bool = False
    augment: bool = True
    seed: int = 0
    threads: int = 0
    damaged_records: str = "raise"
    damaged_limit: int = 10

    def __post_init__(self):
        # A run's record may have been changed by hand.
        for field in fields(self):
            kind, told = _KINDS[field.type]
            value = getattr(self, field.name)
            _require(isinstance(value, kind), field.name, value, told)
        names = self.findings
        _require(all(isinstance(name, str) for name in names), "findings", names, "a list of names")
        _require(self.network in NETWORKS, "network", self.network, f"one of {', '.join(NETWORKS)}")
        named = ("auto", *PRECISIONS)
        _require(self.precision in named, "precision", self.precision, f"one of {', '.join(named)}")
        _require(self.scaling in SCALINGS, "scaling", self.scaling, f"one of {', '.join(SCALINGS)}")
        _require(self.compression in COMPRESSIONS, "compression", self.compression, f"one of {', '.join(COMPRESSIONS)}")
        _require(self.best_by in CRITERIA, "best_by", self.best_by, f"one of {', '.join(CRITERIA)}")
        _require(
            self.damaged_records in POLICIES, "damaged_records", self.damaged_records, f"one of {', '.join(POLICIES)}"
        )
        for name in ("image_size", "batch_size", "epochs"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value > 0, name, value, "a whole number above 0")
        for name in ("plateau_patience", "early_stop_patience", "threads", "seed", "damaged_limit"):
            value = getattr(self, name)
            _require(isinstance(value, int) and value >= 0, name, value, "a whole number, 0 or more")
        cycle, fusion = self.cycle_time_ms, self.fusion_mb
        _require(0 < cycle <= 1000, "cycle_time_ms", cycle, "above 0, at most 1000")
        # Horovod holds such a buffer for every device, from the first exchange on.
        _require(0 <= fusion <= 1024, "fusion_mb", fusion, "0 to 1024")
        rate = self.learning_rate
        _require(0 < rate < 1e38, "learning_rate", rate, "> 0, and such that float32 holds it")
        _require(0 < self.plateau_factor < 1, "plateau_factor", self.plateau_factor, "a number between 0 and 1")
        _require(0 <= self.warmup_epochs < math.inf, "warmup_epochs", self.warmup_epochs, "0 or more")

    @classmethod
    def from_parameters(cls, parameters: Mapping, root: Path = Path()) -> TrainConfig:
        """The config whose fields are taken by name from a notebook's parameters; other names are passed over.

        Args:
            parameters: names and values, such as a notebook's `globals()` or a run's record.
            root: where relative paths among them start.
        """
        chosen = {field.name: parameters[field.name] for field in fields(cls) if field.name in parameters}
        _require("shard_folder" in chosen, "shard_folder", None, "a folder of shards")
        for name in ("shard_folder", "weights"):
            _require(isinstance(chosen.get(name, ""), str | os.PathLike), name, chosen.get(name), "a text")
        paths = {"shard_folder": str(root / chosen["shard_folder"])}
        if chosen.get("weights", "none") not in ("imagenet", "none", ""):
            paths["weights"] = str(root / chosen["weights"])
        return cls(**chosen | paths)

    def to_parameters(self) -> dict:
        """The fields as a dictionary of plain values, for a run's record."""
        return asdict(self) | {"findings": list(self.findings)}

    def horovod_environment(self) -> dict[str, str]:
        """What Horovod reads when it starts, so it has to be given to `cluster.start`."""
        # Horovod: always all three, so that a run's record says what was, whatever the shell had set.
        return {
            "HOROVOD_HIERARCHICAL_ALLREDUCE": str(int(self.hierarchical_allreduce)),
            "HOROVOD_CYCLE_TIME": str(float(self.cycle_time_ms)),
            "HOROVOD_FUSION_THRESHOLD": str(self.fusion_mb * 2**20),
        }

    def base_rate(self, size: int) -> float:
        """The learning rate for `size` workers before warm-up and decay."""
        return self.learning_rate * {"none": 1.0, "linear": size, "sqrt": math.sqrt(size)}[self.scaling]

    def warmup(self, epoch: int, step: int, steps: int) -> float:
        """The factor, 0.1 to 1, at a step (from 0) of an epoch (from 0) of `steps` steps."""
        done = epoch + step / steps
        return 1.0 if done >= self.warmup_epochs else 0.1 + 0.9 * done / self.warmup_epochs


def precision_for(capability: tuple[int, int]) -> str:
    """The precision that a GPU computes fastest without losing accuracy, by its compute capability; (0, 0): a CPU.

    bfloat16 has float32's range and needs no loss scaling, so it comes first wherever tensor cores know it, which is
    from Ampere (8.0) on. Volta and Turing (7.x) have tensor cores for float16 alone, which needs the scaling. Older
    ones have none, and gain little.
    """
    return "mixed_bfloat16" if capability >= (8, 0) else "mixed_float16" if capability >= (7, 0) else "float32"


def better(criterion: str, row: dict, best: dict | None) -> bool:
    """Whether an epoch's history row beats the best so far; an undefined AUROC never does, except the first."""
    if best is None:
        return True
    if criterion == "loss":
        return row["val_loss"] < best["val_loss"]
    return row["val_auroc"] > best["val_auroc"] or (math.isnan(best["val_auroc"]) and row["val_auroc"] >= 0)


def decay_after(history: Sequence[dict], *, factor: float, patience: int) -> float:
    """The learning rate's plateau factor for the next epoch, from the rows of the epochs so far.

    As Keras's ReduceLROnPlateau on `val_loss`: after `patience` epochs without improvement by 1e-4 the rate is
    multiplied by `factor` and the count begins again. Being a function of the history alone, it needs no state
    of its own when a run is resumed.
    """
    decay, lowest, waited = 1.0, math.inf, 0
    for row in history:
        # An epoch without a loss to compare says nothing about a plateau.
        if math.isnan(row["val_loss"]):
            continue
        if row["val_loss"] < lowest - 1e-4:
            lowest, waited = row["val_loss"], 0
        else:
            waited += 1
        if patience and waited >= patience:
            decay, waited = decay * factor, 0
    return decay


def _require(holds: bool, name: str, value, expected: str) -> None:
    if not holds:
        raise WorkbenchError(f"`{name}` is {value!r}: it has to be {expected}.")
