"""Draw tokens from logits: argmax, the whole vocabulary, top-k / top-p sets. Nothing is sorted.

All draws are Gumbel-max with the counter-based noise of `noise.py`: the token with the largest
logit + noise. On a CPU a race between tokens finds it without finding the whole top-k / top-p set,
mostly between a few that are likeliest by far. On other devices a bisection finds the set, in a
fixed number of operations, so that the host need not wait.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from inlay.runtime.noise import gumbel, uniforms

ARGMAX_BLOCK = 256
"""amax is ten times as fast as argmax on a CPU: reduce blocks first, then search one block."""

BLOCKS, FEW = 32, 256
"""On a CPU tokens are narrowed to those as large as the FEW-th of the maxima of blocks of BLOCKS;
most top-k / top-p sets of language models are among them."""

_NONE = np.zeros(0, dtype=np.int64)


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
    pairs = zip(scaled.numpy(), keys.tolist(), strict=True)
    return torch.tensor([race(row, np.exp(row), key) for row, key in pairs])


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
    rows = zip(scaled.numpy(), keys.tolist(), top_k.tolist(), top_p.tolist(), strict=True)
    return torch.tensor([_draw_truncated(*row) for row in rows])


def draw_row(
    logits: np.ndarray,
    key: int,
    temperature: float,
    top_p: float,
    log_min_p: float,
    typical_p: float,
    top_k: int,
) -> tuple[int, float]:
    """All of a row's sampling on a CPU: float32 [V] -> the token, and the largest logit.

    A row at a time, its numbers stay in the cache; and no thread waits for another, which costs
    milliseconds where other programs use the cores too.
    """
    peak = logits.max()
    if not np.isfinite(peak):
        return 0, float(peak)
    row = logits - peak
    if temperature != 1:
        row /= np.float32(temperature)
    if log_min_p > -math.inf:
        np.copyto(row, -np.inf, where=row < np.float32(log_min_p))
    if typical_p < 1:
        limit = torch.tensor([typical_p], dtype=torch.float64)
        np.copyto(row, -np.inf, where=~typical_mask(torch.from_numpy(row)[None], limit)[0].numpy())
        row -= row.max()
    if top_k == 0 and top_p >= 1:
        return race(row, np.exp(row), key), float(peak)
    return _draw_truncated(row, key, top_k, top_p), float(peak)


def _few_from(row: np.ndarray) -> np.floating:
    """From which logit on there are few tokens, at least FEW; -inf where V is small.

    A block is every (V / BLOCKS)th token, so that maxima are those of BLOCKS stretches.
    """
    size = len(row) // BLOCKS
    if size < 2 * FEW:
        return np.float32(-np.inf)
    maxima = row[: size * BLOCKS].reshape(BLOCKS, size).max(0)
    return np.partition(maxima, size - FEW)[size - FEW]


def _draw_truncated(row: np.ndarray, key: int, top_k: int, top_p: float) -> int:
    """One row of sample_truncated: with few tokens if they hold the whole set, else with all."""
    if top_k > 0:
        few = np.flatnonzero(row >= _few_from(row))
        top_k = min(top_k, len(row))
        logits, token_ids = (row[few], few) if len(few) >= top_k else (row, None)
        inside = np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
        logits = logits[inside]
        weights = np.exp(logits)
        token_ids = inside if token_ids is None else token_ids[inside]
        allowed = top_p * weights.sum(dtype=np.float64)
    else:
        logits, weights, token_ids = row, np.exp(row), None
        allowed = top_p * float(weights.sum())
        # No weight is above 1: a set that weighs more has more tokens.
        few = np.flatnonzero(row >= _few_from(row)) if allowed <= 2 * FEW else _NONE
        if weights[few].sum(dtype=np.float64) >= allowed:
            logits, weights, token_ids = row[few], weights[few], few
    if not allowed > 0:
        return 0  # NaN
    return race(logits, weights, key, token_ids, allowed if top_p < 1 else np.inf)


def race(
    logits: np.ndarray,
    weights: np.ndarray,
    key: int,
    token_ids: np.ndarray | None = None,
    allowed: float = np.inf,
) -> int:
    """The token with the largest logit + Gumbel noise in a top-p set.

    logits: float32 [K], the maximum 0. weights: exp(logits). token_ids: int64 [K]; None is all.
    allowed: a token is in the set if the weights of those likelier than it sum to less.

    Gumbel noise is -log(E), E = -log1p(-v), v uniform: the winner has the least E / weight, which
    is at least v / weight, and hardly more where v is small. So the winner is among the first few
    in that order, and only of those logarithms are taken. Those outside the set are passed over,
    with all that are less likely: about log2(1 / probability of the set) times.
    """
    v = uniforms(key, len(logits) if token_ids is None else token_ids)
    with np.errstate(divide="ignore", over="ignore"):
        times = v / weights

    def is_in(index: int) -> bool:
        if allowed == np.inf:
            return True
        likelier = weights * (logits > logits[index])
        # Summed as `allowed` was: in pairs, whose float32 sums are good to 1e-6.
        return bool(likelier.sum() < allowed)

    first = int(times.argmin())
    while not is_in(first):
        np.putmask(times, logits <= logits[first], np.inf)
        first = int(times.argmin())
    delay = -math.log1p(-float(v[first])) if v[first] < 1 else math.inf
    # A little more, for what float32 rounds.
    close = np.flatnonzero(times <= delay / float(weights[first]) * (1 + 1e-4))
    if len(close) > 1:
        with np.errstate(divide="ignore"):
            noise = -np.log(-np.log1p(-v[close].astype(np.float64)))
        order = np.argsort(-(logits[close].astype(np.float64) + noise), kind="stable")
        first = next(index for index in close[order].tolist() if is_in(index))
    return first if token_ids is None else int(token_ids[first])


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
