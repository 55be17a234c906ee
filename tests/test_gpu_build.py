"""The environment for GPUs is really made: Horovod compiled with NCCL, and kept apart from the CPU build.

    make test ARGS="-m gpubuild"

Downloads 2.3 GB when nothing is cached, and takes 4.3 GB and three to four minutes on two idle cores: only when asked
for.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from workbench import machine

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / ".venv-gpu" / "bin" / "python"
BUILT = "import horovod.tensorflow as h; print(h.nccl_built(), h.cuda_built(), h.mpi_built())"
AVERAGE = """
import horovod.tensorflow as hvd, tensorflow as tf
hvd.init()
print("averaged", float(hvd.allreduce(tf.constant(1.0 + hvd.rank()), op=hvd.Average)), flush=True)
"""
FOUND = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin")

pytestmark = [
    pytest.mark.gpubuild,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not FOUND, reason="there is no nvcc here, which Horovod's GPU part is compiled with"),
]


def run(*command, **settings) -> str:
    surroundings = os.environ | machine.MPI_ENVIRONMENT | settings
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=surroundings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def environment(request) -> Path:
    if "gpubuild" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes and gigabytes: make test ARGS='-m gpubuild'")
    run("make", "setup-gpu")
    return PYTHON


def test_horovod_is_built_with_nccl(environment):
    nccl, cuda, mpi = run(environment, "-c", BUILT).split()[-3:]
    assert int(nccl) > 20000
    assert (cuda, mpi) == ("True", "True")


def test_the_cpu_environment_keeps_the_cpu_build(environment):
    run("make", ".venv/.ready")
    assert run(ROOT / ".venv" / "bin" / "python", "-c", BUILT).split()[-3:] == ["0", "False", "True"]


def test_two_ranks_average(environment):
    mpiexec = [environment.with_name("mpiexec"), "--oversubscribe", "-n", "2"]
    assert run(*mpiexec, environment, "-c", AVERAGE).count("averaged 1.5") == 2
