"""Fixtures that several test modules share: a small data set, its shards, and clusters of real MPI ranks."""

import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from rigs import hosts, slurm, why_not
from xdist.scheduler import LoadScopeScheduling

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["COLUMNS"] = "120"  # lines are folded alike, wherever the tests run
# The workers import the functions that tests run on them from here.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

from workbench import runs
from workbench.data import chestxray14, shards, synthetic
from workbench.training import cluster
from workbench.training.config import TrainConfig


def pytest_configure():
    """A shell makes what it starts in the background deaf to Ctrl-C, which some tests send."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class ByModule(LoadScopeScheduling):
    """Hands the tests of a module to one process, and so all those that use a rig, of which a host takes one."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.split("::")[0]
        return "rigs" if Path(path).name in ("test_doctor.py", "test_remote.py", "test_rigs.py") else path


def pytest_xdist_make_scheduler(config, log):
    # Not --dist=loadgroup: pytest-xdist 3.8.0 does not come to know the groups under pytest 9.2.
    return ByModule(config, log)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """A made-up data set of about 130 images, in NIH's layout."""
    return synthetic.write_synthetic(
        tmp_path_factory.mktemp("data") / "made-up", patients=32, image_size=48, seed=3, progress=False
    )


@pytest.fixture(scope="session")
def shard_folder(dataset, tmp_path_factory) -> Path:
    """Its shards at 36 px, of 16 images: numbers that no number of ranks divides."""
    folder = tmp_path_factory.mktemp("shards") / "made-up"
    frame = chestxray14.read_dataset(dataset, validation_fraction=0.25)
    shards.write_shards(frame, folder, image_size=36, images_per_shard=16, processes=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def tiny_config(shard_folder) -> TrainConfig:
    """A configuration that trains in a second or two."""
    return TrainConfig(
        shard_folder=str(shard_folder), network="Tiny", weights="none", image_size=32, batch_size=4, epochs=2
    )


@pytest.fixture
def new_run(tmp_path):
    """A function that makes a run's folder of a given name."""
    return lambda name="trial": runs.create_run(tmp_path, name)


@pytest.fixture(scope="module")
def ranks():
    """A function from a number of ranks to a running cluster of them, each started once for a test module.

    Not once a session: Horovod's idle ranks poll, and five of them take more than a core from the other tests.
    """
    with ExitStack() as stack:
        running = {}

        def of_size(size: int) -> cluster.Workers:
            if size not in running:
                running[size] = stack.enter_context(cluster.start(size, threads=1, oversubscribe=True, timeout=120))
            return running[size]

        yield of_size


@pytest.fixture(scope="session")
def slurm_rig():
    """A real Slurm with the nodes n1 and n2 on this host; a test that fails or drains one resumes it."""
    if reason := why_not(*slurm.PROGRAMS):
        pytest.skip(reason)
    with slurm.running() as rig:
        yield rig


@pytest.fixture(scope="session")
def ssh_rig():
    """Two real ssh hosts, node1 and node2, in namespaces of this one; a test that stops one starts it again."""
    if reason := why_not(*hosts.PROGRAMS):
        pytest.skip(reason)
    with hosts.running() as rig:
        yield rig
