"""Whether a cluster that clusters.yml names works: its workers are really started, and exchange numbers.

from workbench import rollcall, runs
rollcall.main(sites.read_site(runs.project_root(), "gpu"))      # prints a line a host; 0 if training can run there
"""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator

from workbench.findings import Check, show
from workbench.training import cluster
from workbench.training.sites import Site


def main(site: Site) -> int:
    """Start as many workers as the place takes, print what each host has and how fast they exchange, and stop them.

    Returns:
        0, or 1 if training cannot run there.

    Raises:
        WorkbenchError: they do not start; says why.
    """
    workers = cluster.default_workers(site)
    print(f"Starting {workers} workers on the cluster {site.name}.", flush=True)
    began = time.monotonic()
    with cluster.start(workers, site=site) as ranks:
        came = Check("Workers", "ok", f"{len(ranks)} came within {time.monotonic() - began:.0f} s")
        failed = show([came, *_look(ranks)])
    print(f"Training cannot run there: {', '.join(failed)}." if failed else f"Training can run on {site.name}.")
    return 1 if failed else 0


def _look(ranks: cluster.Workers) -> Iterator[Check]:
    memory, gpus = (ranks.run(f"workbench.machine.{name}") for name in ("available_memory", "gpus_present"))
    told = ranks.run("workbench.training.distributed.measure_exchange")
    for host, number in collections.Counter(ranks.hosts).items():
        first = ranks.hosts.index(host)
        found = (
            f"ranks of {told[first]['threads']} threads: {number}; {memory[first] / 1e9:.0f} GB of memory can be taken"
        )
        if 0 < gpus[first] < number:
            advice = "ask for as many GPUs as workers on each host, or for fewer workers"
            yield Check(host, "failed", f"{found}; {gpus[first]} GPUs", advice)
        else:
            yield Check(host, "ok", f"{found}; {gpus[first] or 'no'} GPUs")
    if len(ranks) > 1:
        slowest, expected = max(told, key=lambda rank: rank["latency"]), len(ranks) * (len(ranks) + 1) / 2
        if any(rank["sum"] != expected for rank in told):
            yield Check("All-reduce", "failed", f"{len(ranks)} ranks added 1 to {len(ranks)} to {told[0]['sum']:g}")
            return
        speed = f"{slowest['latency'] * 1e3:.1f} ms for one number, {slowest['bandwidth'] / 1e9:.2f} GB/s"
        yield Check("All-reduce", "ok", f"{len(ranks)} ranks: {speed}")
