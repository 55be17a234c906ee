"""A thing that was looked at, what was found, and what to do about it; printed so that a terminal shows it well.

from workbench.findings import Check, show
failed = show([Check("Disk", "warning", "1 GB free in /data", "make room")])
"""

import shutil
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from workbench import machine, one_line

SLOW_READING = 50e6  # bytes a second, less than a single hard disk gives


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. `status` is "ok", "warning" (it works, but) or "failed" (training cannot run)."""

    name: str
    status: str
    found: str
    advice: str = ""


def show(found: Iterable[Check]) -> list[str]:
    """Print checks as they come, aligned and folded to the terminal's width; returns the names of those that failed."""
    failed = []
    for check in found:
        width = max(shutil.get_terminal_size((120, 24)).columns, 60)
        _print_folded(f"{check.status:<8} {check.name:<11} ", one_line(check.found), width)
        if check.advice:
            _print_folded(f"{'':<20} -> ", one_line(check.advice), width)
        failed += [check.name] if check.status == "failed" else []
    return failed


def _print_folded(begin: str, text: str, width: int) -> None:
    # A path is never broken, so that it can be copied.
    lines = textwrap.wrap(text, width - len(begin), break_long_words=False, break_on_hyphens=False) or [""]
    for number, line in enumerate(lines):
        print((begin if number == 0 else " " * len(begin)) + line, flush=True)


def reading_check(folder: Path, files: list[Path], *, image_bytes: float = 0, needed: float = 0) -> Check:
    """How fast these shards come from the disk, held against what training needs if that is known.

    Args:
        folder: of the shards, for the words.
        files: the shards.
        image_bytes: mean size of an image in them; 0: not known.
        needed: images a second that all ranks of this host train; 0: not known.
    """
    try:
        reading = machine.read_speed(files)
    except OSError as error:
        return Check("Reading", "failed", f"{folder}: {error.strerror or error}", "check its permissions and the disk")
    if not reading.bytes:
        return Check(
            "Reading", "failed", f"{folder}: its shards are empty or gone", "write them again with notebook 02"
        )
    speed = reading.bytes_per_second
    cold = "cold" if reading.cached < 0.02 else f"{reading.cached:.0%} from this host's cache, which cannot be emptied"
    found = f"{folder.name}: {speed / 1e6:,.0f} MB/s ({cold}; {reading.bytes / 1e6:,.0f} MB read)"
    copy = "copy the shards to a disk of this host, and set `shard_folder` to it"
    if image_bytes:
        found += f", {speed / image_bytes:,.0f} images/s"
    if needed:
        found += f"; training takes {needed:,.0f}"
        return Check("Reading", *(("warning", found, copy) if speed / image_bytes < 1.5 * needed else ("ok", found)))
    return Check("Reading", *(("warning", found, copy) if speed < SLOW_READING else ("ok", found)))
