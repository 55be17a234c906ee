"""The report is one whole file without scripts or addresses; the overview lists every run."""

import re

import nbformat
import pytest

from workbench import WorkbenchError, cli, report, runs


@pytest.fixture
def run(tmp_path):
    parameters = {"network": "DenseNet121", "image_size": 64, "shard_folder": "data/shards/<b>", "epochs": 2}
    folder = runs.create_run(tmp_path, "first", recipe="synthetic", parameters=parameters)
    runs.update_run(folder, best_epoch=2, images_per_second=10.5, world_size=2)
    new = nbformat.v4
    cells = [
        new.new_markdown_cell("# 1 · Title\n\nText."),
        new.new_markdown_cell("## Parameters\n\nAs they stand."),
        new.new_code_cell("epochs = 6", metadata={"tags": ["parameters"]}),
        new.new_code_cell("epochs = 2", metadata={"tags": ["injected-parameters"]}),
        new.new_markdown_cell("## Data & splits"),
        new.new_code_cell("secret()", outputs=[new.new_output("stream", text="five < six\n")]),
    ]
    for name in ("01_a", "02_b"):
        nbformat.write(new.new_notebook(cells=cells), folder / "notebooks" / f"{name}.ipynb")
    return folder


def metrics(folder, **test):
    runs.write_json(
        folder / "metrics.json", {"test": {"mean_auroc": 0.8, "ci_low": 0.7, "ci_high": 0.9, "findings": 14} | test}
    )


def test_a_report_shows_results_and_hides_code(run):
    metrics(run, findings=13, undefined=["Hernia"])
    report.write_report(run)
    page = (run / "report.html").read_text()
    for said in ("0.800", "0.700 to 0.900", "not defined on test: Hernia", "five &lt; six", "2 of 2", "made up"):
        assert said in page
    assert "secret" not in page
    assert "epochs = 6" not in page  # replaced
    assert page.count("epochs = 2") == 2
    assert "&lt;b&gt;" in page  # a folder's name is text, not markup


def test_a_report_needs_neither_network_nor_script(run):
    report.write_report(run)
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)=["']https?://""", page)


def test_every_link_of_a_report_leads_somewhere(run):
    report.write_report(run)
    page = (run / "report.html").read_text()
    anchors = re.findall(r'id="([^"]+)"', page)
    links = re.findall(r'href="#([^"]+)"', page)
    assert len(links) == 6
    assert set(links) <= set(anchors)
    assert len(set(anchors)) == len(anchors)  # of cells, too


def test_a_run_without_notebooks_gets_no_report(tmp_path):
    folder = runs.create_run(tmp_path, "empty")
    report.write_report(folder)
    assert not (folder / "report.html").exists()


def test_the_overview_lists_runs_in_every_state(run):
    root = run.parents[1]
    runs.create_run(root, "second")
    metrics(run)
    report.write_report(run)
    broken = root / "results" / "broken"
    broken.mkdir()
    (broken / "run.json").write_text("{")
    page = report.write_overview(root).read_text()
    assert '<a href="first/report.html">first</a>' in page
    assert "0.8000" in page
    for name in ("second", "broken", "unreadable"):
        assert name in page
    assert page.count("<svg") == 1


def test_the_overview_of_nothing(tmp_path):
    assert "No runs yet" in report.write_overview(tmp_path).read_text()


@pytest.mark.parametrize("text", ["", "{}", '{"cells": [null], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'])
def test_a_notebook_that_is_none_is_named(run, text):
    (run / "notebooks" / "02_b.ipynb").write_text(text)
    with pytest.raises(WorkbenchError, match=r"02_b\.ipynb is not an executed notebook"):
        report.write_report(run)
    assert not (run / "report.html").exists()


def test_an_interval_that_is_not_known_is_left_out(run, capsys):
    metrics(run, ci_low=None, ci_high=None)
    report.write_report(run)
    assert "mean test AUROC" not in (run / "report.html").read_text()
    cli._summarise(run)
    assert "mean test AUROC" not in capsys.readouterr().out


def test_metrics_of_one_run_that_are_broken_hide_no_other(run):
    metrics(run)
    (runs.create_run(run.parents[1], "second") / "metrics.json").write_text("{")
    page = report.write_overview(run.parents[1]).read_text()
    assert "0.8000" in page
    assert "second" in page
