from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from inlay.passes.attention_mask import NotExpressible, ScoreForm, check_same_form, recover

HEADS = 3
MANY = 300
"""Tokens: beyond 256, where bfloat16 no longer holds every position."""
SCALE = 0.125
INF = float("inf")

Added = Callable[[Tensor, Tensor], Tensor]
"""Query positions [T, 1] and key positions [1, T] to what is added, [T, T] or [heads, T, T]."""


def positions(num_tokens: int) -> tuple[Tensor, Tensor]:
    where = torch.arange(num_tokens)
    return where[:, None], where[None, :]


def form(added: Added, scores: Callable[[Tensor], Tensor] = lambda p: p * SCALE) -> ScoreForm:
    def function(num_tokens: int, products: Tensor) -> Tensor:
        bias = added(*positions(num_tokens)).double()
        return (scores(products) + bias).expand(HEADS, num_tokens, num_tokens)

    zero = torch.zeros((), dtype=torch.float64)
    return recover(lambda products: function(4, products), function(MANY, zero))


def hide(visible: Tensor, value: float = -INF) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, value)


def causal(q: Tensor, k: Tensor) -> Tensor:
    return hide(q >= k)


def everything(q: Tensor, k: Tensor) -> Tensor:
    return hide(q + k >= 0)


def window(size: int) -> Added:
    return lambda q, k: hide((q >= k) & (q - k < size))


