"""Builds and loads `kernels.cc`, the compiled operations that `fast` uses on CPUs.

Compiled once per machine kind with g++ (ten seconds), beside this file; `make` does it at set-up, the first training
does it otherwise. Where that cannot be (no compiler, a read-only folder), `load` returns None, and TensorFlow's own
operations do the same, slower.

    python -m workbench.training.kernels        # compile now, and say where
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import tensorflow as tf

SOURCE = Path(__file__).with_name("kernels.cc")
FLAGS = ("-shared", "-fPIC", "-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno")


@cache
def load():
    """The operations as a module of functions, or None where they cannot be had. Compiles them if need be."""
    try:
        return tf.load_op_library(str(build()))
    except (OSError, RuntimeError, tf.errors.OpError) as error:
        print(f"Training goes on without compiled kernels, slower: {error}", file=sys.stderr)
        return None


def build() -> Path:
    """Compile the operations unless that was done on a machine of this kind, and return the library's path.

    Raises:
        RuntimeError: there is no g++, or it failed.
        OSError: the folder cannot be written.
    """
    library = SOURCE.with_name(f"kernels-{_kind()}.so")
    if library.exists():
        return library
    # The ranks of a host all come here at once: the first compiles, the others wait.
    with open(SOURCE) as source:
        fcntl.flock(source, fcntl.LOCK_EX)
        if not library.exists():
            _compile(library)
    return library


def _compile(library: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=library.parent, prefix=".", suffix=".part") as part:
        command = ["g++", *FLAGS, "-o", part.name, str(SOURCE), *tf.sysconfig.get_compile_flags()]
        try:
            done = subprocess.run([*command, *tf.sysconfig.get_link_flags()], capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError("g++ is missing.") from None
        if done.returncode:
            raise RuntimeError(f"g++ failed ({(done.stderr.strip().splitlines() or ['no word'])[-1]}).")
        os.chmod(part.name, 0o755)
        os.link(part.name, library)  # whole or not at all


def _kind() -> str:
    """What a compiled library depends on: source, flags, TensorFlow, and the processor's instructions."""
    instructions = re.search(r"^flags\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    facts = [SOURCE.read_text(), *FLAGS, tf.__version__, instructions[0] if instructions else ""]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


if __name__ == "__main__":
    print(build())
