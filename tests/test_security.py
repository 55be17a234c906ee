"""What the README's section on security promises."""

import ast
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import ipyparallel
import keras
import psutil
import pytest

from workbench import WorkbenchError, runs
from workbench.training import cluster, network

ROOT = runs.project_root()
MODULES = sorted((ROOT / "workbench").rglob("*.py"))
# Functions that run what they are given, or read what can.
NEVER = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "yaml.load",
    "yaml.unsafe_load",
}


def calls_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}, node.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_a_user_hands_in_is_run(path):
    for name, words, line in calls_of(path):
        place = f"{path.name}:{line}"
        assert name not in NEVER, f"{place} calls {name}"
        assert words.get("shell", "False") == "False", f"{place} gives text to a shell"
        assert words.get("allow_pickle", "False") == "False", f"{place} reads pickles"
        assert words.get("safe_mode", "True") == "True", f"{place} loads models that may run code"


def test_a_model_that_carries_code_is_refused(tmp_path):
    model = keras.Sequential([keras.Input((32, 32, 1)), keras.layers.Lambda(lambda x: x + 1)])
    model.save(tmp_path / "model.keras")
    with pytest.raises(WorkbenchError) as caught:
        network.read_network(tmp_path / "model.keras", findings=["Edema"], image_size=32)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "model.keras") in str(caught.value)


@pytest.mark.mpi
def test_a_cluster_is_closed_to_the_network_and_to_other_users():
    with cluster.start(2, threads=1, oversubscribe=True) as ranks:
        ranks.run("rank_functions.collectives")
        processes = ranks._cluster._gather()
        ours = {process.pid: process for process in processes}
        # Open MPI's own daemon cannot be kept from listening on all interfaces; the README says so.
        (daemon,) = [process.pid for process in processes if process.name() in ("mpiexec", "prterun")]
        open_to_all = [
            (told.laddr, ours[told.pid].cmdline())
            for told in psutil.net_connections("inet")
            if told.pid in ours.keys() - {daemon}
            and told.status == "LISTEN"
            and told.laddr.ip not in ("127.0.0.1", "::1")
        ]
        assert open_to_all == []
        folder = Path(ranks._cluster._folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        files = list((folder / "security").glob("*.json"))
        assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
        (client,) = [file for file in files if file.name.endswith("-client.json")]
        told = json.loads(client.read_text())
        # With the signing key but without the curve key of the controller, or with another one, nobody connects.
        for key in ("", "x" * 40):
            with pytest.raises((TimeoutError, OSError, ValueError, ipyparallel.error.IPythonError)):
                ipyparallel.Client(told | {"curve_serverkey": key or None}, timeout=3)
        assert len(ranks.run("rank_functions.world")) == 2


@pytest.mark.mpi
def test_no_secret_comes_into_a_run_s_folder(tiny_config, new_run):
    folder, secret = new_run(), f"secret-{os.urandom(8).hex()}"
    os.environ["SOME_TOKEN"] = secret
    try:
        with cluster.start(2, threads=1, oversubscribe=True) as ranks:
            keys = json.loads(next(Path(ranks._cluster._folder, "security").glob("*-client.json")).read_text())
            ranks.run("workbench.training.trainer.train", tiny_config, folder)
    finally:
        del os.environ["SOME_TOKEN"]
    never = [word for word in (secret, keys["key"], keys["curve_serverkey"]) if word]
    assert len(never) >= 2
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [word for word in never if word.encode() in content], path


def test_jupyterlab_is_started_on_loopback_with_its_token():
    (line,) = [line for line in (ROOT / "Makefile").read_text().splitlines() if "jupyter lab" in line]
    assert "--ip" not in line
    assert "token" not in line.lower()
    said = subprocess.run(
        [sys.executable, "-m", "jupyterlab", "--show-config-json"], capture_output=True, text=True, timeout=120
    ).stdout
    assert "0.0.0.0" not in said
