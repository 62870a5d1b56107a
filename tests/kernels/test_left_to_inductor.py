"""What has no Triton kernel of ours, because Inductor makes one that does it all: asserted here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inlay import compile_model
from tests.quantizable import build_quantizable

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "inductor_without_gpu.py"


ONCE = [1, 1]
"""Kernels, launches."""
SEGMENT = {"none": 5, "fp8": 6}
"""Launches of Inductor's kernels between two attention calls of a Llama: two norms with their
additions, a gate, RoPE of queries and of keys; in fp8 with the quantizer behind each that a product
reads, and one for attention's output. Counted with torch 2.13; not with 2.11."""


def count_kernels(split_reductions: bool, *names: str) -> dict[str, list[int]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(int(split_reductions)), *names],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_each_is_one_kernel() -> None:
    names = ("add_norm_fp8", "gated_fp8", "rope", "embedding")
    assert count_kernels(False, *names) == dict.fromkeys(names, ONCE)


@pytest.mark.skipif(torch.__version__ < "2.13", reason="counted with torch 2.13")
@pytest.mark.parametrize("quantization", ["fp8", pytest.param("none", marks=pytest.mark.slow)])
def test_a_layers_segment(quantization: str, tmp_path: Path) -> None:
    model = build_quantizable("llama", torch.bfloat16)
    engine = compile_model(model, "eager", quantization=quantization, verify="capture")
    key = engine.artifact.program.segment_steps[1].segment
    graph = tmp_path / "graph.json"
    graph.write_text(json.dumps(engine.artifact.json(f"segments/{key}/graph.json")))
    (kernels,) = count_kernels(False, str(graph)).values()
    assert kernels[1] == SEGMENT[quantization]


@pytest.mark.slow
def test_all_are_one_kernel() -> None:
    """But groups of a row after a norm of the whole row, which fine-grained FP8 alone has."""
    found = count_kernels(split_reductions=False)
    assert len(found) == 13
    more = {name: counts for name, counts in found.items() if counts != ONCE}
    assert more == {"add_norm_fp8_groups": [2, 2]}


@pytest.mark.slow
def test_wide_rows_take_three_with_inductors_default() -> None:
    """Why CUDA segments need split_reductions=False: 14,336 columns are reduced in two steps."""
    found = count_kernels(True, "gated_int8", "gated_fp8", "add_norm_fp8")
    assert found == {"gated_int8": [3, 3], "gated_fp8": [3, 3], "add_norm_fp8": ONCE}
