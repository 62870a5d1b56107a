from __future__ import annotations

from typing import Any

import pytest
import torch

from inlay.passes.fuse_add_norm import fuse_add_norm
from inlay.passes.graph import calls
from tests.passes.graphs import DTYPES, export, refusals, rewrite

ops = torch.ops.inlay
rms_norm = ops.rms_norm.default

NORMS: dict[str, tuple[Any, Any]] = {
    "rms": (rms_norm, (1e-5, 1.0, True)),
    "layer": (ops.layer_norm.default, (None, 1e-5, 1.0)),
}
"""kind -> (op, its arguments behind the weight)."""


class Block(torch.nn.Module):
    def __init__(self, kind: str, weight: bool) -> None:
        super().__init__()
        self.norm, self.options = NORMS[kind]
        self.weight = torch.nn.Parameter(torch.randn(11)) if weight else None

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = x + y
        # A reader of the sum before the norm, one after it, and the sum as a residual.
        early = total.sin()
        normed = self.norm(total, self.weight, *self.options)
        return early * normed + total.cos()


@DTYPES
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("weight", [True, False], ids=["scaled", "unscaled"])
def test_the_sum_lives_on(kind: str, weight: bool, dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 1, 5, 11).to(dtype)
    gm, tensors = export(Block(kind, weight).to(dtype), x, y)
    count, error = rewrite(gm, tensors, fuse_add_norm)
    assert (count, error) == (1, 0)
    (fused,) = calls(gm, ops.add_rms_norm.default, ops.add_layer_norm.default)
    assert kind in str(fused.target)
    assert fused.args[3:] == NORMS[kind][1]
    assert not calls(gm, NORMS[kind][0])
    assert len(calls(gm, torch.ops.aten.add.Tensor)) == 1


class Tail(torch.nn.Module):
    """A norm of something like a sum of two alike tensors."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = torch.nn.Parameter(torch.randn(11))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sums = {
            "broadcast": lambda: x + x[:, :1],
            "scaled": lambda: torch.add(x, x.sin(), alpha=2),
            "constant": lambda: x + 1.5,
            "promoted": lambda: x + x.to(torch.bfloat16),
            "product": lambda: x * x.sin(),
        }
        return rms_norm(sums[self.kind](), self.weight, 1e-5)


@pytest.mark.parametrize("kind", ["broadcast", "scaled", "constant", "promoted", "product"])
def test_look_alikes(kind: str) -> None:
    gm, tensors = export(Tail(kind), torch.randn(1, 5, 11))
    count, error = rewrite(gm, tensors, fuse_add_norm)
    assert (count, error) == (0, 0)
    assert kind == "product" or "the sum before the norm" in refusals(gm)


def test_two_norms_of_one_sum() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.randn(11))
            self.b = torch.nn.Parameter(torch.randn(11))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = x + x.sin()
            return rms_norm(total, self.a, 1e-5) * rms_norm(total, self.b, 1e-5)

    gm, tensors = export(Two(), torch.randn(1, 5, 11))
    count, error = rewrite(gm, tensors, fuse_add_norm)
    # The sum is made once; the other norm reads it.
    assert (count, error) == (1, 0)
    assert len(calls(gm, rms_norm)) == 1
