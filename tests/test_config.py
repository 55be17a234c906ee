"""A configuration is checked before anything starts; schedules are plain arithmetic."""

import math
from pathlib import Path

import pytest

from workbench import WorkbenchError
from workbench.training import config as config_module
from workbench.training.config import TrainConfig, better, decay_after, precision_for


def config(**settings):
    return TrainConfig(shard_folder="shards", **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"network": "AlexNet"}, "`network` is 'AlexNet': it has to be one of DenseNet121"),
        ({"precision": "int8"}, "`precision` is 'int8'"),
        ({"scaling": "cubic"}, "`scaling` is 'cubic': it has to be one of none, linear, sqrt"),
        ({"best_by": "luck"}, "`best_by` is 'luck'"),
        ({"batch_size": 0}, "`batch_size` is 0: it has to be a whole number above 0"),
        ({"epochs": 2.5}, "`epochs` is 2.5"),
        ({"learning_rate": -1}, "`learning_rate` is -1"),
        ({"learning_rate": math.nan}, "`learning_rate` is nan"),
        ({"plateau_factor": 1.0}, "`plateau_factor` is 1.0"),
        ({"warmup_epochs": -1}, "`warmup_epochs` is -1"),
        ({"precision": "bf16"}, "`precision` is 'bf16': it has to be one of auto, float32"),
        ({"compression": "zip"}, "`compression` is 'zip'"),
        ({"cycle_time_ms": 0}, "`cycle_time_ms` is 0: it has to be above 0, at most 1000"),
        ({"cycle_time_ms": math.nan}, "`cycle_time_ms` is nan"),
        ({"fusion_mb": -1}, "`fusion_mb` is -1: it has to be 0 to 1024"),
        ({"fusion_mb": 0.5}, "`fusion_mb` is 0.5: it has to be a whole number"),
        ({"hierarchical_allreduce": 1}, "`hierarchical_allreduce` is 1: it has to be true or false"),
        ({"xla": "yes"}, "`xla` is 'yes': it has to be true or false"),
    ],
)
def test_bad_settings_are_one_sentence(settings, said):
    with pytest.raises(WorkbenchError, match=said):
        config(**settings)


def test_from_parameters_takes_its_own_and_passes_over_the_rest():
    made = TrainConfig.from_parameters({"shard_folder": "a", "epochs": 3, "workers": 2}, Path("/top"))
    assert (made.shard_folder, made.epochs) == ("/top/a", 3)
    assert TrainConfig.from_parameters(made.to_parameters()) == TrainConfig(
        shard_folder="/top/a", epochs=3, findings=[]
    )


@pytest.mark.parametrize(
    ("weights", "where"),
    [("imagenet", "imagenet"), ("none", "none"), ("", ""), ("a/b.keras", "/top/a/b.keras"), ("/c.keras", "/c.keras")],
)
def test_weights_are_a_name_or_a_path_from_the_root(weights, where):
    made = TrainConfig.from_parameters({"shard_folder": "/shards", "weights": weights}, Path("/top"))
    assert (made.weights, made.shard_folder) == (where, "/shards")


def test_the_networks_named_are_those_there_are():
    from workbench.training.network import NETWORKS

    assert tuple(NETWORKS) == config_module.NETWORKS


@pytest.mark.parametrize(("scaling", "rate"), [("none", 0.1), ("linear", 0.4), ("sqrt", 0.2)])
def test_the_rate_grows_with_the_workers(scaling, rate):
    assert config(learning_rate=0.1, scaling=scaling).base_rate(4) == pytest.approx(rate)


def test_warmup_climbs_from_a_tenth_and_stays():
    made = config(warmup_epochs=2.0)
    factors = [made.warmup(epoch, step, 10) for epoch in range(3) for step in range(10)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == pytest.approx(0.55)
    assert factors == sorted(factors)
    assert set(factors[20:]) == {1.0}
    assert config().warmup(0, 0, 10) == 1.0


@pytest.mark.parametrize(
    ("capability", "precision"),
    [
        ((0, 0), "float32"),  # a CPU
        ((6, 1), "float32"),  # Pascal
        ((7, 0), "mixed_float16"),  # Volta
        ((7, 5), "mixed_float16"),  # Turing
        ((8, 0), "mixed_bfloat16"),  # Ampere
        ((8, 9), "mixed_bfloat16"),  # Ada
        ((9, 0), "mixed_bfloat16"),  # Hopper
        ((12, 0), "mixed_bfloat16"),  # Blackwell
    ],
)
def test_the_precision_goes_by_the_gpu_s_generation(capability, precision):
    assert precision_for(capability) == precision


def test_the_defaults_are_horovod_s_own():
    assert config().horovod_environment() == {
        "HOROVOD_HIERARCHICAL_ALLREDUCE": "0",
        "HOROVOD_CYCLE_TIME": "1.0",
        "HOROVOD_FUSION_THRESHOLD": str(128 * 1024 * 1024),
    }


def rows(*losses):
    return [{"val_loss": loss} for loss in losses]


def test_the_rate_falls_when_the_loss_has_stopped_falling():
    fall = {"factor": 0.1, "patience": 1}
    assert decay_after([], **fall) == 1
    assert decay_after(rows(1.0, 0.9), **fall) == 1
    assert decay_after(rows(1.0, 1.1), **fall) == pytest.approx(0.1)
    assert decay_after(rows(1.0, 1.1, 0.9), **fall) == pytest.approx(0.1)
    assert decay_after(rows(1.0, 1.1, 1.2), **fall) == pytest.approx(0.01)
    # Less than 1e-4 better is not better.
    assert decay_after(rows(1.0, 0.99995), **fall) == pytest.approx(0.1)
    assert decay_after(rows(1.0, 1.1, 1.2), factor=0.1, patience=2) == pytest.approx(0.1)
    assert decay_after(rows(1.0, 1.1, 1.2), factor=0.1, patience=0) == 1
    assert decay_after(rows(math.nan, math.nan, math.nan), **fall) == 1


def test_the_best_epoch_is_that_of_the_criterion():
    low = {"val_loss": 0.1, "val_auroc": 0.6}
    high = {"val_loss": 0.2, "val_auroc": 0.7}
    undefined = {"val_loss": 0.3, "val_auroc": math.nan}
    assert better("auroc", low, None)
    assert better("auroc", high, low)
    assert not better("auroc", low, high)
    assert better("loss", low, high)
    assert not better("auroc", undefined, low)
    assert better("auroc", low, undefined)
    assert not better("auroc", low, low)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shard_folder": None}, "`shard_folder` is None: it has to be a text"),
        ({"weights": ["x"]}, "`weights` is .*: it has to be a text"),
        ({"plateau_factor": "0.1"}, "`plateau_factor` is '0.1': it has to be a number"),
        ({"warmup_epochs": math.nan}, "`warmup_epochs` is nan"),
        ({"learning_rate": 10**400}, "`learning_rate` is 1000"),
        ({"findings": [3]}, "`findings` is .*: it has to be a list of names"),
        ({"augment": "no"}, "`augment` is 'no': it has to be true or false"),
    ],
)
def test_a_record_changed_by_hand_makes_no_configuration(changes, said):
    with pytest.raises(WorkbenchError, match=said):
        TrainConfig.from_parameters({"shard_folder": "data/shards/nih"} | changes)


def test_a_record_without_shards_makes_no_configuration():
    with pytest.raises(WorkbenchError, match="`shard_folder` is None: it has to be a folder of shards"):
        TrainConfig.from_parameters({"epochs": 3})
