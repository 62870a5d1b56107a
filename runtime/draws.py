"""Draw tokens from logits: argmax, the whole vocabulary, top-k / top-p sets. Nothing is sorted.

All draws are Gumbel-max with the counter-based noise of `noise.py`: the token with the largest
logit + noise. On a CPU most top-k / top-p sets are among a few likeliest tokens, which are found by
blocks; for wider ones a race over the vocabulary finds the winner without finding the set. On other
devices a bisection finds the set, in a fixed number of operations, so that the host need not wait.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from inlay.runtime.noise import gumbel, uniforms

ARGMAX_BLOCK = 256
"""amax is ten times as fast as argmax on a CPU: reduce blocks first, then search one block."""

WIDTH = 128
"""Likeliest tokens that are looked at first on a CPU; most sets of language models fit."""

BLOCKS = 16
"""A block is every (V / 16)th token: its maximum is an elementwise maximum of 16 stretches."""


def first_argmax(x: torch.Tensor) -> torch.Tensor:
    """The index of each row's maximum, the first of equals: [N, V] -> int64 [N]."""
    size = x.shape[1]
    whole = size // ARGMAX_BLOCK * ARGMAX_BLOCK
    if x.device.type != "cpu" or whole == 0 or not x.is_contiguous():
        return x.argmax(-1)
    block_max = x[:, :whole].unflatten(-1, (-1, ARGMAX_BLOCK)).amax(-1)
    block = block_max.argmax(-1, keepdim=True)
    inside = x.gather(1, block * ARGMAX_BLOCK + torch.arange(ARGMAX_BLOCK))
    index = block * ARGMAX_BLOCK + inside.argmax(-1, keepdim=True)
    if whole < size:
        tail = x[:, whole:].argmax(-1, keepdim=True) + whole
        best = x.gather(1, tail)
        index = torch.where((best > x.gather(1, index)) | best.isnan(), tail, index)
    return index.squeeze(1)


