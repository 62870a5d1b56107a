"""Attention that models write out, in graphs of modules of our own.

x0 [1, T, width] is what the model computed, x1 [1, T] the positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from inlay.passes.check import Check, relative_rms
from inlay.passes.fuse_attention import fuse_attention
from inlay.passes.graph import bind, calls
from inlay.passes.weights import make_weight
from tests.passes.graphs import LENGTHS, ROUNDING, export, refusals, targets

ATTENTION = torch.ops.inlay.attention.default
HEADS, SIZE, NUM_TOKENS = 4, 6, sum(LENGTHS)
SCALE = SIZE**-0.5


class Attention(nn.Module):
    """Projections around what the subclasses compute: q [1, 4, T, 6], k and v of kv_heads."""

    kv_heads = HEADS
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        sizes = [HEADS * SIZE, self.kv_heads * SIZE, self.kv_heads * SIZE]
        self.qkv = nn.ModuleList(nn.Linear(16, size, bias=False) for size in sizes)
        self.out = nn.Linear(HEADS * SIZE, 16, bias=False)
        self.register_buffer("tril", torch.ones(80, 80, dtype=torch.bool).tril())
        self.register_buffer("band", torch.ones(80, 80, dtype=torch.bool).tril().triu(-4))
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 2**-4.5]))

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        parts = [layer(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for layer in self.qkv]
        out = self.attend(*parts, position_ids, x)
        return self.out(out.transpose(1, 2).reshape(1, x.shape[1], HEADS * SIZE))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError


Attend = Callable[..., Tensor]


def module(attend: Attend, kv_heads: int = HEADS) -> Attention:
    """A module with this attend(self, q, k, v, positions, x)."""
    kind = type("Own", (Attention,), {"attend": attend, "kv_heads": kv_heads})
    torch.manual_seed(0)
    return kind().eval()


def captured(
    model: nn.Module, dtype: torch.dtype = torch.float32, max_num_tokens: int = 64
) -> tuple[GraphModule, dict[str, Tensor]]:
    x = torch.randn(1, NUM_TOKENS, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    gm, tensors = export(model.to(dtype), x, torch.arange(NUM_TOKENS)[None])
    places = {n.meta.get("input"): n for n in gm.graph.find_nodes(op="placeholder")}
    places["x1"].meta["input"] = "position_ids"
    tensors["position_ids"] = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    gm.meta |= {"constants": tensors.__getitem__}
    gm.meta |= {"max_num_tokens": max_num_tokens, "max_seq_len": max_num_tokens}
    return gm, tensors


def fuse(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], float]:
    """The op's arguments, and the error of three packed requests against each of them alone."""
    gm, tensors = captured(model, dtype)
    with torch.no_grad():
        rows = tensors["x0"].split(LENGTHS, 1)
        alone = [model(row, torch.arange(row.shape[1])[None]) for row in rows]
    before = Check(tensors.__getitem__, 0.0).run(gm)
    assert relative_rms(torch.cat(alone, 1), before) > 0.05, "these numbers would show nothing"
    assert fuse_attention(gm) == 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    assert not any("softmax" in target or "scaled_dot" in target for target in targets(gm))
    for name in gm.meta["recipes"]:
        tensors[name] = make_weight(name, gm.meta["recipes"], tensors.__getitem__)
    after = Check(tensors.__getitem__, 0.0).run(gm)
    (call,) = calls(gm, ATTENTION)
    arguments = bind(call)
    facts = {k: arguments[k] for k in ("scale", "window", "softcap", "causal", "chunk")}
    facts["kv_heads"] = int(arguments["k"].meta["val"].shape[1])
    facts["dtype"] = arguments["k"].meta["val"].dtype
    slopes = arguments["slopes"]
    facts["slopes"] = None if slopes is None else tensors[slopes.meta["weight"]].tolist()
    return facts, relative_rms(torch.cat(alone, 1), after)


def repeat_kv(k: Tensor) -> Tensor:
    groups = HEADS // k.shape[1]
    return k[:, :, None].expand(1, k.shape[1], groups, -1, SIZE).reshape(1, HEADS, -1, SIZE)


