"""`workbench run` killed at drawn moments and resumed: does every run end in the same metrics.json?

    python tests/killed_runs.py --runs 10 --seed 1          # half an hour on two cores, a line per run

The command is killed outright (SIGKILL), wherever it is: in a notebook of the data, in training, in the evaluation.
It is resumed by the command that it would have named, until the evaluation is done.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from workbench import runs

RESULTS = ("metrics.json", "predictions-test.csv", "predictions-val.csv", "split.json")


def start(project: Path, log: Path, *arguments: str) -> subprocess.Popen:
    """`workbench run` with these arguments, on a project of its own; what it says goes to a file."""
    command = [sys.executable, "-m", "workbench", "run", *arguments]
    place = os.environ | {"WORKBENCH_ROOT": str(project)}
    with log.open("a") as file:
        return subprocess.Popen(command, env=place, stdout=file, stderr=subprocess.STDOUT)


def stage_of(folder: Path) -> str:
    """The stage that a run has come to, by its record."""
    if not (folder / "run.json").exists():
        return "before its record"
    stages = runs.read_run(folder)["stages"]
    return next((stage for stage, told in stages.items() if told["status"] != "finished"), "the end")


def wait_for_evaluation(running: subprocess.Popen, folder: Path) -> None:
    """Wait until the evaluation is done, and stop there: what comes after changes no metric."""
    while running.poll() is None and stage_of(folder) not in ("05_scaling", "the end"):
        time.sleep(0.5)
    if running.poll() is None:
        running.send_signal(signal.SIGTERM)
        running.wait(timeout=120)


def kill_and_resume(project: Path, name: str, moment: float, settings: list[str]) -> tuple[str, list[int], Path]:
    """One run, killed after `moment` seconds: where that was, the processes that stayed, and its folder."""
    folder, log = project / "results" / name, project / f"{name}.log"
    running = start(project, log, "synthetic", "--name", name, *settings)
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(timeout=moment)
    where = stage_of(folder)
    family = psutil.Process(running.pid).children(recursive=True) if running.poll() is None else []
    running.kill()
    running.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    left = [process.pid for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    if where == "before its record":
        # There is no run yet, so the user begins again.
        shutil.rmtree(folder, ignore_errors=True)
        wait_for_evaluation(start(project, log, "synthetic", "--name", name, *settings), folder)
    elif where != "the end":
        wait_for_evaluation(start(project, log, "--resume", name), folder)
    return where, left, folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `workbench run`")
    options = parser.parse_args()
    settings, generator = [word for setting in options.set for word in ("--set", setting)], random.Random(options.seed)
    wrong = 0
    with tempfile.TemporaryDirectory() as place:
        project = Path(place)
        shutil.copytree(runs.project_root() / "notebooks", project / "notebooks")
        began = time.monotonic()
        undisturbed = project / "results" / "undisturbed"
        wait_for_evaluation(
            start(project, project / "undisturbed.log", "synthetic", "--name", "undisturbed", *settings), undisturbed
        )
        seconds = time.monotonic() - began
        print(f"undisturbed: {seconds:.0f} s, metrics.json {digest(undisturbed / 'metrics.json')}", flush=True)
        for number in range(options.runs):
            moment = generator.uniform(0, seconds)
            # Each begins with nothing: no data set and no shards either.
            shutil.rmtree(project / "data", ignore_errors=True)
            where, left, folder = kill_and_resume(project, f"killed-{number}", moment, settings)
            same = [name for name in RESULTS if digest(folder / name) == digest(undisturbed / name)]
            held = len(same) == len(RESULTS) and not left
            wrong += not held
            told = f"metrics.json {digest(folder / 'metrics.json')}, {len(same)} of {len(RESULTS)} files the same"
            print(f"killed after {moment:.1f} s in {where}, resumed: {told}, {len(left)} processes left", flush=True)
            if not held:
                print((project / f"killed-{number}.log").read_text()[-3000:], flush=True)
    print(f"{options.runs} runs killed, {options.runs - wrong} ended as the undisturbed one")
    return int(wrong > 0)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else "missing"


if __name__ == "__main__":
    sys.exit(main())
