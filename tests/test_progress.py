"""The live view: what each rank measures of itself, the file that others follow, and how a view of it ends."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import psutil
import pytest

from workbench import Interrupted, WorkbenchError, runs
from workbench.training import panel, progress, session
from workbench.training.config import TrainConfig

RANK = {"images_per_second": 10.0, "input_wait_share": 0.01, "exchange_share": 0.2, "memory": 1 << 30}
ROW = {"epoch": 1, "loss": 0.3, "val_loss": 0.4, "val_auroc": float("nan"), "learning_rate": 1e-3, "seconds": 20.0}
ROW |= {"images_per_second": 9.0, "input_wait_share": 0.01, "best": 1}
STATE = {"phase": "training", "epoch": 2, "epochs": 4, "step": 5, "steps": 10, "loss": 0.2, "learning_rate": 1e-3}
STATE |= {"images_per_second": 12.0, "input_wait_share": 0.0, "epoch_seconds": 10.0, "history": [ROW]}
STATE |= {"ranks": [RANK, RANK | {"images_per_second": 8.0, "exchange_share": 0.1}]}

WATCHING = """
import sys, time
from workbench.training import panel, progress
with progress.watch(sys.argv[1]) as watching:
    watching({state})
    progress.WRITTEN = 0
    watching({state})
    print("written", flush=True)
    sys.stdin.readline()