def sdpa(**options: Any) -> Attend:
    return lambda self, q, k, v, *_: F.scaled_dot_product_attention(q, k, v, **options)


def masked_sdpa(mask: Callable[[Any, int], Tensor]) -> Attend:
    return lambda self, q, k, v, *_: F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask(self, q.shape[-2])
    )


def repeated(repeat: Callable[[Tensor], Tensor]) -> Attend:
    return lambda self, q, k, v, *_: F.scaled_dot_product_attention(
        q, repeat(k), repeat(v), is_causal=True
    )


def float_mask(self: Any, size: int) -> Tensor:
    return torch.zeros(size, size).masked_fill(~self.tril[:size, :size], -math.inf)


def eager(
    scores: Callable[[Any, Tensor], Tensor],
    hidden: float = torch.finfo(torch.float32).min,
    mask: str = "tril",
) -> Attend:
    """matmul, what `scores` makes of the products, a mask from a buffer, softmax, matmul."""

    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        products = scores(self, q @ k.transpose(-1, -2))
        visible = getattr(self, mask)[: q.shape[-2], : q.shape[-2]]
        return products.masked_fill(~visible, hidden).softmax(-1) @ v

    return attend


def scaled(self: Any, products: Tensor) -> Tensor:
    return products * SCALE


def with_alibi(self: Any, products: Tensor) -> Tensor:
    where = torch.arange(products.shape[-1])
    return products * SCALE + self.slopes[:, None, None] * (where[None, :] - where[:, None])


