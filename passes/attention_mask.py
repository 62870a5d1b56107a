"""What a plain graph adds to attention scores, recovered as arguments of `inlay.attention`.

Everything between the product of queries and keys and the softmax (scales, soft-caps, masks,
position biases) is taken as a function of the product and evaluated on numbers, for one request
of many tokens. What comes out is compared with each form that the op can express, at every
position; what is none of them is refused. No pattern of ops has to be known for this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN = -30_000.0
"""Scores below this are masked: -inf, or the smallest number of a dtype (float16: -65,504). Biases
of ALiBi do not reach it within the tokens that are tried."""

EXACT = 1e-5
"""Relative deviation allowed between a form and the numbers: those of float32 constants."""

ScoreFunction = Callable[[Tensor], Tensor]
"""Products [heads, T, T] or one number for all -> what the softmax is given, float64."""


class NotExpressible(Exception):  # noqa: N818  (control flow, always caught by the pass)
    """The scores have no form that `inlay.attention` knows; the message says why."""


@dataclass(frozen=True)
class ScoreForm:
    """Arguments of `inlay.attention`; slopes [heads] or None, in which dtype see there."""

    scale: float
    window: int
    softcap: float
    causal: bool
    chunk: int
    slopes: list[float] | None
    slopes_dtype: torch.dtype = torch.float32


def recover(small: ScoreFunction, bias: Tensor) -> ScoreForm:
    """The form of the scores.

    small: the function for a few tokens, to find scale and soft-cap. bias [heads, T, T]: its
    values for a product of zero and many tokens.

    Raises NotExpressible.
    """
    scale, softcap = _scale_and_softcap(small)
    visible = bias > HIDDEN
    if not (visible == visible[:1]).all():
        raise NotExpressible("heads have different masks")
    window, causal, chunk = visible_form(visible[0])
    slopes, dtype = _slopes(bias, visible[0])
    return ScoreForm(scale, window, softcap, causal, chunk, slopes, dtype)


def _scale_and_softcap(scores: ScoreFunction) -> tuple[float, float]:
    def at(product: float) -> float:
        """The first token's score of itself, which no mask hides."""
        return float(scores(torch.tensor(product, dtype=torch.float64))[0, 0, 0])

    base, step = at(0.0), 1e-5
    scale = (at(step) - at(-step)) / (2 * step)
    limit = at(1e9) - base
    softcap = 0.0 if abs(limit - 1e9 * scale) <= EXACT * abs(limit) else limit
    biases = scores(torch.tensor(0.0, dtype=torch.float64))
    various = torch.randn(biases.shape, generator=torch.Generator().manual_seed(0)).double()
    numbers = [torch.tensor(p, dtype=torch.float64) for p in (-40.0, -3.0, 0.5, 7.0, 200.0)]
    for products in (*numbers, 3 * various):
        linear = scale * products
        expected = softcap * torch.tanh(linear / softcap) if softcap else linear
        wrong = (scores(products) - biases - expected).abs() > EXACT * expected.abs().clamp(1.0)
        if wrong[biases > HIDDEN].any():
            raise NotExpressible(
                "scores are not one multiple of q k, soft-capped by tanh or not, for all heads "
                "and tokens"
            )
    if scale <= 0:
        raise NotExpressible(f"scores have the scale {scale}")
    return scale, softcap


def check_same_form(mask: Tensor, num_tokens: int) -> None:
    """Raises NotExpressible where a mask [N, N] in a buffer, True where a token is seen or hidden,
    is of another form than its part for few tokens."""
    if mask.shape[0] <= num_tokens or mask.shape[0] != mask.shape[1]:
        return
    seen = mask if mask[0, 0] else ~mask
    if visible_form(seen) != visible_form(seen[:num_tokens, :num_tokens]):
        raise NotExpressible(f"the mask changes beyond {num_tokens} tokens")


def visible_form(visible: Tensor) -> tuple[int, bool, int]:
    """Window, causality and chunk that give exactly this mask [T, T]; True is seen."""
    size = visible.shape[0]
    where = torch.arange(size)
    distance = where[:, None] - where[None, :]
    causal = not bool((visible & (distance < 0)).any())
    order = distance >= 0 if causal else torch.ones_like(visible)
    if torch.equal(visible, order):
        return 0, causal, 0
    window = int(distance[visible].abs().max()) + 1 if visible.any() else 0
    if torch.equal(visible, order & (distance.abs() < window)):
        return window, causal, 0
    chunk = int((~visible[:, 0]).int().argmax())  # the first query that does not see token 0
    if chunk and torch.equal(visible, order & (where[:, None] // chunk == where[None, :] // chunk)):
        return 0, causal, chunk
    raise NotExpressible("the mask is not causal, bidirectional, a window or chunks")


def _slopes(bias: Tensor, visible: Tensor) -> tuple[list[float] | None, torch.dtype]:
    """ALiBi: what is added to the scores a query sees falls by one slope a token of distance."""
    where = torch.arange(bias.shape[1], dtype=bias.dtype)
    distance = where[:, None] - where[None, :]
    relative = (bias - bias.diagonal(dim1=1, dim2=2)[..., None]).masked_fill(~visible, 0.0)
    if not relative.any():
        return None, torch.float32
    # The farthest that is seen, where rounding of the model's own numbers weighs least.
    row, column = divmod(int(distance.masked_fill(~visible, -1.0).argmax()), bias.shape[2])
    slopes = -relative[:, row, column] / distance[row, column]
    expected = (-slopes[:, None, None] * distance).masked_fill(~visible, 0.0)
    if torch.allclose(relative, expected, rtol=EXACT, atol=EXACT * float(relative.abs().max())):
        return slopes.tolist(), torch.float32
    # Falcon: products of slope and key position, rounded to bfloat16.
    added = (bias - bias[:, -1:, :1]).masked_fill(~visible, 0.0)
    narrow = (bias[:, -1, 1] - bias[:, -1, 0]).to(torch.bfloat16)
    rounded = (narrow[:, None] * where.long()).double()[:, None].expand_as(added)
    if torch.equal(added, rounded.masked_fill(~visible, 0.0)):
        return narrow.tolist(), torch.bfloat16
    raise NotExpressible("what is added to the scores is not linear in the distance (ALiBi)")
