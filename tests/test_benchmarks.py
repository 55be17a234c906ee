"""The runner of the benchmarks: sides take turns, rows compare them, the record says what is promised."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import bench
import party
import rows

SIDE = """
import sys
sys.path.insert(0, {here!r})
from party import serve
turns = iter({numbers})
serve(lambda: {{"value": next(turns), "memory": 7}})
"""


def side(*numbers: float, processes: int = 1):
    """A real process that answers these numbers, one a turn."""
    code = SIDE.format(here=str(Path(party.__file__).parent), numbers=list(numbers))
    return lambda: party.Party("trial", [[sys.executable, "-c", code]] * processes)


@pytest.fixture
def measured(monkeypatch, tmp_path, capsys):
    """A function that measures one comparison of made-up sides and returns status, rows of the record, and output."""

    def measure(sides: dict, *made: rows.Row, turns: int = 3, names: tuple = ()):
        monkeypatch.setattr(bench, "COMPARISONS", [rows.Comparison(sides, list(made), turns)])
        monkeypatch.setattr(bench, "RESULTS", tmp_path / "bench")
        status = bench.main(list(names))
        files = sorted((tmp_path / "bench").glob("*.json"))
        record = json.loads(files[0].read_text())["rows"] if files else []
        if files:
            assert files[0].with_suffix(".png").stat().st_size > 10_000
        return status, record, capsys.readouterr()

    return measure


def test_a_row_is_the_median_of_the_ratios_turn_by_turn(measured):
    row = rows.Row("speed", "ours against theirs", "images/s", "ours", "theirs", 1.5)
    status, record, said = measured({"ours": side(10, 40, 30), "theirs": side(5, 10, 20)}, row)
    assert status == 0
    assert record == [
        {
            "name": "speed",
            "says": "ours against theirs",
            "ours": 30,
            "peer": 10,
            "unit": "images/s",
            "ratio": 2.0,
            "spread": [1.5, 4.0],
            "goal": 1.5,
            "holds": True,
            "better": "more",
            "notes": {"memory": 7},
        }
    ]
    assert "holds" in said.out
    assert "1 of 1 goals hold" in said.out


def test_a_goal_that_is_missed_is_said_and_the_status_tells(measured):
    slow = rows.Row("slow", "against a fixed number, less is better", "s", "ours", 4.0, 1, "less")
    more = rows.Row("more", "the other number of the answer", "MiB", "ours", 7.0, 1, of="memory")
    status, record, said = measured({"ours": side(5, 5, 5)}, slow, more)
    assert status == 1
    assert [(row["name"], row["holds"]) for row in record] == [("slow", False), ("more", True)]
    assert "MISSED" in said.out


def test_processes_of_one_side_are_added_up(measured):
    row = rows.Row("both", "two processes", "images/s", "ours", 1.0, 1)
    assert measured({"ours": side(3, 4, 5, processes=2)}, row)[1][0]["ours"] == 8


def test_only_the_sides_of_the_named_rows_are_started(measured):
    wanted = rows.Row("wanted", "", "s", "ours", 1.0, 1)
    other = rows.Row("other", "", "s", "nobody", 1.0, 1)
    never = lambda: pytest.fail("started")  # noqa: E731
    assert len(measured({"ours": side(1, 1, 1), "nobody": never}, wanted, other, names=("wanted",))[1]) == 1


def test_an_unknown_row_is_one_sentence(measured):
    status, record, said = measured({}, rows.Row("known", "", "s", "ours", 1.0, 1), names=("unknown",))
    assert (status, record) == (2, [])
    assert said.err == "There is no row `unknown`: choose from known.\n"


def test_rows_against_an_environment_that_is_not_there_are_said_to_be_left_out(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "PEERS_READY", tmp_path / "none")
    against = rows.Row("against", "", "s", "ours", "torch", 1.0)
    alone = rows.Row("alone", "", "s", "ours", 1.0, 1)
    never = lambda: pytest.fail("started")  # noqa: E731
    status, record, said = measured({"ours": side(1, 1, 1), "torch": never}, against, alone)
    assert (status, [row["name"] for row in record]) == (1, ["alone"])
    assert "against                not measured: PyTorch is not installed" in said.out
    assert "1 of 2 goals hold" in said.out


def test_a_side_that_fails_says_why(measured):
    row = rows.Row("broken", "", "s", "ours", 1.0, 1)
    broken = lambda: party.Party("broken", [[sys.executable, "-c", "raise ValueError('no such thing')"]])  # noqa: E731
    with pytest.raises(SystemExit, match=r"side `broken` .* ended before it had measured:\n[^$]*no such thing"):
        measured({"ours": broken}, row)


def test_a_side_stands_still_between_its_turns():
    code = f"""
import sys, threading, time
sys.path.insert(0, {str(Path(party.__file__).parent)!r})
from party import serve
beats = []
threading.Thread(target=lambda: [beats.append(time.sleep(0.01)) for _ in range(10**6)], daemon=True).start()
serve(lambda: len(beats))
"""
    waiting = party.Party("waiting", [[sys.executable, "-c", code]])
    first = waiting.measure()[0]
    time.sleep(1)
    # A second of standing still is 100 beats that were not.
    assert waiting.measure()[0] - first < 50
    waiting.close()


def test_the_real_rows_have_names_of_their_own_and_sides_that_exist():
    names = [row.name for comparison in rows.COMPARISONS for row in comparison.rows]
    assert len(set(names)) == len(names) > 20
    for comparison in rows.COMPARISONS:
        for row in comparison.rows:
            assert {side for side in (row.ours, row.peer) if isinstance(side, str)} <= set(comparison.sides)
