from __future__ import annotations

import pytest
import torch

from inlay.passes.canonicalise import canonicalise
from inlay.passes.fuse_gemms import fuse_gemms, fused_name
from inlay.passes.graph import calls
from inlay.passes.weights import leaves, make_weight, rows_of
from tests.passes.graphs import DTYPES, ROUNDING, capture_toy, export, refusals, rewrite

LINEAR = torch.ops.inlay.linear.default


class Attention(torch.nn.Module):
    """Three projections of unequal widths; biases as the flags say; an output projection."""

    def __init__(self, biases: tuple[bool, bool, bool]) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(10, 12, bias=biases[0])
        self.k_proj = torch.nn.Linear(10, 6, bias=biases[1])
        self.v_proj = torch.nn.Linear(10, 7, bias=biases[2])
        self.o_proj = torch.nn.Linear(7, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        mix = q.view(1, -1, 2, 6).sum(2) * k
        return self.o_proj(mix.sum(-1, keepdim=True) * v)


class Model(torch.nn.Module):
    def __init__(self, biases: tuple[bool, bool, bool]) -> None:
        super().__init__()
        self.attn = Attention(biases)
        self.head = torch.nn.Linear(9, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attn(x.sin()))


@DTYPES
@pytest.mark.parametrize("biases", [(False,) * 3, (True,) * 3, (True, False, True)], ids=str)
def test_projections_of_one_input(biases: tuple[bool, bool, bool], dtype: torch.dtype) -> None:
    gm, tensors = export(Model(biases).to(dtype), torch.randn(1, 5, 10, dtype=dtype))
    count, error = rewrite(gm, tensors, fuse_gemms)
    assert count == 1
    assert error <= ROUNDING[dtype]
    fused = calls(gm, LINEAR)[0]
    assert fused.args[1].meta["weight"] == "attn.q_proj+k_proj+v_proj.weight"
    parts = [f"attn.{name}_proj.weight" for name in "qkv"]
    recipes = gm.meta["recipes"]
    assert recipes["attn.q_proj+k_proj+v_proj.weight"] == {
        "op": "cat",
        "inputs": parts,
        "dim": 0,
        "sizes": [12, 6, 7],
    }
    assert len(calls(gm, LINEAR)) == 3
    assert (len(fused.args) == 3) is any(biases)
    if biases == (True, False, True):
        assert fused.args[2].meta["weight"] == "attn.q_proj+k_proj+v_proj.bias"
        assert recipes["attn.k_proj.weight.zeros"]["inputs"] == ["attn.k_proj.weight"]
        assert leaves("attn.q_proj+k_proj+v_proj.bias", recipes) == [
            "attn.q_proj.bias",
            "attn.k_proj.weight",
            "attn.v_proj.bias",
        ]
    # Nothing reads the parts any more.
    held = [n.meta.get("weight") for n in gm.graph.find_nodes(op="placeholder")]
    assert not set(parts) & set(held)


def test_rows_can_be_told_by_the_checkpoints_names() -> None:
    """A low-rank delta for one layer of the checkpoint goes to its rows of the fused weight."""
    gm, tensors = export(Model((True, False, True)), torch.randn(1, 5, 10))
    rewrite(gm, tensors, fuse_gemms)
    recipes, name = gm.meta["recipes"], "attn.q_proj+k_proj+v_proj.weight"
    rows = rows_of(name, recipes)
    assert rows == {
        "attn.q_proj.weight": range(12),
        "attn.k_proj.weight": range(12, 18),
        "attn.v_proj.weight": range(18, 25),
    }
    delta = torch.randn(6, 2) @ torch.randn(2, 10)
    fused = make_weight(name, recipes, tensors.__getitem__).clone()
    where = rows["attn.k_proj.weight"]
    fused[where.start : where.stop] += delta
    changed = {**tensors, "attn.k_proj.weight": tensors["attn.k_proj.weight"] + delta}
    assert torch.equal(fused, make_weight(name, recipes, changed.__getitem__))
    # Zeros stand for the bias that a layer does not have, in its rows.
    assert list(rows_of("attn.q_proj+k_proj+v_proj.bias", recipes).values()) == list(rows.values())
    assert rows_of("attn.o_proj.weight", recipes) == {}


def test_rows_of_transposed_layers() -> None:
    recipes = {
        "a.weight.t": {"op": "transpose", "inputs": ["a.weight"]},
        "a+b.weight.t": {"op": "cat", "inputs": ["a.weight.t", "b.weight.t"], "sizes": [3, 4]},
        "b.weight.t": {"op": "transpose", "inputs": ["b.weight"]},
    }
    assert rows_of("a+b.weight.t", recipes) == {"a.weight": range(3), "b.weight": range(3, 7)}


class Pair(torch.nn.Module):
    """Two layers of one input: by name, in a list, or one of them a router."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        first = Router() if kind == "router" else torch.nn.Linear(10, 4)
        if kind == "list":
            self.layers = torch.nn.ModuleList([first, torch.nn.Linear(10, 4)])
        else:
            self.first, self.second = first, torch.nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = getattr(self, "layers", None) or (self.first, self.second)
        x = x.sin()
        return first(x) * second(x)


class Router(torch.nn.Module):
    """A module that computes more than its product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight).softmax(-1)


