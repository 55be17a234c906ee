"""Training on real MPI ranks: once each, the same again, resumed, and stopped when it goes wrong."""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from sklearn.metrics import log_loss, roc_auc_score

from workbench import WorkbenchError, runs
from workbench.data import chestxray14, shards
from workbench.training import trainer

TIMES = ["seconds", "images_per_second", "input_wait_share"]


def history_of(folder) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv").drop(columns=TIMES)


def train(ranks, size, config, folder, **settings):
    return ranks(size).run("workbench.training.trainer.train", config, folder, **settings)


def test_mean_auroc_leaves_out_what_is_undefined():
    labels = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]], np.float32)
    scores = np.array([[0.9, 0.1, 0.1], [0.1, 0.2, 0.2], [0.8, 0.3, 0.3], [0.2, 0.4, 0.4]])
    assert trainer.mean_auroc(labels, scores) == pytest.approx((1.0 + 0.0) / 2)
    assert np.isnan(trainer.mean_auroc(labels[:, 1:2], scores[:, 1:2]))


def test_binary_crossentropy_is_scikit_learn_s():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, (50, 3)), rng.random((50, 3))
    expected = np.mean([log_loss(labels[:, k], scores[:, k]) for k in range(3)])
    assert trainer.binary_crossentropy(labels, scores) == pytest.approx(expected)
    assert np.isfinite(trainer.binary_crossentropy(np.array([[1.0]]), np.array([[0.0]])))


