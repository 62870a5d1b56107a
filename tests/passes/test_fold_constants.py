from __future__ import annotations

import json

import pytest
import torch

from inlay.passes.fold_constants import fold_constants
from inlay.passes.graph import calls
from inlay.passes.weights import leaves, make_weight
from tests.passes.graphs import DTYPES, export, rewrite, targets

aten = torch.ops.aten


class Scaled(torch.nn.Module):
    """A factor that weights alone make, in float32, rounded at the end."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(7, dtype=dtype))
        self.b = torch.nn.Parameter(torch.randn(7, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = (self.a * self.b).sum(-1, dtype=torch.float32).exp().clamp(max=float("inf"))
        return x * (scale - 0.5).to(x.dtype) + self.b[None, 1]


@DTYPES
def test_calls_on_weights_become_one_weight(dtype: torch.dtype) -> None:
    gm, tensors = export(Scaled(dtype), torch.randn(1, 5, 7, dtype=dtype))
    assert rewrite(gm, tensors, fold_constants) == (1, 0)
    assert "aten.exp.default" not in targets(gm)
    assert len(calls(gm, aten.mul.Tensor)) == len(calls(gm, aten.add.Tensor)) == 1
    ((name, recipe),) = gm.meta["recipes"].items()
    assert leaves(name, gm.meta["recipes"]) == ["a", "b"]
    # The artifact has it as JSON, and makes it anew of other weights.
    recipes = {name: json.loads(json.dumps(recipe))}
    other = {"a": torch.randn(7, dtype=dtype), "b": torch.randn(7, dtype=dtype)}
    made = make_weight(name, recipes, other.__getitem__)
    expected = (other["a"] * other["b"]).sum(-1, dtype=torch.float32).exp() - 0.5
    assert torch.equal(made, expected.to(dtype))
    assert not torch.equal(made, make_weight(name, recipes, tensors.__getitem__))


def test_what_is_shared_is_folded_once() -> None:
    class Two(Scaled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = self.a.exp()
            return x * scale + scale.sin()

    gm, tensors = export(Two(), torch.randn(1, 5, 7))
    assert rewrite(gm, tensors, fold_constants) == (2, 0)
    assert targets(gm) == ["aten.mul.Tensor", "aten.add.Tensor"]


class View(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a.view(1, 7).expand(5, 7)


class Ones(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.ones(7).cumsum(-1) + self.a


class Written(Scaled):
    """What is written into is another value at each step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scratch = self.a.exp()
        scratch[:3] = x[0, 0, :3]
        return x * scratch


class Large(Scaled):
    """Two kilobytes of weights, of which a megabyte and more would be made."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(520))
        self.b = torch.nn.Parameter(torch.randn(520))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[..., :1] * (self.a[:, None] * self.b).sum() + (self.a[:, None] * self.b)[:4].sum()


class Outer(Large):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x[..., :1, None] * (self.a[:, None] * self.b)).sum(-1)


class Random(Scaled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0 * torch.rand_like(self.a)


@pytest.mark.parametrize("module", [View, Ones, Written, Outer, Random])
def test_what_is_left(module: type[torch.nn.Module]) -> None:
    gm, tensors = export(module(), torch.randn(1, 5, 7), dynamic=False)
    before = targets(gm)
    assert rewrite(gm, tensors, fold_constants) == (0, 0)
    assert targets(gm) == before


def test_size_is_that_of_what_stays() -> None:
    """Something large on the way to something small is no reason."""
    gm, tensors = export(Large(), torch.randn(1, 5, 7))
    assert rewrite(gm, tensors, fold_constants) == (2, 0)
    assert not gm.meta["recipes"].keys() & tensors.keys()
