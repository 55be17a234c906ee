"""Measures the workbench against what its users would pick instead, side by side, and says whether each goal holds.

    make bench                    # every row, a table, results/bench/<date>.json and a chart
    make bench ROW=step-224-bf16  # one row; names separated by spaces for several

The sides of a comparison are loaded and warmed up first, then measured in turns (A B A B ...), so that whatever else
the machine does meets all of them. A row states the median of each side and the median of the ratios, one per turn,
with their smallest and largest. What is compared is listed in `rows.py`.
"""

import datetime
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rows import COMPARISONS, WITH_PEERS, Comparison, Row

PEERS_READY = Path(__file__).parents[2] / ".peers" / ".ready"
RESULTS = Path(__file__).parents[2] / "results" / "bench"


@dataclass(frozen=True)
class Result:
    """One line of the table. `ratio` is ours over the peer's; `spread` its smallest and largest over the turns."""

    name: str
    says: str
    ours: float
    peer: float
    unit: str
    ratio: float
    spread: tuple[float, float]
    goal: float
    holds: bool
    better: str
    notes: dict


def main(names: list[str]) -> int:
    """Measure the rows named, or all of them; 0 if every goal holds, 1 if not."""
    known = [row.name for comparison in COMPARISONS for row in comparison.rows]
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"There is no row `{unknown[0]}`: choose from {', '.join(known)}.", file=sys.stderr)
        return 2
    began, results, left_out = time.perf_counter(), [], 0
    print(f"{_machine()}\n\n{HEAD}", flush=True)
    for comparison in COMPARISONS:
        rows = [row for row in comparison.rows if not names or row.name in names]
        if not PEERS_READY.exists():
            for row in (row for row in rows if row.peer in WITH_PEERS):
                print(f"{row.name:22} not measured: PyTorch is not installed in .peers")
                left_out += 1
            rows = [row for row in rows if row.peer not in WITH_PEERS]
        if not rows:
            continue
        for result in _compare(comparison, rows):
            results.append(result)
            print(_line(result), flush=True)
    held = sum(result.holds for result in results)
    print(f"\n{held} of {len(results) + left_out} goals hold; {(time.perf_counter() - began) / 60:.1f} minutes.")
    if not results:
        return 1
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    record = {"machine": _machine(), "rows": [asdict(result) for result in results]}
    path.write_text(json.dumps(record, indent=1))
    print(f"{_draw(results, path.with_suffix('.png'))}\n{path}")
    return 0 if held == len(results) + left_out else 1


HEAD = f"{'row':22}{'ours':>10}{'peer':>10}  {'unit':12}{'ratio':>7}{'spread':>16}{'goal':>9}"


def _line(result: Result) -> str:
    sign = "≥" if result.better == "more" else "≤"
    low, high = result.spread
    return (
        f"{result.name:22}{_short(result.ours):>10}{_short(result.peer):>10}  {result.unit:12}{result.ratio:7.2f}"
        f"{f'{low:.2f} to {high:.2f}':>16}{sign:>5} {result.goal:<5g}{'holds' if result.holds else 'MISSED'}"
        f"   {result.says}"
    )


def _compare(comparison: Comparison, rows: list[Row]) -> list[Result]:
    """Start the sides that the rows need, measure them in turns, and end them."""
    wanted = {side for row in rows for side in (row.ours, row.peer) if isinstance(side, str)}
    parties, answers = {}, {name: [] for name in comparison.sides if name in wanted}
    try:
        for name in answers:
            parties[name] = comparison.sides[name]()
        for _ in range(comparison.turns):
            for name, party in parties.items():
                answers[name].append([_as_dict(answer) for answer in party.measure()])
    finally:
        for party in parties.values():
            party.close()
    return [_result(row, answers) for row in rows]


def _result(row: Row, answers: dict[str, list]) -> Result:
    ours = _values(row.ours, row.of, answers)
    peer = _values(row.peer, row.of, answers) if isinstance(row.peer, str) else [row.peer] * len(ours)
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    ratio = statistics.median(ratios)
    last = answers[row.ours][-1][0]
    return Result(
        name=row.name,
        says=row.says,
        ours=statistics.median(ours),
        peer=statistics.median(peer),
        unit=row.unit,
        ratio=ratio,
        spread=(min(ratios), max(ratios)),
        goal=row.goal,
        holds=ratio >= row.goal if row.better == "more" else ratio <= row.goal,
        better=row.better,
        notes={name: value for name, value in last.items() if name not in (row.of, "value")},
    )


def _values(side: str, of: str, answers: dict[str, list]) -> list[float]:
    """The side's number in each turn: of several processes the sum."""
    return [sum(answer[of] for answer in turn) for turn in answers[side]]


def _as_dict(answer) -> dict:
    return answer if isinstance(answer, dict) else {"value": answer}


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    extras = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{len(os.sched_getaffinity(0))} cores of {model} ({', '.join(extras)}), {memory:.0f} GiB"


def _draw(results: list[Result], path: Path) -> Path:
    """A bar per row: how far each ratio is from its goal, beyond 1 is better."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def toward(result, ratio):
        return ratio / result.goal if result.better == "more" else result.goal / ratio

    figure, ax = plt.subplots(figsize=(9, 1.2 + 0.34 * len(results)), layout="constrained")
    for place, result in enumerate(results):
        middle, ends = toward(result, result.ratio), sorted(toward(result, end) for end in result.spread)
        ax.barh(place, middle, color="#4c78a8" if result.holds else "#e45756", height=0.7)
        ax.plot(ends, [place, place], color="black", linewidth=1)
        sign = "≥" if result.better == "more" else "≤"
        ax.text(
            0.03, place, f"{result.ratio:.3g}× (goal {sign} {result.goal:g})", va="center", fontsize=8, color="white"
        )
    ax.axvline(1, color="black", linewidth=1, linestyle="--")
    ax.set(xlim=(0, max(2.0, *(min(3.0, toward(r, r.ratio) * 1.1) for r in results))))
    ax.set_yticks(range(len(results)), [result.name for result in results])
    ax.set_ylim(len(results) - 0.4, -0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("times the goal (dashed line; lines: smallest and largest turn)")
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
