"""Horovod's timeline: one made by hand whose times are known, one cut off, and one that real ranks write."""

import json

import pytest

from workbench import WorkbenchError
from workbench.analysis import timeline
from workbench.analysis.scaling_model import PARTS
from workbench.training import cluster


def written(path, *, steps=2, tensors=2):
    """A timeline of steps that begin every 100 ms: 20 ms negotiated, then 1 ms queue, 4 copied in, 10 sent, 5 out."""
    events = [
        {"name": "process_name", "ph": "M", "pid": 0, "args": {"start_time_since_epoch_in_micros": 1}},
        {"name": "process_name", "ph": "M", "pid": 99, "args": {"name": "HorovodAllgather_predictions"}},
        {"ph": "B", "name": "NEGOTIATE_ALLGATHER", "ts": 0, "pid": 99},
        {"ph": "E", "ts": 90_000, "pid": 99},
    ]
    for pid in range(1, tensors + 1):
        events += [
            {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": f"HorovodGroupedAllreduce_{pid}of2"}}
        ]
    for step in range(steps):
        for pid in range(1, tensors + 1):
            at = 100_000 * step
            events += [
                {"ph": "B", "name": "NEGOTIATE_ALLREDUCE", "ts": at, "pid": pid},
                {"ph": "X", "name": "1", "ts": at, "dur": 0, "pid": pid},
                {"ph": "E", "ts": at + 20_000, "pid": pid},
                {"ph": "B", "name": "ALLREDUCE", "ts": at + 20_500, "pid": pid},
                {"ph": "B", "name": "MEMCPY_IN_FUSION_BUFFER", "ts": at + 21_000, "pid": pid},
                {"ph": "E", "ts": at + 25_000, "pid": pid},
                {"ph": "B", "name": "MPI_ALLREDUCE", "ts": at + 25_000, "pid": pid},
                {"ph": "E", "ts": at + 35_000, "pid": pid},
                {"ph": "B", "name": "MEMCPY_OUT_FUSION_BUFFER", "ts": at + 35_000, "pid": pid},
                {"ph": "E", "ts": at + 40_000, "pid": pid},
                {"ph": "E", "ts": at + 40_000, "pid": pid, "args": {"dtype": "float32", "shape": "[7, 7]"}},
            ]
    path.write_text("[\n" + ",\n".join(json.dumps(event) for event in events) + "]\n")
    return path


def test_phases_by_hand(tmp_path):
    phases = timeline.exchange_phases(timeline.read_timeline(written(tmp_path / "timeline.json")))
    assert list(phases.columns) == list(timeline.PHASES)
    assert phases.to_numpy().tolist() == [pytest.approx([0.02, 0.001, 0.004, 0.01, 0.005])] * 2


def test_a_timeline_that_ends_anywhere_is_read_as_far_as_it_goes(tmp_path):
    path = written(tmp_path / "timeline.json")
    text, whole = path.read_text(), timeline.read_timeline(path)
    assert len(whole) == 1 + 2 * 2 * 5
    path.write_text(text.rstrip().rstrip("]"))
    assert timeline.read_timeline(path).equals(whole)
    for end in range(2, len(text), 37):
        path.write_text(text[:end])
        events = timeline.read_timeline(path)
        assert len(events) <= len(whole)
        assert len(timeline.exchange_phases(events)) in (0, 1, 2)
    path.write_text(text[: int(len(text) * 0.9)])
    assert len(timeline.exchange_phases(timeline.read_timeline(path))) == 1


def test_nothing_exchanged_is_no_row(tmp_path):
    for text in ("", "[", "[]"):
        (tmp_path / "timeline.json").write_text(text)
        assert timeline.exchange_phases(timeline.read_timeline(tmp_path / "timeline.json")).empty


def test_parts_of_a_measured_step_by_hand(tmp_path):
    phases = timeline.exchange_phases(timeline.read_timeline(written(tmp_path / "timeline.json")))
    parts = timeline.step_parts(0.1, 0.005, phases)
    assert list(parts) == list(PARTS)
    assert list(parts.values()) == pytest.approx([0.065, 0.005, 0.01, 0.02])
    # Recording made the exchange longer than the whole step: the parts still add up to it.
    squeezed = timeline.step_parts(0.02, 0.005, phases)
    assert list(squeezed.values()) == pytest.approx([0, 0.005, 0.005, 0.01])
    alone = timeline.step_parts(0.1, 0.005, phases.head(0))
    assert list(alone.values()) == pytest.approx([0.095, 0.005, 0, 0])


def test_what_is_no_timeline_is_refused(tmp_path):
    with pytest.raises(WorkbenchError, match=r"none\.json cannot be read \(No such file or directory\)"):
        timeline.read_timeline(tmp_path / "none.json")
    for text in ("no JSON", '{"ph": "B"}', "[1, 2]"):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(WorkbenchError, match=r"other\.json is no timeline of Horovod"):
            timeline.read_timeline(tmp_path / "other.json")


@pytest.mark.mpi
def test_ranks_write_timelines_of_the_watched_steps(tiny_config, tmp_path):
    measure = "workbench.training.trainer.measure_throughput"
    with cluster.start(2, threads=1, oversubscribe=True, environment=cluster.RECORDING) as ranks:
        for path in (tmp_path / "first.json", tmp_path / "second.json"):
            told = ranks.run(measure, tiny_config, steps=3, warmup=1, timeline=str(path), watched=4)
            assert len(told[0]["images_per_second"]) == len(told[0]["input_seconds"]) == 3
            phases = timeline.exchange_phases(timeline.read_timeline(path))
            # The writer may be a step behind.
            assert 3 <= len(phases) <= 4
            assert (phases[["negotiation", "all-reduce"]] > 0).all(axis=None)
            assert phases.sum(axis=1).max() < 30


@pytest.mark.mpi
def test_ranks_that_are_not_to_record_have_no_writer_of_timelines(ranks, tmp_path):
    """Its thread never sleeps, and takes half a core from rank 0."""
    for said in ranks(2).run("rank_functions.record_unasked", str(tmp_path / "unasked.json")):
        assert "HOROVOD_TIMELINE" in said
