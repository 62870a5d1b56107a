"""Gives the quantized ops and the experts of `passes/` their CUDA implementations."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

OPS = {
    "int8_linear": "linear",
    "fp8_linear": "linear",
    "weight_only_linear": "linear",
    "experts": "experts",
    "quantized_experts": "experts",
}
"""Op of `inlay::` -> the module here that has the function of its name.

Norms, rope, gates, quantizers and the quantized embedding are not among them: Inductor makes one
Triton kernel of each with what surrounds it (asserted in tests/kernels/test_left_to_inductor.py),
as long as it is told `split_reductions=False`: else it takes rows of more than 8,192 in two steps,
with three kernels for a gate and its quantizer. Two remain of a norm and a quantizer by groups.
"""


@functools.cache
def register_cuda_kernels() -> None:
    """Once per process; Triton is imported when the first of these ops runs on a GPU."""
    for name, module in OPS.items():
        torch.library.register_kernel(f"inlay::{name}", "cuda", _on_demand(module, name))


def _on_demand(module: str, name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        found = importlib.import_module(f"inlay.backends.kernels.triton.{module}")
        return getattr(found, name)(*args, **kwargs)

    return call
