"""What a run does about damaged records in its shards: stop at the first (the rule), or go on without them.

    @skipping.damaged_records
    def train(config, run_folder, ...): ...      # its config's shards are whole

With `damaged_records` = "skip" the ranks share a scan of all shards before anything else is done, agree on what is
damaged, and each reads copies without those records from a temporary folder of its own, so all of them plan the same
equal numbers of steps. The shards themselves are never changed.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from workbench import WorkbenchError
from workbench.data import damage
from workbench.files import written_whole
from workbench.training import distributed, pulse
from workbench.training.config import TrainConfig

TABLE = "skipped.csv"


def damaged_records(function: Callable) -> Callable:
    """A function of a config, whose shards it reads, that heeds the config's `damaged_records` and `damaged_limit`."""

    @functools.wraps(function)
    def heeding(config: TrainConfig, *arguments, **named):
        if config.damaged_records == "raise":
            return function(config, *arguments, **named)
        skipped = find_damaged(config, distributed.start(config.threads))
        # The cluster's folder, where there is one here, is removed even if this rank is killed.
        scratch = os.environ.get("WORKBENCH_SCRATCH", "")
        place = scratch if os.path.isdir(scratch) else None
        with tempfile.TemporaryDirectory(prefix="workbench-shards-", dir=place) as room:
            # The shards' own name, which sentences about them then show.
            usable = Path(room) / Path(config.shard_folder).name
            damage.write_without(config.shard_folder, skipped, usable)
            return function(replace(config, shard_folder=str(usable)), *arguments, **named)

    return heeding


def find_damaged(config: TrainConfig, world: distributed.World) -> list[dict]:
    """All records that cannot be used, as `damage.scan_shards` tells them, the same on every rank.

    Raises:
        WorkbenchError: there are more than `damaged_limit`.
    """
    mine = []
    for file, records in damage.scan_shards(config.shard_folder, rank=world.rank, size=world.size):
        pulse.beat(f"looked for damage in {file}")
        mine += records
    text = "".join(json.dumps(record) + "\n" for record in mine)
    # Horovod: collectives carry numbers, so the text travels as bytes; every rank gets the lines of all.
    lines = distributed.gather(np.frombuffer(text.encode(), np.uint8)).tobytes().decode().splitlines()
    found = damage.in_order([json.loads(line) for line in lines])
    if len(found) > config.damaged_limit:
        raise WorkbenchError(
            f"{len(found):,} records in {config.shard_folder} are damaged, the first in {found[0]['shard']}, and "
            f"`damaged_limit` allows {config.damaged_limit:,}: copy the shards again or write them again (`workbench "
            "verify` names each), or raise the limit."
        )
    return found


def record_skipped(info: dict, run_folder: Path) -> None:
    """Write `skipped.csv` into the run's folder where damaged records are skipped, and say so; called by one rank.

    Columns: `shard`, `record` (counted from 1), `split`, `image`, `damage`.
    """
    if "skipped" not in info:
        # Of the epochs before a resumption: the predictions will have all images.
        (run_folder / TABLE).unlink(missing_ok=True)
        return
    table = pd.DataFrame(info["skipped"], columns=list(damage.COLUMNS))
    with written_whole(run_folder / TABLE) as part:
        table.to_csv(part, index=False)
    if len(table):
        lines = table.head(10).to_csv(index=False, header=False).splitlines()
        print(f"damaged records skipped: {len(table)}, listed in {run_folder / TABLE}", *lines, sep="\n  ")


def describe_skipped(info: dict) -> dict:
    """What of a run's settings the copies without damaged records are not to hide."""
    return {"shard_folder": info["copied_from"], "skipped": len(info["skipped"])} if "skipped" in info else {}