"""


def test_the_slowest_rank_is_marked_once_all_have_measured():
    assert progress.find_slowest(STATE["ranks"]) == 1
    # Measured over other seconds, in which all were faster.
    assert progress.find_slowest([RANK, RANK | {"images_per_second": 12.0, "exchange_share": 0.1}]) == 1
    assert progress.find_slowest([RANK, {"memory": 1}]) is None
    assert progress.find_slowest([RANK]) is None
    assert progress.rank_lines(STATE["ranks"])[1].endswith(
        "8.0 images/s by itself, waits 1% for input, 10% in the exchange, 1.00 GiB, the slowest"
    )
    assert "<b>1 ◀ slowest</b>" in progress.rank_table(STATE["ranks"])


def test_the_use_of_a_gpu_is_shown_where_there_is_one():
    assert "GPU" not in progress.rank_table(STATE["ranks"])
    ranks = [RANK | {"gpu_memory": 3 * 2**30, "gpu_use": 0.87}, RANK | {"gpu_memory": 2**30}]
    assert progress.rank_lines(ranks)[0].endswith(
        "1.00 GiB, 3.00 GiB of the GPU, the GPU computes 87% of the time, the slowest"
    )
    table = progress.rank_table(ranks)
    assert "GPU memory</th>" in table
    assert "GPU use</th>" in table
    assert "3.00 GiB</td><td style='padding:0 8px;text-align:right'>87%</td>" in table
    assert "1.00 GiB</td><td style='padding:0 8px;text-align:right'></td>" in table


def test_time_left_counts_this_epoch_and_those_after_it():
    assert progress.time_left(STATE) == "about 10 s of this epoch and 50 s of training left"
    first = STATE | {"history": [], "epoch": 1}
    assert progress.time_left(first) == "about 10 s of this epoch and 1 min 10 s of training left"


@pytest.mark.parametrize(
    ("error", "status"), [(None, "finished"), (Interrupted("Stopped."), "interrupted"), (ValueError("bad"), "failed")]
)
def test_how_it_ended_is_in_the_file(new_run, error, status, capsys):
    folder = new_run()
    try:
        with progress.watch(folder) as watching:
            watching(STATE)
            assert progress.read(folder)["status"] == "running"
            if error:
                raise error
    except (Interrupted, ValueError):
        pass
    told = progress.read(folder)
    assert (told["status"], told["said"]) == (status, str(error or ""))
    assert told["progress"]["history"] == [ROW | {"val_auroc": None}]
    assert told["losses"] == [[1.5, 0.2]]
    capsys.readouterr()
    progress.follow(folder)
    said = capsys.readouterr().out
    assert said.startswith("epoch  1/4  loss 0.3000  val loss 0.4000  val AUROC undefined")
    assert said.splitlines()[-1] == progress.end_line(told)


def test_another_process_follows_it_and_says_that_it_was_broken_off(new_run, tmp_path):
    """What the lock says when the process that held it is killed."""
    folder = new_run()
    script = WATCHING.replace("{state}", repr(STATE).replace("nan", "float('nan')"))
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = os.environ | {"WORKBENCH_ROOT": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], **streams) as owner:
        while owner.stdout.readline() != "written\n":
            pass
        assert progress.read(folder)["status"] == "running"
        command = [sys.executable, "-m", "workbench", "watch"]
        with subprocess.Popen(command, **streams, env=environment) as watcher:
            assert watcher.stdout.readline() == f"{folder}\n"
            assert watcher.stdout.readline().startswith("epoch  1/4")
            owner.send_signal(signal.SIGKILL)
            said, _ = watcher.communicate(timeout=60)
            assert watcher.returncode == 1
    assert said == ("The training was broken off after 1 complete epochs: go on with `workbench run --resume trial`.\n")
    assert progress.read(folder)["status"] == "broken off"


def test_a_file_that_is_no_progress_is_a_sentence(new_run):
    folder = new_run()
    with pytest.raises(WorkbenchError, match="its training has not begun"):
        progress.read(folder)
    for text in ("{", "[]", json.dumps({"run": "x"})):
        (folder / runs.PROGRESS).write_text(text)
        with pytest.raises(WorkbenchError, match="cannot be read"):
            progress.read(folder)


def test_the_loss_within_epochs_is_thinned(new_run):
    folder = new_run()
    with progress.watch(folder) as watching:
        for step in range(1, 1001):
            watching(STATE | {"step": step, "steps": 1000})
    losses = progress.read(folder)["losses"]
    assert 50 < len(losses) <= progress.POINTS + 1
    assert losses[0][0] < 1.01
    assert losses[-1][0] == pytest.approx(2, abs=0.02)


@pytest.mark.mpi
@pytest.mark.parametrize("slow", [0, 1])
def test_the_rank_that_is_slowed_is_the_one_that_is_marked(ranks, tiny_config, new_run, slow):
    """Its steps a second are those of the other, so only the time that is its own can tell."""
    seen, config = [], replace(tiny_config, batch_size=1, epochs=1)
    ranks(2).run("rank_functions.train_slowed", slow, config, new_run(), watch=seen.append)
    told = [state["ranks"] for state in seen if all("exchange_share" in rank for rank in state["ranks"])]
    assert told, "the training was over before the ranks had measured anything"
    assert all(rank["memory"] > 1 << 20 for ranks in told for rank in ranks)
    marked = [progress.find_slowest(ranks) for ranks in told]
    assert marked.count(slow) > 0.7 * len(marked), told
    mean = [sum(ranks[rank]["exchange_share"] for ranks in told) / len(told) for rank in (0, 1)]
    assert mean[1 - slow] > mean[slow], "the other one waits for it"


@pytest.mark.mpi
def test_a_rank_that_is_stopped_half_of_the_time_from_outside_is_marked(ranks, tiny_config, new_run):
    """As by another user's work on its cores."""
    seen, config, two = [], replace(tiny_config, epochs=14), ranks(2)
    process, over = psutil.Process(two.run("os.getpid")[1]), threading.Event()

    def disturb() -> None:
        while not over.wait(0.1):
            process.suspend()
            time.sleep(0.1)
            process.resume()

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    try:
        two.run("workbench.training.trainer.train", config, new_run(), watch=seen.append)
    finally:
        over.set()
        disturbing.join()
    told = [state["ranks"] for state in seen if all("exchange_share" in rank for rank in state["ranks"])]
    marked = [progress.find_slowest(ranks) for ranks in told]
    assert marked.count(1) > 0.7 * len(marked) > 5, told


