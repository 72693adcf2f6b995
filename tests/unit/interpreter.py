"""Triton kernels on the CPU: Triton decides on import whether it interprets, so such tests have their own process."""

import os
import re
import subprocess
import sys

import pytest


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="is what started this process")


def run_in_interpreter(file: str, tests: int) -> None:
    """Run the `interpreted` tests of a file, of which there are at least `tests`, in a process that interprets."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0 and passed and int(passed[1]) >= tests, run.stdout + run.stderr