@pytest.mark.mpi
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_training_image_is_seen_at_most_once_an_epoch(ranks, shard_folder, size):
    info = shards.read_info(shard_folder)["splits"]["train"]
    stored = {image.tobytes() for image in shards.read_examples(shard_folder, "train", info["images"])[0]}
    assert len(stored) == info["images"], "the test needs images that differ"
    left_out = []
    for epoch in (0, 1):
        told = ranks(size).run("rank_functions.images_seen", str(shard_folder), batch_size=5, epoch=epoch)
        assert {len(batches) for batches in told} == {info["images"] // (5 * size)}
        seen = [image for batches in told for batch in batches for image in batch]
        assert len(seen) == len(set(seen)) == info["images"] // (5 * size) * 5 * size
        assert set(seen) <= stored
        left_out.append(stored - set(seen))
    assert left_out[0] != left_out[1] or not left_out[0]
    assert told == ranks(size).run("rank_functions.images_seen", str(shard_folder), batch_size=5, epoch=1)


@pytest.mark.mpi
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_image_is_predicted_exactly_once_in_the_shards_order(ranks, shard_folder, tiny_config, size):
    images = shards.read_images(shard_folder)
    for split in ("val", "test"):
        expected = images[images["split"] == split]
        told = ranks(size).run("rank_functions.predicted", replace(tiny_config, batch_size=7), split)
        for labels, scores, rows in told:
            np.testing.assert_array_equal(rows, expected["row"])
            np.testing.assert_array_equal(labels, expected[shards.read_info(shard_folder)["findings"]])
            # However the images are shared out, the scores are those of one process.
            one = ranks(1).run("rank_functions.predicted", replace(tiny_config, batch_size=7), split)[0][1]
            np.testing.assert_allclose(scores, one, atol=1e-6)


@pytest.mark.mpi
def test_training_leaves_what_the_run_s_folder_promises(ranks, tiny_config, shard_folder, new_run):
    folder = new_run()
    progress = []
    told = train(ranks, 2, tiny_config, folder, watch=progress.append)
    assert told[0]["weights_sha256"] == told[1]["weights_sha256"]
    assert {key: told[0][key] for key in ("val_auroc", "val_loss")} == {
        key: told[1][key] for key in ("val_auroc", "val_loss")
    }
    history = pd.read_csv(folder / "history.csv")
    assert list(history["epoch"]) == [1, 2]
    assert [row["epoch"] for row in progress[-1]["history"]] == [1, 2]
    assert history["input_wait_share"].between(0, 1).all()
    best = history[history["best"] == 1].iloc[-1]
    assert best["val_auroc"] == history["val_auroc"].max()
    findings = shards.read_info(shard_folder)["findings"]
    for split in ("val", "test"):
        table = pd.read_csv(folder / f"predictions-{split}.csv")
        expected = shards.read_images(shard_folder).query("split == @split").sort_values("image")
        assert list(table["image"]) == list(expected["image"])
        assert list(table.columns) == ["image", "patient", *findings, *(f"{name}_score" for name in findings)]
        np.testing.assert_array_equal(table[findings], expected[findings])
    validation = pd.read_csv(folder / "predictions-val.csv")
    defined = [name for name in findings if 0 < validation[name].sum() < len(validation)]
    score = roc_auc_score(validation[defined], validation[[f"{name}_score" for name in defined]])
    assert score == pytest.approx(best["val_auroc"], abs=1e-9)
    # The saved model is the one that was evaluated.
    model = keras.models.load_model(folder / "model.keras")
    rows = shards.read_images(shard_folder).query("split == 'val'")
    images, _ = shards.read_examples(shard_folder, "val", len(rows))
    scores = model(images[:, 2:-2, 2:-2, None]).numpy()
    by_image = validation.set_index("image").loc[rows["image"], [f"{name}_score" for name in findings]]
    np.testing.assert_allclose(scores, by_image, atol=1e-5)
    assert runs.read_run(folder)["world_size"] == 2


@pytest.mark.mpi
def test_the_same_seed_gives_the_same_history(ranks, tiny_config, new_run):
    first, second, other = new_run("first"), new_run("second"), new_run("other")
    digests = [train(ranks, 2, tiny_config, folder)[0]["weights_sha256"] for folder in (first, second)]
    train(ranks, 2, replace(tiny_config, seed=1), other)
    pd.testing.assert_frame_equal(history_of(first), history_of(second), check_exact=True)
    assert digests[0] == digests[1]
    assert not history_of(first)["loss"].equals(history_of(other)["loss"])


@pytest.mark.mpi
def test_two_epochs_and_two_more_are_four(ranks, tiny_config, new_run):
    straight, broken = new_run("straight"), new_run("broken")
    four = replace(tiny_config, epochs=4, plateau_patience=1)
    at_once = train(ranks, 2, four, straight)
    train(ranks, 2, replace(four, epochs=2), broken)
    resumed = train(ranks, 2, four, broken, resume=True)
    pd.testing.assert_frame_equal(history_of(straight), history_of(broken), check_exact=True)
    assert at_once[0]["weights_sha256"] == resumed[0]["weights_sha256"]


@pytest.mark.mpi
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(ranks, tiny_config, new_run):
    said = r"became infinite or not a number in step \d+ of epoch 1 on rank 0"
    with pytest.raises(WorkbenchError, match=said):
        train(ranks, 1, replace(tiny_config, learning_rate=9e37), new_run())


def test_training_in_one_process_without_mpi(tiny_config, new_run):
    folder = new_run()
    told = trainer.train(replace(tiny_config, epochs=3, best_by="loss"), folder)
    assert told["best_epoch"] == history_of(folder)["val_loss"].idxmin() + 1
    assert runs.read_run(folder)["status"] == "finished"


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_the_step_through_xla_is_the_same_step(tiny_config, precision):
    rng = np.random.default_rng(0)
    radiographs = tf.constant(rng.integers(0, 256, (4, 32, 32, 1), np.uint8))
    labels = tf.constant(rng.integers(0, 2, (4, 14)).astype(np.float32))
    losses, compiled = {}, {}
    for xla in (False, True):
        config = replace(tiny_config, precision=precision)
        step = trainer.build_train_step(*trainer._build(config, 14, trainer.distributed.start()), xla=xla)
        losses[xla] = [float(step(radiographs, labels)) for _ in range(4)]
        nodes = step.get_concrete_function(radiographs, labels).graph.as_graph_def().node
        compiled[xla] = any(node.attr["_XlaMustCompile"].b for node in nodes)
    assert compiled == {False: False, True: True}
    assert losses[True][0] > losses[True][-1]
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-3 if precision == "float32" else 3e-2)


@pytest.mark.mpi
def test_ranks_hold_identical_weights_with_xla_too(ranks, tiny_config, new_run):
    told = train(ranks, 2, replace(tiny_config, xla=True, epochs=1), new_run())
    assert told[0]["weights_sha256"] == told[1]["weights_sha256"]


@pytest.mark.parametrize(("best", "stops"), [([1], False), ([1, 0], False), ([1, 0, 0], True), ([1, 0, 1, 0], False)])
def test_training_ends_early_after_two_epochs_that_were_not_better(tiny_config, best, stops):
    history = [{"best": value} for value in best]
    assert trainer._should_stop(replace(tiny_config, early_stop_patience=2), history) == stops
    assert not trainer._should_stop(tiny_config, history)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains_and_is_resumed(tiny_config, new_run, precision):
    config = replace(tiny_config, precision=precision, epochs=3)
    straight, broken = new_run("straight"), new_run("broken")
    trainer.train(config, straight)
    trainer.train(replace(config, epochs=1), broken)
    trainer.train(config, broken, resume=True)
    history = history_of(broken)
    assert np.isfinite(history["loss"]).all()
    np.testing.assert_allclose(history["loss"], history_of(straight)["loss"], rtol=1e-3)


