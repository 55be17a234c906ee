"""What only a GPU can show. On a machine without one the same bodies run on the processor where they can."""

import subprocess
import sys
import time
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from workbench.training import cluster, distributed, fast, network, trainer
from workbench.training.config import TrainConfig, precision_for

GPUS = len(list(cluster.DRIVER.iterdir())) if cluster.DRIVER.is_dir() else 0


def needs_gpus(number: int):
    return [pytest.mark.gpu, pytest.mark.skipif(number > GPUS, reason=f"needs {number} GPU(s), and here are {GPUS}")]


# A test with this parameter runs on the processor everywhere, and once more where there is a GPU.
DEVICES = [pytest.param("CPU", id="cpu"), pytest.param("GPU", id="gpu", marks=needs_gpus(1))]


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    labels = (rng.random((8, 14)) < 0.3).astype(np.float32)
    return rng.integers(0, 256, (8, 64, 64, 1), np.uint8), labels


def capability_of(device: str) -> tuple[int, int]:
    if device == "CPU":
        return (0, 0)
    return tf.config.experimental.get_device_details(tf.config.get_visible_devices("GPU")[0])["compute_capability"]


@pytest.mark.parametrize("device", DEVICES)
def test_automatic_precision_is_that_of_the_device(device):
    if device == "CPU" and GPUS:
        pytest.skip("this machine has a GPU, by which it goes")
    distributed.start()
    assert distributed.settle_precision("auto") == precision_for(capability_of(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_step_in_every_precision_lowers_the_loss(device, precision, images):
    here = distributed.start()
    with tf.device(f"/{device}:0"):
        config = TrainConfig("", weights="none", network="Tiny", image_size=64, precision=precision)
        model, optimizer = trainer._build(config, 14, here)
        step = trainer.build_train_step(model, optimizer)
        losses = [float(step(*map(tf.constant, images))) for _ in range(8)]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert device in model.trainable_variables[0].value.device


@pytest.mark.parametrize("device", DEVICES)
def test_the_fast_way_is_the_stock_network_on_the_device(device, images):
    distributed.start()
    # A GPU's float32 convolutions may use TF32, which has ten bits of mantissa.
    atol = 1e-4 if device == "CPU" else 5e-3
    with tf.device(f"/{device}:0"):
        keras.utils.set_random_seed(0)
        model = network.build_network("DenseNet121", findings=14, image_size=64, weights=None)
        fused = fast.forward(model, compiled=device == "CPU")
        radiographs = tf.constant(images[0])
        np.testing.assert_allclose(fused(radiographs), model(radiographs), rtol=0, atol=atol)


@pytest.mark.mpi
@pytest.mark.parametrize("size", [pytest.param(n, marks=needs_gpus(n) if n > 1 else []) for n in (1, 2)])
def test_every_rank_has_a_gpu_of_its_own_that_grows(size):
    with cluster.start(size) as ranks:
        told = ranks.run("rank_functions.gpu_of_rank")
    for rank in told:
        expected = rank["all"][rank["local_rank"] : rank["local_rank"] + 1]
        assert rank["mine"] == expected
        assert rank["growth"] == [True] * len(expected)


@pytest.mark.mpi
@pytest.mark.parametrize("compression", ["none", "fp16"])
@pytest.mark.parametrize(
    ("device", "size"), [pytest.param("CPU", 2, id="cpu"), pytest.param("GPU", 2, id="gpu", marks=needs_gpus(2))]
)
def test_ranks_average_on_the_device(ranks, device, size, compression):
    for rank in ranks(size).run("rank_functions.average_on", device, compression):
        np.testing.assert_allclose(rank["averaged"], (size + 1) / 2, rtol=1e-3)
        assert device in rank["device"]
        # NCCL, not MPI by way of the processors.
        assert rank["nccl"] > 0 or device == "CPU"


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
def test_a_process_takes_the_memory_that_it_comes_to_need():
    distributed.start()
    tf.random.normal((1000, 1000)).numpy()
    command = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    used, total = map(float, told.splitlines()[0].split(","))
    # Without growth TensorFlow takes nearly all of the card at once.
    assert used < 0.5 * total


@pytest.mark.gpu
@pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
def test_the_use_of_a_gpu_is_that_of_the_one_that_computes():
    distributed.start()
    numbers = tf.random.normal((4000, 4000))
    multiply = tf.function(lambda x: tf.while_loop(lambda i, _: i < 500, lambda i, y: (i + 1, x @ y / 4000), (0, x))[1])
    deadline, seen = time.monotonic() + 5, 0.0
    while time.monotonic() < deadline:
        multiply(numbers).numpy()
        seen = max(seen, distributed.measure_gpu()["gpu_use"])
    assert 0.5 < seen <= 1


@pytest.mark.parametrize(
    ("visible", "number", "asked"),
    [(None, 1, 1), ("", 0, 0), ("3,5", 1, 5), ("GPU-12ab, GPU-34cd", 1, "GPU-34cd"), ("3", 1, None)],
)
def test_a_gpu_is_asked_for_by_the_number_that_the_driver_gives_it(visible, number, asked, monkeypatch):
    """Against a stand-in for NVIDIA's library, which is there where a driver is."""
    library = types.ModuleType("pynvml")
    library.NVMLError = RuntimeError
    library.nvmlInit = lambda: None
    library.nvmlDeviceGetHandleByIndex = library.nvmlDeviceGetHandleByUUID = lambda name: name
    rates, told = types.SimpleNamespace(gpu=40), []
    library.nvmlDeviceGetUtilizationRates = lambda handle: (told.append(handle), rates)[1]
    monkeypatch.setitem(sys.modules, "pynvml", library)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    distributed._gpu_handle.cache_clear()
    assert distributed._gpu_use(number) == (None if asked is None else 0.4)
    assert told == ([] if asked is None else [asked])
    distributed._gpu_handle.cache_clear()


@pytest.mark.skipif(GPUS > 0, reason="here is a GPU")
def test_without_a_driver_the_use_of_a_gpu_is_not_known():
    assert distributed._gpu_use(0) is None
