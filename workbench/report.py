"""A run as one page, and all runs as another: HTML files that open anywhere, without a network or a script.

`report.html` puts a summary before the executed notebooks and leaves their code out; parameters fold away.

    from workbench import report, runs
    report.write_report(folder)                        # results/<run>/report.html
    report.write_overview(runs.project_root())         # results/index.html
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import nbformat

from workbench import WorkbenchError, files, runs

_NOTICE = "Research software, not a medical device: nothing here is for diagnosis."
_STYLE = """
:root { --ink: #222; --pale: #f4f5f7; --line: #dfe2e6; --blue: #0072B2; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
nav { position: fixed; inset: 0 auto 0 0; width: 15.5rem; overflow-y: auto; padding: 1.4rem 1.2rem;
  background: var(--pale); border-right: 1px solid var(--line); font-size: .86rem; }
nav b { display: block; margin: .9rem 0 .15rem; } nav a { display: block; padding: .1rem 0; color: #444; }
main { margin-left: 15.5rem; padding: 2rem 2.6rem 5rem; max-width: 76rem; }
.overview { margin: 0 auto; } .overview td { white-space: nowrap; }
a { color: var(--blue); text-decoration: none; } a:hover { text-decoration: underline; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 2.8rem 0 .8rem; padding-top: 1.4rem;
  border-top: 3px solid var(--line); }
header h1 { border: 0; margin-top: 0; padding: 0; } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; }
p, ul, ol { max-width: 46rem; } header p:has(img) { max-width: none; } .anchor-link { display: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(12rem, 1fr)); gap: .8rem; margin: 1.4rem 0; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.45rem; line-height: 1.3; } .card span { color: #555; font-size: .84rem; }
.notice { border-left: 4px solid #E69F00; background: #fdf6e7; padding: .5rem .9rem; max-width: 46rem; }
img { max-width: 100%; height: auto; } pre { overflow-x: auto; font-size: .82rem; line-height: 1.4; margin: .5rem 0; }
code { font-size: .88em; background: var(--pale); border-radius: 3px; padding: 0 .2em; } pre code { background: none; }
.jp-OutputArea, .jp-Cell, .output { overflow-x: auto; } .jp-InputPrompt, .jp-OutputPrompt, .prompt { display: none; }
table { border-collapse: collapse; font-size: .86rem; margin: .6rem 0; font-variant-numeric: tabular-nums; }
table, th, td { border: 0; } th, td { padding: .22rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th { background: var(--pale); font-weight: 600; } tbody th, .text { text-align: left; } caption { text-align: left; }
details { margin: .6rem 0; } summary { cursor: pointer; color: #555; }
@media (max-width: 60rem) { nav { position: static; width: auto; border: 0; } main { margin: 0; padding: 1rem; } }
@media print { nav { display: none; } main { margin: 0; } details > * { display: block; } }
"""


def write_report(folder: Path) -> None:
    """Write `report.html`: a summary, what the executed notebooks show, and how the run was made."""
    sections, contents = [], []
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        section, headings = _section(path)
        sections.append(section)
        contents.append(headings)
    if not sections:
        return
    record = runs.read_run(folder)
    provenance, heading = _provenance(record)
    navigation = _navigation(folder.name, [*contents, heading])
    body = f"<main>{_summary(folder, record)}{''.join(sections)}{provenance}</main>"
    _write(folder / "report.html", f"{folder.name}: report", navigation + body)


def write_overview(root: Path) -> Path:
    """Write `results/index.html`: every run with its AUROC, drawn on one scale, and its report. Returns the path."""
    rows = []
    for told in runs.list_runs(root).to_dict("records"):
        folder = root / "results" / told["run"]
        name = html.escape(told["run"])
        link = f'<a href="{name}/report.html">{name}</a>' if (folder / "report.html").exists() else name
        texts = (link, html.escape(told["recipe"]), html.escape(told["status"]), told["started"][:16].replace("T", " "))
        cells = "".join(f'<td class="text">{text}</td>' for text in texts)
        for key, form in (("minutes", ".1f"), ("workers", "d"), ("images_per_second", ".1f"), ("mean_auroc", ".4f")):
            known = told[key] == told[key] and told[key] is not None and str(told[key]) != "<NA>"
            cells += f"<td>{format(told[key], form) if known else ''}</td>"
        test = {}
        with suppress(WorkbenchError):  # one broken file hides no other run
            test = runs.read_metrics(folder).get("test", {})
        rows.append(f'<tr>{cells}<td class="text">{_whisker(test)}</td></tr>')
    heads = ["Run", "Recipe", "Status", "Started (UTC)", "Minutes", "Workers", "Images/s", "Mean AUROC"]
    head = "".join(f'<th class="{"text" if k < 4 else ""}">{name}</th>' for k, name in enumerate(heads))
    scale = '<th class="text">Mean test AUROC with 95 % interval, 0.5 to 1</th>'
    table = f"<table><thead><tr>{head}{scale}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    told = table if rows else "<p>No runs yet: <code>workbench run synthetic</code> makes one.</p>"
    path = root / "results" / "index.html"
    path.parent.mkdir(exist_ok=True)
    page = f'<main class="overview"><header><h1>All runs</h1></header>{told}<p class="notice">{_NOTICE}</p></main>'
    _write(path, "workbench: all runs", page)
    return path


def _section(path: Path) -> tuple[str, list[tuple[str, str]]]:
    """One executed notebook as HTML without its code, and its headings: (anchor, text), the title first."""
    from nbconvert import HTMLExporter  # slow to import, and needed once

    try:
        return _read_section(path, HTMLExporter(template_name="basic"))
    except Exception as error:  # what is no notebook raises many kinds, in reading and in drawing it
        raise WorkbenchError(f"{path} is not an executed notebook ({error}): run its stage again.") from None


def _read_section(path: Path, exporter) -> tuple[str, list[tuple[str, str]]]:
    notebook = nbformat.read(path, as_version=4)
    parameters = [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        cell.id = f"{path.stem}-{cell.id}"[:64]  # unique on the page as well
        cell.metadata["transient"] = {"remove_source": cell.cell_type == "code"}
        # Defaults that were replaced would only mislead beside the values that were used.
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\A## Parameters\b.*\Z", "", cell.source, flags=re.DOTALL)
    body, _ = exporter.from_notebook_node(notebook)
    stage, headings = path.stem, []

    def anchor(match: re.Match) -> str:
        level, text = match["level"], re.sub(r"<[^>]+>|¶", "", match["text"]).strip()
        headings.append((f"{stage}-{len(headings)}", text))
        return f'<h{level} id="{headings[-1][0]}">{text}</h{level}>'

    body = re.sub(r"<h(?P<level>[12])\b[^>]*>(?P<text>.*?)</h(?P=level)>", anchor, body, flags=re.DOTALL)
    folded = "".join(f"<pre>{html.escape(cell.source)}</pre>" for cell in parameters)
    end = f"<details><summary>Parameters of this notebook</summary>{folded}</details>" if folded else ""
    return f"<section>{body}{end}</section>", headings


def _summary(folder: Path, record: Mapping[str, Any]) -> str:
    parameters, test = record["parameters"], runs.read_metrics(folder).get("test", {})
    cards = []
    if None not in (test.get(name) for name in ("mean_auroc", "ci_low", "ci_high")):
        interval = f"mean test AUROC, 95 % interval {test['ci_low']:.3f} to {test['ci_high']:.3f}"
        cards.append((f"{test['mean_auroc']:.3f}", interval))
        cards.append((str(test.get("findings", "?")), "findings in the mean" + _left_out(test.get("undefined", []))))
    if "best_epoch" in record:
        cards.append((f"{record['best_epoch']} of {parameters.get('epochs', '?')}", "epoch kept"))
    if {"images_per_second", "world_size"} <= record.keys():
        workers = f"{record['world_size']} worker" + "s" * (record["world_size"] != 1)
        cards.append((f"{record['images_per_second']:.0f} images/s", f"in training on {workers}"))
    if (took := runs.minutes(record)) is not None:
        cards.append((f"{took:.1f} min", "all notebooks together"))
    shown = "".join(
        f'<div class="card"><b>{html.escape(big)}</b><span>{html.escape(small)}</span></div>' for big, small in cards
    )
    network, size = parameters.get("network", "a network"), parameters.get("image_size", "?")
    question = (
        f"How well does {network}, trained on {size} × {size} radiographs of the shards "
        f"{Path(str(parameters.get('shard_folder', ''))).name}, tell which findings a chest radiograph shows, and how "
        "fast does it train?"
    )
    made_up = record.get("recipe", "").startswith("synthetic")
    synthetic = " The radiographs are made up, so the scores say nothing about real ones." if made_up else ""
    return (
        f'<header id="summary"><h1>{html.escape(folder.name)}</h1><p>{html.escape(question)}{synthetic}</p>'
        f'<div class="cards">{shown}</div><p class="notice">{_NOTICE}</p>{_chart(folder)}</header>'
    )


def _chart(folder: Path) -> str:
    path = folder / "figures" / "04_auroc.png"
    if not path.exists():
        return ""
    encoded = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="AUROC of each finding" src="data:image/png;base64,{encoded}"></p>'


def _left_out(names: list[str]) -> str:
    return f"; not defined on test: {', '.join(names)}" if names else ""


def _provenance(record: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    facts = {name: record.get(name) for name in ("recipe", "status", "started", "ended", "git")}
    facts |= {"hosts": ", ".join(record.get("hosts", []))} | record.get("versions", {})
    stages = {name: f"{told['status']}, {told['seconds']:.0f} s" for name, told in record.get("stages", {}).items()}
    parameters = {name: json.dumps(value) for name, value in record.get("parameters", {}).items()}
    parts = "".join(
        f"<h2>{title}</h2>{_table(values)}"
        for title, values in (("Versions and hosts", facts), ("Stages", stages), ("Recipe", parameters))
    )
    title = "How this was made"
    return f'<section><h1 id="provenance">{title}</h1>{parts}</section>', [("provenance", title)]


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th>{html.escape(name)}</th><td class="text">{html.escape(str(value))}</td></tr>'
        for name, value in values.items()
    )
    return f"<table><tbody>{rows}</tbody></table>"


def _navigation(name: str, contents: list[list[tuple[str, str]]]) -> str:
    links = "".join(
        f'<b><a href="#{title[0]}">{html.escape(html.unescape(title[1]))}</a></b>'
        + "".join(f'<a href="#{anchor}">{html.escape(html.unescape(text))}</a>' for anchor, text in headings)
        for title, *headings in filter(None, contents)
    )
    return f'<nav><a href="#summary"><strong>{html.escape(name)}</strong></a>{links}</nav>'


def _whisker(test: Mapping[str, Any]) -> str:
    """The mean AUROC as a dot on a scale from 0.5 to 1, its interval as a line."""
    numbers = [test.get(name) for name in ("ci_low", "mean_auroc", "ci_high")]
    if None in numbers:
        return ""
    low, middle, high = (200 * (min(max(x, 0.5), 1) - 0.5) / 0.5 + 5 for x in numbers)
    return (
        '<svg width="210" height="16"><line x1="5" x2="205" y1="8" y2="8" stroke="#dfe2e6"/>'
        f'<line x1="{low:.1f}" x2="{high:.1f}" y1="8" y2="8" stroke="#0072B2" stroke-width="3"/>'
        f'<circle cx="{middle:.1f}" cy="8" r="4.5" fill="#0072B2"/></svg>'
    )


def _write(path: Path, title: str, body: str) -> None:
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    with files.written_whole(path) as part:
        part.write_text(
            f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{body}</body></html>'
        )
