"""What a recipe would do: its parameters, images, shards, steps, before it is run.

The recipe is read as `workbench run` reads it, and the shards are looked at, or the data that would be written into
them. Every number is that of the pipeline. Nothing is started or judged here: `preflight` does.

    from workbench import plan, runs
    planned = plan.plan_recipe(runs.project_root(), "synthetic", overrides={"workers": 1})
    planned.steps, planned.left_out
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import WorkbenchError, batch
from workbench.data import chestxray14, pipeline, shards, synthetic
from workbench.training import cluster, sites
from workbench.training.config import TrainConfig

# Of a pixel, as `shards.write_shards` found them, and of a record besides its image.
ENCODED, RECORD = {"raw": 1.0, "png": 0.42, "jpeg": 0.23}, 83


@dataclass(frozen=True)
class Plan:
    """What a recipe would do.

    Attributes:
        root: the project's top folder.
        recipe: its name.
        parameters: of all notebooks.
        config: of the training.
        workers: how many ranks.
        site: where they run.
        images, shards: by split: how many.
        image_bytes: mean size of an image in the shards; estimated where they are not written yet.
        findings: how many.
        files: the shards, where they are written.
        frame: the data as notebook 02 would read them; None where they are not there.
        told: where the data come from, in words.
        trouble: what notebooks 01 and 02 would stop at, and what to do about it; empty: nothing.
    """

    root: Path
    recipe: str
    parameters: Mapping[str, Any]
    config: TrainConfig
    workers: int
    site: sites.Site
    images: Mapping[str, int]
    shards: Mapping[str, int]
    image_bytes: float
    findings: int
    files: tuple[Path, ...]
    frame: Any
    told: str
    trouble: tuple[str, str] = ("", "")

    @property
    def global_batch(self) -> int:
        """Images of one step of all workers."""
        return self.config.batch_size * self.workers

    @property
    def steps(self) -> int:
        """Steps of an epoch, the same on every worker."""
        return pipeline.steps_per_epoch(self.images["train"], batch_size=self.config.batch_size, size=self.workers)

    @property
    def left_out(self) -> int:
        """Training images that an epoch leaves out, other ones in the next."""
        return self.images["train"] - self.steps * self.global_batch

    @property
    def drawn(self) -> bool:
        """Whether the data would be made up first."""
        return bool(self.parameters["synthetic_patients"]) and self.frame is not None and not self.data.exists()

    @property
    def data(self) -> Path:
        """The folder of the raw data."""
        return self.root / self.parameters["data_folder"]


def plan_recipe(root: Path, recipe: str, *, overrides: Mapping[str, Any] | None = None) -> Plan:
    """Read a recipe and what it would train on, in a second or two.

    Args:
        root: the project's top folder.
        recipe: a name in notebooks/recipes/, or the path of a YAML file.
        overrides: parameters that replace the recipe's.

    Raises:
        WorkbenchError: the recipe, its parameters or its data are such that it cannot be run.
    """
    label, chosen = batch.read_recipe(root, recipe)
    given = batch.check_parameters(root, chosen | dict(overrides or {}), where=label)
    config = TrainConfig.from_parameters(given, root)
    folder, data = Path(config.shard_folder), root / given["data_folder"]
    stored = given["image_size"] + given["shard_margin"]
    info = shards.read_info(folder, findings=given["findings"] or None) if (folder / "info.json").exists() else None
    try:
        frame, told, trouble = *_read_data(data, given), ("", "")
    except WorkbenchError as error:
        if info is None:
            raise
        frame, told = None, f"{given['data_folder']} cannot be read"
        trouble = (str(error).rstrip("."), f"begin with the shards: `workbench run {recipe} --from 03`, or mend it")
    held = _describe_unwritten(frame, given, stored) if info is None else _describe_written(folder, info, config)
    if info and frame is not None and data.exists() and _differs(frame, info, given, stored):
        trouble = (
            f"{given['shard_folder']} holds shards of other images, labels or settings, which notebook 02 refuses",
            f"name other ones with `--set shard_folder=DIR`, or keep them: `workbench run {recipe} --from 03`",
        )
    images = held["images"]
    if not images["val"]:
        raise WorkbenchError(
            "There would be no validation images, by which the best epoch is chosen: set `validation_fraction` above 0."
        )
    site = sites.read_site(root, given["cluster_name"])
    workers = given["workers"] or cluster.default_workers(site)
    # Asked now, before anything is printed: there may be too few images for one step.
    pipeline.steps_per_epoch(images["train"], batch_size=config.batch_size, size=workers)
    return Plan(root, label, given, config, workers, site, frame=frame, told=told, trouble=trouble, **held)


def _describe_unwritten(frame, given: Mapping[str, Any], stored: int) -> dict[str, Any]:
    """The shards that notebook 02 would write."""
    if given["encoding"] not in ENCODED:
        raise WorkbenchError(f"`encoding` is {given['encoding']!r}: choose from {', '.join(ENCODED)}.")
    images = frame["split"].value_counts().reindex(chestxray14.SPLITS, fill_value=0).astype(int).to_dict()
    size = given["images_per_shard"]
    return {
        "images": images,
        "shards": {name: len(shards.plan_shards(many, images_per_shard=size)) for name, many in images.items()},
        "image_bytes": stored**2 * ENCODED[given["encoding"]] + RECORD,
        "findings": len(chestxray14.findings_of(frame)),
        "files": (),
    }


def _describe_written(folder: Path, info: dict, config: TrainConfig) -> dict[str, Any]:
    """The shards that are there, after the checks of training that are cheap."""
    shards.check_sizes(folder, info)
    if info["image_size"] < config.image_size:
        raise WorkbenchError(
            f"`{folder}` holds images of {info['image_size']} pixels, fewer than image_size={config.image_size}: "
            "choose another `shard_folder`, or a smaller `image_size`."
        )
    splits = {name: info["splits"][name] for name in chestxray14.SPLITS}
    listed = [shard for told in splits.values() for shard in told["shards"]]
    images = {name: told["images"] for name, told in splits.items()}
    return {
        "images": images,
        "shards": {name: len(told["shards"]) for name, told in splits.items()},
        "image_bytes": sum(shard["bytes"] for shard in listed) / max(sum(images.values()), 1),
        "findings": len(info["findings"]),
        "files": tuple(folder / shard["file"] for shard in listed),
    }


def _read_data(data: Path, given: Mapping[str, Any]) -> tuple[Any, str]:
    """The frame that notebook 02 would read, and in words where from."""
    sides = {name: given[name] for name in ("split", "validation_fraction", "test_fraction", "seed")}
    lists = {name: given[name] for name in ("train_list", "val_list", "test_list")}
    kept = {"images_folder": given["images_folder"], "findings": given["findings"] or chestxray14.FINDINGS}
    options = sides | lists | kept | {"missing": given["missing_images"]}
    if data.exists() or not given["synthetic_patients"]:
        frame = chestxray14.read_dataset(data, **options)
        return frame, f"{given['data_folder']}, {given['split']} split"
    with tempfile.TemporaryDirectory(prefix="workbench-preflight-") as folder:
        synthetic.write_tables(folder, patients=given["synthetic_patients"], seed=given["seed"])
        frame = chestxray14.read_dataset(folder, **options)
    return frame, f"{given['synthetic_patients']} made-up patients, not drawn yet, {given['split']} split"


def _differs(frame, info: dict, given: Mapping[str, Any], stored: int) -> bool:
    how = {name: given[name] for name in ("encoding", "images_per_shard", "seed")}
    return info.get("plan_sha256") != shards.hash_plan(frame, image_size=stored, **how)
