"""Trainings on real MPI ranks that are broken at drawn moments, resumed, and held against an undisturbed one.

A fault strikes at one of the places where a rank gets on (every step, every batch that is predicted, start-up, the
middle of a checkpoint being written), or from outside after a drawn time. After each one: the error says what went, it
came in time, no process and no half-written file is left; and after the last one the weights and the history equal
those of a training that nothing disturbed, bit for bit.

    python tests/faults.py --faults 100 --seed 1       # the long mode: a line per fault, and the counts at the end
"""

import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parent))
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

import pandas as pd
import psutil

from workbench import WorkbenchError, runs
from workbench.data import chestxray14, shards, synthetic
from workbench.training import checkpoint, cluster, postmortem
from workbench.training.config import TrainConfig

EPOCHS, HANG_LIMIT, PER_TRAINING = 3, 10.0, 4
MARK = "WORKBENCH_FAULTS"  # in the environment of all that a fault may leave behind
TIMES = ["seconds", "images_per_second", "input_wait_share"]

# What the error has to say. Of a rank by itself, at one of its beats:
INSIDE = {
    "kill": r"Rank {rank} on \S+ died: it was ended by signal 9",
    "stop": r"Rank {rank} on \S+ has given no sign of life",
    "hang": r"(Rank {rank} on \S+|Every rank) has not moved",
    "raise": r"Rank {rank} failed with ZeroDivisionError: drawn",
    "memory": r"Rank {rank} failed with MemoryError",
    "exit": r"Rank {rank} on \S+ died: it ended without an error in the middle",
    "exit with a status": r"Rank {rank} on \S+ died: it ended with exit status 3",
    "crash": r"Rank {rank} on \S+ died: it was ended by signal 11",
}
# From outside, after a time:
OUTSIDE = {
    "kill a rank": r"Rank {rank} on \S+ died: it was ended by signal 9",
    "stop a rank": r"Rank {rank} on \S+ has given no sign of life",
    "kill mpiexec": r"workers are gone|Rank \d on \S+ died",
    "kill mpiexec's guard": r"workers are gone|Rank \d on \S+ died",
    "kill the controller": r"The controller of the workers died",
    "kill a scheduler": r"The controller of the workers died",
    "kill the controller's guard": r"The controller of the workers died",
    "interrupt": r"Interrupted",
    "kill the client": "",
}


@dataclass(frozen=True)
class Fault:
    """What happens to which rank, at its how-manieth beat (inside) or after how many seconds (outside)."""

    kind: str
    rank: int
    moment: float

    @property
    def inside(self) -> bool:
        return self.kind in INSIDE


def strike(kind: str, note: Path) -> None:
    """Runs on a rank: what a fault of this kind does to it. The clock is the same for all processes of a host."""
    note.write_text(str(time.monotonic()))
    if kind in ("kill", "stop", "crash"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "crash": signal.SIGSEGV}[kind])
        time.sleep(1)
    elif kind == "hang":
        time.sleep(600)
    elif kind == "raise":
        raise ZeroDivisionError("drawn")
    elif kind == "memory":
        bytearray(1 << 60)
    elif kind.startswith("exit"):
        os._exit(3 if "status" in kind else 0)


def train_with(config, folder, *, fault=None, resume=False, report=None):
    """Runs on a rank: `trainer.train`, with a fault at one of its beats; how many there were, and the weights."""
    from workbench.training import checkpoint, distributed, trainer

    beats, beat, sync = 0, trainer.beat, checkpoint.sync

    def count() -> None:
        nonlocal beats
        beats += 1
        if fault and distributed.start().rank == fault["rank"] and beats == fault["moment"]:
            strike(fault["kind"], folder / "struck")

    def beat_and_count(doing, **settings):
        beat(doing, **settings)
        count()

    def sync_and_count(path):
        count()  # a checkpoint that is written, and not yet in its place
        sync(path)

    trainer.beat, checkpoint.sync = beat_and_count, sync_and_count
    try:
        summary = trainer.train(config, folder, resume=resume, report=report)
        return {"beats": beats, "weights_sha256": summary["weights_sha256"]}
    finally:
        trainer.beat, checkpoint.sync = beat, sync


def prepare(folder: Path) -> TrainConfig:
    """A data set, its shards, and a configuration that trains in seconds."""
    data = synthetic.write_synthetic(folder / "data", patients=32, image_size=48, seed=3, progress=False)
    frame = chestxray14.read_dataset(data, validation_fraction=0.25)
    shards.write_shards(frame, folder / "shards", image_size=36, images_per_shard=16, processes=1, progress=False)
    return TrainConfig(
        shard_folder=str(folder / "shards"),
        network="Tiny",
        weights="none",
        image_size=32,
        batch_size=6,
        epochs=EPOCHS,
        plateau_patience=1,
    )


