"""What `make bench` compares: the sides, how they are started, and the goal of each row."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from party import Party

from workbench.training.launch import ENGINE_ENVIRONMENT

HERE = Path(__file__).parent
OURS = sys.executable
PEERS = str(HERE.parents[1] / ".peers" / "bin" / "python")
WITH_PEERS = ("torch", "ddp")  # the sides that need that environment
MPIEXEC = [str(Path(sys.executable).with_name("mpiexec")), "--bind-to", "core", "-n"]


@dataclass(frozen=True)
class Row:
    """A comparison of two sides, or of a side with a fixed number.

    `of` names the number of a side's answer that counts; the goal is the least ratio ours/peer where more is better,
    the largest where less is.
    """

    name: str
    says: str
    unit: str
    ours: str
    peer: str | float
    goal: float
    better: str = "more"
    of: str = "value"


@dataclass(frozen=True)
class Comparison:
    """Sides that are measured in turns, and the rows made of them."""

    sides: dict[str, Callable[[], Party]]
    rows: list[Row]
    turns: int = 5


def _side(name: str, script: str, *arguments, python: str = OURS, processes: int = 1) -> Callable[[], Party]:
    """A side of one or more processes; `{i}` in an argument is the number of the process."""
    commands = [
        [python, str(HERE / script), *(str(argument).format(i=i) for argument in arguments)] for i in range(processes)
    ]
    return lambda: Party(name, commands)


def _ranks(name: str, script: str, *arguments, size: int = 2) -> Callable[[], Party]:
    """A side of MPI ranks, one core each."""
    command = [*MPIEXEC, str(size), OURS, str(HERE / script), *map(str, arguments)]
    return lambda: Party(name, [command], environment=ENGINE_ENVIRONMENT)


def _steps(size: int, batch: int, precision: str, goals: dict[str, float], *, steps: int) -> Comparison:
    """Training steps in one process with two threads."""
    asked = ("--size", size, "--batch", batch, "--precision", precision, "--steps", steps, "--threads", 2)
    sides = {
        "ours": _side("ours", "keras_steps.py", *asked),
        "keras": _side("Keras 3", "keras_steps.py", "--of", "keras", *asked),
        "torch": _side("PyTorch", "torch_steps.py", *asked, python=PEERS),
    }
    short = "bf16" if precision == "mixed_bfloat16" else "f32"
    names = {"keras": "stock Keras 3", "torch": "PyTorch eager, channels last"}
    rows = [
        Row(
            f"step-{size}-{short}-{peer}",
            f"DenseNet-121 training step, {size} px, batch {batch}, against {names[peer]}",
            "images/s",
            "ours",
            peer,
            goal,
        )
        for peer, goal in goals.items()
    ]
    return Comparison(sides, rows)


_TWO = ("--size", 224, "--batch", 16, "--precision", "mixed_bfloat16", "--steps", 3)

COMPARISONS = [
    _steps(224, 16, "mixed_bfloat16", {"keras": 2.4, "torch": 1.05}, steps=3),
    _steps(224, 16, "float32", {"keras": 1.5, "torch": 1.05}, steps=2),
    _steps(128, 32, "mixed_bfloat16", {"keras": 2.4, "torch": 1.05}, steps=3),
    _steps(128, 32, "float32", {"keras": 1.5, "torch": 1.05}, steps=2),
    Comparison(
        {
            "two ranks": _ranks("two ranks", "keras_steps.py", "--threads", 1, *_TWO),
            "one process": _side("one process", "keras_steps.py", "--threads", 2, *_TWO),
            "two alone": _side("two alone", "keras_steps.py", "--threads", 1, "--core", "{i}", *_TWO, processes=2),
            "ddp": _side(
                "DDP", "torch_steps.py", "--threads", 1, "--ranks", 2, "--rank", "{i}", *_TWO, python=PEERS, processes=2
            ),
        },
        [
            Row(
                "ranks-one-process",
                "two ranks of one thread against one process of two",
                "images/s",
                "two ranks",
                "one process",
                1.15,
            ),
            Row(
                "ranks-no-exchange",
                "two ranks against two processes that exchange nothing",
                "images/s",
                "two ranks",
                "two alone",
                0.95,
            ),
            Row(
                "ranks-ddp", "two ranks against PyTorch DDP (gloo), one core each", "images/s", "two ranks", "ddp", 1.05
            ),
        ],
    ),
    Comparison(
        {
            "train()": _side("train()", "train_whole.py"),
            "step": _side("step", "keras_steps.py", "--size", 224, "--precision", "mixed_bfloat16", "--steps", 10),
            "predict": _side(
                "predict", "keras_steps.py", "--size", 224, "--precision", "mixed_bfloat16", "--steps", 5, "--predict"
            ),
        },
        [
            Row(
                "train-whole",
                "train(), an epoch of 50 steps with all that belongs to it, against the bare step, 224 px",
                "images/s",
                "train()",
                "step",
                0.95,
            ),
            Row("validation", "predictions against training, 224 px", "images/s", "predict", "step", 2.5),
        ],
        turns=3,
    ),
    Comparison(
        {"first": _side("first", "train_whole.py", "--of", "first-step")},
        [
            Row(
                "first-step",
                "from the call of train() to the end of its first step, 224 px",
                "s",
                "first",
                10.0,
                1,
                "less",
            )
        ],
        turns=3,
    ),
    Comparison(
        {
            "raw": _side("raw", "data_input.py"),
            "png": _side("png", "data_input.py", "--encoding", "png"),
            "jpeg": _side("jpeg", "data_input.py", "--encoding", "jpeg"),
            "authors": _side("authors", "data_input.py", "--of", "authors"),
            "torch": _side("PyTorch", "data_input_torch.py", python=PEERS),
        },
        [
            Row(
                "input-authors",
                "raw shards, 256 to 224 px, augmented, against decoding 1024² PNGs at every step",
                "images/s a core",
                "raw",
                "authors",
                40,
            ),
            Row(
                "input-torch",
                "the same against PyTorch's DataLoader over 256 px PNGs",
                "images/s a core",
                "raw",
                "torch",
                3,
            ),
            Row("input-raw", "the same against a fixed rate", "images/s a core", "raw", 3000.0, 1),
            Row("input-jpeg", "JPEG shards against a fixed rate", "images/s a core", "jpeg", 3000.0, 1),
            Row(
                "input-png",
                "PNG shards against PyTorch's DataLoader over 256 px PNGs",
                "images/s a core",
                "png",
                "torch",
                1,
            ),
        ],
        turns=3,
    ),
    Comparison(
        {
            "100": _side("100", "data_memory.py", "--shards", 100),
            "1000": _side("1000", "data_memory.py", "--shards", 1000),
        },
        [
            Row(
                "input-memory",
                "memory of the input pipeline: 1,000 shards against 100",
                "MiB",
                "1000",
                "100",
                1.5,
                "less",
            )
        ],
        turns=1,
    ),
    Comparison(
        {
            "one": _side("one", "data_write.py", "--images", 512),
            "two": _side("two", "data_write.py", "--images", 4096, "--processes", 2),
            "pillow": _side("Pillow", "data_write.py", "--of", "pillow", "--images", 256),
        },
        [
            Row(
                "shards-pillow",
                "writing shards from 1024² PNGs, one core, against a loop with Pillow",
                "images/s",
                "one",
                "pillow",
                1.2,
            ),
            Row("shards-two", "two processes against one", "images/s", "two", "one", 1.8),
            Row("shards-memory", "largest process", "MiB", "two", 1024.0, 1, "less", of="mebibytes"),
        ],
        turns=3,
    ),
    Comparison(
        {"tables": _side("tables", "data_tables.py")},
        [
            Row(
                "tables",
                "reading NIH's 112,120 rows, splitting, finding the files, planning shards",
                "s",
                "tables",
                3.0,
                1,
                "less",
            )
        ],
        turns=3,
    ),
    Comparison(
        {
            "ours": _side("ours", "resamples.py"),
            "scikit-learn": _side("scikit-learn", "resamples.py", "--of", "scikit-learn"),
        },
        [
            Row(
                "resamples",
                "AUROC and average precision, 14 findings, 25,596 images, against scikit-learn in a loop",
                "resamples/s",
                "ours",
                "scikit-learn",
                20.0,
            ),
            Row("resamples-rate", "the same against 1,000 in 10 s", "resamples/s", "ours", 100.0, 1),
        ],
        turns=3,
    ),
    Comparison(
        {"notebook 01": _side("notebook 01", "start_up.py", "--of", "notebook-01")},
        [
            Row(
                "notebook-01",
                "notebook 01 on a table of 112,120 rows, every image there",
                "s",
                "notebook 01",
                60.0,
                1,
                "less",
            )
        ],
        turns=1,
    ),
    Comparison(
        {"cluster": _side("cluster", "start_up.py", "--of", "cluster")},
        [
            Row(
                "start-cluster",
                "from nothing to the first collective of two MPI ranks",
                "s",
                "cluster",
                12.0,
                1,
                "less",
            )
        ],
        turns=3,
    ),
    Comparison(
        {"run": _side("run", "start_up.py", "--of", "run")},
        [Row("run-again", "`make run` when everything is installed", "s", "run", 240.0, 1, "less")],
        turns=1,
    ),
]