def test_a_checkpoint_of_something_else_or_a_damaged_one_is_refused(tiny_config, new_run):
    folder = new_run()
    trainer.train(replace(tiny_config, epochs=1), folder)
    with pytest.raises(WorkbenchError, match=r"is of `network` Tiny and cannot go on with VGG16"):
        trainer.train(replace(tiny_config, network="VGG16"), folder, resume=True)
    path = folder / "checkpoint" / "last.npz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WorkbenchError, match=r"No checkpoint can be used: .*last\.npz is damaged"):
        trainer.train(tiny_config, folder, resume=True)


def test_a_break_between_checkpoint_and_model_loses_nothing(tiny_config, new_run):
    """The best weights come from the same file as the history, whatever model.keras holds."""
    straight, broken = new_run("straight"), new_run("broken")
    config = replace(tiny_config, epochs=2)
    expected = trainer.train(config, straight)
    trainer.train(replace(config, epochs=1), broken)
    (broken / "model.keras").write_bytes(b"of another epoch")
    assert trainer.train(config, broken, resume=True)["weights_sha256"] == expected["weights_sha256"]


def test_validation_that_cannot_choose_an_epoch_is_refused(dataset, tiny_config, tmp_path, new_run):
    frame = chestxray14.read_dataset(dataset, validation_fraction=0.25)
    settings = {"image_size": 36, "processes": 1, "progress": False}
    shards.write_shards(frame[frame["split"] != "val"], tmp_path / "without", **settings)
    with pytest.raises(WorkbenchError, match="no validation images, by which the best epoch is chosen"):
        trainer.train(replace(tiny_config, shard_folder=str(tmp_path / "without")), new_run("a"))
    none = frame.assign(Hernia=frame["Hernia"].where(frame["split"] != "val", 0))
    keep = [*frame.columns[: frame.columns.get_loc("split") + 1], "Hernia"]
    shards.write_shards(none[keep], tmp_path / "one", **settings)
    with pytest.raises(WorkbenchError, match="None of Hernia has both positives and negatives"):
        trainer.train(replace(tiny_config, shard_folder=str(tmp_path / "one")), new_run("b"))
    trainer.train(replace(tiny_config, shard_folder=str(tmp_path / "one"), best_by="loss"), new_run("c"))


def record_size(folder) -> int:
    """Bytes of a record of these shards, which hold raw images, so that all are alike."""
    shard = shards.read_info(folder)["splits"]["train"]["shards"][0]
    return shard["bytes"] // shard["images"]


def damage(folder, file, record, *, place=200):
    """Flip a bit in a record, counted from 1; place 2 lies in its length. The size stays."""
    content = bytearray((folder / file).read_bytes())
    content[record_size(folder) * (record - 1) + place] ^= 1
    (folder / file).write_bytes(content)


@pytest.fixture
def damaged(shard_folder, tmp_path):
    """Shards of which records 3 and 9 of one training shard, one of val and one of test fail their checksums."""
    folder = shutil.copytree(shard_folder, tmp_path / "damaged")
    for file, record in DAMAGED:
        damage(folder, file, record)
    return folder


DAMAGED = [
    ("train-00001-of-00005.tfrecord", 3),
    ("train-00001-of-00005.tfrecord", 9),
    ("val-00000-of-00002.tfrecord", 1),
    ("test-00001-of-00002.tfrecord", 2),
]


def images_at(folder, places):
    table = shards.read_images(folder)
    return [table.loc[table["shard"] == file, "image"].iloc[record - 1] for file, record in places]


@pytest.mark.parametrize(
    ("file", "record", "place"),
    [
        ("train-00003-of-00005.tfrecord", 7, 200),
        ("train-00000-of-00005.tfrecord", 16, 2),
        ("val-00001-of-00002.tfrecord", 1, 200),
    ],
)
def test_a_damaged_record_is_named_with_its_shard_and_image(
    shard_folder, tiny_config, tmp_path, new_run, file, record, place
):
    folder = shutil.copytree(shard_folder, tmp_path / "shards")
    damage(folder, file, record, place=place)
    [image] = images_at(folder, [(file, record)])
    said = rf"{file}` is damaged: record {record} of \d+ \({image}\) fails its checksum; copy .* `damaged_records`"
    with pytest.raises(WorkbenchError, match=said):
        trainer.train(replace(tiny_config, shard_folder=str(folder)), new_run())
    if file.startswith("train"):
        with pytest.raises(WorkbenchError, match=said):
            trainer.measure_throughput(replace(tiny_config, shard_folder=str(folder)), warmup=0)