def attempt(config: TrainConfig, folder: Path, size: int, fault: Fault | None, *, resume: bool) -> list[dict]:
    """One call of training on a cluster of its own, with a fault or without."""
    with cluster.start(size, threads=1, oversubscribe=True, hang_limit=HANG_LIMIT) as ranks:
        inside = asdict(fault) if fault and fault.inside else None
        began = threading.Event()
        if fault and not fault.inside:
            told = (ranks, fault, began, folder / "struck")
            threading.Thread(target=strike_from_outside, args=told, daemon=True).start()
        began.set()
        advice = runs.how_to_resume(folder)
        return ranks.run("faults.train_with", config, folder, fault=inside, resume=resume, advice=advice)


def strike_from_outside(ranks: cluster.Workers, fault: Fault, began: threading.Event, note: Path) -> None:
    family = {process.pid: process for process in ranks._cluster._gather()}
    told = {pid: " ".join(process.cmdline()) for pid, process in family.items()}
    engines = [family[pid] for pid in told if told[pid].endswith("engine --mpi") and "guard" not in told[pid]]
    of_rank = {postmortem.rank_of(process): process for process in engines}
    guards = [family[pid] for pid in told if "training.guard" in told[pid]]
    mpi_guard = next(guard for guard in guards if "mpiexec" in told[guard.pid])
    controller_guard = next(guard for guard in guards if "ipyparallel.controller" in told[guard.pid])
    (mpiexec,), (controller,) = mpi_guard.children(), controller_guard.children()
    target, number = {
        "kill a rank": (of_rank[fault.rank], signal.SIGKILL),
        "stop a rank": (of_rank[fault.rank], signal.SIGSTOP),
        "kill mpiexec": (mpiexec, signal.SIGKILL),
        "kill mpiexec's guard": (mpi_guard, signal.SIGKILL),
        "kill the controller": (controller, signal.SIGKILL),
        "kill a scheduler": (controller.children()[fault.rank], signal.SIGKILL),
        "kill the controller's guard": (controller_guard, signal.SIGKILL),
        "interrupt": (psutil.Process(), signal.SIGINT),
        "kill the client": (psutil.Process(), signal.SIGKILL),
    }[fault.kind]
    began.wait()
    time.sleep(fault.moment)
    note.write_text(str(time.monotonic()))
    target.send_signal(number)


def left_behind(seconds: float = 15.0) -> list[str]:
    """The processes that carry the mark and still live after some seconds, this one aside."""
    deadline = time.monotonic() + seconds
    while True:
        left = []
        for process in psutil.process_iter():
            try:
                marked = process.environ().get(MARK) == os.environ[MARK]
                if marked and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                    left.append(f"{process.pid} {' '.join(process.cmdline())[-60:]}")
            except psutil.Error:
                continue
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.3)


def check_files(folder: Path) -> None:
    """Every file of a run that was broken off is whole; what `written_whole` was at has another name."""
    runs.read_run(folder)
    if (folder / "history.csv").exists():
        assert len(pd.read_csv(folder / "history.csv"))
    if runs.has_checkpoint(folder):
        state = checkpoint.read(folder)
        assert not state.notes, state.notes
    for path in folder.glob("*.keras"):
        if not path.name.startswith("."):
            subprocess.run([sys.executable, "-m", "zipfile", "-t", path], check=True, capture_output=True)


def break_once(config: TrainConfig, folder: Path, size: int, fault: Fault) -> dict:
    """Break one attempt in a process of its own: what it said, how long after the fault, and what was left.

    In a process of its own, because an interrupt and a killed client are faults as well.
    """
    asked = {"config": config.to_parameters(), "folder": str(folder), "size": size, "fault": asdict(fault)}
    client = subprocess.run(
        [sys.executable, __file__, "--attempt", json.dumps(asked)], capture_output=True, text=True, timeout=300
    )
    lines = [line for line in client.stdout.splitlines() if line.startswith("{")]
    said = json.loads(lines[-1]) if lines else {"said": "", "at": 0.0, "kind": f"status {client.returncode}"}
    left, struck = left_behind(), folder / "struck"
    said["seconds"] = max(said.pop("at") - float(struck.read_text()), 0.0) if struck.exists() else 0.0
    struck.unlink(missing_ok=True)
    said["finished"] = said["kind"] == "finished"
    expected = (INSIDE | OUTSIDE)[fault.kind].format(rank=fault.rank)
    wrong = []
    if left:
        wrong.append(f"left behind: {left}")
    if not said["finished"] and not re.search(expected, said["said"]):
        wrong.append(f"expected /{expected}/")
    if not said["finished"] and fault.kind != "kill the client" and "--resume" not in said["said"]:
        wrong.append("does not say how to resume")
    if said["kind"] not in ("finished", "WorkerError", "Interrupted") and fault.kind != "kill the client":
        wrong.append(f"{said['kind']}: {client.stderr[-500:]}")
    try:
        check_files(folder)
    except (AssertionError, WorkbenchError, subprocess.CalledProcessError, ValueError) as error:
        wrong.append(f"files: {error}")
    return said | {"wrong": wrong}


