"""Peak memory of loading and compiling, in processes of their own: one copy of the weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import torch

from inlay.bench.load_memory import LIMIT, measure, save_wide

NEEDS_PREAD = pytest.mark.skipif(
    tuple(map(int, safetensors.__version__.split(".")[:2])) < (0, 8),
    reason="safetensors before 0.8 can only map files",
)


def ratio(phase: str, stored: torch.dtype, to: str, megabytes: int, folder: Path) -> float:
    big = save_wide(folder / "big", megabytes, stored, shard="100MB")
    tiny = save_wide(folder / "tiny", 0, stored)
    widened = 2 if (stored, to) == (torch.bfloat16, "float32") else 1
    return measure(phase, big, tiny, to, widened)["ratio"]


@pytest.mark.slow
def test_loading_in_the_stored_dtype_holds_one_copy(tmp_path: Path) -> None:
    assert 0.9 < ratio("load", torch.bfloat16, "bfloat16", 400, tmp_path) < LIMIT


@NEEDS_PREAD
def test_loading_in_a_narrower_dtype_never_holds_both(tmp_path: Path) -> None:
    # Half of the checkpoint, and the few tensors that are being read.
    assert 0.4 < ratio("load", torch.float32, "bfloat16", 400, tmp_path) < 1


@pytest.mark.slow
@NEEDS_PREAD
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("to", ["bfloat16", "float32"])
def test_compiling_holds_one_copy(stored: torch.dtype, to: str, tmp_path: Path) -> None:
    assert ratio("compile", stored, to, 800, tmp_path) < LIMIT
