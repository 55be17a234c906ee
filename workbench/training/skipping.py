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
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from workbench import WorkbenchError
from workbench.data import damage
from workbench.runs import written_whole
from workbench.training import distributed
from workbench.training.config import TrainConfig

TABLE = "skipped.csv"


def damaged_records(function: Callable) -> Callable:
    """A function of a config, whose shards it reads, that heeds the config's `damaged_records` and `damaged_limit`."""

    @functools.wraps(function)
    def heeding(config: TrainConfig, *arguments, **named):
        if config.damaged_records == "raise":
            return function(config, *arguments, **named)
        world = distributed.start(config.threads)
        if named.get("report") and world.rank == 0:
            named["report"]({"phase": "looking for damaged records"})
        skipped = find_damaged(config, world)
        with tempfile.TemporaryDirectory(prefix="workbench-shards-") as room:
            # The shards' own name, which sentences about them then show.
            usable = Path(room) / Path(config.shard_folder).name
            damage.write_without(config.shard_folder, skipped, usable)
            damage.list_skipped(skipped).to_csv(usable / TABLE, index=False)
            return function(replace(config, shard_folder=str(usable), damaged_records="raise"), *arguments, **named)

    return heeding


def find_damaged(config: TrainConfig, world: distributed.World) -> list[dict]:
    """All records that cannot be used, as `damage.scan_shards` tells them, the same on every rank.

    Raises:
        WorkbenchError: there are more than `damaged_limit`.
    """
    mine = damage.scan_shards(config.shard_folder, rank=world.rank, size=world.size)
    text = "".join(json.dumps(record) + "\n" for record in mine)
    # Horovod: collectives carry numbers, so the text travels as bytes; every rank gets the lines of all.
    lines = distributed.gather(np.frombuffer(text.encode(), np.uint8)).tobytes().decode().splitlines()
    found = [json.loads(line) for line in lines]
    if len(found) > config.damaged_limit:
        raise WorkbenchError(
            f"{len(found):,} records in {config.shard_folder} are damaged, the first in {found[0]['shard']}, and "
            f"`damaged_limit` allows {config.damaged_limit:,}: copy the shards again or write them again (`workbench "
            "verify` names each), or raise the limit."
        )
    return found


def record_skipped(config: TrainConfig, run_folder: Path) -> int:
    """Write `skipped.csv` into the run's folder if records are skipped, and say so; returns how many are.

    Columns: `shard`, `record` (counted from 1), `split`, `image`, `damage`. Called by one rank.
    """
    told = Path(config.shard_folder) / TABLE
    if not told.exists():
        return 0
    text = told.read_text()
    with written_whole(run_folder / TABLE) as part:
        part.write_text(text)
    records = text.splitlines()[1:]
    if records:
        print(f"damaged records skipped: {len(records)}, listed in {run_folder / TABLE}", *records[:10], sep="\n  ")
    return len(records)
