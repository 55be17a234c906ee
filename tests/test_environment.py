"""The files that describe the environment agree with each other, and the modules import only downwards."""

import ast
import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GPU_BUILD = tomllib.loads((ROOT / "uv-gpu.toml").read_text())
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
LOCKS = ("requirements-cpu.txt", "requirements-docs.txt", "requirements-gpu.txt", "requirements-uv.txt")
MODULES = sorted((ROOT / "workbench").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Horovod is compiled against the GPU packages when they stand in place, so their lock leaves it out.
BUILT_LAST = {"horovod"}


# The environment


@functools.cache
def read_lock(name: str) -> dict[str, str]:
    """Package to version, from a file in which every entry is `name==version` with at least one hash."""
    entry = r"([a-z0-9-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n"
    text = (ROOT / name).read_text()
    rest = re.sub(entry, "", text)
    assert rest == "", f"{name}: not pinned with == and hashed: {rest.splitlines()[0]}"
    return {package: version for package, version, _ in re.findall(entry, text)}


def asked_for(*extras: str) -> list[Requirement]:
    """What pyproject.toml asks for, with these extras."""
    optional = PROJECT["project"]["optional-dependencies"]
    lines = PROJECT["project"]["dependencies"] + [line for extra in extras for line in optional[extra]]
    return [Requirement(line) for line in lines]


@pytest.mark.parametrize("name", LOCKS)
def test_locks_pin_and_hash_everything(name):
    assert read_lock(name)


@pytest.mark.parametrize("name", [*LOCKS, "environment.yml", "uv-gpu.toml", "pyproject.toml"])
def test_no_addresses(name):
    assert not re.search(r"\w://|@ *file:|--(extra-)?index-url|--find-links", (ROOT / name).read_text())


@pytest.mark.parametrize(
    ("name", "extras", "left_out"),
    [
        ("requirements-cpu.txt", ("cpu", "dev"), set()),
        ("requirements-gpu.txt", ("gpu", "dev"), BUILT_LAST),
    ],
)
def test_locks_hold_what_pyproject_asks_for(name, extras, left_out):
    lock = read_lock(name)
    for requirement in asked_for(*extras):
        package = canonicalize_name(requirement.name)
        if package in left_out:
            assert package not in lock
        else:
            assert package in lock, f"{name} lacks {requirement}: run `make lock`"
            assert requirement.specifier.contains(lock[package]), f"{name} has {package} {lock[package]}"


def test_cpu_and_gpu_locks_differ_in_tensorflow_alone():
    cpu, gpu = read_lock("requirements-cpu.txt"), read_lock("requirements-gpu.txt")
    assert {package for package in cpu if cpu[package] != gpu.get(package)} == {"tensorflow-cpu"} | BUILT_LAST
    assert {package for package in gpu.keys() - cpu.keys() if not package.startswith("nvidia-")} == {"tensorflow"}
    assert gpu["tensorflow"] == cpu["tensorflow-cpu"]


def test_what_builds_the_site_stands_on_the_environment():
    docs, cpu = read_lock("requirements-docs.txt"), read_lock("requirements-cpu.txt")
    for requirement in map(Requirement, PROJECT["dependency-groups"]["docs"]):
        assert requirement.specifier.contains(docs[canonicalize_name(requirement.name)]), "run `make lock`"
    assert {name for name in docs.keys() & cpu.keys() if docs[name] != cpu[name]} == set(), "run `make lock`"


def test_horovod_is_built_against_the_locked_packages():
    lock = read_lock("requirements-cpu.txt")
    cpu = PROJECT["tool"]["uv"]["extra-build-dependencies"]["horovod"]
    gpu = GPU_BUILD["extra-build-dependencies"]["horovod"]
    assert {f"tensorflow-cpu=={lock['tensorflow-cpu']}", f"openmpi=={lock['openmpi']}"} <= set(cpu)
    assert gpu == [line.replace("tensorflow-cpu", "tensorflow") for line in cpu]
    cpu_variables = PROJECT["tool"]["uv"]["extra-build-variables"]["horovod"]
    gpu_variables = GPU_BUILD["extra-build-variables"]["horovod"]
    for name in cpu_variables.keys() - {"MAKEFLAGS", "LDFLAGS"}:
        assert gpu_variables[name] == cpu_variables[name]
    assert gpu_variables["LDFLAGS"].startswith(cpu_variables["LDFLAGS"])


def test_conda_takes_its_versions_from_the_locks():
    text = (ROOT / "environment.yml").read_text()
    lock = read_lock("requirements-cpu.txt")
    (pip,) = [entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements-uv.txt", "-r requirements-gpu.txt"]
    assert f"TensorFlow {lock['tensorflow-cpu']} " in text
    assert f" horovod=={lock['horovod']}\n" in text
    # A second copy from conda would be another version, or another MPI than the one Horovod was built with.
    from_conda = {re.split("[=<>]", entry)[0] for entry in CONDA["dependencies"] if isinstance(entry, str)}
    assert not from_conda & (lock.keys() | {"tensorflow", "mpich"}), "these come from requirements-gpu.txt"
    (python,) = [entry for entry in CONDA["dependencies"] if re.match("python[=<>]", str(entry))]
    assert python == "python=3.11"
    assert PROJECT["project"]["requires-python"] == ">=3.11.2,<3.12"


def test_one_version_of_uv():
    (build,) = map(Requirement, PROJECT["build-system"]["requires"])
    assert build.name == "uv_build"
    assert build.specifier.contains(read_lock("requirements-uv.txt")["uv"])


@pytest.mark.parametrize(
    ("python", "compiler", "told"),
    [
        (None, True, r"python3 is missing: apt-get install python3 "),
        (
            'case "$1" in --version) echo Python 3.12.1;; *) exit 1;; esac',
            True,
            r"3\.11\.2 or newer.* Python 3\.12\.1: ",
        ),
        ('case "$2" in *ensurepip*) exit 1;; esac', True, r"no venv module: apt-get install python3-venv"),
        ("exit 0", False, r"g\+\+ is missing.*: apt-get install g\+\+"),
        ("exit 0", True, r"a space in its name: move .*/a project"),
    ],
    ids=["python", "version", "venv", "compiler", "space"],
)
def test_set_up_says_in_one_sentence_what_is_wrong(python, compiler, told, tmp_path):
    project = tmp_path / ("a project" if "space" in told else "project")
    project.mkdir()
    for name in ("Makefile", "requirements-uv.txt"):
        shutil.copy(ROOT / name, project)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "make", "sh", "uname"):
        (programs / name).symlink_to(shutil.which(name))
    if compiler:
        (programs / "g++").symlink_to("/bin/true")
    if python:
        (programs / "python3").write_text(f"#!/bin/sh\n{python}\n")
        (programs / "python3").chmod(0o755)
    command = ["make", "--directory", str(project), "SHELL=bash", ".uv/.ready"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PATH": str(programs)})
    assert done.returncode != 0
    (sentence,) = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert re.search(f"^set-up: .*{told}", sentence)
    assert not (project / ".uv").exists()


@pytest.mark.parametrize(
    ("nvcc", "surroundings", "said", "wrong"),
    [
        (None, {}, "", r"nvcc is missing.*: load the cluster's CUDA module \(12\.0 to 12\.5\), or name the toolkit"),
        (None, {"CUDA_HOME": "/nowhere"}, "", r"CUDA_HOME is /nowhere, and there is no bin/nvcc in it"),
        ("exit 0", {}, "", r"nvcc does not say what it is: name a CUDA toolkit"),
        ("12.8", {}, r"WARNING: this is CUDA 12\.8, and TensorFlow was built with 12\.5", None),
        ("13.0", {}, r"WARNING: this is CUDA 13\.0, and TensorFlow was built with 12\.5", None),
        ("12.5", {}, r"^(?!.*WARNING)", None),
    ],
    ids=["none", "home", "odd", "12.8", "13", "12.5"],
)
def test_gpu_set_up_says_in_one_sentence_what_it_finds(nvcc, surroundings, said, wrong, tmp_path):
    project, programs, toolkit = tmp_path / "project", tmp_path / "path", tmp_path / "cuda"
    for folder in (project / ".uv" / "bin", programs, toolkit / "bin"):
        folder.mkdir(parents=True)
    for name in ("Makefile", "requirements-uv.txt", "requirements-gpu.txt", "uv-gpu.toml", "pyproject.toml"):
        shutil.copy(ROOT / name, project)
    for name in ("bash", "cat", "grep", "make", "mktemp", "realpath", "rm", "sed", "sh", "uname"):
        (programs / name).symlink_to(shutil.which(name))
    (programs / "g++").symlink_to("/bin/true")
    (programs / "python3").symlink_to(sys.executable)
    # The installer stands there, and goes no further.
    (project / ".uv" / ".ready").touch()
    (project / ".uv" / "bin" / "uv").symlink_to("/bin/false")
    if nvcc:
        answer = f'echo "release {nvcc}, V"; echo "#$ _HERE_={toolkit}/bin" >&2' if nvcc[0].isdigit() else nvcc
        for place in (programs, toolkit / "bin"):
            (place / "nvcc").write_text(f"#!/bin/sh\n{answer}\n")
            (place / "nvcc").chmod(0o755)
    command = ["make", "--directory", str(project), "SHELL=bash", "setup-gpu"]
    environment = {"PATH": str(programs)} | surroundings
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode != 0
    sentences = [line for line in done.stderr.splitlines() if not line.startswith("make: ")]
    assert re.search(said, done.stdout, re.DOTALL)
    assert not wrong or re.search(f"^set-up: .*{wrong}", *sentences)
    assert wrong or "2 of 3, the environment for GPUs" in done.stdout, sentences
    assert not (project / ".venv-gpu").exists()


# The direction of the imports

# For each part of the package the parts that it may import; those that stand on top may import all.
BELOW = {
    "__init__": set(),
    "files": set(),
    "findings": {"machine"},
    "data": {"files"},
    "machine": set(),
    "provenance": set(),
    "runs": {"files", "provenance"},
    "analysis": {"runs"},
    "report": {"files", "runs"},
    "training": {"data", "files", "runs"},
}
ON_TOP = {"__main__", "batch", "cli", "doctor", "estimate", "plan", "preflight", "rerun", "rollcall", "sweep"}
ONLY_IN = {"horovod": "training/distributed.py", "ipyparallel": "training/cluster/", "papermill": "batch.py"}
HEAVY = {"horovod", "ipyparallel", "keras", "matplotlib", "pandas", "papermill", "sklearn", "tensorflow"}
MADE_FOR_TENSORFLOW = {"horovod", "keras", "tensorflow"}


def part_of(module: Path) -> str:
    return module.relative_to(ROOT / "workbench").with_suffix("").parts[0]


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Line and full name of everything that a file imports, wherever in the file."""
    package = path.relative_to(ROOT).parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            start = [*above, *filter(None, [node.module])]
            found += [(node.lineno, ".".join([*start, alias.name])) for alias in node.names]
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_imports_run_one_way(module):
    part = part_of(module)
    assert part in BELOW.keys() | ON_TOP, f"{name_of(module)}: say in BELOW or ON_TOP where this part stands"
    parts = {part_of(path) for path in MODULES} - {"__init__"}
    for line, name in imports_of(module):
        place = f"{name_of(module)}:{line} imports {name}"
        top, *inner = name.split(".")
        if top == "workbench" and inner and inner[0] in parts and part not in ON_TOP:
            assert inner[0] in BELOW[part] | {part}, f"{place}, but `{part}` may import {BELOW[part] or 'no part'}"
        if top in ONLY_IN:
            assert ONLY_IN[top] in str(module), f"{place}, but only {ONLY_IN[top]} may"
        if part not in ("data", "training"):
            assert top not in MADE_FOR_TENSORFLOW, f"{place}, but `{part}` works without TensorFlow"


def test_every_import_is_declared():
    provides = importlib.metadata.packages_distributions() | {"pynvml": ["nvidia-ml-py"]}  # of the other environment
    declared = {canonicalize_name(requirement.name) for requirement in asked_for("cpu", "gpu", "dev")} | {"workbench"}
    benchmarks = ROOT / "tests" / "benchmarks"
    peers = [Requirement(line) for line in (benchmarks / "peers.in").read_text().splitlines() if line[0] != "#"]
    missing = []
    for path in [*MODULES, *(ROOT / "tests").rglob("*.py")]:
        known = declared | {canonicalize_name(peer.name) for peer in peers if path.parent == benchmarks}
        for line, name in imports_of(path):
            top = name.split(".")[0]
            files = (f"{top}.py", f"{top}/__init__.py")
            beside = (folder / file for folder in (path.parent, benchmarks) for file in files)
            if top in sys.stdlib_module_names or any(file.exists() for file in beside):
                continue
            packages = {canonicalize_name(package) for package in provides.get(top, [top])}
            if not packages & known:
                missing.append(f"{name_of(path)}:{line} imports {top}")
    assert not missing, "declare these in pyproject.toml, or in tests/benchmarks/peers.in"


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after this code."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import workbench, workbench.analysis, workbench.data, workbench.training", HEAVY),
        ("from workbench.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass", HEAVY),
        ("import workbench.runs, workbench.doctor, workbench.data.download", HEAVY),
        ("import workbench.data.chestxray14, workbench.data.shards", MADE_FOR_TENSORFLOW),
        ("import workbench.analysis.evaluation, workbench.analysis.plots", MADE_FOR_TENSORFLOW),
        # The notebook's own kernel would take the GPU from the workers.
        ("import workbench.training.cluster", MADE_FOR_TENSORFLOW),
    ],
    ids=["packages", "help", "ground", "data", "analysis", "cluster"],
)
def test_light_imports(code, heavy):
    assert not modules_after(code) & heavy


# The notebooks


@functools.cache
def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def source_of(cell: dict) -> str:
    """The cell's Python, without lines for IPython."""
    lines = "".join(cell["source"]).splitlines()
    return "\n".join("" if re.match(r"\s*[%!]", line) else line for line in lines).strip()


def is_parameters(cell: dict) -> bool:
    return "parameters" in cell["metadata"].get("tags", [])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook_is_committed_without_outputs(notebook):
    for cell in code_cells(notebook):
        assert not cell["outputs"], source_of(cell)
        assert cell["execution_count"] is None, source_of(cell)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook_has_one_cell_of_parameters(notebook):
    (cell,) = filter(is_parameters, code_cells(notebook))
    lines = source_of(cell).splitlines()
    for node in ast.parse("\n".join(lines)).body:
        line = lines[node.lineno - 1]
        assert isinstance(node, ast.Assign | ast.AnnAssign), f"`{line}` is not of the form `name = value  # comment`"
        ast.literal_eval(node.value)
        assert "#" in line, f"`{line}` has no comment"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook_is_short_and_defines_nothing(notebook):
    for cell in code_cells(notebook):
        source = source_of(cell)
        kinds = {type(node) for node in ast.walk(ast.parse(source))}
        assert not kinds & {ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef}, source
        # A list of parameters is as long as it is.
        assert len(source.splitlines()) <= 12 or is_parameters(cell), source