def test_curves_are_drawn_from_the_first_step_on_even_where_figures_are_undefined():
    one = {"progress": STATE | {"history": []}, "losses": [(0.1, 0.7)]}
    more = {"progress": STATE, "losses": [(0.1, 0.7), (1.0, None), (1.5, 0.2)]}
    assert all(panel.draw_curves(told).startswith(b"\x89PNG") for told in (one, more))


def test_a_table_of_many_epochs_keeps_the_last_and_the_best():
    row = {"loss": 0.5, "val_loss": 0.4, "val_auroc": 0.7, "learning_rate": 1e-3, "images_per_second": 9.0}
    row |= {"input_wait_share": 0.1, "seconds": 3.0}
    history = [row | {"epoch": epoch, "best": int(epoch == 7)} for epoch in range(1, 101)]
    table = progress.epoch_table(history)
    assert ">7 ★<" in table
    assert ">100<" in table
    assert ">81<" in table
    assert ">80<" not in table
    assert "79 more epochs are in history.csv" in table


def test_a_training_in_the_background_is_waited_for_only_where_nobody_looks(monkeypatch):
    """Other cells would have to wait as well."""
    training = session.Training(background=True)
    monkeypatch.setattr(progress, "looked_at", lambda: True)
    with pytest.raises(session.StillTraining, match="goes on in the background"):
        asyncio.run(training.wait())
    monkeypatch.setattr(progress, "looked_at", lambda: False)
    threading.Timer(0.3, training._over.set).start()
    assert asyncio.run(training.wait()) == []
    monkeypatch.setattr(progress, "looked_at", lambda: True)
    assert asyncio.run(training.wait()) == []


def test_while_a_training_is_awaited_each_interrupt_stops_it_and_none_breaks_off(monkeypatch):
    training, before = session.Training(), signal.getsignal(signal.SIGINT)

    async def interrupted() -> None:
        waiting = asyncio.create_task(training.wait())
        try:
            for number in (1, 2):
                await asyncio.sleep(0.1)
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(0.1)
                assert training._stops == number
        finally:
            training._error = Interrupted("Interrupted twice, and ended at once.")
            training._over.set()
        await waiting

    with pytest.raises(Interrupted, match="twice"):
        asyncio.run(interrupted())
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_before_it_is_awaited_stops_it_too(monkeypatch, tmp_path):
    """An event loop then cancels what is awaited next."""

    def slow_view(_stop):
        os.kill(os.getpid(), signal.SIGINT)
        return lambda told: None

    monkeypatch.setattr(progress, "view", slow_view)
    monkeypatch.setattr(session.Training, "_run", lambda training, *_: wait_for_stop(training))

    def wait_for_stop(training) -> None:
        for _ in range(200):
            training._look()
            time.sleep(0.05)

    with pytest.raises(Interrupted, match="before the first step"):
        asyncio.run(session.train(TrainConfig(shard_folder="none", network="Tiny"), tmp_path, workers=1))


@pytest.mark.mpi
def test_a_start_that_waits_can_be_stopped_and_the_view_tells_it(monkeypatch, tmp_path):
    """Workers may stand in a queue for hours."""
    told = []
    monkeypatch.setattr(progress, "view", lambda stop: told.append)
    config = TrainConfig(shard_folder=str(tmp_path), network="Tiny")

    async def stopped() -> None:
        training = await session.train(config, tmp_path, workers=1, background=True)
        training.stop()
        await training.wait()

    with pytest.raises(Interrupted, match=r"before the first step: nothing was written\.$"):
        asyncio.run(stopped())
    assert told[-1]["status"] == "interrupted"
    assert "It was stopped: Interrupted before" in progress.summary(told[-1])
    assert list(tmp_path.iterdir()) == []
