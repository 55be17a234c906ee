"""Whatever happens to a process, a disk or a clock: told within a minute, nothing left behind, and resumed exactly."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import faults
import numpy as np
import pandas as pd
import psutil
import pytest

from workbench import Interrupted, WorkbenchError, files, runs
from workbench.training import checkpoint, cluster, postmortem, trainer

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can mount a small disk, or become another user")


@pytest.mark.mpi
@pytest.mark.timeout(1800)
def test_faults_at_drawn_moments_lose_at_most_the_epoch_in_flight(tmp_path, monkeypatch):
    """Ten of the faults of the long mode, `python tests/faults.py`."""
    monkeypatch.setenv(faults.MARK, f"test-{os.getpid()}")
    kinds = ["kill", "stop", "hang", "exit", "memory", "kill a scheduler", "kill mpiexec", "kill the client", "raise"]
    results = faults.break_often(faults.prepare(tmp_path), tmp_path, 10, seed=5, kinds=[*kinds, "interrupt"])
    assert [faults.describe(told) for told in results if told["wrong"]] == []
    assert max(told["seconds"] for told in results) < 60
    assert sum(told["finished"] for told in results) < 3, "most faults have to come before the training's end"


@pytest.mark.mpi
def test_a_rank_that_is_stopped_while_the_workers_start_is_named():
    def stop_one():
        while True:
            for process in psutil.Process().children(recursive=True):
                if postmortem.rank_of(process) == 1:
                    process.send_signal(signal.SIGSTOP)
                    return
            time.sleep(0.02)

    thread = threading.Thread(target=stop_one, daemon=True)
    thread.start()
    said = r"Rank 1 \(process \d+\) was stopped from outside while the workers started"
    with pytest.raises(WorkbenchError, match=said), cluster.start(2, threads=1, oversubscribe=True, hang_limit=5):
        pass


@pytest.mark.mpi
def test_ranks_that_do_not_come_are_named():
    with pytest.raises(
        WorkbenchError, match=r"did not come up within 1 s \(0 of 2 came, waited for ranks: (0, 1|none)"
    ):
        cluster.start(2, threads=1, oversubscribe=True, timeout=1).__enter__()


@contextlib.contextmanager
def little_memory(megabytes: int):
    """A control group in which no more memory can be had, so that the kernel kills who takes more."""
    group = Path("/sys/fs/cgroup/memory/workbench-test")
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(megabytes << 20))
    except OSError as error:
        pytest.skip(f"memory cannot be limited here ({error})")
    try:
        yield group
    finally:
        group.rmdir()


@pytest.mark.mpi
def test_a_rank_that_the_kernel_kills_for_memory_is_told_as_such():
    with little_memory(64) as group, cluster.start(2, threads=1, oversubscribe=True) as ranks:
        said = r"Rank 1 on \S+ died: it was ended by signal 9 \(Killed\), because this host ran out of memory"
        with pytest.raises(cluster.WorkerError, match=said):
            ranks.run("rank_functions.take_memory", 1, str(group))


@pytest.mark.mpi
def test_the_stop_button_comes_to_a_step_s_end_and_keeps_what_is_complete(tiny_config, new_run, capsys):
    folder = new_run()

    def press_once(progress, pressed=[]):  # noqa: B006
        if progress["history"] and not pressed:
            pressed.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    with cluster.start(2, threads=1, oversubscribe=True) as ranks:
        told = {"watch": press_once, "advice": runs.how_to_resume(folder)}
        with pytest.raises(Interrupted, match=r"Interrupted before (step|predicting|validating).*resume"):
            ranks.run("workbench.training.trainer.train", replace(tiny_config, epochs=500), folder, **told)
        with pytest.raises(WorkbenchError, match="These workers have ended"):
            ranks.run("rank_functions.world")
    assert 1 <= checkpoint.read(folder).epochs < 500
    assert "interrupt once more to end at once" in capsys.readouterr().out


@pytest.mark.mpi
def test_a_second_press_does_not_wait_for_the_step_s_end():
    def press_twice():
        for _ in range(2):
            time.sleep(2)
            os.kill(os.getpid(), signal.SIGINT)

    with cluster.start(2, threads=1, oversubscribe=True) as ranks:
        ranks.run("rank_functions.world")
        began = time.monotonic()
        threading.Thread(target=press_twice, daemon=True).start()
        with pytest.raises(Interrupted, match="Interrupted twice"):
            ranks.run("rank_functions.hang_on", 0)
        assert time.monotonic() - began < cluster.STOPPING


@pytest.mark.mpi
def test_on_another_number_of_workers_it_goes_on_and_says_what_changes(ranks, tiny_config, new_run, capsys):
    folder = new_run()
    ranks(1).run("workbench.training.trainer.train", replace(tiny_config, epochs=1), folder)
    told = ranks(2).run("workbench.training.trainer.train", tiny_config, folder, resume=True)
    assert told[0]["epochs"] == 2
    assert told[0]["weights_sha256"] == told[1]["weights_sha256"]
    said = capsys.readouterr().out
    assert "[rank 0] `workers` 1 -> 2" in said
    assert "[rank 0] so a global batch has 4 -> 8 images, in another order than before" in said


def test_a_broken_checkpoint_leaves_the_one_before_in_use_and_the_end_is_the_same(tiny_config, new_run, capsys):
    straight, broken = new_run("straight"), new_run("broken")
    config = replace(tiny_config, epochs=3)
    expected = trainer.train(config, straight)
    trainer.train(replace(config, epochs=2), broken)
    last = broken / "checkpoint" / checkpoint.LAST
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    assert trainer.train(config, broken, resume=True)["weights_sha256"] == expected["weights_sha256"]
    said = capsys.readouterr().out
    assert f"{last} is damaged" in said
    assert "going on after epoch 1 of 3" in said
    timeless = [pd.read_csv(run / "history.csv").drop(columns=faults.TIMES) for run in (straight, broken)]
    pd.testing.assert_frame_equal(*timeless, check_exact=True)


def test_a_checkpoint_whose_zip_is_whole_but_whose_content_is_not_its_own_is_refused(tiny_config, new_run):
    folder = new_run()
    trainer.train(replace(tiny_config, epochs=1), folder)
    last = folder / "checkpoint" / checkpoint.LAST
    with np.load(last) as file:
        arrays = {name: file[name] for name in file.files}
    arrays["model_0000"] = arrays["model_0000"] + 1
    np.savez(last, **arrays)
    with pytest.raises(WorkbenchError, match="its hash is not that of what it holds"):
        checkpoint.read(folder)


def test_a_run_that_is_being_trained_is_not_trained_by_another_process(tiny_config, new_run, monkeypatch):
    folder = new_run()
    lock = folder / runs.TRAINING_LOCK
    script = f"from workbench import files\nwith files.held({str(lock)!r}, ''): print(1, flush=True); input()"
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script], **streams) as other:
        assert other.stdout.readline() == "1\n"
        assert runs.is_written(folder)
        said = f"The run trial is being written by process {other.pid} on"
        with pytest.raises(WorkbenchError, match=said), files.held(lock, "The run trial", wait=0.3):
            pass
        other.kill()
    # What a dead process left is free.
    assert lock.read_text().startswith(f"process {other.pid}")
    assert not runs.is_written(folder)
    trainer.train(replace(tiny_config, epochs=1), folder)


def test_two_runs_of_the_same_second_get_folders_of_their_own(tmp_path):
    folders = {runs.create_run(tmp_path, recipe="synthetic").name for _ in range(3)}
    assert len(folders) == 3


def test_a_clock_that_goes_backwards_changes_nothing(tiny_config, new_run, monkeypatch):
    straight, back = new_run("straight"), new_run("back")
    expected = trainer.train(tiny_config, straight)
    began, real = time.time(), time.time
    monkeypatch.setattr(time, "time", lambda: 2 * began - real() - 3600)
    assert trainer.train(tiny_config, back)["weights_sha256"] == expected["weights_sha256"]
    record = {"started": "2026-01-02T00:00:00+00:00", "ended": "2026-01-01T00:00:00+00:00", "stages": {}}
    assert runs.minutes(record) == 0


@contextlib.contextmanager
def small_disk(place: Path, megabytes: float):
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def resize(place: Path, megabytes: float) -> None:
    subprocess.run(["mount", "-o", f"remount,size={int(megabytes * 1024)}k", place], check=True)


@pytest.fixture(scope="module")
def straight(tiny_config, tmp_path_factory):
    """Three epochs without a disturbance: their configuration, and what training told."""
    config = replace(tiny_config, epochs=3, best_by="loss")
    return config, trainer.train(config, runs.create_run(tmp_path_factory.mktemp("straight"), "straight"))


@needs_root
@pytest.mark.parametrize("fills", ["checkpoint", "model.keras", "history.csv"])
def test_a_full_disk_keeps_the_epoch_before_and_is_resumed_when_there_is_room(straight, tmp_path, monkeypatch, fills):
    config, expected = straight
    with small_disk(tmp_path / "disk", 16) as disk:
        folder = runs.create_run(disk, "full")
        trainer.train(replace(config, epochs=1), folder)
        ballast, real = disk / "ballast", trainer.written_whole

        def fill():
            with contextlib.suppress(OSError), ballast.open("wb") as file:
                while True:
                    file.write(bytes(1 << 14))
                    file.flush()

        def written_whole(path):
            if Path(path).name == fills:
                fill()
            return real(path)

        if fills == "checkpoint":
            monkeypatch.setattr(checkpoint, "written_whole", lambda path: (fill(), real(path))[1])
        monkeypatch.setattr(trainer, "written_whole", written_whole)
        with pytest.raises(WorkbenchError, match="No space left on device") as caught:
            trainer.train(config, folder, resume=True)
        assert "\n" not in str(caught.value)
        assert "resum" in str(caught.value) or "go on" in str(caught.value)
        monkeypatch.undo()
        ballast.unlink()
        state = checkpoint.read(folder)
        assert (state.epochs, state.notes) == (1, ())
        assert not list(folder.rglob(".*.part*"))
        resize(disk, 64)
        assert trainer.train(config, folder, resume=True)["weights_sha256"] == expected["weights_sha256"]


AS_NOBODY = """
import os, sys
from pathlib import Path
from workbench import WorkbenchError, runs
from workbench.training import checkpoint
folder = Path(sys.argv[1])
def tries():
    yield lambda: runs.create_run(folder.parents[1], "mine")
    yield lambda: runs.update_run(folder, status="finished")
    yield lambda: runs.locked(folder).__enter__()
    yield lambda: checkpoint.read(folder)
# Now, since this user may not be able to read the interpreter's own files.
os.setgid(65534)
os.setuid(65534)
for attempt in tries():
    try:
        attempt()
        print("done")
    except WorkbenchError as error:
        print(error)
"""


@needs_root
def test_without_permission_everything_is_a_sentence(tmp_path):
    for above in (tmp_path, *tmp_path.parents[:2]):
        above.chmod(0o755)
    folder = runs.create_run(tmp_path, "theirs")
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / checkpoint.LAST).write_bytes(b"secret")
    (folder / "checkpoint" / checkpoint.LAST).chmod(0o600)
    before = (folder / "run.json").read_bytes()
    told = subprocess.run([sys.executable, "-c", AS_NOBODY, folder], capture_output=True, text=True, timeout=60)
    assert told.stderr == ""
    lines = told.stdout.splitlines()
    assert "check that results/ can be written" in lines[0]
    assert [("Permission denied" in line) for line in lines] == [True] * 4
    assert len(lines) == 4
    assert (folder / "run.json").read_bytes() == before