def draw(generator: random.Random, size: int, beats: int, kind: str) -> Fault:
    """A fault at a drawn moment."""
    moment = generator.randint(1, max(beats, 5)) if kind in INSIDE else generator.uniform(0.0, 7.0)
    return Fault(kind, generator.randrange(size), moment)


def break_often(config: TrainConfig, place: Path, faults: int, seed: int, *, sizes=(2, 3), kinds=None) -> list[dict]:
    """Trainings with some faults each until that many have struck; prints a line for each, returns all of them."""
    kinds = list(kinds or [*INSIDE, *OUTSIDE])
    generator = random.Random(seed)
    generator.shuffle(kinds)
    whole = {}
    for size in sizes:
        folder = runs.create_run(place, f"undisturbed-{size}")
        told = attempt(config, folder, size, None, resume=False)
        whole[size] = (told[0]["weights_sha256"], history(folder), min(rank["beats"] for rank in told))
        print(f"undisturbed on {size} ranks: {whole[size][2]} beats, weights {whole[size][0][:12]}", flush=True)
    results, number = [], 0
    while len(results) < faults:
        size = sizes[number % len(sizes)]
        folder = runs.create_run(place, f"broken-{number}")
        number += 1
        weights, rows, beats = whole[size]
        struck = []
        for _ in range(min(PER_TRAINING, faults - len(results))):
            complete = checkpoint.read(folder).epochs if runs.has_checkpoint(folder) else 0
            left = beats * (EPOCHS - complete) // EPOCHS
            fault = draw(generator, size, left, kinds[(len(results) + len(struck)) % len(kinds)])
            told = break_once(config, folder, size, fault) | {"fault": asdict(fault), "size": size, "after": complete}
            print(describe(told), flush=True)
            struck.append(told)
            if told["finished"]:  # it came too late to be noticed
                break
        told = attempt(config, folder, size, None, resume=runs.has_checkpoint(folder))
        same = told[0]["weights_sha256"] == weights and history(folder).equals(rows)
        left = [str(path) for path in folder.rglob(".*.part*")]
        print(
            f"  resumed to the end on {size} ranks: {'the same weights' if same else 'OTHER WEIGHTS'} {left or ''}",
            flush=True,
        )
        if not same or left:
            struck[-1]["wrong"] = [*struck[-1]["wrong"], f"weights or history differ, or parts are left {left}"]
        results += struck
        shutil.rmtree(folder)
    return results


def describe(told: dict) -> str:
    fault, verdict = Fault(**told["fault"]), "; ".join(told["wrong"]) or "ok"
    return (
        f"{fault.kind}, rank {fault.rank} of {told['size']}, at {fault.moment:.4g}, after {told['after']} epochs: "
        f"{verdict} ({told['seconds']:.1f} s: {told['said'] or told['kind']})"
    )


def history(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv").drop(columns=TIMES)


def run_attempt(asked: dict) -> None:
    """In a process of its own: one attempt, whose end is printed as a line of JSON."""
    # A shell makes what it starts in the background deaf to it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    fault, folder = Fault(**asked["fault"]), Path(asked["folder"])

    def tell(kind: str, said: str) -> None:
        print(json.dumps({"kind": kind, "said": said, "at": time.monotonic()}), flush=True)

    try:
        resume = runs.has_checkpoint(folder)
        attempt(TrainConfig(**asked["config"]), folder, asked["size"], fault, resume=resume)
        tell("finished", "")
    except BaseException as error:
        tell(type(error).__name__, str(error))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="*", help="only these")
    parser.add_argument("--attempt", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attempt:
        run_attempt(json.loads(options.attempt))
        return 0
    os.environ[MARK] = f"{os.getpid()}"
    with tempfile.TemporaryDirectory() as place:
        results = break_often(prepare(Path(place)), Path(place), options.faults, options.seed, kinds=options.kinds)
    counts = collections.Counter((told["fault"]["kind"], bool(told["wrong"])) for told in results)
    for kind in dict.fromkeys(told["fault"]["kind"] for told in results):
        longest = max(told["seconds"] for told in results if told["fault"]["kind"] == kind)
        print(
            f"{kind:30} {counts[kind, False]:4} held {counts[kind, True]:4} did not, told after at most {longest:.1f} s"
        )
    wrong = sum(bool(told["wrong"]) for told in results)
    print(f"{len(results)} faults, {len(results) - wrong} held, {wrong} did not")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
