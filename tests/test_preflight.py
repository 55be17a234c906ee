"""What the preflight says of a recipe is what the pipeline then does, and wrong input is one sentence."""

import dataclasses
import functools
import shutil
from pathlib import Path

import pytest

from workbench import Interrupted, WorkbenchError, batch, cli, estimate, plan, preflight, runs
from workbench.data import chestxray14, pipeline, shards, synthetic
from workbench.training import cluster

OWN = Path(__file__).resolve().parents[1]
SMALL = {
    "data_folder": "data/made-up",
    "shard_folder": "data/shards/made-up",
    "synthetic_patients": 32,
    "network": "Tiny",
    "image_size": 32,
    "shard_margin": 4,
    "batch_size": 8,
    "images_per_shard": 16,
    "validation_fraction": 0.25,
    "epochs": 2,
    "workers": 2,
}
STORED = SMALL["image_size"] + SMALL["shard_margin"]


@pytest.fixture(scope="module", autouse=True)
def counted_once():
    """A network is counted by a process of its own, which takes seconds: here each once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "_count_network", functools.cache(preflight._count_network))
        yield


@pytest.fixture
def root(tmp_path) -> Path:
    """A project with the notebooks and no data."""
    shutil.copytree(OWN / "notebooks", tmp_path / "notebooks")
    return tmp_path


@pytest.fixture
def written(root) -> Path:
    """The same with data and shards, as notebooks 01 and 02 write them."""
    data = synthetic.write_synthetic(root / SMALL["data_folder"], patients=32, progress=False)
    frame = chestxray14.read_dataset(data, validation_fraction=0.25)
    shards.write_shards(
        frame, root / SMALL["shard_folder"], image_size=STORED, images_per_shard=16, processes=1, progress=False
    )
    return root


def look(root: Path, place=None, **settings) -> dict[str, preflight.Check]:
    """The checks by name, without timing."""
    planned = plan.plan_recipe(root, "synthetic", overrides=SMALL | settings)
    place = place or dataclasses.replace(preflight.this_host(), slots=8, memory=64e9)
    return {check.name: check for check in preflight.check_plan(planned, place, timing=False)}


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_numbers_are_those_of_the_pipeline(workers, written):
    before = plan.plan_recipe(written, "synthetic", overrides=SMALL | {"workers": workers})
    steps, seen = [], []
    for rank in range(workers):
        batches = pipeline.build_training(
            before.config.shard_folder, image_size=32, batch_size=8, seed=0, epoch=0, rank=rank, size=workers
        )
        sizes = [len(labels) for _, labels in batches]
        steps.append(len(sizes))
        seen += sizes
    assert {before.steps} == set(steps)
    assert before.left_out == before.images["train"] - sum(seen)
    assert before.global_batch == 8 * workers
    assert before.images == {k: v["images"] for k, v in shards.read_info(before.config.shard_folder)["splits"].items()}


def test_the_numbers_are_the_same_before_and_after_data_and_shards_are_written(root):
    before = plan.plan_recipe(root, "synthetic", overrides=SMALL)
    assert before.drawn
    assert not list((root).glob("data/*"))
    synthetic.write_synthetic(before.data, patients=32, progress=False)
    drawn = plan.plan_recipe(root, "synthetic", overrides=SMALL)
    shards.write_shards(drawn.frame, before.config.shard_folder, image_size=STORED, images_per_shard=16, progress=False)
    after = plan.plan_recipe(root, "synthetic", overrides=SMALL)
    assert (drawn.drawn, after.files[0].parent) == (False, Path(before.config.shard_folder))
    for name in ("images", "shards", "steps", "left_out", "findings"):
        assert getattr(before, name) == getattr(drawn, name) == getattr(after, name), name
    assert after.image_bytes == pytest.approx(before.image_bytes, rel=0.02)


def test_shards_of_other_settings_are_refused_as_notebook_02_does(written):
    same, other = (plan.plan_recipe(written, "synthetic", overrides=SMALL | {"seed": seed}) for seed in (0, 1))
    assert preflight._shards(same).status == "ok"
    check = preflight._shards(other)
    assert (check.status, "--from 03" in check.advice) == ("failed", True)
    frame = chestxray14.read_dataset(written / SMALL["data_folder"], validation_fraction=0.25, seed=1)
    with pytest.raises(WorkbenchError, match="already holds shards of other"):
        shards.write_shards(frame, written / SMALL["shard_folder"], image_size=STORED, images_per_shard=16, seed=1)


def test_shards_without_their_raw_data_are_enough(written):
    shutil.rmtree(written / SMALL["data_folder"])
    planned = plan.plan_recipe(written, "synthetic", overrides=SMALL | {"synthetic_patients": 0})
    check = preflight._data(planned)
    assert (check.status, preflight._shards(planned).status) == ("warning", "ok")
    assert "--from 03" in check.advice


@pytest.mark.parametrize("workers", [1, 2, 3, 99])
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_workers_fit_where_the_cluster_would_start_them(workers, threads, monkeypatch):
    class WouldStartError(Exception):
        pass

    def would_start(*_, **__):
        raise WouldStartError

    # What comes after the cluster's own check of cores.
    monkeypatch.setattr(cluster.tempfile, "mkdtemp", would_start)
    fits = workers <= preflight.this_host(threads).slots
    with pytest.raises(WouldStartError if fits else WorkbenchError), cluster.start(workers, threads=threads):
        pass


def test_what_does_not_fit_is_said_and_nothing_is_timed(written):
    place = preflight.this_host()
    few = look(written, dataclasses.replace(place, slots=1))
    assert (few["Workers"].status, "`--set workers=1`" in few["Workers"].advice) == ("failed", True)
    assert few["Time"].found.startswith("not timed, since it does not fit, and no run of the same")
    held = preflight._count(plan.plan_recipe(written, "synthetic", overrides=SMALL))
    planned = plan.plan_recipe(written, "synthetic", overrides=SMALL)
    for memory, status in ((10**9, "failed"), (int(1.9e9), "warning"), (10**10, "ok")):
        assert preflight._memory(planned, dataclasses.replace(place, memory=memory), held, None).status == status


@pytest.mark.parametrize(("error", "raised"), [(WorkbenchError("They died."), False), (Interrupted("Stopped."), True)])
def test_ranks_that_fail_are_a_finding_and_an_interrupt_is_none(error, raised, written):
    def start(*_, **__):
        raise error

    place = dataclasses.replace(preflight.this_host(), slots=8, memory=64e9, start=start)
    checks = preflight.check_plan(plan.plan_recipe(written, "synthetic", overrides=SMALL), place)
    if raised:
        with pytest.raises(Interrupted):
            list(checks)
    else:
        *_, last = checks
        assert (last.name, last.status, last.found) == ("Time", "failed", "They died.")


def test_disk_that_is_too_small_is_said(root, monkeypatch):
    usage = type("Usage", (), {"free": 10**7})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage)
    check = look(root)["Disk"]
    assert (check.status, "make room" in check.advice) == ("failed", True)
    assert check.found.startswith("run, shards, data: ")


def test_an_earlier_run_tells_the_time_without_timing(written):
    planned = plan.plan_recipe(written, "synthetic", overrides=SMALL)
    assert estimate.find_earlier(planned) is None
    parameters = batch.check_parameters(written, SMALL, where="here")
    runs.update_run(
        runs.create_run(written, "before", recipe="synthetic", parameters=parameters),
        **{"images_per_second": 50.0, "world_size": 2, "status": "finished", "ended": runs.now()},
    )
    assert "at the 50 images/s of the run before; the whole of before took " in look(written)["Time"].found
    other = plan.plan_recipe(written, "synthetic", overrides=SMALL | {"batch_size": 4})
    assert estimate.find_earlier(other) is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"epoch": 3}, "did you mean `epochs`"),
        ({"network": "VGG"}, "one of DenseNet121"),
        ({"batch_size": 500}, "fewer than one global batch of 1,000"),
        ({"encoding": "tiff"}, "choose from raw, png, jpeg"),
        ({"synthetic_patients": 5}, "at least 10 patients"),
        ({"validation_fraction": 0.0}, "no validation images"),
        ({"data_folder": "data/gone", "synthetic_patients": 0}, "data/gone"),
    ],
)
def test_wrong_input_is_one_sentence(settings, told, root):
    with pytest.raises(WorkbenchError, match=told):
        plan.plan_recipe(root, "synthetic", overrides=SMALL | settings)


def test_unreadable_shards_are_one_sentence(written):
    folder = written / SMALL["shard_folder"]
    with pytest.raises(WorkbenchError, match="36 pixels, fewer than image_size=64"):
        plan.plan_recipe(written, "synthetic", overrides=SMALL | {"image_size": 64})
    next(folder.glob("train-*")).write_bytes(b"short")
    with pytest.raises(WorkbenchError, match=r"has 5 bytes instead of"):
        plan.plan_recipe(written, "synthetic", overrides=SMALL)
    (folder / "info.json").write_text("{")
    with pytest.raises(WorkbenchError, match="cannot be read"):
        plan.plan_recipe(written, "synthetic", overrides=SMALL)


def test_the_command_says_in_one_sentence_what_is_wrong(root, monkeypatch, capsys):
    monkeypatch.setenv("WORKBENCH_ROOT", str(root))
    for arguments in (["nosuch"], ["--no-timing"], ["synthetic", "--set", "epoch=3"]):
        assert cli.main(["doctor", *arguments]) == 1
        out, told = capsys.readouterr()
        assert (out, len(told.splitlines())) == ("", 1)


def test_a_network_that_cannot_be_built_is_a_finding(root):
    check = look(root, image_size=20, shard_margin=0)["Network"]
    assert (check.status, "too small" in check.found) == ("failed", True)
    assert not check.found.startswith("workbench")


def test_a_cluster_is_held_against_the_recipe_without_starting_it(root, capsys):
    (root / "clusters.yml").write_text("gpu: {kind: slurm, nodes: 2, tasks_per_node: 4}")
    assert preflight.main(root, "synthetic", overrides=SMALL | {"cluster_name": "gpu", "workers": 0}, timing=False) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "8 workers on the cluster gpu" in said
    assert "the cluster gpu takes up to 8 (2 hosts)" in said
    assert "what the hosts have is known when workers are there" in said
    with pytest.raises(WorkbenchError, match="`workers` is 9, and the cluster gpu takes 1 to 8"):
        preflight.main(root, "synthetic", overrides=SMALL | {"cluster_name": "gpu", "workers": 9})


@pytest.mark.mpi
@pytest.mark.parametrize(("network", "size", "batch_size"), [("Tiny", 32, 8), ("DenseNet121", 64, 8)])
def test_memory_is_as_estimated_and_time_is_measured(network, size, batch_size, root, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "TRIAL_SECONDS", 3.0)
    settings = {"network": network, "image_size": size, "batch_size": batch_size}
    planned = plan.plan_recipe(root, "synthetic", overrides=SMALL | settings)
    held = preflight._count(planned)
    told = estimate.try_recipe(planned, preflight.this_host().start)
    assert [one["world_size"] for one in told] == [2, 2]
    for one in told:
        assert held["rank"] == pytest.approx(one["peak_bytes"], rel=estimate.ERROR)
    # At least what the steps take, and what is there before them.
    steps = planned.config.epochs * planned.steps * planned.global_batch / estimate.rate_of(told)
    assert estimate.predict_seconds(planned, told) > steps + told[0]["start_seconds"] + told[0]["first_step_seconds"]
    assert not list(root.glob("data/*"))


@pytest.mark.mpi
def test_the_whole_preflight(written, capsys):
    assert preflight.main(written, "synthetic", overrides=SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "This recipe can run here."
    assert len(lines) < 30
    names = [line[9:20].strip() for line in lines[1:-1] if line[:8].strip()]
    assert names == ["Data", "Shards", "Steps", "Batch", "Workers", "Disk", "Memory", "Reading", "Time"]


def test_the_estimate_grows_with_what_it_depends_on():
    from workbench.training import trial

    held = trial.count_network("Tiny", findings=14, image_size=64, precision="float32")
    half = trial.count_network("Tiny", findings=14, image_size=64, precision="mixed_bfloat16")
    large = trial.count_network("Tiny", findings=14, image_size=128, precision="float32")
    assert half["held"] < held["held"] < large["held"] / 3.9
    assert trial.peak_memory() > 10**8
    one, two = (estimate.memory_of_rank(held, batch_size=b, ranks=2, input_bytes=0) for b in (8, 16))
    assert two - one == pytest.approx(8 * held["held"] * estimate.HELD_TIMES, rel=1e-6)
