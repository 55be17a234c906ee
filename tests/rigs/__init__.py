"""A real Slurm and real ssh hosts on one machine, for the tests; see README.md beside this file."""

import os
import shutil


def why_not(*programs: str) -> str:
    """Why a rig of these programs cannot be started here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    return f"{', '.join(missing)} not found: run tests/rigs/install" if missing else ""
