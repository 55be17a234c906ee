"""The notebooks in JupyterLab, in a real browser: run, watched and stopped.

Screenshots go to the folder that WORKBENCH_SCREENSHOTS names, or else to pytest's own. Every wait is for something
to be seen, and ends.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from workbench import runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.mpi,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]
PATIENCE = 240_000  # milliseconds that one thing may take on a machine that has others to serve
QUICK = {
    "synthetic_patients": 60,
    "image_size": 32,
    "shard_margin": 4,
    "network": "Tiny",
    "batch_size": 4,
    "learning_rate": 0.003,
    "measured_steps": 3,
    "warmup_steps": 1,
    "resamples": 50,
    "worker_counts": [1, 2],
    "heat_maps": 0,
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The notebooks, with the smallest parameters that make sense."""
    root = tmp_path_factory.mktemp("browser")
    shutil.copytree(runs.project_root() / "notebooks", root / "notebooks")
    for path in (root / "notebooks").glob("*.ipynb"):
        set_parameters(path, **QUICK)
    return root


def set_parameters(path: Path, **settings) -> None:
    notebook = nbformat.read(path, as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items() if f"{name} = " in cell.source)
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def lab(project, tmp_path_factory):
    """The address of a JupyterLab of its own, on loopback, with a token."""
    token, home = secrets.token_hex(16), tmp_path_factory.mktemp("jupyter")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={project / 'notebooks'}", "--allow-root"]
    places = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    places |= {"WORKBENCH_ROOT": str(project), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    places |= {"JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    # All cells are in the page, seen or not, and nobody is asked about news.
    for plugin, settings in {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }.items():
        path = home / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, env=os.environ | places, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}", token
    finally:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        for process in family:
            if process.is_running():
                process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()


@pytest.fixture(scope="module")
def page(lab):
    from playwright.sync_api import sync_playwright

    address, token = lab
    deadline = time.monotonic() + 120
    with sync_playwright() as playwright:
        # As root Chromium's own sandbox cannot be made.
        arguments = ["--disable-dev-shm-usage"] + ["--no-sandbox"] * (os.getuid() == 0)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_context(viewport={"width": 1400, "height": 1100}).new_page()
        page.set_default_timeout(PATIENCE)
        page.on("dialog", lambda dialog: dialog.accept())  # leaving a page with changes
        while True:
            try:
                page.goto(f"{address}/lab?token={token}")
                break
            except Exception:
                assert time.monotonic() < deadline, "JupyterLab did not come up"
                time.sleep(0.5)
        page.wait_for_selector("#jp-top-panel")
        yield page
        browser.close()


@pytest.fixture
def shot(page, tmp_path):
    folder = Path(os.environ.get("WORKBENCH_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    yield lambda name, page=page: page.screenshot(path=folder / f"{name}.png")
    page.screenshot(path=folder / "last.png")  # what stood there when a test failed


def open_notebook(page, lab, name: str) -> None:
    """Open a notebook and nothing else, with a kernel."""
    page.goto(f"{lab[0]}/lab/workspaces/{name[:2]}/tree/{name}.ipynb?reset&token={lab[1]}")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    # Before there is a kernel JupyterLab would ask for one.
    page.wait_for_selector("#jp-main-statusbar :text('| Idle')")


def run_all(page) -> None:
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def show(page, text: str):
    """The last output that holds a text, once it is there, brought into view."""
    found = page.locator(".jp-OutputArea-output", has_text=text).last
    try:
        found.wait_for()
    except Exception as error:
        shown = [each[-400:] for each in page.locator(".jp-OutputArea-output").all_inner_texts()]
        raise AssertionError(f"no output shows {text!r}, but the last show {shown[-4:]}") from error
    found.scroll_into_view_if_needed()
    return found


ERRORS = '.jp-OutputArea-output:is([data-mime-type$="jupyter.error"], [data-mime-type$="jupyter.stderr"])'
CHANGED = "text => ![...document.querySelectorAll('.jp-OutputArea-output')].some(one => one.innerText === text)"
ALL_RUN = """() => {
    const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(one => one.innerText);
    const failed = document.querySelector('[data-mime-type$="jupyter.error"], [data-mime-type$="jupyter.stderr"]');
    return failed || (prompts.length && prompts.every(text => /[0-9]/.test(text)));
}"""


def run_whole(page, lab, name: str) -> None:
    open_notebook(page, lab, name)
    page.get_by_role("menuitem", name="Edit", exact=True).click()
    page.get_by_role("menuitem", name="Clear Outputs of All Cells", exact=True).click()
    run_all(page)
    page.wait_for_function(ALL_RUN)
    assert page.locator(ERRORS).all_inner_texts() == []


def wait_until(page, holds, what: str) -> None:
    """Wait for something that is not on the page, and let the page go on meanwhile."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not holds():
        assert time.monotonic() < deadline, what
        assert page.locator(ERRORS).all_inner_texts() == []
        page.wait_for_timeout(200)


def test_the_first_two_notebooks_show_the_data_and_write_shards(page, lab, project, shot):
    run_whole(page, lab, "01_explore_dataset")
    assert page.locator(".jp-RenderedImage img").count() >= 5
    page.locator(".jp-RenderedImage img").first.scroll_into_view_if_needed()
    shot("01")
    run_whole(page, lab, "02_write_shards")
    shot("02")
    assert (project / "data" / "shards" / "synthetic" / "info.json").exists()


def test_training_is_watched_and_stopped(page, lab, project, shot):
    notebook, folder = project / "notebooks" / "03_train.ipynb", project / "results" / "seen"
    set_parameters(notebook, epochs=2000, run="seen")
    open_notebook(page, lab, "03_train")
    run_all(page)
    wait_until(page, lambda: runs.has_checkpoint(folder), "no epoch was completed")
    show(page, "in the exchange")
    page.locator(".widget-image").wait_for()
    show(page, "so far")
    shot("03-training")
    look_from_elsewhere(page, lab, project, shot)
    page.locator('.jp-NotebookPanel-toolbar [data-command="notebook:interrupt-kernel"]').click()
    said = page.locator(ERRORS, has_text="Interrupted")
    said.wait_for()
    assert said.inner_text().startswith("Interrupted: Interrupted before ")
    assert "go on with `workbench run --resume seen`" in said.inner_text()
    assert "Traceback" not in said.inner_text()
    show(page, "It was stopped")
    shot("03-stopped")


def look_from_elsewhere(page, lab, project, shot) -> None:
    """In another notebook of another page while a cell of notebook 03 trains."""
    code = "from workbench import runs\nfrom workbench.training import progress\n\n"
    code += "progress.follow(runs.find_run(runs.project_root(), 'seen'))"
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), project / "notebooks" / "elsewhere.ipynb")
    other = page.context.new_page()
    other.set_default_timeout(PATIENCE)
    open_notebook(other, lab, "elsewhere")
    run_all(other)
    other.locator(".widget-image").wait_for()
    before = show(other, "images/s in all").inner_text()
    other.wait_for_function(CHANGED, arg=before)
    shot("03-from-elsewhere", other)
    other.close()


@pytest.mark.parametrize("background", [False, True])
def test_a_reloaded_page_finds_the_training_again(page, lab, project, shot, background):
    notebook, folder = project / "notebooks" / "03_train.ipynb", project / "results" / "seen"
    done = len((folder / "history.csv").read_text().splitlines()) - 1
    set_parameters(notebook, resume=True, background=background, epochs=done + 3000)
    open_notebook(page, lab, "03_train")
    run_all(page)
    if background:
        show(page, "The training goes on in the background")
    show(page, "images/s in all")
    page.locator(".widget-image").wait_for()
    page.keyboard.press("Control+s")
    page.wait_for_selector(".jp-NotebookPanel .jp-Toolbar")
    page.wait_for_timeout(2000)
    page.reload()
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    before = show(page, "images/s in all").inner_text()
    shot(f"03-reloaded-{background}")
    page.wait_for_function(CHANGED, arg=before)
    page.get_by_role("button", name="Stop at the next step").click()
    show(page, "It was stopped")
    shot(f"03-stopped-by-the-panel-{background}")
    assert json.loads((folder / runs.PROGRESS).read_text())["status"] == "interrupted"


def test_the_resumed_training_ends_and_the_last_two_notebooks_show_their_charts(page, lab, project, shot):
    notebook, folder = project / "notebooks" / "03_train.ipynb", project / "results" / "seen"
    done = len((folder / "history.csv").read_text().splitlines()) - 1
    set_parameters(notebook, resume=True, background=False, epochs=done + 1)
    run_whole(page, lab, "03_train")
    show(page, "The training has ended")
    shot("03-ended")
    for name in ("04_evaluate", "05_scaling"):
        run_whole(page, lab, name)
        charts = page.locator(".jp-RenderedImage img")
        assert charts.count() >= 3
        for number in range(charts.count()):
            assert charts.nth(number).evaluate("image => image.naturalWidth > 300")
        charts.last.scroll_into_view_if_needed()
        shot(name[:2])
