"""What requests ask of their logits before a token is chosen: penalties, biases, bans.

Applied in this order, to rows of requests that ask for any of it: repetition, presence and
frequency penalties; logit_bias; then what must not come is set to -inf (allowed_token_ids,
bad_words_ids, no_repeat_ngram_size, end tokens before min_tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from inlay.runtime.request import Request


@dataclass
class _Bans:
    """What one request must not be given next, from its tokens so far."""

    request: Request
    ngrams: dict[tuple[int, ...], list[int]] = field(default_factory=dict)
    num_indexed: int = 0

    def next(self) -> list[int]:
        """Token ids that must not come now; one may be named twice."""
        request, params = self.request, self.request.params
        tokens = request.token_ids
        banned = self._repeated(params.no_repeat_ngram_size) if params.no_repeat_ngram_size else []
        if len(tokens) - request.num_prompt_tokens < params.min_tokens:
            banned = [*banned, *request.eos_token_ids, *request.stop_token_ids]
        for *before, last in params.bad_words_ids or ():
            if not before or tokens[-len(before) :] == before:
                banned.append(last)
        return banned

    def _repeated(self, size: int) -> list[int]:
        """Tokens that would complete an n-gram that the request has: each is indexed once."""
        tokens = self.request.token_ids
        for end in range(max(self.num_indexed, size - 1), len(tokens)):
            self.ngrams.setdefault(tuple(tokens[end - size + 1 : end]), []).append(tokens[end])
        self.num_indexed = len(tokens)
        return list(self.ngrams.get(tuple(tokens[len(tokens) - size + 1 :]), ()))


class LogitsProcessor:
    """State by slot; `apply` is one step's call."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._size, self._device = (max_num_seqs, vocab_size), device
        self._penalties = torch.zeros(max_num_seqs, 3, device=device)
        # Made for the first request that has penalties: of many engines none ever comes.
        self._counts: torch.Tensor | None = None  # [slots, vocab] int32, of the output's tokens
        self._prompt: torch.Tensor | None = None  # [slots, vocab] bool
        self._allowed: dict[int, torch.Tensor] = {}
        self._bias: dict[int, tuple[list[int], list[float]]] = {}
        self._bans: dict[int, _Bans] = {}
        self._penalised = np.zeros(max_num_seqs, dtype=bool)

    def set_slot(self, slot: int, request: Request) -> None:
        """Take over a request, new or (preempted) one with tokens of its own."""
        params = request.params
        for held in (self._allowed, self._bias, self._bans):
            held.pop(slot, None)
        self._penalised[slot] = params.has_penalties
        if params.has_penalties:
            self._count(slot, request)
        if params.allowed_token_ids is not None:
            allowed = torch.zeros(self._size[1], dtype=torch.bool)
            allowed[list(params.allowed_token_ids)] = True
            self._allowed[slot] = allowed.to(self._device)
        if params.logit_bias:
            self._bias[slot] = list(params.bias), list(params.bias.values())
        if params.bad_words_ids or params.no_repeat_ngram_size or params.min_tokens:
            self._bans[slot] = _Bans(request)

    def _count(self, slot: int, request: Request) -> None:
        if self._counts is None or self._prompt is None:
            self._counts = torch.zeros(self._size, dtype=torch.int32, device=self._device)
            self._prompt = torch.zeros(self._size, dtype=torch.bool, device=self._device)
        params, tokens = request.params, torch.tensor(request.token_ids)
        prompt, output = tokens.split(
            [request.num_prompt_tokens, len(tokens) - request.num_prompt_tokens]
        )
        row = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        self._penalties[slot] = torch.tensor(row)
        self._prompt[slot] = False
        self._prompt[slot, prompt.to(self._device)] = True
        counts = torch.bincount(output, minlength=self._size[1])
        self._counts[slot] = counts.to(self._device, torch.int32)

    def apply(self, logits: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
        """Logits [N, vocab] of the requests in these slots, as they are to be sampled from.

        Rows that ask for nothing are as they were; where none does, so is the tensor.
        """
        penalised = self._penalised[slots]
        rows = {int(slot): row for row, slot in enumerate(slots)}
        asking = [held.keys() & rows for held in (self._allowed, self._bias, self._bans)]
        if not (penalised.any() or any(asking)):
            return logits
        logits = logits[: len(slots)].float().clone()
        if penalised.any():
            self._penalise(logits, np.flatnonzero(penalised), slots[penalised])
        biased = [(rows[s], t, v) for s in asking[1] for t, v in zip(*self._bias[s], strict=True)]
        if biased:
            row, token, value = zip(*biased, strict=True)
            values = torch.tensor(value, dtype=logits.dtype, device=logits.device)
            logits.index_put_(self._places(row, token), values, accumulate=True)
        for slot in asking[0]:
            logits[rows[slot]].masked_fill_(~self._allowed[slot], -torch.inf)
        banned = [(rows[slot], token) for slot in asking[2] for token in self._bans[slot].next()]
        if banned:
            logits[self._places(*zip(*banned, strict=True))] = -torch.inf
        return logits

    def _places(self, rows: Sequence[int], tokens: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return torch.tensor([rows, tokens]).to(self._device).unbind(0)

    def _penalise(self, logits: torch.Tensor, rows: np.ndarray, slots: np.ndarray) -> None:
        assert self._counts is not None
        assert self._prompt is not None
        where = torch.from_numpy(slots).to(self._device)
        index = torch.from_numpy(rows).to(self._device)
        repetition, presence, frequency = self._penalties[where, :, None].unbind(1)
        counts, chosen = self._counts[where], logits[index]
        came = counts > 0
        weaker = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
        chosen = torch.where(came | self._prompt[where], weaker, chosen)
        logits[index] = chosen - frequency * counts - presence * came

    def observe(self, slots: np.ndarray, tokens: torch.Tensor) -> None:
        """Count the tokens [N] that these slots were given."""
        penalised = np.flatnonzero(self._penalised[slots])
        if len(penalised):
            assert self._counts is not None
            where = torch.from_numpy(slots[penalised]).to(self._device)
            given = tokens[torch.from_numpy(penalised).to(self._device)].clamp_min(0)
            ones = torch.ones_like(given, dtype=torch.int32)
            self._counts.index_put_((where, given), ones, accumulate=True)