def test_a_record_that_is_whole_but_no_radiograph_is_named(shard_folder, tiny_config, tmp_path, new_run):
    folder = shutil.copytree(shard_folder, tmp_path / "shards")
    path = folder / "train-00002-of-00005.tfrecord"
    held = list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator())
    with tf.io.TFRecordWriter(str(path)) as writer:
        for number, record in enumerate(held):
            writer.write(b"x" * len(record) if number == 4 else record)
    with pytest.raises(WorkbenchError, match=r"train-00002-of-00005.tfrecord` is damaged: record 5 of 16 .*is not a"):
        trainer.train(replace(tiny_config, shard_folder=str(folder)), new_run())


def test_damaged_records_are_skipped_listed_and_every_other_image_is_used_once(
    damaged, tiny_config, new_run, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = replace(tiny_config, shard_folder=str(damaged), damaged_records="skip", damaged_limit=4)
    before = {path.name: path.read_bytes() for path in damaged.iterdir()}
    folder, again = new_run("first"), new_run("second")
    told = trainer.train(config, folder)
    assert {path.name: path.read_bytes() for path in damaged.iterdir()} == before
    skipped = pd.read_csv(folder / "skipped.csv")
    assert list(zip(skipped["shard"], skipped["record"], strict=True)) == DAMAGED
    assert list(skipped["image"]) == images_at(damaged, DAMAGED)
    assert list(skipped["split"]) == ["train", "train", "val", "test"]
    assert set(skipped["damage"]) == {"fails its checksum"}
    said = capsys.readouterr().out
    assert "damaged records skipped: 4" in said
    assert all(image in said for image in skipped["image"])
    images = shards.read_images(damaged)
    for split in ("val", "test"):
        expected = set(images.loc[images["split"] == split, "image"]) - set(skipped["image"])
        predicted = pd.read_csv(folder / f"predictions-{split}.csv")
        assert sorted(predicted["image"]) == sorted(expected)
    # The same seed, the same order; and so it is when the run is broken off and resumed.
    trainer.train(replace(config, epochs=1), again)
    assert trainer.train(config, again, resume=True)["weights_sha256"] == told["weights_sha256"]
    said = capsys.readouterr().out
    assert "`epochs` 1 -> 2" in said
    assert "shard_folder" not in said, "the copies' folder is nobody's business"
    pd.testing.assert_frame_equal(history_of(folder), history_of(again), check_exact=True)
    assert not list(tmp_path.glob("workbench-shards-*"))
    assert runs.skipped_images(folder) == list(skipped["image"])
    assert runs.skipped_images(folder.parent) == []


def test_a_run_whose_shards_were_mended_predicts_everything_again(shard_folder, damaged, tiny_config, new_run, capsys):
    folder = new_run()
    config = replace(tiny_config, shard_folder=str(damaged), damaged_records="skip", epochs=1)
    trainer.train(config, folder)
    assert len(runs.skipped_images(folder)) == 4
    for file, _ in DAMAGED:
        shutil.copy(shard_folder / file, damaged)
    trainer.train(replace(config, epochs=2, damaged_records="raise"), folder, resume=True)
    assert "`damaged_records` skip -> raise" in capsys.readouterr().out
    assert runs.skipped_images(folder) == []
    predicted = pd.read_csv(folder / "predictions-test.csv")
    assert len(predicted) == shards.read_info(damaged)["splits"]["test"]["images"]


def test_shards_without_damage_train_alike_under_both_policies(tiny_config, new_run):
    raising, skipping = new_run("raise"), new_run("skip")
    first = trainer.train(replace(tiny_config, epochs=1), raising)
    second = trainer.train(replace(tiny_config, epochs=1, damaged_records="skip", damaged_limit=0), skipping)
    assert first["weights_sha256"] == second["weights_sha256"]
    assert not (raising / "skipped.csv").exists()
    assert pd.read_csv(skipping / "skipped.csv").empty


def test_more_damage_than_the_limit_is_refused_before_training(damaged, tiny_config, new_run):
    config = replace(tiny_config, shard_folder=str(damaged), damaged_records="skip", damaged_limit=3)
    folder = new_run()
    with pytest.raises(WorkbenchError, match=r"4 records in .* are damaged, .* and `damaged_limit` allows 3"):
        trainer.train(config, folder)
    assert not (folder / "history.csv").exists()


def test_a_broken_length_costs_the_rest_of_its_shard(shard_folder, tiny_config, tmp_path, new_run):
    folder = shutil.copytree(shard_folder, tmp_path / "shards")
    damage(folder, "test-00000-of-00002.tfrecord", 13, place=2)
    with (folder / "train-00004-of-00005.tfrecord").open("r+b") as file:  # cut short in its last record
        file.truncate(file.seek(0, 2) - 9)
    last = shards.read_info(folder)["splits"]["train"]["shards"][4]["images"]
    config = replace(tiny_config, shard_folder=str(folder), damaged_records="skip", epochs=1)
    run = new_run()
    trainer.train(config, run)
    skipped = pd.read_csv(run / "skipped.csv")
    assert list(skipped["record"]) == [last, 13, 14, 15, 16]
    assert list(skipped["damage"]) == ["is cut short", "fails its checksum", *["lies behind a broken length"] * 3]
    table = shards.read_images(folder).query("split == 'test'")
    assert len(pd.read_csv(run / "predictions-test.csv")) == len(table) - 4


@pytest.mark.mpi
def test_ranks_agree_on_what_is_skipped_and_do_equal_steps(ranks, damaged, tiny_config, new_run):
    config = replace(tiny_config, shard_folder=str(damaged), damaged_records="skip", epochs=1)
    told = ranks(2).run("rank_functions.read_without_damage", config)
    kept = shards.read_info(damaged)["splits"]["train"]["images"] - 2
    assert [len(rank["batches"]) for rank in told] == [kept // (2 * config.batch_size)] * 2
    seen = [image for rank in told for batch in rank["batches"] for image in batch]
    assert len(seen) == len(set(seen))
    assert not any(Path(rank["folder"]).exists() for rank in told), "copies are left behind"
    assert told[0]["skipped"] == told[1]["skipped"] == DAMAGED
    folder = new_run()
    digests = {rank["weights_sha256"] for rank in train(ranks, 2, config, folder)}
    assert len(digests) == 1
    assert len(pd.read_csv(folder / "skipped.csv")) == 4
    table = shards.read_images(damaged)
    for split in ("val", "test"):
        predicted = pd.read_csv(folder / f"predictions-{split}.csv")["image"]
        assert predicted.is_unique
        assert len(predicted) == (table["split"] == split).sum() - 1


def test_errors_come_before_anything_is_built(tiny_config, new_run):
    with pytest.raises(WorkbenchError, match="fewer than one global batch of 1,000"):
        trainer.train(replace(tiny_config, batch_size=1000), new_run("a"))
    with pytest.raises(WorkbenchError, match="Edema"):
        trainer.train(replace(tiny_config, findings=["Edema"]), new_run("b"))
    with pytest.raises(WorkbenchError, match="nothing to resume"):
        trainer.train(tiny_config, new_run("c"), resume=True)


@pytest.mark.mpi
def test_throughput_is_measured_over_all_ranks(ranks, tiny_config):
    told = ranks(2).run("workbench.training.trainer.measure_throughput", tiny_config, steps=30, warmup=2)
    assert told[0] == told[1]
    assert told[0]["world_size"] == 2
    assert len(told[0]["images_per_second"]) == 30
    assert min(told[0]["images_per_second"]) > 0
    assert told[0]["first_step_seconds"] > 2 * 4 / max(told[0]["images_per_second"])
    least = ranks(2).run("workbench.training.trainer.measure_throughput", tiny_config, warmup=1, limit=1e-9)
    assert least[0] == least[1]
    assert len(least[0]["images_per_second"]) == 1


GRADIENTS = """
import numpy as np
from workbench.training import distributed, trainer
from workbench.training.config import TrainConfig
world = distributed.start(1)
config = TrainConfig(shard_folder="", network="DenseNet121", weights="none", image_size=64, batch_size=16)
model, optimizer = trainer._build(config, 3, world)
step, rng = trainer.build_train_step(model, optimizer), np.random.default_rng(0)
step(rng.integers(0, 256, (16, 64, 64, 1), np.uint8), rng.integers(0, 2, (16, 3)).astype(np.float32))
print(trainer.weights_digest(model))
"""


def test_two_processes_compute_the_same_step_to_the_last_bit():
    """TensorFlow's memory optimiser would add up the gradients of dense blocks in an order of each process's own."""
    running = [subprocess.Popen([sys.executable, "-c", GRADIENTS], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = {process.communicate(timeout=200)[0] for process in running}
    assert len(told) == 1
    assert len(told.pop().strip()) == 64