@pytest.mark.parametrize(("kind", "count"), [("plain", 1), ("list", 0), ("router", 0)])
def test_siblings_are_plain_layers_of_a_module(kind: str, count: int) -> None:
    gm, tensors = export(Pair(kind), torch.randn(1, 5, 10))
    found, error = rewrite(gm, tensors, fuse_gemms)
    assert found == count
    assert error <= ROUNDING[torch.float32]


class Tied(torch.nn.Module):
    """One matrix used twice, and a head tied to a layer beside another of the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(10, 10, bias=False)
        self.b = torch.nn.Linear(10, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(self.a(x)) + self.b(x))


class DifferentInputs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(10, 10, bias=False)
        self.b = torch.nn.Linear(10, 10, bias=False)
        self.head = torch.nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.a(x) * self.b(x.sin()))


@pytest.mark.parametrize("kind", [Tied, DifferentInputs])
def test_look_alikes(kind: type[torch.nn.Module]) -> None:
    gm, tensors = export(kind(), torch.randn(1, 5, 10))
    assert rewrite(gm, tensors, fuse_gemms) == (0, 0.0)
    assert kind is not Tied or "other users" in refusals(gm)


def test_layers_of_different_modules_stay_apart() -> None:
    class Parallel(torch.nn.Module):
        """Attention and feed-forward layer read the same tensor; they belong to two segments."""

        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention((False,) * 3)
            self.mlp = torch.nn.Sequential(torch.nn.Linear(10, 9), torch.nn.Tanh())
            self.head = torch.nn.Linear(9, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.sin()
            return self.head(self.attn(x) + self.mlp(x))

    gm, tensors = export(Parallel(), torch.randn(1, 5, 10))
    count, error = rewrite(gm, tensors, fuse_gemms)
    assert count == 1
    assert error <= ROUNDING[torch.float32]
    assert len(calls(gm, LINEAR)) == 4


def test_tied_embedding_and_head_stay() -> None:
    gm, tensors = capture_toy("qwen2", torch.float32, tie_word_embeddings=True)
    canonicalise(gm)
    count, _ = rewrite(gm, tensors, fuse_gemms)
    assert count == 4
    head = calls(gm, LINEAR)[-1].args[1]
    assert {user.target for user in head.users} == {LINEAR, torch.ops.aten.embedding.default}


@pytest.mark.parametrize(
    ("names", "fused"),
    [
        (["m.0.attn.q.weight", "m.0.attn.k.weight"], "m.0.attn.q+k.weight"),
        (["m.q.weight.t", "m.k.weight.t"], "m.q+k.weight.t"),
        (["a.q.weight", "b.c.k.weight"], "a.q+b.c.k.weight"),
        (["q", "k"], "q+k"),
    ],
)
def test_fused_name(names: list[str], fused: str) -> None:
    assert fused_name(names) == fused
