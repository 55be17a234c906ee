"""Measures training steps on ONE GPU: ours, ours with XLA, stock Keras and PyTorch, side by side and in turns.

    make bench-gpu TORCH=/path/to/python        # in the workbench's environment; a Python that has PyTorch
    python tests/benchmarks/gpu.py --batch 128 --precision mixed_float16
    python tests/benchmarks/gpu.py --device cpu --size 64 --batch 4 --rounds 2 --steps 2     # to see that it works

DenseNet-121 with 14 outputs and Adam, on images in memory, the same size, batch and precision for all. Ours is the
step that the trainer runs; Keras is stock layers and `train_on_batch`; PyTorch is channels last, automatic mixed
precision and `torch.compile`. All sides are loaded and warmed up first, so a GPU has to hold all of them: take a
smaller `--batch` where it cannot. Of the rates and of the ratios, one per round, the median is told with the smallest
and largest. What cannot be measured is said, and why; where TensorFlow is missing Keras runs on the backend that is
there.

Needs no package but those that are measured, so that it runs wherever there is a GPU.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from party import Party

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from workbench.training.config import PRECISIONS, precision_for  # noqa: E402

SAYS = {
    "ours": "the workbench's step",
    "xla": "the workbench's step, xla = true",
    "keras": "stock layers, train_on_batch",
    "torch": "channels last, AMP, compiled",
}


def main(arguments: list[str]) -> int:
    """Measure and print the table; 0 if at least one side was measured."""
    asked = _parse(arguments)
    gpu, capability = ("processor", (0, 0)) if asked.device == "cpu" else _find_gpu()
    if not gpu:
        print(
            "There is no NVIDIA GPU here (`nvidia-smi` finds none): say `--device cpu` to try the script.",
            file=sys.stderr,
        )
        return 2
    precision = asked.precision if asked.precision != "auto" else precision_for(capability)
    shown = f" (compute capability {capability[0]}.{capability[1]})" if any(capability) else ""
    print(
        f"{gpu}{shown}: DenseNet-121, {asked.size} px, batch {asked.batch}, {precision}, "
        f"{asked.rounds} rounds of {asked.steps} steps",
        flush=True,
    )
    # Whoever ends this process ends the sides with it, which stand still between their turns.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    commands, missing = _plan(asked, precision)
    parties, answers = {}, {}
    try:
        for name, command in commands.items():
            try:
                parties[name] = Party(name, [command], environment=_surroundings(asked))
            except SystemExit as error:
                missing[name] = " ".join(str(error).strip().splitlines()[-1:])[:200]
        answers = {name: [] for name in parties}
        for _ in range(asked.rounds):
            for name, party in parties.items():
                answers[name].append(party.measure()[0])
    finally:
        for party in parties.values():
            party.close()
    for line in table(answers, missing):
        print(line)
    if asked.json:
        record = {"device": gpu, "precision": precision, "asked": vars(asked), "answers": answers, "missing": missing}
        Path(asked.json).write_text(json.dumps(record, indent=1))
    return 0 if answers else 1


def table(answers: dict[str, list[dict]], missing: dict[str, str]) -> list[str]:
    """The lines: of each side its rate, and how many times as fast the first side was, round by round."""
    lines = [f"{'':44}{'images/s':>10}{'[least, most]':>20}{'ours / it':>11}{'[least, most]':>16}"]
    base = next(iter(answers), None)
    for name in SAYS:
        if name in answers:
            rates = [answer["value"] for answer in answers[name]]
            ratios = [a["value"] / b for a, b in zip(answers[base], rates, strict=True)]
            says = f"{SAYS[name]}"
            shown = f"{says:44}{statistics.median(rates):10.1f}{f'[{min(rates):.1f}, {max(rates):.1f}]':>20}"
            if base == "ours":
                shown += f"{statistics.median(ratios):11.2f}{f'[{min(ratios):.2f}, {max(ratios):.2f}]':>16}"
            lines.append(f"{shown}   {answers[name][-1]['with']}")
        elif name in missing:
            lines.append(f"{SAYS[name]:44}not measured: {missing[name]}")
    return lines


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training steps on one GPU, side by side.")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    for name, default in (("size", 224), ("batch", 64), ("rounds", 5), ("steps", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto")
    parser.add_argument("--sides", nargs="+", choices=tuple(SAYS), default=list(SAYS))
    parser.add_argument("--torch", default=os.environ.get("TORCH", ""), help="a Python that has PyTorch")
    parser.add_argument(
        "--eager", action="store_true", help="PyTorch without torch.compile, which takes minutes on CPUs"
    )
    parser.add_argument("--json", default="", help="a file for all answers")
    return parser.parse_args(arguments)


def _find_gpu() -> tuple[str, tuple[int, int]]:
    """Name and compute capability of the first GPU; ("", (0, 0)) without one. A framework would take memory to tell."""
    if shutil.which("nvidia-smi") is None:
        return "", (0, 0)
    command = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    name, _, capability = (done.stdout.splitlines() or [""])[0].rpartition(",")
    if done.returncode or not name:
        return "", (0, 0)
    return name, tuple(int(part) for part in capability.strip().split("."))


def _plan(asked: argparse.Namespace, precision: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """The command of each side that can run here, and a reason for each that cannot."""
    alike = ["--size", asked.size, "--batch", asked.batch, "--steps", asked.steps, "--precision", precision]
    ours = [sys.executable, HERE / "keras_steps.py", *alike, "--threads", len(os.sched_getaffinity(0))]
    commands, missing = {}, {}
    if find_spec("tensorflow"):
        commands = {"ours": ours, "xla": [*ours, "--xla"], "keras": [*ours, "--of", "keras"]}
    else:
        missing = dict.fromkeys(("ours", "xla"), f"TensorFlow is not installed for {sys.executable}")
        if find_spec("keras"):
            commands["keras"] = [sys.executable, HERE / "stock_keras.py", *alike]
        else:
            missing["keras"] = f"Keras is not installed for {sys.executable}"
    python = asked.torch or (sys.executable if find_spec("torch") else ROOT / ".peers" / "bin" / "python")
    if Path(python).exists():
        device = "cuda" if asked.device == "gpu" else "cpu"
        threads = ["--threads", len(os.sched_getaffinity(0))]
        commands["torch"] = [python, HERE / "torch_steps.py", *alike, *threads, "--device", device]
        commands["torch"] += [] if asked.eager else ["--compile"]
    else:
        missing["torch"] = f"there is no {python}; name a Python that has PyTorch with --torch"
    chosen = {name: [str(part) for part in commands[name]] for name in SAYS if name in commands and name in asked.sides}
    return chosen, {name: why for name, why in missing.items() if name in asked.sides}


def _surroundings(asked: argparse.Namespace) -> dict[str, str]:
    # One GPU, the first; or none that anybody sees.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    return {
        "CUDA_VISIBLE_DEVICES": first if asked.device == "gpu" else "-1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
