"""Signs of life: who is silent, who is waited for, who computes; and where a rank stops that is asked to."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from workbench import Interrupted
from workbench.training import pulse

LIMIT = 30.0


def sign(number, beats, *, cpu=0.0, load=1.0, patience=1, doing="step 3", exchanging=False):
    said = {"number": number, "beats": beats, "doing": doing, "patience": patience, "exchanging": exchanging}
    return said | {"at": "trainer.py:1, f", "cpu": cpu, "load": load}


def watch_of(*lives, seconds=100):
    """The first fault in `seconds`: (when, rank, what); each life says what sign a rank gives at a second."""
    watch = pulse.Watch(limit=LIMIT)
    for now in range(seconds):
        for rank, life in enumerate(lives):
            watch.hear(rank, life(now), float(now))
        if fault := watch.find_fault(range(len(lives)), float(now)):
            return now, *fault
    return None


def moving(now):
    return sign(now + 1, now + 1, cpu=now)


def waiting(now):
    """Has come to step 6 after 5 s, and waits there without computing."""
    return sign(now + 1, min(now, 5) + 1, cpu=0.1 * now, doing="step 6", exchanging=True)


def test_ranks_that_get_on_are_left_alone():
    assert watch_of(moving, moving) is None


def test_a_stopped_rank_is_the_silent_one():
    stopped = lambda now: sign(min(now, 4) + 1, min(now, 4) + 1, cpu=now)  # noqa: E731
    when, rank, wrong = watch_of(waiting, stopped)
    assert (when, rank) == (4 + LIMIT + 1, 1)
    assert wrong.startswith("has given no sign of life for 31 s")
    assert "last at step 3 (trainer.py:1, f)" in wrong


def test_the_rank_that_hangs_is_the_one_that_came_least_far():
    hanging = lambda now: sign(now + 1, min(now, 4) + 1, exchanging=True)  # noqa: E731
    when, rank, wrong = watch_of(waiting, hanging)
    assert (when, rank) == (5 + LIMIT + 1, 1)
    assert wrong == "has not moved for 31 s, rank 1 in step 3 (trainer.py:1, f)"


def test_the_rank_that_hangs_is_none_of_those_that_wait_for_it():
    """In a validation ranks have different numbers of batches, so beats alone would blame the wrong one."""
    further = lambda now: sign(now + 1, min(now, 9) + 1)  # noqa: E731
    assert watch_of(waiting, further)[1] == 1


def test_ranks_that_cannot_be_told_apart_are_all_named():
    when, rank, wrong = watch_of(waiting, waiting)
    assert (when, rank) == (5 + LIMIT + 1, None)
    assert "rank 0 in step 6" in wrong
    assert "rank 1 in step 6" in wrong


def test_a_rank_that_computes_is_given_ten_times_as_long():
    compiling = lambda now: sign(now + 1, 1, cpu=now)  # noqa: E731
    assert watch_of(waiting, compiling, seconds=300) is None
    assert watch_of(waiting, compiling, seconds=320)[1] == 1


def test_a_rank_that_waits_busily_buys_no_time_for_the_one_that_hangs():
    """Open MPI looks for messages all the time, and on an idle machine that looks like computing."""
    polling = lambda now: waiting(now) | {"cpu": float(now)}  # noqa: E731
    hanging = lambda now: sign(now + 1, min(now, 4) + 1)  # noqa: E731
    assert watch_of(polling, hanging)[:2] == (5 + LIMIT + 1, 1)


def test_what_says_that_it_takes_long_is_believed():
    downloading = lambda now: sign(now + 1, 1, patience=5)  # noqa: E731
    assert watch_of(waiting, downloading, seconds=150) is None
    assert watch_of(waiting, downloading, seconds=170)[1] == 1


def test_a_function_that_never_beats_is_left_alone_for_long():
    silent = lambda now: sign(now + 1, 0, patience=pulse.PATIENCE)  # noqa: E731
    assert watch_of(silent, silent, seconds=300) is None


def test_when_the_watcher_was_away_nobody_is_blamed():
    """A laptop that slept, a kernel that was stopped: the signs of the meantime are not there yet."""
    watch = pulse.Watch(limit=LIMIT)
    for now in (0.0, 1.0, 1000.0):
        watch.hear(0, sign(1, 1), now)
        assert watch.find_fault([0], now) is None
    assert watch.find_fault([0], 1001.0) is None
    for now in range(1002, 1032):
        fault = watch.find_fault([0], float(now))
    assert fault[0] == 0


def test_signs_come_every_second_and_say_where_the_rank_is():
    seen = []
    with pulse.told(seen.append):
        pulse.beat("resting")
        time.sleep(2.5)
    assert [told["number"] for told in seen] == [1, 2, 3]
    assert seen[-1]["doing"] == "resting"
    assert seen[-1]["beats"] == 1
    assert seen[-1]["at"].startswith("test_pulse.py:")
    assert not [thread for thread in threading.enumerate() if thread.name == "pulse"]


def test_an_interrupt_takes_effect_at_the_next_beat_and_only_there():
    with pulse.told(lambda sign: None):
        os.kill(os.getpid(), signal.SIGINT)
        half_done = sum(range(1000))  # goes on
        with pytest.raises(Interrupted, match="before step 2"):
            pulse.beat("step 2")
    assert half_done == 499500
    with pulse.told(lambda sign: None):
        pulse.beat("of another call, which nobody asked to stop")


def test_a_process_ends_with_its_parent():
    child = "from workbench.training import pulse; pulse.end_with_parent(); print(1, flush=True); input()"
    parent = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "1\n"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive


def test_a_rank_that_gets_a_small_share_of_a_busy_host_computes():
    starved = lambda now: sign(now + 1, 3, cpu=0.05 * now, load=7.0)  # noqa: E731
    assert watch_of(starved, starved) is None
    alone = lambda now: sign(now + 1, 3, cpu=0.05 * now)  # noqa: E731
    assert watch_of(alone, alone) is not None


def test_threads_that_only_look_around_do_not_count_as_computing():
    ends = threading.Event()

    def look_around():
        while not ends.is_set():
            pass

    def computed_in(seconds):
        before, began = pulse._computed(), time.monotonic()
        while time.monotonic() < began + seconds:
            time.sleep(0.05)
        return pulse._computed() - before

    looking = threading.Thread(target=look_around, daemon=True)
    with pulse.uncounted():
        looking.start()
    try:
        uncounted = computed_in(1)
        pulse._uncounted.discard(str(looking.native_id))
        assert uncounted < computed_in(1) / 4
    finally:
        ends.set()
        looking.join()
