"""What has no Triton kernel of ours, because Inductor makes one that does it all: asserted here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "inductor_without_gpu.py"


def count_kernels(split_reductions: bool) -> dict[str, list[int]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(int(split_reductions))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_each_is_one_kernel() -> None:
    """Norms with residual and quantizer, gates with quantizer, rope, the quantized embedding."""
    found = count_kernels(split_reductions=False)
    assert len(found) == 13
    assert {name: counts for name, counts in found.items() if counts != [1, 1]} == {}


@pytest.mark.slow
def test_wide_rows_take_three_with_inductors_default() -> None:
    """Why CUDA segments need split_reductions=False: 14,336 columns are reduced in two steps."""
    found = count_kernels(split_reductions=True)
    assert {name for name, counts in found.items() if counts != [1, 1]} == {
        "gated_int8",
        "gated_fp8",
    }
