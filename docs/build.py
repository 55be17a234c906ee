"""Build the site into docs/_build/html: the pages beside this file, the executed notebooks of a run, the reference.

    make docs                # runs the notebooks on made-up data first, as small as they get
    make docs RUN=NAME       # shows those of a run under results/, which has to be of made-up data

Warnings of the builder are errors. Everything is made anew below docs/_build, which git ignores.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PYTHON = ROOT / ".venv" / "bin" / "python"
# The recipe `synthetic`, small enough for a minute.
SMALL = {
    "synthetic_patients": 200,
    "image_size": 32,
    "shard_margin": 4,
    "network": "Tiny",
    "batch_size": 8,
    "epochs": 6,
    "learning_rate": 0.003,
    "measured_steps": 10,
    "resamples": 200,
}
# What stands elsewhere and belongs to the site, as pages name it: its name there.
ELSEWHERE = {
    "../CHANGELOG.md": "changes.md",
    "../CONTRIBUTING.md": "contributing.md",
    "../data/README.md": "data.md",
    "../results/README.md": "results.md",
    "../tests/benchmarks/bench.png": "bench.png",
}
WINGS = {
    "workbench": "The ground, and what stands on top",
    "workbench.data": "Data",
    "workbench.training": "Training",
    "workbench.analysis": "Analysis",
}


def main(run: str = "", place: str | Path = DOCS / "_build") -> int:
    """Build the site in `place`, which is emptied; returns the exit status."""
    place = Path(place)
    shutil.rmtree(place, ignore_errors=True)
    source = place / "source"
    pages = [*sorted(DOCS.glob("*.md")), DOCS / "conf.py"]
    (source / "notebooks").mkdir(parents=True)
    (source / "static").mkdir()
    shutil.copy(DOCS / "site.css", source / "static")
    for name, here in ELSEWHERE.items():
        shutil.copy(DOCS / name, source / here)
    # The page of promises takes a table from it, as ../README.md.
    shutil.copy(ROOT / "README.md", place)
    for page in pages:
        text = page.read_text()
        for name, here in ELSEWHERE.items():
            text = text.replace(f"]({name})", f"]({here})")
        (source / page.name).write_text(text)
    project = Path(os.environ.get("WORKBENCH_ROOT") or ROOT) if run else place / "project"
    folder = project / "results" / (run or "made-up")
    if not run:
        shutil.copytree(ROOT / "notebooks", project / "notebooks")
        settings = [word for name, value in SMALL.items() for word in ("--set", f"{name}={json.dumps(value)}")]
        work(project, "-m", "workbench", "run", "synthetic", "--name", folder.name, *settings)
    copy_notebooks(project, folder, source / "notebooks")
    write_reference(source / "reference")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-d", place / "cache"]
    settings = {"TF_CPP_MIN_LOG_LEVEL": "3", "WORKBENCH_SOURCE": str(ROOT)}
    status = subprocess.run([*command, source, place / "html"], env=os.environ | settings).returncode
    if not status:
        print(place / "html" / "index.html")
    return status


def work(project: Path, *arguments: str) -> None:
    """Run Python in the environment of the workbench, on a project's folder."""
    quiet = {"WORKBENCH_ROOT": str(project), "WORKBENCH_PLAIN_PROGRESS": "1", "JUPYTER_PREFER_ENV_PATH": "1"}
    told = subprocess.run([PYTHON, *arguments], env=os.environ | quiet, capture_output=True, text=True)
    if told.returncode:
        raise SystemExit(told.stdout[-3000:] + told.stderr[-3000:])


def copy_notebooks(project: Path, folder: Path, place: Path) -> None:
    """The executed notebooks of a run, and notebook 06 on its model, without what a run alone is interested in."""
    if not (folder / "run.json").exists():
        raise SystemExit(f"There is no run in {folder}: name one that `workbench runs` lists, or none.")
    record = json.loads((folder / "run.json").read_text())
    if record["recipe"] != "synthetic":
        raise SystemExit(
            f"The run {folder.name} is of {record['recipe']}: pages show made-up data alone, name another."
        )
    last = "06_read_radiographs.ipynb"
    given = (
        "-p",
        "run",
        folder.name,
        "--cwd",
        str(project / "notebooks"),
        "-k",
        "python3",
        "--no-progress-bar",
        "--log-level",
        "CRITICAL",
    )
    work(project, "-m", "papermill", str(project / "notebooks" / last), str(place / last), *given)
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        shutil.copy(path, place)
    for path in sorted(place.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        for cell in notebook.cells:
            if "injected-parameters" in cell.metadata.get("tags", []):
                cell.metadata["tags"] = ["remove-cell"]
            for output in cell.get("outputs", []):
                tidy(output, project)
        nbformat.write(notebook, path)


def tidy(output: dict, project: Path) -> None:
    """Take out of a cell's output where it was executed, and what needs a running kernel."""
    data = output.get("data", {})
    data.pop("application/vnd.jupyter.widget-view+json", None)
    for holder, key in [(output, "text"), *((data, kind) for kind in data if kind.startswith("text/"))]:
        if isinstance(holder.get(key), str):
            holder[key] = holder[key].replace(str(project), "…")


def write_reference(place: Path) -> None:
    """A page per module, from its docstrings, and one per wing that lists them."""
    place.mkdir()
    for wing, title in WINGS.items():
        folder = ROOT.joinpath(*wing.split("."))
        names = [f"{wing}.{path.stem}" for path in sorted(folder.glob("*.py")) if not path.stem.startswith("__")]
        packages = [f"{wing}.{path.parent.name}" for path in sorted(folder.glob("*/__init__.py"))]
        (place / f"{wing}.md").write_text(
            f"# {title}\n\n```{{toctree}}\n:maxdepth: 1\n\n"
            + "".join(f"{name}-module\n" for name in names + packages)
            + "```\n"
        )
        for name in names + packages:
            options = ":members:\n" + (":imported-members:\n" if name in packages else "")
            page = f"# {name.removeprefix('workbench.')}\n\n```{{eval-rst}}\n.. automodule:: {name}\n"
            (place / f"{name}-module.md").write_text(
                page + "".join(f"   {line}\n" for line in options.split()) + "```\n"
            )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
