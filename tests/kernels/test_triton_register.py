"""CUDA implementations of the ops of `passes/`: there once asked for, and only then is Triton."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

from inlay.backends.kernels.triton.register import OPS
from inlay.passes.ops import REFERENCES

SCRIPT = """
import sys, torch, inlay.passes.ops
from inlay.backends.kernels.triton.register import OPS, register_cuda_kernels
has = lambda name: torch._C._dispatch_has_kernel_for_dispatch_key(f"inlay::{name}", "CUDA")
assert not any(map(has, OPS))
register_cuda_kernels()
register_cuda_kernels()
assert all(map(has, OPS)) and not has("rms_norm")
assert "triton" not in sys.modules
x, weight, scale = torch.ones(2, 4), torch.ones(3, 4, dtype=torch.int8), torch.ones(1, 3)
assert torch.ops.inlay.weight_only_linear(x, weight, scale, None, None).tolist() == [[4.0] * 3] * 2
"""


def test_registering() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["int8_linear", "fp8_linear", "weight_only_linear"])
def test_arguments_are_the_references(name: str) -> None:
    pytest.importorskip("triton")
    from inlay.backends.kernels.triton import linear

    reference = REFERENCES[getattr(torch.ops.inlay, name).default]
    ours = inspect.signature(getattr(linear, name)).parameters
    assert list(ours) == list(inspect.signature(reference).parameters)
    assert OPS[name] == "linear"