def sample_plain(scaled: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """A token of each row: float32 [N, V], row maximum 0, int64 [N] -> int64 [N]."""
    if scaled.device.type != "cpu":
        return _gumbel_max(scaled, keys)
    pairs = zip(scaled.contiguous().numpy(), keys.tolist(), strict=True)
    return torch.tensor([race(row, key) for row, key in pairs])


def _gumbel_max(scaled: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    token_ids = torch.arange(scaled.shape[1], dtype=torch.int32, device=scaled.device)
    return first_argmax(gumbel(keys, token_ids).add_(scaled))


def typical_mask(scaled: torch.Tensor, typical_p: torch.Tensor) -> torch.Tensor:
    """Whether a token is locally typical: float [N, V], float64 [N] -> bool [N, V].

    Tokens whose information is nearest to the row's entropy, until their probability reaches
    typical_p; equal tokens share one fate. This one sorts: few requests ask for it.
    """
    log_p = scaled.double().log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).nan_to_num(0.0).sum(-1, keepdim=True)
    distance = (-log_p - entropy).abs()
    nearest = distance.sort(-1)
    mass = p.gather(-1, nearest.indices).cumsum(-1)
    last = (mass < typical_p[:, None]).sum(-1, keepdim=True).clamp_max(mass.shape[-1] - 1)
    return distance <= nearest.values.gather(-1, last)


def sample_truncated(
    scaled: torch.Tensor,
    keys: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    *,
    has_top_k: bool = True,
) -> torch.Tensor:
    """A token of each row's top-k / top-p set.

    scaled: float32 [N, V], logits over temperature, row maximum 0. keys: int64 [N].
    top_k: int64 [N], 0 is off. top_p: float64 [N], 1 is off. has_top_k: whether any row has it.
    Returns int64 [N].
    """
    if scaled.device.type != "cpu":
        lowest = lowest_kept(scaled, top_k, top_p, has_top_k=has_top_k)
        return _gumbel_max(scaled.masked_fill(scaled < lowest[:, None], -torch.inf), keys)
    rows = scaled.contiguous().numpy()
    total = np.ones(len(rows))
    for row in np.flatnonzero(top_k.numpy() == 0).tolist():
        total[row] = np.exp(rows[row]).sum(dtype=np.float64)
    # No weight is above 1, so that a set of more than WIDTH is wider than WIDTH for sure.
    hopeful = bool((top_p.numpy() * total <= WIDTH).any())
    tokens = torch.zeros(len(rows), dtype=torch.int64)
    left = range(len(rows))
    if hopeful:
        tokens, complete = _sample_likeliest(scaled, keys, top_k, top_p, torch.from_numpy(total))
        left = (~complete).nonzero().squeeze(1).tolist()
    for row in left:
        tokens[row] = race(rows[row], int(keys[row]), int(top_k[row]), float(top_p[row]))
    return tokens


def _sample_likeliest(
    scaled: torch.Tensor,
    keys: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    total: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens from among the WIDTH likeliest: int64 [N]; and whether those hold the row's set."""
    logits, token_ids = likeliest(scaled, WIDTH)
    keep, complete = top_k_top_p_mask(logits, top_k, top_p, total)
    if logits.shape[1] == scaled.shape[1]:
        complete = torch.ones_like(complete)
    scores = gumbel(keys, token_ids.to(torch.int32)).add_(logits)
    best = scores.masked_fill_(~keep, -torch.inf).argmax(-1, keepdim=True)
    return token_ids.gather(1, best).squeeze(1), complete


def likeliest(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As x.topk(count), float [N, V] -> values and indices [N, count], at a tenth of its cost.

    What is larger than the count-th largest block maximum lies in one of the count blocks with the
    largest maxima. Which of the tokens come that equal the last one is not defined.
    """
    size = x.shape[1] // BLOCKS
    if size < 2 * count:
        values, indices = x.topk(min(count, x.shape[1]), dim=-1)
        return values, indices
    blocks = x[:, : size * BLOCKS].unflatten(1, (BLOCKS, size))
    best = blocks.amax(1).topk(count, dim=-1, sorted=False).indices
    starts = torch.arange(BLOCKS, device=x.device)[:, None] * size
    token_ids = (best[:, None, :] + starts).flatten(1)
    tail = torch.arange(size * BLOCKS, x.shape[1], device=x.device)
    token_ids = torch.cat((token_ids, tail.expand(len(x), -1)), dim=1)
    values, places = x.gather(1, token_ids).topk(count, dim=-1)
    return values, token_ids.gather(1, places)


def race(row: np.ndarray, key: int, top_k: int = 0, top_p: float = 1.0) -> int:
    """The token with the largest logit + Gumbel noise in a row's top-k / top-p set.

    row: float32 [V], the maximum 0. Gumbel noise is -log(E), E = -log1p(-v), v uniform: the winner
    has the least E / exp(logit), which is at least v / exp(logit), and hardly more where it is
    small. So the winner is among the first few in that order, and only of those logarithms are
    taken. Those that are not in the set are passed over, with all that are less likely: about
    log2(1 / probability of the set) times.
    """
    weights = np.exp(row)
    if not weights.sum() > 0:
        return 0  # NaN
    times = uniforms(key, len(row))
    with np.errstate(divide="ignore", over="ignore"):
        np.divide(times, weights, out=times)
    if top_k > 0:
        times[row < np.partition(row, -min(top_k, len(row)))[-min(top_k, len(row))]] = np.inf
        weights[np.isinf(times)] = 0
    is_kept = _membership(row, weights, top_p)
    while not is_kept(row[first := int(times.argmin())]):
        times[row <= row[first]] = np.inf
    score = _exact_score(row, key, np.array([first]))[0]
    # A little more than exp(-score), for what float32 rounds.
    close = np.flatnonzero(times <= np.exp(-score) * (1 + 1e-4))
    scores = _exact_score(row, key, close)
    for token in close[np.argsort(-scores, kind="stable")].tolist():
        if is_kept(row[token]):
            return token
    return first


def _exact_score(row: np.ndarray, key: int, token_ids: np.ndarray) -> np.ndarray:
    v = uniforms(key, token_ids).astype(np.float64)
    with np.errstate(divide="ignore"):
        return row[token_ids].astype(np.float64) - np.log(-np.log1p(-v))


def _membership(
    row: np.ndarray, weights: np.ndarray, top_p: float
) -> Callable[[np.floating], bool]:
    """Whether a token of this logit is in the top-p set: likelier ones hold less than top_p."""
    if top_p >= 1:
        return lambda logit: True
    allowed = top_p * weights.sum(dtype=np.float64)

    def is_kept(logit: np.floating) -> bool:
        return bool((weights * (row > logit)).sum(dtype=np.float64) < allowed)

    return is_kept


def lowest_kept(
    scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, *, has_top_k: bool = True
) -> torch.Tensor:
    """The least logit in each row's top-k / top-p set: float32 [N], without reading anything back.

    Arguments as for sample_truncated. Bisects the bits of the logits, which are ordered as their
    magnitudes are.
    """
    codes = scaled.neg().clamp_min(0).view(torch.int32)
    weights = scaled.double().exp()
    lowest = torch.full_like(codes[:, 0], _INFINITY)
    if has_top_k:
        limit = torch.where(top_k > 0, top_k, scaled.shape[1] + 1)
        lowest = _last_below(codes, torch.ones_like(weights), limit)
        weights = weights.masked_fill(codes > lowest[:, None], 0)
    allowed = top_p * weights.sum(-1)
    nucleus = _last_below(codes, weights, allowed)
    lowest = torch.where(top_p < 1, torch.minimum(lowest, nucleus), lowest)
    return -lowest.view(torch.float32)


_INFINITY = 0x7F800000


def _last_below(codes: torch.Tensor, amounts: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """The largest code of which all smaller ones together have less than limit: int32 [N]."""
    low = torch.zeros_like(codes[:, 0])
    for bit in range(30, -1, -1):
        probe = low + (1 << bit)
        before = (amounts * (codes < probe[:, None])).sum(-1)
        low = torch.where((before < limit) & (probe <= _INFINITY), probe, low)
    return low


def top_k_top_p_mask(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates stay, and for which rows none are missing: bool [N, K] and bool [N].

    logits: [N, K], relative to the row's maximum, sorted from the likeliest down.

    A token stays if fewer than top_k tokens are likelier, and if the tokens likelier than it hold
    less than top_p of the top-k set's probability. Equal tokens share one fate, so the set does
    not depend on how a sort orders them.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    starts_tie = torch.ones_like(logits, dtype=torch.bool)
    starts_tie[:, 1:] = logits[:, 1:] != logits[:, :-1]
    num_likelier = torch.where(starts_tie, columns, 0).cummax(-1).values
    in_top_k = (num_likelier < top_k[:, None]) | (top_k[:, None] == 0)
    # cumsum adds along the row in order: its sums depend neither on the batch nor on the width.
    weights = logits.double().exp()
    mass = weights.cumsum(-1)
    likelier_mass = (mass - weights).gather(1, num_likelier)
    top_k_mass = mass.gather(1, in_top_k.sum(-1, keepdim=True) - 1)
    allowed = top_p[:, None] * torch.where(top_k[:, None] > 0, top_k_mass, total[:, None])
    keep = in_top_k & ((likelier_mass < allowed) | (top_p[:, None] == 1))
    # Beyond a last candidate that stays there may be more. And the mass of a top-k set is only
    # known once a candidate lies outside it.
    reaches_further = torch.where(top_k > 0, in_top_k[:, -1], keep[:, -1])
    return keep, ~reaches_further
