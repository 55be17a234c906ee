"""The benchmark for one GPU: what it can measure where, and how its table reads."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import gpu

SCRIPT = Path(gpu.__file__)


def test_ratios_are_taken_round_by_round_and_what_is_missing_is_said():
    answers = {
        "ours": [{"value": 10.0, "with": "Keras 3"}, {"value": 40.0, "with": "Keras 3"}],
        "keras": [{"value": 5.0, "with": "Keras 3"}, {"value": 10.0, "with": "Keras 3"}],
    }
    head, ours, keras, torch = gpu.table(answers, {"torch": "there is no PyTorch"})
    assert head.split()[0] == "images/s"
    assert ours.split()[-8:] == ["25.0", "[10.0,", "40.0]", "1.00", "[1.00,", "1.00]", "Keras", "3"]
    assert keras.split()[-8:] == ["7.5", "[5.0,", "10.0]", "3.00", "[2.00,", "4.00]", "Keras", "3"]
    assert torch.endswith("not measured: there is no PyTorch")


def test_without_tensorflow_keras_is_measured_on_the_backend_that_is_there(monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if name == "tensorflow" else object())
    commands, missing = gpu._plan(gpu._parse(["--torch", sys.executable]), "mixed_bfloat16")
    assert list(commands) == ["keras", "torch"]
    assert commands["keras"][1].endswith("stock_keras.py")
    assert {name: why.split(" for ")[0] for name, why in missing.items()} == dict.fromkeys(
        ("ours", "xla"), "TensorFlow is not installed"
    )
    assert commands["torch"][-3:] == ["--device", "cuda", "--compile"]


def test_a_machine_without_a_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "_find_gpu", lambda: ("", (0, 0)))
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.startswith("There is no NVIDIA GPU here")


@pytest.mark.parametrize(
    ("said", "found"),
    [("NVIDIA H100 80GB HBM3, 9.0", ("NVIDIA H100 80GB HBM3", (9, 0))), ("", ("", (0, 0)))],
)
def test_the_gpu_is_known_by_name_and_capability(monkeypatch, said, found):
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0 if said else 9, said))
    assert gpu._find_gpu() == found


def test_it_measures_on_a_processor():
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--sides", "ours", "torch", "--torch", "/nowhere"]
    small = ["--size", "32", "--batch", "2", "--rounds", "2", "--steps", "1"]
    done = subprocess.run([*command, *small], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    title, _, ours, torch = done.stdout.splitlines()
    assert title == "processor: DenseNet-121, 32 px, batch 2, float32, 2 rounds of 1 steps"
    assert " 1.00 " in ours
    assert "on tensorflow 2.18.1" in ours
    assert torch.endswith("not measured: there is no /nowhere; name a Python that has PyTorch with --torch")
