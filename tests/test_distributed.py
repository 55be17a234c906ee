"""What ranks hold after doing things together: the one thing that Horovod's own Keras wrapper gets wrong."""

import keras
import numpy as np
import pytest

from workbench import WorkbenchError
from workbench.training import cluster, distributed
from workbench.training.config import TrainConfig


def test_without_mpi_everything_is_the_identity():
    world = distributed.start()
    assert (world.rank, world.size) == (0, 1)
    optimizer = keras.optimizers.SGD()
    assert distributed.averaging(optimizer) is optimizer
    assert distributed.average({"loss": 0.25}) == {"loss": 0.25}
    rows = np.arange(6).reshape(3, 2)
    assert distributed.gather(rows) is rows


def test_unknown_compression_is_refused():
    with pytest.raises(WorkbenchError, match=r"`zip`.*none, fp16"):
        distributed.averaging(keras.optimizers.SGD(), compression="zip")


@pytest.mark.parametrize(
    ("environment", "ranks"), [({}, 1), ({"OMPI_COMM_WORLD_SIZE": "16"}, 16), ({"PMI_SIZE": "4"}, 4)]
)
def test_launched_ranks(monkeypatch, environment, ranks):
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.launched_ranks() == ranks


def test_automatic_precision_is_float32_on_a_processor(monkeypatch):
    monkeypatch.setattr(distributed.tf.config, "get_visible_devices", lambda kind: [])
    assert distributed.settle_precision("auto") == "float32"
    assert distributed.settle_precision("mixed_float16") == "mixed_float16"


@pytest.mark.mpi
def test_all_ranks_take_the_precision_of_the_oldest_gpu(ranks):
    assert ranks(2).run("rank_functions.settle_with_gpus", [[9, 0], [7, 5]]) == ["mixed_float16"] * 2
    assert ranks(2).run("rank_functions.settle_with_gpus", [[9, 0], [8, 0]]) == ["mixed_bfloat16"] * 2
    assert ranks(2).run("rank_functions.settle_with_gpus", [[9, 0], None]) == ["float32"] * 2


@pytest.mark.mpi
def test_the_settings_reach_horovod(tmp_path):
    config = TrainConfig("", cycle_time_ms=50.0, fusion_mb=7, hierarchical_allreduce=True)
    # Horovod's tuner, which leaves alone what is given, writes down what it works with.
    log = tmp_path / "tuned.csv"
    watch = {"HOROVOD_AUTOTUNE": "1", "HOROVOD_AUTOTUNE_LOG": str(log), "HOROVOD_AUTOTUNE_WARMUP_SAMPLES": "1"}
    environment = config.horovod_environment() | watch | {"HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE": "2"}
    with cluster.start(2, threads=1, oversubscribe=True, environment=environment) as ranks:
        told = ranks.run("rank_functions.exchange_small")
    for rank in told:
        assert rank["environment"] == config.horovod_environment()
        # An exchange waits for the end of a cycle, so a long one is felt; a busy machine only makes it longer.
        assert rank["seconds"] > 0.025
    header, first = log.read_text().splitlines()[:2]
    tuned = dict(zip(header.split(","), first.split(","), strict=True))
    assert (float(tuned["cycle_time_ms"]), float(tuned["tensor_fusion_threshold"])) == (50, 7)
    # On one host there is no hierarchy, and Horovod passes the setting over.
    assert tuned["hierarchical_allreduce"] == "0"


@pytest.mark.mpi
@pytest.mark.parametrize("size", [2, 3])
def test_collectives(ranks, size):
    for told in ranks(size).run("rank_functions.collectives"):
        expected = np.concatenate([np.full((rank + 1, 2), rank) for rank in range(size)])
        np.testing.assert_array_equal(told["gathered"], expected)
        assert told["nobody"].shape == (0, 3)
        assert told["average"] == {"loss": (size - 1) / 2, "one": 1.0}
        assert told["names"] == [f"rank-{rank}" for rank in range(size)]


@pytest.mark.mpi
def test_broadcast_gives_all_ranks_the_weights_and_the_optimizer_of_rank_0(ranks):
    first, second = ranks(2).run("rank_functions.broadcast_from_different_starts")
    assert first["before"] != second["before"]
    assert first["after"] == second["after"] == first["before"]
    np.testing.assert_array_equal(first["optimizer"], second["optimizer"])
    assert first["optimizer"].max() == 1.0  # rank 0's filling, not rank 1's 2.0


@pytest.mark.mpi
@pytest.mark.parametrize("compression", ["none", "fp16"])
def test_ranks_hold_identical_weights_after_training_on_different_data(ranks, compression):
    told = ranks(2).run("rank_functions.train_on_different_data", averaged=True, compression=compression)
    np.testing.assert_array_equal(told[0]["weights"], told[1]["weights"])
    assert told[0]["digest"] == told[1]["digest"]


@pytest.mark.mpi
def test_ranks_drift_apart_without_averaging(ranks):
    # The test above can fail: this is what it would see.
    told = ranks(2).run("rank_functions.train_on_different_data", averaged=False)
    assert np.abs(told[0]["weights"] - told[1]["weights"]).max() > 1e-4


@pytest.mark.mpi
def test_batch_statistics_become_the_average_of_the_ranks(ranks):
    told = ranks(2).run("rank_functions.train_on_different_data", averaged=True)
    assert np.abs(told[0]["statistics"] - told[1]["statistics"]).max() > 1e-6
    mean = (told[0]["statistics"] + told[1]["statistics"]) / 2
    for rank in told:
        np.testing.assert_allclose(rank["averaged_statistics"], mean, rtol=1e-6)


@pytest.mark.mpi
def test_fit_of_keras_averages_too(ranks):
    first, second = ranks(2).run("rank_functions.fit_on_different_data")
    assert first == second


@pytest.mark.mpi
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_two_ranks_follow_one_process_with_the_joined_batch(ranks, optimizer):
    one, *_ = ranks(1).run("rank_functions.follow_a_global_batch", optimizer=optimizer)
    two = ranks(2).run("rank_functions.follow_a_global_batch", optimizer=optimizer)
    np.testing.assert_array_equal(two[0], two[1])
    np.testing.assert_allclose(two[0], one, rtol=0, atol=1e-5)


@pytest.mark.mpi
def test_an_overflow_on_one_rank_is_skipped_by_all(ranks):
    for skipped, moved in ranks(2).run("rank_functions.scaled_overflow"):
        assert skipped == 1.0
        assert moved == pytest.approx(0.9)