def chunked(size: int) -> Added:
    return lambda q, k: hide((q >= k) & (q // size == k // size))


VISIBLE: dict[str, tuple[Added, tuple[int, bool, int]]] = {
    "causal": (causal, (0, True, 0)),
    "bidirectional": (everything, (0, False, 0)),
    "window of 1": (window(1), (1, True, 0)),
    "window of 7": (window(7), (7, True, 0)),
    "window of 8": (window(8), (8, True, 0)),
    "window on both sides": (lambda q, k: hide((q - k).abs() < 5), (5, False, 0)),
    "chunks of 7": (chunked(7), (0, True, 7)),
    "chunks on both sides": (lambda q, k: hide(q // 5 == k // 5), (0, False, 5)),
    "a window as long as all": (window(MANY), (0, True, 0)),
    "the least float32": (
        lambda q, k: hide(q >= k, torch.finfo(torch.float32).min),
        (0, True, 0),
    ),
    "the least float16": (
        lambda q, k: hide(q >= k, torch.finfo(torch.float16).min),
        (0, True, 0),
    ),
}


@pytest.mark.parametrize("name", VISIBLE)
def test_what_is_seen(name: str) -> None:
    added, expected = VISIBLE[name]
    found = form(added)
    assert (found.window, found.causal, found.chunk) == expected
    assert (found.scale, found.softcap, found.slopes) == (pytest.approx(SCALE), 0.0, None)


def test_forms_that_differ_by_one_are_told_apart() -> None:
    assert form(window(7)) != form(window(8))
    assert form(chunked(7)) != form(chunked(8))
    # A window of 7 as somebody may write it by mistake: the query does not count.
    assert form(lambda q, k: hide((q >= k) & (q - k <= 7))).window == 8


@pytest.mark.parametrize("scale", [1.0, 0.125, 24**-0.5, 3.0])
@pytest.mark.parametrize("softcap", [0.0, 0.5, 30.0, 50.0])
def test_scale_and_softcap(scale: float, softcap: float) -> None:
    def scores(products: Tensor) -> Tensor:
        return softcap * torch.tanh(products * scale / softcap) if softcap else products * scale

    found = form(causal, scores)
    # The scale is a difference quotient in float64.
    assert found.scale == pytest.approx(scale, rel=1e-5)
    assert found.softcap == pytest.approx(softcap)


SLOPES = torch.tensor([0.5, 0.0625, 2**-8.5])


def relative(q: Tensor, k: Tensor) -> Tensor:
    return SLOPES[:, None, None].double() * (k - q) + causal(q, k)


def absolute(q: Tensor, k: Tensor) -> Tensor:
    """BLOOM: the same up to a constant for each query, which softmax does not see."""
    return SLOPES[:, None, None].double() * k + causal(q, k)


def in_float32(q: Tensor, k: Tensor) -> Tensor:
    return SLOPES[:, None, None] * k.float() + causal(q, k)


def from_the_end(q: Tensor, k: Tensor) -> Tensor:
    """MPT: positions are counted back from the last key."""
    return SLOPES[:, None, None] * (k - k.max()).float() + causal(q, k)


def in_bfloat16(q: Tensor, k: Tensor) -> Tensor:
    """Falcon: slope * key position, rounded to bfloat16."""
    return (SLOPES.bfloat16()[:, None, None] * k).double() + causal(q, k)


@pytest.mark.parametrize("added", [relative, absolute, in_float32, from_the_end])
def test_alibi(added: Added) -> None:
    found = form(added)
    assert found.slopes == pytest.approx(SLOPES.tolist(), rel=1e-5)
    assert (found.slopes_dtype, found.causal, found.window) == (torch.float32, True, 0)


def test_alibi_in_bfloat16_is_another_function() -> None:
    found = form(in_bfloat16)
    assert found.slopes == SLOPES.bfloat16().tolist()
    assert found.slopes_dtype == torch.bfloat16
    # Where every product is exact, up to 256 tokens and for powers of two, both are the same.
    exact = form(lambda q, k: torch.full((HEADS, 1, 1), 0.5) * (k - q) + causal(q, k))
    assert exact.slopes_dtype == torch.float32
    rounded = in_bfloat16(*positions(MANY))[0, -1]
    assert not torch.equal(rounded, in_float32(*positions(MANY))[0, -1].double())


def of_heads(*added: Added) -> Added:
    return lambda q, k: torch.stack([one(q, k) for one in added])


def rounded_distance(q: Tensor, k: Tensor) -> Tensor:
    return (SLOPES.bfloat16()[:, None, None] * (k - q)).double() + causal(q, k)


def t5(q: Tensor, k: Tensor) -> Tensor:
    """One bias for distances in buckets that grow with the distance."""
    return (q - k).clamp(min=1).log2().floor() * 0.3 + causal(q, k)


def prefix(q: Tensor, k: Tensor) -> Tensor:
    return hide((q >= k) | (k < 5))


def blocks(q: Tensor, k: Tensor) -> Tensor:
    """A query sees its own block and the one before, as sparse attention has it."""
    return hide((q >= k) & (q // 16 - k // 16 <= 1))


MASKS_REFUSED: dict[str, tuple[Added, str]] = {
    "heads": (of_heads(causal, causal, window(7)), "heads have different masks"),
    "T5": (t5, "not linear in the distance"),
    "slope of the square": (lambda q, k: -0.01 * (q - k) ** 2 + causal(q, k), "not linear"),
    "distances in bfloat16": (rounded_distance, "not linear"),
    "slope on both sides": (lambda q, k: -0.1 * (q - k).abs(), "not linear in the distance"),
    "blocks": (blocks, "not causal, bidirectional, a window or chunks"),
    "a prefix": (prefix, "not causal, bidirectional, a window or chunks"),
    "a sink and a window": (
        lambda q, k: hide((q >= k) & ((q - k < 7) | (k < 1))),
        "not causal, bidirectional, a window or chunks",
    ),
    "holes": (lambda q, k: hide((q >= k) & ((q - k) % 2 == 0)), "not causal, bidirectional"),
}


@pytest.mark.parametrize("name", MASKS_REFUSED)
def test_masks_that_are_refused(name: str) -> None:
    added, reason = MASKS_REFUSED[name]
    with pytest.raises(NotExpressible, match=reason):
        form(added)


def by_head(products: Tensor) -> Tensor:
    return products * torch.tensor([0.5, 0.5, 0.4])[:, None, None]


def by_position(products: Tensor) -> Tensor:
    return products * (1 + torch.arange(4.0).log1p())[:, None]


def shifted(products: Tensor) -> Tensor:
    return products.roll(1, -1) if products.dim() else products


SCORES_REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nonlinear": (lambda p: p + 0.01 * p**2, "not one multiple of q k"),
    "relu": (torch.relu, "not one multiple of q k"),
    "clamped": (lambda p: p.clamp(-5, 5), "not one multiple of q k"),
    "soft-cap of another kind": (lambda p: 5 * torch.atan(p / 5), "not one multiple of q k"),
    "negative": (lambda p: -SCALE * p, "the scale -0.12"),
    "none": (lambda p: 0 * p, "the scale 0"),
    "of heads": (by_head, "not one multiple of q k"),
    "of positions": (by_position, "not one multiple of q k"),
    "of other keys": (shifted, "not one multiple of q k"),
}


@pytest.mark.parametrize("name", SCORES_REFUSED)
def test_scores_that_are_refused(name: str) -> None:
    scores, reason = SCORES_REFUSED[name]

    def small(products: Tensor) -> Tensor:
        return (scores(products) + causal(*positions(4)).double()).expand(HEADS, 4, 4)

    bias = causal(*positions(MANY)).double().expand(HEADS, MANY, MANY)
    with pytest.raises(NotExpressible, match=reason):
        recover(small, bias)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_buffer_that_goes_on_as_it_began(hidden: bool) -> None:
    def buffer(added: Added) -> Any:
        visible = added(*positions(64)) == 0
        return ~visible if hidden else visible

    for added in (causal, window(7), chunked(7)):
        check_same_form(buffer(added), 32)
    check_same_form(buffer(window(40)), 64)
    with pytest.raises(NotExpressible, match="the mask changes beyond 32 tokens"):
        check_same_form(buffer(window(40)), 32)
