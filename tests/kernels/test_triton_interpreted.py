"""Runs the files interpreted_*.py, each in a process in which Triton interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")

# Its interpreter takes int() of arrays of one dimension, which numpy 2.4 refuses.
OLD = triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0"
pytestmark = pytest.mark.skipif(OLD, reason="Triton 3.6 interprets with numpy < 2.4 only")

HERE = Path(__file__).parent


FILES = ("products", "experts", "sampling")


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name: str) -> None:
    run(name, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_the_rest_in_the_interpreter(name: str) -> None:
    run(name, "slow")


def run(name: str, which: str) -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "--durations=5", "-m", which]
    done = subprocess.run(
        [*command, str(HERE / f"interpreted_{name}.py")],
        cwd=HERE.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
