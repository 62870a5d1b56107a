from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule

from inlay.passes.canonicalise import canonicalise
from inlay.passes.graph import calls
from tests.passes.graphs import DTYPES, ROUNDING, capture_toy, export, rewrite, targets

aten = torch.ops.aten


class Nothing(torch.nn.Module):
    """Ops that compute nothing, around one that does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.dropout(x, 0.3, False).to(x.dtype).type_as(x)[:, :, :].contiguous()
        y = y.view(y.shape).expand(y.shape) * 1.0
        y = y.reshape(y.shape[0], y.shape[1], -1) / 1
        return torch.tanh(torch.cat([y, y[..., 6:]], dim=-1))


def test_what_computes_nothing_is_gone() -> None:
    gm, tensors = export(Nothing(), torch.randn(1, 5, 6), canonical=False)
    count, error = rewrite(gm, tensors, canonicalise)
    assert targets(gm) == ["aten.tanh.default"]
    assert count >= 8
    assert error == 0


class Something(torch.nn.Module):
    """Look-alikes that do compute something."""

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        y = torch.dropout(x, 0.3, True) * 1.5
        wide = n * 1.0  # an integer tensor becomes a float one
        narrow = y.to(torch.bfloat16).float()
        return torch.cat([wide + y[:, 1:], narrow[:, :-1].expand(3, -1, -1)[1:2]], dim=-1)


def test_what_computes_something_stays() -> None:
    gm, _ = export(Something(), torch.randn(1, 5, 6), torch.ones(6).long(), canonical=False)
    before = [t for t in targets(gm) if "assert" not in t and "sym_size" not in t]
    canonicalise(gm)
    gm.graph.eliminate_dead_code()
    after = [t for t in targets(gm) if "sym_size" not in t]
    kept = ("dropout", "mul", "to.dtype", "cat", "slice", "expand", "add")
    for op in kept:
        assert sum(op in t for t in after) == sum(op in t for t in before), op


class Reshaping(torch.nn.Module):
    """A view that only works because of a copy, symbolic sizes in shapes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[1]
        heads = x.view(1, tokens, -1, 3).transpose(1, 2).contiguous()
        return heads.view(2, tokens, 3).flatten(0, 1)


def test_symbolic_sizes_die() -> None:
    gm, tensors = export(Reshaping(), torch.randn(1, 5, 6), canonical=False)
    _, error = rewrite(gm, tensors, canonicalise)
    assert not calls(gm, aten.sym_size.int)
    assert set(targets(gm)) == {"aten.reshape.default", "aten.transpose.int"}
    assert calls(gm, aten.reshape.default)[0].args[1] == [1, -1, 2, 3]
    assert error == 0


def test_a_shape_of_two_symbolic_sizes_is_left() -> None:
    class TwoSizes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = x @ x.transpose(1, 2)
            return scores.view(x.shape[1], 1, x.shape[1])

    gm, tensors = export(TwoSizes(), torch.randn(1, 5, 6), canonical=False)
    _, error = rewrite(gm, tensors, canonicalise)
    assert len(calls(gm, aten.sym_size.int)) == 1
    assert error == 0


class Linears(torch.nn.Module):
    """torch's linear with and without bias, and the flattened [K, N] form of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(6, 10)
        self.b = torch.nn.Linear(10, 7, bias=False)
        self.weight = torch.nn.Parameter(torch.randn(7, 9))
        self.bias = torch.nn.Parameter(torch.randn(9))
        self.plain = torch.nn.Parameter(torch.randn(9, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x))
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        x = flat.view((*x.size()[:-1], 9))
        return torch.mm(x[0], self.plain)


@DTYPES
def test_linear_layers_have_one_form(dtype: torch.dtype) -> None:
    gm, tensors = export(Linears().to(dtype), torch.randn(1, 5, 6, dtype=dtype), canonical=False)
    _, error = rewrite(gm, tensors, canonicalise)
    linears = calls(gm, torch.ops.inlay.linear.default)
    assert targets(gm) == ["inlay.linear.default"] * 3 + [
        "aten.select.int",
        "inlay.linear.default",
    ]
    assert [len(n.args) for n in linears] == [3, 2, 3, 2]
    assert gm.meta["recipes"] == {
        "weight.t": {"op": "transpose", "inputs": ["weight"]},
        "plain.t": {"op": "transpose", "inputs": ["plain"]},
    }
    assert linears[2].meta["val"].shape[2] == 9
    assert error <= ROUNDING[dtype]


def test_products_of_activations_are_no_linear_layers() -> None:
    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.randn(6, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            product = torch.mm(x[0], x[0].t())
            bias_of_two_dimensions = torch.addmm(x[0], x[0], self.scale)
            return product @ bias_of_two_dimensions

    gm, tensors = export(Product(), torch.randn(1, 5, 6), canonical=False)
    _, error = rewrite(gm, tensors, canonicalise)
    assert not calls(gm, torch.ops.inlay.linear.default)
    assert error == 0


def test_common_subexpressions() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # The scalars 1 and 1.0 differ; so do two draws of random numbers.
            return (x.cos() + x.cos()) * (x + 1) * (x + 1) + torch.rand_like(x) * torch.rand_like(x)

    gm, _ = export(Twice(), torch.randn(1, 5, 6))
    assert len(calls(gm, aten.cos.default)) == 1
    assert len(calls(gm, aten.rand_like.default)) == 2
    assert len([n for n in calls(gm, aten.add.Tensor) if n.args[1] == 1]) == 1


def test_scalars_of_different_types_are_not_merged() -> None:
    class Scalars(torch.nn.Module):
        def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            return x * ((n + 1).sum() / (n + 1.0).mean())

    gm, tensors = export(Scalars(), torch.randn(1, 5, 6), torch.arange(3), canonical=False)
    _, error = rewrite(gm, tensors, canonicalise)
    assert len(calls(gm, aten.add.Tensor)) == 2
    assert error == 0


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_it_finds_nothing_the_second_time(name: str) -> None:
    gm: GraphModule
    gm, tensors = capture_toy(name, torch.float32)
    first, error = rewrite(gm, tensors, canonicalise)
    second, _ = rewrite(gm, tensors, canonicalise)
    assert first > 40
    assert second == 0
    assert error <= ROUNDING[torch.float32]


class Writes(torch.nn.Module):
    """Two equal buffers, filled unlike; and a copy of what is written into later."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.new_empty(x.shape), x.new_empty(x.shape)
        first.copy_(x)
        second.copy_(2 * x)
        kept = first.clone()
        first.mul_(3.0)
        return first + 5 * second + 7 * kept


def test_what_is_written_into_is_neither_merged_nor_uncopied() -> None:
    x = torch.randn(1, 6, 3)
    gm, tensors = export(Writes(), x, canonical=False)
    _, error = rewrite(gm, tensors, canonicalise)
    assert error == 0
    assert len(calls(gm, torch.ops.aten.new_empty.default)) == 2