def with_bmm(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    products = torch.bmm(q[0] * SCALE, k[0].transpose(1, 2))
    visible = self.band[: q.shape[-2], : q.shape[-2]]
    weights = products.masked_fill(~visible, -math.inf).softmax(-1)
    return torch.bmm(weights, v[0])[None]


def with_baddbmm(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """BLOOM: slope * key position is what the product is added to, by beta and alpha."""
    where = torch.arange(q.shape[-2])
    bias = (self.slopes[:, None, None] * where).expand(HEADS, 1, -1)
    products = torch.baddbmm(bias, q[0], k[0].transpose(1, 2), beta=0.5, alpha=2 * SCALE)
    visible = self.tril[: q.shape[-2], : q.shape[-2]]
    weights = products.view(1, HEADS, *products.shape[1:]).masked_fill(~visible, -1e9).softmax(-1)
    return torch.bmm(weights.view(HEADS, *products.shape[1:]), v[0])[None]


def multi_query(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    products = torch.matmul(q, k.transpose(-1, -2)) * SCALE  # [1, 4, T, 6] x [1, 1, 6, T]
    visible = self.tril[: q.shape[-2], : q.shape[-2]]
    return torch.matmul(products.masked_fill(~visible, -1e9).softmax(-1), v)


def masks_of_positions(self: Any, q: Tensor, k: Tensor, v: Tensor, where: Tensor, *_: Any) -> Any:
    distance = where[:, :, None] - where[:, None, :]
    mask = ((distance >= 0) & (distance < 3))[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def seen_keys(self: Any, size: int) -> Tensor:
    """A padding mask: the same for each query."""
    return torch.ones(1, 1, 1, size, dtype=torch.bool)


FORMS: dict[str, tuple[Attention, dict[str, Any]]] = {
    "sdpa": (module(sdpa(is_causal=True)), {}),
    "sdpa, scale": (module(sdpa(is_causal=True, scale=0.7)), {"scale": 0.7}),
    "sdpa, both ways": (module(sdpa()), {"causal": False}),
    "sdpa, mask": (module(masked_sdpa(lambda self, n: self.tril[:n, :n])), {}),
    "sdpa, window": (module(masked_sdpa(lambda self, n: self.band[:n, :n])), {"window": 5}),
    "sdpa, float mask": (module(masked_sdpa(float_mask)), {}),
    "sdpa, mask of keys": (module(masked_sdpa(seen_keys)), {"causal": False}),
    "sdpa, mask of positions": (module(masks_of_positions), {"window": 3}),
    "repeat_kv": (module(repeated(repeat_kv), 2), {"kv_heads": 2}),
    "repeat_interleave": (
        module(repeated(lambda k: k.repeat_interleave(2, dim=1)), 2),
        {"kv_heads": 2},
    ),
    "enable_gqa": (module(sdpa(is_causal=True, enable_gqa=True), 2), {"kv_heads": 2}),
    # Keys repeated in another order (0 1 0 1) are no group of neighbours: they stay as they are.
    "tiled heads": (module(repeated(lambda k: k.repeat(1, 2, 1, 1)), 2), {"kv_heads": 4}),
    "multi-query": (module(multi_query, 1), {"kv_heads": 1}),
    "eager": (module(eager(scaled)), {}),
    "eager, window": (module(eager(scaled, -math.inf, "band")), {"window": 5}),
    "eager, soft-cap": (
        module(eager(lambda self, p: torch.tanh(p * SCALE / 2.0) * 2.0)),
        {"softcap": 2.0},
    ),
    "eager, ALiBi": (module(eager(with_alibi)), {"slopes": [0.5, 0.25, 0.125, 2**-4.5]}),
    "bmm": (module(with_bmm), {"window": 5, "scale": 1.0}),
    "baddbmm": (
        module(with_baddbmm),
        {"scale": 2 * SCALE, "slopes": [0.25, 0.125, 0.0625, 2**-5.5]},
    ),
}
USUAL = {"scale": SCALE, "window": 0, "softcap": 0.0, "causal": True, "chunk": 0, "slopes": None}
USUAL |= {"kv_heads": HEADS, "dtype": torch.float32}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name: str) -> None:
    model, differences = FORMS[name]
    facts, error = fuse(model)
    expected = {**USUAL, **differences}
    slopes, ours = expected.pop("slopes"), facts.pop("slopes")
    assert (ours is None) is (slopes is None)
    assert slopes is None or ours == pytest.approx(slopes, rel=1e-5)
    assert facts.pop("scale") == pytest.approx(expected.pop("scale"), rel=1e-5)
    assert facts.pop("softcap") == pytest.approx(expected.pop("softcap"))
    assert facts == expected
    assert error <= ROUNDING[torch.float32]


def widened(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """GPT-J: scores and weights in float32."""
    products = q.float() @ k.float().transpose(-1, -2) * SCALE
    visible = self.tril[: q.shape[-2], : q.shape[-2]]
    return products.masked_fill(~visible, -1e9).softmax(-1).to(v.dtype) @ v


def all_widened(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).to(self.out.weight.dtype)


@pytest.mark.parametrize("attend", [widened, all_widened])
def test_scores_in_float32_leave_the_cache_narrow(attend: Attend) -> None:
    facts, error = fuse(module(attend), torch.bfloat16)
    assert facts["dtype"] == torch.bfloat16
    assert facts["scale"] == pytest.approx(SCALE)
    assert error <= ROUNDING[torch.bfloat16]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = module(eager(scaled))
        self.second = module(eager(with_alibi))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.second(self.first(x, positions), positions)


def test_two_layers_are_two_calls() -> None:
    gm, _ = captured(Two())
    assert fuse_attention(gm) == 2
    first, second = (bind(node) for node in calls(gm, ATTENTION))
    assert (first["layer"], second["layer"]) == (0, 1)
    assert first["slopes"] is None
    assert second["slopes"].meta["weight"] == "alibi_slopes.1"


def mask_of_activations(self: Any, q: Tensor, k: Tensor, v: Tensor, where: Any, x: Tensor) -> Any:
    mask = (self.qkv[0](x)[..., 0] > 0)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def mask_of_tokens(self: Any, q: Tensor, k: Tensor, v: Tensor, where: Any, x: Tensor) -> Any:
    mask = (x[..., 0] > -100)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def two_uses(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    visible = self.tril[: q.shape[-2], : q.shape[-2]]
    weights = (q @ k.transpose(-1, -2)).masked_fill(~visible, -1e9).softmax(-1)
    return weights @ v + weights.mean(-1, keepdim=True)


def two_products(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    visible = self.tril[: q.shape[-2], : q.shape[-2]]
    scores = q @ k.transpose(-1, -2) + v @ k.transpose(-1, -2)
    return scores.masked_fill(~visible, -1e9).softmax(-1) @ v


def dropout(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    visible = self.tril[: q.shape[-2], : q.shape[-2]]
    weights = (q @ k.transpose(-1, -2)).masked_fill(~visible, -1e9).softmax(-1)
    return F.dropout(weights, 0.1, training=True) @ v


def normalised_again(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return (weights * 2) @ v


def other_length(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :, 1:], v[:, :, 1:])


def other_length_eager(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return (q @ k[:, :, 1:].transpose(-1, -2)).softmax(-1) @ v[:, :, 1:]


def memory(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """Cross-attention over something of a fixed length."""
    fixed = self.tril[:HEADS, : 5 * SIZE].float().view(1, HEADS, 5, SIZE)
    return F.scaled_dot_product_attention(q, fixed, fixed)


def over_queries(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-2) @ v


def with_a_sink(self: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    sink = self.slopes.view(1, HEADS, 1, 1).expand(1, HEADS, q.shape[-2], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


def scale_of_heads(self: Any, products: Tensor) -> Tensor:
    return products * self.slopes[:, None, None]


def per_query(self: Any, products: Tensor) -> Tensor:
    return products * torch.arange(1, products.shape[-1] + 1).log1p()[:, None]


REFUSED: dict[str, tuple[Attend, str]] = {
    "mask of activations": (mask_of_activations, "depends on activations"),
    "mask of the tokens": (mask_of_tokens, "depends on the tokens themselves"),
    "weights used twice": (two_uses, "the weights have 2 uses, not one"),
    "two products": (two_products, "the softmax is of 2 products"),
    "dropout": (dropout, "the weights go through aten.dropout.default before the values"),
    "dropout in SDPA": (sdpa(dropout_p=0.1), "drops out"),
    "weights scaled": (normalised_again, "go through aten.mul.Tensor before the values"),
    "another length": (other_length, "not a head's row of tokens each"),
    "another length, eager": (other_length_eager, "the softmax is over dimension"),
    "a memory": (memory, "not a head's row of tokens each"),
    "over the queries": (over_queries, "the softmax is over dimension -2"),
    "a sink": (with_a_sink, "the softmax is over dimension"),
    "a scale a head": (eager(scale_of_heads), "for all heads and tokens"),
    "a scale a query": (eager(per_query), "for all heads and tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_why(name: str) -> None:
    attend, reason = REFUSED[name]
    gm, _ = captured(module(attend))
    before = targets(gm)
    assert fuse_attention(gm) == 0
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    assert targets(gm) == before
    assert reason in refusals(gm)
    assert not gm.meta["recipes"]


class Router(nn.Module):
    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return x * x.softmax(-1) + positions[..., None]


def test_a_softmax_that_is_not_over_tokens_is_no_attention() -> None:
    gm, _ = captured(Router())
    assert fuse_attention(gm) == 0
    assert refusals(gm) == ""


def in_numbers(self: Any, size: int) -> Tensor:
    where = torch.arange(size)
    distance = where[:, None] - where[None, :]
    return (distance >= 0) & (distance < 5)


@pytest.mark.parametrize("mask", [in_numbers, lambda self, n: self.band[:n, :n]])
def test_a_window_that_is_longer_than_what_is_tried_is_refused(
    mask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = module(masked_sdpa(mask))
    monkeypatch.setattr("inlay.passes.fuse_attention.MAX_TOKENS", 6)
    assert fuse_attention(captured(model)[0]) == 1
    monkeypatch.setattr("inlay.passes.fuse_attention.MAX_TOKENS", 4)
    gm, _ = captured(model)
    assert fuse_attention(gm) == 0
    assert "tokens are the most that can be tried" in (told := refusals(gm)) or "beyond 4" in told
