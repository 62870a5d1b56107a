"""Choose each request's next token: vectorised over requests with different parameters.

Parameters live in tensors by slot (a running request's place), and the chosen token is written to
`last_tokens[slot]` on the device, where the next step's input is gathered from.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from inlay.runtime.noise import gumbel, row_keys
from inlay.runtime.sampling_params import SamplingParams

NO_TOKEN = -1
"""Sampled where there is nothing to choose: the logits are NaN, or -inf all of them."""

GREEDY, PLAIN, TRUNCATED = 0, 1, 2
"""How a slot samples: argmax; the whole vocabulary; a top-k / top-p set."""

TOP_P_WIDTH = 256
"""Candidates looked at first where only top_p is given; most sets of language models fit."""

ARGMAX_BLOCK = 256
"""amax is ten times as fast as argmax on a CPU: reduce blocks first, then search one block."""


class Sampler:
    """The sampling state of all slots; `sample` is one step's call."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.device = device
        self.last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._seeds = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._temperature = torch.ones(max_num_seqs, dtype=torch.float32, device=device)
        self._top_k = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._top_p = torch.ones(max_num_seqs, dtype=torch.float64, device=device)
        self._log_min_p = torch.zeros(max_num_seqs, dtype=torch.float32, device=device)
        self._typical_p = torch.ones(max_num_seqs, dtype=torch.float64, device=device)
        # The host decides which path a row takes; a copy here saves waiting for the device.
        self._kind = np.zeros(max_num_seqs, dtype=np.int8)
        self._host_top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self._has_min_p = np.zeros(max_num_seqs, dtype=bool)
        self._is_typical = np.zeros(max_num_seqs, dtype=bool)

    def set_slot(self, slot: int, params: SamplingParams, seed: int) -> None:
        """Take over a new request's parameters; seed is any integer of 64 bits."""
        truncated = params.top_k > 0 or params.top_p < 1
        kind = GREEDY if params.is_greedy else TRUNCATED if truncated else PLAIN
        self._kind[slot] = kind
        self._host_top_k[slot] = max(params.top_k, 0)
        if kind == GREEDY:
            return
        self._seeds[slot] = seed - 2**64 if seed >= 2**63 else seed
        self._temperature[slot] = params.temperature
        self._top_k[slot] = max(params.top_k, 0)
        self._top_p[slot] = params.top_p
        self._has_min_p[slot], self._is_typical[slot] = params.min_p > 0, params.typical_p < 1
        self._log_min_p[slot] = math.log(params.min_p) if params.min_p > 0 else -math.inf
        self._typical_p[slot] = params.typical_p

    def sample(
        self, logits: torch.Tensor, slots: np.ndarray, positions: np.ndarray
    ) -> torch.Tensor:
        """One token per row, also written to last_tokens[slots].

        logits: [>= N, vocab], any float dtype; rows beyond N are padding.
        slots, positions: int64 [N], the row's slot and the position its token will take.
        Returns int64 [N] on the device; -1 where the logits are NaN, or -inf all of them.
        """
        logits = logits[: len(slots)]
        on_device = torch.from_numpy(slots).to(self.device)
        kinds = self._kind[slots]
        if not kinds.any():
            tokens = first_argmax(logits)
        else:
            where = torch.from_numpy(positions).to(self.device)
            tokens = torch.empty(len(slots), dtype=torch.int64, device=self.device)
            for kind in np.unique(kinds):
                rows = np.flatnonzero(kinds == kind)
                index = torch.from_numpy(rows).to(self.device)
                picked = logits if len(rows) == len(slots) else logits[index]
                tokens[index] = self._sample_kind(
                    int(kind), picked, on_device[index], where[index], slots[rows]
                )
        self.last_tokens[on_device] = tokens
        sound = logits.gather(1, tokens[:, None]).squeeze(1).isfinite()
        return torch.where(sound, tokens, NO_TOKEN)

    def _sample_kind(
        self,
        kind: int,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
        host_slots: np.ndarray,
    ) -> torch.Tensor:
        if kind == GREEDY:
            return first_argmax(logits)
        logits = logits.float()
        # Relative to the maximum, low temperatures keep their precision.
        scaled = (logits - logits.amax(-1, keepdim=True)).div_(self._temperature[slots, None])
        keys = row_keys(self._seeds[slots], positions)
        if self._has_min_p[host_slots].any():
            scaled.masked_fill_(scaled < self._log_min_p[slots, None], -torch.inf)
        if self._is_typical[host_slots].any():
            rows = torch.from_numpy(np.flatnonzero(self._is_typical[host_slots])).to(self.device)
            typical = typical_mask(scaled[rows], self._typical_p[slots[rows]])
            scaled[rows] = scaled[rows].masked_fill_(~typical, -torch.inf)
            # top_k and top_p count from the likeliest that is left.
            scaled -= scaled.amax(-1, keepdim=True)
        if kind == PLAIN:
            return sample_plain(scaled, keys)
        top_k = self._host_top_k[host_slots]
        # Room beyond the largest k shows whether tokens tied with the last one were cut off.
        width = max(TOP_P_WIDTH if (top_k == 0).any() else 64, 2 * int(top_k.max()))
        # exp(0) over the sum: the inverse of a sum whose order does not depend on the batch.
        total = 1 / scaled.softmax(-1).amax(-1) if (top_k == 0).any() else torch.ones_like(keys)
        return sample_truncated(scaled, keys, self._top_k[slots], self._top_p[slots], total, width)


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
        index = torch.where(x.gather(1, tail) <= x.gather(1, index), index, tail)  # NaN wins
    return index.squeeze(1)


def sample_plain(scaled: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Gumbel-max over the whole vocabulary: float32 [N, V], int64 [N] -> int64 [N]."""
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
    total: torch.Tensor,
    width: int,
) -> torch.Tensor:
    """Gumbel-max over each row's top-k / top-p set.

    scaled: float32 [N, V], logits over temperature, row maximum 0. keys: int64 [N].
    top_k: int64 [N], 0 is off. top_p: float64 [N], 1 is off.
    total: [N], the sum of exp(scaled); read only where top_k is off.
    width: how many of the likeliest tokens to look at; rows whose set may reach further are done
        again with more. Sorting the vocabulary for every row would cost ten times as much.
    Returns int64 [N].
    """
    size = scaled.shape[1]
    width = min(width, size) if scaled.device.type == "cpu" else size
    logits, token_ids = scaled.topk(width, dim=-1)
    keep, complete = top_k_top_p_mask(logits, top_k, top_p, total)
    scores = gumbel(keys, token_ids.to(torch.int32)).add_(logits)
    best = scores.masked_fill_(~keep, -torch.inf).argmax(-1, keepdim=True)
    tokens = token_ids.gather(1, best).squeeze(1)
    if width == size:
        return tokens
    again = (~complete).nonzero().squeeze(1)
    if len(again):
        tokens[again] = sample_truncated(
            scaled[again], keys[again], top_k[again], top_p[again], total[again], width * 16
        )
    return tokens


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
