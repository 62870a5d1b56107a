"""Draw tokens from logits: argmax, the whole vocabulary, top-k / top-p sets. Nothing is sorted.

All draws are Gumbel-max with the counter-based noise of `noise.py`: the token with the largest
logit + noise. On a CPU a race between tokens finds it without finding the whole top-p set: here row
by row in numpy, and with a backend that brings C++ along in `kernels/cpu/sampler.cpp`, which must
choose the same tokens. On other devices a bisection finds the set, in a fixed number of operations,
so that the host need not wait.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from inlay.runtime.noise import gumbel, uniforms


def sample_plain(scaled: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """A token of each row: float32 [N, V], row maximum 0, int64 [N] -> int64 [N]."""
    if scaled.device.type != "cpu":
        return _gumbel_max(scaled, keys)
    pairs = zip(scaled.numpy(), keys.tolist(), strict=True)
    return torch.tensor([race(row, np.exp(row), key) for row, key in pairs])


def _gumbel_max(scaled: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    token_ids = torch.arange(scaled.shape[1], dtype=torch.int32, device=scaled.device)
    return gumbel(keys, token_ids).add_(scaled).argmax(-1)


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
    """All of a row's sampling on a CPU: float32 [V] -> the token, and the largest logit."""
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


def _draw_truncated(row: np.ndarray, key: int, top_k: int, top_p: float) -> int:
    """One row of sample_truncated."""
    logits, token_ids = row, None
    if top_k > 0:
        top_k = min(top_k, len(row))
        token_ids = np.flatnonzero(row >= np.partition(row, -top_k)[-top_k])
        logits = row[token_ids]
    weights = np.exp(logits)
    allowed = top_p * float(weights.sum(dtype=np.float64))
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
        return bool(weights[logits > logits[index]].sum(dtype=np.float64) < allowed)

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
