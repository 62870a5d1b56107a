"""Choose each request's next token: vectorised over requests with different parameters.

Parameters live in tensors by slot (a running request's place), and the chosen token is written to
`last_tokens[slot]` on the device, where the next step's input is gathered from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy on the device, on CUDA without waiting for it: from pinned memory, in stream order."""
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class SlotValues:
    """Parameters of M new requests on their way to the device.

    integers: int64 [3, M], slot, seed, top_k. floats: float64 [4, M], in the order of `Sampler`.
    """

    integers: np.ndarray
    floats: np.ndarray


@dataclass(frozen=True)
class DrawGroup:
    """Rows that are sampled alike. typical: which of them have typical_p. width: see
    `sample_truncated`. needs_total: whether any has top_p without top_k."""

    kind: int
    rows: np.ndarray
    has_min_p: bool
    typical: np.ndarray
    width: int
    needs_total: bool


@dataclass(frozen=True)
class Draws:
    """One step's sampling of N rows: their slots, the positions of their tokens, their groups."""

    slots: np.ndarray
    positions: np.ndarray
    groups: tuple[DrawGroup, ...]


class Sampler:
    """The sampling state of all slots.

    `plan` and `plan_slots` use only the host's part of it, the launches only the device's, so that
    a step may be planned while the one before it runs.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self.device = device
        self.last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        # Of the device: seed, top_k; temperature, top_p, log(min_p), typical_p.
        self._integers = torch.zeros(2, max_num_seqs, dtype=torch.int64, device=device)
        self._floats = torch.ones(4, max_num_seqs, dtype=torch.float64, device=device)
        # Of the host, which decides the path that a row takes.
        self._kind = np.zeros(max_num_seqs, dtype=np.int8)
        self._top_k = np.zeros(max_num_seqs, dtype=np.int64)
        self._has_min_p = np.zeros(max_num_seqs, dtype=bool)
        self._is_typical = np.zeros(max_num_seqs, dtype=bool)

    def set_slot(self, slot: int, params: SamplingParams, seed: int) -> None:
        """Take over a new request's parameters; seed is any integer of 64 bits."""
        self.launch_slots(self.plan_slots([(slot, params, seed)]))

    def plan_slots(self, new: Sequence[tuple[int, SamplingParams, int]]) -> SlotValues:
        """The host's half of set_slot, for several (slot, params, seed)."""
        integers, floats = [], []
        for slot, params, seed in new:
            truncated = params.top_k > 0 or params.top_p < 1
            kind = GREEDY if params.is_greedy else TRUNCATED if truncated else PLAIN
            top_k = max(params.top_k, 0)
            self._kind[slot], self._top_k[slot] = kind, top_k
            self._has_min_p[slot], self._is_typical[slot] = params.min_p > 0, params.typical_p < 1
            log_min_p = math.log(params.min_p) if params.min_p > 0 else -math.inf
            integers.append((slot, seed - 2**64 if seed >= 2**63 else seed, top_k))
            # A greedy row's temperature is not used, and must not be zero.
            temperature = 1.0 if kind == GREEDY else params.temperature
            floats.append((temperature, params.top_p, log_min_p, params.typical_p))
        return SlotValues(
            np.array(integers, dtype=np.int64).reshape(-1, 3).T.copy(),
            np.array(floats, dtype=np.float64).reshape(-1, 4).T.copy(),
        )

    def launch_slots(self, values: SlotValues) -> None:
        """The device's half of set_slot."""
        if values.integers.size:
            integers = to_device(values.integers, self.device)
            self._integers[:, integers[0]] = integers[1:]
            self._floats[:, integers[0]] = to_device(values.floats, self.device)

    def sample(
        self, logits: torch.Tensor, slots: np.ndarray, positions: np.ndarray
    ) -> torch.Tensor:
        """One token per row, also written to last_tokens[slots].

        logits: [>= N, vocab], any float dtype; rows beyond N are padding.
        slots, positions: int64 [N], the row's slot and the position its token will take.
        Returns int64 [N] on the device; -1 where the logits are NaN, or -inf all of them.
        """
        return self.launch(self.plan(slots, positions), logits)

    def plan(self, slots: np.ndarray, positions: np.ndarray) -> Draws:
        """The host's half of sample."""
        kinds, groups = self._kind[slots], []
        for kind in np.unique(kinds).tolist():
            rows = np.flatnonzero(kinds == kind)
            top_k, sampled = self._top_k[slots[rows]], kind != GREEDY
            # Room beyond the largest k shows whether tokens tied with the last one were cut off.
            width = max(TOP_P_WIDTH if (top_k == 0).any() else 64, 2 * int(top_k.max()))
            groups.append(
                DrawGroup(
                    kind=kind,
                    rows=rows,
                    has_min_p=sampled and bool(self._has_min_p[slots[rows]].any()),
                    typical=np.flatnonzero(self._is_typical[slots[rows]] & sampled),
                    width=width,
                    needs_total=bool((top_k == 0).any()),
                )
            )
        return Draws(slots, positions, tuple(groups))

    def launch(self, draws: Draws, logits: torch.Tensor) -> torch.Tensor:
        """The device's half of sample."""
        count = len(draws.slots)
        logits = logits[:count]
        slots, positions = to_device(np.stack((draws.slots, draws.positions)), self.device)
        if len(draws.groups) == 1:
            tokens, peak = self._draw(draws.groups[0], logits, slots, positions)
        else:
            tokens = torch.empty(count, dtype=torch.int64, device=self.device)
            peak = torch.empty(count, dtype=logits.dtype, device=self.device)
            for group in draws.groups:
                index = to_device(group.rows, self.device)
                tokens[index], peak[index] = self._draw(
                    group, logits[index], slots[index], positions[index]
                )
        self.last_tokens[slots] = tokens
        return torch.where(peak.isfinite(), tokens, NO_TOKEN)

    def _draw(
        self,
        group: DrawGroup,
        logits: torch.Tensor,
        slots: torch.Tensor,
        positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens, and the rows' largest logits, which are NaN where any of a row is."""
        if group.kind == GREEDY:
            tokens = first_argmax(logits)
            return tokens, logits.gather(1, tokens[:, None]).squeeze(1)
        seeds, top_k = self._integers[:, slots]
        temperature, top_p, log_min_p, typical_p = self._floats[:, slots]
        peak = logits.amax(-1)
        # Relative to the maximum, low temperatures keep their precision.
        scaled = (logits.float() - peak[:, None].float()).div_(temperature.float()[:, None])
        keys = row_keys(seeds, positions)
        if group.has_min_p:
            scaled.masked_fill_(scaled < log_min_p.float()[:, None], -torch.inf)
        if len(group.typical):
            rows = to_device(group.typical, self.device)
            typical = typical_mask(scaled[rows], typical_p[rows])
            scaled[rows] = scaled[rows].masked_fill_(~typical, -torch.inf)
            # top_k and top_p count from the likeliest that is left.
            scaled -= scaled.amax(-1, keepdim=True)
        if group.kind == PLAIN:
            return sample_plain(scaled, keys), peak
        # exp(0) over the sum: the inverse of a sum whose order does not depend on the batch.
        total = 1 / scaled.softmax(-1).amax(-1) if group.needs_total else torch.ones_like(top_p)
        return sample_truncated(scaled, keys, top_k, top_p, total, group.width), peak


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
